"""Print one table of all verified files: size, bits per weight, head type, acceptance.

example: summary.py results/*/reports/*.json --out results/summary.md
"""

import argparse
import json
from pathlib import Path

from mtpforge import atomic, errors

COLUMNS = ("file", "size", "bits/weight", "head", "acceptance")


def main() -> None:
    """Parse the command line, print the table and write it as Markdown."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("reports", type=Path, nargs="+", help="reports of verify.py")
    parser.add_argument("--out", type=Path, required=True, help="the table, in Markdown")
    args = parser.parse_args()
    table = markdown([COLUMNS, *(row(path) for path in args.reports)])
    atomic.write_text(args.out, table)
    print(f"\n{table}")


def row(path: Path) -> tuple[str, ...]:
    """One file's cells."""
    report = json.loads(path.read_text(encoding="utf-8"))
    if drafts := report.get("drafts"):
        acceptance = f"{report['accepted'] / drafts:.1%} ({report['accepted']}/{drafts})"
    else:
        acceptance = "-" if report["head"] in ("none", "") else "not possible"  # its report says why
    return (
        report["file"],
        size(report["bytes"]),
        f"{report['bits_per_weight']:.2f}",
        report["head"] or "-",
        acceptance,
    )


def size(count: int) -> str:
    """Bytes as people read them, in powers of ten as the Hub shows them."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


def markdown(rows: list[tuple[str, ...]]) -> str:
    """A Markdown table, padded so that it reads as text too; the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    lines = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))] for row in rows
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in [lines[0], rule, *lines[1:]])


if __name__ == "__main__":
    errors.run(main)
