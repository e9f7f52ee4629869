"""Quantize a BF16 GGUF with llama-quantize, with a separate type for the MTP head.

First prints a table of the chosen types. With --plan, the types come from a plan that
quantize_plan.py wrote, and tensors can be reused from finished files.

example: quantize.py BF16.gguf --type IQ4_XS --head Q8_0 --out IQ4_XS.gguf
         quantize.py BF16.gguf --type IQ3_S --tensors recipe.yaml --dry-run
         quantize.py BF16.gguf --plan plan.json --reuse results --out IQ4_XS.gguf
         quantize.py BF16.gguf --plan plan.json --reuse results --piece 1/2 --out results/manifests
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

import argparse
from pathlib import Path

from mtpforge import cli
from mtpforge.gguf import reader, split
from mtpforge.gguf.file_names import first_file, gguf_files
from mtpforge.io import atomic
from mtpforge.llama_cpp import programs
from mtpforge.quantize import pieces, request
from mtpforge.quantize.job import QuantizeJob
from mtpforge.quantize.llama_quantize import choose_types, quantize
from mtpforge.quantize.manifest import Manifest
from mtpforge.quantize.piece_count import piece_number
from mtpforge.quantize.plan import QuantizePlan


def main() -> None:
    """Parse the command line and quantize."""
    parser = cli.parser(__doc__)
    add_options(parser)
    args = parser.parse_args()
    args.source = first_file(args.source)
    check_options(parser, args)
    out = None if args.dry_run else args.out
    sources = [args.source.parent / name for name in gguf_files(args.source.name)]
    for written in filter(None, (out, args.digests, args.manifest, args.keep)):
        atomic.refuse_overwriting(written, *sources, args.imatrix, args.plan)
    digests = quantize_planned(args) if args.plan else quantize_once(args, out)
    if args.digests and not args.dry_run:
        atomic.write_json(args.digests, digests)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add all options."""
    parser.add_argument(
        "source",
        type=Path,
        metavar="IN.gguf",
        help="a BF16 GGUF, with or without a head; if split, its first file or folder",
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="the GGUF to write; with --piece, a folder FOLDER/manifests for its files",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the table and stop")
    types = parser.add_mutually_exclusive_group(required=True)
    types.add_argument("--type", metavar="T", help=request.TYPE_HELP)
    types.add_argument(
        "--plan",
        type=Path,
        metavar="FILE",
        help="a plan of quantize_plan.py, instead of --type and the recipes",
    )
    request.add_options(parser)
    add_planned_options(parser)
    programs.add_options(parser, log=True)
    parser.add_argument(
        "--digests",
        type=Path,
        metavar="FILE",
        help="write the sha256 of the header and each tensor, as JSON",
    )


def add_planned_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that need --plan."""
    parser.add_argument(
        "--reuse",
        type=Path,
        metavar="FOLDER",
        help="with --plan: reuse tensors of files whose manifests lie in FOLDER",
    )
    parser.add_argument(
        "--piece",
        type=piece_number,
        metavar="I/N",
        help="with --plan: make piece I of N, which the whole file can --reuse",
    )
    parser.add_argument(
        "--manifest",
        type=Path,
        metavar="FILE",
        help="with --plan: write a manifest for --reuse, as manifests/ANY.json",
    )
    parser.add_argument(
        "--also",
        type=Path,
        nargs="*",
        default=[],
        metavar="F",
        help="later names of the file, or of the folder of its shards, to list in the manifest",
    )
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="FILE",
        help="make a hard link to --out, and list it in the manifest",
    )


def check_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """End the program if options are missing or exclude each other."""
    if not (args.out or args.dry_run):
        parser.error("--out or --dry-run is required")
    if args.head_tensors and not args.head:
        parser.error("--head-tensors needs --head")
    if args.plan:
        reject(
            parser,
            args,
            names=["head", "tensors", "dry_run"],
            reason="cannot be combined with --plan",
        )
    else:
        reject(
            parser,
            args,
            names=["reuse", "piece", "manifest", "also", "keep"],
            reason="needs --plan",
        )
    if args.piece:
        reject(
            parser,
            args,
            names=["manifest", "also", "keep"],
            reason="cannot be combined with --piece",
        )
        if "manifests" not in args.out.absolute().parts:
            parser.error(
                f"--out {args.out}: the folder of pieces must be called manifests, or lie in one, "
                "for --reuse to find them"
            )


def reject(
    parser: argparse.ArgumentParser, args: argparse.Namespace, names: list[str], reason: str
) -> None:
    """End the program if one of these options is given."""
    for name in names:
        if getattr(args, name):
            parser.error(f"--{name.replace('_', '-')} {reason}")


def quantize_once(args: argparse.Namespace, out: Path | None) -> dict[str, str]:
    """Quantize without a plan; the file's digests if they are asked for."""
    asked = request.from_options(args)
    llama = programs.from_options(args)
    if out is None:
        choose_types(split.read(args.source), asked, llama)
        return {}
    quantize(args.source, out, request=asked, llama=llama)
    return reader.digests(out, llama.processors) if args.digests else {}


def quantize_planned(args: argparse.Namespace) -> dict[str, str]:
    """Make the whole planned file or one piece of it, and return the digests."""
    plan = QuantizePlan.read(args.plan)
    source = split.read(args.source)
    job = QuantizeJob(plan, source, llama=programs.from_options(args), imatrix=args.imatrix)
    if args.piece:
        number, count = args.piece
        return pieces.quantize_piece(job, args.out, number=number, count=count, reuse=args.reuse)
    digests = pieces.quantize_whole(job, args.out, args.reuse)
    names = [args.out, *args.also]
    if args.keep:
        hard_link(args.out, args.keep)
        names.append(args.keep)
    if args.manifest:
        Manifest.of(plan, digests, names).write(args.manifest)
    return digests


def hard_link(source: Path, target: Path) -> None:
    """Replace `target` with a hard link to `source`, if the file system has them."""
    try:
        with atomic.replacing(target) as temporary:
            atomic.link(source, temporary)
    except OSError as error:
        if not atomic.unlinkable(error):
            raise


if __name__ == "__main__":
    cli.run(main)
