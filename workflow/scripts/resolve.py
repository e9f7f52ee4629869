"""List one commit of a Hub repository: files with sizes and digests, tensors with byte ranges.

example: resolve.py Qwen/Qwen3.5-4B --revision 851bf6e806efd8d0a36b00ddf55e13ccb7b8cd0a --out F.json
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from collections.abc import Iterable
from pathlib import Path

from mtpforge import cli, errors, progress, table
from mtpforge.checkpoint.checkpoint import Checkpoint, Outline
from mtpforge.convert import convertible
from mtpforge.hub import download
from mtpforge.hub.listing import Listing
from mtpforge.hub.resolve import list_commit


def main() -> None:
    """Parse the command line and list."""
    parser = cli.parser(__doc__)
    parser.add_argument("repo", help="repository, as OWNER/NAME")
    parser.add_argument(
        "--revision", required=True, metavar="COMMIT", help="full commit hash (40 hex digits)"
    )
    parser.add_argument(
        "--convert",
        nargs="*",
        default=[],
        metavar="CONVERTER:PART",
        help="refuse a checkpoint if this converter (mtpforge, llama.cpp) cannot make this "
        "part (all, trunk, head, draft, mmproj), before anything is downloaded",
    )
    for option, role in (
        ("--heads", "that has a head to draft for this one"),
        ("--trunks", "that this one's head is to draft for"),
    ):
        parser.add_argument(
            option, nargs="*", type=Path, default=[], metavar="CHECKPOINT",
            help=f"folder or listing of another checkpoint {role}: refuse this one if it cannot",
        )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="listing to write, as JSON")
    args = parser.parse_args()
    # Snakemake deletes the output before a job runs again, so a second copy is kept.
    kept = args.out.with_name(f".{args.out.name}")
    try:
        listing = list_commit(args.repo, args.revision)
        check(listing, args.convert)
        check_pairs(listing, args.heads, args.trunks)
    except errors.DownloadError as error:
        if not kept.exists():
            raise
        listing = Listing.read(kept)  # a commit does not change
        if (listing.repo, listing.revision) != (args.repo, args.revision):
            raise
        progress.say(f"{error}: using an earlier listing of the same commit")
    listing.write(kept)
    listing.write(args.out)
    size = table.size(sum(file.bytes for file in listing.files.values()))
    print(f"{len(listing.files)} files, {size}")


def check(listing: Listing, conversions: Iterable[str]) -> None:
    """Check the plans of conversions, as CONVERTER:PART. Raises CheckpointError, DownloadError."""
    for conversion in conversions:
        converter, _, part = conversion.partition(":")
        outline = download.outline(listing)
        try:
            convertible.check(outline, converter, part)
        except errors.CheckpointError as error:
            raise convertible.explain(error, outline, listing.label) from None


def check_pairs(listing: Listing, heads: Iterable[Path], trunks: Iterable[Path]) -> None:
    """Check that heads of other checkpoints can draft for this one, and its own for other trunks.

    Raises CheckpointError, DownloadError.
    """
    for path in heads:
        convertible.check_pair(download.outline(listing), _open(path))
    for path in trunks:
        convertible.check_pair(_open(path), download.outline(listing))


def _open(path: Path) -> Outline:
    """Open a checkpoint by its folder or its listing."""
    return Checkpoint(path) if path.is_dir() else download.outline(Listing.read(path))


if __name__ == "__main__":
    cli.run(main)
