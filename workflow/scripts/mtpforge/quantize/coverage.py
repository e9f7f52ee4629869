"""What an importance matrix has seen of a model: matrices without a row, experts never chosen."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from gguf.constants import GGMLQuantizationType

from mtpforge.gguf import reader
from mtpforge.gguf.reader import Gguf
from mtpforge.io.records import Record
from mtpforge.quantize import imatrix

_WHOLE = (GGMLQuantizationType.BF16, GGMLQuantizationType.F16)
_NAMED = 3
"""Tensors that a sentence names."""


@dataclass(frozen=True, kw_only=True)
class Coverage(Record):
    """The result of imatrix_coverage.py for one matrix and model."""

    written_by: ClassVar[str] = "imatrix_coverage.py"
    matrix: str
    """Its text, or the name of its file in the legacy format"""
    tokens: int | None
    """That it was computed from; None in the legacy format"""
    matrices: int
    """Matrices of the model's blocks that are quantized"""
    missing: tuple[str, ...]
    """Those without a row"""
    experts: int
    """Experts of all blocks together; 0 for a dense model, or in the legacy format"""
    unseen: dict[str, int]
    """Block: how many of its experts no token has reached; blocks without any are left out."""

    @property
    def covers(self) -> str:
        """How many matrices and experts it covers, in one line."""
        never = sum(self.unseen.values())
        share = (
            f"{self.experts - never:,} of {self.experts:,}" if never else f"all {self.experts:,}"
        )
        return f"{self._matrices}, and {share} experts" if self.experts else self._matrices

    @property
    def sentences(self) -> list[str]:
        """What it covers, and what the rest means for the quantized files."""
        lines = [f"{self.matrix}: {self._matrices if self.unseen else self.covers}"]
        if self.missing:
            lines.append(
                f"{self._missing} without a row: quantized as without an importance matrix, so "
                "IQ1, IQ2 and IQ3_XXS cannot be used for them"
            )
        if unseen := sum(self.unseen.values()):
            lines.append(
                f"{unseen:,} of {self.experts:,} experts ({unseen / self.experts:.1%}) were never "
                "chosen: they are quantized as if all of their inputs mattered equally; a longer "
                "or more varied text reaches more of them"
            )
        return lines

    @property
    def _matrices(self) -> str:
        found = self.matrices - len(self.missing)
        seen = f" in {self.tokens:,} tokens" if self.tokens else ""
        return f"covers {found:,} of {self.matrices:,} matrices{seen}"

    @property
    def _missing(self) -> str:
        more = len(self.missing) - _NAMED
        return ", ".join(self.missing[:_NAMED]) + (f" and {more:,} more" if more > 0 else "")


def coverage(path: Path, source: Gguf) -> Coverage:
    """The coverage of a model, a BF16 GGUF, by an importance matrix. Raises GgufError."""
    counts = imatrix.counts(path)
    names = [name for name, info in source.tensors.items() if name.startswith("blk.")]
    matrices = [name for name in names if _is_quantized(source, name)]
    experts: dict[str, int] = {}
    unseen: dict[str, int] = {}
    for name in matrices:
        seen = counts.get(name)
        if seen is not None and seen.size > 1:
            block = name.split(".")[1]
            experts[block] = seen.size
            never = int((seen == 0).sum())
            if never:
                unseen[block] = max(never, unseen.get(block, 0))
    text, tokens = _origin(path)
    return Coverage(
        matrix=text,
        tokens=tokens,
        matrices=len(matrices),
        missing=tuple(name for name in matrices if name not in counts),
        experts=sum(experts.values()),
        unseen=unseen,
    )


def _is_quantized(source: Gguf, name: str) -> bool:
    """Whether a tensor is a matrix of many rows; routers and convolutions are kept at F32."""
    info = source.tensors[name]
    return len(info.shape) > 1 and info.type in _WHOLE


def _origin(path: Path) -> tuple[str, int | None]:
    """The text of a matrix, and its tokens."""
    with reader.open_file(path) as file:
        if file.read(4) != reader.MAGIC:
            return path.name, None
    opened = reader.read(path)
    texts = opened.need("imatrix.datasets", list)
    size = [opened.need(f"imatrix.chunk_{key}", int) for key in ("count", "size")]
    names = ", ".join(Path(str(text)).name for text in texts)
    return names or path.name, size[0] * size[1]
