"""Download a checkpoint, or what was uploaded, from object storage; needs `make s3`.

A second run continues, and refuses what has changed in the bucket since the first one. Afterwards
write `source: {path: FOLDER}` in config.yaml.

example: download.py s3://my-bucket/my-finetune --out checkpoints/my-finetune
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from pathlib import Path

from mtpforge import cli, table
from mtpforge.s3.address import Address
from mtpforge.s3.download import ENDING, download


def main() -> None:
    """Parse the command line and download."""
    parser = cli.parser(__doc__)
    parser.add_argument("url", metavar="s3://BUCKET/FOLDER", help="folder to download")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER",
        help=f"target folder; FOLDER{ENDING} beside it lists the files with size, ETag and sha256",
    )  # fmt: skip
    args = parser.parse_args()
    files = download(Address.parse(args.url), args.out).files
    print(f"{len(files)} files, {table.size(sum(each.bytes for each in files.values()))}")


if __name__ == "__main__":
    cli.run(main)
