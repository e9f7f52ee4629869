"""Download only the MTP head of a checkpoint, as a small checkpoint.

example: fetch_head.py files.json --folder head/Qwen3.5-35B-A3B --out head.json
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from pathlib import Path

from mtpforge import cli, table
from mtpforge.hub import head
from mtpforge.hub.listing import Listing


def main() -> None:
    """Parse the command line and download."""
    parser = cli.parser(__doc__)
    parser.add_argument("listing", type=Path, metavar="LISTING.json", help="output of resolve.py")
    parser.add_argument(
        "--folder", type=Path, required=True, help="folder for the small checkpoint"
    )
    parser.add_argument(
        "--whole",
        type=Path,
        metavar="DIR",
        help="target folder of fetch.py: whole shards there are read instead of the Hub",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        help="record to write: sha256 and standing (verified, trusted on first use) of each "
        "tensor, as JSON",
    )
    args = parser.parse_args()
    record = head.fetch(Listing.read(args.listing), args.folder, args.whole)
    record.write(args.out)
    size = table.size(sum(tensor.bytes for tensor in record.tensors.values()))
    print(f"{len(record.tensors)} tensors, {size}")


if __name__ == "__main__":
    cli.run(main)
