"""Plan a quantization: the type of each tensor, and what decides its bytes; quantize.py --plan does it.

A table shows the types. The plan is the same where the work is.

example: quantize_plan.py Qwen3.5-4B-BF16.gguf --type IQ4_XS --head Q8_0 --out plan.json
"""

from pathlib import Path

from mtpforge import cli
from mtpforge.gguf import reader
from mtpforge.io import atomic
from mtpforge.io.text import read_json
from mtpforge.llama_cpp import programs
from mtpforge.quantize import plan
from mtpforge.quantize.llama_quantize import choose
from mtpforge.quantize.recipe import head_recipe, read_recipe


def main() -> None:
    """Parse the command line and plan."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "source", type=Path, metavar="IN.gguf", help="a BF16 GGUF, with or without a head"
    )
    parser.add_argument("--out", type=Path, required=True, help="the plan to write, a JSON file")
    parser.add_argument(
        "--digests",
        type=Path,
        metavar="FILE",
        help="sha256 of its tensors, as convert.py wrote them",
    )
    parser.add_argument(
        "--type", required=True, metavar="T", help="Q4_K_M, IQ4_XS, ...: see llama-quantize --help"
    )
    parser.add_argument(
        "--head",
        metavar="T",
        help="tensor type of the head (default: Q8_0, or the type of an unquantized file)",
    )
    parser.add_argument(
        "--head-tensors",
        type=Path,
        metavar="FILE",
        help="exceptions from --head, as YAML of pattern: type; the first match decides",
    )
    parser.add_argument(
        "--tensors",
        type=Path,
        metavar="FILE",
        help="YAML of pattern: type; the first match decides",
    )
    parser.add_argument(
        "--imatrix",
        type=Path,
        metavar="FILE",
        help="importance matrix, as of imatrix.py; its name is recorded",
    )
    parser.add_argument(
        "--bin",
        type=Path,
        default=programs.DEFAULT_BIN,
        help="llama-quantize's folder (default: %(default)s)",
    )
    parser.add_argument(
        "--threads", type=int, default=0, help="those that a quantization will have (default: all)"
    )
    parser.add_argument(
        "--pieces",
        type=Path,
        metavar="FILE",
        help="write in how many pieces it is best made on so many threads",
    )
    args = parser.parse_args()
    if args.head_tensors and not args.head:
        parser.error("--head-tensors needs --head")
    inputs = (args.source, args.digests, args.tensors, args.head_tensors, args.imatrix)
    atomic.refuse_overwriting(args.out, *inputs)
    source = reader.read(args.source)
    types = choose(
        source,
        args.type,
        head=head_recipe(args.head, read_recipe(args.head_tensors)) if args.head else (),
        recipe=read_recipe(args.tensors),
        imatrix=args.imatrix,
        bin_dir=args.bin,
    )
    digests = read_json(args.digests) if args.digests else reader.digests(args.source)
    made = plan.make(source, digests, types, args.type, args.imatrix, args.bin)
    if args.pieces:
        atomic.write_json(args.pieces, made.pieces(args.threads))
    made.write(args.out)


if __name__ == "__main__":
    cli.run(main)
