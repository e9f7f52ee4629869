"""Download one file of a Hub repository, from the listing that resolve.py wrote.

Resumes an interrupted download, and checks the digest.

example: fetch.py files.json model-00001-of-00002.safetensors --folder DIR --out record.json
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from pathlib import Path

from mtpforge import cli, table
from mtpforge.hub import download, sparse
from mtpforge.hub.listing import Listing


def main() -> None:
    """Parse the command line and download."""
    parser = cli.parser(__doc__)
    parser.add_argument("listing", type=Path, metavar="LISTING.json", help="output of resolve.py")
    parser.add_argument("name", help="file to download")
    parser.add_argument(
        "--folder", type=Path, required=True, help="target folder; complete files there are kept"
    )
    parser.add_argument(
        "--head",
        type=Path,
        metavar="FILE",
        help="record of fetch_head.py, if there is one: compare its tensors with this shard",
    )
    parser.add_argument(
        "--sparse",
        action="store_true",
        help="of a shard only header and small tensors: its conversion downloads it (lean: shards)",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="record to write: name, bytes and sha256, as JSON"
    )
    args = parser.parse_args()
    listing = Listing.read(args.listing)
    has_head = args.head is not None and args.head.exists()
    is_sparse = args.sparse and not has_head
    if is_sparse and sparse.is_possible(listing, args.name, args.folder):
        record = sparse.lay_out(listing, args.name, args.folder)
        record.write(args.out)
        print(f"{table.size(record.bytes)}, of which conversion downloads the large tensors")
        return
    record = download.download(
        listing, args.name, folder=args.folder, together=listing.companions(args.name)
    )
    if has_head and args.name.endswith(".safetensors"):
        count = download.confirm_head(args.head, record)
        print(f"{args.name}: confirms {count} tensors of the head that was downloaded on its own")
    record.write(args.out)
    joined = f", joined from {len(record.parts)} parts" if record.parts else ""
    print(f"{table.size(record.bytes)}{joined}")


if __name__ == "__main__":
    cli.run(main)
