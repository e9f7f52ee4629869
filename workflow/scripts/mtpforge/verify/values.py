"""The values of a GGUF beside the right ones: relative errors, norms with a wrong shift, and what is no number.

The head and all small tensors are read whole; of a large one a sample of rows, in short runs that are spread over the whole tensor,
with at least one in each expert, so that a 70 GB model takes minutes. Rows and experts in the wrong place show where they are
sampled. What no sample can show, a single changed bit, is for digests.
"""

import os
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeAlias

import numpy as np
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize

from mtpforge.checkpoint.safetensors import Checkpoint
from mtpforge.convert import values
from mtpforge.convert.plan import Planned
from mtpforge.errors import GgufError
from mtpforge.gguf import quant_types
from mtpforge.gguf.reader import Gguf, TensorInfo

LARGE = 1 << 20  # weights; a tensor of no more is read whole
RUN, SAMPLE = 4, 32  # rows that are read together, and one such run in so many
BATCH = 1 << 18  # weights that are worked on at a time
GATE = 1.5  # times the error that a type has on heavy-tailed weights
ROW_GATE = 0.9  # a row in the wrong place differs from the right one by 1.41 of its size, a coarse quantization by half
FAINT = 1e-3  # of a tensor's usual row: one that is smaller is measured by this, because it can vanish in a block's scale
ROUNDING = 2.0**-20  # of what somebody else computed in float32
SHIFTS = {
    -1: "1 is not added to {}: the checkpoint stores w - 1",
    1: "1 is added once too often to {}: shifted twice",
}

Take: TypeAlias = Callable[[np.ndarray], np.ndarray]
"""From row numbers of a tensor, ascending, to the right values: float32 [rows, row length]."""


@dataclass(frozen=True)
class Found:
    """What looking at one tensor has shown."""

    name: str
    type: str
    rows: int
    """Rows that were looked at."""
    finite: bool
    error: float | None = None
    """RMS of the difference over RMS of the right values; None where nobody knows these."""
    problem: str = ""
    shift: int = 0
    """-1 or 1 where it is a norm that is off by just that."""


@dataclass
class Findings:
    """What looking at a file has shown."""

    found: list[Found] = field(default_factory=list)

    @property
    def problems(self) -> list[str]:
        """Tensors with wrong values, but for norms whose shift alone is wrong."""
        return [each.problem for each in self.found if each.problem and not each.shift]

    @property
    def shifted(self) -> list[str]:
        """For each way in which norms are shifted wrongly, a sentence."""
        sentences = []
        for shift, text in SHIFTS.items():
            if names := [each.name for each in self.found if each.shift == shift]:
                sentences.append(
                    text.format(
                        f"{len(names)} norms ({names[-1]}, ...)" if len(names) > 1 else names[0]
                    )
                )
        return sentences

    @property
    def compared(self) -> list[Found]:
        """What could be compared."""
        return [each for each in self.found if each.error is not None]

    def report(self) -> dict[str, Any]:
        """The relative error of each tensor; and by type the number of tensors, mean and worst error, and what is allowed."""
        if not self.compared:
            return {}
        by_type: dict[str, list[float]] = {}
        for each in self.compared:
            by_type.setdefault(each.type, []).append(each.error or 0.0)
        table = {
            kind: {
                "tensors": len(errors),
                "mean": _short(sum(errors) / len(errors)),
                "worst": _short(max(errors)),
                "gate": _short(allowed(kind)),
            }
            for kind, errors in sorted(by_type.items())
        }
        return {
            "errors": {each.name: _short(each.error or 0.0) for each in self.compared},
            "errors_by_type": table,
        }


def _short(number: float) -> float:
    return float(f"{number:.3g}")


def allowed(kind: str) -> float:
    """The largest relative error that a tensor of a type may have."""
    return max(GATE * quant_types.RELATIVE_ERROR.get(kind, 0.343), ROUNDING)


def of_checkpoint(checkpoint: Checkpoint, planned: list[Planned]) -> dict[str, Take]:
    """The right values of each row of a checkpoint."""
    return {item.row.name: partial(values.rows, checkpoint, item) for item in planned}


def of_gguf(reference: Gguf) -> dict[str, Take]:
    """The same of an unquantized GGUF."""
    return {name: partial(stored_rows, reference, name) for name in reference.tensors}


def look(
    opened: Gguf, expected: Mapping[str, Take], whole: Collection[str], exact: Collection[str], threads: int = 1,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Findings:  # fmt: skip
    """Look at every tensor, and compare it where `expected` has its values.

    Those in `whole` are read whole; of those in `exact`, F32 and BF16 must be the right values to the bit. `progress` gets bytes
    of tensors that are done, and in all.
    """
    total, done = sum(info.size for info in opened.tensors.values()), 0
    findings = Findings()

    def one(info: TensorInfo) -> Found:
        return look_at(
            opened,
            info,
            sampled(info, info.name in whole),
            expected.get(info.name),
            info.name in exact,
        )

    with ThreadPoolExecutor(max(threads, 1)) as pool:
        for info, found in zip(
            opened.tensors.values(), pool.map(one, opened.tensors.values()), strict=True
        ):
            findings.found.append(found)
            done += info.size
            progress(done, total)
    return findings


def sampled(info: TensorInfo, whole: bool = False) -> np.ndarray:
    """The numbers of the rows that are looked at, ascending: all of a small tensor, else runs at chance places in each stretch.

    The places follow from the tensor's name, so the same file is always judged by the same rows.
    """
    rows = info.elements // info.shape[-1]
    if whole or info.elements <= LARGE:
        return np.arange(rows)
    matrix = info.shape[-2]
    stretch = min(RUN * SAMPLE, matrix)
    run = min(RUN, stretch)
    starts = np.arange(0, matrix, stretch)
    chance = np.random.default_rng(zlib.crc32(info.name.encode())).integers(
        0, stretch - run + 1, (rows // matrix, len(starts))
    )
    first = np.minimum(starts + chance, matrix - run) + np.arange(0, rows, matrix)[:, None]
    return np.unique(first[..., None] + np.arange(run))


def stored_rows(opened: Gguf, name: str, numbers: np.ndarray) -> np.ndarray:
    """The values that a file has in these rows of a tensor, as float32 [rows, row length]. Raises GgufError, OSError."""
    info, piece = opened.tensors[name], opened.ranges[name]
    if info.type.name not in quant_types.TENSOR_TYPES:
        raise GgufError(
            f"{opened.path}: {name} is of type {info.type.name}, which no quantization makes"
        )
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
    with np.errstate(all="ignore"):  # a damaged scale is for the caller to see
        return np.asarray(
            dequantize(stored.view(np.float32) if info.type.name == "F32" else stored, info.type),
            dtype=np.float32,
        )


def look_at(
    opened: Gguf, info: TensorInfo, numbers: np.ndarray, take: Take | None, exact: bool
) -> Found:
    """Look at these rows of a tensor; `take` gives the right values of them, if anything does."""
    step, noise, signal, worst, finite, differs = (
        max(BATCH // info.shape[-1], 1),
        0.0,
        0.0,
        0.0,
        True,
        -1,
    )
    shifts: set[int] = set()
    for batch in _batches(numbers, step):
        stored = stored_rows(opened, info.name, batch)
        finite = finite and bool(np.isfinite(stored).all())
        if take is None:
            continue
        right = take(batch)
        if exact and info.type.name in ("BF16", "F32"):
            wrong = (stored != as_stored(right, info.type)).any(axis=1)
            if wrong.any() and differs < 0:
                differs = int(batch[int(wrong.argmax())])
        with np.errstate(all="ignore"):
            difference = (stored - right).astype(np.float64)
            row_noise, row_signal = (difference**2).sum(1), (right.astype(np.float64) ** 2).sum(1)
            floor = max(FAINT**2 * float(row_signal.mean()), 1e-30)
            worst = max(
                worst,
                float(
                    np.nan_to_num(
                        np.sqrt(row_noise / np.maximum(row_signal, floor)), nan=np.inf
                    ).max()
                ),
            )
            noise, signal = noise + float(row_noise.sum()), signal + float(row_signal.sum())
            shifts.add(
                next((shift for shift in SHIFTS if np.abs(difference - shift).max() < 0.01), 0)
            )
    found = Found(info.name, info.type.name, len(numbers), finite)
    if take is None:
        return found
    error = float(np.nan_to_num((noise / max(signal, 1e-30)) ** 0.5, nan=np.inf))
    shift = shifts.pop() if info.name.endswith("norm.weight") and len(shifts) == 1 else 0
    problem, kind = "", f"{info.name} ({info.type.name})"
    if differs >= 0:
        problem = f"{info.name} differs from its source in row {differs:,}"
    elif error > allowed(info.type.name):
        problem = (
            f"{kind} has a relative error of {error:.3f}, allowed are {allowed(info.type.name):.3f}"
        )
    elif worst > max(ROW_GATE, allowed(info.type.name)):
        problem = f"{kind} has a row with an error of {worst:.2f}: rows or experts are out of place"
    return Found(
        info.name, info.type.name, len(numbers), finite, error, problem, shift if problem else 0
    )


def _batches(numbers: np.ndarray, step: int) -> Iterator[np.ndarray]:
    for start in range(0, len(numbers), step):
        yield numbers[start : start + step]


def as_stored(right: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Values rounded to F32 or BF16, so that equal means equal bytes."""
    if kind.name == "F32":
        return right
    return values.decode(
        np.frombuffer(values.encode(np.ascontiguousarray(right), kind), np.uint16), "BF16"
    ).reshape(right.shape)
