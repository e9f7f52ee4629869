"""Write the model card of a results folder, and DETAILS.md, from reports and measurements.

example: card.py --files F.gguf --reports report.json --toolchain stamp.json --out README.md \\
             --about '{"name": "F", "source": {"path": "F"}, "variants": {}}'
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from pathlib import Path

from mtpforge import cli
from mtpforge.gguf import file_names, split
from mtpforge.io import atomic
from mtpforge.llama_cpp.stamp import Stamp
from mtpforge.measure.measurement import Measurement, Other
from mtpforge.publish import card, details
from mtpforge.publish.card_config import About
from mtpforge.publish.result import Result
from mtpforge.quantize.coverage import Coverage
from mtpforge.search.compared import Compared
from mtpforge.verify import published
from mtpforge.verify.report import Report

TEMPLATES = Path(__file__).resolve().parents[1] / "templates"


def main() -> None:
    """Parse the command line and write both pages."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--files", type=Path, nargs="+", required=True, metavar="FILE",
        help="GGUFs, or the folders of split ones",
    )  # fmt: skip
    parser.add_argument(
        "--reports", type=Path, nargs="+", required=True, metavar="FILE",
        help="reports of verify.py on these files, in the same order",
    )  # fmt: skip
    parser.add_argument(
        "--measurements", type=Path, nargs="*", default=[], metavar="FILE",
        help="files of measure.py, named like the reports",
    )  # fmt: skip
    parser.add_argument(
        "--compared", type=Path, nargs="*", default=[], metavar="FILE",
        help="files of compare_stock.py",
    )  # fmt: skip
    parser.add_argument(
        "--coverages", type=Path, nargs="*", default=[], metavar="FILE",
        help="files of imatrix_coverage.py, in the order of the configuration's matrices",
    )  # fmt: skip
    parser.add_argument(
        "--others", type=Path, nargs="*", default=[], metavar="FILE",
        help="files of measure_other.py",
    )  # fmt: skip
    parser.add_argument(
        "--about", type=About.parse, required=True, metavar="JSON",
        help="the model's part of the configuration",
    )  # fmt: skip
    parser.add_argument(
        "--checkpoint-card", type=Path, default=Path("none"), metavar="FILE",
        help="the checkpoint's own card; it need not exist",
    )  # fmt: skip
    parser.add_argument(
        "--toolchain", type=Path, required=True, metavar="FILE",
        help="stamp of llama.cpp's programs",
    )  # fmt: skip
    parser.add_argument(
        "--template", type=Path, default=TEMPLATES / "card.md", metavar="FILE",
        help="template of the card (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--details-template", type=Path, default=TEMPLATES / "details.md", metavar="FILE",
        help="template of the second page (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE",
        help=f"card, in Markdown; {details.NAME} is written beside it",
    )  # fmt: skip
    args = parser.parse_args()
    results = read_results(args.files, args.reports, args.measurements)
    compared = list(map(Compared.read, args.compared))
    about = args.about.covered(map(Coverage.read, args.coverages)) if args.coverages else args.about
    text = card.make(
        about,
        results,
        compared=compared,
        checkpoint_card=args.checkpoint_card,
        stamp=Stamp.read(args.toolchain),
        template=args.template,
    )
    second = details.make(
        about,
        results,
        compared=compared,
        others=list(map(Other.read, args.others)),
        template=args.details_template,
    )
    atomic.write_text(args.out.with_name(details.NAME), second)
    atomic.write_text(args.out, text)


def read_results(files: list[Path], reports: list[Path], measurements: list[Path]) -> list[Result]:
    """Each file with its report, and with the measurement that is named like the report.

    Raises DamagedError for a file that has changed since its report.
    """
    measured = {path.name: Measurement.read(path) for path in measurements}
    read = [Report.read(path) for path in reports]
    published.check(zip(files, read, strict=True))
    return [
        Result(
            report,
            measured.get(path.name.replace(".split.json", ".json")),
            split.read(file_names.first_file(file)),
        )
        for file, path, report in zip(files, reports, read, strict=True)
    ]


if __name__ == "__main__":
    cli.run(main)
