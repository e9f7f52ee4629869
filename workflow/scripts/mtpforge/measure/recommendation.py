"""The recommended pair of n_max and p_min, judged by speed and its spread.

Nothing is recommended, and no speedup claimed, if the speeds are not steady: then another program
took processors, or the rounds disagree, and what looks faster may only have run at a quieter time.
"""

from collections.abc import Sequence
from typing import NamedTuple

from mtpforge.measure.measurement import Total

UNEVEN = 1.25
"""Highest ratio of the fastest to the slowest round that counts as steady."""
AGAIN = "measure again on a quiet machine"
"""What to do if speeds are not steady: for whoever measures, not for readers of the card."""
WAITING = 0.2
"""Highest share of the time that llama-server's threads may wait for a processor."""


class Advice(NamedTuple):
    """The pair to serve with (n_max 0: without drafting; None: unknown), and why.

    `steady`: whether the speeds can be compared.
    """

    n_max: int | None
    p_min: float | None
    verdict: str
    steady: bool = True


def recommend(totals: Sequence[Total], best: Total | None, waiting: float | None) -> Advice:
    """The pair to serve with: `best` if its slowest round beats the fastest without drafting.

    `totals` begin with that without drafting; `best` is the fastest of the others. `waiting` is the
    share of the time that threads waited for a processor.
    """
    if not totals:
        return Advice(None, None, "not measured")
    reason = _unsteady([totals[0], *filter(None, [best])], waiting)
    unsteady = f"not steady: {reason}: {AGAIN}" if reason else ""
    if best is None or not best.drafts:
        verdicts = [_why_no_drafts(best), unsteady]
        return Advice(0, 0.0, "; ".join(filter(None, verdicts)), steady=not unsteady)
    if unsteady:
        return Advice(None, None, unsteady, steady=False)
    if best.repeats < 2:
        return Advice(None, None, "measured once, so the spread is unknown: repeat more often")
    return _compare(totals[0], best)


def pair(n_max: int, p_min: float) -> str:
    """Such as `n_max 6, p_min 0.75`; without p_min if that is 0, llama-server's default."""
    return f"n_max {n_max}" + f", p_min {p_min:g}" * (p_min > 0)


def _why_no_drafts(best: Total | None) -> str:
    if best is None:
        return "no head that llama.cpp can draft with"
    if best.p_min:
        return f"nothing was drafted with p_min {best.p_min:g}: lower it"
    return "nothing was drafted: the head is dead"


def _off(verdict: str) -> Advice:
    return Advice(0, 0.0, verdict)


def _compare(off: Total, best: Total) -> Advice:
    with_drafting = f"{best.tokens_per_second:.1f} tokens/s with {pair(best.n_max, best.p_min)}"
    speeds = f"{with_drafting}, {off.tokens_per_second:.1f} without"
    if best.spread[0] > off.spread[1]:
        verdict = f"{best.speedup:.2f} times as fast as without drafting: {speeds}"
        return Advice(best.n_max, best.p_min, verdict)
    if best.spread[1] < off.spread[0]:
        return _off(f"slower than without drafting: {speeds}: leave drafting off")
    return _off(f"no faster than without drafting, given the spread: {speeds}: leave drafting off")


def _unsteady(totals: Sequence[Total], waiting: float | None) -> str:
    """Why these speeds cannot be compared; empty if they can."""
    if waiting is not None and waiting > WAITING:
        return f"other programs took processors from llama-server for {waiting:.0%} of the time"
    for total in totals:
        low, high = total.spread
        if high > UNEVEN * low:
            label = f"with {pair(total.n_max, total.p_min)}" if total.n_max else "without drafting"
            return f"{low:.1f} to {high:.1f} tokens/s {label}"
    return ""
