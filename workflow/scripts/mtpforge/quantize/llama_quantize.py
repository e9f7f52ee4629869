"""Quantize a GGUF with `llama-quantize`: the head at its own type, other tensors by recipe.

llama.cpp has no rule for a NextN head, so the head's type is an override whose pattern comes from
the block count of the file. The program writes its output in place, so it gets a temporary name.
"""

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from gguf.constants import GGUFValueType

from mtpforge.errors import GgufError, ToolchainError
from mtpforge.gguf import reader, split, writer
from mtpforge.gguf.metadata import Value
from mtpforge.gguf.reader import PADDING, Gguf
from mtpforge.io import atomic, storage
from mtpforge.io.atomic import replacing
from mtpforge.llama_cpp.programs import Argument, LlamaCpp
from mtpforge.quantize import imatrix, mixture
from mtpforge.quantize.mixture import Types
from mtpforge.quantize.recipe import plan_overrides
from mtpforge.quantize.request import QuantizeRequest


def quantize(source: Path, out: Path, request: QuantizeRequest, llama: LlamaCpp) -> None:
    """Quantize `source` (BF16, or the first file of a split one) to `out`; prints the types first.

    Raises ConfigError for impossible types, ToolchainError if llama-quantize fails.
    """
    opened = split.read(source)
    types = choose_types(opened, request, llama)
    with replacing(out, needed=_size(opened, types)) as temporary:
        run(
            opened,
            temporary,
            types=types,
            file_type=request.file_type,
            matrix=request.imatrix,
            llama=llama,
        )


def choose_types(source: Gguf, request: QuantizeRequest, llama: LlamaCpp) -> Types:
    """Print the table of types, and return each tensor's type in the order of the quantized file.

    Raises ConfigError for impossible types, and for types that need an importance matrix which is
    missing or does not cover the tensor; GgufError for a source at types that are unknown.
    """
    rows = checked_rows(source, request.imatrix)
    default, chosen = default_and_chosen_types(source, request, llama)
    table = mixture.show(source, default, chosen)
    print(table, flush=True)
    if llama.log:
        with storage.naming(llama.log), llama.log.open("a", encoding="utf-8") as log:
            log.write(f"{table}\n")
    mixture.check_imatrix(source, chosen, request=request, rows=rows)
    return chosen


def checked_rows(source: Gguf, matrix: Path | None) -> dict[str, int]:
    """The number of values of each row of an importance matrix; none without one.

    To be called before llama-quantize reads it. Raises GgufError if it is not whole, ConfigError if
    it cannot be this model's.
    """
    if matrix is None:
        return {}
    rows = imatrix.read(matrix)
    mixture.check_total(source, matrix, rows)
    imatrix.check_values(matrix)
    return rows


def default_and_chosen_types(
    source: Gguf, request: QuantizeRequest, llama: LlamaCpp
) -> tuple[Types, Types]:
    """The types that llama-quantize would use by default, and with the request's recipes.

    Reads no weights: the file of `source` need not exist. Raises ConfigError for impossible types,
    GgufError for a source at types that are unknown.
    """
    if unread := reader.unreadable(source):
        raise GgufError(
            f"{source.path}: has tensors at {', '.join(unread)}, which llama-quantize cannot read: "
            "quantize a BF16 file"
        )
    overrides = plan_overrides(source, request.file_type, head=request.head, recipe=request.recipe)
    return _dry_runs(source, request, overrides=overrides, llama=llama)


def run(
    source: Gguf, out: Path, types: Types, file_type: str, matrix: Path | None, llama: LlamaCpp
) -> Gguf:
    """Let llama-quantize write `out`, in place, from `source`: a model, or some of its tensors.

    Every type is given explicitly, because the defaults depend on which other tensors exist.
    Returns the quantized file. Raises ToolchainError.
    """
    wanted = {name: kind for name, kind in types.items() if name in source.tensors}
    with _scratch(matrix) as scratch:
        lines = [rf"^{re.escape(name)}$={kind.name.lower()}" for name, kind in wanted.items()]
        type_file = scratch.folder / "types.txt"
        atomic.write_scratch(type_file, "\n".join(lines))
        options = [*scratch.imatrix_options, "--tensor-type-file", type_file]
        # Behind a link, the first file of a split one may have a name that tells no other.
        source_path = source.path.absolute()
        arguments: list[Argument] = [*options, source_path, out.resolve(), file_type]
        needed = _size(source, wanted)
        storage.require(out, needed)
        with storage.by_program(out, needed):
            llama.quantize(arguments, scratch.folder)
            written = reader.read(out)  # checks that it is whole before it gets its name
    if {name: info.type for name, info in written.tensors.items()} != wanted:
        raise ToolchainError(
            f"{out}: llama-quantize did not use the types it was given: is it another version?"
        )
    return written


def without_vocabulary(source: Gguf) -> dict[str, Value]:
    """The metadata that llama-quantize needs for a part of `source`.

    Half a million strings take it longer than most tensors. The vocabulary's size stays, because
    llama.cpp tells some models apart by it.
    """
    kept = {
        key: value
        for key, value in source.metadata.items()
        if not key.startswith("tokenizer.") and key != PADDING
    }
    tokens = source.metadata.get("tokenizer.ggml.tokens")
    if tokens is not None and tokens.item_type is not None:
        size = Value.of(len(tokens), GGUFValueType.UINT32)
        kept.setdefault(f"{source.architecture}.vocab_size", size)
    return kept


def _size(source: Gguf, types: Types) -> int:
    """Bytes of the quantized file, within a few of its header."""
    infos = [replace(source.tensors[name], type=kind) for name, kind in types.items()]
    return writer.size(source.metadata, infos)


def _dry_runs(
    source: Gguf, request: QuantizeRequest, overrides: list[tuple[str, str]], llama: LlamaCpp
) -> tuple[Types, Types]:
    """The types that llama-quantize would use, by default and with the overrides."""
    with _scratch(request.imatrix) as scratch:
        infos = list(source.tensors.values())
        # A path without the temporary folder, because llama-quantize's messages have it.
        weightless = Path("dry-run", source.path.name)
        (scratch.folder / "dry-run").mkdir()
        sparse = scratch.folder / weightless
        with storage.naming(sparse):
            writer.lay_out(sparse, without_vocabulary(source), infos)
        arguments = [*scratch.imatrix_options, weightless, request.file_type]
        options: list[Argument] = []
        for pattern, kind in overrides:
            options += ["--tensor-type", f"{pattern}={kind.lower()}"]
        printed = llama.dry_runs([arguments, [*options, *arguments]], scratch.folder)
    default, chosen = (mixture.parse(output, source) for output in printed)
    return default, chosen


@dataclass(frozen=True)
class _Scratch:
    """A temporary folder to run llama-quantize in, and its options for the importance matrix."""

    folder: Path
    imatrix_options: list[Argument]


@contextmanager
def _scratch(matrix: Path | None) -> Iterator[_Scratch]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options: list[Argument] = []
        if matrix:
            # llama-quantize writes the path that it is given into the file.
            (folder / matrix.name).symlink_to(matrix.resolve())
            options = ["--imatrix", matrix.name]
        yield _Scratch(folder, options)
