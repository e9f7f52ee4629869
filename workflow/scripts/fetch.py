"""Download a checkpoint from the Hugging Face Hub, pinned to a commit: only what conversion needs, and hashed.

example: fetch.py Qwen/Qwen3.5-4B --revision 851bf6e806efd8d0a36b00ddf55e13ccb7b8cd0a --folder Qwen3.5-4B --out manifest.json
"""

import argparse
from pathlib import Path

from mtpforge import atomic, errors, hub


def main() -> None:
    """Parse the command line and fetch."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repo", help="repository, as OWNER/NAME")
    parser.add_argument("--revision", required=True, metavar="COMMIT", help="the full commit, 40 hex digits")
    parser.add_argument("--folder", type=Path, required=True, help="where the files go; what is there already is kept")
    parser.add_argument("--out", type=Path, required=True, help="the manifest, written when all files are there")
    args = parser.parse_args()
    atomic.write_json(args.out, hub.fetch(args.repo, args.revision, args.folder))


if __name__ == "__main__":
    errors.run(main)
