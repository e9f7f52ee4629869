"""Proves that a GGUF from upstream's converter has the head of the checkpoint, byte for byte."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from mtpforge.checkpoint.checkpoint import Checkpoint
from mtpforge.checkpoint.families.family import BF16, F32
from mtpforge.convert.upstream_head import (
    ExpectedTensor,
    count_blocks,
    expected_head,
    expected_vision,
)
from mtpforge.convert.values import cut, decode, encode
from mtpforge.errors import GgufError
from mtpforge.gguf.reader import Gguf, select_tensors
from mtpforge.io.ranges import FileRange, sha256
from mtpforge.llama_cpp.converter_architectures import entry_of

F16 = GGMLQuantizationType.F16

Slot = tuple[int, int, GGMLQuantizationType]
"""Number of the expert (0 for other tensors), number of elements, type."""

Stored = dict[Slot, dict[str, list[str]]]
"""The tensors of a file: slot -> sha256 -> names."""


def prove(made: Gguf, checkpoint: Checkpoint, part: str) -> None:
    """Check that a file is the requested part, with the checkpoint's head.

    Raises GgufError, CheckpointError.
    """
    if part == "mmproj":
        _prove_vision(made, checkpoint)
        return
    architecture = entry_of(checkpoint.architecture)
    if made.architecture != architecture.gguf:
        raise GgufError(
            f"{checkpoint.directory}: upstream wrote {made.architecture}, not {architecture.gguf}"
        )
    if part == "trunk":
        if made.head_blocks or any(".nextn." in name for name in made.tensors):
            raise GgufError(
                f"{checkpoint.directory}: upstream left the head, or a part of it, in the trunk"
            )
        return
    blocks = count_blocks(checkpoint)
    if len(made.head_blocks) != blocks:
        raise GgufError(
            f"{checkpoint.directory}: its head has {blocks} blocks, "
            f"upstream declares {len(made.head_blocks)}"
        )
    pair(
        _stored(made if made.is_drafter else _head(made, architecture.outside)),
        expected_head(checkpoint),
        kinds=(BF16, F32),
        directory=checkpoint.directory,
    )


def pair(
    stored: Stored,
    expected: Iterable[ExpectedTensor],
    kinds: tuple[GGMLQuantizationType, ...],
    directory: Path,
) -> None:
    """Pair each expected tensor with one in the file that has the same bytes in one of `kinds`.

    Names may differ, and each head block may have a copy of a shared tensor. Raises GgufError
    naming the tensors without a counterpart, on either side.
    """
    paired = Counter[tuple[Slot, str]]()
    lost = []
    for tensor in expected:
        match = next(
            (m for m in _matches(tensor, stored, kinds) if _is_free(m, stored, paired)), None
        )
        if match is None:
            lost.append(tensor.name)
        else:
            paired[match] += 1
    foreign: list[str] = []
    for slot, found in stored.items():
        for digest, names in found.items():
            foreign += [] if paired[slot, digest] else names
    if lost or foreign:
        raise GgufError(
            f"{directory}: upstream changed tensors of the head or vision tower: no counterpart "
            f"for {_some(lost)} of the checkpoint and {_some(foreign)} of the GGUF"
        )


def _head(made: Gguf, outside: str) -> Gguf:
    """Return the file reduced to its head, with tensors that start with `outside` if given."""
    names = [name for name in made.tensors if outside and name.startswith(outside)]
    return select_tensors(made, [*made.head.tensors, *names])


def _prove_vision(made: Gguf, checkpoint: Checkpoint) -> None:
    is_tower = made.architecture == "clip" and made.get("clip.has_vision_encoder")
    if not is_tower or not made.tensors:
        raise GgufError(
            f"{checkpoint.directory}: upstream wrote a file of {made.architecture} "
            "without a vision tower"
        )
    pair(
        _stored(made), expected_vision(checkpoint), kinds=(F16, F32), directory=checkpoint.directory
    )


def _matches(
    tensor: ExpectedTensor, stored: Stored, kinds: tuple[GGMLQuantizationType, ...]
) -> Iterator[tuple[Slot, str]]:
    """Yield slot and sha256 of the tensor for each type that the file has in that slot."""
    if tensor.stored is not None:
        block, size = GGML_QUANT_SIZES[tensor.stored]
        slot = (tensor.expert, tensor.values.size // size * block, tensor.stored)
        if slot in stored:
            yield slot, hashlib.sha256(np.ascontiguousarray(tensor.values).data).hexdigest()
        return
    for kind in kinds:
        slot = (tensor.expert, tensor.values.size, kind)
        if slot in stored:
            yield slot, _digest(tensor.values, tensor.dtype, kind)


def _is_free(match: tuple[Slot, str], stored: Stored, paired: Counter[tuple[Slot, str]]) -> bool:
    slot, digest = match
    return paired[match] < len(stored[slot].get(digest, ()))


def _stored(made: Gguf) -> Stored:
    """Hash the tensors of a file, stacked experts one by one."""
    stored: Stored = {}
    for name, info in made.tensors.items():
        count = info.shape[0] if name.endswith("_exps.weight") else 1
        size = info.size // count
        for expert in range(count):
            digest = sha256(FileRange(made.path, made.ranges[name].offset + expert * size, size))
            slot = (expert, info.elements // count, info.known_type)
            stored.setdefault(slot, {}).setdefault(digest, []).append(name)
    return stored


def _some(names: list[str]) -> str:
    """Return up to three names and the total number, for messages."""
    if not names:
        return "none"
    return f"{', '.join(dict.fromkeys(names[:3]))} ({len(names)} tensors)"


def _digest(values: np.ndarray, dtype: str, kind: GGMLQuantizationType) -> str:
    """Return the sha256 of values as a type stores them, computed in slices."""
    values = np.ascontiguousarray(values)
    if dtype == kind.name:
        return hashlib.sha256(values.data).hexdigest()
    digest = hashlib.sha256()
    for (piece,) in cut([values]):
        floats = decode(piece, dtype)
        digest.update(floats.astype("<f2").data if kind is F16 else encode(floats, kind))
    return digest.hexdigest()
