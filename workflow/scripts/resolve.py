"""List what one commit of a Hub repository holds: files with sizes and digests, tensors with their byte ranges.

example: resolve.py Qwen/Qwen3.5-4B --revision 851bf6e806efd8d0a36b00ddf55e13ccb7b8cd0a --out files.json
"""

import sys
from pathlib import Path

from mtpforge import cli, errors
from mtpforge.hub import download
from mtpforge.hub.listing import Listing


def main() -> None:
    """Parse the command line and list."""
    parser = cli.parser(__doc__)
    parser.add_argument("repo", help="repository, as OWNER/NAME")
    parser.add_argument(
        "--revision", required=True, metavar="COMMIT", help="the full commit, 40 hex digits"
    )
    parser.add_argument("--out", type=Path, required=True, help="the listing, as JSON")
    args = parser.parse_args()
    kept = args.out.with_name(
        f".{args.out.name}"
    )  # Snakemake deletes the output of a job that fails, or runs again
    try:
        listing = download.resolve(args.repo, args.revision)
    except errors.DownloadError as error:
        if not kept.exists():
            raise
        listing = Listing.read(kept)  # a commit does not change
        if (listing.repo, listing.revision) != (args.repo, args.revision):
            raise
        print(f"{error}: an earlier listing of the same commit serves", file=sys.stderr)
    listing.write(kept)
    listing.write(args.out)


if __name__ == "__main__":
    cli.run(main)
