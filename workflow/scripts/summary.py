"""Print one table of all verified files: size, bits per weight, head types, acceptance and speed.

example: summary.py results/*/reports/*.json --measurements results/*/measure/*.json \\
             --out results/summary.md
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from pathlib import Path

from mtpforge import cli
from mtpforge.io import atomic
from mtpforge.report.summary import summary


def main() -> None:
    """Parse the command line, print the table and write it as Markdown."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "reports", type=Path, nargs="+", metavar="REPORT.json", help="reports of verify.py"
    )
    parser.add_argument(
        "--measurements", type=Path, nargs="*", default=[], metavar="FILE",
        help="measurements of measure.py",
    )  # fmt: skip
    parser.add_argument(
        "--compared", type=Path, nargs="*", default=[], metavar="FILE",
        help="comparisons of compare_stock.py",
    )  # fmt: skip
    parser.add_argument(
        "--others", type=Path, nargs="*", default=[], metavar="FILE",
        help="measurements of measure_other.py",
    )  # fmt: skip
    parser.add_argument(
        "--coverages", type=Path, nargs="*", default=[], metavar="FILE",
        help="coverage of importance matrices, of imatrix_coverage.py",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="table, in Markdown"
    )
    args = parser.parse_args()
    table = summary(
        args.reports,
        args.measurements,
        compared=args.compared,
        others=args.others,
        coverages=args.coverages,
    )
    atomic.write_text(args.out, table)
    print(f"\n{table}\n{len(args.reports)} files")


if __name__ == "__main__":
    cli.run(main)
