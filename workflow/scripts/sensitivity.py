"""Measure how much each group of tensors matters: the KL divergence if only it is quantized.

Each result is kept in a folder, so that a killed search goes on.

example: sensitivity.py BF16.gguf --logits text.logits --by class --keep results --out class.json
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from pathlib import Path

from mtpforge import cli
from mtpforge.gguf import split
from mtpforge.gguf.file_names import first_file
from mtpforge.io import atomic
from mtpforge.io.ranges import digest_of
from mtpforge.llama_cpp import programs
from mtpforge.quantize.piece_count import piece_number
from mtpforge.quantize.plan import toolchain_digest
from mtpforge.search import probes
from mtpforge.search.settings import CHUNKS


def main() -> None:
    """Parse the command line and measure."""
    parser = cli.parser(__doc__)
    parser.add_argument("source", type=Path, metavar="BF16.gguf", help="the unquantized GGUF")
    parser.add_argument(
        "--logits", type=Path, required=True, metavar="FILE",
        help=f"its logits on {CHUNKS} chunks of a text, from reference_logits.py",
    )  # fmt: skip
    parser.add_argument(
        "--by", choices=("class", "tensor"), default="class",
        help="try each class of tensors and each layer (default), or each tensor",
    )  # fmt: skip
    parser.add_argument("--imatrix", type=Path, metavar="FILE", help="importance matrix to use")
    parser.add_argument(
        "--keep", type=Path, required=True, metavar="FOLDER", help="folder of finished results"
    )
    parser.add_argument(
        "--inputs", type=Path, nargs="*", default=[], metavar="FILE",
        help="files that stand for model, text and matrix: kept results of others are not used"
        " (default: these themselves)",
    )  # fmt: skip
    parser.add_argument(
        "--piece", type=piece_number, default=(1, 1), metavar="I/N",
        help="try only a part of the groups, piece I of N; without it, all results that are not in"
        " --keep yet",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="the results, a JSON file")
    programs.add_options(parser)
    args = parser.parse_args()
    args.source = first_file(args.source)
    atomic.refuse_overwriting(args.out, args.source, args.logits, args.imatrix)
    llama = programs.from_options(args)
    inputs = args.inputs or [args.source, args.logits, *([args.imatrix] if args.imatrix else [])]
    search = probes.Search(
        split.read(args.source),
        logits=args.logits,
        matrix=args.imatrix,
        llama=llama,
        keep=args.keep,
        identity="".join([*map(digest_of, inputs), toolchain_digest(llama)]),
    )
    found = probes.measure(search, args.by, *args.piece)
    found.write(args.out)
    print(f"{len(found.kl_divergence)} groups of tensors")


if __name__ == "__main__":
    cli.run(main)
