"""Print one table of all verified files: size, bits per weight, head types, acceptance and speed.

Skips files that are not there. One that cannot be read, of another version, is left out with a
warning, and so is the measurement whose report is. It is an error if no report can be read.

example: summary.py results/*/reports/*.json --measurements results/*/measure/*.json \\
             --out results/summary.md
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from collections.abc import Iterable
from pathlib import Path

from mtpforge import cli
from mtpforge.errors import RecordError
from mtpforge.io import atomic
from mtpforge.io.records import Record
from mtpforge.measure.measurement import Measurement, Other
from mtpforge.progress import say
from mtpforge.quantize.coverage import Coverage
from mtpforge.report.summary import summary
from mtpforge.search.compared import Compared
from mtpforge.verify.report import Report


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
    reports = readable(args.reports, Report)
    if not reports:
        for path in filter(Path.exists, args.reports):
            Report.read(path)  # fails
    without = set(map(file_of, args.reports)) - set(map(file_of, reports))
    measurements = [each for each in args.measurements if file_of(each) not in without]
    table = summary(
        reports,
        readable(measurements, Measurement),
        compared=readable(args.compared, Compared),
        others=readable(args.others, Other),
        coverages=readable(args.coverages, Coverage),
    )
    atomic.write_text(args.out, table)
    print(f"\n{table}\n{len(reports)} files")


def readable(paths: Iterable[Path], record: type[Record]) -> list[Path]:
    """Those of the paths that have a record of this version."""
    found = []
    for path in filter(Path.exists, paths):
        try:
            record.read(path)
        except RecordError as error:
            say(f"warning: left out: {error}")
        else:
            found.append(path)
    return found


def file_of(record: Path) -> tuple[Path, str]:
    """The folder of a model, and what its report and measurement call a file."""
    return record.parent.parent, record.name.replace(".split.json", ".json")


if __name__ == "__main__":
    cli.run(main)
