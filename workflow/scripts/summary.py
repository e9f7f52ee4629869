"""Print one table of all verified files: size, bits per weight, head types, acceptance and speed.

Of models in the folders after --earlier, it skips files that are not there. One that cannot be
read, of another version, is left out with a warning, and so is the measurement whose report is.

example: summary.py results/*/reports/*.json --measurements results/*/measure/*.json \\
             --out results/summary.md
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from collections.abc import Iterable, Iterator
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
    parser.add_argument(
        "--earlier", type=Path, nargs="*", default=[], metavar="FOLDER",
        help="folders of models of other runs: use what can be read",
    )  # fmt: skip
    args = parser.parse_args()

    def readable(paths: Iterable[Path], record: type[Record]) -> list[Path]:
        return list(_readable(paths, record, args.earlier))

    reports = readable(args.reports, Report)
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
    print(f"\n{table}\n{len(reports)} file{'s' * (len(reports) != 1)}")


def _readable(paths: Iterable[Path], record: type[Record], earlier: list[Path]) -> Iterator[Path]:
    """Those of the paths that have a record of this version. Raises RecordError unless earlier."""
    for path in paths:
        must = not any(path.is_relative_to(folder) for folder in earlier)
        if not must and not path.exists():
            continue
        try:
            record.read(path)
        except RecordError as error:
            if must:
                raise
            say(f"warning: left out: {error}")
        else:
            yield path


def file_of(record: Path) -> tuple[Path, str]:
    """The folder of a model, and what its report and measurement call a file."""
    return record.parent.parent, record.name.replace(".split.json", ".json")


if __name__ == "__main__":
    cli.run(main)
