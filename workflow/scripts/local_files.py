"""Record the sha256 of files that a user gives, and of the tensors in them, in one pass.

Rules compare the list of files; their records lie in the folder beside it.

example: local_files.py Qwen3.5-4B config.json model.safetensors --out record.json
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from pathlib import Path

from mtpforge import cli, local_files


def main() -> None:
    """Parse the command line and write the record."""
    parser = cli.parser(__doc__)
    parser.add_argument("folder", type=Path, help="folder of the files")
    parser.add_argument("files", nargs="+", metavar="FILE", help="names in the folder")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="list, as JSON")
    args = parser.parse_args()
    made = local_files.record(args.folder, args.files, args.out)
    print(f"{len(made.files)} files")


if __name__ == "__main__":
    cli.run(main)
