"""FP8 checkpoints: E4M3 weights, and scales for blocks, rows, experts or whole matrices.

Dequantizes as upstream does. Without its scales, a checkpoint converts and loads, but its head
drafts nothing: a weight without a scale is refused, and so is a scale that is left over.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mtpforge.checkpoint import quantization
from mtpforge.checkpoint.safetensors import CheckpointTensor
from mtpforge.errors import CheckpointError

DTYPE = "F8_E4M3"
SUFFIXES = ("_scale_inv", "_scale")
"""A scale has its weight's name with one of these."""
UNUSED = (
    ".input_scale", "_input_scale", ".activation_scale", "_activation_scale", ".q_scale",
    ".k_scale", ".v_scale", ".kv_scale", ".output_scale",
)  # fmt: skip
"""Endings of scales of activations and of the cache, which change no weight."""

Block = tuple[int, int] | None
"""Rows and columns that share a scale; None if config.json names no blocks."""


def _values() -> np.ndarray:
    """Return the 256 values of E4M3 without infinities (`float8_e4m3fn`), as float32."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, (code & 7) / 8
    magnitude = np.where(exponent, (1 + mantissa) * 2.0 ** (exponent - 7), mantissa * 2.0**-6)
    magnitude[code & 127 == 127] = np.nan
    return np.where(code >> 7, -magnitude, magnitude).astype(np.float32)


VALUES = _values()
"""The value of each code."""
FINITE = np.nan_to_num(VALUES, nan=0.0)
POWERS = np.append(np.ldexp(np.float32(1), np.arange(-127, 128)), np.float32(np.nan))
"""The value of each code of F8_E8M0: a power of two, which only a scale can have."""


def block_size(config: Mapping[str, Any]) -> Block:
    """Return how many rows and columns share a scale (config.json). Raises CheckpointError."""
    settings = quantization.settings_in(config)
    groups = quantization.groups_in(settings, "config_groups")  # of compressed-tensors
    sizes = [(group.get("weights") or {}).get("block_structure") for group in groups]
    named = [size for size in (settings.get("weight_block_size"), *sizes) if size is not None]
    if not named:
        return None
    size = named[0]
    if not isinstance(size, list) or [type(n) for n in size] != [int, int] or min(size) < 1:
        raise CheckpointError(
            "config.json: the block size of its quantization_config is malformed: FP8 weights "
            "need two positive integers, such as [128, 128]"
        )
    if any(other != size for other in named):
        raise CheckpointError(
            "config.json: its quantization_config has several block sizes, which is not supported"
        )
    return size[0], size[1]


def scale_of(name: str, tensors: Mapping[str, CheckpointTensor], block: Block) -> CheckpointTensor:
    """Return the scale of an FP8 weight.

    Raises CheckpointError if it has none, or two, or one that does not fit it.
    """
    weight = tensors[name]
    place = f"{weight.shard}: {weight.name} is FP8"
    found = [tensors[name + suffix] for suffix in SUFFIXES if name + suffix in tensors]
    if not found:
        raise CheckpointError(
            f"{place} and {weight.name}{SUFFIXES[0]} is missing, and so is "
            f"{weight.name}{SUFFIXES[1]}: is the checkpoint complete?"
        )
    if len(found) > 1:
        raise CheckpointError(
            f"{place} and has two scales, {found[0].name} and {found[1].name}: remove the wrong one"
        )
    if not _fits(found[0], weight, block):
        form = (
            f"each block of {block[0]} x {block[1]}"
            if block
            else "the whole or each row, and config.json names no block size: is its "
            "quantization_config that of the original?"
        )
        raise CheckpointError(
            f"{place} of shape {list(weight.shape)} and {found[0].name} is {found[0].dtype} of "
            f"shape {list(found[0].shape)}: not one number for {form}"
        )
    return found[0]


def check_leftover(tensors: Mapping[str, CheckpointTensor], names: Iterable[str]) -> None:
    """Raise CheckpointError if one of the `names`, which no weight uses, is that of a scale."""
    for name in names:
        suffix = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")
        weight = tensors.get(name.removesuffix(suffix)) if suffix else None
        if weight and weight.dtype != DTYPE:
            state = f"{weight.name} is {weight.dtype}"
        elif not weight and suffix and name.endswith(f"weight{suffix}"):
            state = "its weight is missing"
        else:
            continue
        raise CheckpointError(
            f"{tensors[name].shard}: {tensors[name].name} is the scale of an FP8 weight, "
            f"but {state}: refusing to drop it silently"
        )


def is_scale(name: str, tensors: Mapping[str, CheckpointTensor]) -> bool:
    """Whether a tensor only scales others: a weight, activations or the cache."""
    weights = (name.removesuffix(suffix) for suffix in SUFFIXES if name.endswith(suffix))
    return name.endswith(UNUSED) or any(
        weight in tensors and tensors[weight].dtype == DTYPE for weight in weights
    )


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Return the shape of a weight's scales: one per block, partial blocks included."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def scale_index(
    shape: tuple[int, ...], scales: tuple[int, ...], block: Block
) -> tuple[np.ndarray, np.ndarray]:
    """Return two broadcast arrays of a weight's shape whose sum is the index of each scale.

    `scales` is the shape of the scales.
    """
    scales += (1,) * (len(shape) - len(scales))
    sizes = (1,) * (len(shape) - 2) + (block or (1, 1))
    indices = []
    for axis, (length, count, size) in enumerate(zip(shape, scales, sizes, strict=True)):
        steps = np.arange(length) // (size if count > 1 else length) * math.prod(scales[axis + 1 :])
        indices.append(steps.reshape(-1, *(1,) * (len(shape) - axis - 1)))
    rows = sum(indices[:-1], np.zeros((1,) * len(shape), np.intp))
    return np.broadcast_to(rows, shape), np.broadcast_to(indices[-1], shape)


def dequantize(codes: np.ndarray, scales: np.ndarray, block: Block) -> np.ndarray:
    """Multiply E4M3 `codes` (uint8, [..., rows, columns]) by their `scales`, in float32."""
    rows, columns = scale_index(codes.shape, scales.shape, block)
    return np.asarray(VALUES[codes] * scales.reshape(-1)[rows + columns])


def _fits(scale: CheckpointTensor, weight: CheckpointTensor, block: Block) -> bool:
    """Whether a scale has numbers for the blocks, or else for matrices, experts or rows."""
    rank = len(weight.shape)
    if scale.dtype not in ("BF16", "F16", "F32", "F8_E8M0") or rank < 2 or not scale.size:
        return False
    if block:
        return scale.shape == scale_shape(weight.shape, block)
    padded = scale.shape + (1,) * (rank - len(scale.shape))
    sizes = (*weight.shape[:-1], 1)
    return len(padded) == rank and all(
        count in (1, size) for count, size in zip(padded, sizes, strict=True)
    )
