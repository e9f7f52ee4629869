"""A file whose types were found, compared with llama.cpp's own mixture of its size."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from mtpforge import table
from mtpforge.io.records import UNLESS_NONE, Record
from mtpforge.measure.measurement import KlDivergence

LEAST = 0.01
"""The share of the KL divergence that a file must save to be called better."""
NEAR = 0.99
"""A stock file of at least this share of the bytes has the same size."""


@dataclass(frozen=True, kw_only=True)
class Stock:
    """A file with llama.cpp's own mixture, and the same head and importance matrix."""

    type: str
    bytes: int
    kl_divergence: KlDivergence


@dataclass(frozen=True, kw_only=True)
class Compared(Record):
    """The result of compare_stock.py for one file."""

    written_by: ClassVar[str] = "compare_stock.py"
    file: str
    bytes: int
    sensitivity: str
    mixture: dict[str, dict[str, int]]
    """Class of tensors: the number of tensors at each type."""
    kl_divergence: Annotated[KlDivergence | None, UNLESS_NONE] = None
    """None if the BF16 file could not be run."""
    stock: Annotated[Stock | None, UNLESS_NONE] = None
    """None if no mixture of llama.cpp is so small, or nothing was measured."""

    @property
    def verdict(self) -> str:
        """Whether the search was worth it, in words."""
        if self.kl_divergence is None:
            return "not compared, because the BF16 file was not run"
        if self.stock is None:
            return "smaller than all of llama.cpp's own mixtures, so there is nothing to compare"
        own, others = self.kl_divergence, self.stock.kl_divergence
        figures = f"({own.mean:.2g} beside {others.mean:.2g})"
        saved = 1 - own.mean / others.mean if others.mean > 0 else 0.0
        if saved < LEAST:
            return f"no better than {self.stock.type}: take that {figures}"
        return f"-{saved:.0%} KL divergence {self._place} {figures}, {self._same_top}"

    @property
    def _place(self) -> str:
        assert self.stock is not None
        if self.stock.bytes >= NEAR * self.bytes:
            return f"at the size of {self.stock.type}"
        return f"beside the next smaller {self.stock.type} of {table.size(self.stock.bytes)}"

    @property
    def _same_top(self) -> str:
        assert self.kl_divergence is not None and self.stock is not None
        own, others = self.kl_divergence.same_top, self.stock.kl_divergence.same_top
        return f"same first choice {own:.1%} beside {others:.1%}"


def mixture_table(mixture: Mapping[str, Mapping[str, int]]) -> str:
    """A Markdown table of the number of tensors at each type by class."""
    kinds = list(dict.fromkeys(kind for counts in mixture.values() for kind in counts))
    rows = [("tensors", *kinds)]
    for name, counts in mixture.items():
        rows.append((name, *(str(counts.get(kind, "")) for kind in kinds)))
    return table.markdown(rows)
