"""FP8 checkpoints: E4M3 weights with one scale per block of rows and columns.

Dequantizes as upstream does. Without its scales, a checkpoint converts and loads, but its head
drafts nothing: a weight without a scale is refused.
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mtpforge.errors import CheckpointError

DTYPE = "F8_E4M3"
SUFFIX = "_scale_inv"


def _values() -> np.ndarray:
    """Return the 256 values of E4M3 without infinities (`float8_e4m3fn`), as float32."""
    code = np.arange(256)
    exponent, mantissa = (code >> 3) & 15, (code & 7) / 8
    magnitude = np.where(exponent, (1 + mantissa) * 2.0 ** (exponent - 7), mantissa * 2.0**-6)
    magnitude[code & 127 == 127] = np.nan
    return np.where(code >> 7, -magnitude, magnitude).astype(np.float32)


VALUES = _values()


def block_size(config: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many rows and columns share a scale (config.json). Raises CheckpointError."""
    settings = config.get("quantization_config")
    size = settings.get("weight_block_size") if isinstance(settings, dict) else None
    if not isinstance(size, list) or [type(n) for n in size] != [int, int] or min(size) < 1:
        raise CheckpointError(
            "config.json: quantization_config.weight_block_size is missing or malformed: "
            "FP8 weights need two positive integers, such as [128, 128]"
        )
    return size[0], size[1]


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """Return the shape of a weight's scales: one per block, partial blocks included."""
    return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))


def scale_index(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return two broadcast arrays of a weight's shape whose sum is the index of each scale."""
    *leading, per_row = scale_shape(shape, block)
    per_matrix = leading[-1]
    matrices = np.arange(math.prod(leading[:-1])).reshape(*leading[:-1], 1, 1) * per_matrix
    rows = (matrices + (np.arange(shape[-2]) // block[0])[:, None]) * per_row
    return np.broadcast_to(rows, shape), np.broadcast_to(np.arange(shape[-1]) // block[1], shape)


def dequantize(codes: np.ndarray, scales: np.ndarray, block: tuple[int, int]) -> np.ndarray:
    """Multiply E4M3 `codes` (uint8, [..., rows, columns]) by their `scales`, in float32."""
    rows, columns = scale_index(codes.shape, block)
    return np.asarray(VALUES[codes] * scales.reshape(-1)[rows + columns])
