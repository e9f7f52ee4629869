"""Choose a type for each group of tensors: the least loss that fits into a number of bytes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

from mtpforge.errors import ConfigError


@dataclass(frozen=True)
class Option:
    """A type that a group of tensors can have: its bytes in the file, and the loss it causes."""

    type: str
    bytes: int
    loss: float


Groups = Sequence[Sequence[Option]]
"""The options of each group. The order of the groups decides ties, that of the options nothing."""


def allocate(groups: Groups, budget: int) -> list[Option]:
    """The option of each group with the least sum of losses in at most `budget` bytes.

    A Lagrangian sweep finds a good choice and a bound; an exact search of what lies between them
    then fills the last bytes. Raises ConfigError if even the smallest options do not fit.
    """
    groups = [sorted(options, key=_order) for options in groups]
    hulls = [_hull(options) for options in groups]
    chosen = [hull[0] for hull in hulls]
    used = sum(option.bytes for option in chosen)
    if used > budget:
        raise ConfigError(
            f"cannot fit: the smallest types take {used:,} bytes, and there is room for "
            f"{budget:,}: ask for a larger file, or give smaller candidates or a smaller head"
        )
    price: float | None = None
    for group, better in _sweep(hulls):
        change = better.bytes - chosen[group].bytes
        if used + change <= budget:
            chosen[group] = better
            used += change
        elif price is None:
            price = _gain(chosen[group], better)
    return chosen if price is None else _filled(groups, chosen, budget=budget, price=price)


def _order(option: Option) -> tuple[int, float, str]:
    return option.bytes, option.loss, option.type


def _hull(options: Sequence[Option]) -> list[Option]:
    """The lower convex hull of the losses over the bytes, of options in order."""
    hull: list[Option] = []
    for option in options:
        if hull and option.loss >= hull[-1].loss:
            continue
        if hull and option.bytes == hull[-1].bytes:
            hull.pop()
        while len(hull) > 1 and _gain(hull[-2], option) >= _gain(hull[-2], hull[-1]):
            hull.pop()
        hull.append(option)
    return hull


def _gain(old: Option, new: Option) -> float:
    """The loss that each byte saves."""
    return (old.loss - new.loss) / (new.bytes - old.bytes)


def _sweep(hulls: Sequence[Sequence[Option]]) -> list[tuple[int, Option]]:
    """The steps of all groups along their hulls, those first whose bytes save most."""
    steps = [
        (-_gain(old, new), number, place, new)
        for number, hull in enumerate(hulls)
        for place, (old, new) in enumerate(pairwise(hull))
    ]
    steps.sort(key=lambda step: step[:3])
    return [(number, new) for _, number, _, new in steps]


_MOST = 2000
"""Partial choices that are followed at a time."""

_Partial = tuple[int, float, float, Any]
"""Bytes, loss, excess, and (option, the same for the groups before)."""


def _filled(groups: Groups, incumbent: Sequence[Option], budget: int, price: float) -> list[Option]:
    """The best choice, found among those that can still be better than the incumbent.

    Whatever an option's loss plus its bytes at the `price` exceeds the least such sum of its group
    by, a choice with it is at least that much worse than the bound of all choices. Unless there are
    very many, all choices are covered by this.
    """
    loss = sum(option.loss for option in incumbent)
    costs = [[option.loss + price * option.bytes for option in options] for options in groups]
    gap = loss - (sum(map(min, costs)) - price * budget)
    least = list(accumulate(min(each.bytes for each in options) for options in groups[::-1]))
    partial: list[_Partial] = [(0, 0.0, 0.0, None)]
    for number, options in enumerate(groups):
        rest = least[-number - 2] if number + 1 < len(groups) else 0
        excess = [cost - min(costs[number]) for cost in costs[number]]
        partial = _undominated(
            (size + option.bytes, lost + option.loss, over + more, (option, before))
            for size, lost, over, before in partial
            for option, more in zip(options, excess, strict=True)
            if over + more <= gap and size + option.bytes + rest <= budget
        )
    best = min(partial, key=lambda each: (each[1], each[0]), default=None)
    return _unwound(best[3]) if best and best[1] < loss else list(incumbent)


def _undominated(found: Iterable[_Partial]) -> list[_Partial]:
    """Those for which no other has fewer bytes and less loss; of many, those nearest the bound."""
    kept: list[_Partial] = []
    for each in sorted(found, key=lambda one: one[:2]):
        if not kept or each[1] < kept[-1][1]:
            kept.append(each)
    if len(kept) > _MOST:
        kept = sorted(kept, key=lambda one: one[2::-1])[:_MOST]
    return kept


def _unwound(last: Any) -> list[Option]:
    chosen: list[Option] = []
    while last:
        option, last = last
        chosen.append(option)
    return chosen[::-1]
