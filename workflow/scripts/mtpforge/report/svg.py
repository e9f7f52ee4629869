"""Pictures as SVG text: 360 units wide, as a phone is, so that nothing has to shrink; dark on white; marks that differ by shape."""

import math
from collections.abc import Sequence
from html import escape

WIDTH = 360
WIDE = 7.4  # a character of the ordinary size, in the widest of the fonts that a reader may have
INK, FAINT, GRID = "#1a1a1a", "#595959", "#d9d9d9"
# Okabe and Ito's colours, which stay apart for people who see fewer; where one matters, a shape or a word says it too.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#007a59", "#767676"
_ALL = [
    (fill, shape)
    for shape in ("circle", "square", "triangle")
    for fill in (BLUE, ORANGE, GREEN, GREY)
]
MARKS = [_ALL[5 * number % len(_ALL)] for number in range(len(_ALL))]  # neighbours differ in both


class Svg:
    """A picture that grows downwards: `y` is where the next thing goes."""

    def __init__(self, title: str, subtitle: str = "") -> None:
        self.title, self.y, self._parts = title, 22.0, list[str]()
        self.text(10, self.y, title, size=15, weight="bold")
        if subtitle:
            self.paragraph(subtitle)
        self.y += 10

    def text(
        self, x: float, y: float, words: str, size: float = 12, fill: str = INK, anchor: str = "start", weight: str = "normal"
    ) -> None:  # fmt: skip
        """Words on one line, its base line at `y`."""
        self._parts.append(
            f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size:g}" fill="{fill}" text-anchor="{anchor}" font-weight="{weight}">'
            f"{escape(words)}</text>"
        )

    def paragraph(
        self, words: str, size: float = 12, fill: str = FAINT, weight: str = "normal"
    ) -> None:
        """Words below one another, as many lines as they need."""
        line = ""
        for word in [*words.split(), ""]:
            if line and (not word or len(f"{line} {word}") * size * 0.56 > WIDTH - 20):
                self.y += size + 4
                self.text(10, self.y, line, size, fill, weight=weight)
                line = ""
            line = f"{line} {word}".strip()

    def rect(
        self, x: float, y: float, width: float, height: float, fill: str, stroke: str = "none"
    ) -> None:
        """A filled rectangle."""
        self._parts.append(
            f'<rect x="{x:.1f}" y="{y:.1f}" width="{max(width, 0):.1f}" height="{height:.1f}" fill="{fill}" stroke="{stroke}"/>'
        )

    def line(
        self, x1: float, y1: float, x2: float, y2: float, stroke: str = INK, width: float = 1
    ) -> None:
        """A straight line."""
        self._parts.append(
            f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{stroke}" stroke-width="{width:g}"/>'
        )

    def ring(self, x: float, y: float) -> None:
        """A small ring, to be seen on white and on a bar."""
        self._parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="white" stroke="{INK}" stroke-width="1.5"/>'
        )

    def mark(self, x: float, y: float, number: int, size: float = 4.5) -> None:
        """A mark of the series of that number: its own colour and its own shape."""
        fill, shape = MARKS[number % len(MARKS)]
        if shape == "circle":
            self._parts.append(
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{size:g}" fill="{fill}" stroke="white"/>'
            )
        elif shape == "square":
            self.rect(x - size, y - size, 2 * size, 2 * size, fill, "white")
        else:
            points = f"{x:.1f},{y - size - 1:.1f} {x + size + 1:.1f},{y + size:.1f} {x - size - 1:.1f},{y + size:.1f}"
            self._parts.append(f'<polygon points="{points}" fill="{fill}" stroke="white"/>')

    def legend(self, names: Sequence[str]) -> None:
        """The names of the series, with their marks, on as many lines as they need."""
        self.y += 8
        x = 16.0
        for number, name in enumerate(names):
            if number and x + 10 + WIDE * len(name) > WIDTH:
                x, self.y = 16.0, self.y + 16
            self.mark(x, self.y - 4, number)
            self.text(x + 10, self.y, name)
            x += 24 + WIDE * len(name)
        self.y += 8

    def render(self) -> str:
        """The whole picture."""
        height = math.ceil(self.y + 12)
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
            f' font-family="system-ui, Helvetica, Arial, sans-serif" role="img"><title>{escape(self.title)}</title>'
            f'<rect width="{WIDTH}" height="{height}" fill="white"/>\n'
            + "\n".join(self._parts)
            + "\n</svg>\n"
        )


def ticks(top: float) -> list[float]:
    """A few round values from 0 to at least `top`."""
    step = 10.0 ** math.floor(math.log10(top)) if top > 0 else 1.0
    step = next(step * factor for factor in (0.2, 0.5, 1.0, 2.0, 5.0) if top / (step * factor) <= 5)
    return [step * number for number in range(math.ceil(top / step - 1e-9) + 1)]
