"""Figure of decoding speed by draft length."""

from collections.abc import Sequence
from dataclasses import dataclass

from mtpforge.measure.measurement import Measurement
from mtpforge.report.distance import common_prefix
from mtpforge.report.svg import AXIS, GRID, INK, MARKS, WIDTH, Point, Svg, ticks

_LEFT = 52.0
_RIGHT = WIDTH - 16.0
_HEIGHT = 240
_SHOWN = 6


def drafting(measured: Sequence[Measurement]) -> Svg:
    """A line per file: tokens per second by n_max, each with the fastest other options.

    Files that were not run or whose speed was not steady are left out; of many, some are drawn.
    """
    svg = Svg(
        "Speed by draft length",
        "Tokens per second, warm, by tokens drafted ahead (n_max). Ring: recommended.",
    )
    files = [found for found in measured if found.by_n_max and found.steady]
    if not files:
        unsteady = any(found.by_n_max for found in measured)
        svg.paragraph(f"Speed was not {'steady' if unsteady else 'measured'}.")
        return svg
    shown = _spread(files)
    prefix = len(common_prefix([found.stem for found in files])) if len(files) > 1 else 0
    svg.legend([found.stem[prefix:] for found in shown])
    if len(shown) < len(files):
        svg.paragraph(f"Not shown: {len(files) - len(shown)} more.")
    scale = _Scale.of(shown, top=svg.y + 8)
    _draw_axes(svg, scale)
    for series, found in enumerate(shown):
        _draw_file(svg, scale, found, series)
    svg.y = scale.bottom + 34
    return svg


def _spread(files: Sequence[Measurement]) -> list[Measurement]:
    """As many as can be told apart: the smallest, the largest and some between, in their order."""
    by_size = sorted(files, key=lambda found: found.bytes)
    most = min(len(files), _SHOWN)
    chosen = [by_size[number * (len(files) - 1) // max(most - 1, 1)] for number in range(most)]
    return [found for found in files if found in chosen]


@dataclass(frozen=True)
class _Scale:
    """Where draft lengths and speeds lie in the picture."""

    top: float
    lengths: list[int]
    """All draft lengths that were measured, at equal distances."""
    speeds: list[float]
    """Ticks."""

    @classmethod
    def of(cls, files: Sequence[Measurement], top: float) -> "_Scale":
        totals = [total for found in files for total in found.by_n_max]
        fastest = max(total.tokens_per_second for total in totals)
        return cls(top, sorted({total.n_max for total in totals}), ticks(fastest))

    @property
    def bottom(self) -> float:
        return self.top + _HEIGHT

    def across(self, n_max: int) -> float:
        step = (_RIGHT - _LEFT) / len(self.lengths)
        return _LEFT + step * (self.lengths.index(n_max) + 0.5)

    def down(self, speed: float) -> float:
        return self.bottom - _HEIGHT * speed / (self.speeds[-1] or 1)


def _draw_axes(svg: Svg, scale: _Scale) -> None:
    for speed in scale.speeds:
        y = scale.down(speed)
        svg.line((_LEFT, y), (_RIGHT, y), GRID if speed else INK)
        svg.text(_LEFT - 6, y + 4, f"{speed:g}", AXIS, "end")
    for n_max in scale.lengths:
        svg.text(scale.across(n_max), scale.bottom + 16, str(n_max or "off"), AXIS, "middle")
    svg.text(_RIGHT, scale.bottom + 32, "n_max", AXIS, "end")


def _draw_file(svg: Svg, scale: _Scale, found: Measurement, series: int) -> None:
    """Lines between the points of a file, then its marks over them."""
    speeds: dict[int, float] = {}
    for total in found.by_n_max:
        speeds[total.n_max] = max(total.tokens_per_second, speeds.get(total.n_max, 0.0))
    if found.confirmed:  # another p_min may have been faster in its only round
        speeds[found.confirmed.n_max] = found.confirmed.tokens_per_second
    points: dict[int, Point] = {
        n_max: (scale.across(n_max), scale.down(speed)) for n_max, speed in speeds.items()
    }
    for start, end in zip(points.values(), list(points.values())[1:], strict=False):
        svg.line(start, end, stroke=MARKS[series][0])
    for n_max, point in points.items():
        if n_max == found.recommended_n_max:
            svg.circle(*point)
        svg.mark(*point, series=series)
