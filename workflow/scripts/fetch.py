"""Download one file of a Hub repository, as a listing of resolve.py has it: gone on with where it stopped, and hashed.

example: fetch.py files.json model-00001-of-00002.safetensors --folder Qwen3.5-4B --out record.json
"""

from pathlib import Path

from mtpforge import cli
from mtpforge.hub import download
from mtpforge.hub.listing import Listing
from mtpforge.io import atomic


def main() -> None:
    """Parse the command line and fetch."""
    parser = cli.parser(__doc__)
    parser.add_argument("listing", type=Path, metavar="LISTING.json", help="what resolve.py wrote")
    parser.add_argument("name", help="which of its files")
    parser.add_argument(
        "--folder", type=Path, required=True, help="where it goes; what is there already is kept"
    )
    parser.add_argument(
        "--head",
        type=Path,
        metavar="FILE",
        help="record of fetch_head.py, if it is there: to be confirmed",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="the record: name, bytes and sha256, as JSON"
    )
    args = parser.parse_args()
    listing = Listing.read(args.listing)
    record = download.download(listing, args.name, args.folder, listing.companions(args.name))
    if args.head and args.head.exists() and args.name.endswith(".safetensors"):
        count = download.confirm_head(args.head, args.folder / args.name)
        print(f"{args.name}: {count} tensors of the head that was fetched by itself are confirmed")
    atomic.write_json(args.out, record)


if __name__ == "__main__":
    cli.run(main)
