"""Figure of file size against KL divergence from BF16."""

import math
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

from mtpforge.measure.measurement import Measurement, Other
from mtpforge.report.svg import AXIS, CHARACTER, FAINT, GRID, INK, WIDTH, Point, Svg, ticks
from mtpforge.search.compared import Compared

_LEFT = 52.0
_RIGHT = WIDTH - 16.0
_HEIGHT = 240
_SMALLEST = 1e-6
"""Divergence that counts as 0."""
_SERIES = ("file", "types found", "llama.cpp's mixture", "not made here")
_LONGEST_LABEL = 26


def distance(
    measured: Sequence[Measurement],
    compared: Sequence[Compared] = (),
    others: Sequence[Other] = (),
) -> Svg:
    """One point per file, per mixture of llama.cpp and per other file that it is compared with.

    The divergence axis is logarithmic, with 0 at the bottom. Files without a measured divergence
    are left out.
    """
    svg = Svg(
        "Size and distance from BF16",
        "KL divergence of the predictions (mean, nats; lower is better) by file size. Line: the"
        " best file at each size.",
    )
    files = _files(measured, {each.file for each in compared})
    if not files:
        svg.paragraph("KL divergence was not measured.")
        return svg
    files += _mixtures(compared, files) + _others(others, measured)
    if max(file.series for file in files) or compared:
        svg.legend(_SERIES[: 4 if others else 3])
    scale = _Scale.of(files, top=svg.y + 8)
    _draw_axes(svg, scale)
    places = [scale.place(file) for file in frontier(files)]
    for start, end in pairwise(places):
        svg.line(start, end, FAINT)
    labels = _Labels(svg, scale)
    for file in sorted(files, key=lambda file: -file.divergence):
        point = scale.place(file)
        labels.add(point, file.label)
        svg.mark(*point, series=file.series, size=5)
    svg.y = scale.bottom + 34
    return svg


def common_prefix(names: Sequence[str]) -> str:
    """The prefix of all names, up to a hyphen; empty if all are the same."""
    first = min(names)
    last = max(names)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)
    return first[: first[:length].rfind("-") + 1]


@dataclass(frozen=True)
class File:
    """A point of the picture."""

    label: str
    size: int
    divergence: float
    series: int


def frontier(files: Sequence[File]) -> list[File]:
    """The files, by size, with less divergence than all smaller ones."""
    best: list[File] = []
    for file in sorted(files, key=lambda file: (file.size, file.divergence)):
        if not best or file.divergence < best[-1].divergence:
            best.append(file)
    return best


def _files(measured: Sequence[Measurement], found: Container[str]) -> list[File]:
    """The files with a measured divergence; rounding can make it negative, which counts as 0."""
    drawn = [(each, each.kl_divergence.mean) for each in measured if each.kl_divergence]
    prefix = len(_prefix(measured))
    return [
        File(each.stem[prefix:], each.bytes, max(moved, 0.0), series=int(each.file in found))
        for each, moved in drawn
    ]


def _prefix(measured: Sequence[Measurement]) -> str:
    """What the names of the files that are drawn begin with."""
    names = [each.stem for each in measured if each.kl_divergence]
    return common_prefix(names) if names else ""


def _others(others: Sequence[Other], measured: Sequence[Measurement]) -> list[File]:
    """Other people's files, labelled with what is not the model's name, and with the owner."""
    prefix = _prefix(measured)
    found = []
    for other in others:
        if other.kl_divergence:
            owner, _, name = other.name.rpartition("/")
            label = name.removesuffix(".gguf").removeprefix(prefix)
            label = f"{label} ({owner.partition('/')[0]})" if owner else label
            moved = max(other.kl_divergence.mean, 0.0)
            found.append(File(label[:_LONGEST_LABEL], other.bytes, moved, series=3))
    return found


def _mixtures(compared: Sequence[Compared], files: Sequence[File]) -> list[File]:
    """llama.cpp's own mixtures, without those that are among the files."""
    known = {(file.size, file.divergence) for file in files}
    found = {}
    for stock in (each.stock for each in compared if each.stock):
        moved = max(stock.kl_divergence.mean, 0.0)
        found[stock.bytes, moved] = File(stock.type, stock.bytes, moved, series=2)
    return [file for place, file in found.items() if place not in known]


@dataclass(frozen=True)
class _Scale:
    """Where sizes and divergences lie in the picture."""

    top: float
    unit: float
    """Bytes of the unit on the axis of sizes."""
    sizes: list[float]
    """Ticks, in units"""
    powers: range
    """Ticks of the axis of divergence, as powers of ten"""

    @classmethod
    def of(cls, files: Sequence[File], top: float) -> "_Scale":
        largest = max(file.size for file in files)
        unit = 1e9 if largest >= 1e9 else 1e6
        far = [file.divergence for file in files if file.divergence >= _SMALLEST]
        low = math.floor(math.log10(min(far))) if far else -4
        high = math.ceil(math.log10(max(far)) + 1e-9) if far else -1
        return cls(top, unit, ticks(largest / unit), range(low, high + 1))

    @property
    def bottom(self) -> float:
        return self.top + _HEIGHT

    def place(self, file: File) -> Point:
        return self.across(file.size), self.down(file.divergence)

    def across(self, size: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * size / self.unit / self.sizes[-1]

    def down(self, divergence: float) -> float:
        if divergence < _SMALLEST:
            return self.bottom
        foot = self.bottom - 24
        share = (math.log10(divergence) - self.powers[0]) / (self.powers[-1] - self.powers[0])
        return foot - share * (foot - self.top)


def _draw_axes(svg: Svg, scale: _Scale) -> None:
    for power in scale.powers:
        y = scale.down(10.0**power)
        svg.line((_LEFT, y), (_RIGHT, y), GRID)
        svg.text(_LEFT - 6, y + 4, f"{10.0**power:g}", AXIS, "end")
    svg.line((_LEFT, scale.bottom), (_RIGHT, scale.bottom), INK)
    svg.text(_LEFT - 6, scale.bottom + 4, "0", AXIS, "end")
    for size in scale.sizes:
        svg.text(
            scale.across(size * scale.unit),
            scale.bottom + 16,
            f"{size:g}",
            font=AXIS,
            anchor="middle",
        )
    svg.text(_RIGHT, scale.bottom + 32, "GB" if scale.unit == 1e9 else "MB", AXIS, "end")


class _Labels:
    """Labels of points, placed so that they do not overlap if there is room."""

    def __init__(self, svg: Svg, scale: _Scale) -> None:
        self._svg = svg
        self._scale = scale
        self._taken: list[tuple[float, float, float]] = []  # begin, end, baseline

    def add(self, point: Point, words: str) -> None:
        """Write a label at the first free place, else at the first."""
        width = CHARACTER * len(words)
        places = list(self._places(point, width))
        free = [place for place in places if self._is_free(place, width)]
        begin, baseline = (free or places)[0]
        x, y = point
        self._taken.append((begin, begin + width, baseline))
        self._taken.append((x - 6, x + 6, self._above_axis(y) + 4))
        self._svg.text(begin, baseline, words)

    def _places(self, point: Point, width: float) -> Iterator[Point]:
        """To the right if that fits, else to the left; then ever farther up or down."""
        x, y = point
        right = [x + 9] if x + 9 + width < WIDTH - 4 else []
        shifts = (0, -14, 14, -28, 28, -42, 42)
        for shift, begin in product(shifts, [*right, x - 9 - width]):
            yield begin, self._above_axis(y) + 4 + shift

    def _above_axis(self, y: float) -> float:
        return min(y, self._scale.bottom - 8)

    def _is_free(self, place: Point, width: float) -> bool:
        begin, baseline = place
        if begin <= _LEFT or not self._scale.top <= baseline <= self._scale.bottom + 4:
            return False
        return all(
            begin > end or begin + width < start or abs(baseline - other) > 13
            for start, end, other in self._taken
        )
