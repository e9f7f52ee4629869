"""Say what an importance matrix has seen of a model: tensors without a row, experts never chosen.

example: imatrix_coverage.py Qwen3.5-35B-A3B-BF16.gguf --imatrix imatrix.gguf --out coverage.json
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from pathlib import Path

from mtpforge import cli
from mtpforge.gguf import split
from mtpforge.gguf.file_names import first_file
from mtpforge.io import atomic
from mtpforge.quantize.coverage import coverage


def main() -> None:
    """Parse the command line, and print and write the coverage."""
    parser = cli.parser(__doc__)
    parser.add_argument("source", type=Path, metavar="BF16.gguf", help="the unquantized GGUF")
    parser.add_argument(
        "--imatrix", type=Path, required=True, metavar="FILE", help="the importance matrix"
    )
    parser.add_argument("--out", type=Path, required=True, help="the result, a JSON file")
    args = parser.parse_args()
    source = first_file(args.source)
    atomic.refuse_overwriting(args.out, source, args.imatrix)
    found = coverage(args.imatrix, split.read(source))
    found.write(args.out)
    print(*found.sentences, sep="\n")


if __name__ == "__main__":
    cli.run(main)
