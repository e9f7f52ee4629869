"""The values of a GGUF compared with its source: relative errors, shifted norms, NaN and infinity.

The head and small tensors are compared whole, large tensors by a sample of rows: short runs spread
over the whole tensor, at least one in each expert, so that 70 GB take minutes. The sample shows
misplaced rows and experts. It can miss a single changed bit; digests cannot.
"""

import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TypeAlias

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from mtpforge import progress
from mtpforge.checkpoint.checkpoint import Checkpoint
from mtpforge.convert import values
from mtpforge.convert.plan import ConvertedTensor
from mtpforge.errors import GgufError
from mtpforge.gguf import quant_types
from mtpforge.gguf.norm_form import SHIFTS
from mtpforge.gguf.reader import Gguf, TensorInfo
from mtpforge.verify.report import TypeErrors
from mtpforge.verify.sample import sample_rows

BATCH = 1 << 18
"""Weights compared at a time."""
GATE = 1.5
"""Limit of a tensor's error, relative to its type's error on heavy-tailed weights."""
ROW_GATE = 0.9
"""Limit of a row's error: a misplaced row has 1.41, a coarse quantization about 0.5."""
FAINT = 1e-3
"""Rows below this share of the usual row are judged relative to it: a scale can round them away."""
ROUNDING = 2.0**-20
"""Relative error of values that another program computed in float32."""
HALF_ROUNDING = 2.0**-10
"""The same for values computed in F16, as upstream does for F16 checkpoints."""
_NORM = "norm.weight"

SourceRows: TypeAlias = Callable[[np.ndarray], np.ndarray]
"""Maps ascending row numbers of a tensor to their expected values, float32 [rows, row length].

Rows after the source's last are left out.
"""


@dataclass(frozen=True)
class Comparison:
    """The result for one tensor."""

    name: str
    type: str
    rows: int
    """Number of rows compared."""
    finite: bool
    error: float | None = None
    """RMS of the difference over RMS of the expected values; None without a source."""
    problem: str = ""
    shift: int = 0
    """-1 or 1 for a norm that is off by exactly that, else 0."""


@dataclass
class Comparisons:
    """The results for a file."""

    all: list[Comparison] = field(default_factory=list)

    @property
    def compared(self) -> list[Comparison]:
        """Results for tensors that have a source."""
        return [each for each in self.all if each.error is not None]

    @property
    def problems(self) -> list[str]:
        """Tensors with wrong values, except norms that are only shifted."""
        return [each.problem for each in self.all if each.problem and not each.shift]

    @property
    def shifts(self) -> dict[str, int]:
        """The shift of each norm that is only shifted."""
        return {each.name: each.shift for each in self.all if each.shift}

    @property
    def errors(self) -> dict[str, float] | None:
        """The relative error of each compared tensor; None if none was compared."""
        return {each.name: _short(each.error or 0.0) for each in self.compared} or None

    @property
    def errors_by_type(self) -> dict[str, TypeErrors] | None:
        """Errors and limit for each type; None if no tensor was compared."""
        by_type: dict[str, list[float]] = {}
        for each in self.compared:
            by_type.setdefault(each.type, []).append(each.error or 0.0)
        return {
            kind: _type_errors(kind, errors) for kind, errors in sorted(by_type.items())
        } or None


def error_limit(kind: str) -> float:
    """The largest relative error that a tensor of a type may have."""
    return max(GATE * quant_types.RELATIVE_ERROR.get(kind, 0.343), ROUNDING)


def rows_of_checkpoint(
    checkpoint: Checkpoint, planned: list[ConvertedTensor]
) -> dict[str, SourceRows]:
    """The expected rows of each tensor, converted from a checkpoint."""
    return {item.row.name: partial(values.rows, checkpoint, item) for item in planned}


def rows_of_gguf(reference: Gguf) -> dict[str, SourceRows]:
    """The expected rows of each tensor, from an unquantized GGUF."""
    return {name: partial(stored_rows, reference, name) for name in reference.tensors}


def compare_tensors(
    opened: Gguf,
    expected: Mapping[str, SourceRows],
    whole: Collection[str] = (),
    exact: Collection[str] = (),
    threads: int = 1,
) -> Comparisons:
    """Check every tensor, and compare it with its source if `expected` has that.

    Tensors in `whole` are read whole. F32 and BF16 tensors in `exact` must be equal bit by bit.
    """

    def compare(info: TensorInfo) -> Comparison:
        rows = sample_rows(info, info.name in whole)
        return compare_tensor(
            opened, info, numbers=rows, source=expected.get(info.name), exact=info.name in exact
        )

    infos = list(opened.tensors.values())
    total = sum(info.size for info in infos)
    done = 0
    results = Comparisons()
    with ThreadPoolExecutor(max(threads, 1)) as pool, progress.bar(opened.path.name) as show:
        for info, result in zip(infos, pool.map(compare, infos), strict=True):
            results.all.append(result)
            done += info.size
            show(done, total)
    return results


def stored_rows(opened: Gguf, name: str, numbers: np.ndarray) -> np.ndarray:
    """Dequantize rows of a tensor: float32 [rows, row length]. Raises GgufError, OSError."""
    info = opened.tensors[name]
    piece = opened.ranges[name]
    if info.type.name not in (*quant_types.TENSOR_TYPES, quant_types.TABLE):
        raise GgufError(f"{opened.path}: {name} is at {info.type.name}, which cannot be read")
    size = piece.size // (info.elements // info.shape[-1])
    runs = np.split(numbers, np.flatnonzero(np.diff(numbers) != 1) + 1)
    descriptor = os.open(piece.path, os.O_RDONLY)
    try:
        raw = b"".join(
            os.pread(descriptor, len(run) * size, piece.offset + int(run[0]) * size) for run in runs
        )
    finally:
        os.close(descriptor)
    if len(raw) != len(numbers) * size:
        raise GgufError(f"{piece.path}: ends within {name}")
    stored = np.frombuffer(raw, np.uint8).reshape(len(numbers), size)
    with np.errstate(all="ignore"):  # the caller checks for damaged scales
        if info.type.name == quant_types.TABLE:
            return stored.view(np.int32).astype(np.float32)
        data = stored.view(np.float32) if info.type.name == "F32" else stored
        found = np.asarray(dequantize(data, info.known_type), dtype=np.float32)
        scale = _scale(opened, info, numbers)
        if scale is not None:
            found *= scale
        return found


def _scale(opened: Gguf, info: TensorInfo, numbers: np.ndarray) -> np.ndarray | None:
    """The factor of each row, [rows, 1], if there is one: NVFP4 has one for each matrix."""
    stem, _, ending = info.name.rpartition(".")
    scale = opened.tensors.get(f"{stem}.scale") if ending == "weight" else None
    if scale is None or len(info.shape) < 2 or scale.elements != math.prod(info.shape[:-2]):
        return None
    scales = stored_rows(opened, scale.name, np.arange(scale.elements // scale.shape[-1]))
    return np.asarray(scales.reshape(-1, 1)[numbers // info.shape[-2]])


def compare_tensor(
    opened: Gguf, info: TensorInfo, numbers: np.ndarray, source: SourceRows | None, exact: bool
) -> Comparison:
    """Compare these rows of a tensor with their source, or only check that they are finite."""
    finite = True
    sums = _Sums(info, exact and info.type.name in ("BF16", "F32"))
    for batch in _batches(numbers, max(BATCH // info.shape[-1], 1)):
        stored = stored_rows(opened, info.name, batch)
        finite = finite and bool(np.isfinite(stored).all())
        if source is not None:
            sums.add(batch, stored, source(batch))
    if source is None:
        return Comparison(info.name, info.type.name, rows=len(numbers), finite=finite)
    problem = sums.problem
    shift = sums.shift if problem else 0
    return Comparison(
        info.name,
        info.type.name,
        rows=sums.rows,
        finite=finite,
        error=sums.error,
        problem=problem,
        shift=shift,
    )


def as_stored(right: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Values rounded to F32 or BF16, so that equal values mean equal bytes."""
    if kind.name == "F32":
        return right
    encoded = np.frombuffer(values.encode(np.ascontiguousarray(right), kind), np.uint16)
    return values.decode(encoded, "BF16").reshape(right.shape)


class _Sums:
    """Sums over the batches of one tensor, and the error that follows from them."""

    def __init__(self, info: TensorInfo, exact: bool) -> None:
        self.info = info
        self.exact = exact
        self.noise = 0.0
        self.signal = 0.0
        self.worst_row = 0.0
        self.rows = 0
        self.first_difference = -1
        self.first_lost = -1
        self.is_half = info.type.name == "F32" and not exact
        self.shifts: set[int] = set()

    def add(self, numbers: np.ndarray, stored: np.ndarray, right: np.ndarray) -> None:
        self.rows += len(right)
        if not len(right):
            return
        stored = stored[: len(right)]
        if self.exact and self.first_difference < 0:
            wrong = (stored != as_stored(right, self.info.known_type)).any(axis=1)
            if wrong.any():
                self.first_difference = int(numbers[int(wrong.argmax())])
        with np.errstate(all="ignore"):
            difference = (stored - right).astype(np.float64)
            noise = (difference**2).sum(1)
            signal = (right.astype(np.float64) ** 2).sum(1)
            floor = max(FAINT**2 * float(signal.mean()), 1e-30)
            self.is_half = self.is_half and bool((stored.astype(np.float16) == stored).all())
            by_row = np.nan_to_num(np.sqrt(noise / np.maximum(signal, floor)), nan=np.inf)
            lost = (signal > floor) & ~stored.any(axis=1)
            if lost.any() and self.first_lost < 0:
                self.first_lost = int(numbers[int(lost.argmax())])
            self.worst_row = max(self.worst_row, float(by_row.max()))
            self.noise += float(noise.sum())
            self.signal += float(signal.sum())
            matching = (by for by in SHIFTS if np.abs(difference - by).max() < 0.01)
            self.shifts.add(next(matching, 0))

    @property
    def error(self) -> float:
        return float(np.nan_to_num((self.noise / max(self.signal, 1e-30)) ** 0.5, nan=np.inf))

    @property
    def shift(self) -> int:
        """The shift that all batches of a norm agree on."""
        is_shifted = self.info.name.endswith(_NORM) and len(self.shifts) == 1
        return next(iter(self.shifts)) if is_shifted else 0

    @property
    def problem(self) -> str:
        name, kind = self.info.name, self.info.type.name
        limit = max(error_limit(kind), HALF_ROUNDING * self.is_half)
        if self.first_difference >= 0:
            return f"{name} differs from its source in row {self.first_difference:,}"
        if self.error > limit and not self.signal:
            return f"{name} ({kind}) is not zero: its source is, or has none"
        if self.error > limit:
            return f"{name} ({kind}) has a relative error of {self.error:.3f} (limit {limit:.3f})"
        if self.worst_row > max(ROW_GATE, limit):
            error = f"an error of {self.worst_row:.2f}"
            return f"{name} ({kind}) has a row with {error}: rows or experts are out of place"
        if self.first_lost >= 0:  # within the limits of ternary types
            return f"{name} ({kind}) has only zeros in row {self.first_lost:,}"
        return ""


def _batches(numbers: np.ndarray, step: int) -> Iterator[np.ndarray]:
    for start in range(0, len(numbers), step):
        yield numbers[start : start + step]


def _type_errors(kind: str, errors: list[float]) -> TypeErrors:
    mean = sum(errors) / len(errors)
    return TypeErrors(
        len(errors), _short(mean), worst=_short(max(errors)), gate=_short(error_limit(kind))
    )


def _short(number: float) -> float:
    return float(f"{number:.3g}")
