"""The head of a checkpoint that upstream converts: its tensors, and the values upstream must write.

Tensors of a vision tower are here too.
"""

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from gguf.constants import GGMLQuantizationType

from mtpforge.checkpoint import fp8
from mtpforge.checkpoint.checkpoint import Checkpoint, Outline
from mtpforge.checkpoint.families.qwen3_5 import VISION as VISION_PREFIXES
from mtpforge.checkpoint.hparams import Hparams
from mtpforge.checkpoint.safetensors import CheckpointTensor
from mtpforge.convert import deepseek4, gemma4
from mtpforge.convert.values import decode, scales
from mtpforge.errors import CheckpointError
from mtpforge.llama_cpp.converter_architectures import Architecture, entry_of

_NOT_WRITTEN = ".rotary_emb.inv_freq"
"""Ending of tensors that upstream recomputes, and does not write."""
_RANKED_SCALE = "_scale_inv"


class ExpectedTensor(NamedTuple):
    """Values that the GGUF must have, before rounding."""

    name: str
    """The tensor in the checkpoint."""
    expert: int
    """Number of the expert; 0 for other tensors."""
    values: np.ndarray
    dtype: str
    stored: GGMLQuantizationType | None = None
    """The type that it must have; `values` are then the bytes. None if it can be unquantized."""


def count_blocks(checkpoint: Outline) -> int:
    """Return the number of blocks of the head. Raises CheckpointError if config.json disagrees."""
    architecture = entry_of(checkpoint.architecture)
    key = "num_hidden_layers" if architecture.only else "num_nextn_predict_layers"
    declared = architecture.blocks
    if declared is None:
        declared = Hparams(checkpoint.config).get(key, 0)
    layers = {layer_of(tensor.name, architecture) for tensor in head_tensors(checkpoint)} - {None}
    found, rest = divmod(len(layers), architecture.layers)
    if not layers:
        raise CheckpointError(
            f"{checkpoint.directory}: no tensors of a head ({declared!r} blocks are declared): "
            "use the original checkpoint, or convert with --part trunk"
        )
    if type(declared) is not int or found != declared or rest:
        way = "correct the wrong one, or convert with --part trunk"
        if declared == 0 and not rest:
            way = f"set it to {found}"
        raise CheckpointError(
            f"{checkpoint.directory}: has tensors of {len(layers)} head layers, "
            f"{architecture.layers} to a block, but {declared!r} blocks are declared "
            f"({key} in config.json): {way}"
        )
    return found


def head_tensors(checkpoint: Outline) -> list[CheckpointTensor]:
    """Return the checkpoint's tensors that belong to its head."""
    architecture = entry_of(checkpoint.architecture)
    tensors = checkpoint.tensors.values()
    if architecture.only:
        return list(tensors) if architecture.only == "draft" else []
    if architecture.prefix:
        return [t for t in tensors if _unwrapped(t.name).startswith(architecture.prefix)]
    first = Hparams(checkpoint.config).count("num_hidden_layers")
    found = []
    for tensor in tensors:
        layer = layer_of(tensor.name, architecture)
        if layer is not None and layer >= first:
            found.append(tensor)
    return found


def check_types(checkpoint: Outline) -> None:
    """Check that the types of the head's tensors are supported. Raises CheckpointError."""
    if entry_of(checkpoint.architecture).repacked:
        deepseek4.check_fusion(checkpoint)
    if entry_of(checkpoint.architecture).only == "draft":
        gemma4.check_drafter(checkpoint)
    for tensor in head_tensors(checkpoint):
        if not is_written(tensor, checkpoint) or _is_packed(tensor, checkpoint):
            continue
        if tensor.dtype not in ("BF16", "F16", "F32", fp8.DTYPE):
            raise CheckpointError(
                f"{tensor.shard}: {tensor.name} is {tensor.dtype}: "
                "only heads in BF16, F16, F32 or FP8 (E4M3) can be checked"
            )
        if not tensor.size:
            raise CheckpointError(f"{tensor.shard}: {tensor.name} is empty")


def check_scales(checkpoint: Outline) -> None:
    """Check that each FP8 weight has its scale: upstream would convert it without.

    Raises CheckpointError.
    """
    architecture = entry_of(checkpoint.architecture)
    if architecture.repacked:
        deepseek4.check_scales(checkpoint)
        return
    for tensor in checkpoint.tensors.values():
        if tensor.dtype == fp8.DTYPE and not tensor.name.endswith(fp8.SUFFIXES):
            _check_scale(checkpoint, tensor, architecture)


def expected_head(checkpoint: Checkpoint) -> Iterator[ExpectedTensor]:
    """Yield what the head of the GGUF must hold."""
    architecture = entry_of(checkpoint.architecture)
    for tensor in head_tensors(checkpoint):
        if is_written(tensor, checkpoint):
            yield from _expected(checkpoint, tensor, architecture)
    if architecture.only == "draft":
        factors = gemma4.frequencies(Hparams(checkpoint.config))
        yield ExpectedTensor(gemma4.FREQUENCIES, 0, values=factors, dtype="F32")


def vision_tensors(checkpoint: Outline) -> list[CheckpointTensor]:
    """Return the checkpoint's tensors that belong to its vision tower."""
    return [t for t in checkpoint.tensors.values() if t.name.startswith(VISION_PREFIXES)]


def expected_vision(checkpoint: Checkpoint) -> Iterator[ExpectedTensor]:
    """Yield what a vision tower's GGUF must hold.

    The patch embedding becomes one tensor for each of the two frames of a patch.
    """
    for tensor in vision_tensors(checkpoint):
        array = checkpoint.array(tensor)
        frames = [array[:, :, i] for i in range(array.shape[2])] if array.ndim == 5 else [array]
        for frame in frames:
            yield ExpectedTensor(tensor.name, 0, values=frame, dtype=tensor.dtype)


def is_written(tensor: CheckpointTensor, checkpoint: Outline) -> bool:
    """Whether upstream writes a tensor, and does not only use it or compute it again."""
    architecture = entry_of(checkpoint.architecture)
    is_scale = fp8.is_scale(tensor.name, checkpoint.tensors)
    if architecture.repacked:
        is_scale = deepseek4.is_scale(tensor.name, checkpoint)
    dropped = any(part in tensor.name for part in architecture.dropped)
    return not (is_scale or dropped or tensor.name.endswith(_NOT_WRITTEN))


def _is_packed(tensor: CheckpointTensor, checkpoint: Outline) -> bool:
    return entry_of(checkpoint.architecture).repacked and deepseek4.is_expert(tensor)


def layer_of(name: str, architecture: Architecture) -> int | None:
    """Return the number of a tensor's layer, of the head if it has names of its own; or None."""
    prefix = re.escape(architecture.prefix or "model.")
    match = re.match(rf"{prefix}(?:layers\.)?(\d{{1,5}})\.", _unwrapped(name))
    return int(match[1]) if match else None


def _unwrapped(name: str) -> str:
    """Return the name without the wrapper of a vision model."""
    return name.replace("language_model.", "")


def _expected(
    checkpoint: Checkpoint, tensor: CheckpointTensor, architecture: Architecture
) -> Iterator[ExpectedTensor]:
    name = tensor.name
    match = re.search(r"\.experts\.(\d{1,5})\.", name)
    number = int(match[1]) if match else 0
    if architecture.repacked and deepseek4.is_repacked(tensor):
        for kind, raw in deepseek4.repacked(checkpoint, tensor):
            yield ExpectedTensor(name, number, values=raw, dtype=tensor.dtype, stored=kind)
        return
    array = checkpoint.array(tensor)
    dtype = tensor.dtype
    if dtype == fp8.DTYPE:
        array = _dequantized(checkpoint, tensor, architecture)
        dtype = "F32"
    endings = [ending for ending in architecture.changes if name.endswith(ending)]
    if endings:
        change = architecture.changes[endings[0]]
        for values in change(decode(array, dtype), Hparams(checkpoint.config)):
            yield ExpectedTensor(name, 0, values=values, dtype="F32")
    elif array.ndim == 3:  # stacked experts
        parts = np.split(array, 2, 1) if name.endswith("gate_up_proj") else [array]
        for expert, values in ((e, each) for part in parts for e, each in enumerate(part)):
            yield ExpectedTensor(name, expert, values=values, dtype=dtype)
    else:
        yield ExpectedTensor(name, number, values=array, dtype=dtype)


# ── FP8 ──


def _dequantized(
    checkpoint: Checkpoint, tensor: CheckpointTensor, architecture: Architecture
) -> np.ndarray:
    """Return an FP8 tensor's float32 values, as upstream computes them."""
    block = fp8.block_size(checkpoint.config)
    codes = checkpoint.array(tensor)
    if not _is_ranked(tensor, architecture):
        scale = fp8.scale_of(tensor.name, checkpoint.tensors, block)
        return fp8.dequantize(codes, scales(checkpoint, scale), block)
    scale = checkpoint.tensors[tensor.name + _RANKED_SCALE]
    numbers = scales(checkpoint, scale)
    count = _ranks(tensor, scale, block)
    ranks = zip(np.split(codes, count), np.split(numbers, count), strict=True)
    cuts = [rows // count for rows in _qkv_ends(tensor, Hparams(checkpoint.config))]
    parts = [np.split(fp8.dequantize(*rank, block), cuts) for rank in ranks]
    return np.concatenate([part[which] for which in range(3) for part in parts])


def _qkv_ends(tensor: CheckpointTensor, hparams: Hparams) -> tuple[int, int]:
    """Return the rows of a fused projection where queries and keys end. Raises CheckpointError."""
    heads = hparams.count("num_attention_heads")
    keys = hparams.count("swa_num_key_value_heads")
    size = hparams.count("head_dim")
    if tensor.shape[0] != (heads + keys) * size + keys * hparams.count("v_head_dim"):
        raise CheckpointError(
            f"{tensor.shard}: {tensor.name} has {tensor.shape[0]} rows, which does not fit the "
            "head counts of config.json"
        )
    return heads * size, (heads + keys) * size


def _is_ranked(tensor: CheckpointTensor, architecture: Architecture) -> bool:
    fused = bool(architecture.ranked) and tensor.name.endswith(architecture.ranked)
    return fused and len(tensor.shape) > 1


def _ranks(tensor: CheckpointTensor, scale: CheckpointTensor, block: fp8.Block) -> int:
    """Return how many ranks quantized their own rows of a fused projection; 0 if unknown."""
    for count in (8, 4) if block else ():  # as upstream tries them
        each = (tensor.shape[0] // count, *tensor.shape[1:])
        rows, *columns = fp8.scale_shape(each, block or (1, 1))
        if tensor.shape[0] % count == 0 and scale.shape == (count * rows, *columns):
            return count
    return 0


def _check_scale(checkpoint: Outline, tensor: CheckpointTensor, architecture: Architecture) -> None:
    """Raise CheckpointError if an FP8 tensor has no fitting scale."""
    block = fp8.block_size(checkpoint.config)
    if not _is_ranked(tensor, architecture):
        fp8.scale_of(tensor.name, checkpoint.tensors, block)
        return
    name = tensor.name + _RANKED_SCALE
    scale = checkpoint.tensors.get(name)
    if scale is None or scale.dtype not in ("BF16", "F32") or not _ranks(tensor, scale, block):
        raise CheckpointError(
            f"{tensor.shard}: {tensor.name} is FP8 and {name} is missing or has another shape"
        )
