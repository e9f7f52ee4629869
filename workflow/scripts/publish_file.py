"""Upload one verified file before the rest of its folder, unless it is there by its sha256.

Writes a receipt once the repository or bucket reports the sha256 of what arrived.

example: publish_file.py results/qwen3.5-4b/reports/Qwen3.5-4B-Q8_0.json \\
             --private OWNER/Qwen3.5-4B-MTP-GGUF --out receipt.json
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from argparse import Namespace
from pathlib import Path

from mtpforge import cli, table
from mtpforge.publish import bucket, receipts, upload
from mtpforge.publish.sums import Sums
from mtpforge.s3.address import Address
from mtpforge.verify.report import Report


def main() -> None:
    """Parse the command line, and upload what is missing."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "report", type=Path, metavar="REPORT.json",
        help="report of verify.py, in `reports/` of the results folder",
    )  # fmt: skip
    where = parser.add_mutually_exclusive_group(required=True)
    for option in ("private", "public"):
        where.add_argument(
            f"--{option}",
            metavar="OWNER/NAME",
            help=f"upload to this repository; a new one is created as {option}",
        )
    where.add_argument("--s3", metavar="s3://BUCKET/FOLDER", help="upload to object storage")
    parser.add_argument(
        "--stand-in", action="store_true", help="keep the header, so that the file can be deleted"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="receipt, as JSON")
    args = parser.parse_args()
    folder, report = args.report.parent.parent, Report.read(args.report)
    sent = send(args, folder, {name: digest for name, _, digest in report.published})
    if args.stand_in:
        receipts.write_stand_in(folder, report)
    place = str(args.private or args.public or Address.parse(args.s3))
    receipts.Receipt(place=place, files=receipts.shards(report)).write(args.out)
    what = f"uploaded {table.size(report.bytes)}" if sent else "it was there already"
    print(f"{place}: {report.file}: {what}")


def send(args: Namespace, folder: Path, files: Sums) -> int:
    """Upload the files of a report; how many were missing. Raises ForgeError."""
    if args.s3:
        return bucket.send(folder, Address.parse(args.s3), files)
    repo = args.private or args.public
    return upload.send(folder, repo, files, private=bool(args.private))


if __name__ == "__main__":
    cli.run(main)
