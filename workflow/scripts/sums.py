"""Write SHA256SUMS, the list of all published files of a results folder.

Digests of verified GGUFs come from their reports; only files that changed since are hashed.

example: sums.py results/qwen3.5-4b --reports results/qwen3.5-4b/reports/*.json \\
             --others results/qwen3.5-4b/README.md
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from pathlib import Path

from mtpforge import cli, recorded_digests
from mtpforge.progress import say
from mtpforge.publish.sums import SUMS, collect, shown_pictures, unlisted, write_sums


def main() -> None:
    """Parse the command line and write the list."""
    parser = cli.parser(__doc__)
    parser.add_argument("folder", type=Path, help="results folder")
    parser.add_argument(
        "--reports", type=Path, nargs="+", required=True, metavar="FILE",
        help="reports of verify.py on the files to publish",
    )  # fmt: skip
    parser.add_argument(
        "--others", type=Path, nargs="*", default=[], metavar="FILE",
        help="other files to publish: card, measurements, provenance",
    )  # fmt: skip
    parser.add_argument(
        "--pictures", type=Path, nargs="*", default=[], metavar="FILE",
        help="figures, of which those in the card are published",
    )  # fmt: skip
    parser.add_argument(
        "--matrices", type=Path, nargs="*", default=[], metavar="FILE",
        help="files of publish_imatrix.py with the sha256 of importance matrices to publish",
    )  # fmt: skip
    args = parser.parse_args()
    shown = shown_pictures(args.folder, args.pictures)
    matrices = {args.folder / f"{digest.stem}.gguf": digest for digest in args.matrices}
    for matrix, digest in matrices.items():
        recorded_digests.check_whole(matrix, digest)
    sums = collect(args.folder, args.reports, [*args.others, *shown, *matrices])
    write_sums(args.folder / SUMS, sums)
    for name in unlisted(args.folder, sums):
        text = "no longer configured, so it is not published: delete it"
        say(f"warning: {args.folder / name}: {text}")
    print(f"{len(sums)} files")


if __name__ == "__main__":
    cli.run(main)
