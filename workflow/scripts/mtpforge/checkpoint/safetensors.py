"""Headers of safetensors files, read strictly: the tensors' types, shapes and byte ranges.

The ranges must tile each file exactly. Nothing is executed.
"""

import json
import math
import struct
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mtpforge.errors import CheckpointError
from mtpforge.io.held import HEADER
from mtpforge.io.ranges import FileRange
from mtpforge.io.text import parse_json

_HEADER_LIMIT = 100 << 20  # as in the safetensors library

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
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path}: not a regular file")
        size = path.stat().st_size
        with path.open("rb") as file:
            length = header_length(path, file.read(8), size)
            return parse_shard_header(path, file.read(length), size)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: shard is missing: download it again") from None


def ranges(path: Path) -> dict[str, FileRange]:
    """Return the byte ranges of a shard's header and tensors. Raises CheckpointError."""
    tensors = read_shard_header(path)
    places = {tensor.name: FileRange(path, tensor.offset, tensor.size) for tensor in tensors}
    start = min((tensor.offset for tensor in tensors), default=path.stat().st_size)
    return {HEADER: FileRange(path, 0, start), **places}


def header_length(path: Path, start: bytes, size: int) -> int:
    """Return the length of a shard's header, from its first 8 bytes. Raises CheckpointError."""
    length: int = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
    if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
        raise CheckpointError(
            f"{path}: truncated, or not a safetensors file (a header of {length:,} bytes "
            f"in a file of {size:,}): download it again"
        )
    return length


def shard_format(path: Path) -> str:
    """Return `format` of a shard's metadata; empty without it. Raises CheckpointError."""
    with path.open("rb") as file:
        header = file.read(header_length(path, file.read(8), path.stat().st_size))
    metadata = parse_json(path, header.decode("utf-8")).get("__metadata__")
    return str(metadata.get("format", ""))[:50] if isinstance(metadata, dict) else ""


def parse_shard_header(path: Path, header: bytes, size: int) -> list[CheckpointTensor]:
    """Return the tensors in the header of a shard of `size` bytes. Raises CheckpointError."""
    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=_unique_keys)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: malformed safetensors header ({error})") from None
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: malformed safetensors header (not an object)")
    entries.pop("__metadata__", None)
    start = 8 + len(header)
    tensors = [
        _parse_entry(path, name, entry=entry, start=start) for name, entry in entries.items()
    ]
    _check_tiling(path, tensors, start=start, size=size)
    return tensors


@cache
def shared(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return one object for all equal shapes: large checkpoints have 200,000 tensors."""
    return shape


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("duplicate name")
    return result


def _parse_entry(path: Path, name: str, entry: Any, start: int) -> CheckpointTensor:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, begin, end]
        if dtype not in BITS or any(type(n) is not int or n < 0 for n in numbers):
            raise ValueError(f"type {dtype}, shape {shape}, range {begin}..{end}")
    except (TypeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path}: tensor {name}: malformed entry ({error})") from None
    bits = math.prod(shape) * BITS[dtype]
    if bits != 8 * (end - begin):
        raise CheckpointError(
            f"{path}: tensor {name}: {dtype} {shape} takes {bits:,} bits, "
            f"but its range has {end - begin:,} bytes"
        )
    size = end - begin
    return CheckpointTensor(
        sys.intern(name),
        sys.intern(dtype),
        shape=shared(tuple(shape)),
        shard=sys.intern(path.name),
        offset=start + begin,
        size=size,
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
