"""Print one table of all verified files: size, bits per weight, head type, acceptance.

example: summary.py results/*/reports/*.json --out results/summary.md
"""

import argparse
import json
from pathlib import Path

from mtpforge import atomic, errors
from mtpforge.table import markdown, size

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


if __name__ == "__main__":
    errors.run(main)
