"""The values of a planned tensor: read from the checkpoint in slices, changed, and encoded for the GGUF."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
from gguf.constants import GGMLQuantizationType

from mtpforge.checkpoint import fp8
from mtpforge.checkpoint.families.table import BF16, F32, identity
from mtpforge.checkpoint.safetensors import Checkpoint, CheckpointTensor
from mtpforge.convert.plan import Planned
from mtpforge.errors import CheckpointError
from mtpforge.io.ranges import CHUNK, Payload

SLICE = 1 << 17  # values that are worked on at a time: what a processor's cache holds


# ── values ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def payload(checkpoint: Checkpoint, item: Planned) -> Payload:
    """The row's bytes: ranges of the shards where nothing changes, computed slices where something does."""
    if item.row.change is identity and item.row.type is BF16 and item.dtype == "BF16":
        for view in item.source.view([checkpoint.array(tensor) for tensor in item.tensors]):
            for block in blocks(view):
                yield checkpoint.locate(block) or block.data
    else:
        for piece in values(checkpoint, item):
            yield encode(piece, item.row.type)
    checkpoint.release()


def values(checkpoint: Checkpoint, item: Planned) -> Iterator[np.ndarray]:
    """The row's values as flat float32 slices of whole rows, in the order and with the changes that the GGUF should have."""
    if item.scales:
        pieces = _dequantized(checkpoint, item)
    else:
        views = item.source.view([checkpoint.array(tensor) for tensor in item.tensors])
        pieces = (decode(piece, item.dtype) for view in views for (piece,) in cut([view]))
    for piece in pieces:
        yield item.row.change(piece.reshape(-1))
        checkpoint.release()


def _dequantized(checkpoint: Checkpoint, item: Planned) -> Iterator[np.ndarray]:
    """The values of an FP8 row; each code finds its scale by where it came from, so a view may take it anywhere."""
    block = fp8.block_size(checkpoint.config)
    for tensor, scale in zip(item.tensors, item.scales, strict=True):
        scales = decode(checkpoint.array(scale), scale.dtype)
        # Rows that are made of several tensors are stacks of them, so a view of one tensor is a view of its part.
        sources = [checkpoint.array(tensor), *fp8.scale_index(tensor.shape, block)]
        for views in zip(*(item.source.view([source]) for source in sources), strict=True):
            for codes, rows, columns in cut(views):
                yield fp8.VALUES[codes] * scales.reshape(-1)[rows + columns]


def rows(checkpoint: Checkpoint, item: Planned, numbers: np.ndarray) -> np.ndarray:
    """The values that the GGUF should have in some rows of a tensor, as float32 [rows, row length]; no other is read.

    `numbers` are ascending, and count the rows of all matrices of the tensor.
    """
    width, done, found = item.row.shape[-1], 0, []
    if numbers[-1] - numbers[0] >= len(numbers):
        for tensor in item.tensors:
            checkpoint.scatter(tensor)
    for views, decoded in _parts(checkpoint, item):
        count = views[0].size // width
        first, last = np.searchsorted(numbers, (done, done + count))
        if first < last:
            found.append(
                decoded(*(_pick(view, numbers[first:last] - done, width) for view in views))
            )
        done += count
    values = item.row.change(np.concatenate(found))
    checkpoint.release()
    return values


def _parts(
    checkpoint: Checkpoint, item: Planned
) -> Iterator[tuple[list[np.ndarray], Callable[..., np.ndarray]]]:
    """Views that one after the other have the row's values, with how to decode these; of FP8, codes and places of their scales."""
    if not item.scales:
        for view in item.source.view([checkpoint.array(tensor) for tensor in item.tensors]):
            yield [view], lambda values: decode(values, item.dtype)
        return
    block = fp8.block_size(checkpoint.config)
    for tensor, scale in zip(item.tensors, item.scales, strict=True):

        def decoded(
            codes: np.ndarray,
            rows: np.ndarray,
            columns: np.ndarray,
            scale: CheckpointTensor = scale,
        ) -> np.ndarray:
            return np.asarray(
                fp8.VALUES[codes]
                * decode(checkpoint.array(scale), scale.dtype).reshape(-1)[rows + columns]
            )

        sources = [checkpoint.array(tensor), *fp8.scale_index(tensor.shape, block)]
        for views in zip(*(item.source.view([source]) for source in sources), strict=True):
            yield list(views), decoded


def _pick(view: np.ndarray, numbers: np.ndarray, width: int) -> np.ndarray:
    """Rows of `width` values out of a view, in which a row may be split into several axes."""
    axis, size = view.ndim, 1
    while size < width:
        axis -= 1
        size *= view.shape[axis]
    leading = view.shape[:axis]
    return (view[np.unravel_index(numbers, leading)] if leading else view).reshape(
        len(numbers), width
    )


def cut(views: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Views of one shape in slices along their leading axes, of bounded size: whole rows, many at a time."""
    entries, size = len(views[0]), views[0].size // len(views[0])
    if size > SLICE:
        for i in range(entries):
            yield from cut([view[i] for view in views])
    else:
        step = SLICE // size
        for start in range(0, entries, step):
            yield [view[start : start + step] for view in views]


def blocks(view: np.ndarray) -> Iterator[np.ndarray]:
    """`view` cut along its leading axes into C-contiguous pieces, copied only where the view itself is not contiguous."""
    if view.flags.c_contiguous:
        yield view
    elif view.nbytes <= CHUNK:
        yield np.ascontiguousarray(view)
    else:
        for entry in view:
            yield from blocks(entry)


def decode(array: np.ndarray, dtype: str) -> np.ndarray:
    """Checkpoint values as float32, exactly."""
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def encode(array: np.ndarray, kind: GGMLQuantizationType) -> memoryview:
    """float32 values as the bytes of F32, or of BF16 rounded to nearest even. Raises CheckpointError on NaN in BF16."""
    if kind is F32:
        return np.ascontiguousarray(array, dtype="<f4").data
    if np.isnan(array).any():
        raise CheckpointError("a weight is not a number (NaN): the checkpoint is damaged")
    bits = array.view(np.uint32)
    rounded: np.ndarray = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return rounded.astype("<u2").data
