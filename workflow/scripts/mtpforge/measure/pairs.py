"""The search for the fastest pair of n_max and p_min, with few rounds of llama-server.

A round measures one pair once. First comes a coarse part of the grid, one round each: both ends of
p_min are in it, because drafts that stop in time (a high p_min) may be longer. Then come the
neighbours of the fastest, until none is faster. At last, if there were six pairs or more, those
that are nearly as fast run against each other: four, then two, and never more than a third of all.
"""

from collections.abc import Callable, Iterable, Sequence
from itertools import product
from statistics import fmean
from typing import NamedTuple

_FEW = 4
_CLOSE = 0.9
"""Share of the fastest pair's speed from which a pair may be as fast."""
_FINALISTS = (4, 2)
"""How many of the fastest are measured again, at most a third of all."""
_RIGHT = 0.75
"""Share of an ordinary head's drafted tokens that are accepted, if those before them are."""
_DRAFT = 0.15
"""Time to draft a token, as a share of a pass over the model."""
_STOPPED = 0.05
"""Share by which drafting is faster if it stops at all tokens in doubt (a `p_min` of 1)."""


class Pair(NamedTuple):
    """Tokens drafted ahead, and the probability below which none is drafted (0 to 1)."""

    n_max: int
    p_min: float


OFF = Pair(0, 0.0)
"""No drafting."""


class Search:
    """Measures pairs of a grid; `measure` returns the tokens per second of one round.

    `may_go_on` says whether there is time for another round.
    """

    def __init__(
        self,
        n_max: Sequence[int],
        p_min: Sequence[float],
        measure: Callable[[Pair], float],
        may_go_on: Callable[[], bool] = lambda: True,
    ) -> None:
        self.n_max = sorted(n_max)
        self.p_min = sorted(p_min)
        self.measure = measure
        self.may_go_on = may_go_on
        self.speeds: dict[Pair, list[float]] = {}
        self.cut_short = False
        """Whether there was no time for all pairs that it would have measured."""

    @property
    def rounds(self) -> int:
        """Rounds so far."""
        return sum(map(len, self.speeds.values()))

    def fastest(self) -> Pair:
        """Find the fastest pair, of those that there was time for."""
        self._measure(self._coarse())
        while self._measure(self._new_neighbours(self._first())):
            pass
        for most in _FINALISTS:
            self._measure(self._finalists(most))
        return self._first()

    def _coarse(self) -> list[Pair]:
        """Every second or third n_max, and p_min at both ends and between; all of few."""
        if len(self.n_max) * len(self.p_min) <= _FEW:
            return [Pair(*each) for each in product(self.n_max, self.p_min)]
        step = 2 if len(self.n_max) < 8 else 3
        lengths = self.n_max[1::step] or self.n_max
        half = max(1, len(self.p_min) // 2)
        ends = sorted({*self.p_min[::half], self.p_min[-1]})
        return [Pair(*each) for each in product(lengths, ends)]

    def _new_neighbours(self, pair: Pair) -> list[Pair]:
        """Those not yet measured of a pair's neighbours in the grid.

        Longer drafts with a higher p_min, and the reverse, are two of them, because the fastest
        n_max rises with p_min.
        """
        at, above = self.n_max.index(pair.n_max), self.p_min.index(pair.p_min)
        steps = ((-1, 0), (1, 0), (0, -1), (0, 1), (1, 1), (-1, -1))
        near = [
            Pair(self.n_max[at + right], self.p_min[above + up])
            for right, up in steps
            if 0 <= at + right < len(self.n_max) and 0 <= above + up < len(self.p_min)
        ]
        return [each for each in near if each not in self.speeds]

    def _finalists(self, most: int) -> list[Pair]:
        """The fastest pairs that need to be measured again, to tell which is the fastest."""
        ranked = sorted(self.speeds, key=self._speed, reverse=True)
        least = _CLOSE * self._speed(ranked[0])
        close = [pair for pair in ranked if self._speed(pair) >= least]
        close = close[: min(most, len(ranked) // 3)]
        return close if len(close) > 1 else []

    def _measure(self, pairs: Iterable[Pair]) -> bool:
        """Measure each once, while there is time; the first always. Whether any was measured."""
        found = False
        for pair in pairs:
            if self.speeds and not self.may_go_on():
                self.cut_short = True
                break
            self.speeds.setdefault(pair, []).append(self.measure(pair))
            found = True
        return found

    def _first(self) -> Pair:
        return max(self.speeds, key=self._speed)

    def _speed(self, pair: Pair) -> float:
        return fmean(self.speeds[pair])


def expected(n_max: Sequence[int], p_min: Sequence[float]) -> Search:
    """A finished search with an imagined, ordinary head; real ones take about as many rounds."""
    search = Search(n_max, p_min, _plausible)
    search.fastest()
    return search


def _plausible(pair: Pair) -> float:
    """Tokens of a pass over its time, as of an ordinary head.

    How many rounds a search takes depends little on it.
    """
    tokens = sum(_RIGHT**ahead for ahead in range(pair.n_max + 1))
    return tokens / (1 + _DRAFT * pair.n_max) * (1 + _STOPPED * pair.p_min)
