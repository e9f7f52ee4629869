"""Compare a file whose types were found with llama.cpp's own mixture of its size.

Makes the latter, with the same head and importance matrix, and measures its KL divergence, unless
--stock has that. Without --measurement there is nothing to compare, and the result says so.

example: compare_stock.py BF16.gguf --file found.gguf --about found.json
         --measurement found-measured.json --reference-logits reference.logits --head Q8_0
         --out compared.json
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

import argparse
from pathlib import Path

from mtpforge import cli, recorded_digests
from mtpforge.gguf.file_names import first_file
from mtpforge.io import atomic
from mtpforge.llama_cpp import programs
from mtpforge.measure import perplexity
from mtpforge.measure.measurement import Measurement
from mtpforge.quantize import request
from mtpforge.quantize.llama_quantize import quantize
from mtpforge.search.compared import Compared, Stock
from mtpforge.search.found import Found


def main() -> None:
    """Parse the command line and compare."""
    parser = cli.parser(__doc__)
    parser.add_argument("source", type=Path, metavar="BF16.gguf", help="the unquantized GGUF")
    parser.add_argument(
        "--about", type=Path, required=True, metavar="FILE", help="what allocate.py wrote"
    )
    parser.add_argument("--file", required=True, metavar="NAME", help="the file's name")
    parser.add_argument(
        "--measurement", type=Path, metavar="FILE", help="what measure.py wrote of the file"
    )
    parser.add_argument(
        "--reference-logits", type=Path, metavar="FILE",
        help="the logits that it was measured with",
    )  # fmt: skip
    parser.add_argument(
        "--stock", type=Path, metavar="FILE",
        help="what measure.py wrote of the mixture, if that is made anyway",
    )  # fmt: skip
    request.add_options(parser)
    recorded_digests.add_option(parser, "--logits-recorded", "--reference-logits")
    recorded_digests.add_option(parser, "--imatrix-recorded", "--imatrix")
    programs.add_options(parser)
    parser.add_argument("--out", type=Path, required=True, help="the result, a JSON file")
    args = parser.parse_args()
    args.source = first_file(args.source)
    atomic.refuse_overwriting(args.out, args.source, args.reference_logits, args.imatrix)
    recorded_digests.check_whole(args.reference_logits, args.logits_recorded)
    recorded_digests.check_whole(args.imatrix, args.imatrix_recorded)
    about = Found.read(args.about)
    moved = Measurement.read(args.measurement).kl_divergence if args.measurement else None
    compared = Compared(
        file=args.file,
        bytes=about.bytes,
        sensitivity=about.sensitivity,
        mixture=about.mixture,
        head=about.head,
        kl_divergence=moved,
        stock=find_stock(args, about.stock) if about.stock and moved else None,
    )
    compared.write(args.out)
    print(compared.verdict)


def find_stock(args: argparse.Namespace, kind: str) -> Stock:
    """The file of a type, from its measurement if there is one."""
    measured = Measurement.read(args.stock) if args.stock else None
    if measured and measured.kl_divergence:
        return Stock(type=kind, bytes=measured.bytes, kl_divergence=measured.kl_divergence)
    return make_stock(args, kind)


def make_stock(args: argparse.Namespace, kind: str) -> Stock:
    """Make the file of a type in a scratch folder, and measure it."""
    args.type = kind
    asked = request.from_options(args)
    llama = programs.from_options(args)
    with atomic.scratch_folder(args.out) as folder:
        made = folder / "stock.gguf"
        quantize(args.source, made, asked, llama)
        _, moved = perplexity.against_reference(made, args.reference_logits, llama)
        return Stock(type=kind, bytes=made.stat().st_size, kl_divergence=moved)


if __name__ == "__main__":
    cli.run(main)
