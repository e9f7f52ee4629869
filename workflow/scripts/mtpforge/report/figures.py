"""Figures of measurements: speed, acceptance, and those of other modules."""

from collections.abc import Callable, Sequence

from mtpforge.measure.measurement import Measurement, Run, Total
from mtpforge.measure.recommendation import pair
from mtpforge.report.distance import distance
from mtpforge.report.drafting import drafting
from mtpforge.report.svg import AXIS, BLUE, BOLD, GREY, GRID, INK, PLAIN, WIDTH, Svg

_LEFT = 52
_RIGHT = 262  # values stand to the right of it
_PERCENTS = (0, 25, 50, 75, 100)
_MARK_HEIGHT = 8


def speed(measured: Sequence[Measurement]) -> Svg:
    """A bar of tokens per second for each n_max, with its spread and, as a ring, the cold start."""
    svg = Svg(
        "Decoding speed",
        "Tokens per second by n_max / p_min. Bar: warm. Thin line: slowest to fastest round. "
        f"Ring: cold start. On {_machine(measured[0])}.",
    )
    totals = [total for found in measured for total in found.by_n_max]
    speeds = [max(total.spread[1], total.cold_tokens_per_second) for total in totals]
    top = max(speeds, default=1.0)
    for found in measured:
        svg.heading(found.stem)
        for total in found.by_n_max:
            tried = (total.n_max, total.p_min)
            recommended = tried == (found.recommended_n_max, found.recommended_p_min)
            _speed_row(svg, total, top, recommended=recommended)
        svg.paragraph(_advice(found), PLAIN)
        if kinds := [each for each in found.by_kind if each.speedup is not None]:
            gains = ", ".join(f"{each.kind} {each.speedup:.2f}×" for each in kinds)
            svg.paragraph(f"by kind of prompt, {pair(kinds[0].n_max, kinds[0].p_min)}: {gains}")
    return svg


def acceptance(measured: Sequence[Measurement]) -> Svg:
    """The share of drafted tokens that were accepted, by n_max and kind of prompt."""
    kinds = sorted({run.kind for found in measured for run in found.runs})
    svg = Svg(
        "Acceptance",
        "Share of drafted tokens that were accepted, by n_max / p_min. Right: all kinds.",
    )
    svg.legend(kinds)
    for found in measured:
        if any(total.acceptance is not None for total in found.by_n_max):
            svg.heading(found.stem)
            _acceptance_of(svg, found, kinds)
    return svg


FIGURES: dict[str, Callable[[Sequence[Measurement]], Svg]] = {
    "speed": speed,
    "acceptance": acceptance,
    "distance": distance,
    "drafting": drafting,
}


def _across(share: float) -> float:
    """The x of a share of the longest bar."""
    return _LEFT + (_RIGHT - _LEFT) * share


# ── speed ──


def _machine(measured: Measurement) -> str:
    threads = f"{measured.threads} thread{'s' * (measured.threads != 1)}"
    return ", ".join([measured.machine.processor, threads, *measured.machine.devices])


def _speed_row(svg: Svg, total: Total, top: float, *, recommended: bool) -> None:
    font = BOLD if recommended else PLAIN
    value = total.tokens_per_second
    middle = svg.y + 8
    svg.text(_LEFT - 6, svg.y + 12, _label(total), font=font, anchor="end")
    svg.rect(
        _LEFT,
        svg.y + 1,
        _across(value / top) - _LEFT,
        height=14,
        fill=BLUE if total.n_max else GREY,
    )
    low, high = total.spread
    svg.line((_across(low / top), middle), (_across(high / top), middle), stroke=INK, width=2)
    svg.ring(_across(total.cold_tokens_per_second / top), middle)
    number = f"{value:,.0f}" if value >= 100 else f"{value:.1f}"
    svg.text(_RIGHT + 45, svg.y + 12, number, font=font, anchor="end")
    if total.n_max and total.speedup is not None:
        svg.text(WIDTH - 6, svg.y + 12, f"{total.speedup:.2f}×", font=font, anchor="end")
    svg.y += 19


def _advice(found: Measurement) -> str:
    n_max, p_min = found.recommended_n_max, found.recommended_p_min
    if n_max is None or p_min is None:
        return found.verdict
    advice = pair(n_max, p_min) if n_max else "no drafting"
    cut = "; search cut short" if found.cut_short else ""
    return f"recommended: {advice} ({found.verdict.split(':')[0]}{cut})"


def _label(total: Total) -> str:
    """Such as `off`, `4`, or `4 / .75` with p_min."""
    stop = f" / {total.p_min:g}".replace("0.", ".") if total.p_min else ""
    return f"{total.n_max or 'off'}{stop}"


# ── acceptance ──


def _acceptance_of(svg: Svg, found: Measurement, kinds: Sequence[str]) -> None:
    """The rows of one file."""
    drafting = [total for total in found.by_n_max if total.acceptance is not None]
    height = max(28, _MARK_HEIGHT * len(kinds) + 4)
    _percent_grid(svg, svg.y + height * len(drafting))
    for total in drafting:
        middle = svg.y + height / 2
        svg.text(_LEFT - 6, middle + 4, _label(total), anchor="end")
        for run in [run for kind in kinds for run in found.warm(kind)]:
            if (run.n_max, run.p_min) == (total.n_max, total.p_min):
                _acceptance_mark(svg, run, kinds=kinds, middle=middle)
        svg.text(_RIGHT + 18, middle + 4, f"{total.acceptance:.1%}")
        svg.y += height
    svg.y += 18
    if positions := drafting[-1].by_position:
        shares = ", ".join(f"{share:.0%}" for share in positions)
        last = pair(drafting[-1].n_max, drafting[-1].p_min)
        svg.paragraph(f"by position at {last}: {shares}", PLAIN)


def _percent_grid(svg: Svg, bottom: float) -> None:
    for percent in _PERCENTS:
        x = _across(percent / 100)
        svg.line((x, svg.y), (x, bottom), GRID)
        svg.text(x, bottom + 13, f"{percent}%", font=AXIS, anchor="middle")


def _acceptance_mark(svg: Svg, run: Run, kinds: Sequence[str], middle: float) -> None:
    """One mark per kind, each lower than the last, because values are often nearly equal."""
    if run.acceptance is not None:
        series = kinds.index(run.kind)
        shift = (series - (len(kinds) - 1) / 2) * _MARK_HEIGHT
        svg.mark(_across(run.acceptance), middle + shift, series, size=3.5)
