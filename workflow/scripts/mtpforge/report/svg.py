"""SVG pictures, 360 units wide like a phone: dark on white, with marks that differ in shape too."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from mtpforge.errors import printable

WIDTH = 360
CHARACTER = 7.4
"""Width of a character at size 12 in the widest font that a reader may have."""
INK = "#1a1a1a"
FAINT = "#595959"
GRID = "#d9d9d9"
# Okabe and Ito's colours, which color-blind readers can tell apart.
BLUE = "#0072B2"
ORANGE = "#D55E00"
GREEN = "#007a59"
GREY = "#767676"
_ALL = [
    (fill, shape)
    for shape in ("circle", "square", "triangle")
    for fill in (BLUE, ORANGE, GREEN, GREY)
]
MARKS = [_ALL[5 * number % len(_ALL)] for number in range(len(_ALL))]
"""(colour, shape) of each series; neighbours differ in both."""

Point = tuple[float, float]


@dataclass(frozen=True)
class Font:
    """How text looks."""

    size: float = 12
    fill: str = INK
    weight: str = "normal"


PLAIN = Font()
BOLD = Font(weight="bold")
NOTE = Font(fill=FAINT)
AXIS = Font(size=11, fill=FAINT)
HEADING = Font(size=13, weight="bold")
TITLE = Font(size=15, weight="bold")


class Svg:
    """A picture that grows downwards from its title: `y` is where the next part goes."""

    def __init__(self, title: str, subtitle: str) -> None:
        self.title = title
        self.y = 22.0
        self._parts: list[str] = []
        self.text(10, self.y, title, TITLE)
        self.paragraph(subtitle)
        self.y += 10

    def text(
        self, x: float, y: float, words: str, font: Font = PLAIN, anchor: str = "start"
    ) -> None:
        """One line with its baseline at `y`; `anchor` is the part of it at `x`."""
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{font.size:g}" fill="{font.fill}"'
            f' text-anchor="{anchor}" font-weight="{font.weight}">{escape(printable(words))}</text>'
        )

    def heading(self, words: str) -> None:
        """The heading of a part."""
        self.y += 24
        self.text(10, self.y, words, HEADING)
        self.y += 6

    def paragraph(self, words: str, font: Font = NOTE) -> None:
        """Text on as many lines as it needs."""
        for line in _wrapped(words, font.size):
            self.y += font.size + 4
            self.text(10, self.y, line, font)

    def rect(self, x: float, y: float, width: float, height: float, fill: str) -> None:
        """A filled rectangle."""
        self._rect(x, y, max(width, 0), height, fill, stroke="none")

    def line(self, start: Point, end: Point, stroke: str = INK, width: float = 1) -> None:
        """A straight line."""
        self._parts.append(
            f'<line x1="{start[0]:.1f}" y1="{start[1]:.1f}" x2="{end[0]:.1f}" y2="{end[1]:.1f}"'
            f' stroke="{stroke}" stroke-width="{width:g}"/>'
        )

    def ring(self, x: float, y: float) -> None:
        """A small ring, visible on white and on a bar."""
        self._parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="white" stroke="{INK}"'
            ' stroke-width="1.5"/>'
        )

    def circle(self, x: float, y: float) -> None:
        """A circle around a mark."""
        self._parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="8.5" fill="none" stroke="{INK}"'
            ' stroke-width="1.5"/>'
        )

    def mark(self, x: float, y: float, series: int, size: float = 4.5) -> None:
        """The mark of a series, by its number."""
        fill, shape = MARKS[series % len(MARKS)]
        if shape == "circle":
            self._parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:g}" fill="{fill}" stroke="white"/>'
            )
        elif shape == "square":
            self._rect(x - size, y - size, 2 * size, 2 * size, fill, stroke="white")
        else:
            self._triangle(x, y, size, fill)

    def legend(self, names: Sequence[str]) -> None:
        """The names of the series with their marks, on as many lines as they need."""
        self.y += 8
        x = 16.0
        for series, name in enumerate(_cut(name) for name in names):
            if series and x + 10 + CHARACTER * len(name) > WIDTH:
                x = 16.0
                self.y += 16
            self.mark(x, self.y - 4, series)
            self.text(x + 10, self.y, name)
            x += 24 + CHARACTER * len(name)
        self.y += 8

    def render(self) -> str:
        """The SVG file."""
        height = math.ceil(self.y + 12)
        parts = "\n".join(self._parts)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}"'
            f' width="{WIDTH}" height="{height}"'
            ' font-family="system-ui, Helvetica, Arial, sans-serif" role="img">'
            f"<title>{escape(printable(self.title))}</title>"
            f'<rect width="{WIDTH}" height="{height}" fill="white"/>\n{parts}\n</svg>\n'
        )

    def _rect(
        self, x: float, y: float, width: float, height: float, fill: str, *, stroke: str
    ) -> None:
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
            f' fill="{fill}" stroke="{stroke}"/>'
        )

    def _triangle(self, x: float, y: float, size: float, fill: str) -> None:
        half = size + 1
        points = (
            f"{x:.1f},{y - half:.1f} {x + half:.1f},{y + size:.1f} {x - half:.1f},{y + size:.1f}"
        )
        self._parts.append(f'<polygon points="{points}" fill="{fill}" stroke="white"/>')


def ticks(top: float) -> list[float]:
    """A few round values from 0 to at least `top`."""
    step = 10.0 ** math.floor(math.log10(top)) if top > 0 else 1.0
    step = next(step * factor for factor in (0.2, 0.5, 1.0, 2.0, 5.0) if top / (step * factor) <= 5)
    return [step * number for number in range(math.ceil(top / step - 1e-9) + 1)]


def _cut(name: str) -> str:
    """A name that fits a line of the legend."""
    most = int((WIDTH - 30) / CHARACTER)
    return name if len(name) <= most else f"{name[: most - 1]}…"


def _wrapped(words: str, size: float) -> Iterator[str]:
    """Lines that fit the width."""
    line = ""
    for word in words.split():
        if line and len(f"{line} {word}") * size * 0.56 > WIDTH - 20:
            yield line
            line = word
        else:
            line = f"{line} {word}".strip()
    if line:
        yield line
