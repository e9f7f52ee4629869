"""Print one table of all verified files: size, bits per weight, head type, acceptance and, where measured, speed.

example: summary.py results/*/reports/*.json --measurements results/*/measure/*.json --out results/summary.md
"""

import json
from pathlib import Path
from typing import Any

from mtpforge import cli
from mtpforge.io import atomic
from mtpforge.table import markdown, size

COLUMNS = ("file", "size", "bits/weight", "head", "acceptance", "tokens/s", "n_max")


def main() -> None:
    """Parse the command line, print the table and write it as Markdown."""
    parser = cli.parser(__doc__)
    parser.add_argument("reports", type=Path, nargs="+", help="reports of verify.py")
    parser.add_argument(
        "--measurements", type=Path, nargs="*", default=[], help="those of measure.py"
    )
    parser.add_argument("--out", type=Path, required=True, help="the table, in Markdown")
    args = parser.parse_args()
    measured = {
        (path.parent.parent, (found := read(path))["file"]): found for path in args.measurements
    }
    reports = [
        (path.parent.parent, read(path)) for path in args.reports
    ]  # two models can have files of one name
    table = markdown(
        [
            COLUMNS,
            *(row(report, measured.get((folder, report["file"]))) for folder, report in reports),
        ]
    )
    atomic.write_text(args.out, table)
    print(f"\n{table}\n{len(reports)} files")


def read(path: Path) -> dict[str, Any]:
    """One report."""
    return dict(json.loads(path.read_text(encoding="utf-8")))


def row(report: dict[str, Any], measured: dict[str, Any] | None) -> tuple[str, ...]:
    """One file's cells."""
    if drafts := report.get("drafts"):
        acceptance = f"{report['accepted'] / drafts:.1%} ({report['accepted']}/{drafts})"
    else:
        acceptance = (
            "-" if report["head"] in ("none", "") else "not possible"
        )  # its report says why
    return (
        report["file"],
        size(report["bytes"]),
        f"{report['bits_per_weight']:.2f}",
        report["head"] or "-",
        acceptance,
        *speed(measured),
    )


def speed(found: dict[str, Any] | None) -> tuple[str, str]:
    """Tokens a second without drafting and with the best n_max, faster or slower; and the n_max to serve with."""
    if found is None:
        return "-", "-"
    off, *drafting = found["by_n_max"]
    best = max(drafting, key=lambda entry: entry["tokens_per_second"], default=None)
    cell = f"{off['tokens_per_second']:.0f}" + (
        f" → {best['tokens_per_second']:.0f}" if best else ""
    )
    return cell, str(found["recommended_n_max"] or "off")


if __name__ == "__main__":
    cli.run(main)
