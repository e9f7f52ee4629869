"""Values of converted tensors: read from the checkpoint in slices, transformed, and encoded."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

import numpy as np
from gguf.constants import GGMLQuantizationType

from mtpforge import processors
from mtpforge.checkpoint import fp8
from mtpforge.checkpoint.checkpoint import Checkpoint
from mtpforge.checkpoint.families.family import BF16, F32, identity, unchanged
from mtpforge.checkpoint.safetensors import CheckpointTensor
from mtpforge.convert.plan import ConvertedTensor
from mtpforge.errors import CheckpointError
from mtpforge.io.ranges import CHUNK, Payload

SLICE = 1 << 17
"""Values processed at a time; they fit into a processor's cache."""
JOB = 1 << 20
"""Values that a thread processes before it takes the next."""
MOST_THREADS = 16
"""More would take memory, and no disk writes what they compute."""


def payload(checkpoint: Checkpoint, item: ConvertedTensor, threads: int | None = None) -> Payload:
    """Yield a tensor's bytes: ranges of the shards if nothing changes, else computed slices.

    Slices are computed by that many threads, or those of the job, up to `MOST_THREADS`.
    """
    checkpoint.require([*item.tensors, *item.scales], to_convert=True)
    checkpoint.integrity.add([*item.tensors, *item.scales])
    is_copy = item.row.change is identity and item.row.type is BF16
    if is_copy and all(tensor.dtype == "BF16" for tensor in item.tensors):
        for view in _views(checkpoint, item):
            for block in blocks(view):
                yield checkpoint.locate(block) or block.data
    else:
        yield from _computed(checkpoint, item, threads or min(processors.allotted(), MOST_THREADS))
    checkpoint.release()


def values(checkpoint: Checkpoint, item: ConvertedTensor) -> Iterator[np.ndarray]:
    """Yield a tensor's values as flat float32 slices of whole rows, transformed, in GGUF order."""
    for views, decoded in _parts(checkpoint, item):
        for pieces in cut(views):
            yield item.row.change(decoded(*pieces).reshape(-1))
            checkpoint.release()


def rows(checkpoint: Checkpoint, item: ConvertedTensor, numbers: np.ndarray) -> np.ndarray:
    """Return some rows of a tensor, transformed, as float32 [rows, row length]; read no others.

    `numbers` are ascending and count the rows of all matrices of the tensor. Raises CheckpointError
    if one of them was freed.
    """
    if not _are_kept(checkpoint, item, numbers):
        checkpoint.require([*item.tensors, *item.scales])
    width = item.row.shape[-1]
    done = 0
    found = []
    if numbers[-1] - numbers[0] >= len(numbers):
        for tensor in item.tensors:
            checkpoint.scatter(tensor)
    for views, decoded in _parts(checkpoint, item, array=checkpoint.remains):
        count = views[0].size // width
        first, last = np.searchsorted(numbers, (done, done + count))
        if first < last:
            wanted = numbers[first:last] - done
            found.append(decoded(*(_pick(view, wanted, width) for view in views)))
        done += count
    result = item.row.change(np.concatenate(found))
    checkpoint.release()
    return result


def places(
    checkpoint: Checkpoint, item: ConvertedTensor, numbers: np.ndarray
) -> dict[str, np.ndarray] | None:
    """Find the bytes of some rows of a tensor: int64 [ranges, 2] by shard, offset and end of each.

    The ranges are ascending and do not touch. None if a view is a copy, so nothing tells.
    """
    width = item.row.shape[-1]
    found: dict[str, list[np.ndarray]] = {}
    done = 0
    for views, _ in _parts(checkpoint, item, array=checkpoint.remains):
        count = views[0].size // width
        first, last = np.searchsorted(numbers, (done, done + count))
        start = checkpoint.locate(views[0])
        if start is None:
            return None
        if first < last:
            offsets = start.offset + _spans(views[0], numbers[first:last] - done, width)
            found.setdefault(start.path.name, []).append(offsets)
        done += count
    return {shard: merged(np.concatenate(ranges)) for shard, ranges in found.items()}


def merged(ranges: np.ndarray) -> np.ndarray:
    """Sort ranges, int64 [ranges, 2], and join those that overlap or touch."""
    if not len(ranges):
        return ranges
    ranges = ranges[np.argsort(ranges[:, 0], kind="stable")]
    ends = np.maximum.accumulate(ranges[:, 1])
    starts = np.flatnonzero(np.append(True, ranges[1:, 0] > ends[:-1]))
    last = np.append(starts[1:], len(ranges)) - 1
    return np.stack([ranges[starts, 0], ends[last]], axis=1)


def cut(views: Sequence[np.ndarray], most: int = SLICE) -> Iterator[list[np.ndarray]]:
    """Cut views of one shape along their leading axes into slices of whole rows, up to `most`."""
    entries = len(views[0])
    size = views[0].size // entries
    if size > most:
        for i in range(entries):
            yield from cut([view[i] for view in views], most)
    else:
        step = most // size
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
    if dtype == "F8_E8M0":
        return np.asarray(fp8.POWERS[array])
    return array.astype(np.float32)


def scales(checkpoint: Checkpoint, scale: CheckpointTensor) -> np.ndarray:
    """Return the scales of an FP8 tensor as float32. Raises CheckpointError if not finite."""
    numbers = decode(checkpoint.array(scale), scale.dtype)
    if not np.isfinite(numbers).all():
        raise CheckpointError(
            f"{scale.shard}: {scale.name} is not finite everywhere: the checkpoint is damaged"
        )
    return numbers


def encode(array: np.ndarray, kind: GGMLQuantizationType) -> memoryview:
    """Convert float32 values to F32 bytes, or to BF16 rounded to nearest even.

    Raises CheckpointError for NaN in BF16.
    """
    if kind is F32:
        return np.ascontiguousarray(array, dtype="<f4").data
    if np.isnan(array).any():
        raise _nan()
    return _rounded(array).data


def _nan() -> CheckpointError:
    return CheckpointError("a weight is NaN: the checkpoint is damaged")


def _rounded(array: np.ndarray) -> np.ndarray:
    """Return float32 values as BF16 bits, rounded to nearest even."""
    bits = array.view(np.uint32)
    rounded = bits >> 16
    rounded &= 1
    rounded += 0x7FFF
    rounded += bits
    return rounded.view("<u2")[..., 1::2].copy()


Decode = Callable[..., np.ndarray]
"""Slices of the views of a part to float32 values."""


def _computed(checkpoint: Checkpoint, item: ConvertedTensor, threads: int) -> Iterator[memoryview]:
    """Yield the bytes of a tensor whose values change, in order for any number of threads."""
    direct = item.row.change is identity and item.row.type is BF16
    direct = direct and bool(item.scales) and None not in item.scales

    def compute(decoded: Decode, job: list[np.ndarray]) -> list[memoryview]:
        found = (decoded(*pieces).reshape(-1) for pieces in cut(job, SLICE))
        if direct:
            return [values.data for values in found]
        return [encode(item.row.change(values), item.row.type) for values in found]

    waiting: deque[Future[list[memoryview]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        for views, decoded in _parts(checkpoint, item, _looked_up if direct else _dequantized):
            for job in cut(views, JOB):
                waiting.append(pool.submit(compute, decoded, job))
                if len(waiting) > threads:
                    yield from waiting.popleft().result()
                    checkpoint.release()
        for future in waiting:
            yield from future.result()


def _parts(
    checkpoint: Checkpoint,
    item: ConvertedTensor,
    scaled: Decode | None = None,
    array: Callable[[CheckpointTensor], np.ndarray] | None = None,
) -> Iterator[tuple[list[np.ndarray], Decode]]:
    """Yield the tensor's views in GGUF order, with the function that decodes slices of them.

    FP8 codes come with two index arrays: every code finds its scale, wherever a view moves it.
    `scaled` decodes them. `array` returns the values of a tensor.
    """
    array = array or checkpoint.array
    if not item.scales:
        # Tensors that a view joins are of one type.
        stacked = item.source.view is unchanged
        for i, view in enumerate(item.source.view([array(tensor) for tensor in item.tensors])):
            yield [view], partial(decode, dtype=item.tensors[i if stacked else 0].dtype)
        return
    block = fp8.block_size(checkpoint.config)
    for tensor, scale in zip(item.tensors, item.scales, strict=True):
        if scale is None:
            yield [array(tensor)], partial(decode, dtype=tensor.dtype)
            continue
        numbers = scales(checkpoint, scale)
        # A tensor made from several is a stack of them, so a view of one is a view of its part.
        indices = fp8.scale_index(tensor.shape, numbers.shape, block)
        sources = [array(tensor), *indices]
        decoded = partial(scaled or _dequantized, numbers.reshape(-1))
        for views in zip(*(item.source.view([source]) for source in sources), strict=True):
            yield list(views), decoded


def _dequantized(
    numbers: np.ndarray, codes: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    return np.asarray(fp8.VALUES[codes] * numbers[rows + columns])


def _looked_up(
    numbers: np.ndarray, codes: np.ndarray, rows: np.ndarray, columns: np.ndarray
) -> np.ndarray:
    """Return BF16 bits, from a table of all codes with each scale that occurs."""
    index = np.add(rows, columns, order="C")
    first = index.min()
    used = numbers[first : index.max() + 1]
    if len(used) * len(fp8.VALUES) > codes.size:  # the table would cost more than it saves
        return np.frombuffer(
            encode(_dequantized(numbers, codes, rows=rows, columns=columns), BF16), "<u2"
        )
    if ((codes & 127) == 127).any():
        raise _nan()
    table = _rounded((fp8.FINITE * used[:, None]).reshape(-1))
    index -= first
    index *= len(fp8.VALUES)
    index += codes
    return np.asarray(table.take(index, mode="clip"))


def _views(checkpoint: Checkpoint, item: ConvertedTensor) -> list[np.ndarray]:
    return item.source.view([checkpoint.array(tensor) for tensor in item.tensors])


def _pick(view: np.ndarray, numbers: np.ndarray, width: int) -> np.ndarray:
    """Return rows of `width` values of a view, which may split a row into several axes."""
    leading = view.shape[: _row_axis(view, width)]
    picked = view[np.unravel_index(numbers, leading)] if leading else view
    return picked.reshape(len(numbers), width)


def _row_axis(view: np.ndarray, width: int) -> int:
    """Return the first axis of the rows of a view."""
    axis = view.ndim
    size = 1
    while size < width:
        axis -= 1
        size *= view.shape[axis]
    return axis


def _spans(view: np.ndarray, numbers: np.ndarray, width: int) -> np.ndarray:
    """Return first and last byte of rows, from the start of a view: int64 [rows, 2]."""
    axis = _row_axis(view, width)
    steps = np.unravel_index(numbers, view.shape[:axis]) if axis else ()
    starts = np.zeros(len(numbers), np.int64)
    for step, stride in zip(steps, view.strides, strict=False):
        starts += step * stride
    inside = zip(view.shape[axis:], view.strides[axis:], strict=True)
    size = view.itemsize + sum((count - 1) * stride for count, stride in inside)
    return np.stack([starts, starts + size], axis=1)


def _are_kept(checkpoint: Checkpoint, item: ConvertedTensor, numbers: np.ndarray) -> bool:
    """Whether all of these rows are there, though a tensor of theirs may have been freed."""
    if not any(map(checkpoint.integrity.kept, item.tensors)):
        return True
    there: dict[str, list[tuple[int, int]]] = {}
    for tensor in item.tensors:
        kept = checkpoint.integrity.kept(tensor)
        ranges = kept.ranges if kept else [(tensor.offset, tensor.size)]
        there.setdefault(tensor.shard, []).extend((at, at + size) for at, size in ranges)
    needed = places(checkpoint, item, numbers)
    return needed is not None and all(
        _cover(merged(np.array(there[shard], np.int64).reshape(-1, 2)), ranges)
        for shard, ranges in needed.items()
    )


def _cover(there: np.ndarray, needed: np.ndarray) -> bool:
    """Whether each needed range lies in one that is there; both are as `merged` returns them."""
    if not len(there):
        return not len(needed)
    at = np.searchsorted(there[:, 0], needed[:, 0], side="right") - 1
    return bool((at >= 0).all() and (needed[:, 1] <= there[at, 1]).all())
