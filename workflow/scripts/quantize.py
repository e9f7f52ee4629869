"""Quantize a BF16 GGUF with llama-quantize, its multi-token-prediction head at a type of its own.

A table says first which types the tensors will have. With --plan, of quantize_plan.py, they are those of the plan.

example: quantize.py Qwen3.5-4B-BF16.gguf --type IQ4_XS --head Q8_0 --out Qwen3.5-4B-IQ4_XS.gguf
         quantize.py Qwen3.5-4B-BF16.gguf --type IQ3_S --tensors recipe.yaml --dry-run
         quantize.py Qwen3.5-4B-BF16.gguf --type IQ4_XS --reuse results --out Qwen3.5-4B-IQ4_XS.gguf
"""

import argparse
import re
import sys
from pathlib import Path

from mtpforge import atomic, errors, gguf_file, pieces, plan, programs
from mtpforge.quantize import choose, quantize, read_recipe


def main() -> None:
    """Parse the command line and quantize."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="IN.gguf", help="a BF16 GGUF, with or without a head")
    parser.add_argument("--out", type=Path, help="the GGUF to write")
    parser.add_argument("--dry-run", action="store_true", help="print the table, and stop")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--type", metavar="T", help="Q4_K_M, IQ4_XS, ...: see llama-quantize --help")
    what.add_argument("--plan", type=Path, metavar="FILE", help="what quantize_plan.py wrote, instead of all that it was told")
    parser.add_argument("--head", metavar="T", help="the head's tensor type (default: Q8_0; BF16 where --type is BF16)")
    parser.add_argument("--tensors", type=Path, metavar="FILE", help="YAML of pattern: type; the first match decides")
    parser.add_argument("--imatrix", type=Path, metavar="FILE", help="importance matrix, as of imatrix.py; its name is recorded")
    parser.add_argument("--reuse", type=Path, metavar="FOLDER", help="take tensors from the files of manifests somewhere in it")
    parser.add_argument("--piece", metavar="I/N", help="with --plan: make only one of N pieces, for --reuse")
    parser.add_argument("--manifest", type=Path, metavar="FILE", help="manifests/ANY.json to write, for --reuse")
    parser.add_argument("--also", type=Path, nargs="*", default=[], metavar="F", help="where it, or a folder of its parts, may lie")
    parser.add_argument("--threads", type=int, default=0, help="threads of llama-quantize (default: all)")
    parser.add_argument("--bin", type=Path, default=programs.DEFAULT_BIN, help="where it is (default: %(default)s)")
    parser.add_argument("--digests", type=Path, metavar="FILE", help="write the sha256 of header and tensors, as JSON")
    parser.add_argument("--log", type=Path, metavar="FILE", help="keep all that llama-quantize says")
    args = parser.parse_args()
    if not args.out and not args.dry_run:
        parser.error("one of --out and --dry-run is needed")
    if args.plan and (args.dry_run or args.head or args.tensors):
        parser.error("--plan stands for --head, --tensors and --dry-run")
    piece = re.fullmatch(r"([1-9]\d{0,2})/([1-9]\d{0,2})", args.piece or "1/1")
    if piece is None or int(piece[1]) > int(piece[2]) or (args.piece and not args.plan):
        parser.error("--piece: needs a plan, and I/N with I from 1 to N, at most 999")
    out = None if args.dry_run else args.out
    for written in filter(None, (out, args.digests, args.manifest)):
        atomic.refuse_overwriting(written, args.source, args.imatrix, args.plan)
    if args.type and (out is None or not (args.reuse or args.manifest)):
        recipe = read_recipe(args.tensors)
        quantize(args.source, out, args.type, args.head, recipe, args.imatrix, args.threads, args.bin, args.log)
        if out and args.digests:
            atomic.write_json(args.digests, gguf_file.digests(out, args.threads or None))
        return
    assert out is not None
    work = pieces.Work(planned(args), gguf_file.read(args.source), args.imatrix, args.threads, args.bin, args.log, say)
    digests = work.piece(out, int(piece[1]), int(piece[2]), args.reuse) if args.piece else work.whole(out, args.reuse)
    if args.digests:
        atomic.write_json(args.digests, digests)
    if args.manifest:
        pieces.write_manifest(args.manifest, work.plan, digests, [out, *args.also])


def planned(args: argparse.Namespace) -> plan.Plan:
    """The plan that is given, or one from the other options."""
    if args.plan:
        if args.log:
            args.log.write_text("", encoding="utf-8")
        return plan.Plan.read(args.plan)
    source = gguf_file.read(args.source)
    types = choose(source, args.type, args.head, read_recipe(args.tensors), args.imatrix, args.bin, args.log)
    return plan.make(source, gguf_file.digests(args.source, args.threads or None), types, args.type, args.imatrix, args.bin)


def say(line: str) -> None:
    """One line about what is done."""
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    errors.run(main)
