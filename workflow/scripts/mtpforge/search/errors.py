"""The error that a type causes in each tensor, measured on a part of its rows."""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import numpy as np
from gguf.constants import GGMLQuantizationType

from mtpforge.errors import ConfigError
from mtpforge.gguf import quant_types, writer
from mtpforge.gguf.reader import Gguf, TensorInfo
from mtpforge.io.ranges import FileRange
from mtpforge.io.records import Record
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.quantize import mixture
from mtpforge.quantize.llama_quantize import checked_rows, run, without_vocabulary
from mtpforge.quantize.mixture import Types
from mtpforge.quantize.request import QuantizeRequest
from mtpforge.search.groups import matrices
from mtpforge.search.settings import STEP
from mtpforge.verify.tensors import stored_rows

LEAST = 16
"""Rows of a matrix, or of each expert, that are quantized at least."""
BATCH = 1 << 22
"""Weights that are compared at a time."""
FILE_TYPE = "Q4_K_M"
"""Type of the scratch file, which decides nothing: each tensor's type is given."""


@dataclass(frozen=True)
class TensorError:
    """A tensor at a type: the type it really gets, and the squared error over squared weights."""

    type: str
    error: float


@dataclass(frozen=True, kw_only=True)
class Errors(Record):
    """The results of quantization_errors.py for one type, without tensors that cannot have it."""

    written_by: ClassVar[str] = "quantization_errors.py"
    type: str
    tensors: dict[str, TensorError]


def measure_errors(source: Gguf, kind: str, matrix: Path | None, llama: LlamaCpp) -> Errors:
    """Quantize a part of the rows of each matrix of the trunk to `kind`, and compare.

    Left out are tensors that cannot have the type because the importance matrix has no row of
    theirs. Raises ConfigError, GgufError, ToolchainError.
    """
    quant_types.check_tensor_type(kind)
    covered = checked_rows(source, matrix)
    kinds = {
        name: effective
        for name in matrices(source)
        if (effective := possible_type(source.tensors[name], kind, covered))
    }
    if not kinds:
        raise ConfigError(f"{source.path}: no tensor can have the type {kind}")
    types = {name: GGMLQuantizationType[each] for name, each in kinds.items()}
    check_rows(source, types, matrix, covered)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        part = sampled(source, list(kinds), folder / "rows.gguf")
        made = run(
            part, folder / "made.gguf", types=types, file_type=FILE_TYPE, matrix=matrix, llama=llama
        )
        tensors = {
            name: TensorError(each, relative_error(part, made, name))
            for name, each in kinds.items()
        }
    return Errors(type=kind, tensors=tensors)


def check_rows(source: Gguf, types: Types, matrix: Path | None, rows: Mapping[str, int]) -> None:
    """Raise ConfigError if an importance matrix is another model's, or lacks a row that is needed.

    Tensors without a type in `types` keep theirs.
    """
    kept = {name: info.known_type for name, info in source.tensors.items()}
    mixture.check_imatrix(
        source, {**kept, **types}, QuantizeRequest(FILE_TYPE, imatrix=matrix), rows
    )


def possible_type(info: TensorInfo, kind: str, covered: Mapping[str, int]) -> str | None:
    """The type that a tensor gets if it is to have `kind`; None if it needs an importance matrix.

    `covered` are the tensors in the importance matrix. Rows that do not divide into blocks get
    another type.
    """
    effective = quant_types.effective_type(kind, info.shape[-1])
    needed = quant_types.needs_imatrix(info.name, effective, FILE_TYPE)
    return None if needed and info.name not in covered else effective


def sampled(source: Gguf, names: list[str], path: Path) -> Gguf:
    """A scratch GGUF with evenly spaced rows of these matrices; of experts, of each one."""
    tensors = []
    for name in names:
        info = source.tensors[name]
        rows = list(_rows(info))
        whole = source.ranges[name]
        size = whole.size // (info.elements // info.shape[-1])
        pieces = [FileRange(whole.path, whole.offset + row * size, size) for row in rows]
        matrices_of = info.elements // (info.shape[-1] * info.shape[-2])
        shape = (*info.shape[:-2], len(rows) // matrices_of, info.shape[-1])
        tensors.append((replace(info, shape=shape), pieces))
    return writer.write_scratch(path, without_vocabulary(source), tensors)


def _rows(info: TensorInfo) -> Iterator[int]:
    """The numbers of the rows that are quantized."""
    height = info.shape[-2]
    step = max(1, min(STEP, height // LEAST))
    for start in range(0, info.elements // info.shape[-1], height):
        yield from range(start, start + height, step)


def relative_error(right: Gguf, made: Gguf, name: str) -> float:
    """The sum of the squared differences of a tensor over that of its squared weights."""
    info = right.tensors[name]
    noise = signal = 0.0
    numbers = np.arange(info.elements // info.shape[-1])
    for batch in np.array_split(numbers, max(1, info.elements // BATCH)):
        weights = stored_rows(right, name, batch).astype(np.float64)
        noise += float(((stored_rows(made, name, batch) - weights) ** 2).sum())
        signal += float((weights**2).sum())
    return noise / signal if signal else 0.0
