"""Inject a multi-token-prediction head into a GGUF; other tensors are copied byte for byte.

example: inject.py Qwen3.5-4B-Q4_K_M.gguf --head Qwen3.5-4B --head-type Q8_0 --out with-head.gguf

For a split base, name its first file, X-00001-of-0000N.gguf. --out is then one file F.gguf, or a
folder to write the same number of files to.
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

import argparse
from pathlib import Path

from mtpforge import cli, recorded_digests, table
from mtpforge.convert import norm_shift
from mtpforge.gguf.file_names import gguf_files
from mtpforge.inject.inject import Options, inject
from mtpforge.io import atomic
from mtpforge.llama_cpp import programs
from mtpforge.quantize.recipe import head_recipe, read_recipe


def main() -> None:
    """Parse the command line and inject."""
    parser = _parser()
    args = parser.parse_args()
    if args.head_tensors and not args.head_type:
        parser.error("--head-tensors needs --head-type")
    inputs = [
        given.parent / name for given in (args.base, args.head) for name in gguf_files(given.name)
    ]
    for out in filter(None, (args.out, args.digests)):
        atomic.refuse_overwriting(out, *inputs)
    exceptions = read_recipe(args.head_tensors)
    options = Options(
        head_types=head_recipe(args.head_type, exceptions) if args.head_type else (),
        norm_form=args.norms,
        replace_head=args.replace_head,
        digests=args.digests,
        base_recorded=args.base_recorded,
        head_recorded=args.head_recorded,
    )
    llama = programs.from_options(args)
    inject(args.base, args.head, out=args.out, options=options, llama=llama)
    print(table.size_of(args.out))


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    add = parser.add_argument
    add("base", type=Path, metavar="BASE.gguf", help="the GGUF that needs a head")
    add(
        "--head",
        type=Path,
        required=True,
        metavar="HEAD",
        help="a GGUF with the head, or the checkpoint's folder",
    )
    add(
        "--head-type",
        metavar="T",
        help="tensor type of the head, such as Q8_0 (default: the types in HEAD)",
    )
    add(
        "--head-tensors",
        type=Path,
        metavar="FILE",
        help="exceptions to --head-type, as YAML of pattern: type; the first match decides",
    )
    add(
        "--replace-head",
        action="store_true",
        help="replace the head if the base has a different one (default: an error)",
    )
    norm_shift.add_option(parser)
    add("--out", type=Path, required=True, help="the GGUF to write, or a folder for a split base")
    add(
        "--digests",
        type=Path,
        metavar="FILE",
        help="write the sha256 of each tensor of the base's trunk and of the head, as JSON",
    )
    recorded_digests.add_option(parser, "--base-recorded", "the base")
    recorded_digests.add_option(parser, "--head-recorded", "HEAD")
    programs.add_options(parser)
    return parser


if __name__ == "__main__":
    cli.run(main)
