"""Draw a figure of a model's measurements, or of one file's tensors, as SVG.

example: plot.py speed results/tiny-qwen3.5/measure/*.json --out speed.svg
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

import argparse
from pathlib import Path

from mtpforge import cli, errors
from mtpforge.io import atomic
from mtpforge.measure.measurement import Measurement, Other
from mtpforge.report.distance import distance
from mtpforge.report.figures import FIGURES
from mtpforge.report.svg import Svg
from mtpforge.report.tensors import tensors
from mtpforge.search.compared import Compared
from mtpforge.verify import published
from mtpforge.verify.report import Report


def main() -> None:
    """Parse the command line and draw."""
    parser = cli.parser(__doc__)
    parser.add_argument("figure", choices=[*FIGURES, "tensors"], help="what to draw")
    parser.add_argument(
        "records", type=Path, nargs="+", metavar="FILE",
        help="measurements of measure.py; for `tensors`, one report of verify.py",
    )  # fmt: skip
    parser.add_argument(
        "--compared", type=Path, nargs="*", default=[], metavar="FILE",
        help="for `distance`: comparisons of compare_stock.py",
    )  # fmt: skip
    parser.add_argument(
        "--others", type=Path, nargs="*", default=[], metavar="FILE",
        help="for `distance`: files of measure_other.py",
    )  # fmt: skip
    parser.add_argument(
        "--file", type=Path, metavar="F.gguf",
        help="for `tensors`: the GGUF, or the folder of a split one",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="figure, as SVG")
    args = parser.parse_args()
    atomic.write_text(args.out, draw(args).render())


def draw(args: argparse.Namespace) -> Svg:
    """The figure of measurements, or of the tensors of a file. Raises ConfigError without one."""
    if args.figure == "tensors":
        return draw_tensors(args.records[0], args.file)
    measured = [Measurement.read(path) for path in args.records]
    if args.figure == "distance":
        compared = [Compared.read(path) for path in args.compared]
        return distance(measured, compared, [Other.read(path) for path in args.others])
    return FIGURES[args.figure](measured)


def draw_tensors(record: Path, file: Path | None) -> Svg:
    """The types and errors of a file's tensors. Raises ConfigError without a file."""
    if file is None:
        raise errors.ConfigError("plot.py tensors: add --file with the GGUF to draw")
    report = Report.read(record)
    published.check([(file, report)])
    return tensors(file, report.errors or {})


if __name__ == "__main__":
    cli.run(main)
