"""Give a GGUF that lacks one a multi-token-prediction head; all its other tensors stay byte for byte.

Of a base in several files, give the first, X-00001-of-0000N.gguf. --out is then one F.gguf, or a
folder for as many files.

example: inject.py Qwen3.5-4B-Q4_K_M.gguf --head Qwen3.5-4B --head-type Q8_0 --out with-head.gguf
"""

from pathlib import Path

from mtpforge import cli
from mtpforge.gguf.names import gguf_files
from mtpforge.inject import inject
from mtpforge.io import atomic
from mtpforge.llama_cpp import programs
from mtpforge.quantize.recipe import head_recipe, read_recipe


def main() -> None:
    """Parse the command line and inject."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "base", type=Path, metavar="BASE.gguf", help="the quantization without a head"
    )
    parser.add_argument(
        "--head",
        type=Path,
        required=True,
        metavar="HEAD",
        help="a GGUF that has the head, or the checkpoint's folder",
    )
    parser.add_argument(
        "--head-type",
        metavar="T",
        help="tensor type of the head, such as Q8_0 (default: the types in HEAD)",
    )
    parser.add_argument(
        "--head-tensors",
        type=Path,
        metavar="FILE",
        help="exceptions from --head-type, as YAML of pattern: type; the first match decides",
    )
    parser.add_argument(
        "--replace-head", action="store_true", help="of a base that has another head, take it away"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="the GGUF to write, or a folder for a split base"
    )
    parser.add_argument(
        "--digests",
        type=Path,
        metavar="FILE",
        help="first write the sha256 of each tensor, of the base and of the head",
    )
    parser.add_argument(
        "--bin",
        type=Path,
        default=programs.DEFAULT_BIN,
        help="where llama-quantize is (default: %(default)s)",
    )
    args = parser.parse_args()
    if args.head_tensors and not args.head_type:
        parser.error("--head-tensors needs --head-type")
    exceptions = read_recipe(args.head_tensors)
    types = head_recipe(args.head_type, exceptions) if args.head_type else ()
    inputs = [
        given.with_name(name) for given in (args.base, args.head) for name in gguf_files(given.name)
    ]
    for out in filter(None, (args.out, args.digests)):
        atomic.refuse_overwriting(out, *inputs)
    inject.inject(
        args.base,
        args.head,
        args.out,
        head_type=types,
        bin_dir=args.bin,
        replace_head=args.replace_head,
        digests=args.digests,
    )


if __name__ == "__main__":
    cli.run(main)
