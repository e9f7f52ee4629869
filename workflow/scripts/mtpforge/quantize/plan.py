"""The plan of a quantization: what each tensor of the file is made from, and its type.

A plan is small, and changes only if the work does: while it is unchanged, nothing needs
requantizing. Each tensor has a key that covers everything its bytes depend on, which finds any file
that already holds the tensor.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gguf.constants import GGMLQuantizationType

from mtpforge.errors import ConfigError, GgufError
from mtpforge.gguf import quant_types
from mtpforge.gguf.reader import Gguf, drop_leading_ones, header_range
from mtpforge.gguf.split import is_other_header
from mtpforge.io import atomic
from mtpforge.io.ranges import digest_of, sha256
from mtpforge.io.text import read_json
from mtpforge.llama_cpp.installed import stamp_of
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.quantize import imatrix
from mtpforge.quantize.mixture import Types
from mtpforge.quantize.request import QuantizeRequest

SAMPLE = 1 << 16
"""Bytes of each tensor that are hashed to tell whether a plan belongs to a file."""

_AGAIN = "run quantize_plan.py again, or if the file should be the same, delete it: it is damaged"


_FORM = 200
"""Characters of a type and shape."""


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor's type, and what it is made from.

    `form` is the type and shape of the source tensor, as `BF16 2048 6144`, `source` the sha256 of
    its bytes, and `row` the digest of its row in the importance matrix, empty without one.
    """

    type: str
    form: str
    source: str
    row: str

    @property
    def cost(self) -> float:
        """Approximate CPU seconds to make it; if it keeps its type, the time to copy it."""
        old, *shape = self.form.split()
        kind = "BF16" if self.type == old else self.type
        return math.prod(map(int, shape)) * quant_types.SECONDS[kind] / 1e9


@dataclass(frozen=True)
class QuantizePlan:
    """The plan of one file, its tensors in the order in which they will be written.

    `header` is the sha256 of the source's metadata, `sample` a digest of samples of its tensors,
    `toolchain` the digest of llama-quantize; `imatrix` and its sha256 are empty without one.
    """

    file_type: str
    header: str
    sample: str
    imatrix: str
    imatrix_sha256: str
    toolchain: str
    tensors: dict[str, PlannedTensor]

    def types(self) -> Types:
        """The type of each tensor."""
        return {name: GGMLQuantizationType[tensor.type] for name, tensor in self.tensors.items()}

    def keys(self) -> dict[str, str]:
        """A digest per tensor of everything that its bytes depend on.

        That includes neither the other tensors nor the type of the file.
        """
        return {
            name: _digest([self.toolchain, *vars(tensor).values()])
            for name, tensor in self.tensors.items()
        }

    @property
    def cost(self) -> float:
        """Approximate CPU seconds to quantize all tensors."""
        return sum(tensor.cost for tensor in self.tensors.values())

    def check(self, source: Gguf, matrix: Path | None, llama: LlamaCpp) -> None:
        """Raise GgufError or ConfigError unless the plan was made for exactly these inputs."""
        self._check_source(source)
        if _imatrix_identity(matrix) != (self.imatrix, self.imatrix_sha256):
            wanted = f"{self.imatrix} (sha256 {self.imatrix_sha256})" if self.imatrix else "none"
            raise ConfigError(
                f"the plan was made with another importance matrix than {matrix or 'none'}: "
                f"expected {wanted}"
            )
        if toolchain_digest(llama) != self.toolchain:
            raise ConfigError(
                f"the plan was made with another llama-quantize than the one in {llama.folder}: "
                "run quantize_plan.py again"
            )

    def _check_source(self, source: Gguf) -> None:
        forms = {name: tensor.form for name, tensor in self.tensors.items()}
        same_forms = forms == {name: source_form(source, name) for name in source.tensors}
        if not same_forms or sha256(header_range(source)) != self.header:
            raise GgufError(
                f"{source.path}: tensors or metadata differ from those of the plan: {_AGAIN}"
            )
        if sample(source) != self.sample:
            raise GgufError(f"{source.path}: weights differ from those of the plan: {_AGAIN}")

    def write(self, path: Path) -> None:
        """Write it as JSON, one line per tensor; Snakemake compares files below a megabyte."""
        head = {key: value for key, value in vars(self).items() if key != "tensors"}
        top = [f"{json.dumps(key)}: {json.dumps(value)},\n" for key, value in head.items()]
        lines = [
            f"{json.dumps(name)}: {json.dumps(list(vars(tensor).values()))}"
            for name, tensor in self.tensors.items()
        ]
        tensors = '"tensors": {\n' + ",\n".join(lines) + "\n}"
        atomic.write_text(path, "{\n" + "".join(top) + tensors + "}\n")

    @classmethod
    def read(cls, path: Path) -> "QuantizePlan":
        """Read a plan that `write` wrote. Raises GgufError if the file is missing or invalid."""
        if not path.exists():
            raise GgufError(f"{path}: missing: write it with quantize_plan.py")
        value = read_json(path)
        try:
            rows = value.pop("tensors").items()
            tensors = {name: PlannedTensor(*map(str, row)) for name, row in rows}
            plan = cls(**{key: str(entry) for key, entry in value.items()}, tensors=tensors)
            plan._check_values()
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            reason = f"missing key {error}" if isinstance(error, KeyError) else error
            raise GgufError(
                f"{path}: invalid quantization plan ({reason}): "
                "delete it, or run quantize_plan.py again"
            ) from None
        return plan

    def _check_values(self) -> None:
        """Raise ValueError for a type that llama.cpp lacks, or an impossible shape."""
        types = {tensor.type for tensor in self.tensors.values()} - quant_types.SECONDS.keys()
        files = {self.file_type} - quant_types.FILE_TYPES.keys()
        for unknown in sorted(types | files):
            raise ValueError(f"unknown type {unknown}")
        for name, tensor in self.tensors.items():
            if len(tensor.form) > _FORM or tensor.cost < 0:
                raise ValueError(f"impossible shape of {name}: {tensor.form[:_FORM]}")


def make_plan(
    source: Gguf,
    digests: Mapping[str, str],
    types: Types,
    request: QuantizeRequest,
    llama: LlamaCpp,
) -> QuantizePlan:
    """Plan to quantize `source` to `types`, which `choose_types` chose for `request`.

    `digests` are the source's, as `reader.digests` returns them. Raises GgufError.
    """
    names = {name for name in digests if not is_other_header(name)}
    if names != {"header", *source.tensors}:
        raise GgufError(f"{source.path}: tensors differ from those of its digests: hash it again")
    rows = imatrix.digests(request.imatrix) if request.imatrix else {}
    tensors = {
        name: PlannedTensor(
            kind.name, source_form(source, name), source=digests[name], row=rows.get(name, "")
        )
        for name, kind in types.items()
    }
    matrix_name, matrix_sha256 = _imatrix_identity(request.imatrix)
    return QuantizePlan(
        file_type=request.file_type,
        header=digests["header"],
        sample=sample(source),
        imatrix=matrix_name,
        imatrix_sha256=matrix_sha256,
        toolchain=toolchain_digest(llama),
        tensors=tensors,
    )


def sample(source: Gguf) -> str:
    """A digest of the first bytes of every tensor."""
    ranges = [whole for _, whole in sorted(source.ranges.items())]
    return _digest([sha256(replace(whole, size=min(whole.size, SAMPLE))) for whole in ranges])


def source_form(source: Gguf, name: str) -> str:
    """Type and shape of a tensor, as `BF16 2048 6144`."""
    info = source.tensors[name]
    return " ".join([info.type.name, *map(str, drop_leading_ones(info.shape))])


def toolchain_digest(llama: LlamaCpp) -> str:
    """A digest of everything in the toolchain that the bytes of a quantization depend on.

    Covers llama-quantize, its shared libraries and the build's stamp. Raises ToolchainError if
    the program is missing, CheckpointError if the stamp is not a JSON object.
    """
    program = llama.find("llama-quantize")
    stamp = stamp_of(llama.folder, "llama-quantize")
    about = read_json(stamp) if stamp.exists() else {}
    about.pop("programs", None)
    libraries = [
        path
        for name in ("libllama*", "libggml-base*")
        for path in sorted(program.parent.glob(name))
    ]
    return _digest([*map(digest_of, (program, *libraries)), about])


def _imatrix_identity(path: Path | None) -> tuple[str, str]:
    """Name and sha256 of an importance matrix; both empty without one."""
    return (path.name, digest_of(path)) if path else ("", "")


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
