"""Split GGUFs equal those of llama-gguf-split, load and draft, and appear whole or not at all."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import BIN, CHECKPOINTS, MODELS, SCRIPTS, Run
from gguf.constants import GGMLQuantizationType, GGUFValueType
from mtpforge import progress, recorded_digests
from mtpforge.convert import native
from mtpforge.errors import ConfigError, DamagedError, GgufError, VerificationError
from mtpforge.gguf import reader, writer
from mtpforge.gguf.file_names import shard_names
from mtpforge.gguf.metadata import Value
from mtpforge.gguf.reader import TensorInfo, aligned
from mtpforge.gguf.split import check, parse_size, plan, splitting
from mtpforge.gguf.split import read as read_split
from mtpforge.io import ranges
from mtpforge.io.ranges import sha256
from mtpforge.llama_cpp import process
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.verify.digests import check_digests
from mtpforge.verify.request import Request
from mtpforge.verify.verify import publish_split
from splits import split

M = 10**6


def edges(path: Path) -> Path:
    """Two tensors that fill a megabyte exactly, one row, odd metadata types, keys of a merge."""
    metadata = {
        "general.architecture": Value.of("qwen35", GGUFValueType.STRING),
        "split.count": Value.of(0, GGUFValueType.UINT16),
        "a.flags": Value.of([True, False], GGUFValueType.ARRAY, GGUFValueType.BOOL),
        "a.texts": Value.of(["", "\u4f60\u597d"], GGUFValueType.ARRAY, GGUFValueType.STRING),
        "a.none": Value.of([], GGUFValueType.ARRAY, GGUFValueType.INT32),
        "a.f64": Value.of(0.1, GGUFValueType.FLOAT64),
        "split.no": Value.of(3, GGUFValueType.UINT16),
        "a.last": Value.of(-1, GGUFValueType.INT8),
    }
    shapes = {"full": (125_000,), "padded": (124_993,), "row": (1, 4), "rows": (1, 2, 4)}
    infos = [TensorInfo(name, shape, GGMLQuantizationType.F32) for name, shape in shapes.items()]
    data = bytes(range(250)) * 2000
    writer.write(path, metadata, [(info, [memoryview(data)[: info.size]]) for info in infos])
    return path


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Both embedded checkpoints converted (5.6 and 11.6 MB), and edge cases (1 MB)."""
    folder = tmp_path_factory.mktemp("sources")
    for model in MODELS:
        native.convert(CHECKPOINTS / model, folder / f"{model}.gguf", "all", "qwen35")
    edges(folder / "edges.gguf")
    return {path.stem: path for path in folder.glob("*.gguf")}


@pytest.fixture
def source(sources: dict[str, Path]) -> Path:
    return sources["tiny-qwen3.5"]


def gguf_split(*arguments: object) -> None:
    """Run llama.cpp's own program; `make toolchain` builds it."""
    process.call([LlamaCpp(BIN).find("llama-gguf-split"), *map(str, arguments)])


def test_sizes_are_powers_of_ten() -> None:
    assert (parse_size("1M"), parse_size("500M"), parse_size("48G")) == (M, 500 * M, 48_000 * M)


GARBLED = [
    "",
    "48",
    "G",
    "1.5G",
    "48g",
    "48GB",
    "48GiB",
    "0G",
    "-1G",
    "+1G",
    " 48G",
    "48G\n",
    "\u0664G",
    "9" * 5000 + "G",
    "1e9G",
]


@pytest.mark.parametrize("text", GARBLED, ids=lambda text: ascii(text[:8]))
def test_an_invalid_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="invalid size"):
        parse_size(text)


@pytest.mark.parametrize(
    ("name", "size", "count"),
    [
        ("tiny-qwen3.5", "1M", 6),
        ("tiny-qwen3.5", "3M", 2),
        ("tiny-qwen3.5-moe", "1M", 16),
        ("tiny-qwen3.5-moe", "7M", 2),
        ("edges", "1M", 2),
    ],
)
def test_shards_equal_those_of_llama_gguf_split(
    sources: dict[str, Path], tmp_path: Path, name: str, size: str, count: int
) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    theirs.mkdir()
    gguf_split("--split", "--split-max-size", size, sources[name], theirs / "Some-4B.Q8_0")
    files = split(sources[name], ours, "Some-4B.Q8_0", parse_size(size))
    assert (
        files
        == [ours / name for name in shard_names("Some-4B.Q8_0", count)]
        == sorted(ours.iterdir())
    )
    assert files[-1].name == f"Some-4B.Q8_0-{count:05d}-of-{count:05d}.gguf"
    assert {file.name: file.read_bytes() for file in ours.iterdir()} == {
        file.name: file.read_bytes() for file in theirs.iterdir()
    }
    assert check(reader.read(sources[name]), files) == []


@pytest.mark.parametrize(
    ("model", "size"), [("tiny-qwen3.5", "1M"), ("tiny-qwen3.5-moe", "2M"), ("tiny-qwen3.5", "9M")]
)
def test_conversion_writes_the_shards_itself(
    run: Run, sources: dict[str, Path], tmp_path: Path, model: str, size: str
) -> None:
    right = split(sources[model], tmp_path / "right/made", "made", parse_size(size))
    made, digests = tmp_path / "made", tmp_path / "made.json"
    run(
        "convert.py", CHECKPOINTS / model, "--tokenizer-pre", "qwen35", "--split", size,
        "--out", made, "--digests", digests,
    )  # fmt: skip
    assert [file.name for file in sorted(made.iterdir())] == [file.name for file in right]
    assert all((made / file.name).read_bytes() == file.read_bytes() for file in right)
    first = made / right[0].name
    whole = read_split(first)
    assert check_digests(whole, digests).passed
    with splitting(whole, tmp_path / "x", "x", parse_size(size)) as files:
        assert all(map(Path.samefile, files, sorted(made.iterdir())))  # no second copy
        assert check(whole, files) == []


def test_shards_of_another_size_are_not_linked(source: Path, tmp_path: Path) -> None:
    made = read_split(split(source, tmp_path / "made", "x", 2 * M)[0])
    for limit in (M, 3 * M, 9 * M):
        with pytest.raises(GgufError, match="is split at another size: merge it"):
            plan(made, limit)


def test_damage_to_the_header_of_any_shard_is_found(run: Run, tmp_path: Path) -> None:
    made, digests = tmp_path / "made", tmp_path / "made.json"
    run(
        "convert.py", CHECKPOINTS / "tiny-qwen3.5", "--tokenizer-pre", "qwen35", "--split", "2M",
        "--out", made, "--digests", digests,
    )  # fmt: skip
    files = sorted(made.iterdir())
    recorded_digests.shards(files[0], digests)
    for path in files:
        before = path.read_bytes()
        place = before.index(b".weight")
        path.write_bytes(before[:place] + b".weighs" + before[place + 7 :])
        with pytest.raises(DamagedError, match=f"{path.name}: damaged: header"):
            recorded_digests.shards(files[0], digests)
        assert not check_digests(read_split(files[0]), digests).passed
        path.write_bytes(before)


def test_llama_gguf_split_merges_the_shards_back(sources: dict[str, Path], tmp_path: Path) -> None:
    source = reader.read(sources["tiny-qwen3.5-moe"])
    files = split(source.path, tmp_path / "out", "x", 2 * M)
    gguf_split("--merge", files[0], tmp_path / "merged.gguf")
    merged = reader.read(tmp_path / "merged.gguf")
    assert list(merged.tensors) == list(source.tensors)
    assert all(
        sha256(merged.ranges[name]) == sha256(source.ranges[name]) for name in source.tensors
    )
    assert {
        key: value for key, value in merged.metadata.items() if not key.startswith("split.")
    } == source.metadata
    again = split(
        merged.path, tmp_path / "again", "x", 2 * M
    )  # despite the split.count of 0 that merging leaves behind
    assert [file.read_bytes() for file in again] == [file.read_bytes() for file in files]


def test_a_gguf_that_fits_stays_one_file_with_a_plain_name(source: Path, tmp_path: Path) -> None:
    weights = sum(reader.aligned(info.size) for info in reader.read(source).tensors.values())
    (file,) = split(source, tmp_path / "out", "x", weights)
    assert file == tmp_path / "out" / "x.gguf" and file.read_bytes() == source.read_bytes()
    assert file.samefile(source)  # no second copy of 40 GB on the disk
    assert (
        len(split(source, tmp_path / "out", "x", weights - 1)) == 2
    )  # and replaces the single file
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_limit_below_the_largest_tensor_is_refused_and_so_is_a_shard(
    source: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError,
        match=r"600,000 bytes are too small: tensor token_embd\.weight .* takes 655,360",
    ):
        plan(reader.read(source), 600_000)
    shard = split(source, tmp_path / "out", "x", M)[1]
    with pytest.raises(GgufError, match="is one shard of a split GGUF: merge it"):
        split(shard, tmp_path / "again", "x", M)
    assert not (tmp_path / "again").exists()


def test_progress_counts_the_bytes_of_each_file(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[tuple[int, int]]] = {}

    @contextmanager
    def bar(label: str) -> Iterator[Callable[[int, int], None]]:
        yield lambda done, total: seen.setdefault(label, []).append((done, total))

    monkeypatch.setattr(progress, "bar", bar)
    files = split(source, tmp_path / "out", "x", M)
    assert list(seen) == [file.name for file in files]
    for steps, file in zip(seen.values(), files, strict=True):
        total = sum(aligned(info.size) for info in reader.read(file).tensors.values())
        assert sorted(steps) == steps and steps[-1] == (total, total)


@pytest.mark.parametrize("stem", ["", ".", "..", ".hidden", "a/b", "../x", "nul\0"])
def test_a_stem_that_leaves_the_folder_or_hides_the_file_is_refused(
    source: Path, tmp_path: Path, stem: str
) -> None:
    with pytest.raises(ConfigError, match="cannot begin a file name"):
        split(source, tmp_path / "out", stem, M)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_with_other_files_is_not_replaced(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    (folder / "precious.gguf").write_text("precious")
    with pytest.raises(ConfigError, match=r"contains precious\.gguf, which is not a shard of x"):
        split(source, folder, "x", M)
    os.link(source, folder / "x.gguf")
    with pytest.raises(ConfigError, match=r"contains the input x\.gguf"):
        split(folder / "x.gguf", folder, "x", M)
    with pytest.raises(ConfigError, match="is a file"):
        split(source, folder / "precious.gguf", "x", M)
    assert sorted(entry.name for entry in folder.iterdir()) == ["precious.gguf", "x.gguf"]


def test_a_failure_leaves_the_existing_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = split(source, tmp_path / "out", "x", 3 * M)

    @contextmanager
    def bar(label: str) -> Iterator[Callable[[int, int], None]]:
        def fail(done: int, total: int) -> None:
            if label.startswith("x-00003-of-"):
                raise RuntimeError

        yield fail

    monkeypatch.setattr(progress, "bar", bar)
    with pytest.raises(RuntimeError):
        split(source, tmp_path / "out", "x", M)
    assert sorted((tmp_path / "out").iterdir()) == before and [
        entry.name for entry in tmp_path.iterdir()
    ] == ["out"]


def test_a_kill_leaves_no_folder_and_the_next_run_cleans_up(source: Path, tmp_path: Path) -> None:
    program = """
import os, signal, sys
from contextlib import contextmanager
from pathlib import Path
from mtpforge import progress, recorded_digests
from mtpforge.gguf import reader
from mtpforge.gguf.split import splitting
@contextmanager
def bar(label):
    yield lambda done, total: label[:7] == "x-00003" and os.kill(os.getpid(), signal.SIGKILL)
progress.bar = bar
with splitting(reader.read(Path(sys.argv[1])), Path(sys.argv[2]), "x", 10**6):
    pass
"""
    command = [sys.executable, "-c", program, str(source), str(tmp_path / "out")]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(SCRIPTS)})
    assert done.returncode == -signal.SIGKILL
    assert [entry.name for entry in tmp_path.iterdir()] == [".out.part"]
    files = split(source, tmp_path / "out", "x", 3 * M)
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"] and sorted(
        (tmp_path / "out").iterdir()
    ) == files


def rewritten(
    path: Path, change: Callable[[dict[str, Value], dict[str, TensorInfo]], object]
) -> None:
    """Rewrite the file with other metadata or tensors."""
    opened = reader.read(path)
    metadata, tensors = dict(opened.metadata), dict(opened.tensors)
    change(metadata, tensors)
    payload = [
        (info, [opened.ranges.get(name) or memoryview(bytes(info.size))])
        for name, info in tensors.items()
    ]  # fmt: skip
    writer.write(path, metadata, payload)


def number(
    key: str, value: int, kind: GGUFValueType = GGUFValueType.UINT16
) -> Callable[[Path], None]:
    return lambda path: rewritten(
        path, lambda metadata, _: metadata.update({key: Value.of(value, kind)})
    )


def flip_a_bit(path: Path) -> None:
    piece = list(reader.read(path).ranges.values())[3]
    raw = bytearray(path.read_bytes())
    raw[piece.offset + piece.size - 1] ^= 1
    path.write_bytes(raw)


def lose_a_tensor(path: Path) -> None:
    rewritten(path, lambda _, tensors: tensors.popitem())


def another_shape(path: Path) -> None:
    name = "blk.0.ssm_out.weight"
    rewritten(
        path,
        lambda _, tensors: tensors.update(
            {name: replace(tensors[name], shape=(tensors[name].elements,))}
        ),
    )


def another_type(path: Path) -> None:
    name, f16 = "blk.0.ssm_out.weight", GGMLQuantizationType.F16
    rewritten(path, lambda _, tensors: tensors.update({name: replace(tensors[name], type=f16)}))


def tensor_of(name: str) -> Callable[[Path], None]:
    info = TensorInfo(name, (256,), GGMLQuantizationType.F32)
    return lambda path: rewritten(path, lambda _, tensors: tensors.update({name: info}))


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "wrong number": (number("split.no", 2), "has a wrong split.no"),
    "wrong count": (number("split.count", 7), "has a wrong split.count"),
    "count of another type": (
        number("split.count", 6, GGUFValueType.UINT32),
        "has a wrong split.count",
    ),
    "wrong total": (
        number("split.tensors.count", 1, GGUFValueType.INT32),
        "has a wrong split.tensors.count",
    ),
    "foreign key": (number("qwen35.block_count", 4), "has a wrong qwen35.block_count"),
    "flipped bit": (flip_a_bit, "blk.0.ffn_down.weight differs from the source"),
    "lost tensor": (lose_a_tensor, "is missing"),
    "another shape": (another_shape, "blk.0.ssm_out.weight has another shape"),
    "another type": (another_type, "blk.0.ssm_out.weight has another type"),
    "tensor twice": (
        tensor_of("blk.0.attn_norm.weight"),
        "blk.0.attn_norm.weight is in x-00001-of-00006.gguf and in x-00002",
    ),
    "foreign tensor": (
        tensor_of("blk.9.attn_norm.weight"),
        "blk.9.attn_norm.weight is not in the source",
    ),
    "truncated": (lambda path: os.truncate(path, 100_000), "truncated"),
    "gone": (lambda path: path.unlink(), "no such file"),
}


@pytest.mark.parametrize(("fault", "named"), FAULTS.values(), ids=FAULTS)
def test_a_faulty_shard_is_found(
    source: Path, tmp_path: Path, fault: Callable[[Path], object], named: str
) -> None:
    files = split(source, tmp_path / "out", "x", M)
    fault(files[1])
    assert named in ", ".join(check(reader.read(source), files))


def test_wrong_names_metadata_or_copies_are_found(source: Path, tmp_path: Path) -> None:
    files, opened = split(source, tmp_path / "out", "x", M), reader.read(source)
    assert any(
        "cannot find all of" in problem
        for problem in check(opened, [files[1], files[0], *files[2:]])
    )
    assert any("cannot find all of" in problem for problem in check(opened, files[:-1]))
    assert check(opened, []) == ["there are no files"]
    number("qwen35.context_length", 1, GGUFValueType.UINT32)(files[0])
    assert check(opened, files) == ["x-00001-of-00006.gguf has a wrong qwen35.context_length"]
    copy = tmp_path / "copy.gguf"
    copy.write_bytes(source.read_bytes())
    assert check(opened, [copy]) == []
    flip_a_bit(copy)
    assert len(check(opened, [copy])) == 1


def test_shards_that_do_not_load_are_not_published(source: Path, tmp_path: Path) -> None:
    with pytest.raises(
        VerificationError, match=r"x is not published: files load: .*llama-server: missing"
    ):
        publish_split(source, tmp_path / "x", M, Request(prompts=("x",)), LlamaCpp(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_a_verified_file_is_published_in_shards_that_load_and_draft(
    source: Path, run: Run, tmp_path: Path
) -> None:
    folder, report = tmp_path / "tiny-BF16", tmp_path / "report.json"
    options = (
        "--prompts",
        CHECKPOINTS / "tiny-qwen3.5" / "prompts",
        "--threads",
        1,
        "--bin",
        BIN,
        "--out",
        report,
    )
    done = run("verify.py", source, *options, "--publish", folder, "--split", "2M")
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    whole = {path.name: ranges.FileRange(path, 0, path.stat().st_size) for path in folder.iterdir()}
    assert found["files"] == [
        {"name": name, "bytes": whole[name].size, "sha256": sha256(whole[name])}
        for name in sorted(whole)
    ]
    assert (
        list(map(str, sorted(whole))) == shard_names("tiny-BF16", 3)
        and found["file"] == "tiny-BF16"
    )
    accepted = {entry["name"]: entry["detail"] for entry in found["checks"]}["files load"].split()
    assert int(accepted[0]) > 0 and "drafts accepted" in done.stdout


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--split", "48G"), "name the folder with --publish"),
        (("--split", "48", "--publish", "x"), "invalid size '48'"),
        (("--split", "48 GiB", "--publish", "x"), "did you mean 48G?"),
        (("--split", "1M", "--publish", "."), "cannot begin"),
        (("--split", "1M", "--publish", SCRIPTS), "give another folder"),
    ],
)
def test_an_impossible_split_is_refused_before_verification(
    source: Path, fails: Callable[..., str], tmp_path: Path, options: tuple[object, ...], named: str
) -> None:
    message = fails("verify.py", source, "--bin", tmp_path, *options, out=tmp_path / "report.json")
    assert named in message  # rather than that llama-server is missing


def test_a_missing_source_is_refused(source: Path, tmp_path: Path) -> None:
    assert split(source, tmp_path / "out", "tiny", 3 * M) == [
        tmp_path / "out" / name for name in shard_names("tiny", 2)
    ]
    assert split(source, tmp_path / "one", "Named", 9 * M) == [tmp_path / "one/Named.gguf"]
    with pytest.raises(GgufError, match="no such file"):
        split(tmp_path / "gone.gguf", tmp_path / "other", "x", 3 * M)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one", "out"]
