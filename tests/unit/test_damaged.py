"""Files that change after they were made, keeping size and time, are refused by the next job."""

import importlib
import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import example_records
import pytest
from conftest import BIN, CHECKPOINTS
from mtpforge.checkpoint import safetensors
from mtpforge.checkpoint.checkpoint import Checkpoint
from mtpforge.checkpoint.model_files import INDEX, head_names
from mtpforge.errors import DamagedError, ForgeError, ToolchainError
from mtpforge.gguf import reader
from mtpforge.hub.fetch_records import FIRST_USE, FetchRecord, HeadRecord, HeadTensor
from mtpforge.io import integrity
from mtpforge.io.integrity import HEADER
from mtpforge.io.ranges import FileRange, digest_of, sha256
from mtpforge.verify.report import Shard
from splits import split

PRE = ("--tokenizer-pre", "qwen35")
TEXT = CHECKPOINTS / "held-out.txt"
PLACES = ("tensor", "header", "truncated")


def call(program: str, *arguments: object) -> None:
    """Run a program of workflow/scripts here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [program, *map(str, arguments)])
        importlib.import_module(program).main()


def in_workflow(file: Path) -> tuple[Path, Path]:
    """A GGUF, and the digests that are recorded beside it."""
    return file, file.with_suffix(".json")


@pytest.fixture(scope="module")
def whole(toolchain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint, and everything that is made from it for a file."""
    folder = tmp_path_factory.mktemp("whole")
    checkpoint = folder / "tiny-qwen3.5"
    shutil.copytree(CHECKPOINTS / "tiny-qwen3.5", checkpoint)
    given = record(checkpoint, out=folder / "checkpoint.json")
    for part in ("all", "trunk", "head"):
        file, digests = in_workflow(folder / f"{part}.gguf")
        options = ("--part", part, "--digests", digests, "--recorded", given, *PRE)
        call("convert", checkpoint, "--out", file, *options)
    text = ("--text", TEXT, "--bin", BIN, "--threads", 1)
    matrix, digest = in_workflow(folder / "imatrix.gguf")
    call("imatrix", folder / "all.gguf", *text, "--out", matrix, "--digest", digest)
    for source, name in (("all", "new"), ("trunk", "base")):
        plan(folder, source, folder / f"{name}-plan.json")
        quantize(folder, source, name)
    inject(folder)
    write_records(folder, checkpoint)
    record(folder / "base.gguf", out=folder / "of-base.json")
    record(folder / "imatrix.gguf", out=folder / "of-matrix.json")
    return folder


def record(path: Path, out: Path) -> Path:
    """Record a file, or the files of a folder, as a user gives them."""
    folder = path if path.is_dir() else path.parent
    files = [each for each in folder.iterdir() if each.is_file()] if path.is_dir() else [path]
    call("local_files", folder, *(each.name for each in files), "--out", out)
    return out


def plan(folder: Path, source: str, out: Path, *options: object) -> None:
    file, digests = in_workflow(folder / f"{source}.gguf")
    given = ("--digests", digests, "--type", "Q4_0", "--bin", BIN, "--threads", 1)
    call("quantize_plan", file, *given, *options, "--out", out)


def quantize(folder: Path, source: str, name: str, *options: object) -> None:
    out, digests = in_workflow(folder / f"{name}.gguf")
    given = ("--plan", folder / f"{name}-plan.json", "--bin", BIN, "--threads", 1)
    call("quantize", folder / f"{source}.gguf", *given, "--digests", digests, "--out", out)


def inject(
    folder: Path, base: str = "base.gguf", known: str = "base.json", out: str = "injected"
) -> None:
    file, digests = in_workflow(folder / f"{out}.gguf")
    options = ("--base-recorded", folder / known, "--head-recorded", folder / "head.json")
    given = ("--head", folder / "head.gguf", "--head-type", "Q8_0", "--bin", BIN)
    call("inject", folder / base, *given, *options, "--digests", digests, "--out", file)


def write_records(folder: Path, checkpoint: Path) -> None:
    """What fetch.py and fetch_head.py would have recorded."""
    fetched = folder / "hub" / checkpoint.name
    shutil.copytree(checkpoint, fetched)
    shutil.copy(folder / "base.gguf", fetched)
    for path in (path for path in fetched.iterdir() if path.is_file()):
        digests: dict[str, str] = {}
        if path.suffix in (".safetensors", ".gguf"):
            shards = path.suffix == ".safetensors"
            digests = reader.hashes(safetensors.ranges(path)) if shards else reader.digests(path)
        record = FetchRecord(path.name, path.stat().st_size, digest_of(path), digests=digests)
        (folder / "hub/records").mkdir(exist_ok=True)
        record.write(folder / f"hub/records/{path.name}.json")


HEADERS = {".gguf": b"general.name", ".safetensors": b'"shape"', ".json": b'"'}
"""Where to look for a digit in a header."""


def end_of_largest(path: Path) -> int:
    """The end of the largest tensor of a file; of another file, its middle."""
    if path.suffix == ".gguf":
        places = reader.read(path).ranges
    elif path.suffix == ".safetensors":
        places = {name: at for name, at in safetensors.ranges(path).items() if name != HEADER}
    else:
        return path.stat().st_size // 2
    largest = max(places.values(), key=lambda place: place.size)
    return largest.offset + largest.size


@dataclass(frozen=True)
class Copy:
    """A private copy of the folder, in which files can be damaged."""

    folder: Path

    def damage(self, name: str, place: str) -> None:
        """Flip one bit at the end of the largest tensor or in the header, or cut the file.

        The file keeps its time. A bit of a digit is flipped in a header, so that it can be parsed.
        """
        path = self.folder / name
        times = path.stat()
        content = bytearray(path.read_bytes())
        if place == "truncated":
            del content[-100:]
        elif place == "header":
            content[content.index(b"5", content.index(HEADERS[path.suffix]))] ^= 1
        else:
            content[end_of_largest(path) - 1] ^= 16
        path.write_bytes(content)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))

    def refuses(self, damaged: str, work: Callable[[], None], out: str) -> str:
        """The message of a job that must refuse a file, name it, and write nothing."""
        before = set(self.folder.rglob("*"))
        with pytest.raises(ForgeError) as caught:
            work()
        message = str(caught.value)
        assert (self.folder / damaged).name in message
        assert "damaged" in message.replace(str(self.folder), "")
        assert "run again" in message or "delete it" in message
        assert len(message.splitlines()) == 1
        assert not (self.folder / out).exists()
        assert set(self.folder.rglob("*.gguf")) <= before
        return message


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Copy:
    shutil.copytree(whole, tmp_path / "copy")
    return Copy(tmp_path / "copy")


@pytest.mark.parametrize("place", PLACES)
def test_a_new_variant_is_not_made_from_a_damaged_conversion(copy: Copy, place: str) -> None:
    folder = copy.folder
    for name in ("new.gguf", "new.json"):
        (folder / name).unlink()
    copy.damage("all.gguf", place)
    if place != "tensor":
        again = folder / "again.json"
        copy.refuses("all.gguf", lambda: plan(folder, "all", again), "again.json")
    if place == "truncated":
        return  # the plan cannot be made, and none is left to run
    message = copy.refuses("all.gguf", lambda: quantize(folder, "all", "new"), "new.gguf")
    if place == "tensor":
        assert "(bytes " in message


def test_a_piece_of_a_damaged_conversion_is_not_made(copy: Copy) -> None:
    folder = copy.folder
    copy.damage("all.gguf", "tensor")
    given = ("--plan", folder / "new-plan.json", "--bin", BIN, "--threads", 1)
    out = folder / "manifests"
    last = ("--piece", "1/2", "--out", out)
    copy.refuses("all.gguf", lambda: call("quantize", folder / "all.gguf", *given, *last), "x")
    assert not list(out.glob("*.json"))


BASES = {
    "made here": ("base.gguf", "base.json"),
    "fetched": ("hub/tiny-qwen3.5/base.gguf", "hub/records"),
    "local": ("base.gguf", "of-base.json"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("base", BASES)
def test_no_head_is_injected_into_a_damaged_base(copy: Copy, base: str, place: str) -> None:
    name, known = BASES[base]
    inject(copy.folder, name, known, out="again")
    assert digest_of(copy.folder / "again.gguf") == digest_of(copy.folder / "injected.gguf")
    copy.damage(name, place)
    copy.refuses(name, lambda: inject(copy.folder, name, known, out="more"), "more.json")


@pytest.mark.parametrize("place", PLACES)
def test_no_head_is_injected_into_a_split_base_with_a_damaged_file(copy: Copy, place: str) -> None:
    folder = copy.folder / "hub/tiny-qwen3.5"
    files = split(folder / "base.gguf", folder / "split", "x", 10**6)
    for path in files:
        moved = path.rename(folder / path.name)
        size, digests = moved.stat().st_size, reader.digests(moved)
        record = FetchRecord(moved.name, size, digest_of(moved), digests=digests)
        record.write(copy.folder / f"hub/records/{moved.name}.json")
    first, *_, last = (f"hub/tiny-qwen3.5/{path.name}" for path in files)
    inject(copy.folder, first, "hub/records", out="again")
    copy.damage(last if place != "header" else first, place)
    damaged = last if place != "header" else first
    copy.refuses(
        damaged, lambda: inject(copy.folder, first, "hub/records", out="more"), "more.json"
    )


@pytest.mark.parametrize("place", PLACES)
def test_no_damaged_head_is_injected(copy: Copy, place: str) -> None:
    copy.damage("head.gguf", place)
    copy.refuses("head.gguf", lambda: inject(copy.folder, out="more"), "more.json")


CHECKPOINTS_OF = {
    "local": ("tiny-qwen3.5", "checkpoint.json"),
    "fetched": ("hub/tiny-qwen3.5", "hub/records"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "name", ["model-00001-of-00004.safetensors", "config.json", "tokenizer.json"]
)
@pytest.mark.parametrize("kind", CHECKPOINTS_OF)
def test_a_damaged_checkpoint_is_not_converted(
    copy: Copy, kind: str, name: str, place: str
) -> None:
    folder, known = CHECKPOINTS_OF[kind]
    damaged = f"{folder}/{name}"
    copy.damage(damaged, place)
    given = ("--recorded", copy.folder / known, "--out", copy.folder / "more.gguf", *PRE)
    message = copy.refuses(
        damaged, lambda: call("convert", copy.folder / folder, *given), "more.gguf"
    )
    if kind == "fetched":
        assert f"delete it and {copy.folder}/hub/records/{name}.json, and run again" in message
    else:
        assert "restore it, or if it is right, `touch` it, and run again" in message


def fetched_head(folder: Path) -> Path:
    """A checkpoint of which only the head is there, and what fetch_head.py records of it."""
    source = Checkpoint(folder / "tiny-qwen3.5")
    head = folder / "head" / "tiny-qwen3.5"
    shards = {source.tensors[name].shard for name in head_names(source.tensors)}
    head.mkdir(parents=True)
    for name in (*shards, "config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(source.directory / name, head)
    found = [tensor for tensor in source.tensors.values() if tensor.shard in shards]
    index = {"weight_map": {tensor.name: tensor.shard for tensor in found}}
    (head / INDEX).write_text(json.dumps(index))
    files = {path.name: digest_of(path) for path in head.glob("*.json")}
    files |= {shard: sha256(safetensors.ranges(head / shard)[HEADER]) for shard in shards}
    tensors = {
        tensor.name: HeadTensor(tensor.shard, tensor.size, source.digest(tensor), FIRST_USE)
        for tensor in found
    }
    record = HeadRecord("a/b", "0" * 40, tensors, files)
    record.write(folder / "head.json.record")
    return head


@pytest.mark.parametrize("place", PLACES)
def test_a_damaged_head_that_was_fetched_alone_is_not_converted(copy: Copy, place: str) -> None:
    head = fetched_head(copy.folder)
    given = ("--part", "head", "--recorded", copy.folder / "head.json.record", *PRE)
    call("convert", head, *given, "--out", copy.folder / "first.gguf")
    shard = min(head.glob("*.safetensors"))
    name = str(shard.relative_to(copy.folder))
    copy.damage(name, place)
    out = copy.folder / "more.gguf"
    message = copy.refuses(name, lambda: call("convert", head, *given, "--out", out), "more.gguf")
    assert f"delete {head} and {copy.folder}/head.json.record, and run again" in message


def test_a_file_with_another_time_is_another_file(copy: Copy) -> None:
    shard = copy.folder / "tiny-qwen3.5/model-00001-of-00004.safetensors"
    known = ("--recorded", copy.folder / "checkpoint.json", *PRE)

    def convert(name: str) -> None:
        out = copy.folder / f"{name}.gguf"
        record(shard.parent, out=copy.folder / "checkpoint.json")  # as each run does
        call("convert", shard.parent, *known, "--out", out)

    copy.damage("tiny-qwen3.5/model-00001-of-00004.safetensors", "tensor")
    os.utime(shard)
    convert("first")
    assert digest_of(copy.folder / "first.gguf") != digest_of(copy.folder / "all.gguf")
    convert("second")
    copy.damage("tiny-qwen3.5/model-00001-of-00004.safetensors", "tensor")
    with pytest.raises(DamagedError):
        convert("third")
    os.utime(shard)
    convert("third")
    assert digest_of(copy.folder / "third.gguf") == digest_of(copy.folder / "all.gguf")


@pytest.mark.parametrize("place", PLACES)
def test_no_program_gets_away_with_reading_a_damaged_model(copy: Copy, place: str) -> None:
    model, digests = in_workflow(copy.folder / "all.gguf")
    copy.damage("all.gguf", place)
    given = ("--recorded", digests, "--text", TEXT, "--bin", BIN, "--threads", 1)
    for program in ("reference_logits", "imatrix"):
        out = copy.folder / program
        work = lambda: call(program, model, *given, "--out", out)  # noqa: B023, E731
        copy.refuses("all.gguf", work, program)


def test_errors_are_measured_without_hashing_the_whole_model(copy: Copy) -> None:
    """They read a sixteenth of it once a type, and quantize.py hashes all of it."""
    model, digests = in_workflow(copy.folder / "all.gguf")
    given = (model, "--type", "Q4_K", "--recorded", digests, "--bin", BIN, "--threads", 1)

    def measure(name: str) -> None:
        call("quantization_errors", *given, "--out", copy.folder / name)

    copy.damage("all.gguf", "tensor")
    measure("errors.json")
    copy.damage("all.gguf", "header")
    copy.refuses("all.gguf", lambda: measure("more.json"), "more.json")


@pytest.mark.parametrize("place", ["tensor", "truncated"])
def test_a_damaged_importance_matrix_is_not_planned_with(copy: Copy, place: str) -> None:
    matrix, digest = in_workflow(copy.folder / "imatrix.gguf")
    given = ("--imatrix", matrix, "--imatrix-recorded")
    for known in (digest, copy.folder / "of-matrix.json"):
        plan(copy.folder, "all", copy.folder / "first.json", *given, known)
    copy.damage("imatrix.gguf", place)
    for known in (digest, copy.folder / "of-matrix.json"):
        out = copy.folder / "more.json"
        work = lambda: plan(copy.folder, "all", out, *given, known)  # noqa: B023, E731
        copy.refuses("imatrix.gguf", work, "more.json")


@pytest.mark.parametrize("place", PLACES)
def test_a_published_file_that_is_damaged_is_not_described(copy: Copy, place: str) -> None:
    folder = copy.folder
    (folder / "split").mkdir()
    shutil.copy(folder / "base.gguf", folder / "split/split-00001-of-00001.gguf")
    for file, name in (("new.gguf", "new.gguf"), ("split", "split/split-00001-of-00001.gguf")):
        size, digest = (folder / name).stat().st_size, digest_of(folder / name)
        report = example_records.report(file, bytes=size, sha256=digest)
        if file == "split":
            report = replace(report, files=(Shard(Path(name).name, size, digest),))
        report.write(folder / f"{file}.report")
        copy.damage(name, place)
        example_records.STAMP.write(folder / "stamp.json")
        about = json.dumps({"name": "x", "source": {"path": "x"}, "variants": {}})
        card = ("--files", folder / file, "--reports", folder / f"{file}.report")
        card += ("--about", about, "--toolchain", folder / "stamp.json")
        tensors = ("tensors", folder / f"{file}.report", "--file", folder / file)
        given = ("--report", folder / f"{file}.report", "--bin", BIN)
        for program, options in (
            ("card", card),
            ("plot", tensors),
            ("measure", (folder / file, *given)),
        ):
            out = folder / f"{program}.out"
            work = lambda: call(program, *options, "--out", out)  # noqa: B023, E731
            copy.refuses(name, work, out.name)


def test_damaged_logits_are_not_compared_with(copy: Copy) -> None:
    model, out = copy.folder / "all.gguf", copy.folder / "logits.bin"
    given = ("--text", TEXT, "--chunks", 2, "--bin", BIN, "--threads", 1)
    digest = copy.folder / "logits.json"
    call("reference_logits", model, *given, "--digest", digest, "--out", out)
    copy.damage("logits.bin", "tensor")
    known = ("--reference-logits", out, "--logits-recorded", digest)
    measured = copy.folder / "measured.json"
    copy.refuses(
        "logits.bin",
        lambda: call("measure", model, *given, *known, "--out", measured),
        "measured.json",
    )


@pytest.mark.parametrize("program", ["imatrix", "reference_logits", "measure"])
def test_a_damaged_text_is_not_read(copy: Copy, program: str) -> None:
    shutil.copy2(TEXT, copy.folder)
    text, known = copy.folder / TEXT.name, copy.folder / "of-text.json"
    record(text, out=known)
    copy.damage(TEXT.name, "tensor")
    given = ("--text", text, "--text-recorded", known, "--bin", BIN)
    out = copy.folder / "x"
    work = lambda: call(program, copy.folder / "all.gguf", *given, "--out", out)  # noqa: E731
    copy.refuses(TEXT.name, work, "x")


def test_an_injected_file_whose_header_is_damaged_is_not_published(copy: Copy) -> None:
    file, digests = in_workflow(copy.folder / "injected.gguf")
    given = ("--trunk", digests, "--head", "Q8_0", "--bin", BIN)
    out = copy.folder / "report.json"
    copy.damage("injected.gguf", "header")
    with pytest.raises(ForgeError, match="header differs from what was written"):
        call("verify", file, *given, "--out", out)
    assert not out.exists()


def test_verification_finds_that_the_checkpoint_is_damaged_not_the_file(copy: Copy) -> None:
    digests = copy.folder / "all.json"
    given = ("--recorded", copy.folder / "checkpoint.json", "--type", "BF16", "--digests", digests)
    shard = "tiny-qwen3.5/model-00001-of-00004.safetensors"
    copy.damage(shard, "tensor")
    options = ("--checkpoint", copy.folder / "tiny-qwen3.5", *given, *PRE, "--bin", BIN)
    out = copy.folder / "report.json"
    work = lambda: call("verify", copy.folder / "all.gguf", *options, "--out", out)  # noqa: E731
    copy.refuses(shard, work, "report.json")


@pytest.mark.parametrize("place", PLACES)
def test_the_provenance_does_not_list_a_damaged_file(copy: Copy, place: str) -> None:
    folder, shard = copy.folder / "tiny-qwen3.5", "model-00001-of-00004.safetensors"
    given = ('{"path": "x"}', folder / "config.json", folder / shard)
    known = ("--recorded", copy.folder / "checkpoint.json")
    call("materials", *given, *known, "--out", copy.folder / "first.json")
    copy.damage(f"tiny-qwen3.5/{shard}", place)
    for _ in "ab":
        work = lambda: call("materials", *given, *known, "--out", copy.folder / "x")  # noqa: E731
        copy.refuses(f"tiny-qwen3.5/{shard}", work, "x")
        record(folder, out=copy.folder / "checkpoint.json")  # as the next run does


def test_a_program_that_is_damaged_is_not_run(copy: Copy) -> None:
    shutil.copytree(BIN.parent, copy.folder / "toolchain")
    copy.damage("toolchain/bin/llama-quantize", "tensor")
    programs = ("--bin", copy.folder / "toolchain/bin", "--type", "Q4_0")
    out = copy.folder / "x.json"
    with pytest.raises(ToolchainError, match=r"llama-quantize: damaged.*`.venv/bin/snakemake "):
        call("quantize_plan", copy.folder / "all.gguf", *programs, "--out", out)


def test_a_copy_that_is_damaged_is_not_published(copy: Copy) -> None:
    file = copy.folder / "new.gguf"
    report = example_records.report("copy.gguf", bytes=1, sha256=digest_of(file))
    shutil.copy(file, copy.folder / "copy.gguf")
    copy.damage("copy.gguf", "tensor")
    verify = importlib.import_module("verify")
    copy.refuses(
        "copy.gguf", lambda: verify._check_copy(copy.folder / "copy.gguf", report), "copy.gguf"
    )


def test_damage_that_breaks_the_job_is_named_too(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"other")
    part = integrity.Part("x", FileRange(path, 0, 5), "0" * 64)
    damaged = pytest.raises(DamagedError, match=r"x \(bytes 0 to 5\) has changed")
    with damaged, integrity.reading([part]):
        raise ValueError


def test_a_file_that_disappears_is_named(tmp_path: Path) -> None:
    part = integrity.Part("x", FileRange(tmp_path / "x", 0, 5), "0" * 64)
    with pytest.raises(DamagedError, match="cannot be read"):
        integrity.check([part])
