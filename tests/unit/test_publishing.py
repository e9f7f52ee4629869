"""The list of a folder's files, and statements of provenance: what they say, and what they refuse."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import Run
from mtpforge.errors import ConfigError, VerificationError
from mtpforge.io import ranges
from mtpforge.publish import provenance, sums
from mtpforge.publish.sums import Sums, check, collect, files_of, read_sums
from mtpforge.rules.build import Build
from repository import CONFIG

MODEL = CONFIG["models"]["tiny-qwen3.5"]
COMMIT = "0123456789abcdef0123456789abcdef01234567"


class At:
    """Wildcards of a rule."""

    def __init__(self, **values: str) -> None:
        self.__dict__.update({"model": "m", **values})


def build(**keys: object) -> Build:
    return Build({"models": {"m": {**MODEL, **keys}}})


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
def test_a_list_that_names_no_file_of_the_folder_is_refused(tmp_path: Path, line: str) -> None:
    (tmp_path / "SHA256SUMS").write_text(f"{'0' * 64}  twice\n{line}\n")
    with pytest.raises(VerificationError, match="SHA256SUMS:2: "):
        read_sums(tmp_path / "SHA256SUMS")


def write(folder: Path, name: str, content: bytes, statement: bool = True) -> dict[str, object]:
    """A verified file with its report and statement."""
    digest = hashlib.sha256(content).hexdigest()
    report = {"file": name, "bytes": len(content), "sha256": digest}
    for part, value in (
        ("reports", report),
        ("provenance", provenance.statement([(name, 0, digest)], {}, [])),
    ):
        (folder / part).mkdir(parents=True, exist_ok=True)
        if statement or part == "reports":
            (folder / part / f"{name}.json").write_text(json.dumps(value))
    (folder / name).write_bytes(content)
    return report


def sums_of(folder: Path) -> Sums:
    return collect(folder, sorted(folder.glob("reports/*")), sorted(folder.glob("provenance/*")))


def older(path: Path, seconds: float) -> None:
    now = path.stat().st_mtime
    os.utime(path, (now - seconds, now - seconds))


def test_what_is_as_it_was_verified_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "a.gguf", b"content")
    read: list[str] = []
    real = ranges.digest_of
    monkeypatch.setattr(sums, "digest_of", lambda path: read.append(path.name) or real(path))
    assert (
        sums_of(tmp_path)["a.gguf"] == hashlib.sha256(b"content").hexdigest()
        and "a.gguf" not in read
    )
    older(tmp_path / "reports/a.gguf.json", 60)  # touched since, or changed
    assert (
        sums_of(tmp_path)["a.gguf"] == hashlib.sha256(b"content").hexdigest() and "a.gguf" in read
    )


def test_what_was_changed_since_is_refused(tmp_path: Path) -> None:
    write(tmp_path, "a.gguf", b"content")
    (tmp_path / "a.gguf").write_bytes(b"longer content")
    with pytest.raises(VerificationError, match="its size differs"):
        sums_of(tmp_path)
    (tmp_path / "a.gguf").write_bytes(b"CONTENT")
    older(tmp_path / "reports/a.gguf.json", 60)
    with pytest.raises(VerificationError, match="changed after"):
        sums_of(tmp_path)


def test_a_split_file_is_listed_by_its_parts() -> None:
    parts = [{"name": f"X-{i}.gguf", "bytes": i, "sha256": str(i) * 64} for i in (1, 2)]
    report = {"file": "X", "bytes": 3, "sha256": "f" * 64, "files": parts}
    assert list(files_of(report)) == [("X/X-1.gguf", 1, "1" * 64), ("X/X-2.gguf", 2, "2" * 64)]


@pytest.fixture
def folder(tmp_path: Path, built: Path) -> Path:
    source = built / "results/tiny-qwen3.5"
    copy = tmp_path / "folder"
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("work"))
    return copy


def problems(folder: Path) -> list[str]:
    return check(folder)


def test_each_way_in_which_a_folder_can_be_wrong_is_named(folder: Path) -> None:
    assert problems(folder) == []
    statement = folder / "provenance/tiny-qwen3.5-BF16.json"
    text = statement.read_text()
    value = json.loads(text)
    value["subject"][0]["digest"]["sha256"] = "0" * 64
    statement.write_text(json.dumps(value))
    found = problems(folder)
    assert "provenance/tiny-qwen3.5-BF16.json: its sha256 differs from SHA256SUMS" in found
    assert any(
        line.startswith("tiny-qwen3.5-BF16.gguf: sha256 in its provenance statement differs")
        for line in found
    )
    for wrong in (
        "[]",
        "{",
        '{"_type": "x", "predicateType": "y", "subject": []}',
        json.dumps({**value, "subject": [1]}),
    ):
        statement.write_text(wrong)
        found = problems(folder)
        assert any(
            line.startswith("provenance/tiny-qwen3.5-BF16.json: not an in-toto") or "JSON" in line
            for line in found
        ), wrong
        assert "tiny-qwen3.5-BF16.gguf: no provenance statement" in found
    statement.write_text(text)
    torn = folder / "tiny-qwen3.5-Q8_0.gguf"
    torn.write_bytes(b"GGUF" + bytes(100))
    listed = folder / "SHA256SUMS"
    lines = [line for line in listed.read_text().splitlines() if not line.endswith("Q8_0.gguf")]
    listed.write_text(
        "\n".join([*lines, f"{hashlib.sha256(torn.read_bytes()).hexdigest()}  {torn.name}\n"])
    )
    found = problems(folder)
    assert any(
        line.startswith(f"{torn.name}: ") and "statement" not in line for line in found
    )  # its tensor table does not open


def test_a_head_that_was_fetched_by_itself_is_stated_tensor_by_tensor(tmp_path: Path) -> None:
    tensor = {
        "shard": "model-2.safetensors",
        "bytes": 1,
        "sha256": "a" * 64,
        "standing": "trusted on first use",
    }
    (tmp_path / "head.json").write_text(
        json.dumps({"repo": "O/N", "revision": COMMIT, "tensors": {"mtp.fc.weight": tensor}})
    )
    (tmp_path / "x.json").write_text(
        json.dumps({"name": "config.json", "bytes": 1, "sha256": "b" * 64})
    )
    found = provenance.materials(
        {"repo": "O/N", "revision": COMMIT}, [tmp_path / "head.json", tmp_path / "x.json"]
    )
    uri = f"pkg:huggingface/O/N@{COMMIT}"
    assert found == [
        {"name": "O/N", "uri": uri, "digest": {"gitCommit": COMMIT}},
        {
            "name": "mtp.fc.weight",
            "uri": f"{uri}#model-2.safetensors",
            "digest": {"sha256": "a" * 64},
            "annotations": {"standing": "trusted on first use"},
        },
        {"name": "config.json", "uri": f"{uri}#config.json", "digest": {"sha256": "b" * 64}},
    ]


def test_a_statement_has_its_own_part_of_the_configuration_and_no_folder() -> None:
    base, matrix = {"path": "/home/me/secret/base.gguf"}, {"path": "/home/me/secret/m.gguf"}
    made = build(
        variants={"BF16": {}, "mine": {"base": base}, "Q4_K_M": {"imatrix": matrix}}, sidecar="Q8_0"
    )
    stems = [
        report.rpartition("/")[2].removesuffix(".json") for report in made.publish.reports(At())
    ]
    parts = {stem: json.loads(made.publish.parameters(At(stem=stem))) for stem in stems}
    assert [list(part.get("variants", {})) for part in parts.values()] == [
        ["BF16"],
        ["mine"],
        ["Q4_K_M"],
        [],
    ]
    assert parts["mtp-tiny-qwen3.5-Q8_0"]["sidecar"] == "Q8_0"
    assert parts["tiny-qwen3.5-mine"]["variants"]["mine"]["base"]["path"] == "base.gguf"
    assert "secret" not in json.dumps(
        [parts, json.loads(made.publish.about(At())), made.publish.source(At())]
    )
    assert made.publish.material_inputs(At(stem="tiny-qwen3.5-mine")) == [base["path"]]
    assert made.publish.material_options(At(stem="tiny-qwen3.5-Q4_K_M")).startswith(
        '--material \'{"path": "m.gguf"}\' /home'
    )
    with pytest.raises(ConfigError, match="no file"):
        made.publish.parameters(At(stem="other"))


def test_a_folder_name_that_cannot_begin_files_is_refused(tmp_path: Path) -> None:
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
def test_a_wrong_target_is_refused_with_its_path(publish: dict[str, object], path: str) -> None:
    with pytest.raises(ConfigError, match=path):
        build(publish=publish)


def test_what_is_uploaded_is_private_unless_it_is_said() -> None:
    assert build(publish={"repo": "O/N"}).publish.upload_options(None) == "--private results/m O/N"
    assert (
        build(publish={"repo": "O/N", "private": False}).publish.upload_options(None)
        == "--public results/m O/N"
    )
    config = yaml.safe_load("{dry_run: 'true'}")
    made = Build({"models": {"m": {**MODEL, "publish": {"repo": "O/N"}}}, **config})
    assert made.publish.upload_options(None) == "--dry-run --private results/m O/N"
    assert made.publish.ends() == ["results/m/SHA256SUMS"]
    assert build().publish.uploads(None) == []


def test_two_models_do_not_share_a_repository() -> None:
    models = {
        name: {**MODEL, "publish": {"repo": repo}} for name, repo in (("a", "O/N"), ("b", "o/n"))
    }
    with pytest.raises(ConfigError, match="models/b/publish/repo: o/n is the repository of a"):
        Build({"models": models})


def test_programs_that_were_built_elsewhere_are_stated_each_with_its_digest(tmp_path: Path) -> None:
    """An in-toto ResourceDescriptor needs an address, a digest or its content."""
    stamp = {
        "llama.cpp": "0.5.0",
        "commit": "abc",
        "programs": {"llama-quantize": "1" * 64, "llama-server": "2" * 64},
    }
    (tmp_path / "stamp.json").write_text(json.dumps(stamp))
    found = provenance.toolchain(tmp_path / "stamp.json")
    assert [(entry["name"], entry["digest"]["sha256"][0]) for entry in found] == [
        ("llama-quantize", "1"),
        ("llama-server", "2"),
    ]
    (tmp_path / "stamp.json").write_text(json.dumps({**stamp, "archive_sha256": "3" * 64}))
    assert provenance.toolchain(tmp_path / "stamp.json")[0]["digest"] == {"sha256": "3" * 64}


def test_a_list_without_a_model_is_no_whole_folder(tmp_path: Path) -> None:
    (tmp_path / "SHA256SUMS").write_text("")
    assert problems(tmp_path) == ["SHA256SUMS: lists no GGUF: is it truncated?"]


def test_to_publish_nothing_is_an_error(run: Run) -> None:
    done = run("publish.py")
    assert done.returncode == 1 and done.stderr.startswith("error: nothing to publish")
