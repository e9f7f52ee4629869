"""Quantize a BF16 GGUF with llama-quantize, its multi-token-prediction head at a type of its own.

A table says first which types the tensors will have. With --plan, of quantize_plan.py, they are those of the plan, and tensors can
be taken from finished files.

example: quantize.py Qwen3.5-4B-BF16.gguf --type IQ4_XS --head Q8_0 --out Qwen3.5-4B-IQ4_XS.gguf
         quantize.py Qwen3.5-4B-BF16.gguf --type IQ3_S --tensors recipe.yaml --dry-run
         quantize.py Qwen3.5-4B-BF16.gguf --plan plan.json --reuse results --out Qwen3.5-4B-IQ4_XS.gguf
         quantize.py Qwen3.5-4B-BF16.gguf --plan plan.json --reuse results --piece 1/2 --out results/manifests
"""

import argparse
import os
import re
import sys
from contextlib import suppress
from pathlib import Path

from mtpforge import cli
from mtpforge.gguf import reader
from mtpforge.io import atomic
from mtpforge.llama_cpp import programs
from mtpforge.quantize import manifest, pieces, plan
from mtpforge.quantize.llama_quantize import quantize
from mtpforge.quantize.recipe import head_recipe, read_recipe


def main() -> None:
    """Parse the command line and quantize."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "source", type=Path, metavar="IN.gguf", help="a BF16 GGUF, with or without a head"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="the GGUF to write; with --piece a folder for several: FOLDER/manifests",
    )
    parser.add_argument("--dry-run", action="store_true", help="print the table, and stop")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--type", metavar="T", help="Q4_K_M, IQ4_XS, ...: see llama-quantize --help")
    what.add_argument(
        "--plan",
        type=Path,
        metavar="FILE",
        help="what quantize_plan.py wrote, instead of all that it was told",
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
        "--reuse",
        type=Path,
        metavar="FOLDER",
        help="with --plan: take tensors from files of manifests in it",
    )
    parser.add_argument(
        "--piece", metavar="I/N", help="with --plan: make one of N pieces, for --reuse of the whole"
    )
    parser.add_argument(
        "--manifest",
        type=Path,
        metavar="FILE",
        help="with --plan: manifests/ANY.json to write, for --reuse",
    )
    parser.add_argument(
        "--also",
        type=Path,
        nargs="*",
        default=[],
        metavar="F",
        help="where it, or a folder of its parts, may lie",
    )
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="FILE",
        help="a second name for --out (a hard link), for the manifest",
    )
    parser.add_argument(
        "--threads", type=int, default=0, help="threads of llama-quantize (default: all)"
    )
    parser.add_argument(
        "--bin", type=Path, default=programs.DEFAULT_BIN, help="where it is (default: %(default)s)"
    )
    parser.add_argument(
        "--digests",
        type=Path,
        metavar="FILE",
        help="write the sha256 of header and tensors, as JSON",
    )
    parser.add_argument(
        "--log", type=Path, metavar="FILE", help="keep all that llama-quantize says"
    )
    args = parser.parse_args()
    number, count = _check(parser, args)
    out = None if args.dry_run else args.out
    for written in filter(None, (out, args.digests, args.manifest, args.keep)):
        atomic.refuse_overwriting(written, args.source, args.imatrix, args.plan)
    if args.plan:
        as_planned(args, number, count)
        return
    quantize(
        args.source,
        out,
        args.type,
        head=head_recipe(args.head, read_recipe(args.head_tensors)) if args.head else (),
        recipe=read_recipe(args.tensors),
        imatrix=args.imatrix,
        threads=args.threads,
        bin_dir=args.bin,
        log=args.log,
    )
    if out and args.digests:
        atomic.write_json(args.digests, reader.digests(out, args.threads or None))


def _check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> tuple[int, int]:
    """Refuse options that exclude or need each other; the number of a piece, and of all pieces."""
    if not args.out and not args.dry_run:
        parser.error("one of --out and --dry-run is needed")
    if args.head_tensors and not args.head:
        parser.error("--head-tensors needs --head")
    if args.plan and (args.dry_run or args.head or args.tensors):
        parser.error("--plan stands for --head, --tensors and --dry-run")
    if not args.plan and (args.reuse or args.piece or args.manifest or args.also or args.keep):
        parser.error("--reuse, --piece, --manifest, --also and --keep need --plan")
    if args.piece and (args.manifest or args.also or args.keep):
        parser.error(
            "--piece writes manifests into --out, and takes none of --manifest, --also and --keep"
        )
    if args.piece and args.out and "manifests" not in args.out.absolute().parts:
        parser.error(
            f"--out {args.out}: of a piece must be in a folder called manifests, where --reuse looks"
        )
    piece = re.fullmatch(r"([1-9]\d{0,2})/([1-9]\d{0,2})", args.piece or "1/1")
    if piece is None or int(piece[1]) > int(piece[2]):
        parser.error("--piece: must be I/N with I from 1 to N, at most 999")
    return int(piece[1]), int(piece[2])


def as_planned(args: argparse.Namespace, number: int, count: int) -> None:
    """Make what the plan says, all of it or one piece."""
    if args.log:
        args.log.write_text("", encoding="utf-8")
    planned, source = plan.Plan.read(args.plan), reader.read(args.source)
    work = pieces.Work(planned, source, args.imatrix, args.threads, args.bin, args.log, say)
    digests = (
        work.piece(args.out, number, count, args.reuse)
        if args.piece
        else work.whole(args.out, args.reuse)
    )
    names = [args.out, *args.also]
    if args.keep:
        with (
            suppress(OSError),
            atomic.replacing(args.keep) as temporary,
        ):  # a file system without hard links
            temporary.unlink()
            os.link(args.out, temporary)
        names.append(args.keep)
    if args.manifest:
        manifest.write_manifest(args.manifest, planned, digests, names)
    if args.digests:
        atomic.write_json(args.digests, digests)


def say(line: str) -> None:
    """One line about what is done."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main)
