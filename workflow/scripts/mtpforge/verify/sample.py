"""The rows of a tensor that are compared with its source."""

import zlib

import numpy as np

from mtpforge.gguf.reader import TensorInfo

LARGE = 1 << 20
"""Weights; smaller tensors are compared whole."""
RUN = 4
"""Rows in one run of a sample."""
SAMPLE = 32
"""One run in this many is compared."""


def sample_rows(info: TensorInfo, whole: bool = False) -> np.ndarray:
    """The rows to compare, ascending: all rows of a small tensor, else random runs in each stretch.

    The tensor's name seeds the random numbers: a file is always judged by the same rows.
    """
    rows = info.elements // info.shape[-1]
    if whole or info.elements <= LARGE:
        return np.arange(rows)
    matrix = info.shape[-2]
    stretch = min(RUN * SAMPLE, matrix)
    run = min(RUN, stretch)
    starts = np.arange(0, matrix, stretch)
    random = np.random.default_rng(zlib.crc32(info.name.encode()))
    shift = random.integers(0, stretch - run + 1, (rows // matrix, len(starts)))
    first = np.minimum(starts + shift, matrix - run) + np.arange(0, rows, matrix)[:, None]
    return np.unique(first[..., None] + np.arange(run))
