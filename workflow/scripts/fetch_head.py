"""Download the multi-token-prediction head of a checkpoint, and of its weights nothing else, as a small checkpoint of its own.

example: fetch_head.py files.json --folder head/Qwen3.5-35B-A3B --out head.json
"""

from pathlib import Path

from mtpforge import cli
from mtpforge.hub import head
from mtpforge.hub.listing import Listing
from mtpforge.io import atomic


def main() -> None:
    """Parse the command line and fetch."""
    parser = cli.parser(__doc__)
    parser.add_argument("listing", type=Path, metavar="LISTING.json", help="what resolve.py wrote")
    parser.add_argument(
        "--folder", type=Path, required=True, help="where the small checkpoint goes"
    )
    parser.add_argument(
        "--whole",
        type=Path,
        metavar="DIR",
        help="where fetch.py puts whole shards: those there are read instead",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="the record: sha256 and standing of each tensor, as JSON",
    )
    args = parser.parse_args()
    atomic.write_json(args.out, head.fetch(Listing.read(args.listing), args.folder, args.whole))


if __name__ == "__main__":
    cli.run(main)
