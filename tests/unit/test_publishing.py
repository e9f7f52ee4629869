"""SHA256SUMS and provenance statements: what they contain, and what they refuse."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import example_records
import pytest
import yaml
from conftest import CHECKPOINTS, Run
from mtpforge.errors import ConfigError, UploadError, VerificationError
from mtpforge.hub.fetch_records import FetchRecord
from mtpforge.io import ranges
from mtpforge.publish import access, provenance, sums
from mtpforge.publish.sums import Sums, check, collect, read_sums
from mtpforge.rules.build import Build
from mtpforge.verify.report import Shard
from repository import CONFIG

MODEL = CONFIG["models"]["tiny-qwen3.5"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class At:
    """Wildcards of a rule."""

    def __init__(self, **values: str) -> None:
        self.__dict__.update({"model": "m", **values})


def build(**keys: object) -> Build:
    return Build({"models": {"m": {**MODEL, **keys}}})


# ── SHA256SUMS ──


@pytest.mark.parametrize(
    "line",
    [
        f"{'0' * 64}  ../outside.gguf",
        f"{'0' * 64}  /etc/passwd",
        f"{'0' * 64}  a//b",
        f"{'0' * 64}  a/./b",
        f"{'0' * 64}  a\\b",
        f"{'0' * 64}  a\x1b[2Jb",
        f"{'0' * 64} one-space",
        f"{'0' * 63}  short",
        "",
        f"{'0' * 64}  twice",
    ],
)
def test_malformed_or_outside_paths_are_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  twice\n{line}\n")
    with pytest.raises(VerificationError, match="SHA256SUMS:2: "):
        read_sums(tmp_path / "SHA256SUMS")


def write(folder: Path, name: str, content: bytes) -> None:
    """A verified file with its report and statement."""
    digest = hashlib.sha256(content).hexdigest()
    for part in ("reports", "provenance"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    report = example_records.report(name, bytes=len(content), sha256=digest)
    report.write(folder / "reports" / f"{name}.json")
    statement = provenance.statement([(name, 0, digest)], {}, [])
    (folder / "provenance" / f"{name}.json").write_text(json.dumps(statement))
    (folder / name).write_bytes(content)


def sums_of(folder: Path) -> Sums:
    return collect(folder, sorted(folder.glob("reports/*")), sorted(folder.glob("provenance/*")))


def older(path: Path, seconds: float) -> None:
    now = path.stat().st_mtime
    os.utime(path, (now - seconds, now - seconds))


def test_unchanged_file_is_not_hashed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "a.gguf", b"content")
    digest = hashlib.sha256(b"content").hexdigest()
    hashed: list[str] = []
    real = ranges.digest_of
    monkeypatch.setattr(sums, "digest_of", lambda path: hashed.append(path.name) or real(path))
    assert sums_of(tmp_path)["a.gguf"] == digest
    assert "a.gguf" not in hashed
    older(tmp_path / "reports/a.gguf.json", 60)  # so the file was touched, or changed, since
    assert sums_of(tmp_path)["a.gguf"] == digest
    assert "a.gguf" in hashed


def test_file_changed_after_verification_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.gguf", b"content")
    (tmp_path / "a.gguf").write_bytes(b"longer content")
    with pytest.raises(VerificationError, match="its size differs"):
        sums_of(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"CONTENT")
    older(tmp_path / "reports/a.gguf.json", 60)
    with pytest.raises(VerificationError, match="changed after"):
        sums_of(tmp_path)


def test_split_file_is_listed_by_its_shards() -> None:
    shards = tuple(Shard(name=f"X-{i}.gguf", bytes=i, sha256=str(i) * 64) for i in (1, 2))
    report = example_records.report("X", bytes=3, sha256="f" * 64, files=shards)
    assert report.published == [("X/X-1.gguf", 1, "1" * 64), ("X/X-2.gguf", 2, "2" * 64)]


def test_only_pictures_that_the_card_shows_are_published(tmp_path: Path, run: Run) -> None:
    """Not one that says only that there is nothing to draw."""
    write(tmp_path, "a.gguf", b"content")
    (tmp_path / "plots").mkdir()
    pictures = [tmp_path / "plots" / f"{name}.svg" for name in ("distance", "drafting")]
    for picture in pictures:
        picture.touch()
    (tmp_path / "README.md").write_text('<img src="plots/distance.svg" alt="x">')
    reports = tmp_path.glob("reports/*")
    card = tmp_path / "README.md"
    done = run(
        "sums.py", tmp_path, "--reports", *reports, "--others", card, "--pictures", *pictures
    )
    assert done.returncode == 0, done.stderr
    listed = read_sums(tmp_path / "SHA256SUMS")
    assert "plots/distance.svg" in listed and "plots/drafting.svg" not in listed


def test_list_without_a_gguf_is_reported(tmp_path: Path) -> None:
    (tmp_path / "SHA256SUMS").write_text("")
    assert check(tmp_path) == ["SHA256SUMS: lists no GGUF: is it truncated?"]


# ── check of a folder ──


@pytest.fixture
def folder(tmp_path: Path, built: Path) -> Path:
    source = built / "results/tiny-qwen3.5"
    copy = tmp_path / "folder"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("work"))
    return copy


STATEMENT = "provenance/tiny-qwen3.5-BF16.json"


def test_statement_with_another_digest_is_reported(folder: Path) -> None:
    assert check(folder) == []
    value = json.loads((folder / STATEMENT).read_text())
    value["subject"][0]["digest"]["sha256"] = "0" * 64
    (folder / STATEMENT).write_text(json.dumps(value))
    found = check(folder)
    assert f"{STATEMENT}: its sha256 differs from SHA256SUMS" in found
    begin = "tiny-qwen3.5-BF16.gguf: sha256 in its provenance statement differs"
    assert any(line.startswith(begin) for line in found)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "[]",
        lambda text: "{",
        lambda text: '{"_type": "x", "predicateType": "y", "subject": []}',
        lambda text: json.dumps({**json.loads(text), "subject": [1]}),
    ],
)
def test_malformed_statement_is_reported(folder: Path, damage: Callable[[str], str]) -> None:
    text = (folder / STATEMENT).read_text()
    (folder / STATEMENT).write_text(damage(text))
    found = check(folder)
    assert any(line.startswith(f"{STATEMENT}: not an in-toto") or "JSON" in line for line in found)
    assert "tiny-qwen3.5-BF16.gguf: no provenance statement" in found


def test_gguf_that_does_not_open_is_reported(folder: Path) -> None:
    """Even if its digest is that of the list."""
    torn = folder / "tiny-qwen3.5-Q8_0.gguf"
    torn.write_bytes(b"GGUF" + bytes(100))
    listed = folder / "SHA256SUMS"
    lines = [line for line in listed.read_text().splitlines() if not line.endswith("Q8_0.gguf")]
    digest = hashlib.sha256(torn.read_bytes()).hexdigest()
    listed.write_text("\n".join([*lines, f"{digest}  {torn.name}\n"]))
    found = [line for line in check(folder) if line.startswith(f"{torn.name}: ")]
    assert any("statement" not in line for line in found)


# ── provenance ──


def test_fetched_head_is_stated_tensor_by_tensor(tmp_path: Path) -> None:
    tensor = {
        "shard": "model-2.safetensors",
        "bytes": 1,
        "sha256": "a" * 64,
        "standing": "trusted on first use",
    }
    source = {"repo": "O/N", "revision": COMMIT}
    head = {**source, "tensors": {"mtp.fc.weight": tensor}}
    file = {"name": "config.json", "bytes": 1, "sha256": "b" * 64}
    (tmp_path / "head.json").write_text(json.dumps(head))
    (tmp_path / "x.json").write_text(json.dumps(file))
    uri = f"pkg:huggingface/O/N@{COMMIT}"
    assert provenance.materials(source, [tmp_path / "head.json", tmp_path / "x.json"]) == [
        {"name": "O/N", "uri": uri, "digest": {"gitCommit": COMMIT}},
        {
            "name": "mtp.fc.weight",
            "uri": f"{uri}#model-2.safetensors",
            "digest": {"sha256": "a" * 64},
            "annotations": {"standing": "trusted on first use"},
        },
        {"name": "config.json", "uri": f"{uri}#config.json", "digest": {"sha256": "b" * 64}},
    ]
    as_head = provenance.materials({**source, "role": "head"}, [tmp_path / "head.json"])
    assert [entry["annotations"]["role"] for entry in as_head] == ["head", "head"]
    assert as_head[1]["annotations"]["standing"] == "trusted on first use"


def test_a_joined_file_is_stated_by_the_parts_that_the_commit_has(tmp_path: Path) -> None:
    parts = {f"Q4/x.gguf.part{i}of2": str(i) * 64 for i in (1, 2)}
    record = FetchRecord(name="Q4/x.gguf", bytes=2, sha256="a" * 64, parts=parts)
    record.write(tmp_path / "x.json")
    source = {"repo": "O/N", "revision": COMMIT}
    uri = f"pkg:huggingface/O/N@{COMMIT}"
    assert provenance.materials(source, [tmp_path / "x.json"])[1:] == [
        {"name": name, "uri": f"{uri}#{name}", "digest": {"sha256": digest}}
        for name, digest in parts.items()
    ]


def test_llama_cpp_is_stated_with_a_digest_of_each_program() -> None:
    """An in-toto ResourceDescriptor needs a URI, a digest or content."""
    programs = {"llama-quantize": "1" * 64, "llama-server": "2" * 64}
    stamp = replace(example_records.STAMP, programs=programs)
    found = provenance.toolchain(stamp)
    assert [(entry["name"], entry["digest"]["sha256"][0]) for entry in found] == [
        ("llama-quantize", "1"),
        ("llama-server", "2"),
    ]
    assert found[0]["annotations"] == {
        "llama.cpp": "0.5.0-dev",
        "commit": "0c1e57098",
        "compiler": "GNU 12.2.0",
    }
    (archive, *_) = provenance.toolchain(replace(stamp, archive_sha256="3" * 64))
    assert archive["digest"] == {"sha256": "3" * 64}


def test_statement_has_only_its_part_of_the_configuration(tmp_path: Path) -> None:
    """And file names instead of paths of this machine."""
    folder = tmp_path / "secret"
    folder.mkdir()
    base, matrix = ({"path": str(folder / name)} for name in ("base.gguf", "m.gguf"))
    for given in (base, matrix):
        Path(given["path"]).touch()
    variants = {"BF16": {}, "mine": {"base": base}, "Q4_K_M": {"imatrix": matrix}}
    publish = build(variants=variants, sidecar="Q8_0").publish
    stems = [Path(report).stem for report in publish.reports(At())]
    parts = {stem: json.loads(publish.parameters(At(stem=stem))) for stem in stems}
    assert [list(part.get("variants", {})) for part in parts.values()] == [
        ["BF16"],
        ["mine"],
        ["Q4_K_M"],
        [],
    ]
    assert parts["mtp-tiny-qwen3.5-Q8_0"]["sidecar"] == "Q8_0"
    assert parts["tiny-qwen3.5-mine"]["variants"]["mine"]["base"]["path"] == "base.gguf"
    assert "secret" not in json.dumps([parts, publish.about(At()), publish.source(At())])
    (record,) = publish.material_inputs(At(stem="tiny-qwen3.5-mine"))
    assert record.startswith("resources/local/base.gguf-")
    options = publish.material_options(At(stem="tiny-qwen3.5-Q4_K_M"))
    given = '--material \'{"path": "m.gguf", "recorded": "resources/local/m.gguf-'
    assert options.startswith(given)
    assert options.endswith(matrix["path"])
    with pytest.raises(ConfigError, match="no file"):
        publish.parameters(At(stem="other"))


# ── configuration and upload ──


def test_checkpoint_folder_that_cannot_name_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="rename it"):
        build(source={"path": "check\npoint"})


@pytest.mark.parametrize(
    ("publish", "path"),
    [
        ({"repo": "no-owner"}, "publish/repo"),
        ({"repo": "O/N", "private": "no"}, "publish/private"),
        ({"repo": "O/N", "token": "hf_x"}, "publish/token"),
        ({}, "publish"),
    ],
)
def test_invalid_publish_entry_is_refused_with_its_path(
    publish: dict[str, object], path: str
) -> None:
    with pytest.raises(ConfigError, match=path):
        build(publish=publish)


def test_repositories_are_private_by_default() -> None:
    made = build(publish={"repo": "O/N"})
    assert made.publish.upload_options(None) == "--private results/m O/N"
    made = build(publish={"repo": "O/N", "private": False})
    assert made.publish.upload_options(None) == "--public results/m O/N"


def test_all_refusals_of_the_hub_are_told_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = {"O/a": "no", "O/b": "", "O/c": "no", "O/d": "no network"}

    def check(repo: str) -> str:
        if answers[repo] == "no":
            raise UploadError(f"{repo}: no")
        return answers[repo]

    monkeypatch.setattr(access, "check", check)
    models = {repo[-1]: {**MODEL, "publish": {"repo": repo}} for repo in answers}
    with pytest.raises(UploadError) as error:
        Build({"models": models}).publish.check_access()
    assert str(error.value) == "O/a: no\nO/c: no\nNothing was built or uploaded."
    warning = "warning: O/d: not checked with the Hub: no network\n"
    assert capsys.readouterr().err == warning
    Build({"models": models, "dry_run": True}).publish.check_access()  # it lists the files first
    warnings = f"{warning}warning: O/a: no\nwarning: O/c: no\n"
    assert capsys.readouterr().err == warnings
    Build({"models": models}).publish.check_access(builds=False)  # all may be there already
    assert capsys.readouterr().err == warnings


EARLY = {"repo": "O/N", "when": "verified"}


def test_each_file_is_uploaded_early_if_asked() -> None:
    usual = ["results/summary.md", "results/m/SHA256SUMS"]
    assert build(publish={"repo": "O/N"}).publish.uploads(None) == usual
    early = build(publish=EARLY, measure={}).publish
    names = [f"results/m/work/uploaded/tiny-qwen3.5-{kind}.json" for kind in ("BF16", "Q8_0")]
    assert early.uploads(None) == [*usual, *names]
    at = At(stem="tiny-qwen3.5-Q8_0")
    assert early.examined(at) == [
        "results/m/reports/tiny-qwen3.5-Q8_0.json", "results/m/measure/tiny-qwen3.5-Q8_0.json"
    ]  # fmt: skip
    assert early.place_option(at) == "--private O/N"
    assert early.present(At()) == early.needed(At()) == early.files(At())
    assert early.priority == 0 and "results/m/README.md" in early.folders()
    s3 = build(publish={"url": "s3://bucket/x", "when": "verified", "delete_after": True}).publish
    assert s3.place_option(at) == "--s3 s3://bucket/x --stand-in"


def test_files_that_are_deleted_have_stand_ins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = str(Path(str(MODEL["prompts"])).absolute())
    given = {"source": {"path": str(CHECKPOINTS / "tiny-qwen3.5")}, "prompts": prompts}
    variants = {"BF16": {}, "Q8_0": {"split": "2M"}, "own": {"base": {"type": "Q4_0"}}}
    publish = {**EARLY, "delete_after": True}
    made = build(**given, publish=publish, variants=variants)
    monkeypatch.chdir(tmp_path)
    uploaded = "results/m/work/uploaded/tiny-qwen3.5"
    assert made.publish.present(At()) == [
        f"{uploaded}-BF16.header", f"{uploaded}-Q8_0", f"{uploaded}-own.header"
    ]  # fmt: skip
    assert made.publish.needed(At())[1] == f"{uploaded}-Q8_0.split.json"
    assert [
        made.publish.unneeded(At(stem=f"tiny-qwen3.5-{stem}")).split()
        for stem in ("BF16", "Q8_0.split", "own")
    ] == [
        ["results/m/tiny-qwen3.5-BF16.gguf"],  # the converted file stays
        ["results/m/tiny-qwen3.5-Q8_0", "results/m/work/quantized/Q8_0.gguf"],
        ["results/m/tiny-qwen3.5-own.gguf", "results/m/work/injected/own.gguf"],
    ]
    assert "results/m/README.md" not in made.publish.folders()  # it comes with the upload
    assert len(made.files()) == 3
    note = Path(f"{uploaded}-own.deleted")
    note.parent.mkdir(parents=True)
    note.touch()
    assert "results/m/tiny-qwen3.5-own.gguf" not in made.files() and len(made.files()) == 2
    drawn = At(variant="own", base="tiny-qwen3.5")
    assert made.measure.drawn(drawn) == f"{uploaded}-own.header"
    dry = Build({"models": {"m": {**MODEL, **given, "publish": publish, "variants": variants}},
                 "dry_run": "true"}).publish  # fmt: skip
    assert dry.uploads(None) == ["results/summary.md", "results/m/SHA256SUMS"]
    assert dry.present(At())[::2] == ["results/m/tiny-qwen3.5-BF16.gguf", f"{uploaded}-own.header"]


def test_only_early_files_can_be_deleted() -> None:
    with pytest.raises(ConfigError, match="publish/delete_after: needs `when: verified`"):
        build(publish={"repo": "O/N", "delete_after": True})
    with pytest.raises(ConfigError, match="publish/when: 'verifed': must be"):
        build(publish={"repo": "O/N", "when": "verifed"})


def test_dry_run_uploads_nothing() -> None:
    config = yaml.safe_load("{dry_run: 'true'}")  # as --config passes it
    made = Build({"models": {"m": {**MODEL, "publish": {"repo": "O/N"}}}, **config})
    assert made.publish.upload_options(None) == "--dry-run --private results/m O/N"
    assert made.publish.folders()[-1] == "results/m/SHA256SUMS"
    assert build().publish.uploads(None) == []


def test_a_file_that_failed_leaves_card_and_sums(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = build()
    monkeypatch.chdir(tmp_path)
    names = ("README.md", "DETAILS.md", "SHA256SUMS")
    described = [Path("results/m") / name for name in names]
    described[0].parent.mkdir(parents=True)
    for path in described:
        path.touch()
    made.publish.withdraw(["results/m/measure/x.json", *map(str, described)])
    assert all(path.exists() for path in described)
    made.publish.withdraw(made.files()[:1])
    made.publish.withdraw(made.files())
    assert not any(path.exists() for path in described)


def test_two_models_cannot_share_a_repository() -> None:
    models = {
        name: {**MODEL, "publish": {"repo": repo}} for name, repo in (("a", "O/N"), ("b", "o/n"))
    }
    with pytest.raises(ConfigError, match="models/b/publish/repo: o/n is the repository of a"):
        Build({"models": models})


def test_publishing_nothing_is_an_error(run: Run) -> None:
    done = run("publish.py")
    assert done.returncode == 1
    assert done.stderr.startswith("error: nothing to upload")
