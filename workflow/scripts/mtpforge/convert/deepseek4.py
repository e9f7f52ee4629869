"""Weights of DeepSeek-V4: FP8, and experts in MXFP4, as upstream repacks them."""

import re
from collections.abc import Iterator

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize

from mtpforge.checkpoint import fp8
from mtpforge.checkpoint.checkpoint import Checkpoint, Outline
from mtpforge.checkpoint.safetensors import CheckpointTensor
from mtpforge.convert.values import decode, scales
from mtpforge.errors import CheckpointError

Q8_0 = GGMLQuantizationType.Q8_0
MXFP4 = GGMLQuantizationType.MXFP4

BLOCK = (128, 128)
"""Rows and columns of an FP8 weight that share a scale: upstream reads no other number."""
GROUP = 32
"""Weights of a row of an expert that share a scale."""

_PACKED = ("I8", "U8")
"""Types of an expert: two weights in a byte."""
_EXPERT = re.compile(r"\.ffn\.experts\.\d{1,5}\.w[123]\.weight$")
_E_PROJ = "e_proj.weight"
_H_PROJ = "h_proj.weight"


def is_scale(name: str, checkpoint: Outline) -> bool:
    """Whether a tensor is the scale of a weight."""
    return name.endswith(".scale") and _weight_of(name) in checkpoint.tensors


def is_expert(tensor: CheckpointTensor) -> bool:
    """Whether a tensor is a routed expert, which upstream takes for MXFP4 unseen."""
    return _EXPERT.search(tensor.name) is not None


def check_scales(checkpoint: Outline) -> None:
    """Check that experts are MXFP4, and that FP8 and MXFP4 weights have their scales.

    Raises CheckpointError: upstream would take FP8 codes without a scale for values.
    """
    for tensor in checkpoint.tensors.values():
        if is_expert(tensor):
            if tensor.dtype not in _PACKED or len(tensor.shape) != 2:
                raise CheckpointError(
                    f"{tensor.shard}: {tensor.name} is {tensor.dtype}, but llama.cpp's converter "
                    "reads experts in MXFP4 only (I8): use the original checkpoint"
                )
            rows, half = tensor.shape
            _check_scale(checkpoint, tensor, (rows, 2 * half // GROUP))
        elif tensor.dtype == fp8.DTYPE:
            if len(tensor.shape) != 2:
                raise CheckpointError(f"{tensor.shard}: {tensor.name} is FP8, but not a matrix")
            _check_scale(checkpoint, tensor, fp8.scale_shape(tensor.shape, BLOCK))


def check_fusion(checkpoint: Outline) -> None:
    """Check that the head has both halves of its fusion: upstream converts it without.

    Raises CheckpointError.
    """
    for half in (_E_PROJ, _H_PROJ):
        if f"mtp.0.{half}" not in checkpoint.tensors:
            raise CheckpointError(f"{checkpoint.directory}: has a head without mtp.0.{half}")


def repacked(
    checkpoint: Checkpoint, tensor: CheckpointTensor
) -> Iterator[tuple[GGMLQuantizationType, np.ndarray]]:
    """Yield type and bytes (uint8) of a weight that upstream repacks; nothing for others.

    Upstream joins the two halves of the fusion in one tensor, which is yielded with the first.
    """
    if is_expert(tensor):
        yield MXFP4, _mxfp4_blocks(checkpoint, tensor)
    elif tensor.name.endswith(f".{_E_PROJ}"):
        other = checkpoint.tensors[tensor.name.removesuffix(_E_PROJ) + _H_PROJ]
        halves = [_floats(checkpoint, tensor), _floats(checkpoint, other)]
        yield Q8_0, quantize(np.hstack(halves), Q8_0)
    elif tensor.dtype == fp8.DTYPE and not tensor.name.endswith(f".{_H_PROJ}"):
        yield Q8_0, quantize(_floats(checkpoint, tensor), Q8_0)


def is_repacked(tensor: CheckpointTensor) -> bool:
    """Whether `repacked` accounts for a tensor."""
    fused = tensor.name.endswith((f".{_E_PROJ}", f".{_H_PROJ}"))
    return fused or is_expert(tensor) or tensor.dtype == fp8.DTYPE


def _weight_of(name: str) -> str:
    return f"{name.removesuffix('.scale')}.weight"


def _scale_of(checkpoint: Outline, tensor: CheckpointTensor) -> CheckpointTensor | None:
    return checkpoint.tensors.get(f"{tensor.name.removesuffix('.weight')}.scale")


def _check_scale(checkpoint: Outline, tensor: CheckpointTensor, shape: tuple[int, ...]) -> None:
    scale = _scale_of(checkpoint, tensor)
    if scale is None or scale.dtype != "F8_E8M0" or scale.shape != shape:
        name = f"{tensor.name.removesuffix('.weight')}.scale"
        kind = "MXFP4" if is_expert(tensor) else "FP8"
        raise CheckpointError(
            f"{tensor.shard}: {tensor.name} is {kind}, and {name} is missing or not F8_E8M0 of "
            f"shape {list(shape)}: is the checkpoint complete?"
        )


def _floats(checkpoint: Checkpoint, tensor: CheckpointTensor) -> np.ndarray:
    """Return the float32 values of an FP8 or an unquantized tensor."""
    array = checkpoint.array(tensor)
    if tensor.dtype != fp8.DTYPE:
        return decode(array, tensor.dtype)
    scale = _scale_of(checkpoint, tensor)
    assert scale is not None
    return fp8.dequantize(array, scales(checkpoint, scale), BLOCK)


def _mxfp4_blocks(checkpoint: Checkpoint, tensor: CheckpointTensor) -> np.ndarray:
    """Return an expert in blocks of ggml: a scale, and 16 bytes with weights i and i + 16."""
    scale = _scale_of(checkpoint, tensor)
    assert scale is not None
    codes = checkpoint.array(tensor).view(np.uint8)
    exponents = checkpoint.array(scale).view(np.uint8)
    pairs = np.stack([codes & 15, codes >> 4], axis=-1)  # the even weight is in the low half
    groups = pairs.reshape(*exponents.shape, 2, GROUP // 2)
    packed = groups[..., 0, :] | groups[..., 1, :] << 4
    return np.concatenate([exponents[..., None], packed], axis=-1)
