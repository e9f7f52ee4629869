"""Plan a quantization: each tensor's type, and everything its bytes depend on.

Prints a table of the types. The plan changes only if the work does; `quantize.py --plan` runs it.

example: quantize_plan.py Qwen3.5-4B-BF16.gguf --type IQ4_XS --head Q8_0 --out plan.json
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from pathlib import Path

from mtpforge import cli, recorded_digests
from mtpforge.gguf import reader, split
from mtpforge.gguf.file_names import first_file
from mtpforge.io import atomic
from mtpforge.io.text import read_json
from mtpforge.llama_cpp import programs
from mtpforge.quantize import mixture, request
from mtpforge.quantize.llama_quantize import choose_types
from mtpforge.quantize.piece_count import piece_count
from mtpforge.quantize.plan import make_plan


def main() -> None:
    """Parse the command line and plan."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "source",
        type=Path,
        metavar="IN.gguf",
        help="a BF16 GGUF, with or without a head; if split, its first file or folder",
    )
    parser.add_argument("--out", type=Path, required=True, help="the plan to write, a JSON file")
    parser.add_argument(
        "--digests",
        type=Path,
        metavar="FILE",
        help="sha256 of the source's tensors, as convert.py writes them (default: hash it)",
    )
    recorded_digests.add_option(parser, "--imatrix-recorded", "--imatrix")
    parser.add_argument("--type", required=True, metavar="T", help=request.TYPE_HELP)
    request.add_options(parser)
    programs.add_options(parser)
    parser.add_argument(
        "--pieces",
        type=Path,
        metavar="FILE",
        help="write the best number of pieces on --threads threads",
    )
    parser.add_argument(
        "--machines",
        type=int,
        default=1,
        metavar="N",
        help="how many machines like this one share the pieces (default: 1)",
    )
    args = parser.parse_args()
    args.source = first_file(args.source)
    if args.head_tensors and not args.head:
        parser.error("--head-tensors needs --head")
    inputs = (args.source, args.digests, args.tensors, args.head_tensors, args.imatrix)
    atomic.refuse_overwriting(args.out, *inputs)
    llama = programs.from_options(args)
    asked = request.from_options(args)
    source = split.joined(recorded_digests.shards(args.source, args.digests))
    recorded_digests.check_whole(args.imatrix, args.imatrix_recorded)
    types = choose_types(source, asked, llama)
    digests = read_json(args.digests) if args.digests else reader.digests_of(source)
    digests.pop(recorded_digests.FREED, None)
    plan = make_plan(source, digests, types=types, request=asked, llama=llama)
    if args.pieces:
        atomic.write_json(args.pieces, piece_count(plan, llama, args.machines))
    plan.write(args.out)
    print(mixture.total(source, types))


if __name__ == "__main__":
    cli.run(main)
