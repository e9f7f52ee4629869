"""Check a folder of results, downloaded or not, by what lies in it: sums, statements, and whether each GGUF opens.

example: check_results.py Qwen3.5-4B-MTP-GGUF
"""

from pathlib import Path

from mtpforge import cli, errors, progress
from mtpforge.publish import sums


def main() -> None:
    """Parse the command line and check; exit code 1, with the names of what is wrong, where something is."""
    parser = cli.parser(__doc__)
    parser.add_argument("folder", type=Path, help="the folder, with its SHA256SUMS")
    args = parser.parse_args()
    with progress.bar(args.folder.name) as show:
        problems = sums.check(args.folder, show)
    if problems:
        raise errors.VerificationError(f"{args.folder}: {'; '.join(problems)}")
    print(
        f"{args.folder}: all {len(sums.read_sums(args.folder / sums.SUMS))} files are as they were published"
    )


if __name__ == "__main__":
    cli.run(main)
