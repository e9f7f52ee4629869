"""List what is published of a folder of results, with the sha256 of each file; those that were verified are not read again.

example: sums.py results/qwen3.5-4b --reports results/qwen3.5-4b/reports/*.json --others results/qwen3.5-4b/README.md
"""

from pathlib import Path

from mtpforge import cli
from mtpforge.publish.sums import SUMS, collect, surplus, write_sums


def main() -> None:
    """Parse the command line and write the list."""
    parser = cli.parser(__doc__)
    parser.add_argument("folder", type=Path, help="the folder of results")
    parser.add_argument(
        "--reports",
        type=Path,
        nargs="+",
        required=True,
        help="of verify.py, on the files that are published",
    )
    parser.add_argument(
        "--others",
        type=Path,
        nargs="*",
        default=[],
        help="what is published beside them: card, statements",
    )
    args = parser.parse_args()
    sums = collect(args.folder, args.reports, args.others)
    write_sums(args.folder / SUMS, sums)
    for name in surplus(args.folder, sums):
        print(
            f"{args.folder / name}: is not asked for any more and will not be published: delete it"
        )


if __name__ == "__main__":
    cli.run(main)
