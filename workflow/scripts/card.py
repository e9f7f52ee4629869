"""Write the model card of a folder of results from its reports and measurements.

example: card.py --files F.gguf --reports report.json --about '{"name": "F"}' --toolchain stamp.json --out README.md
"""

import json
from pathlib import Path

from mtpforge import cli
from mtpforge.gguf import names, reader
from mtpforge.io import atomic
from mtpforge.io.text import read_json
from mtpforge.publish.card import make
from mtpforge.publish.result import Result

TEMPLATE = Path(__file__).resolve().parents[1] / "templates" / "card.md"


def main() -> None:
    """Parse the command line and write the card."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--files", type=Path, nargs="+", required=True, help="the GGUFs, or folders of split ones"
    )
    parser.add_argument(
        "--reports",
        type=Path,
        nargs="+",
        required=True,
        help="of verify.py, on each, in the same order",
    )
    parser.add_argument(
        "--measurements",
        type=Path,
        nargs="*",
        default=[],
        help="of measure.py, named as the reports are",
    )
    parser.add_argument(
        "--about",
        type=json.loads,
        required=True,
        metavar="JSON",
        help="the model's part of the configuration",
    )
    parser.add_argument(
        "--checkpoint-card",
        type=Path,
        default=Path("none"),
        metavar="FILE",
        help="the checkpoint's, if it has one",
    )
    parser.add_argument(
        "--toolchain",
        type=Path,
        required=True,
        metavar="FILE",
        help="the stamp of llama.cpp's programs",
    )
    parser.add_argument(
        "--template", type=Path, default=TEMPLATE, metavar="FILE", help="(default: %(default)s)"
    )
    parser.add_argument("--out", type=Path, required=True, help="the card, in Markdown")
    args = parser.parse_args()
    measured = {path.name: read_json(path) for path in args.measurements}
    results = [
        Result(
            read_json(report),
            measured.get(report.name.replace(".split.json", ".json")),
            reader.read(names.first_of(file)),
        )
        for file, report in zip(args.files, args.reports, strict=True)
    ]
    atomic.write_text(
        args.out,
        make(args.about, results, args.checkpoint_card, read_json(args.toolchain), args.template),
    )


if __name__ == "__main__":
    cli.run(main)
