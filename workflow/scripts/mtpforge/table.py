"""Markdown tables that are also readable as plain text, and sizes and times in words."""

import math
import re
from collections.abc import Sequence
from pathlib import Path

from mtpforge.errors import printable

_BAR = re.compile(r"(?<!\\)((?:\\\\)*)\|")
"""A bar after an even number of backslashes, which escape each other and not the bar."""


def size(count: int) -> str:
    """Bytes for people, in powers of ten as the Hub shows them."""
    if count < 1e5:
        return f"{count / 1e3:.1f} kB"
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def rounded(value: float) -> str:
    """A number in two digits of sense, without an exponent."""
    if not math.isfinite(value) or value == 0:
        return f"{value:g}"
    digits = 1 - math.floor(math.log10(abs(value)))
    shown = round(value, digits)
    decimals = 1 - math.floor(math.log10(abs(shown)))
    return f"{shown:.{max(decimals, 0)}f}"


def rounded_size(count: int) -> str:
    """Bytes in two digits of sense."""
    return f"{rounded(count / 1e9)} GB" if count >= 995e6 else f"{rounded(count / 1e6)} MB"


def size_of(path: Path) -> str:
    """The size of a file, or of all files in a folder."""
    files = path.iterdir() if path.is_dir() else [path]
    return size(sum(file.stat().st_size for file in files))


def duration(seconds: float) -> str:
    """A time as people read it."""
    whole = round(seconds)
    if whole < 10:
        return f"{seconds:.1f} s"
    if whole < 120:
        return f"{whole} s"
    if whole < 7200:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def markdown(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table, header first; the first `left` columns are left-aligned, the rest right.

    Bars in a cell are escaped, unless they are already.
    """
    rows = [[_BAR.sub(r"\1\|", printable(cell)) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return f"| {' | '.join(cells)} |\n"

    rule = ["-" * width if i < left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return "".join(map(line, (rows[0], rule, *rows[1:])))
