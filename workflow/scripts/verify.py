"""Check that a GGUF is what was asked for and that its multi-token-prediction head drafts; exit code 1 where it is not.

example: verify.py Qwen3.5-4B-IQ4_XS.gguf --checkpoint Qwen3.5-4B --type IQ4_XS --head Q8_0 --out report.json
"""

from pathlib import Path

from mtpforge import cli, errors, progress
from mtpforge.gguf import reader
from mtpforge.gguf.split import check_target, parse_size, plan
from mtpforge.io import atomic
from mtpforge.llama_cpp import programs
from mtpforge.prompts import PROMPTS, read_prompts
from mtpforge.quantize.recipe import read_recipe
from mtpforge.verify.report import publish_split, verify
from mtpforge.verify.request import Request, as_table
from mtpforge.verify.source import head_source


def main() -> None:
    """Parse the command line, verify, and publish where that is asked for."""
    parser = cli.parser(__doc__)
    parser.add_argument("file", type=Path, metavar="F.gguf")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--checkpoint", type=Path, help="what the file was made of: compare inventory and head"
    )
    source.add_argument(
        "--reference", type=Path, metavar="BF16.gguf", help="the same, of convert_upstream.py"
    )
    parser.add_argument(
        "--digests",
        type=Path,
        metavar="FILE",
        help="sha256 of its tensors, as convert.py or quantize.py wrote them",
    )
    trunk = parser.add_mutually_exclusive_group()
    trunk.add_argument(
        "--base", type=Path, help="what the head was injected into: compare the trunk"
    )
    trunk.add_argument(
        "--trunk", type=Path, metavar="FILE", help="the same, as inject.py --digests recorded it"
    )
    parser.add_argument(
        "--target", type=Path, metavar="GGUF", help="the file is a draft sidecar for this model"
    )
    parser.add_argument(
        "--head-record",
        type=Path,
        metavar="FILE",
        help="of fetch_head.py: how far the head is to be trusted",
    )
    parser.add_argument("--type", metavar="T", help="the file type that was asked for")
    parser.add_argument(
        "--head", metavar="T", help="the head's type that was asked for, none if no head was"
    )
    parser.add_argument(
        "--head-tensors",
        type=Path,
        metavar="FILE",
        help="exceptions from --head that were asked for",
    )
    parser.add_argument(
        "--tensors", type=Path, metavar="FILE", help="the recipe that was asked for"
    )
    parser.add_argument(
        "--tokenizer-pre", metavar="NAME", help="pre-tokenizer, as convert.py was told"
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="DIR",
        default=PROMPTS,
        help="folder of *.txt prompts to draft on",
    )
    parser.add_argument(
        "--min-acceptance",
        type=float,
        default=0.1,
        help="share of drafts to be accepted (default: %(default)s)",
    )
    parser.add_argument(
        "--unquantized",
        type=Path,
        metavar="FILE",
        help="of acceptance.py, on the BF16 file of the same model",
    )
    parser.add_argument(
        "--max-acceptance-drop",
        type=float,
        default=0.2,
        help="below that of it (default: %(default)s)",
    )
    parser.add_argument(
        "--perplexity", action="store_true", help="llama-perplexity must load it too"
    )
    parser.add_argument("--out", type=Path, required=True, help="the report, as JSON")
    parser.add_argument(
        "--publish", type=Path, metavar="FILE", help="the final name, given once it has passed"
    )
    parser.add_argument(
        "--split", metavar="SIZE", help="publish a folder, of files of at most this size: 500M, 48G"
    )
    parser.add_argument(
        "--threads", type=int, default=0, help="threads of llama-server (default: all processors)"
    )
    parser.add_argument(
        "--bin",
        type=Path,
        default=programs.DEFAULT_BIN,
        help="where llama-server is (default: %(default)s)",
    )
    args = parser.parse_args()
    if args.head_tensors and not args.head:
        parser.error("--head-tensors needs --head")
    request = Request(
        checkpoint=args.checkpoint,
        reference=args.reference,
        digests=args.digests,
        base=args.base,
        trunk=args.trunk,
        target=args.target,
        file_type=args.type,
        head=args.head,
        head_tensors=read_recipe(args.head_tensors),
        recipe=read_recipe(args.tensors),
        tokenizer_pre=args.tokenizer_pre,
        unquantized=args.unquantized,
        max_acceptance_drop=args.max_acceptance_drop,
        perplexity=args.perplexity,
        prompts=tuple(read_prompts(args.prompts).values()),
        min_acceptance=args.min_acceptance,
        threads=programs.threads(args.threads),
    )
    for out in filter(None, (args.out, args.publish)):
        atomic.refuse_overwriting(
            out,
            args.file,
            args.checkpoint,
            args.reference,
            args.digests,
            args.base,
            args.trunk,
            args.target,
        )
    limit = _limit(args.split, args.file, args.publish)
    with progress.bar(args.file.name) as show:
        try:
            report = verify(args.file, request, args.bin, show)
        except errors.VerificationError as error:
            print(error.table, end="")
            raise
    if args.head_record:
        report["head_source"] = head_source(args.head_record)
    if args.publish:
        report["file"] = args.publish.name
        if limit:
            split = publish_split(args.file, args.publish, limit, request, args.bin)
            report = {
                **report,
                "files": split["files"],
                "checks": report["checks"] + split["checks"],
            }
        else:
            atomic.give_name(args.file, args.publish)  # no second copy on the disk
    atomic.write_json(args.out, report)
    print(as_table(report))


def _limit(size: str | None, file: Path, folder: Path | None) -> int | None:
    """The size of a split in bytes. What cannot be is refused here, before minutes of verification. Raises ForgeError."""
    if size is None:
        return None
    if folder is None:
        raise errors.ConfigError("--split: nothing is published: --publish names the folder")
    limit = parse_size(size)
    plan(reader.read(file), limit)
    check_target(file, folder, folder.name)
    return limit


if __name__ == "__main__":
    cli.run(main)
