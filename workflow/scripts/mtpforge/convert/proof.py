"""Proof that a GGUF which upstream's converter wrote has every tensor of the checkpoint's head, byte for byte."""

import hashlib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType

from mtpforge.checkpoint import fp8
from mtpforge.checkpoint.families.qwen3_5 import VISION as VISION_PREFIXES
from mtpforge.checkpoint.families.table import BF16, F32
from mtpforge.checkpoint.hparams import Hparams
from mtpforge.checkpoint.safetensors import Checkpoint, CheckpointTensor
from mtpforge.convert.values import cut, decode, encode
from mtpforge.errors import CheckpointError, GgufError
from mtpforge.gguf.reader import Gguf
from mtpforge.io.ranges import FileRange, sha256
from mtpforge.llama_cpp.architectures import ARCHITECTURES, Architecture

F16 = GGMLQuantizationType.F16


def count_blocks(checkpoint: Checkpoint, architecture: Architecture) -> int:
    """The number of the head's blocks, on which configuration and tensors must agree. Raises CheckpointError."""
    declared = architecture.blocks
    if declared is None:
        declared = Hparams(checkpoint.config).get("num_nextn_predict_layers", 0)
    numbers = {
        _layer(tensor.name, architecture) for tensor in head_tensors(checkpoint, architecture)
    } - {None}
    found, rest = divmod(len(numbers), architecture.layers)
    if not found and not rest:
        raise CheckpointError(
            f"{checkpoint.directory}: no tensors of a head ({declared!r} blocks are declared): "
            "take the original checkpoint, or convert with --part trunk"
        )
    if found != declared or rest:
        raise CheckpointError(
            f"{checkpoint.directory}: has tensors of {len(numbers)} head layers, {architecture.layers} to a block, "
            f"but {declared!r} blocks are declared (num_nextn_predict_layers in config.json)"
        )
    return found


def head_tensors(checkpoint: Checkpoint, architecture: Architecture) -> list[CheckpointTensor]:
    """The checkpoint's tensors that belong to its head."""
    first = 0 if architecture.prefix else Hparams(checkpoint.config).count("num_hidden_layers")
    found = []
    for tensor in checkpoint.tensors.values():
        layer = _layer(tensor.name, architecture)
        if (
            _plain(tensor.name).startswith(architecture.prefix)
            if architecture.prefix
            else layer is not None and layer >= first
        ):
            found.append(tensor)
    return found


def _layer(name: str, architecture: Architecture) -> int | None:
    match = re.match(
        rf"{re.escape(architecture.prefix or 'model.')}layers\.(\d{{1,5}})\.", _plain(name)
    )
    return int(match[1]) if match else None


def _plain(name: str) -> str:
    """The name without the wrapper of a vision model."""
    return name.replace("language_model.", "")


# ── the proof ───────────────────────────────────────────────────────────────────────────────────────────────────────


def prove(made: Gguf, checkpoint: Checkpoint, part: str) -> None:
    """That the file is the part asked for, its head that of the checkpoint to the byte. Raises GgufError, CheckpointError."""
    if part == "mmproj":
        if (
            made.architecture != "clip"
            or not made.get("clip.has_vision_encoder")
            or not made.tensors
        ):
            raise GgufError(
                f"{checkpoint.directory}: upstream wrote no vision tower, but a file of {made.architecture}"
            )
        pair(_stored(made), wanted_of_vision(checkpoint), (F16, F32), checkpoint.directory)
        return
    architecture = ARCHITECTURES[checkpoint.architecture]
    if made.architecture != architecture.gguf:
        raise GgufError(
            f"{checkpoint.directory}: upstream wrote {made.architecture}, not {architecture.gguf}"
        )
    blocks = made.head_blocks
    if part == "trunk":
        if blocks or any(".nextn." in name for name in made.tensors):
            raise GgufError(
                f"{checkpoint.directory}: upstream left the head, or a part of it, in the trunk"
            )
        return
    expected = count_blocks(checkpoint, architecture)
    if len(blocks) != expected:
        raise GgufError(
            f"{checkpoint.directory}: its head has {expected} blocks, upstream declares {len(blocks)}"
        )
    pair(
        _stored(made.head),
        _wanted(checkpoint, architecture),
        (BF16, F32),
        checkpoint.directory,
    )


Where = tuple[int, int, GGMLQuantizationType]
"""Number of the expert (0 for what is none), number of elements, type."""


Stored = dict[Where, dict[str, list[str]]]
"""Of a file: where -> sha256 -> names of the tensors that have it."""

Wanted = Iterator[tuple[str, int, np.ndarray, str]]
"""Name in the checkpoint, number of the expert, values and their type."""


def pair(
    stored: Stored, wanted: Wanted, kinds: tuple[GGMLQuantizationType, ...], directory: Path
) -> None:
    """Pair each tensor of the checkpoint with one of the file's by its bytes as one of `kinds`; both sides must be used up.

    Names are upstream's affair. A tensor that head blocks share may be there once for each. Raises GgufError with the names of
    what has no counterpart.
    """
    paired, lost = Counter[tuple[Where, str]](), list[str]()
    for name, expert, values, dtype in wanted:
        for kind in kinds:
            where = (expert, values.size, kind)
            if where not in stored:
                continue
            digest = _digest(values, dtype, kind)
            if paired[where, digest] < len(stored[where].get(digest, ())):
                paired[where, digest] += 1
                break
        else:
            lost.append(name)
    foreign = [
        name
        for where, found in stored.items()
        for digest, names in found.items()
        if not paired[where, digest]
        for name in names
    ]
    if lost or foreign:
        raise GgufError(
            f"{directory}: upstream did not keep the tensors as they are: without a counterpart are "
            f"{_some(lost)} of the checkpoint and {_some(foreign)} of what it wrote"
        )


def wanted_of_vision(checkpoint: Checkpoint) -> Wanted:
    """What a vision tower's file must hold: of the patch embedding, a tensor for each of the two frames of a patch."""
    for tensor in checkpoint.tensors.values():
        if tensor.name.startswith(VISION_PREFIXES):
            array = checkpoint.array(tensor)
            frames = [array[:, :, i] for i in range(array.shape[2])] if array.ndim == 5 else [array]
            yield from ((tensor.name, 0, frame, tensor.dtype) for frame in frames)


def _some(names: list[str]) -> str:
    """Up to three names, and how many there are in all."""
    named = ", ".join(dict.fromkeys(names[:3]))
    return f"{named} ({len(names)} in all)" if names else "none"


def _stored(made: Gguf) -> Stored:
    """The tensors of a file, stacked experts one by one."""
    stored: Stored = {}
    for name, info in made.tensors.items():
        count = info.shape[0] if name.endswith("_exps.weight") else 1
        size = info.size // count
        for expert in range(count):
            digest = sha256(FileRange(made.path, made.ranges[name].offset + expert * size, size))
            stored.setdefault((expert, info.elements // count, info.type), {}).setdefault(
                digest, []
            ).append(name)
    return stored


def _wanted(checkpoint: Checkpoint, architecture: Architecture) -> Wanted:
    """What the head of the file must hold."""
    hparams = Hparams(checkpoint.config)
    for tensor in head_tensors(checkpoint, architecture):
        if tensor.name.endswith(_CONSUMED):
            continue
        array, dtype = checkpoint.array(tensor), tensor.dtype
        if dtype == fp8.DTYPE:
            array, dtype = _dequantized(checkpoint, tensor, architecture), "F32"
        change = next(
            (
                change
                for ending, change in architecture.changes.items()
                if tensor.name.endswith(ending)
            ),
            None,
        )
        if change is not None:
            yield from (
                (tensor.name, 0, values, "F32") for values in change(decode(array, dtype), hparams)
            )
        elif array.ndim == 3:  # experts, already stacked
            yield from ((tensor.name, expert, values, dtype) for expert, values in enumerate(array))
        else:
            expert = re.search(r"\.experts\.(\d{1,5})\.", tensor.name)
            yield tensor.name, int(expert[1]) if expert else 0, array, dtype


_CONSUMED = (
    fp8.SUFFIX,
    ".rotary_emb.inv_freq",
)  # endings of what becomes no tensor: scales, and what is computed anew


def _dequantized(
    checkpoint: Checkpoint, tensor: CheckpointTensor, architecture: Architecture
) -> np.ndarray:
    """An FP8 tensor's float32 values, as upstream computes them."""
    scale, block = checkpoint.tensors[tensor.name + fp8.SUFFIX], fp8.block_size(checkpoint.config)
    codes, scales = checkpoint.array(tensor), decode(checkpoint.array(scale), scale.dtype)
    if not _is_ranked(tensor, architecture):
        return fp8.dequantize(codes, scales, block)
    count, hparams = _ranks(tensor, scale, block), Hparams(checkpoint.config)
    heads, keys = hparams.count("num_attention_heads"), hparams.count("swa_num_key_value_heads")
    size, value = hparams.count("head_dim"), hparams.count("v_head_dim")
    if tensor.shape[0] != (heads + keys) * size + keys * value:
        raise CheckpointError(
            f"{tensor.shard}: {tensor.name} has {tensor.shape[0]} rows, which config.json contradicts"
        )
    cuts = [heads * size // count, (heads + keys) * size // count]
    ranks = [
        fp8.dequantize(*pair, block)
        for pair in zip(np.split(codes, count), np.split(scales, count), strict=True)
    ]
    parts = [np.split(rank, cuts) for rank in ranks]
    return np.concatenate([part[which] for which in range(3) for part in parts])


def _is_ranked(tensor: CheckpointTensor, architecture: Architecture) -> bool:
    return bool(architecture.ranked) and tensor.name.endswith(architecture.ranked)


def _ranks(tensor: CheckpointTensor, scale: CheckpointTensor, block: tuple[int, int]) -> int:
    """How many ranks a fused projection was quantized by; 0 where the scales' shape tells no such number."""
    for count in (8, 4):  # as upstream tries them
        each = (tensor.shape[0] // count, *tensor.shape[1:])
        rows, *columns = fp8.scale_shape(each, block)
        if tensor.shape[0] % count == 0 and scale.shape == (count * rows, *columns):
            return count
    return 0


def check_types(checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Whether the values of the head can be told from its tensors. Raises CheckpointError."""
    for tensor in head_tensors(checkpoint, architecture):
        if tensor.name.endswith(_CONSUMED):
            continue
        if tensor.dtype == fp8.DTYPE:
            _check_scale(checkpoint, tensor, architecture)
        elif tensor.dtype not in ("BF16", "F16", "F32"):
            raise CheckpointError(
                f"{tensor.shard}: {tensor.name} is {tensor.dtype}: a head in BF16, F16, F32 or FP8 can be proven"
            )
        if not tensor.size:
            raise CheckpointError(f"{tensor.shard}: {tensor.name} is empty")


def _check_scale(
    checkpoint: Checkpoint, tensor: CheckpointTensor, architecture: Architecture
) -> None:
    scale, block = (
        checkpoint.tensors.get(tensor.name + fp8.SUFFIX),
        fp8.block_size(checkpoint.config),
    )
    if scale is not None and scale.dtype in ("BF16", "F32") and len(tensor.shape) > 1:
        ranked = _is_ranked(tensor, architecture)
        if (
            _ranks(tensor, scale, block)
            if ranked
            else scale.shape == fp8.scale_shape(tensor.shape, block)
        ):
            return
    raise CheckpointError(
        f"{tensor.shard}: {tensor.name} is FP8 and {tensor.name}{fp8.SUFFIX} is missing or of another shape"
    )


def _digest(values: np.ndarray, dtype: str, kind: GGMLQuantizationType) -> str:
    """The sha256 of the values as the type stores them; a slice of them in memory at a time."""
    values = np.ascontiguousarray(values)
    if dtype == kind.name:
        return hashlib.sha256(values.data).hexdigest()
    digest = hashlib.sha256()
    for (piece,) in cut([values]):
        floats = decode(piece, dtype)
        digest.update(floats.astype("<f2").data if kind is F16 else encode(floats, kind))
    return digest.hexdigest()
