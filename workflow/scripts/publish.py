"""Upload results folders: every file on SHA256SUMS that the repository or bucket lacks.

example: publish.py --private results/qwen3.5-4b OWNER/Qwen3.5-4B-MTP-GGUF --dry-run
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from pathlib import Path

from mtpforge import cli, errors
from mtpforge.publish import access, bucket, upload
from mtpforge.s3.address import Address

DRY_RUN = "dry run: nothing was uploaded"


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
    if args.dry_run:
        preview_all([(Path(folder), repo, private) for folder, repo, private in targets])
        targets = []
    for folder, repo, private in targets:
        plan = upload.compare(Path(folder), repo, private)
        plan.show()
        if plan.missing:
            upload.upload(plan)
        done(plan, f": {upload.address(repo)}")
    for folder, url in args.s3:
        plan = bucket.compare(Path(folder), Address.parse(url))
        plan.show()
        if args.dry_run:
            print(f"{DRY_RUN}; {plan.preview}")
            continue
        if plan.missing:
            bucket.upload(plan)
        done(plan)


def preview_all(targets: list[tuple[Path, str, bool]]) -> None:
    """List what would be uploaded. Raises UploadError at the end if the Hub would refuse any."""
    refused = []
    for folder, repo, private in targets:
        try:
            preview(folder, repo, private)
        except errors.UploadError as error:
            refused.append(str(error))
    if refused:
        listed = "\n".join(refused)
        raise errors.UploadError(f"{listed}\nNothing was uploaded.")


def preview(folder: Path, repo: str, private: bool) -> None:
    """List what would be uploaded. Raises ForgeError, also if the Hub would refuse it."""
    refused, unasked = None, ""
    try:
        unasked = access.check(repo)
    except errors.UploadError as error:
        refused = error
    unanswered = refused or unasked  # so the Hub may not say what it has
    plan = upload.everything(folder, repo) if unanswered else upload.compare(folder, repo, private)
    plan.show()
    if refused:
        raise refused
    print(f"{DRY_RUN}; " + (f"not checked with the Hub: {unasked}" if unasked else plan.preview))


def done(plan: upload.UploadPlan, where: str = "") -> None:
    """Say what was uploaded, who can see it, and where."""
    what = f"uploaded {upload.count(plan.missing)}" if plan.missing else "has all files already"
    print(f"{plan.place}: {what}{where}")


if __name__ == "__main__":
    cli.run(main)
