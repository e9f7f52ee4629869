"""GGUF files: a strict, fast reader of everything but the weights.

Metadata values stay encoded until they are needed, so a file with a vocabulary of 248,320 tokens opens in a fraction of a
second and an untouched value is copied byte for byte. Format: ggml's docs/gguf.md, version 3.
"""

import math
import mmap
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from mtpforge.errors import GgufError
from mtpforge.io.ranges import FileRange, Payload, sha256

MAGIC = b"GGUF"
ALIGNMENT = 32
PADDING = "mtpforge.padding"
VISION = "clip"  # general.architecture of every vision tower
NAME_LIMIT = 63  # GGML_MAX_NAME less the closing zero
_last_strings: dict[int, bytes] = {}  # by how many they are: what files of one model have in common

_SCALARS: dict[GGUFValueType, struct.Struct] = {
    GGUFValueType.UINT8: struct.Struct("<B"),
    GGUFValueType.INT8: struct.Struct("<b"),
    GGUFValueType.UINT16: struct.Struct("<H"),
    GGUFValueType.INT16: struct.Struct("<h"),
    GGUFValueType.UINT32: struct.Struct("<I"),
    GGUFValueType.INT32: struct.Struct("<i"),
    GGUFValueType.FLOAT32: struct.Struct("<f"),
    GGUFValueType.BOOL: struct.Struct("<?"),
    GGUFValueType.UINT64: struct.Struct("<Q"),
    GGUFValueType.INT64: struct.Struct("<q"),
    GGUFValueType.FLOAT64: struct.Struct("<d"),
}
U32, U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True)
class Value:
    """One metadata value as it stands in the file: its type, and the bytes after the type tag."""

    type: GGUFValueType
    raw: bytes

    @classmethod
    def of(cls, value: Any, kind: GGUFValueType, item: GGUFValueType | None = None) -> "Value":
        """Encode a Python value; `item` is the type of an array's items. Raises GgufError where it does not fit."""
        try:
            if kind is not GGUFValueType.ARRAY:
                return cls(kind, encode(value, kind))
            assert item is not None
            return cls(kind, U32.pack(item) + U64.pack(len(value)) + _encode_items(value, item))
        except (
            struct.error,
            OverflowError,
            TypeError,
            ValueError,
            AttributeError,
            KeyError,
        ):  # UnicodeError is a ValueError
            raise GgufError(
                f"{str(value)[:40]!r} cannot be stored as {(item or kind).name.lower()}"
            ) from None

    @property
    def item_type(self) -> GGUFValueType | None:
        """The type of an array's items, None for a scalar."""
        return (
            GGUFValueType(U32.unpack_from(self.raw)[0])
            if self.type is GGUFValueType.ARRAY
            else None
        )

    def __len__(self) -> int:
        """The number of items of an array."""
        return int(U64.unpack_from(self.raw, 4)[0])

    def decode(self) -> Any:
        """The value as int, float, bool, str, or a list of them. Raises GgufError on text that is not UTF-8."""
        if self.type is not GGUFValueType.ARRAY:
            return _decode(memoryview(self.raw), 0, self.type)[0]
        item, position, items = self.item_type, 12, []
        assert item is not None
        for _ in range(len(self)):
            entry, position = _decode(memoryview(self.raw), position, item)
            items.append(entry)
        return items


def encode(value: Any, kind: GGUFValueType) -> bytes:
    """The bytes of a scalar or a string, as they follow the type tag."""
    if kind is GGUFValueType.STRING:
        text = value if isinstance(value, bytes) else value.encode("utf-8")
        return U64.pack(len(text)) + text
    return _SCALARS[kind].pack(value)


def _encode_items(values: Sequence[Any], kind: GGUFValueType) -> bytes:
    """All at once, because a real vocabulary has half a million of them."""
    if kind is not GGUFValueType.STRING:
        return struct.pack(f"<{len(values)}{_SCALARS[kind].format[1:]}", *values)
    pack = U64.pack
    parts: list[bytes] = []
    for value in values:
        text = value.encode("utf-8")
        parts += (pack(len(text)), text)
    return b"".join(parts)


def _decode(buffer: memoryview, position: int, kind: GGUFValueType) -> tuple[Any, int]:
    if kind is not GGUFValueType.STRING:
        packer = _SCALARS[kind]
        return packer.unpack_from(buffer, position)[0], position + packer.size
    end = position + 8 + U64.unpack_from(buffer, position)[0]
    try:
        return str(buffer[position + 8 : end], "utf-8"), end
    except UnicodeDecodeError as error:
        raise GgufError(f"a metadata string is not UTF-8 ({error})") from None


@dataclass(frozen=True)
class TensorInfo:
    """A tensor's entry: `shape` rows first (numpy's order, the reverse of ggml's `ne`)."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType

    @property
    def elements(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    @property
    def size(self) -> int:
        """The number of bytes, without padding."""
        block, bytes_per_block = GGML_QUANT_SIZES[self.type]
        return self.elements // block * bytes_per_block


def drop_leading_ones(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape without leading ones, which ggml does not tell apart and llama-quantize leaves out."""
    while len(shape) > 1 and shape[0] == 1:
        shape = shape[1:]
    return shape


@dataclass(frozen=True)
class Gguf:
    """A GGUF file: metadata and tensors in file order, and where each tensor's bytes lie."""

    path: Path
    metadata: dict[str, Value]
    tensors: dict[str, TensorInfo]
    ranges: dict[str, FileRange]

    def get(self, key: str, default: Any = None) -> Any:
        """The decoded metadata value of `key`, or `default` where the file has none."""
        if key not in self.metadata:
            return default
        try:
            return self.metadata[key].decode()
        except GgufError as error:
            raise GgufError(f"{self.path}: {key}: {error}") from None

    def need(self, key: str, kind: type) -> Any:
        """The value of a key that must be there and of a Python type. Raises GgufError."""
        value = self.get(key)
        if type(value) is not kind:
            raise GgufError(
                f"{self.path}: metadata key {key} is {'missing' if value is None else 'of the wrong type'}"
            )
        return value

    @property
    def architecture(self) -> str:
        """`general.architecture`, such as qwen35."""
        return str(self.need("general.architecture", str))

    @property
    def is_vision(self) -> bool:
        """Whether the file is a vision tower, which has no blocks of a language model."""
        return self.architecture == VISION

    @cached_property
    def head_blocks(self) -> range:
        """The block numbers of the MTP head: the last blocks of the file; empty if it has no head.

        Raises GgufError if the metadata contradicts itself.
        """
        if self.is_vision:
            return range(0)
        blocks = self.need(f"{self.architecture}.block_count", int)
        heads = self.get(f"{self.architecture}.nextn_predict_layers", 0)
        if type(heads) is not int or not 0 <= heads < blocks or heads > len(self.tensors):
            raise GgufError(
                f"{self.path}: {self.architecture}.nextn_predict_layers is {str(heads)[:40]} "
                f"in a file of {blocks} blocks"
            )
        return range(blocks - heads, blocks)

    @cached_property
    def head(self) -> "Gguf":
        """The same file with only the head's tensors: none if it has no head, or declares one and lost it."""
        prefixes = tuple(f"blk.{block}." for block in self.head_blocks)
        return select_tensors(self, [name for name in self.tensors if name.startswith(prefixes)])

    @cached_property
    def trunk(self) -> "Gguf":
        """The same file without the head's tensors."""
        return select_tensors(
            self, [name for name in self.tensors if name not in self.head.tensors]
        )


def read(path: Path) -> Gguf:
    """Open a GGUF and check its whole structure against the file. Raises GgufError."""
    path = Path(path)
    try:
        size = path.stat().st_size
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            return _Parser(path, mapped, size).parse()
    except FileNotFoundError:
        raise GgufError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise GgufError(f"{path}: is a directory, not a GGUF file") from None
    except ValueError as error:  # an empty file cannot be mapped
        raise GgufError(f"{path}: not a GGUF file ({error})") from None


class _Parser:
    """A cursor over the mapped header; every length is checked against the file before it is used."""

    def __init__(self, path: Path, buffer: mmap.mmap | bytes, size: int) -> None:
        self.path, self.buffer, self.size, self.position = path, buffer, size, 0

    def fail(self, what: str) -> GgufError:
        return GgufError(f"{self.path}: {what} (at byte {self.position:,})")

    def number(self, packer: struct.Struct) -> int:
        self.skip(packer.size)
        return int(packer.unpack_from(self.buffer, self.position - packer.size)[0])

    def skip(self, count: int) -> None:
        if count > self.size - self.position:
            raise self.fail("truncated: the header runs past the end of the file")
        self.position += count

    def string(self, limit: int) -> str:
        length = self.number(U64)
        if length > limit:
            raise self.fail(f"a name of {length:,} bytes")
        self.skip(length)
        try:
            return self.buffer[self.position - length : self.position].decode("utf-8")
        except UnicodeDecodeError:
            raise self.fail("a name that is not UTF-8") from None

    def kind(self) -> GGUFValueType:
        tag = self.number(U32)
        try:
            return GGUFValueType(tag)
        except ValueError:
            raise self.fail(f"unknown metadata type {tag}") from None

    def parse(self) -> Gguf:
        if self.buffer[:4] != MAGIC:
            raise self.fail("not a GGUF file (no GGUF magic)")
        self.skip(4)
        if (version := self.number(U32)) not in (2, 3):
            raise self.fail(f"GGUF version {version} is not supported (2 and 3 are)")
        n_tensors, n_values = self.number(U64), self.number(U64)
        if (
            n_values > self.size // 13 or n_tensors > self.size // 33
        ):  # the least that an entry takes
            raise self.fail(
                f"{n_values:,} metadata values and {n_tensors:,} tensors do not fit into the file"
            )
        metadata = self.parse_metadata(n_values)
        alignment = metadata.get("general.alignment")
        if alignment is not None and (
            alignment.type is not GGUFValueType.UINT32 or alignment.decode() != ALIGNMENT
        ):
            raise self.fail(
                f"general.alignment is not {ALIGNMENT}: llama.cpp's tools write such files wrongly"
            )
        entries = [self.parse_tensor() for _ in range(n_tensors)]
        return self.place(metadata, entries)

    def parse_metadata(self, count: int) -> dict[str, Value]:
        metadata: dict[str, Value] = {}
        for _ in range(count):
            key = self.string(65535)
            if key in metadata:
                raise self.fail(f"metadata key {key} stands twice")
            kind = self.kind()
            start = self.position
            self.skip_value(kind)
            metadata[key] = Value(kind, self.buffer[start : self.position])
        return metadata

    def skip_value(self, kind: GGUFValueType) -> None:
        if kind is GGUFValueType.STRING:
            self.skip_strings(1)
        elif kind is not GGUFValueType.ARRAY:
            self.skip(_SCALARS[kind].size)
        else:
            item, count = self.kind(), self.number(U64)
            if item is GGUFValueType.ARRAY:
                raise self.fail("an array of arrays, which llama.cpp cannot read")
            if item is GGUFValueType.STRING:
                self.skip_strings(count)
            else:
                self.skip(_SCALARS[item].size * count)

    def skip_strings(self, count: int) -> None:
        """Kept to local names: this loop runs half a million times for a real vocabulary, if it is not that of the file before."""
        if count > (self.size - self.position) // 8:
            raise self.fail(f"truncated: {count:,} strings do not fit into the rest of the file")
        start = position = self.position
        limit, unpack, buffer, known = (
            self.size - 8,
            U64.unpack_from,
            self.buffer,
            _last_strings.get(count),
        )
        if known and buffer[start : start + len(known)] == known:
            self.skip(len(known))
            return
        for _ in range(count):
            if position > limit:
                raise self.fail("truncated: a string runs past the end of the file")
            position += 8 + unpack(buffer, position)[0]
        self.skip(position - start)
        if count > 10_000 and position <= len(buffer):
            _last_strings[count] = buffer[start:position]

    def parse_tensor(self) -> tuple[TensorInfo, int]:
        name = self.string(NAME_LIMIT)
        n_dims = self.number(U32)
        if not 1 <= n_dims <= 4:
            raise self.fail(f"tensor {name} has {n_dims} dimensions")
        shape = tuple(self.number(U64) for _ in range(n_dims))[::-1]
        tag, offset = self.number(U32), self.number(U64)
        try:
            kind = GGMLQuantizationType(tag)
        except ValueError:
            raise self.fail(f"tensor {name} has the unknown type {tag}") from None
        if not all(shape) or math.prod(shape) >= 1 << 62 or shape[-1] % GGML_QUANT_SIZES[kind][0]:
            raise self.fail(f"tensor {name}: shape {list(shape)} is impossible for {kind.name}")
        return TensorInfo(name, shape, kind), offset

    def place(self, metadata: dict[str, Value], entries: list[tuple[TensorInfo, int]]) -> Gguf:
        """Offsets must follow the order of the entries without a gap, and the data must be there."""
        start, expected = aligned(self.position), 0
        tensors, ranges = {}, {}
        for info, offset in entries:
            if info.name in tensors:
                raise self.fail(f"tensor {info.name} stands twice")
            if offset != expected:
                raise self.fail(
                    f"tensor {info.name} lies at offset {offset:,}, expected {expected:,}"
                )
            if start + offset + info.size > self.size:
                raise GgufError(
                    f"{self.path}: truncated: tensor {info.name} runs past the end of the file"
                )
            tensors[info.name] = info
            ranges[info.name] = FileRange(self.path, start + offset, info.size)
            expected = aligned(offset + info.size)
        return Gguf(self.path, metadata, tensors, ranges)


def aligned(position: int) -> int:
    """The first byte from `position` on at which a tensor may begin; of a size, what it takes with its padding."""
    return (position + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT


def header_range(source: Gguf) -> FileRange:
    """Everything before the data."""
    return FileRange(
        source.path,
        0,
        min((p.offset for p in source.ranges.values()), default=source.path.stat().st_size),
    )


def digests(path: Path, threads: int | None = None) -> dict[str, str]:
    """The sha256 of everything before the data (key `header`), and of each tensor's bytes. Raises GgufError."""
    return digests_of(read(path), threads)


def digests_of(opened: Gguf, threads: int | None = None) -> dict[str, str]:
    """The same of a file that is known already."""
    return hashes({"header": header_range(opened), **opened.ranges}, threads)


def hashes(pieces: Mapping[str, FileRange], threads: int | None = None) -> dict[str, str]:
    """The sha256 of each range."""
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        return dict(zip(pieces, pool.map(sha256, pieces.values()), strict=True))


def select_tensors(source: Gguf, names: Iterable[str]) -> Gguf:
    """The same file with only these tensors in view, in the order given."""
    kept = list(names)
    return replace(
        source,
        tensors={n: source.tensors[n] for n in kept},
        ranges={n: source.ranges[n] for n in kept},
    )


def rows(source: Gguf, name: str, start: int, count: int) -> Gguf:
    """The same file with only `count` rows of a matrix in view, from `start` on."""
    info, place = source.tensors[name], source.ranges[name]
    size = place.size // info.shape[0]
    some = replace(place, offset=place.offset + start * size, size=count * size)
    return replace(
        source, tensors={name: replace(info, shape=(count, *info.shape[1:]))}, ranges={name: some}
    )


def contents(source: Gguf) -> list[tuple[TensorInfo, Payload]]:
    """Its tensors, to be written into another file."""
    return [(info, [source.ranges[name]]) for name, info in source.tensors.items()]
