"""Tables that read as text and are Markdown."""

from collections.abc import Sequence


def size(count: int) -> str:
    """Bytes as people read them, in powers of ten as the Hub shows them."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def markdown(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A Markdown table, padded so that it reads as text too; the first `left` columns to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rule = ["-" * (width - (i >= left)) + ":" * (i >= left) for i, width in enumerate(widths)]
    lines = [
        [
            cell.rjust(width) if i >= left else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        for row in rows
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in [lines[0], rule, *lines[1:]])
