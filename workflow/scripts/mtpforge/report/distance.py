"""Figure of file size against KL divergence from BF16."""

import math
from collections.abc import Container, Iterable, Iterator, Sequence
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
_NEAR = 14
"""The farthest that a label can be from its point without a line between them."""
_WHOLE = 50
"""Cost of hiding a mark or a label; a spot of a line costs 1."""
LEADER = "#a6a6a6"
"""Color of the line from a point to a label that is far from it."""
Range = tuple[float, float]
"""Lowest and highest value."""
Box = tuple[float, float, float, float]
"""Left, top, right, bottom"""


def distance(
    measured: Sequence[Measurement],
    compared: Sequence[Compared] = (),
    others: Sequence[Other] = (),
) -> Svg:
    """One point per file, per mixture of llama.cpp and per other file that it is compared with.

    The divergence axis is logarithmic, with 0 below it if a file has none. Files without a measured
    divergence are left out.
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
    labels = _Labels(scale, map(scale.place, files), places)
    for file in sorted(files, key=lambda file: -file.divergence):
        point = scale.place(file)
        (begin, baseline), to_label = labels.place(point, file.label)
        if to_label:
            svg.line(point, to_label, LEADER)
        svg.text(begin, baseline, file.label)
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
    """Where sizes and divergences lie in the picture: both ranges fit the files."""

    top: float
    foot: float
    """Where the logarithmic axis ends; 0 is below it, if any file has no divergence."""
    unit: float
    """Bytes of the unit on the axis of sizes."""
    sizes: Range
    """In units"""
    powers: Range
    """Decimal logarithms of divergences"""

    @classmethod
    def of(cls, files: Sequence[File], top: float) -> "_Scale":
        sizes = [file.size for file in files]
        unit = 1e9 if max(sizes) >= 1e9 else 1e6
        far = [math.log10(file.divergence) for file in files if file.divergence >= _SMALLEST]
        exact = any(file.divergence < _SMALLEST for file in files)
        return cls(
            top=top,
            foot=top + _HEIGHT - (24 if exact else 0),
            unit=unit,
            sizes=_widened([size / unit for size in sizes], least=0.1 * max(sizes) / unit),
            powers=_widened(far or [-4, -1], least=0.5),
        )

    @property
    def bottom(self) -> float:
        return self.top + _HEIGHT

    def place(self, file: File) -> Point:
        return self.across(file.size / self.unit), self.down(file.divergence)

    def across(self, size: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * _share(size, self.sizes)

    def down(self, divergence: float) -> float:
        if divergence < _SMALLEST:
            return self.bottom
        return self.foot - (self.foot - self.top) * _share(math.log10(divergence), self.powers)


def _widened(values: Sequence[float], least: float) -> Range:
    """The range of some values, of `least` or more, with a margin."""
    low, high = min(values), max(values)
    more = max(least - (high - low), 0) / 2 + 0.08 * max(high - low, least)
    return low - more, high + more


def _share(value: float, found: Range) -> float:
    return (value - found[0]) / (found[1] - found[0])


def _round_sizes(found: Range) -> list[float]:
    """A few round values of a range."""
    low, high = found
    step = ticks(0.8 * (high - low))[1]
    return [step * number for number in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _round_divergences(found: Range) -> list[float]:
    """Powers of ten in a range of logarithms, also 2 and 5 times these if there are few."""
    low, high = found
    factors = (1, 2, 5) if high - low < 2 else (1,)
    powers = range(math.floor(low), math.ceil(high) + 1)
    values = [factor * 10.0**power for power in powers for factor in factors]
    return [value for value in values if low <= math.log10(value) <= high]


def _draw_axes(svg: Svg, scale: _Scale) -> None:
    for divergence in _round_divergences(scale.powers):
        y = scale.down(divergence)
        svg.line((_LEFT, y), (_RIGHT, y), GRID)
        svg.text(_LEFT - 6, y + 4, f"{divergence:g}", AXIS, "end")
    svg.line((_LEFT, scale.bottom), (_RIGHT, scale.bottom), INK)
    if scale.foot < scale.bottom:
        svg.text(_LEFT - 6, scale.bottom + 4, "0", AXIS, "end")
    for size in _round_sizes(scale.sizes):
        svg.text(scale.across(size), scale.bottom + 16, f"{size:g}", AXIS, "middle")
    svg.text(_RIGHT, scale.bottom + 32, "GB" if scale.unit == 1e9 else "MB", AXIS, "end")


class _Labels:
    """Labels of points, where they hide least of marks, lines and other labels."""

    def __init__(self, scale: _Scale, marks: Iterable[Point], line: Sequence[Point]) -> None:
        self._scale = scale
        self._taken = [((x - 6, y - 6, x + 6, y + 6), _WHOLE) for x, y in marks]
        for start, end in pairwise(line):
            self._taken += [(spot, 1) for spot in _spots(start, end)]

    def place(self, point: Point, words: str) -> tuple[Point, Point | None]:
        """Begin and baseline of a label; the end of a line to it, if it is far from its point."""
        width = CHARACTER * len(words)

        def cost(place: Point) -> tuple[int, float]:
            box = _box(place, width)
            return self._hidden(point, box), max(_gap(point, box), 8)

        best = min(_places(point, width), key=cost)
        box = _box(best, width)
        self._taken.append((box, _WHOLE))
        if _gap(point, box) <= _NEAR:
            return best, None
        self._taken += [(spot, 1) for spot in _spots(point, _nearest(point, box))]
        return best, _nearest(point, box)

    def _hidden(self, point: Point, box: Box) -> int:
        """How much a label and its line would hide; most if it would leave the picture."""
        left, top, right, bottom = box
        inside = left > _LEFT and right < WIDTH - 4
        if not inside or top < self._scale.top - 8 or bottom > self._scale.bottom + 1:
            return _WHOLE * len(self._taken) * (2 - inside)
        found = self._cost([box])
        if _gap(point, box) > _NEAR:
            spots = _spots(point, _nearest(point, box))
            found += self._cost([spot for spot in spots if _gap(point, spot) > 7]) // 5
        return found

    def _cost(self, boxes: Sequence[Box]) -> int:
        return sum(
            weight for each, weight in self._taken if any(_overlap(box, each) for box in boxes)
        )


def _places(point: Point, width: float) -> Iterator[Point]:
    """Begin and baseline of labels around a point."""
    x, y = point
    for shift, gap in product((0, -14, 14, -28, 28, -42, 42), (9, 24, 39)):
        yield x + gap, y + 4 + shift
        yield x - gap - width, y + 4 + shift
        if shift:
            yield x - width / 2, y + 4 + shift


def _box(place: Point, width: float) -> Box:
    begin, baseline = place
    return begin - 1, baseline - 11, begin + width, baseline + 2


def _nearest(point: Point, box: Box) -> Point:
    """The point of a box that is nearest to another."""
    left, top, right, bottom = box
    return min(max(point[0], left), right), min(max(point[1], top), bottom)


def _gap(point: Point, box: Box) -> float:
    x, y = _nearest(point, box)
    return math.hypot(x - point[0], y - point[1])


def _spots(start: Point, end: Point) -> list[Box]:
    """Points of a line, two units apart, as boxes."""
    (x, y), (right, down) = start, end
    steps = max(1, round(math.hypot(right - x, down - y) / 2))
    shares = [number / steps for number in range(steps + 1)]
    spots = [(x + (right - x) * share, y + (down - y) * share) for share in shares]
    return [(*spot, *spot) for spot in spots]


def _overlap(one: Box, other: Box) -> bool:
    across = one[0] <= other[2] and other[0] <= one[2]
    return across and one[1] <= other[3] and other[1] <= one[3]
