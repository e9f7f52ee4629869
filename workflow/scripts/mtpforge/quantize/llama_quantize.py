"""Quantization of a GGUF with `llama-quantize`: the head at a type of its own, other tensors by recipe where one is given.

llama.cpp has no rule for a NextN head, so the head's type is an override whose pattern comes from the file's own block
count. The program writes its output in place, so it is given a temporary name.
"""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from gguf.constants import GGUFValueType

from mtpforge.errors import ToolchainError
from mtpforge.gguf import reader, writer
from mtpforge.gguf.reader import PADDING, Gguf, Value
from mtpforge.io.atomic import replacing
from mtpforge.llama_cpp import process, programs
from mtpforge.quantize import mixture
from mtpforge.quantize.imatrix import read as read_imatrix
from mtpforge.quantize.recipe import Recipe, plan_overrides

BUFFER = ["--max-buffer-size", "256"]
"""MiB of a tensor that llama-quantize works on at a time. The bytes are the same, and no tensor is too large for the memory; by
default it takes gigabytes, and a virtual machine can be longer about getting them than it is about quantizing."""


def quantize(
    source: Path, out: Path | None, file_type: str, head: Recipe = (), recipe: Recipe = (), imatrix: Path | None = None,
    threads: int = 0, bin_dir: Path = programs.DEFAULT_BIN, log: Path | None = None,
) -> None:  # fmt: skip
    """Quantize `source` (BF16) to `out`; `head` is a `head_recipe` (default: Q8_0, or the type of an unquantized file).

    The mixture of types is shown first, and without `out` nothing else is done. Raises ConfigError for types that cannot be,
    ToolchainError where the program fails.
    """
    opened = reader.read(source)
    types = choose(opened, file_type, head, recipe, imatrix, bin_dir, log)
    if out:
        with replacing(out) as temporary:
            run(opened, temporary, types, file_type, imatrix, threads, bin_dir, log)


def choose(
    source: Gguf, file_type: str, head: Recipe = (), recipe: Recipe = (), imatrix: Path | None = None,
    bin_dir: Path = programs.DEFAULT_BIN, log: Path | None = None,
) -> mixture.Types:  # fmt: skip
    """The type that each tensor will have, in the order of the file that llama-quantize writes; the table of them is shown.

    Raises ConfigError for types that cannot be, or not without an importance matrix that covers them.
    """
    overrides = plan_overrides(source, file_type, head, recipe)
    rows = read_imatrix(imatrix) if imatrix else {}
    with _prepared(bin_dir, imatrix) as (command, place):
        shape = writer.lay_out(
            place / "source.gguf", without_vocabulary(source), list(source.tensors.values())
        )
        options = [
            word
            for pattern, kind in overrides
            for word in ("--tensor-type", f"{pattern}={kind.lower()}")
        ]
        dry_runs = [[*command, *more, "--dry-run", shape.path, file_type] for more in ([], options)]
        default, chosen = (mixture.parse(said, source) for said in process.outputs(dry_runs, place))
    table = mixture.show(source, default, chosen)
    print(table, flush=True)
    if log:
        log.write_text(f"{table}\n", encoding="utf-8")
    mixture.check_imatrix(source, chosen, file_type, imatrix, rows)
    return chosen


def run(
    source: Gguf, out: Path, types: mixture.Types, file_type: str, imatrix: Path | None = None,
    threads: int = 0, bin_dir: Path = programs.DEFAULT_BIN, log: Path | None = None,
) -> Gguf:  # fmt: skip
    """Let llama-quantize write `out`, in place: the tensors of `source`, which may be some of a model's, at `types`.

    Each type is given explicitly, because the usual ones depend on which other tensors there are. Raises ToolchainError.
    """
    wanted = {name: kind for name, kind in types.items() if name in source.tensors}
    with _prepared(bin_dir, imatrix) as (command, place):
        lines = [rf"^{re.escape(name)}$={kind.name.lower()}" for name, kind in wanted.items()]
        (place / "types.txt").write_text("\n".join(lines), encoding="utf-8")
        command += ["--tensor-type-file", place / "types.txt"]
        command += BUFFER if process.knows(command[0], BUFFER[0]) else []  # b10605 has not
        command += [
            source.path.resolve(),
            out.resolve(),
            file_type,
            *([str(threads)] if threads else []),
        ]
        process.call(command, log, cwd=place)
    written = reader.read(out)  # whatever it wrote must at least be whole before it gets its name
    if {name: info.type for name, info in written.tensors.items()} != wanted:
        raise ToolchainError(
            f"{out}: llama-quantize made other types than it was told: is it of another version?"
        )
    return written


def without_vocabulary(source: Gguf) -> dict[str, Value]:
    """The metadata that llama-quantize needs for a part of `source`; half a million strings take it longer than many a tensor.

    Of the vocabulary that is the size, by which llama.cpp tells some models apart.
    """
    kept = {
        key: value
        for key, value in source.metadata.items()
        if not key.startswith("tokenizer.") and key != PADDING
    }
    tokens = source.metadata.get("tokenizer.ggml.tokens")
    if tokens is not None and tokens.item_type is not None:
        kept.setdefault(
            f"{source.architecture}.vocab_size", Value.of(len(tokens), GGUFValueType.UINT32)
        )
    return kept


@contextmanager
def _prepared(bin_dir: Path, imatrix: Path | None) -> Iterator[tuple[list[str | Path], Path]]:
    """A command that has the importance matrix, and the folder that it must be run in."""
    with tempfile.TemporaryDirectory() as folder:
        command: list[str | Path] = [programs.find(bin_dir, "llama-quantize")]
        if imatrix:
            (Path(folder) / imatrix.name).symlink_to(
                imatrix.resolve()
            )  # the path that it is given gets into the file
            command += ["--imatrix", imatrix.name]
        yield command, Path(folder)
