"""The recommended n_max: how far ahead to draft, judged by speed and its spread."""

from collections.abc import Sequence

from mtpforge.measure.measurement import Total


def recommend(by_n_max: Sequence[Total], repeats: int) -> tuple[int, str]:
    """The n_max to serve with, and why.

    It is the fastest one if its slowest repeat beats the fastest repeat without drafting, else 0.
    """
    if not by_n_max:
        return 0, "not measured"
    off, *others = by_n_max
    if not others:
        return 0, "no head to draft with"
    drafting = [total for total in others if total.drafts]
    if not drafting:
        return 0, "nothing was drafted: the head is dead"
    if repeats < 2:
        return (
            0,
            "measured once, so the spread is unknown: leave drafting off, or repeat more often",
        )
    best = max(drafting, key=lambda total: total.tokens_per_second)
    with_drafting = f"{best.tokens_per_second:.1f} tokens/s with n_max {best.n_max}"
    speeds = f"{with_drafting}, {off.tokens_per_second:.1f} without"
    if best.spread[0] > off.spread[1]:
        return best.n_max, f"{best.speedup:.2f} times as fast as without drafting: {speeds}"
    if best.spread[1] < off.spread[0]:
        return 0, f"slower than without drafting: {speeds}: leave drafting off"
    return 0, f"no faster than without drafting, given the spread: {speeds}: leave drafting off"
