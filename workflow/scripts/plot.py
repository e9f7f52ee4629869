"""Draw what was measured of a model, as SVG that a phone shows well.

example: plot.py speed results/tiny-qwen3.5/measure/*.json --out speed.svg
"""

import json
from pathlib import Path

from mtpforge import cli, errors
from mtpforge.io import atomic
from mtpforge.report.figures import FIGURES, tensors


def main() -> None:
    """Parse the command line and draw."""
    parser = cli.parser(__doc__)
    parser.add_argument("figure", choices=[*FIGURES, "tensors"])
    parser.add_argument(
        "measurements",
        type=Path,
        nargs="+",
        help="of measure.py; for tensors, one report of verify.py",
    )
    parser.add_argument(
        "--file",
        type=Path,
        metavar="F.gguf",
        help="for tensors, the file, or the folder of a split one",
    )
    parser.add_argument("--out", type=Path, required=True, help="the picture, as SVG")
    args = parser.parse_args()
    found = [json.loads(path.read_text(encoding="utf-8")) for path in args.measurements]
    if args.figure != "tensors":
        picture = FIGURES[args.figure](found)
    elif args.file is None:
        raise errors.ConfigError("plot.py tensors: --file names the GGUF whose tensors are drawn")
    else:
        picture = tensors(args.file, found[0].get("errors", {}))
    atomic.write_text(args.out, picture.render())


if __name__ == "__main__":
    cli.run(main)
