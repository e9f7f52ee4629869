"""Upload folders of results to the Hub, each with all that its SHA256SUMS names; what is there already is not sent again.

example: publish.py --private results/qwen3.5-4b OWNER/Qwen3.5-4B-MTP-GGUF --dry-run
"""

from pathlib import Path

from mtpforge import cli, errors
from mtpforge.publish import upload


def main() -> None:
    """Parse the command line, say what goes where, and upload it."""
    parser = cli.parser(__doc__)
    pair = ("FOLDER", "OWNER/NAME")
    parser.add_argument(
        "--private",
        nargs=2,
        action="append",
        default=[],
        metavar=pair,
        help="a repository that is made is private",
    )
    parser.add_argument(
        "--public",
        nargs=2,
        action="append",
        default=[],
        metavar=pair,
        help="a repository that is made is public",
    )
    parser.add_argument("--dry-run", action="store_true", help="only say what would be uploaded")
    args = parser.parse_args()
    targets = [(*pair, True) for pair in args.private] + [(*pair, False) for pair in args.public]
    if not targets:
        raise errors.ConfigError(
            "nothing to publish: give a model under `build` a `publish: {repo: OWNER/NAME-MTP-GGUF}`"
        )
    for folder, repo, private in targets:
        plan = upload.plan(Path(folder), repo)
        upload.tell(plan)
        if plan.missing and not args.dry_run:
            print(f"{repo}: {upload.upload(plan, private)}")


if __name__ == "__main__":
    cli.run(main)
