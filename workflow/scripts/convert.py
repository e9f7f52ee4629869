"""Convert a Hugging Face checkpoint to a BF16 GGUF with its multi-token-prediction head.

example: convert.py Qwen3.5-4B --out Qwen3.5-4B-BF16.gguf
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

import argparse
from pathlib import Path

from mtpforge import cli, recorded_digests, table
from mtpforge.checkpoint.checkpoint import Checkpoint
from mtpforge.convert import donor_head, norm_shift
from mtpforge.convert.native import PARTS, convert_checkpoint
from mtpforge.gguf import split
from mtpforge.gguf.file_names import first_file
from mtpforge.io import atomic
from mtpforge.io.journal import Journal, inputs

PART = (
    "whole model (default), trunk, head alone, or head with the shared embeddings as a draft model"
)


def main() -> None:
    """Parse the command line and convert."""
    args = _parser().parse_args()
    atomic.refuse_overwriting(args.out, args.checkpoint, args.head_from)
    journal = _journal(args) if args.resume else None  # before the checkpoint is read
    checkpoint = Checkpoint(args.checkpoint, args.name, args.norms, recorded=args.recorded)
    options = {"part": args.part, "tokenizer_pre": args.tokenizer_pre}
    writing = split.Writing(args.split, journal)
    if args.head_from:
        donor = Checkpoint(args.head_from, norms=args.norms, recorded=args.head_recorded)
        note = donor_head.convert(checkpoint, donor, args.out, **options, writing=writing)
    else:
        note = convert_checkpoint(checkpoint, args.out, **options, writing=writing)
    if args.digests:
        made = split.read(first_file(args.out))
        written = journal.digests if journal else {}
        atomic.write_json(args.digests, split.digests_of(made, args.threads, written))
    print(table.size_of(args.out) + (note and f"; {note}"))


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "checkpoint",
        type=Path,
        help="folder with config.json, safetensors shards and tokenizer",
    )
    parser.add_argument("--out", type=Path, required=True, help="GGUF to write")
    parser.add_argument(
        "--split",
        type=split.parse_size,
        metavar="SIZE",
        help="write a folder of files of at most this size: 500M, 48G",
    )
    parser.add_argument("--part", choices=PARTS, default="all", help=PART)
    parser.add_argument(
        "--head-from",
        type=Path,
        metavar="DIR",
        help="take the head from this checkpoint, for a fine-tune that has lost its own",
    )
    parser.add_argument(
        "--name",
        help="name of the model in the metadata (default: the folder's name)",
    )
    parser.add_argument(
        "--tokenizer-pre",
        metavar="NAME",
        help="llama.cpp's name of the pre-tokenizer, if its checksum is unknown (qwen35, ...)",
    )
    norm_shift.add_option(parser)
    recorded_digests.add_option(parser, "--recorded", "the checkpoint's files")
    recorded_digests.add_option(parser, "--head-recorded", "those of --head-from")
    parser.add_argument(
        "--threads", type=int, help="threads for the digests (default: all processors)"
    )
    parser.add_argument(
        "--digests",
        type=Path,
        metavar="FILE",
        help="write the sha256 of each tensor, as JSON",
    )
    parser.add_argument(
        "--resume",
        metavar="DIGEST",
        help="go on with what a killed run of the same command has written; DIGEST stands for the "
        "program, and must be the same",
    )
    return parser


def _journal(args: argparse.Namespace) -> Journal:
    folders = [args.checkpoint, *([args.head_from] if args.head_from else [])]
    origin = {"code": args.resume, "options": sys.argv[1:], "inputs": inputs(folders)}
    return Journal(args.out, origin)


if __name__ == "__main__":
    cli.run(main)
