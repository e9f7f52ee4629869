"""Give a GGUF that lacks one a multi-token-prediction head; all its other tensors stay byte for byte.

example: inject.py Qwen3.5-4B-Q4_K_M.gguf --head Qwen3.5-4B --head-type Q8_0 --out with-head.gguf
"""

import argparse
from pathlib import Path

from mtpforge import atomic, errors, programs, progress
from mtpforge.inject import inject


def main() -> None:
    """Parse the command line and inject."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, metavar="BASE.gguf", help="the quantization without a head")
    parser.add_argument(
        "--head", type=Path, required=True, metavar="HEAD", help="a GGUF that has the head, or the checkpoint's folder"
    )
    parser.add_argument("--head-type", metavar="T", help="tensor type of the head, such as Q8_0 (default: as it is in HEAD)")
    parser.add_argument("--out", type=Path, required=True, help="the GGUF to write")
    parser.add_argument("--bin", type=Path, default=programs.DEFAULT_BIN, help="where llama-quantize is (default: %(default)s)")
    args = parser.parse_args()
    atomic.refuse_overwriting(args.out, args.base, args.head)
    with progress.bar(args.out.name) as show:
        inject(args.base, args.head, args.out, args.head_type, args.bin, show)


if __name__ == "__main__":
    errors.run(main)
