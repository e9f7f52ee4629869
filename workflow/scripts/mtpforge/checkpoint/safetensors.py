"""Reads a Hugging Face checkpoint: its configuration, and its tensors as memory maps.

Every file is treated as hostile: JSON must have the expected types, names must be plain file names,
byte ranges must tile each shard exactly, and index and shards must agree. No code is executed.
"""

import json
import math
import mmap
import re
import struct
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mtpforge.checkpoint import quantization
from mtpforge.errors import CheckpointError
from mtpforge.io.ranges import FileRange, sha256
from mtpforge.io.text import parse_json, read_json, read_text

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_HEAD_FILE = re.compile(r"(.+[._-])?(?i:mtp|nextn)([._-].+)?\.safetensors")
_NUMBERED = re.compile(r"(.+-)(\d{3,6})-of-(\d{3,6})\.safetensors")
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")
_SLICE = 1 << 20  # values compared at a time
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

_FLOATS = {"F64", "F32", "F16", "BF16"}

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


@dataclass(frozen=True)
class Weights:
    """The tensors of a checkpoint by name."""

    tensors: dict[str, CheckpointTensor]
    lost: dict[str, str]
    """Tensors of a head or vision tower that the index lists and no shard has, with the shard.

    Other parts of the model can do without them.
    """

    @property
    def files(self) -> set[str]:
        """The files that have the tensors."""
        return {tensor.shard for tensor in self.tensors.values()}


class Outline:
    """Configuration and tensors of a checkpoint without their values: enough to plan a conversion.

    `directory` is the checkpoint in messages: its folder, or its repository on the Hub. `files` are
    the names of its files.
    """

    def __init__(
        self,
        directory: Path,
        config: dict[str, Any],
        tensors: dict[str, CheckpointTensor],
        files: Iterable[str] = (),
    ) -> None:
        self.directory = directory
        self.config = config
        self.tensors = tensors
        self.files = frozenset(files)
        self.lost: dict[str, str] = {}
        """As in `Weights`."""

    @property
    def architecture(self) -> str:
        """The first of `architectures` in config.json. Raises CheckpointError."""
        return architecture_of(self.directory / "config.json", self.config)

    def same(self, one: CheckpointTensor, other: CheckpointTensor) -> bool:
        """Whether two tensors are equal, as far as is known without their values."""
        return one.shape == other.shape and (
            one.dtype == other.dtype or {one.dtype, other.dtype} <= _FLOATS
        )

    def integers(self, tensor: CheckpointTensor) -> list[int] | None:
        """Return the values of a vector of integers; None without them."""
        return None


class Checkpoint(Outline):
    """The checkpoint in a folder. Raises CheckpointError if it is incomplete or malformed.

    `given_name` is the model's name if it is not the folder's, `norms` the form of norms whose
    values do not tell it ("w" or "w-1").
    """

    def __init__(
        self, directory: Path, given_name: str | None = None, norms: str | None = None
    ) -> None:
        # Resolved, because the model is named after the folder, which may be given as ".".
        folder = Path(directory).resolve()
        if not folder.is_dir():
            raise CheckpointError(f"{directory}: no such checkpoint folder")
        files = [path.name for path in folder.iterdir() if path.is_file()]
        weights = _read_weights(folder)
        super().__init__(folder, read_config(folder), tensors=weights.tensors, files=files)
        self.lost = weights.lost
        self.beside = sorted(set(_weight_files(folder)) - weights.files)
        """Other safetensors files in the folder: adapters, optimizer states, other sets."""
        self.given_name = given_name
        self.norms = norms
        self._maps: dict[str, np.memmap[Any, np.dtype[np.uint8]]] = {}

    @property
    def name(self) -> str:
        """The model's name."""
        return self.given_name or folder_name(self.directory)

    @property
    def format(self) -> str:
        """The program that wrote the first shard, as its header says: pt, mlx; empty if unknown."""
        shards = sorted({tensor.shard for tensor in self.tensors.values()})
        return shard_format(self.directory / shards[0]) if shards else ""

    def same(self, one: CheckpointTensor, other: CheckpointTensor) -> bool:
        """Whether two tensors have the same values, maybe at two floating-point types."""
        if not super().same(one, other):
            return False
        if one.dtype == other.dtype:
            return self.digest(one) == self.digest(other)
        return all(map(np.array_equal, self._slices(one), self._slices(other)))

    def array(self, tensor: CheckpointTensor) -> np.ndarray:
        """Return a read-only view of the tensor; BF16 and FP8 as raw integers."""
        mapped = self._map(tensor.shard)[tensor.offset : tensor.offset + tensor.size]
        return mapped.view(DTYPES[tensor.dtype]).reshape(tensor.shape)

    def integers(self, tensor: CheckpointTensor) -> list[int] | None:
        """Return the values of a vector of up to 64 integers. Raises CheckpointError."""
        if tensor.dtype not in ("I64", "I32") or len(tensor.shape) != 1 or tensor.shape[0] > 64:
            raise CheckpointError(
                f"{tensor.shard}: {tensor.name} is {tensor.dtype} {list(tensor.shape)}, not up to "
                "64 integers"
            )
        numbers: list[int] = self.array(tensor).tolist()
        if not numbers or min(numbers) < 0:
            raise CheckpointError(f"{tensor.shard}: {tensor.name} is empty, or negative somewhere")
        return numbers

    def locate(self, view: np.ndarray) -> FileRange | None:
        """Return the byte range of a C-contiguous view of an `array`; None for a copy."""
        address = view.__array_interface__["data"][0]
        for shard, mapped in self._maps.items():
            offset = address - mapped.__array_interface__["data"][0]
            if 0 <= offset < mapped.size:
                return FileRange(self.directory / shard, offset, view.nbytes)
        return None

    def digest(self, tensor: CheckpointTensor) -> str:
        """Return the sha256 of the tensor's bytes."""
        return sha256(FileRange(self.directory / tensor.shard, tensor.offset, tensor.size))

    def scatter(self, tensor: CheckpointTensor) -> None:
        """Tell the system to expect reads of single rows, so that it does not read ahead."""
        mapped = self._map(tensor.shard)
        if isinstance(mapped.base, mmap.mmap) and hasattr(mmap, "MADV_RANDOM"):
            start = tensor.offset // mmap.PAGESIZE * mmap.PAGESIZE
            mapped.base.madvise(mmap.MADV_RANDOM, start, tensor.offset + tensor.size - start)

    def release(self) -> None:
        """Return mapped pages to the system, so that they do not count as our memory."""
        for mapped in self._maps.values():
            if isinstance(mapped.base, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
                mapped.base.madvise(mmap.MADV_DONTNEED)

    def _slices(self, tensor: CheckpointTensor) -> Iterator[np.ndarray]:
        """Yield the values of a floating-point tensor in flat slices, exactly."""
        array = self.array(tensor).reshape(-1)
        for start in range(0, array.size, _SLICE):
            values = array[start : start + _SLICE]
            is_bf16 = tensor.dtype == "BF16"
            yield (values.astype(np.uint32) << 16).view(np.float32) if is_bf16 else values
            self.release()

    def _map(self, shard: str) -> np.memmap[Any, np.dtype[np.uint8]]:
        if shard not in self._maps:
            self._maps[shard] = np.memmap(self.directory / shard, dtype=np.uint8, mode="r")
        return self._maps[shard]


def read_config(directory: Path) -> dict[str, Any]:
    """Return the content of config.json, with ModelOpt's settings. Raises CheckpointError."""
    config = read_json(directory / "config.json")
    beside = directory / quantization.MODELOPT
    return quantization.with_modelopt(config, read_json(beside)) if beside.exists() else config


def folder_name(folder: Path) -> str:
    """Return a checkpoint folder's name; for a snapshot in the Hub's cache, its repository's.

    A snapshot is models--OWNER--NAME/snapshots/COMMIT.
    """
    kind, _, repository = folder.parent.parent.name.partition("--")
    if folder.parent.name == "snapshots" and kind == "models" and repository:
        return repository.rpartition("--")[2]
    return folder.name


def architecture_of(path: Path, config: Mapping[str, Any]) -> str:
    """Return the first of `architectures` in a config.json, or else in its text_config.

    Raises CheckpointError.
    """
    text = config.get("text_config")
    inner = text.get("architectures") if isinstance(text, dict) else None
    names = config.get("architectures") or inner
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise CheckpointError(f"{path}: 'architectures' must be a list of class names")
    return names[0]


def model_files(names: Collection[str], indexed: Collection[str] = ()) -> list[str]:
    """Return the safetensors files that make up a model, of the `names` in its folder, sorted.

    These are the `indexed` ones, or without an index `model.safetensors`, or else `model*`; and
    beside them files that are named after a head. Adapters, optimizer states and other sets of
    shards are not among them.
    """
    weights = [name for name in names if name.endswith(".safetensors")]
    models = [name for name in weights if name.startswith("model")]
    model = indexed or ([_SINGLE] if _SINGLE in models else models)
    heads = [name for name in weights if _HEAD_FILE.fullmatch(name)]
    return sorted({*model, *heads})


def files_beside(directory: Path) -> list[str]:
    """Return the safetensors files in a folder that are no part of its model.

    Only names and index tell; none if the index is malformed, which conversion reports.
    """
    present = _weight_files(directory)
    index = directory / INDEX
    try:
        expected = _parse_index(index, read_text(index)) if index.exists() else {}
    except CheckpointError:
        return []
    return sorted({*present} - {*model_files(present, {*expected.values()})})


def head_names(names: Collection[str]) -> set[str]:
    """Return the names of a head's tensors: `mtp.*`, or layers that have a head's projections."""
    outside = r"(?:(?:model|language_model)\.)*"
    marked = rf"({outside}layers\.\d+\.)(?:eh_proj|enorm|hnorm|shared_head)\."
    layers = {found[1] for name in names if (found := re.match(marked, name))}
    own = re.compile(rf"{outside}mtp(?:_\w+)?\.")
    return {name for name in names if own.match(name) or name.startswith(tuple(layers))}


def gather_tensors(
    path: Path,
    index: str | None,
    present: Collection[str],
    read: Callable[[str], list[CheckpointTensor]],
) -> Weights:
    """Collect the tensors of all shards, whose headers `read` returns, from disk or the Hub.

    `path` is the checkpoint in messages, `index` the text of its index if it has one, `present` the
    names of its safetensors files. Raises CheckpointError if index and shards disagree.
    """
    expected = _parse_index(path / INDEX, index) if index is not None else {}
    indexed = set(expected.values())
    files = model_files(present, indexed)
    heads = [name for name in files if _HEAD_FILE.fullmatch(name) and name not in indexed]
    shards = [name for name in files if name not in heads]
    if index is None:
        _check_numbers(path, shards)
    else:
        shards = _needed_shards(path, expected, present)
    tensors: dict[str, CheckpointTensor] = {}
    for name in shards:
        _add(path, tensors, read(name))
    if index is not None:
        _check_index(path / INDEX, expected, tensors)
    for name in heads:
        head = read(name)
        if head_names([tensor.name for tensor in head]):
            _add(path, tensors, head)
    return Weights(tensors, {name: expected[name] for name in expected.keys() - tensors.keys()})


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


def _weight_files(directory: Path) -> list[str]:
    return [path.name for path in directory.glob("*.safetensors")]


def _read_weights(directory: Path) -> Weights:
    """Return all tensors by name, in the order of the shards and their headers."""
    index = directory / INDEX
    present = _weight_files(directory)
    if not index.exists() and not model_files(present):
        hint = "convert the weights to safetensors, or download them"
        if present:
            hint = f"rename {min(present)} if it is the model, merge it if it is an adapter"
        raise CheckpointError(f"{directory}: no {INDEX} and no model*.safetensors file: {hint}")
    text = read_text(index) if index.exists() else None
    return gather_tensors(
        directory, text, present=present, read=lambda shard: read_shard_header(directory / shard)
    )


def _add(
    path: Path, tensors: dict[str, CheckpointTensor], shard: Collection[CheckpointTensor]
) -> None:
    for tensor in shard:
        if tensor.name in tensors:
            first = tensors[tensor.name].shard
            raise CheckpointError(
                f"{path}: tensor {tensor.name} is in {first} and in {tensor.shard}: "
                "delete the wrong one"
            )
        tensors[tensor.name] = tensor


def _spare_names(names: Collection[str]) -> set[str]:
    """Return the names of tensors without which the trunk can be converted."""
    vision = re.compile(r"(?:(?:model|language_model)\.)*visual\.")
    return head_names(names) | {name for name in names if vision.match(name)}


def _parse_index(path: Path, text: str) -> dict[str, str]:
    weight_map = parse_json(path, text).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: 'weight_map' must map tensor names to shards")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise CheckpointError(
                f"{path}: tensor {name}: {shard!r} is not a plain *.safetensors file name"
            )
    return {sys.intern(name): sys.intern(shard) for name, shard in weight_map.items()}


def _needed_shards(path: Path, expected: Mapping[str, str], present: Collection[str]) -> list[str]:
    """Return the shards of an index, without absent ones that the trunk does not need.

    Raises CheckpointError if the index is that of other shards.
    """
    indexed = {*expected.values()}
    others = [name for name in model_files(present) if not _HEAD_FILE.fullmatch(name)]
    if others and not indexed & {*present}:
        raise CheckpointError(
            f"{path / INDEX}: none of its {len(indexed)} shards is there, but {others[0]} is: if "
            f"that is the model, delete {INDEX}"
        )
    if indexed <= {*present}:
        return sorted(indexed)
    spare = _spare_names(expected)
    needed = {shard for name, shard in expected.items() if name not in spare}
    return sorted(needed | indexed & {*present})


def _check_numbers(path: Path, files: Collection[str]) -> None:
    """Check that numbered files without an index are one set, and complete."""
    found = [match for name in files if (match := _NUMBERED.fullmatch(name))]
    sets = sorted({f"{match[1]}*-of-{match[3]}" for match in found})
    if len(sets) > 1:
        raise CheckpointError(
            f"{path}: several sets of shards ({', '.join(sets)}) and no {INDEX}: "
            "delete the wrong ones"
        )
    if not found:
        return
    start, width, total = found[0][1], len(found[0][2]), found[0][3]
    numbers = {int(match[2]) for match in found}
    for number in range(1, int(total) + 1):
        if number not in numbers and not (number == int(total) and 0 in numbers):
            name = f"{start}{number:0{width}}-of-{total}.safetensors"
            raise CheckpointError(f"{path / name}: shard is missing: download it again")


def _check_index(
    path: Path, expected: Mapping[str, str], found: Mapping[str, CheckpointTensor]
) -> None:
    """Check that shards and index have the same tensors; in which shard does not matter."""
    absent = expected.keys() - found.keys()
    if absent and (absent := absent - _spare_names(expected)):
        name = min(absent)
        raise CheckpointError(
            f"{path}: tensor {name} is not in {expected[name]} ({len(absent)} such tensors): "
            "download both again, or delete the index if the shards are right"
        )
    if surplus := sorted(found.keys() - expected.keys()):
        raise CheckpointError(
            f"{found[surplus[0]].shard}: tensor {surplus[0]} is absent from {path.name} "
            f"({len(surplus)} such tensors): index and shards are from different versions: "
            "download both again, or delete the index if the shards are right"
        )


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


@cache
def shared(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return one object for all equal shapes: large checkpoints have 200,000 tensors."""
    return shape


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
