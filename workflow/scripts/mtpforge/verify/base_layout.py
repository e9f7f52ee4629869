"""The source's values in the layout of a base: fused, apart, or for another number of tokens."""

from collections.abc import Iterable, Mapping, Sequence, Set
from functools import partial

import numpy as np

from mtpforge.gguf.reader import Gguf, TensorInfo, drop_leading_ones
from mtpforge.inject import match
from mtpforge.verify import sample, tensors
from mtpforge.verify.report import some
from mtpforge.verify.tensors import SourceRows


def rows_in_layout(
    opened: Gguf, source: Mapping[str, TensorInfo], rows: Mapping[str, SourceRows]
) -> dict[str, SourceRows]:
    """The expected rows of each tensor of a file, from those of its source's tensors.

    The tensors must match, as `inject.match` checks. Biases that the source lacks must be zero.
    """
    result = dict(rows)
    for whole, names in match.fusions(opened.tensors.keys(), rows.keys()).items():
        parts = [(_height(source[name]), rows[name]) for name in names]
        order = _order(opened, [height for height, _ in parts], whole)
        is_vector = len(source[names[0]].shape) == 1
        result[whole] = partial(_side_by_side if is_vector else _joined, parts, order)
    for whole, names in match.fusions(rows.keys(), opened.tensors.keys()).items():
        end = 0
        for name in names:
            start, end = end, end + _height(opened.tensors[name])
            is_vector = len(opened.tensors[name].shape) == 1
            total = _height(source[whole])
            result[name] = partial(
                _columns if is_vector else _cut, rows[whole], part=(start, end), total=total
            )
    for name in _surplus(opened, source):
        if name in rows:
            result[name] = partial(_known, rows[name], source[name].shape[0])
    for name in opened.tensors.keys() - result.keys():
        if match.is_bias_of_any(name, rows.keys()):
            result[name] = partial(_zeros, opened.tensors[name].shape[-1])
    return result


def names_in_source(names: Iterable[str], opened: Gguf, source: Set[str]) -> list[str]:
    """The tensors of the source from which those of a file come, which can be fused or apart."""
    come_from = match.fusions(opened.tensors.keys(), source)
    for whole, parts in match.fusions(source, opened.tensors.keys()).items():
        come_from |= dict.fromkeys(parts, (whole,))
    found = [each for name in names for each in come_from.get(name, (name,)) if each in source]
    return list(dict.fromkeys(found))


def foreign_output(opened: Gguf, rows: Mapping[str, SourceRows]) -> str:
    """Whether an output matrix that the source ties to its embeddings is unlike them, as a problem.

    A fine-tune can train it apart, but starts from the embeddings and stays near them.
    """
    embeddings = rows.get(match.EMBEDDINGS)
    info = opened.tensors.get(match.OUTPUT)
    if info is None or embeddings is None or match.OUTPUT in rows:
        return ""
    numbers = sample.sample_rows(info)
    found = tensors.compare_tensor(opened, info, numbers=numbers, source=embeddings, exact=False)
    error = found.error or 0.0
    if error <= max(tensors.ROW_GATE, tensors.error_limit(found.type)):
        return ""
    return (
        f"{info.name} ({found.type}) has a relative error of {error:.3f} from the source's "
        "embeddings, which are its output too"
    )


def not_compared(
    opened: Gguf, source: Mapping[str, TensorInfo], rows: Mapping[str, SourceRows]
) -> str:
    """A note on the tensors and rows that a file has and its source has not; empty if none."""
    unknown = [f"{count:,} rows of {name}" for name, count in _surplus(opened, source).items()]
    unknown += [
        name
        for name in opened.tensors
        if name not in source and name not in rows and not name.endswith(".scale")
    ]
    return f"; the source does not have {some(unknown)}: not compared" if unknown else ""


def _surplus(opened: Gguf, source: Mapping[str, TensorInfo]) -> dict[str, int]:
    """The number of rows for tokens that the source does not have."""
    counts = {
        name: opened.tensors[name].shape[0] - source[name].shape[0]
        for name in (match.EMBEDDINGS, match.OUTPUT)
        if name in opened.tensors and name in source
    }
    return {name: count for name, count in counts.items() if count > 0}


def _height(info: TensorInfo) -> int:
    """The rows of one matrix, or the entries of a vector."""
    return drop_leading_ones(info.shape)[-2:][0]


def _order(opened: Gguf, heights: Sequence[int], whole: str) -> np.ndarray:
    """The rows of a fused tensor, as places in its parts one after the other.

    `ssm_in` has them by key head: queries, keys, values and gates of the first, then of the next.
    """
    places = np.arange(sum(heights))
    if not whole.endswith("ssm_in.weight"):
        return places
    heads = opened.need(f"{opened.architecture}.ssm.group_count", int)
    channels, values = heights
    keys = (channels - values) // 2
    kinds = np.split(places, [keys, 2 * keys, channels])
    return np.concatenate([kind.reshape(heads, -1) for kind in kinds], axis=1).reshape(-1)


def _joined(
    parts: Sequence[tuple[int, SourceRows]], order: np.ndarray, numbers: np.ndarray
) -> np.ndarray:
    """Rows of matrices that have the rows of all parts, in this order."""
    matrices, places = np.divmod(numbers, len(order))
    places = order[places]
    result: np.ndarray | None = None
    start = 0
    for height, rows in parts:
        mine = np.flatnonzero((places >= start) & (places < start + height))
        wanted = matrices[mine] * height + places[mine] - start
        ascending = np.argsort(wanted)
        if len(mine):
            found = rows(wanted[ascending])
            if result is None:
                result = np.empty((len(numbers), found.shape[1]), np.float32)
            result[mine[ascending]] = found
        start += height
    assert result is not None
    return result


def _side_by_side(
    parts: Sequence[tuple[int, SourceRows]], order: np.ndarray, numbers: np.ndarray
) -> np.ndarray:
    return np.concatenate([rows(numbers) for _, rows in parts], axis=1)[:, order]


def _cut(rows: SourceRows, numbers: np.ndarray, part: tuple[int, int], total: int) -> np.ndarray:
    """Rows of one part of fused matrices, each with `total` rows."""
    start, end = part
    matrices, places = np.divmod(numbers, end - start)
    return rows(matrices * total + start + places)


def _columns(
    rows: SourceRows, numbers: np.ndarray, part: tuple[int, int], total: int
) -> np.ndarray:
    """Entries of one part of a fused vector of `total` entries."""
    assert total >= part[1]
    return rows(numbers)[:, slice(*part)]


def _known(rows: SourceRows, count: int, numbers: np.ndarray) -> np.ndarray:
    """The rows of the tokens that the source has."""
    known = numbers[numbers < count]
    return rows(known) if len(known) else np.empty((0, 0), np.float32)


def _zeros(width: int, numbers: np.ndarray) -> np.ndarray:
    return np.zeros((len(numbers), width), np.float32)
