"""Values of converted tensors: read from the checkpoint in slices, transformed, and encoded."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from gguf.constants import GGMLQuantizationType

from mtpforge.checkpoint import fp8
from mtpforge.checkpoint.families.family import BF16, F32, identity
from mtpforge.checkpoint.safetensors import Checkpoint, CheckpointTensor
from mtpforge.convert.plan import ConvertedTensor
from mtpforge.errors import CheckpointError
from mtpforge.io.ranges import CHUNK, Payload

SLICE = 1 << 17
"""Values processed at a time; they fit into a processor's cache."""


def payload(checkpoint: Checkpoint, item: ConvertedTensor) -> Payload:
    """Yield a tensor's bytes: ranges of the shards if nothing changes, else computed slices."""
    if item.row.change is identity and item.row.type is BF16 and item.dtype == "BF16":
        for view in _views(checkpoint, item):
            for block in blocks(view):
                yield checkpoint.locate(block) or block.data
    else:
        for piece in values(checkpoint, item):
            yield encode(piece, item.row.type)
    checkpoint.release()


def values(checkpoint: Checkpoint, item: ConvertedTensor) -> Iterator[np.ndarray]:
    """Yield a tensor's values as flat float32 slices of whole rows, transformed, in GGUF order."""
    for views, decoded in _parts(checkpoint, item):
        for pieces in cut(views):
            yield item.row.change(decoded(*pieces).reshape(-1))
            checkpoint.release()


def rows(checkpoint: Checkpoint, item: ConvertedTensor, numbers: np.ndarray) -> np.ndarray:
    """Return some rows of a tensor, transformed, as float32 [rows, row length]; read no others.

    `numbers` are ascending and count the rows of all matrices of the tensor.
    """
    width = item.row.shape[-1]
    done = 0
    found = []
    if numbers[-1] - numbers[0] >= len(numbers):
        for tensor in item.tensors:
            checkpoint.scatter(tensor)
    for views, decoded in _parts(checkpoint, item):
        count = views[0].size // width
        first, last = np.searchsorted(numbers, (done, done + count))
        if first < last:
            wanted = numbers[first:last] - done
            found.append(decoded(*(_pick(view, wanted, width) for view in views)))
        done += count
    result = item.row.change(np.concatenate(found))
    checkpoint.release()
    return result


def cut(views: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Cut views of one shape along their leading axes into slices of whole rows, up to `SLICE`."""
    entries = len(views[0])
    size = views[0].size // entries
    if size > SLICE:
        for i in range(entries):
            yield from cut([view[i] for view in views])
    else:
        step = SLICE // size
        for start in range(0, entries, step):
            yield [view[start : start + step] for view in views]


def blocks(view: np.ndarray) -> Iterator[np.ndarray]:
    """Cut a view into C-contiguous pieces; copy only if it is not contiguous."""
    if view.flags.c_contiguous:
        yield view
    elif view.nbytes <= CHUNK:
        yield np.ascontiguousarray(view)
    else:
        for entry in view:
            yield from blocks(entry)


def decode(array: np.ndarray, dtype: str) -> np.ndarray:
    """Convert checkpoint values to float32, exactly."""
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def encode(array: np.ndarray, kind: GGMLQuantizationType) -> memoryview:
    """Convert float32 values to F32 bytes, or to BF16 rounded to nearest even.

    Raises CheckpointError for NaN in BF16.
    """
    if kind is F32:
        return np.ascontiguousarray(array, dtype="<f4").data
    if np.isnan(array).any():
        raise CheckpointError("a weight is NaN: the checkpoint is damaged")
    bits = array.view(np.uint32)
    rounded: np.ndarray = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return rounded.astype("<u2").data


Decode = Callable[..., np.ndarray]
"""Slices of the views of a part to float32 values."""


def _parts(
    checkpoint: Checkpoint, item: ConvertedTensor
) -> Iterator[tuple[list[np.ndarray], Decode]]:
    """Yield the tensor's views in GGUF order, with the function that decodes slices of them.

    FP8 codes come with two index arrays: every code finds its scale, wherever a view moves it.
    """
    if not item.scales:
        for view in _views(checkpoint, item):
            yield [view], lambda array: decode(array, item.dtype)
        return
    block = fp8.block_size(checkpoint.config)
    for tensor, scale in zip(item.tensors, item.scales, strict=True):
        dequantize = _dequantizer(checkpoint, scale)
        # A tensor made from several is a stack of them, so a view of one is a view of its part.
        sources = [checkpoint.array(tensor), *fp8.scale_index(tensor.shape, block)]
        for views in zip(*(item.source.view([source]) for source in sources), strict=True):
            yield list(views), dequantize


def _dequantizer(checkpoint: Checkpoint, scale: CheckpointTensor) -> Decode:
    scales = decode(checkpoint.array(scale), scale.dtype).reshape(-1)

    def dequantize(codes: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        return np.asarray(fp8.VALUES[codes] * scales[rows + columns])

    return dequantize


def _views(checkpoint: Checkpoint, item: ConvertedTensor) -> list[np.ndarray]:
    return item.source.view([checkpoint.array(tensor) for tensor in item.tensors])


def _pick(view: np.ndarray, numbers: np.ndarray, width: int) -> np.ndarray:
    """Return rows of `width` values of a view, which may split a row into several axes."""
    axis = view.ndim
    size = 1
    while size < width:
        axis -= 1
        size *= view.shape[axis]
    leading = view.shape[:axis]
    picked = view[np.unravel_index(numbers, leading)] if leading else view
    return picked.reshape(len(numbers), width)
