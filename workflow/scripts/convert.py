"""Convert a Hugging Face checkpoint to a BF16 GGUF with its multi-token-prediction head.

example: convert.py Qwen3.5-4B --out Qwen3.5-4B-BF16.gguf
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

import argparse
from collections.abc import Callable
from pathlib import Path

from mtpforge import cli, processors, recorded_digests, table
from mtpforge.checkpoint.checkpoint import Checkpoint
from mtpforge.convert import chat_templates, donor_head, norm_shift
from mtpforge.convert.freeing import Freeing
from mtpforge.convert.native import PARTS, convert_checkpoint
from mtpforge.gguf import split
from mtpforge.gguf.file_names import first_file
from mtpforge.hub import refetch
from mtpforge.io import atomic
from mtpforge.io.journal import Journal, inputs

PART = (
    "whole model (default), trunk, head alone, or head with the shared embeddings as a draft model"
)


def main() -> None:
    """Parse the command line and convert."""
    parser = options(__doc__)
    run(parser, parser.parse_args())


def run(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    on_the_way: Callable[[Journal, int], None] | None = None,
) -> None:
    """Convert as the options of `options` say.

    If shards are freed, `on_the_way` gets the journal and the bytes of the result before that.
    """
    if args.free is not None and not (args.resume and args.recorded and args.recorded.is_dir()):
        parser.error("--free needs --resume, and the records of a fetched checkpoint (--recorded)")
    processors.limit(args.threads)
    atomic.refuse_overwriting(args.out, args.checkpoint, args.head_from)
    journal = _journal(args) if args.resume else None  # before the checkpoint is read
    checkpoint = Checkpoint(args.checkpoint, args.name, args.norms, recorded=args.recorded)
    checkpoint.refetch = refetch.from_hub(args.checkpoint, args.recorded)
    freeing = _freeing(args, checkpoint, journal) if journal and args.free is not None else None
    if on_the_way and freeing and journal:
        on_the_way(journal, freeing.size)
    checkpoint.chat_template = args.chat_template
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
        atomic.write_json(args.digests, split.digests_of(made, written))
    if freeing:
        freeing.finish()
    print(table.size_of(args.out) + (note and f"; {note}"))


def options(doc: str | None) -> argparse.ArgumentParser:
    """The parser of the command line, of a program with this docstring."""
    parser = cli.parser(doc)
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
    chat_templates.add_option(parser)
    norm_shift.add_option(parser)
    recorded_digests.add_option(parser, "--recorded", "the checkpoint's files")
    recorded_digests.add_option(parser, "--head-recorded", "those of --head-from")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads (default: all processors)"
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
    parser.add_argument(
        "--free",
        nargs="*",
        choices=PARTS,
        metavar="PART",
        help="free the shards of a fetched checkpoint as they are converted, except for what "
        "verification and the conversion of these other parts read",
    )
    return parser


def _journal(args: argparse.Namespace) -> Journal:
    folders = [args.checkpoint, *([args.head_from] if args.head_from else [])]
    fetched: list[Path] = []
    if args.recorded and args.recorded.is_dir():  # freeing changes the times of shards
        folders.append(args.recorded)
        shards = args.checkpoint.glob("*.safetensors")
        fetched = [path for path in shards if (args.recorded / f"{path.name}.json").exists()]
    given = vars(args).items()
    options = {name: str(value) for name, value in given if name not in ("free", "threads")}
    origin = {"code": args.resume, "options": options, "inputs": inputs(folders, fetched)}
    return Journal(args.out, origin)


def _freeing(args: argparse.Namespace, checkpoint: Checkpoint, journal: Journal) -> Freeing:
    part = donor_head.OWN.get(args.part, args.part) if args.head_from else args.part
    freeing = Freeing(checkpoint, part, args.free, args.recorded)
    freeing.attach(journal)
    return freeing


if __name__ == "__main__":
    cli.run(main)
