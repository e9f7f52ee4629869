"""Convert a checkpoint that has no family of ours with llama.cpp's own converter, and prove that its head is whole.

example: convert_upstream.py GLM-4.5-Air --out GLM-4.5-Air-BF16.gguf
"""

from pathlib import Path

from mtpforge import cli, table
from mtpforge.convert.upstream import PARTS, convert_upstream
from mtpforge.gguf import reader
from mtpforge.io import atomic


def main() -> None:
    """Parse the command line and convert."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "checkpoint",
        type=Path,
        help="folder with config.json, the safetensors shards and the tokenizer",
    )
    parser.add_argument("--out", type=Path, required=True, help="the GGUF to write")
    parser.add_argument(
        "--part", choices=PARTS, default="all",
        help="the whole, its trunk, its head as a draft model, or its vision tower (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer-pre",
        metavar="NAME",
        help="pre-tokenizer, where its checksum is unknown (qwen35, ...)",
    )
    parser.add_argument(
        "--digests",
        type=Path,
        metavar="FILE",
        help="write the sha256 of each tensor of the result, as JSON",
    )
    parser.add_argument(
        "--converter", type=Path, metavar="DIR", default=Path("resources/converter"),
        help="where `make converter` has put it (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--log", type=Path, metavar="FILE", help="keep all that upstream's converter says"
    )
    args = parser.parse_args()
    atomic.refuse_overwriting(args.out, args.checkpoint)
    convert_upstream(
        args.checkpoint, args.out, args.converter, args.part, args.tokenizer_pre, args.log
    )
    if args.digests:
        atomic.write_json(args.digests, reader.digests(args.out))
    print(table.size_of(args.out))


if __name__ == "__main__":
    cli.run(main)
