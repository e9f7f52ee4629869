"""Check a results folder, downloaded or local: digests, provenance, and whether each GGUF opens.

example: check_results.py Qwen3.5-4B-MTP-GGUF
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from pathlib import Path

from mtpforge import cli, errors
from mtpforge.publish.sums import SUMS, check, read_sums


def main() -> None:
    """Parse the command line and check; exit code 1 and the problems if there are any."""
    parser = cli.parser(__doc__)
    parser.add_argument("folder", type=Path, help="folder that contains SHA256SUMS")
    args = parser.parse_args()
    if problems := check(args.folder):
        raise errors.VerificationError(f"{args.folder}: {'; '.join(problems)}")
    count = len(read_sums(args.folder / SUMS))
    print(f"{args.folder}: all {count} files match {SUMS}")


if __name__ == "__main__":
    cli.run(main)
