"""Convert a checkpoint with llama.cpp's converter, and prove that the head is complete.

For architectures that convert.py does not know.

example: convert_upstream.py GLM-4.5-Air --out GLM-4.5-Air-BF16.gguf
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from pathlib import Path

from mtpforge import cli, recorded_digests, table
from mtpforge.checkpoint.checkpoint import Checkpoint
from mtpforge.convert import chat_templates
from mtpforge.convert.upstream import PARTS, convert_upstream
from mtpforge.gguf import reader
from mtpforge.hub import refetch
from mtpforge.io import atomic


def main() -> None:
    """Parse the command line and convert."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "checkpoint",
        type=Path,
        help="folder with config.json, safetensors shards and tokenizer",
    )
    parser.add_argument("--out", type=Path, required=True, help="GGUF to write")
    parser.add_argument(
        "--part",
        choices=PARTS,
        default="all",
        help="whole model (default), trunk, head as a draft model, or vision tower",
    )
    parser.add_argument(
        "--tokenizer-pre",
        metavar="NAME",
        help="llama.cpp's name of the pre-tokenizer, if its checksum is unknown (qwen35, ...)",
    )
    parser.add_argument(
        "--digests",
        type=Path,
        metavar="FILE",
        help="write the sha256 of each tensor, as JSON",
    )
    parser.add_argument(
        "--converter",
        type=cli.installed,
        metavar="DIR",
        default="resources/converter",
        help="folder of llama.cpp's converter, from `make converter` (default: %(default)s)",
    )
    chat_templates.add_option(parser)
    recorded_digests.add_option(parser, "--recorded", "the checkpoint's files")
    parser.add_argument("--log", type=Path, metavar="FILE", help="append the converter's output")
    args = parser.parse_args()
    atomic.refuse_overwriting(args.out, args.checkpoint)
    checkpoint = Checkpoint(args.checkpoint, recorded=args.recorded)
    checkpoint.refetch = refetch.from_hub(args.checkpoint, args.recorded)
    checkpoint.chat_template = args.chat_template
    convert_upstream(
        checkpoint,
        args.out,
        args.converter,
        part=args.part,
        tokenizer_pre=args.tokenizer_pre,
        log=args.log,
    )
    if args.digests:
        atomic.write_json(args.digests, reader.digests(args.out))
    print(table.size_of(args.out))


if __name__ == "__main__":
    cli.run(main)
