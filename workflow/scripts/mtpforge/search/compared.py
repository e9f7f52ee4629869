"""A file whose types were found, compared with llama.cpp's own mixture of its size."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar

from mtpforge import table
from mtpforge.gguf import quant_types
from mtpforge.io.records import UNLESS_NONE, Record
from mtpforge.measure.measurement import KlDivergence

LEAST = 0.01
"""The share of the KL divergence that a file must save to be called better."""
NEAR = 0.99
"""A stock file of at least this share of the bytes has the same size."""
TAKE_THAT = ": take that"
"""What to do if a file is no better: only readers who have the stock file can."""


@dataclass(frozen=True, kw_only=True)
class Stock:
    """A file with llama.cpp's own mixture, and the same head and importance matrix."""

    type: str
    bytes: int
    kl_divergence: KlDivergence


@dataclass(frozen=True, kw_only=True)
class HeadCost:
    """What a head takes from the trunk of a file of a given size."""

    types: list[str]
    bytes: int
    trunk: dict[str, float]
    """Another type of the head: the KL divergence of the trunk that is expected beside it, over
    that of this file. Types that leave too little for the trunk are left out."""

    @property
    def words(self) -> str:
        """The same as sentences."""
        taken = f"The head ({', '.join(self.types)}) takes {table.size(self.bytes)} of the file."
        others = [f"{_change(share)} with {kind}" for kind, share in self.trunk.items()]
        if not others:
            return taken
        return f"{taken} Expected KL divergence with another head: {', '.join(others)}."


def _change(share: float) -> str:
    if round(100 * share) == 100:
        return "the same"
    return f"{share:.2g} times as much" if share >= 2 else f"{share - 1:+.0%}"


@dataclass(frozen=True, kw_only=True)
class Compared(Record):
    """The result of compare_stock.py for one file."""

    written_by: ClassVar[str] = "compare_stock.py"
    file: str
    bytes: int
    sensitivity: str
    mixture: dict[str, dict[str, int]]
    """Class of tensors: the number of tensors at each type."""
    head: Annotated[HeadCost | None, UNLESS_NONE] = None
    """None without a head."""
    kl_divergence: Annotated[KlDivergence | None, UNLESS_NONE] = None
    """None if it was not measured, or if the BF16 file could not be run."""
    stock: Annotated[Stock | None, UNLESS_NONE] = None
    """None if no mixture of llama.cpp is so small, or nothing was measured."""

    @property
    def verdict(self) -> str:
        """Whether the search was worth it, in words."""
        if self.kl_divergence is None:
            return "not compared with llama.cpp's own mixtures: its KL divergence was not measured"
        if self.stock is None:
            return "smaller than all of llama.cpp's own mixtures, so there is nothing to compare"
        own, others = self.kl_divergence, self.stock.kl_divergence
        figures = f"({own.mean:.2g} vs {others.mean:.2g})"
        saved = 1 - own.mean / others.mean if others.mean > 0 else 0.0
        if saved < LEAST:
            return f"no better than {self.stock.type}{TAKE_THAT} {figures}"
        return f"-{saved:.0%} KL divergence {self._place} {figures}, {self._same_top}"

    @property
    def _place(self) -> str:
        assert self.stock is not None
        if self.stock.bytes >= NEAR * self.bytes:
            return f"at the size of {self.stock.type}"
        return f"vs the next smaller {self.stock.type} of {table.size(self.stock.bytes)}"

    @property
    def _same_top(self) -> str:
        assert self.kl_divergence is not None and self.stock is not None
        own, others = self.kl_divergence.same_top, self.stock.kl_divergence.same_top
        return f"top-token agreement {own:.1%} vs {others:.1%}"


def mixture_table(mixture: Mapping[str, Mapping[str, int]]) -> str:
    """A Markdown table of the number of tensors at each type by class, finest type first."""
    found = dict.fromkeys(kind for counts in mixture.values() for kind in counts)
    kinds = sorted(found, key=quant_types.bits, reverse=True)
    rows = [("tensors", *kinds)]
    for name, counts in mixture.items():
        rows.append((name, *(str(counts.get(kind, "")) for kind in kinds)))
    return table.markdown(rows)
