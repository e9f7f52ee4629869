"""Quantize a BF16 GGUF with llama-quantize, its multi-token-prediction head at a type of its own.

A table says first which types the tensors will have.

example: quantize.py Qwen3.5-4B-BF16.gguf --type IQ4_XS --head Q8_0 --out Qwen3.5-4B-IQ4_XS.gguf
         quantize.py Qwen3.5-4B-BF16.gguf --type IQ3_S --tensors recipe.yaml --dry-run
"""

import argparse
from pathlib import Path

from mtpforge import atomic, errors, programs
from mtpforge.quantize import quantize, read_recipe


def main() -> None:
    """Parse the command line and quantize."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="IN.gguf", help="a BF16 GGUF, with or without a head")
    parser.add_argument("--out", type=Path, help="the GGUF to write")
    parser.add_argument("--dry-run", action="store_true", help="print the table, and stop")
    parser.add_argument("--type", required=True, metavar="T", help="Q4_K_M, IQ4_XS, ...: see llama-quantize --help")
    parser.add_argument("--head", metavar="T", help="the head's tensor type (default: Q8_0; BF16 where --type is BF16)")
    parser.add_argument("--tensors", type=Path, metavar="FILE", help="YAML of pattern: type; the first match decides")
    parser.add_argument("--imatrix", type=Path, metavar="FILE", help="importance matrix, as of imatrix.py; its name is recorded")
    parser.add_argument("--threads", type=int, default=0, help="threads of llama-quantize (default: all)")
    parser.add_argument("--bin", type=Path, default=programs.DEFAULT_BIN, help="where it is (default: %(default)s)")
    parser.add_argument("--digests", type=Path, metavar="FILE", help="write the sha256 of header and tensors, as JSON")
    parser.add_argument("--log", type=Path, metavar="FILE", help="keep all that llama-quantize says")
    args = parser.parse_args()
    if not args.out and not args.dry_run:
        parser.error("one of --out and --dry-run is needed")
    out = None if args.dry_run else args.out
    if out:
        atomic.refuse_overwriting(out, args.source, args.imatrix)
    recipe = read_recipe(args.tensors)
    quantize(
        args.source, out, args.type, args.head, recipe, args.imatrix, args.threads, args.bin, args.log, args.digests
    )  # fmt: skip


if __name__ == "__main__":
    errors.run(main)
