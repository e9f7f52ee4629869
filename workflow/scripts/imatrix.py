"""Compute an importance matrix with llama-imatrix: what a text makes of a model's trunk; quantize.py --imatrix takes it.

example: imatrix.py Qwen3.5-4B-BF16.gguf --text calibration.txt --out imatrix.gguf
"""

from pathlib import Path

from mtpforge import cli
from mtpforge.io import atomic
from mtpforge.llama_cpp import programs
from mtpforge.quantize import imatrix


def main() -> None:
    """Parse the command line and compute."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "model", type=Path, metavar="IN.gguf", help="a BF16 GGUF, with or without a head"
    )
    parser.add_argument(
        "--text", type=Path, required=True, help="plain text like that which the model will see"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="the importance matrix to write, a GGUF"
    )
    parser.add_argument(
        "--threads", type=int, default=0, help="threads of llama-imatrix (default: all)"
    )
    parser.add_argument(
        "--bin", type=Path, default=programs.DEFAULT_BIN, help="where it is (default: %(default)s)"
    )
    parser.add_argument("--log", type=Path, metavar="FILE", help="keep all that llama-imatrix says")
    args = parser.parse_args()
    atomic.refuse_overwriting(args.out, args.model, args.text)
    imatrix.compute(args.model, args.text, args.out, args.threads, args.bin, args.log)


if __name__ == "__main__":
    cli.run(main)
