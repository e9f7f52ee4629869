"""Split a GGUF into files of a limited size, named and cut as llama.cpp does; a file that fits stays in one piece.

example: split.py Qwen3.5-397B-A17B-Q4_K_M.gguf --max-size 48G --out Qwen3.5-397B-A17B-Q4_K_M
"""

from pathlib import Path

from mtpforge import cli, progress
from mtpforge.gguf.split import parse_size, split


def main() -> None:
    """Parse the command line and split."""
    parser = cli.parser(__doc__)
    parser.add_argument("source", type=Path, metavar="F.gguf")
    parser.add_argument(
        "--max-size",
        required=True,
        metavar="SIZE",
        help="of one file: megabytes or gigabytes, as 500M or 48G",
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="a folder of its own, which is replaced",
    )
    parser.add_argument(
        "--name",
        metavar="STEM",
        help="what the files' names begin with (default: the input's name)",
    )
    args = parser.parse_args()
    stem = args.name or args.source.name.removesuffix(".gguf")
    with progress.bar(stem) as show:
        files = split(args.source, args.out, stem, parse_size(args.max_size), show)
    for file in files:
        print(file)


if __name__ == "__main__":
    cli.run(main)
