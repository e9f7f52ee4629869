"""A strict, fast reader of GGUF files: metadata, tensor entries and each tensor's byte range.

Every length is checked against the file and a limit before it is used. The header is read, not
mapped: a map of a file that somebody truncates would end the process. Format: ggml's docs/gguf.md,
versions 2 and 3.
"""

import math
import os
import re
import struct
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from mtpforge import processors
from mtpforge.errors import GgufError
from mtpforge.gguf.metadata import SCALARS, U32, U64, Value
from mtpforge.gguf.quant_types import TABLE, TENSOR_TYPES, UnknownType
from mtpforge.io.integrity import HEADER, WHOLE
from mtpforge.io.ranges import FileRange, Payload, sha256
from mtpforge.io.text import ANYWHERE, open_regular

MAGIC = b"GGUF"
ALIGNMENT = 32
PADDING = "mtpforge.padding"
"""A metadata key whose length shifts the tensor data: see `writer.padded`."""
VISION = "clip"
"""general.architecture of every vision tower."""
DRAFTERS = ("gemma4-assistant",)
"""general.architecture of draft models that are checkpoints of their own."""
NAME_LIMIT = 63
"""Bytes of a tensor name: GGML_MAX_NAME without the closing zero."""

# Several times what the largest real models have, and little enough to hold and read in a second.
HEADER_LIMIT = 48 << 20
"""Bytes before the tensor data: 16 MB for 262,144 tokens and 515,000 merges."""
KEY_LIMIT = 1024
"""Bytes of a metadata key."""
MOST_VALUES = 1 << 14
MOST_TENSORS = 1 << 15
MOST_ITEMS = 1 << 20
"""Items of an array."""
MOST_ITEMS_IN_ALL = 3 << 20

_ARCHITECTURE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_FIRST_READ = 1 << 20
_LARGEST_READ = 8 << 20

_KNOWN = frozenset(GGMLQuantizationType)

_last_strings: dict[int, bytes] = {}
"""The last array of strings of each length, because files of one model share their vocabulary."""


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's entry; `shape` is in numpy's order, rows first, the reverse of ggml's `ne`."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType | UnknownType
    stored: int = 0
    """Bytes with padding, if the type is unknown; from the offsets, which tell no more."""

    @property
    def known_type(self) -> GGMLQuantizationType:
        """The type. Raises GgufError if it is unknown."""
        if isinstance(self.type, UnknownType):
            raise GgufError(f"{self.name} has the unknown {self.type.name}")
        return self.type

    @property
    def elements(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """The number of bytes, without padding unless the type is unknown."""
        if isinstance(self.type, UnknownType):
            return self.stored
        block, bytes_per_block = GGML_QUANT_SIZES[self.type]
        return self.elements // block * bytes_per_block


@dataclass(frozen=True)
class Gguf:
    """A GGUF file: metadata and tensors in file order, and each tensor's byte range."""

    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]
    ranges: dict[str, FileRange]

    def get(self, key: str, default: Any = None) -> Any:
        """The decoded value of `key`, or `default` if the file does not have it."""
        if key not in self.metadata:
            return default
        try:
            return self.metadata[key].decode()
        except GgufError as error:
            raise GgufError(f"{self.path}: {key}: {error}") from None

    def need(self, key: str, kind: type) -> Any:
        """The value of `key`. Raises GgufError if it is missing or not a `kind`."""
        value = self.get(key)
        if type(value) is not kind:
            problem = "missing" if value is None else "of the wrong type"
            raise GgufError(f"{self.path}: metadata key {key} is {problem}")
        return value

    @property
    def architecture(self) -> str:
        """`general.architecture`, such as qwen35. Raises GgufError."""
        name = str(self.need("general.architecture", str))
        if not _ARCHITECTURE.fullmatch(name):
            raise GgufError(f"{self.path}: general.architecture is {name[:40]!r}")
        return name

    @property
    def is_vision(self) -> bool:
        """Whether the file is a vision tower, which has no language model's blocks."""
        return self.architecture == VISION

    @property
    def is_drafter(self) -> bool:
        """Whether the file is the draft model of another checkpoint, so all its blocks are head."""
        return self.architecture in DRAFTERS

    @property
    def draft_length(self) -> int:
        """How far ahead the head predicts in one go: one token for each block, a drafter one."""
        return 1 if self.is_drafter else len(self.head_blocks)

    @cached_property
    def head_blocks(self) -> range:
        """The block numbers of the MTP head: the last blocks of the file; empty without a head.

        Raises GgufError if the metadata contradicts itself.
        """
        if self.is_vision:
            return range(0)
        blocks = self.need(f"{self.architecture}.block_count", int)
        heads = self.get(f"{self.architecture}.nextn_predict_layers", 0)
        most = blocks if self.is_drafter else blocks - 1
        if type(heads) is not int or not 0 <= heads <= most or heads > len(self.tensors):
            raise GgufError(
                f"{self.path}: {self.architecture}.nextn_predict_layers is {str(heads)[:40]} "
                f"in a file of {blocks} blocks"
            )
        return range(blocks - heads, blocks)

    @cached_property
    def head(self) -> "Gguf":
        """The file reduced to the head's tensors: none without a head, or if it lost them."""
        prefixes = tuple(f"blk.{block}." for block in self.head_blocks)
        return select_tensors(self, [name for name in self.tensors if name.startswith(prefixes)])

    @cached_property
    def trunk(self) -> "Gguf":
        """The file without the head's tensors."""
        head = self.head.tensors
        return select_tensors(self, [name for name in self.tensors if name not in head])


def read(path: Path) -> Gguf:
    """Open a GGUF and check its whole structure against the file. Raises GgufError."""
    path = Path(path)
    with open_file(path) as file:
        return read_from(path, file, os.fstat(file.fileno()).st_size)


class Readable(Protocol):
    """What is read from its start."""

    def read(self, count: int, /) -> bytes:
        """The next bytes, at most this many; none at the end."""


def read_from(path: Path, file: Readable, size: int) -> Gguf:
    """The same of a file of `size` bytes that is open, perhaps elsewhere; `path` names it."""
    return _Parser(path, file, size).parse()


def open_file(path: Path) -> BinaryIO:
    """Open a regular file, which may be a link. Raises GgufError for anything else."""
    if path.is_dir():
        raise GgufError(f"{path}: is a directory, not a GGUF file")
    if not path.exists():
        raise GgufError(f"{path}: no such file")
    return open_regular(path, GgufError, within=ANYWHERE)


def select_tensors(source: Gguf, names: Iterable[str]) -> Gguf:
    """The file reduced to these tensors, in the order given."""
    kept = list(names)
    return replace(
        source,
        tensors={name: source.tensors[name] for name in kept},
        ranges={name: source.ranges[name] for name in kept},
    )


def rows(source: Gguf, name: str, start: int, count: int) -> Gguf:
    """The file reduced to `count` rows of one matrix, from row `start` on."""
    info = source.tensors[name]
    place = source.ranges[name]
    size = place.size // info.shape[0]
    part = replace(place, offset=place.offset + start * size, size=count * size)
    shape = (count, *info.shape[1:])
    return replace(source, tensors={name: replace(info, shape=shape)}, ranges={name: part})


def contents(source: Gguf) -> list[tuple[TensorInfo, Payload]]:
    """The tensors with their bytes, as `writer.write` takes them."""
    return [(info, [source.ranges[name]]) for name, info in source.tensors.items()]


def unreadable(source: Gguf) -> dict[str, int]:
    """The types whose values cannot be read here, with their numbers of tensors."""
    names = [info.type.name for info in source.tensors.values()]
    return {name: names.count(name) for name in sorted({*names} - {*TENSOR_TYPES, TABLE})}


def drop_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape as llama-quantize writes it: ggml does not distinguish (1, 1, n) from (n,)."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


def aligned(position: int) -> int:
    """`position` rounded up to the alignment of tensors; of a size, the size with its padding."""
    return (position + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def header_range(source: Gguf) -> FileRange:
    """Everything before the tensor data; of a split file, the first one's."""
    offsets = (place.offset for place in source.ranges.values() if place.path == source.path)
    return FileRange(source.path, 0, min(offsets, default=source.path.stat().st_size))


def digests(path: Path, threads: int | None = None) -> dict[str, str]:
    """The sha256 of the header (key `header`) and of each tensor's bytes. Raises GgufError."""
    return digests_of(read(path), threads)


def digests_of(opened: Gguf, threads: int | None = None) -> dict[str, str]:
    """As `digests`, for an open file."""
    return hashes({"header": header_range(opened), **opened.ranges}, threads)


def hashes(places: Mapping[str, FileRange], threads: int | None = None) -> dict[str, str]:
    """The sha256 of each range, computed in parallel."""
    with ThreadPoolExecutor(threads or processors.allotted()) as pool:
        return dict(zip(places, pool.map(sha256, places.values()), strict=True))


class _Parser:
    """A cursor over the header, which is read as far as it is needed."""

    def __init__(self, path: Path, file: Readable, size: int) -> None:
        self.path = path
        self.file = file
        self.size = size
        self.buffer = bytearray()
        self.position = 0
        self.items = 0

    def parse(self) -> Gguf:
        self.fill(min(4, self.size))
        if self.buffer[:4] != MAGIC:
            raise self.fail("not a GGUF file (no GGUF magic)")
        self.skip(4)
        version = self.number(U32)
        if version not in (2, 3):
            raise self.fail(f"GGUF version {version} is not supported (2 and 3 are)")
        n_tensors = self.number(U64)
        n_values = self.number(U64)
        # An entry takes at least 13 bytes, a tensor 33.
        if n_values > self.size // 13 or n_tensors > self.size // 33:
            raise self.fail(
                f"{n_values:,} metadata values and {n_tensors:,} tensors do not fit into the file"
            )
        if n_values > MOST_VALUES or n_tensors > MOST_TENSORS:
            raise self.fail(
                f"{n_values:,} metadata values and {n_tensors:,} tensors: more than any real model"
            )
        metadata = self.parse_metadata(n_values)
        self.check_alignment(metadata.get("general.alignment"))
        entries = [self.parse_tensor() for _ in range(n_tensors)]
        return self.place(metadata, entries)

    def fail(self, problem: str) -> GgufError:
        return GgufError(f"{self.path}: {problem} (at byte {self.position:,})")

    def fill(self, end: int) -> None:
        """Have the first `end` bytes in the buffer. Raises GgufError if the file lacks them."""
        if end > self.size:
            raise self.fail("truncated: the header runs past the end of the file")
        if end > HEADER_LIMIT:
            raise self.fail(f"its header has more than {HEADER_LIMIT >> 20} MB")
        while len(self.buffer) < end:
            step = min(max(_FIRST_READ, len(self.buffer)), _LARGEST_READ)
            block = self.file.read(step)
            if not block:
                raise self.fail("truncated while it was read")
            self.buffer += block

    def skip(self, count: int) -> None:
        end = self.position + count
        if end > len(self.buffer):
            self.fill(end)
        self.position = end

    def number(self, packer: struct.Struct) -> int:
        self.skip(packer.size)
        return int(packer.unpack_from(self.buffer, self.position - packer.size)[0])

    def since(self, start: int) -> bytes:
        with memoryview(self.buffer) as view:
            return bytes(view[start : self.position])

    def string(self, limit: int) -> str:
        """A key or the name of a tensor."""
        length = self.number(U64)
        if not 1 <= length <= limit:
            raise self.fail(f"a name of {length:,} bytes")
        self.skip(length)
        try:
            text = self.since(self.position - length).decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail("a name that is not UTF-8") from None
        if not text.isprintable():
            raise self.fail(f"a name with control characters, {text[:NAME_LIMIT]!a}")
        return text

    def kind(self) -> GGUFValueType:
        tag = self.number(U32)
        try:
            return GGUFValueType(tag)
        except ValueError:
            raise self.fail(f"unknown metadata type {tag}") from None

    def parse_metadata(self, count: int) -> dict[str, Value]:
        metadata: dict[str, Value] = {}
        for _ in range(count):
            key = self.string(KEY_LIMIT)
            if key in metadata:
                raise self.fail(f"duplicate metadata key {key}")
            kind = self.kind()
            metadata[key] = Value(kind, self.value(kind))
        return metadata

    def check_alignment(self, value: Value | None) -> None:
        if value is None:
            return
        if value.type is not GGUFValueType.UINT32 or value.decode() != ALIGNMENT:
            raise self.fail(
                f"general.alignment is not {ALIGNMENT}: "
                "llama.cpp's tools damage such files: convert the model again with the default"
            )

    def value(self, kind: GGUFValueType) -> bytes:
        """The bytes of a value, as they follow its type."""
        if kind is GGUFValueType.ARRAY:
            return self.array()
        start = self.position
        if kind is GGUFValueType.STRING:
            self.skip_strings(1)
        else:
            self.skip(SCALARS[kind].size)
        raw = self.since(start)
        self.check_flags(kind, raw)
        return raw

    def array(self) -> bytes:
        """Skip an array at once if the last file had the same strings, else check its items."""
        start = self.position
        item = self.kind()
        count = self.number(U64)
        self.check_count(item, count)
        known = _last_strings.get(count) if item is GGUFValueType.STRING else None
        if known and start + len(known) <= min(self.size, HEADER_LIMIT):
            self.fill(start + len(known))
            if self.buffer.startswith(known, start):
                self.position = start + len(known)
                return known
        if item is GGUFValueType.STRING:
            self.skip_strings(count)
        else:
            self.skip(SCALARS[item].size * count)
        raw = self.since(start)
        self.check_flags(item, raw[12:] if item is GGUFValueType.BOOL else b"")
        if item is GGUFValueType.STRING and count > 10_000:
            _last_strings[count] = raw
        return raw

    def check_count(self, item: GGUFValueType, count: int) -> None:
        if item is GGUFValueType.ARRAY:
            raise self.fail("an array of arrays, which llama.cpp cannot read")
        least = 8 if item is GGUFValueType.STRING else SCALARS[item].size
        if count > (self.size - self.position) // least:
            raise self.fail(f"truncated: {count:,} items do not fit into the rest of the file")
        self.items += count
        if count > MOST_ITEMS or self.items > MOST_ITEMS_IN_ALL:
            raise self.fail(f"an array of {count:,} items: more than any real model")

    def check_flags(self, kind: GGUFValueType, raw: bytes) -> None:
        if kind is GGUFValueType.BOOL and raw.strip(b"\0\1"):
            raise self.fail("a truth value that is neither 0 nor 1")

    def skip_strings(self, count: int) -> None:
        """Skip strings one by one.

        The loop uses local names only: it runs half a million times for a real vocabulary.
        """
        position = self.position
        unpack = U64.unpack_from
        buffer = self.buffer
        limit = len(buffer) - 8
        for _ in range(count):
            if position > limit:
                self.position = position
                self.fill(position + 8)
                limit = len(buffer) - 8
            position += 8 + unpack(buffer, position)[0]
        self.skip(position - self.position)

    def parse_tensor(self) -> tuple[TensorInfo, int]:
        """A tensor's entry and the offset of its data."""
        name = self.string(NAME_LIMIT)
        if name in (HEADER, WHOLE):
            raise self.fail(f"a tensor named {name}, as digests name a part of a file")
        n_dims = self.number(U32)
        if not 1 <= n_dims <= 4:
            raise self.fail(f"tensor {name} has {n_dims} dimensions")
        shape = tuple(self.number(U64) for _ in range(n_dims))[::-1]
        tag = self.number(U32)
        offset = self.number(U64)
        kind = GGMLQuantizationType(tag) if tag in _KNOWN else UnknownType(tag)
        block = GGML_QUANT_SIZES[kind][0] if isinstance(kind, GGMLQuantizationType) else 1
        if not all(shape) or math.prod(shape) >= 1 << 62 or shape[-1] % block:
            raise self.fail(f"tensor {name}: shape {list(shape)} is impossible for {kind.name}")
        return TensorInfo(name, shape, kind), offset

    def place(self, metadata: dict[str, Value], entries: list[tuple[TensorInfo, int]]) -> Gguf:
        """The file with each tensor's byte range. Data must follow in entry order, without gaps."""
        start = aligned(self.position)
        ends = [offset for _, offset in entries[1:]] + [self.size - start]
        expected = 0
        tensors: dict[str, TensorInfo] = {}
        ranges: dict[str, FileRange] = {}
        for (info, offset), end in zip(entries, ends, strict=False):
            if info.name in tensors:
                raise self.fail(f"duplicate tensor {info.name}")
            if offset != expected:
                raise self.fail(
                    f"tensor {info.name} lies at offset {offset:,}, expected {expected:,}"
                )
            if isinstance(info.type, UnknownType):
                info = self.measured(info, end - offset)
            if start + offset + info.size > self.size:
                raise GgufError(
                    f"{self.path}: truncated: tensor {info.name} runs past the end of the file"
                )
            tensors[info.name] = info
            ranges[info.name] = FileRange(self.path, start + offset, info.size)
            expected = aligned(offset + info.size)
        if self.size > start + expected:
            raise GgufError(
                f"{self.path}: has {self.size - start - expected:,} bytes after its last tensor"
            )
        return Gguf(self.path, metadata, tensors=tensors, ranges=ranges)

    def measured(self, info: TensorInfo, stored: int) -> TensorInfo:
        """A tensor of an unknown type with its size: up to the next one, or to the end of the file.

        Its padding belongs to it, so a file that ends within the padding is a truncated one.
        """
        if stored <= 0 or stored % ALIGNMENT:
            raise self.fail(
                f"tensor {info.name} of the unknown {info.type.name} takes {stored:,} bytes, not a "
                f"multiple of {ALIGNMENT}: truncated"
            )
        return replace(info, stored=stored)
