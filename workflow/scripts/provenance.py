"""Write an in-toto statement on a verified file: its digest, configuration and all inputs.

example: provenance.py report.json --parameters '{}' --source materials.json \\
             --toolchain stamp.json --out statement.json
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

import argparse
from pathlib import Path

from mtpforge import cli
from mtpforge.io import atomic
from mtpforge.io.text import read_json
from mtpforge.llama_cpp.stamp import Stamp
from mtpforge.publish import provenance
from mtpforge.publish.provenance import Resource
from mtpforge.verify.report import Report


def main() -> None:
    """Parse the command line and write the statement."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "report", type=Path, metavar="REPORT.json", help="report of verify.py on the file"
    )
    parser.add_argument(
        "--parameters", type=cli.json_object, required=True, metavar="JSON",
        help="the file's part of the configuration",
    )  # fmt: skip
    parser.add_argument(
        "--source", type=Path, metavar="FILE",
        help="list of materials.py on the checkpoint, if the file has anything of it",
    )  # fmt: skip
    parser.add_argument(
        "--material", nargs="+", action="append", default=[], metavar=("JSON", "FILE"),
        help="another input and its files, as for materials.py, with `recorded`, as its "
        "option; repeatable",
    )  # fmt: skip
    parser.add_argument(
        "--toolchain", type=Path, required=True, metavar="FILE",
        help="stamp of llama.cpp's programs",
    )  # fmt: skip
    parser.add_argument(
        "--locks", type=Path, nargs="+", default=[], metavar="FILE", help="locked requirements"
    )
    parser.add_argument(
        "--code", type=Path, nargs="+", default=[], metavar="FILE",
        help="programs of the pipeline and their modules",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="statement, as JSON"
    )
    args = parser.parse_args()
    report = Report.read(args.report)
    made_of = dependencies(args, provenance.trunk(report))
    statement = provenance.statement(report.published, args.parameters, made_of)
    atomic.write_json(args.out, statement)


def dependencies(args: argparse.Namespace, trunk: list[Resource]) -> list[Resource]:
    """Everything that the file depends on: checkpoint, base, toolchain, locks and code."""
    found: list[Resource] = list(read_json(args.source)["materials"]) if args.source else []
    for text, *tracked in args.material:
        source = cli.json_object(text)
        recorded = source.pop("recorded", None)
        recorded = Path(recorded) if recorded else None
        found += provenance.materials(source, map(Path, tracked), recorded)
    found += trunk
    found += provenance.toolchain(Stamp.read(args.toolchain))
    found += provenance.locks(args.locks)
    return [*found, provenance.pipeline(args.code)]


if __name__ == "__main__":
    cli.run(main)
