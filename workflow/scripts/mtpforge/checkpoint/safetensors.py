"""Headers of safetensors files, read strictly: the tensors' types, shapes and byte ranges.

The ranges must tile each file exactly. Nothing is executed. Headers are limited further than by the
format's 100 MB, so that reading one takes less than a second and 200 MB.
"""

import json
import math
import os
import struct
import sys
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mtpforge.errors import CheckpointError
from mtpforge.io.integrity import HEADER, WHOLE
from mtpforge.io.ranges import FileRange
from mtpforge.io.text import check_json, open_regular, unique

HEADER_LIMIT = 24 << 20
"""Bytes; tensors take 140 or so each, and the largest real shards have 20,000."""
_WIDE_LIMIT = 2 << 20  # bytes of a header beyond ASCII, which takes up to four times the memory
_NAME_LIMIT = 1000  # characters
_MOST_ENTRIES = 1_000_000  # of `check_json`; a tensor takes about 12
_MOST_KEYS = 260_000  # a tensor has four
_MOST_DIMENSIONS = 16
_LARGEST = 1 << 63
_KEYS = {"dtype", "shape", "data_offsets"}

# safetensors type -> numpy type. numpy lacks BF16 and FP8: they are read as raw integers.
DTYPES: dict[str, np.dtype[Any]] = {
    "F64": np.dtype("<f8"),
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype("<u2"),
    "F8_E4M3": np.dtype("u1"),
    "F8_E5M2": np.dtype("u1"),
    "F8_E8M0": np.dtype("u1"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I16": np.dtype("<i2"),
    "I8": np.dtype("i1"),
    "U8": np.dtype("u1"),
    "BOOL": np.dtype("u1"),
}

# Every type of the format -> bits. Only the tensors that are converted need a type in `DTYPES`: the
# head is read beside a trunk that another program quantized.
BITS = {name: 8 * dtype.itemsize for name, dtype in DTYPES.items()} | {
    "U64": 64, "U32": 32, "U16": 16, "C64": 64, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E3M2": 6, "F6_E2M3": 6, "F4": 4,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class CheckpointTensor:
    """One tensor of a shard: shape (rows first), and byte offset from the start of the shard."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    offset: int
    size: int


def read_shard_header(path: Path) -> list[CheckpointTensor]:
    """Return the tensors of a shard, in the order of its header. Raises CheckpointError."""
    header, size = _read_header(path)
    return parse_shard_header(path, header, size)


def ranges(path: Path) -> dict[str, FileRange]:
    """Return the byte ranges of a shard's header and tensors. Raises CheckpointError."""
    return places(path, read_shard_header(path), path.stat().st_size)


def places(path: Path, tensors: Collection[CheckpointTensor], size: int) -> dict[str, FileRange]:
    """The same from its tensors and its size, of a shard that need not be there."""
    start = min((tensor.offset for tensor in tensors), default=size)
    found = {tensor.name: FileRange(path, tensor.offset, tensor.size) for tensor in tensors}
    return {HEADER: FileRange(path, 0, start), **found}


def header_length(path: Path, start: bytes, size: int) -> int:
    """Return the length of a shard's header, from its first 8 bytes. Raises CheckpointError."""
    length: int = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if HEADER_LIMIT < length <= size - 8:
        raise CheckpointError(
            f"{path}: a header of {length:,} bytes, more than any real safetensors file has"
        )
    if not 2 <= length <= size - 8:
        raise CheckpointError(
            f"{path}: truncated, or not a safetensors file (a header of {length:,} bytes "
            f"in a file of {size:,}): download it again"
        )
    return length


def shard_format(path: Path) -> str:
    """Return `format` of a shard's metadata; empty without it. Raises CheckpointError."""
    header, _ = _read_header(path)
    metadata = _parse_json(path, header).get("__metadata__") or {}
    return str(metadata.get("format", ""))[:50]


def parse_shard_header(path: Path, header: bytes, size: int) -> list[CheckpointTensor]:
    """Return the tensors in the header of a shard of `size` bytes. Raises CheckpointError."""
    start = 8 + len(header)
    entries = _parse_json(path, header)
    entries.pop("__metadata__", None)
    tensors = [
        _parse_entry(path, name, entry=entry, start=start) for name, entry in entries.items()
    ]
    _check_tiling(path, tensors, start=start, size=size)
    return tensors


@cache
def shared(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return one object for all equal shapes: large checkpoints have 200,000 tensors."""
    return shape


def _read_header(path: Path) -> tuple[bytes, int]:
    """Return the header of a shard, and the size of the file."""
    if not path.exists() and not path.is_symlink():
        raise CheckpointError(f"{path}: shard is missing: download it again")
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        length = header_length(path, file.read(8), size)
        header = file.read(length)
    if len(header) < length:
        raise CheckpointError(f"{path}: truncated while it was read")
    return header, size


def _parse_json(path: Path, header: bytes) -> dict[str, Any]:
    """Return the object that a header is, with metadata of text alone."""
    wide = not header.isascii() or b"\\u" in header
    if not header.startswith(b"{") or (wide and len(header) > _WIDE_LIMIT):
        raise CheckpointError(f"{path}: malformed safetensors header (not a plain object)")
    if header.count(b":") > _MOST_KEYS:
        raise CheckpointError(f"{path}: a header of more than {_MOST_KEYS:,} keys, so not read")
    check_json(path, header, entries=_MOST_ENTRIES)
    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=_object)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: malformed safetensors header ({error})") from None
    if not isinstance(entries, dict) or not _is_text(entries.get("__metadata__")):
        raise CheckpointError(f"{path}: malformed safetensors header (metadata that is not text)")
    return entries


def _is_text(metadata: Any) -> bool:
    """Whether metadata maps names to texts, as the format demands, or is absent."""
    if not isinstance(metadata, dict):
        return metadata is None
    return all(isinstance(text, str) for text in metadata.values())


def _object(pairs: list[tuple[str, Any]]) -> Any:
    """The members of an object; those of a tensor's entry as a tuple, which takes less memory."""
    members = unique(pairs)
    if members.keys() != _KEYS:
        return members
    shape = members["shape"]
    if not isinstance(shape, list) or len(shape) > _MOST_DIMENSIONS:
        raise ValueError("a shape that is not a list of numbers")
    return members["dtype"], tuple(shape), members["data_offsets"]


def _parse_entry(path: Path, name: str, entry: Any, start: int) -> CheckpointTensor:
    if not name.isprintable() or not 1 <= len(name) <= _NAME_LIMIT or name in (HEADER, WHOLE):
        raise CheckpointError(f"{path}: tensor {name[:60]!a}: malformed name")
    try:
        dtype, shape, (begin, end) = entry
        odd = [n for n in (*shape, begin, end) if type(n) is not int or not 0 <= n < _LARGEST]
        if type(entry) is not tuple or dtype not in BITS or odd:
            raise ValueError(f"type {dtype!a}, shape {shape}, range {begin}..{end}"[:200])
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: tensor {name}: malformed entry ({error})") from None
    bits = math.prod(shape) * BITS[dtype]
    if bits != 8 * (end - begin):
        raise CheckpointError(
            f"{path}: tensor {name}: {dtype} {list(shape)} takes {bits:,} bits, "
            f"but its range has {end - begin:,} bytes"
        )
    return CheckpointTensor(
        sys.intern(name),
        sys.intern(dtype),
        shape=shared(shape),
        shard=sys.intern(path.name),
        offset=start + begin,
        size=end - begin,
    )


def _check_tiling(path: Path, tensors: list[CheckpointTensor], start: int, size: int) -> None:
    """Check that the ranges have no gap or overlap up to the file's end, as the format requires."""
    position = start
    for tensor in sorted(tensors, key=lambda t: (t.offset, t.size)):
        if tensor.offset != position:
            raise CheckpointError(
                f"{path}: tensor {tensor.name} starts at byte {tensor.offset:,}, "
                f"expected {position:,}"
            )
        position += tensor.size
    if position != size:
        problem = "truncated" if size < position else "has bytes outside all tensors"
        raise CheckpointError(
            f"{path}: {problem}: {size:,} bytes, but its header describes {position:,}: "
            "download it again"
        )
