"""The plan of a quantization: what each tensor of the file will be made from, and into which type.

It is small, and the same for the same work: where it has not changed, nothing is to be quantized again. A tensor's part of it is a
key, under which its bytes can be found in whatever file has them already.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gguf.constants import GGMLQuantizationType

from mtpforge.errors import GgufError
from mtpforge.gguf import quant_types
from mtpforge.gguf.reader import Gguf, drop_leading_ones, header_range
from mtpforge.io import atomic
from mtpforge.io.ranges import FileRange, sha256
from mtpforge.io.text import read_json
from mtpforge.llama_cpp import programs
from mtpforge.quantize import imatrix, mixture

SAMPLE = 1 << 16
"""Bytes of each tensor that are read to tell whether a plan is for a file."""

MOST_PIECES = 999
PIECE_SECONDS = 2 * 3600
"""What a piece takes, on all threads, where nothing is configured. What takes less than one and a half of it is not cut: it starts
over after a kill, but source and result are not copied once more, which can be a tenth of the time and more."""


@dataclass(frozen=True)
class Tensor:
    """What a tensor is made into, and from: `form` is the source's type and shape, `source` the sha256 of its bytes.

    `row` is the digest of its row in the importance matrix; empty where it has none.
    """

    type: str
    form: str
    source: str
    row: str

    @property
    def cost(self) -> float:
        """CPU seconds that it takes, roughly; where it stays as it is, those of a copy."""
        old, *shape = self.form.split()
        return (
            math.prod(map(int, shape))
            * quant_types.SECONDS["BF16" if self.type == old else self.type]
            / 1e9
        )


@dataclass(frozen=True)
class Plan:
    """Of one file: its type, the sha256 of the source's metadata and of a sample of its tensors, the importance matrix (name and
    sha256, or both empty), a digest of the toolchain, and the tensors in the order in which they will be written.
    """

    file_type: str
    header: str
    sample: str
    imatrix: str
    imatrix_sha256: str
    toolchain: str
    tensors: dict[str, Tensor]

    def types(self) -> mixture.Types:
        """The type of each tensor."""
        return {name: GGMLQuantizationType[tensor.type] for name, tensor in self.tensors.items()}

    def keys(self) -> dict[str, str]:
        """What decides the bytes of each tensor; a change in another tensor, or of the file's type, is none in its bytes."""
        return {
            name: _digest([self.toolchain, *vars(tensor).values()])
            for name, tensor in self.tensors.items()
        }

    def check(self, source: Gguf) -> None:
        """Raise GgufError where the plan is for another file than `source`; of tensors only the beginning is compared.

        Two checkpoints of one model can have the same metadata.
        """
        forms = {name: tensor.form for name, tensor in self.tensors.items()}
        if (
            forms != {name: form(source, name) for name in source.tensors}
            or sha256(header_range(source)) != self.header
        ):
            raise GgufError(
                f"{source.path}: has other tensors or metadata than what the plan is for: make the plan again"
            )
        if sample(source) != self.sample:
            raise GgufError(
                f"{source.path}: has other weights than what the plan is for: make the plan again"
            )

    def pieces(self, threads: int) -> int:
        """How many pieces it is made in, by what it takes on so many threads. No part of the plan: that is the same anywhere."""
        seconds = sum(tensor.cost for tensor in self.tensors.values()) / programs.threads(threads)
        return min(max(1, round(seconds / PIECE_SECONDS)), MOST_PIECES)

    def write(self, path: Path) -> None:
        """As JSON with a line for each tensor: Snakemake compares by content what has less than a megabyte."""
        head = {name: value for name, value in vars(self).items() if name != "tensors"}
        lines = [
            f"{json.dumps(name)}: {json.dumps(list(vars(tensor).values()))}"
            for name, tensor in self.tensors.items()
        ]
        top = "".join(f"{json.dumps(name)}: {json.dumps(value)},\n" for name, value in head.items())
        atomic.write_text(path, f'{{\n{top}"tensors": {{\n' + ",\n".join(lines) + "\n}}\n")

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """The plan in a file that `write` made. Raises GgufError where it is none."""
        if not path.exists():
            raise GgufError(f"{path}: missing: quantize_plan.py writes it")
        try:
            value = read_json(path)
            tensors = {
                name: Tensor(*map(str, entry)) for name, entry in value.pop("tensors").items()
            }
            plan = cls(**{name: str(entry) for name, entry in value.items()}, tensors=tensors)
            types = {kind.name for kind in plan.types().values()}
            if (
                plan.file_type not in quant_types.FILE_TYPES
                or not types <= quant_types.SECONDS.keys()
            ):
                raise KeyError("a type that cannot be")
            if any(tensor.cost < 0 for tensor in tensors.values()):
                raise ValueError("a number that cannot be")
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise GgufError(
                f"{path}: is no plan of a quantization ({error!r}): make it again"
            ) from None
        return plan


def make(
    source: Gguf, digests: Mapping[str, str], types: mixture.Types, file_type: str, matrix: Path | None, bin_dir: Path
) -> Plan:  # fmt: skip
    """The plan for a source whose `digests` are as `reader.digests` has them. Raises GgufError."""
    if digests.keys() != {"header", *source.tensors}:
        raise GgufError(f"{source.path}: has other tensors than its digests: make these again")
    rows = imatrix.digests(matrix) if matrix else {}
    tensors = {
        name: Tensor(kind.name, form(source, name), digests[name], rows.get(name, "")) for name, kind in types.items()
    }  # fmt: skip
    name, digest = matrix_of(matrix)
    return Plan(
        file_type, digests["header"], sample(source), name, digest, toolchain(bin_dir), tensors
    )


def sample(source: Gguf) -> str:
    """A digest of the beginnings of all tensors."""
    pieces = sorted(source.ranges.items())
    return _digest([sha256(replace(piece, size=min(piece.size, SAMPLE))) for _, piece in pieces])


def matrix_of(path: Path | None) -> tuple[str, str]:
    """Name and sha256 of an importance matrix; both empty for none."""
    return (path.name, sha256(FileRange(path, 0, path.stat().st_size))) if path else ("", "")


def form(source: Gguf, name: str) -> str:
    """A tensor's type and shape, as `BF16 2048 6144`: what a row is decides what becomes of it."""
    info = source.tensors[name]
    return " ".join([info.type.name, *map(str, drop_leading_ones(info.shape))])


def toolchain(bin_dir: Path) -> str:
    """What decides the bytes that llama-quantize makes: the program with libraries of its own, and what the stamp beside its folder
    says of the build. Raises ToolchainError, or CheckpointError for a stamp that is none.
    """
    program, stamp = programs.find(bin_dir, "llama-quantize"), bin_dir.parent / "stamp.json"
    about = read_json(stamp) if stamp.exists() else {}
    about.pop("programs", None)
    libraries = [
        path
        for name in ("libllama*", "libggml-base*")
        for path in sorted(program.parent.glob(name))
    ]
    return _digest(
        [
            *(sha256(FileRange(path, 0, path.stat().st_size)) for path in (program, *libraries)),
            about,
        ]
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
