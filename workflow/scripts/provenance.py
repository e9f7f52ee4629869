"""Write what a verified file is made of as an in-toto statement: its digest, the configuration, and the digests of all inputs.

example: provenance.py report.json --parameters '{}' --source files.json --toolchain stamp.json --out statement.json
"""

import json
from pathlib import Path

from mtpforge import cli
from mtpforge.io import atomic
from mtpforge.io.text import read_json
from mtpforge.publish import provenance, sums


def main() -> None:
    """Parse the command line and write the statement."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "report", type=Path, metavar="REPORT.json", help="what verify.py wrote of the file"
    )
    parser.add_argument(
        "--parameters",
        type=json.loads,
        required=True,
        metavar="JSON",
        help="its part of the configuration",
    )
    parser.add_argument(
        "--source",
        type=Path,
        required=True,
        metavar="FILE",
        help="what materials.py wrote of the checkpoint",
    )
    parser.add_argument(
        "--material",
        nargs="+",
        action="append",
        default=[],
        metavar=("JSON", "FILE"),
        help="what else was used, as materials.py",
    )
    parser.add_argument(
        "--toolchain",
        type=Path,
        required=True,
        metavar="FILE",
        help="the stamp of llama.cpp's programs",
    )
    parser.add_argument(
        "--locks", type=Path, nargs="+", default=[], metavar="FILE", help="locked requirements"
    )
    parser.add_argument(
        "--code",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="the programs, with their modules",
    )
    parser.add_argument("--out", type=Path, required=True, help="the statement, as JSON")
    args = parser.parse_args()
    report = read_json(args.report)
    dependencies = list(read_json(args.source)["materials"])
    for source, *evidence in args.material:
        dependencies += provenance.materials(json.loads(source), map(Path, evidence))
    dependencies += [*provenance.trunk(report), *provenance.toolchain(args.toolchain)]
    dependencies += [*provenance.locks(args.locks), provenance.pipeline(args.code)]
    atomic.write_json(
        args.out, provenance.statement(sums.files_of(report), args.parameters, dependencies)
    )


if __name__ == "__main__":
    cli.run(main)
