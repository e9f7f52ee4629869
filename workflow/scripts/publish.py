"""Upload results folders: every file on SHA256SUMS that the repository or bucket lacks.

example: publish.py --private results/qwen3.5-4b OWNER/Qwen3.5-4B-MTP-GGUF --dry-run
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from pathlib import Path

from mtpforge import cli, errors
from mtpforge.publish import bucket, upload
from mtpforge.s3.address import Address


def main() -> None:
    """Parse the command line, show what is missing, and upload it."""
    parser = cli.parser(__doc__)
    for option in ("private", "public"):
        parser.add_argument(
            f"--{option}",
            nargs=2,
            action="append",
            default=[],
            metavar=("FOLDER", "OWNER/NAME"),
            help=f"upload this folder; a new repository is created as {option}",
        )
    parser.add_argument(
        "--s3",
        nargs=2,
        action="append",
        default=[],
        metavar=("FOLDER", "s3://BUCKET/FOLDER"),
        help="upload this folder to object storage, which needs `make s3`",
    )
    parser.add_argument("--dry-run", action="store_true", help="only list what would be uploaded")
    args = parser.parse_args()
    targets = [(*pair, True) for pair in args.private] + [(*pair, False) for pair in args.public]
    if not targets and not args.s3:
        raise errors.ConfigError(
            "nothing to upload: set `publish: {repo: OWNER/NAME-MTP-GGUF}` on a model under `build`"
        )
    for folder, repo, private in targets:
        plan = upload.compare(Path(folder), repo)
        plan.show()
        if plan.missing and not args.dry_run:
            print(f"{repo}: {upload.upload(plan, private)}")
    for folder, url in args.s3:
        plan = bucket.compare(Path(folder), Address.parse(url))
        plan.show()
        if plan.missing and not args.dry_run:
            bucket.upload(plan)
            print(f"{url}: uploaded {len(plan.missing)} files")


if __name__ == "__main__":
    cli.run(main)
