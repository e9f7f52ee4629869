"""Hostile GGUFs, shards and importance matrices: a typed error, quickly and in little memory."""

import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import hostile_files
import pytest
from conftest import CHECKPOINTS, SCRIPTS
from gguf.constants import GGUFValueType as T
from hostile_files import Case
from mtpforge.checkpoint import safetensors
from mtpforge.convert import native
from mtpforge.errors import CheckpointError, GgufError
from mtpforge.gguf import reader
from mtpforge.gguf.metadata import Value
from mtpforge.inject import match
from refusals import Parsers

CASES = hostile_files.cases()
Fails = Callable[..., str]


@pytest.fixture(scope="module")
def parsers() -> Iterator[Parsers]:
    running = Parsers()
    yield running
    running.close()


def test_there_are_many_inputs_of_each_kind() -> None:
    assert len(CASES) > 300 and len({(case.kind, case.name) for case in CASES}) == len(CASES)
    assert min(Counter(case.kind for case in CASES).values()) > 3


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}: {case.name}")
def test_it_is_refused(parsers: Parsers, case: Case) -> None:
    with tempfile.TemporaryDirectory() as folder:  # not kept, as some are large
        found = parsers.parse(case.parser, hostile_files.make(case, Path(folder)))
    assert found.error == "typed", found
    assert found.seconds < hostile_files.SECONDS and found.megabytes < hostile_files.MEGABYTES
    assert folder in found.message and "\n" not in found.message
    assert found.message.isprintable() and len(found.message) < 1500


def test_the_message_of_a_program_is_one_line(fails: Fails, tmp_path: Path) -> None:
    """As a base, as a head, as an importance matrix, and as a shard of a checkpoint."""
    checkpoint = CHECKPOINTS / "tiny-qwen3.5"
    hostile = tmp_path / "hostile.gguf"
    tensor = hostile_files.tensor(b"\x1b[2J")
    hostile.write_bytes(hostile_files.whole([hostile_files.QWEN], [tensor], 32))
    out = tmp_path / "out.gguf"
    escaped = r"a name with control characters, '\x1b[2J'"
    assert escaped in fails("inject.py", hostile, "--head", checkpoint, out=out)
    assert escaped in fails("quantize.py", hostile, "--type", "Q8_0", out=out)
    copy = Path(shutil.copytree(checkpoint, tmp_path / "copy"))
    shard = min(copy.glob("*.safetensors"))
    shard.write_bytes(hostile_files.packed({"\x1b[2J": hostile_files.entry()}))
    message = fails("convert.py", copy, "--tokenizer-pre", "qwen35", out=out)
    assert shard.name in message and "\x1b" not in message


def test_a_shard_that_is_a_link_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(hostile_files.packed({"a": hostile_files.entry()}))
    (tmp_path / "model").mkdir()
    link = tmp_path / "model" / "model.safetensors"
    link.symlink_to(outside)
    with pytest.raises(CheckpointError, match="link out of its folder"):
        safetensors.read_shard_header(link)


@pytest.mark.parametrize("parser", [reader.read, safetensors.read_shard_header])
def test_a_file_that_is_truncated_while_it_is_read_is_refused(
    parser: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = hostile_files.start(0, 1, hostile_files.text_value(b"k", b"x" * (3 << 20)))
    shard = hostile_files.packed(b'{"__metadata__":{"a":"' + b"m" * (3 << 20) + b'"}}', b"")
    path = tmp_path / "file"
    path.write_bytes(header if parser is reader.read else shard)
    fstat, calls = os.fstat, []

    def shrinking(descriptor: int) -> os.stat_result:
        found = fstat(descriptor)
        calls.append(found)
        if len(calls) == 2:  # after the size is known
            os.truncate(path, found.st_size // 2)
        return found

    monkeypatch.setattr(os, "fstat", shrinking)
    with pytest.raises((GgufError, CheckpointError), match="truncated while it was read"):
        parser(path)


READS = """
import os, sys
from pathlib import Path
from mtpforge import cli
from mtpforge.checkpoint.checkpoint import Checkpoint

def main():
    checkpoint = Checkpoint(Path(sys.argv[1]))
    tensor = max(checkpoint.tensors.values(), key=lambda tensor: tensor.offset)
    shard = checkpoint.directory / tensor.shard
    if sys.argv[2] == "before":
        os.truncate(shard, int(sys.argv[3]))
    array = checkpoint.array(tensor)
    os.truncate(shard, int(sys.argv[3]))
    print(array.sum())

cli.run(main)
"""


@pytest.mark.parametrize(("when", "size"), [("before", 0), ("before", 4096), ("after", 4096)])
def test_a_shard_that_is_truncated_while_its_values_are_read_ends_in_a_message(
    when: str, size: int, tmp_path: Path
) -> None:
    """It would be a traceback, or the death of the process by SIGBUS."""
    folder = shutil.copytree(CHECKPOINTS / "tiny-qwen3.5", tmp_path / "model")
    command = [sys.executable, "-c", READS, folder, when, str(size)]
    done = subprocess.run(command, cwd=SCRIPTS, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"error: {folder}/model")
    assert done.stderr.endswith("truncated while it was read\n") and done.stderr.count("\n") == 1


PROGRAMS = (
    "llama-quantize",
    "llama-imatrix",
    "llama-perplexity",
    "llama-server",
    "llama-gguf-split",
)
CALLS: dict[str, tuple[str, ...]] = {
    "quantize.py": ("{bad}", "--type", "Q4_0"),
    "quantize.py ": ("{model}", "--type", "Q4_0", "--imatrix", "{matrix}"),
    "quantize_plan.py": ("{bad}", "--type", "Q4_0", "--pieces", "1"),
    "imatrix.py": ("{bad}", "--text", "{text}"),
    "conversations.py": ("{bad}", "--text", "{text}"),
    "inject.py": ("{bad}", "--head", "{checkpoint}", "--head-type", "Q8_0"),
    "inject.py ": ("{model}", "--head", "{bad}", "--head-type", "Q8_0"),
    "verify.py": ("{bad}", "--checkpoint", "{checkpoint}"),
    "verify.py ": (
        "{model}",
        "--checkpoint",
        "{checkpoint}",
        "--tokenizer-pre",
        "qwen35",
        "--base",
        "{bad}",
    ),
    "measure.py": ("{bad}", "--text", "{text}"),
    "measure_other.py": ("{model}", "--like", "{bad}", "--reference-logits", "{text}"),
    "acceptance.py": ("{bad}",),
    "acceptance.py ": ("{model}", "--target", "{bad}"),
    "reference_logits.py": ("{bad}", "--text", "{text}"),
    "quantization_errors.py": ("{bad}", "--type", "Q4_K"),
    "quantization_errors.py ": ("{model}", "--type", "Q4_K", "--imatrix", "{matrix}"),
    "sensitivity.py": ("{bad}", "--logits", "{text}", "--keep", "{text}.kept"),
    "sensitivity.py ": (
        "{model}", "--logits", "{text}", "--keep", "{text}.kept", "--imatrix", "{matrix}",
    ),
    "allocate.py": ("{bad}", "--type", "Q4_0", "--size", "Q4_0", "--errors", "{text}"),
    "allocate.py ": (
        "{model}", "--type", "Q4_0", "--size", "Q4_0", "--errors", "{text}", "--imatrix",
        "{matrix}",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A whole model, hostile files, and programs of llama.cpp that note that they were called."""
    folder = tmp_path_factory.mktemp("files")
    found = {name: folder / name for name in ("model", "bad", "matrix", "bin")}
    native.convert(CHECKPOINTS / "tiny-qwen3.5", found["model"], "all", "qwen35")
    found["bad"].write_bytes(hostile_files.GOOD[:-1])
    found["matrix"].write_bytes(hostile_files.matrix([1, float("nan")], [1], name=b"output.weight"))
    found["bin"].mkdir()
    for name in PROGRAMS:
        program = found["bin"] / name
        program.write_text(f"#!/bin/sh\necho {name} $@ >> {folder}/called\n")
        program.chmod(0o755)
    return {**found, "text": CHECKPOINTS / "corpus.py", "checkpoint": CHECKPOINTS / "tiny-qwen3.5"}


@pytest.mark.parametrize("program", CALLS)
def test_no_program_of_llama_cpp_gets_a_file_that_is_refused(
    fails: Fails, files: dict[str, Path], tmp_path: Path, program: str
) -> None:
    (files["bin"].parent / "called").unlink(missing_ok=True)
    arguments = [argument.format(**files) for argument in CALLS[program]]
    message = fails(program.strip(), *arguments, "--bin", files["bin"], out=tmp_path / "out.gguf")
    assert str(files["matrix" if "{matrix}" in CALLS[program] else "bad"]) in message
    called = files["bin"].parent / "called"
    assert not called.exists(), called.read_text()


ODD = [
    *(Value.of(number, T.UINT32) for number in (0, 1, (1 << 32) - 1)),
    Value.of(-1, T.INT32),
    Value.of((1 << 64) - 1, T.UINT64),
    *(Value.of(float(number), T.FLOAT32) for number in ("nan", "inf", "-1")),
    Value.of(True, T.BOOL),
    Value.of("", T.STRING),
    Value.of("\x1b[2J" * 9, T.STRING),
    Value(T.STRING, hostile_files.string(b"\xff")),
    *(Value.of(numbers, T.ARRAY, T.UINT32) for numbers in ([], [0] * 3, [1] * 5)),
    Value.of([float("nan")] * 4, T.ARRAY, T.FLOAT32),
    Value.of([True] * 4, T.ARRAY, T.BOOL),
    Value.of(["a", "b"], T.ARRAY, T.STRING),
    Value(T.ARRAY, struct.pack("<IQ", T.STRING, 1) + hostile_files.string(b"\xff")),
]


def test_an_odd_value_of_any_key_of_a_base_gives_a_typed_error_or_none(
    files: dict[str, Path],
) -> None:
    """A vocabulary that was a number gave a traceback."""
    whole = reader.read(files["model"])
    ends: Counter[bool] = Counter()
    for key in whole.metadata:
        for value in ODD:
            odd = replace(whole, metadata={**whole.metadata, key: value})
            for base, head in ((odd, whole), (whole, odd)):
                try:
                    match.check_match(base, head, whole.trunk.tensors)
                    refused = False
                except GgufError as error:
                    refused = True
                    assert str(error).isprintable() and len(str(error)) < 1500
                ends[refused] += 1
                if key.startswith("tokenizer.ggml.tokens") and value is not ODD[-2]:
                    assert refused, value
    assert min(ends.values()) > 100
