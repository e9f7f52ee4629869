"""NVFP4 checkpoints, which llama.cpp's converter repacks: two codes a byte, and two scales.

Each 16 codes share a scale in E4M3, and each matrix has one in F32. Upstream takes a missing scale
for 1, so that no weight may lack one.
"""

from collections.abc import Mapping
from typing import Any

from mtpforge.checkpoint import quantization
from mtpforge.checkpoint.safetensors import CheckpointTensor
from mtpforge.errors import CheckpointError

GROUP = 16
"""Codes that share a scale."""
BLOCK = 64
"""Codes of a block in a GGUF; a row must be a multiple of it."""

_PACKED = "nvfp4-pack-quantized"
# Ending of a weight -> endings of its two scales: of ModelOpt, and of compressed-tensors.
_SCALES = {
    ".weight": (".weight_scale", ".weight_scale_2"),
    ".weight_packed": (".weight_scale", ".weight_global_scale"),
}


def is_nvfp4(config: Mapping[str, Any]) -> bool:
    """Whether config.json says that weights are packed in NVFP4, as upstream reads it."""
    settings = quantization.settings_in(config)
    entries = [settings, *quantization.groups_in(settings, "quantized_layers")]
    if any(entry.get("quant_algo") in ("NVFP4", "W4A16_NVFP4") for entry in entries):
        return True
    if settings.get("format") != "mixed-precision":
        return bool(settings.get("format") == _PACKED)
    groups = quantization.groups_in(settings, "config_groups")
    formats = [group.get("format") for group in groups]
    return formats.count(_PACKED) == len(formats) > 0


def check_scales(tensors: Mapping[str, CheckpointTensor]) -> None:
    """Raise CheckpointError if a packed weight lacks a scale, or one has the wrong shape."""
    for name, tensor in tensors.items():
        ending = next((ending for ending in _SCALES if name.endswith(ending)), None)
        if tensor.dtype != "U8" or ending is None:
            continue
        rows, *columns = tensor.shape or (0,)
        width = 2 * columns[0] if len(columns) == 1 else 0
        if width == 0 or width % BLOCK:
            raise CheckpointError(
                f"{tensor.shard}: {name} has shape {list(tensor.shape)}: rows of NVFP4 must be "
                f"multiples of {BLOCK} weights"
            )
        group, whole = (name.removesuffix(ending) + scale for scale in _SCALES[ending])
        _check(tensor, tensors.get(group), name=group, expected=("F8_E4M3", (rows, width // GROUP)))
        found = tensors.get(whole)
        _check(tensor, found, name=whole, expected=("F32", (1,) if found and found.shape else ()))


def _check(
    weight: CheckpointTensor,
    scale: CheckpointTensor | None,
    name: str,
    expected: tuple[str, tuple[int, ...]],
) -> None:
    if scale is None or (scale.dtype, scale.shape) != expected:
        kind, shape = expected
        raise CheckpointError(
            f"{weight.shard}: {weight.name} is NVFP4 and {name} is missing or not {kind} of shape "
            f"{list(shape)}: is the checkpoint complete?"
        )
