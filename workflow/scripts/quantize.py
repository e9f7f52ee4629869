"""Quantize a BF16 GGUF with llama-quantize, its multi-token-prediction head at a type of its own.

example: quantize.py Qwen3.5-4B-BF16.gguf --type IQ4_XS --head Q8_0 --out Qwen3.5-4B-IQ4_XS.gguf
"""

import argparse
from pathlib import Path

from mtpforge import atomic, errors, programs
from mtpforge.quantize import quantize, read_recipe


def main() -> None:
    """Parse the command line and quantize."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="IN.gguf", help="a BF16 GGUF, with or without a head")
    parser.add_argument("--out", type=Path, required=True, help="the GGUF to write")
    parser.add_argument("--type", required=True, metavar="T", help="Q4_K_M, IQ4_XS, ...: see llama-quantize --help")
    parser.add_argument("--head", metavar="T", help="the head's tensor type (default: Q8_0; BF16 where --type is BF16)")
    parser.add_argument("--tensors", type=Path, metavar="FILE", help="YAML of pattern: type; the first match decides")
    parser.add_argument("--imatrix", type=Path, metavar="FILE", help="importance matrix; its path is recorded")
    parser.add_argument("--threads", type=int, default=0, help="threads of llama-quantize (default: all)")
    parser.add_argument("--bin", type=Path, default=programs.DEFAULT_BIN, help="where it is (default: %(default)s)")
    parser.add_argument("--digests", type=Path, metavar="FILE", help="write the sha256 of header and tensors, as JSON")
    parser.add_argument("--log", type=Path, metavar="FILE", help="keep all that llama-quantize says")
    args = parser.parse_args()
    atomic.refuse_overwriting(args.out, args.source)
    recipe = read_recipe(args.tensors)
    quantize(
        args.source, args.out, args.type, args.head, recipe, args.imatrix, args.threads, args.bin, args.log, args.digests
    )  # fmt: skip


if __name__ == "__main__":
    errors.run(main)
