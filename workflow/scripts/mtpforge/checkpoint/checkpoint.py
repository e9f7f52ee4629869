"""A Hugging Face checkpoint: its configuration, and its tensors as memory maps."""

import mmap
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mtpforge.checkpoint import quantization
from mtpforge.checkpoint.checked_folder import CheckedFolder
from mtpforge.checkpoint.model_files import read_weights, weight_files
from mtpforge.checkpoint.safetensors import DTYPES, CheckpointTensor, shard_format
from mtpforge.errors import CheckpointError
from mtpforge.io.mapped import Bytes, open_map
from mtpforge.io.ranges import FileRange, sha256
from mtpforge.io.text import is_there, member, read_json

_SLICE = 1 << 20  # values compared at a time
_FLOATS = {"F64", "F32", "F16", "BF16"}


class Outline:
    """Configuration and tensors of a checkpoint without their values: enough to plan a conversion.

    `directory` is the checkpoint in messages: its folder, or its repository on the Hub. `files` are
    the names of its files, `given_name` is the model's name if it is not the folder's.
    """

    def __init__(
        self,
        directory: Path,
        config: dict[str, Any],
        tensors: dict[str, CheckpointTensor],
        files: Iterable[str] = (),
        given_name: str | None = None,
    ) -> None:
        self.directory = directory
        self.given_name = given_name
        self.config = config
        self.tensors = tensors
        self.files = frozenset(files)
        self.chat_template: str | None = None
        """The template to write in place of the checkpoint's own ones, if one was given."""
        self.lost: dict[str, str] = {}
        """As in `Weights`."""

    @property
    def name(self) -> str:
        """The model's name."""
        return self.given_name or folder_name(self.directory)

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

    `norms` is the form of norms whose values do not tell it ("w" or "w-1"), `recorded` the digests
    of its files (see `recorded`). Raises DamagedError if a file differs from these.
    """

    def __init__(
        self,
        directory: Path,
        given_name: str | None = None,
        norms: str | None = None,
        recorded: Path | None = None,
    ) -> None:
        # Resolved, because the model is named after the folder, which may be given as ".".
        folder = Path(os.path.realpath(directory))  # not resolve(), which fails at a loop of links
        if not folder.is_dir():
            raise CheckpointError(f"{directory}: no such checkpoint folder")
        self.integrity = CheckedFolder(folder, recorded)
        files = [path.name for path in folder.iterdir() if path.is_file()]
        weights = read_weights(folder)
        super().__init__(
            folder,
            read_config(folder),
            tensors=weights.tensors,
            files=files,
            given_name=given_name,
        )
        self.lost = weights.lost
        self.beside = sorted(set(weight_files(folder)) - weights.files)
        """Other safetensors files in the folder: adapters, optimizer states, other sets."""
        self.norms = norms
        self.refetch: Callable[[str], Mapping[str, str]] | None = None
        """Downloads a shard again whose weights were freed; the digests of its tensors."""
        self._maps: dict[str, Bytes] = {}

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

    def require(self, tensors: Iterable[CheckpointTensor | None], to_convert: bool = False) -> None:
        """Download again the shards of tensors that were freed. Raises CheckpointError.

        `to_convert` them, their shards must have been whole once: only then is their digest known.
        """
        freed = {
            each.shard
            for each in filter(None, tensors)
            if self.integrity.kept(each) or (to_convert and self.integrity.never_whole(each.shard))
        }
        for shard in sorted(freed):
            if self.refetch is None:
                raise CheckpointError(
                    f"{self.directory / shard}: its weights were freed once they were converted "
                    "(profiles/lean), and are needed again: delete it and its record, and run again"
                )
            digests = self.refetch(shard)
            self._maps.pop(shard, None)
            self.integrity.refetched(shard, digests)

    def array(self, tensor: CheckpointTensor) -> np.ndarray:
        """Return a read-only view of the tensor; BF16 and FP8 as raw integers.

        All of it is there: see `require`.
        """
        self.require([tensor])
        return self.remains(tensor)

    def remains(self, tensor: CheckpointTensor) -> np.ndarray:
        """The same, but what was freed of it are zeros."""
        mapped = self._map(tensor.shard)[tensor.offset : tensor.offset + tensor.size]
        if mapped.size < tensor.size:
            raise CheckpointError(f"{self.directory / tensor.shard}: truncated while it was read")
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
        self.require([tensor])
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

    def _map(self, shard: str) -> Bytes:
        if shard not in self._maps:
            self._maps[shard] = open_map(self.directory / shard)
        return self._maps[shard]


def read_config(directory: Path) -> dict[str, Any]:
    """Return the content of config.json, with ModelOpt's settings. Raises CheckpointError."""
    config = read_json(directory / "config.json")
    beside = directory / quantization.MODELOPT
    return quantization.with_modelopt(config, read_json(beside) if is_there(beside) else {})


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
    text = member(config, "text_config", dict, str(path)) or {}
    levels = [member(level, "architectures", list, str(path)) for level in (config, text)]
    names = levels[0] or levels[1]
    if not names or not isinstance(names[0], str):
        raise CheckpointError(f"{path}: 'architectures' must be a list of class names")
    return names[0]
