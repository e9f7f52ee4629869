"""Importance matrices: read strictly, and computed from a text with `llama-imatrix`."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from gguf.constants import GGMLQuantizationType, GGUFValueType

from mtpforge import recorded_digests
from mtpforge.errors import ConfigError, GgufError, ToolchainError
from mtpforge.gguf import reader
from mtpforge.gguf.reader import NAME_LIMIT, Gguf
from mtpforge.io import storage
from mtpforge.io.atomic import replacing
from mtpforge.io.ranges import FileRange, sha256
from mtpforge.io.text import ANYWHERE, JSON_LIMIT, open_text, text_files
from mtpforge.llama_cpp import memory, process
from mtpforge.llama_cpp.converter_architectures import why_not_drafting
from mtpforge.llama_cpp.programs import Argument, LlamaCpp

CHUNK = 512
"""Tokens per chunk, for which the sums are accumulated: another number gives other bytes."""

MIN_TOKENS = 2 * CHUNK


def compute(
    model: Path,
    text: Path,
    out: Path,
    llama: LlamaCpp,
    recorded_at: Path | None = None,
    special: bool = False,
) -> None:
    """Run a text (UTF-8) through a GGUF, and write its importance matrix as a GGUF.

    `text` can be a folder, whose texts are joined. `special`: names of special tokens in it stand
    for these tokens. The head is covered if it has one block, which llama-server can draft with,
    and llama-imatrix is new enough. `recorded_at` are the GGUF's digests (see `recorded`). Raises
    ConfigError if the text is too short or the GGUF larger than the memory, ToolchainError if
    llama-imatrix fails, DamagedError if the GGUF has changed.
    """
    # A token has at least one byte. Checked here because llama-imatrix can fail without a message.
    if sum(len(start.strip()) for start in _contents(text)) < MIN_TOKENS:
        raise _too_short(text)
    if reason := memory.too_large([model], llama):
        raise ConfigError(
            f"{model}: {reason}, so an importance matrix would take days: compute it on a larger "
            "machine, or take a published one (`imatrix: {repo: ..., file: ..., revision: ...}`)"
        )
    with (
        replacing(out) as temporary,
        tempfile.TemporaryDirectory() as name,
        recorded_digests.reading(model, recorded_at) as opened,
    ):
        folder = Path(name)
        given = _given(text, folder)
        files: list[Argument] = ["-m", model.resolve(), "-f", given, "-o", temporary.resolve()]
        chunks: list[Argument] = ["-c", CHUNK, "-b", CHUNK, "-ub", CHUNK]
        chunks += ["--parse-special"] if special else []
        chunks += _HEAD if _covers_head(opened, llama) else ()
        needed = _size(opened)
        with storage.by_program(temporary, needed):
            storage.require(temporary, needed)
            try:
                llama.imatrix([*files, "--output-format", "gguf", *chunks], folder)
            except ToolchainError as error:
                if "you need at least" in str(error):
                    raise _too_short(text) from None
                raise
            read(temporary)  # llama-imatrix ends with exit code 0 if it cannot write
        check_values(temporary)


def read(path: Path) -> dict[str, int]:
    """The number of values for each tensor that an importance matrix covers. Raises GgufError.

    Reads both formats: GGUF, and the legacy one, commonly called .dat.
    """
    return {name: row.values for name, row in _rows(path).items()}


def check_values(path: Path) -> None:
    """Check the sums and counts of all tensors: finite, not negative, not all counts zero.

    An expert that no token reached has a count and sums of 0. Raises GgufError.
    """
    for name, row in _rows(path).items():
        if fault := _fault(row):
            raise GgufError(f"{path}: {name} {fault}: compute the importance matrix again")


def counts(path: Path) -> dict[str, np.ndarray]:
    """How much was seen of each tensor: a float64 number for each expert, else a single one.

    The legacy format has a single number for all experts. Raises GgufError.
    """
    return {name: _counts(row) for name, row in _rows(path).items()}


def digests(path: Path) -> dict[str, str]:
    """The sha256 of the sums and counts of each tensor. Raises GgufError."""
    return {name: "".join(map(sha256, row.ranges)) for name, row in _rows(path).items()}


@dataclass(frozen=True)
class _Row:
    """The data of a tensor: the number of its sums, and where they and their counts are."""

    values: int
    sums: FileRange
    counts: FileRange
    ranges: list[FileRange]
    """All bytes of the row, for its digest."""
    count_type: str = "<f4"


_SLICE = 1 << 20  # sums checked at a time
_MOST_COUNTS = 1 << 16  # one for each expert


_HEAD = ("--nextn",)
_ENTRY = 400
"""About the bytes of a matrix's counts, statistics and names."""


def _size(model: Gguf) -> int:
    """About the bytes of a model's importance matrix: two sums per column of each matrix."""
    infos = [info for name, info in model.tensors.items() if name.startswith("blk.")]
    matrices = [info for info in infos if len(info.shape) > 1 and min(info.shape[-2:]) > 1]
    return sum(8 * info.elements // info.shape[-2] + _ENTRY for info in matrices)


def _covers_head(opened: Gguf, llama: LlamaCpp) -> bool:
    """Whether llama-imatrix can collect rows for a model's head; it fails on two blocks."""
    return (
        len(opened.head_blocks) == 1
        and why_not_drafting(opened) is None
        and process.knows(llama.find("llama-imatrix"), _HEAD[0])
    )


def _contents(text: Path) -> Iterator[bytes]:
    """The content of each text of a folder, or of the text itself; of a long one, its start.

    Raises ConfigError if there is none, or one is a *.jsonl.
    """
    files = text_files(text)
    if not files:
        raise ConfigError(f"{text}: has no *.txt files")
    for path in files:
        if path.suffix == ".jsonl":
            raise ConfigError(f"{path}: conversations need the chat template: set `chat: true`")
        with open_text(path, ConfigError, within=ANYWHERE) as file:
            yield file.read(JSON_LIMIT)


def _given(text: Path, folder: Path) -> str:
    """The name in `folder` of a link to the text, or of all texts joined: it gets into the file."""
    if not text.is_dir():
        (folder / text.name).symlink_to(text.resolve())
        return text.name
    name = f"{text.resolve().name}.txt"
    with (folder / name).open("wb") as joined:
        for path in text_files(text):
            with open_text(path, ConfigError, within=ANYWHERE) as file:
                shutil.copyfileobj(file, joined)
            joined.write(b"\n\n")
    return name


def _too_short(text: Path) -> ConfigError:
    return ConfigError(
        f"{text}: too short for an importance matrix: needs at least {MIN_TOKENS:,} tokens, "
        f"about {4 * MIN_TOKENS:,} letters of English"
    )


def _rows(path: Path) -> dict[str, _Row]:
    with reader.open_file(path) as file:
        is_gguf = file.read(4) == reader.MAGIC
    rows = _read_gguf(path) if is_gguf else _read_legacy(path)
    if not rows:
        raise GgufError(f"{path}: importance matrix without tensors")
    return rows


_REQUIRED = {
    "imatrix.datasets": GGUFValueType.ARRAY,
    "imatrix.chunk_count": GGUFValueType.UINT32,
    "imatrix.chunk_size": GGUFValueType.UINT32,
}


def _read_gguf(path: Path) -> dict[str, _Row]:
    """Each tensor is stored as NAME.in_sum2 and NAME.counts.

    in_sum2 has a sum of squares for each column of each expert, counts a count for each expert.
    """
    opened = reader.read(path)
    for key, kind in _REQUIRED.items():
        value = opened.metadata.get(key)
        if value is None or value.type is not kind:
            raise GgufError(
                f"{path}: not an importance matrix: metadata key {key} is missing or has the wrong "
                "type"
            )
    names = [name for name in opened.tensors if name.endswith(".in_sum2")]
    return {name.removesuffix(".in_sum2"): _gguf_row(opened, name) for name in names}


def _gguf_row(opened: Gguf, name: str) -> _Row:
    sums = opened.tensors[name]
    counts = opened.tensors.get(f"{name.removesuffix('.in_sum2')}.counts")
    if counts is None or sums.elements % counts.elements or counts.elements > _MOST_COUNTS:
        raise GgufError(f"{opened.path}: {name} has no matching counts")
    if {sums.type, counts.type} != {GGMLQuantizationType.F32}:
        raise GgufError(f"{opened.path}: {name} or its counts are not F32")
    ranges = [opened.ranges[name], opened.ranges[counts.name]]
    return _Row(sums.elements, ranges[0], counts=ranges[1], ranges=ranges)


def _fault(row: _Row) -> str | None:
    """A sentence's end that says what is wrong with the numbers of a row; None if nothing is."""
    counts = _counts(row)
    if not np.isfinite(counts).all() or (counts < 0).any() or not counts.any():
        return f"has the counts {counts[:4].tolist()}"
    for sums in _numbers(row.sums):
        if not np.isfinite(sums).all() or (sums < 0).any():
            return "has sums of squares that are negative or not finite"
    width = row.sums.size // counts.size
    for expert in np.flatnonzero(counts == 0).tolist():
        place = FileRange(row.sums.path, row.sums.offset + expert * width, width)
        if any(sums.any() for sums in _numbers(place)):
            return f"has sums for expert {expert}, but a count of 0"
    return None


def _counts(row: _Row) -> np.ndarray:
    return np.concatenate([*_numbers(row.counts, row.count_type)]).astype(np.float64)


def _numbers(place: FileRange, kind: str = "<f4") -> Iterator[np.ndarray]:
    """Yield the numbers of a range in slices. Raises GgufError if the file has become shorter."""
    for start in range(0, place.size, 4 * _SLICE):
        count = min(4 * _SLICE, place.size - start) // 4
        found = np.fromfile(place.path, kind, count, offset=place.offset + start)
        if found.size < count:
            raise GgufError(f"{place.path}: truncated while it was read")
        yield found


def _read_legacy(path: Path) -> dict[str, _Row]:
    """Little-endian int32 and float32.

    The number of entries, each entry's name, calls and values, then calls and data set.
    """
    rows: dict[str, _Row] = {}
    with reader.open_file(path) as file:
        legacy = _Legacy(path, file)
        for _ in range(legacy.entries()):
            name = legacy.name()
            if name in rows or not name or not name.isprintable():
                raise GgufError(
                    f"{path}: not an importance matrix: duplicate or invalid tensor name {name!r}"
                )
            rows[name] = legacy.row()
        if not legacy.at_end():  # some files end here
            legacy.number()
            legacy.skip(legacy.number(), 1)
            legacy.check_end()
    return rows


class _Legacy:
    """A cursor over a file of the legacy format; every length is checked before it is used."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.file = file
        self.size = os.fstat(file.fileno()).st_size

    def number(self) -> int:
        return int.from_bytes(self.file.read(self.length(4, 1)), "little", signed=True)

    def entries(self) -> int:
        count = self.number()
        if count > reader.MOST_TENSORS:
            raise self._invalid(count)
        return count

    def name(self) -> str:
        size = self.number()
        if size > NAME_LIMIT:
            raise self._invalid(size)
        try:
            return self.file.read(self.length(size, 1)).decode("utf-8")
        except UnicodeDecodeError:
            raise self._invalid(size) from None

    def row(self) -> _Row:
        start = self.file.tell()
        self.number()  # calls
        values = self.number()
        if values < 1:
            raise self._invalid(values)
        size = self.skip(values, 4)
        return _Row(
            values,
            sums=FileRange(self.path, start + 8, size),
            counts=FileRange(self.path, start, 4),
            ranges=[FileRange(self.path, start, 8 + size)],
            count_type="<i4",
        )

    def skip(self, count: int, unit: int) -> int:
        size = self.length(count, unit)
        self.file.seek(size, os.SEEK_CUR)
        return size

    def check_end(self) -> None:
        if not self.at_end():
            raise self._invalid(self.size - self.file.tell())

    def at_end(self) -> bool:
        return self.file.tell() == self.size

    def length(self, count: int, unit: int) -> int:
        """The bytes of `count` values of `unit` bytes. Raises GgufError if the file lacks them."""
        if count < 0 or count * unit > self.size - self.file.tell():
            raise self._invalid(count)
        return count * unit

    def _invalid(self, count: int) -> GgufError:
        return GgufError(
            f"{self.path}: not an importance matrix, or truncated: invalid length {count:,} "
            f"at byte {self.file.tell():,}"
        )
