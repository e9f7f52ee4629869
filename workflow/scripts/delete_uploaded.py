"""Delete a file that was uploaded, unless another one has its name by now.

example: delete_uploaded.py results/qwen3.5-4b/work/uploaded/Qwen3.5-4B-Q8_0.json \\
             results/qwen3.5-4b/Qwen3.5-4B-Q8_0.gguf
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

import shutil
from pathlib import Path

from mtpforge import cli
from mtpforge.publish import receipts


def main() -> None:
    """Parse the command line, check what would be deleted, and delete it."""
    parser = cli.parser(__doc__)
    parser.add_argument("receipt", type=Path, metavar="RECEIPT", help="what publish_file.py wrote")
    parser.add_argument("file", type=Path, help="the file, or the folder of a split one")
    parser.add_argument(
        "also", type=Path, nargs="*", metavar="OTHER", help="intermediate files to delete with it"
    )
    args = parser.parse_args()
    receipts.check_uploaded(args.receipt, args.file)
    for path in (args.file, *args.also):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    cli.run(main)
