"""Check that a GGUF is what was requested and that its MTP head drafts; exit code 1 if not.

example: verify.py 4B-IQ4_XS.gguf --checkpoint Qwen3.5-4B --type IQ4_XS --out report.json
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

import argparse
from dataclasses import replace
from pathlib import Path

from mtpforge import cli, errors, prompts, recorded_digests
from mtpforge.convert import chat_templates, norm_shift
from mtpforge.gguf import split
from mtpforge.gguf.file_names import first_file
from mtpforge.gguf.split import check_space, check_target, parse_size, shards
from mtpforge.io import atomic
from mtpforge.llama_cpp import programs
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.quantize.recipe import NO_HEAD, read_recipe
from mtpforge.verify import published
from mtpforge.verify.digests import head_source
from mtpforge.verify.report import Report, accepted_drafts, as_table
from mtpforge.verify.request import LEAST_ACCEPTANCE, Request
from mtpforge.verify.target import choose_target
from mtpforge.verify.verify import publish_split, verify


def main() -> None:
    """Parse the command line, verify, and publish if that is requested."""
    parser = _parser()
    args = parser.parse_args()
    args.file = first_file(args.file)
    args.target = list(map(first_file, args.target))
    if args.target_recorded and len(args.target_recorded) != len(args.target):
        parser.error("--target-recorded: give one for each --target, or none")
    if args.head_tensors and not args.head:
        parser.error("--head-tensors needs --head")
    _check_donor(parser, args)
    # A reference may be the file itself: what llama.cpp's converter made, proven when it was made.
    for other in filter(None, (args.head_from, args.base)):
        if other.exists() and args.file.exists() and other.samefile(args.file):
            parser.error(f"{other}: is the file itself, so comparing them would prove nothing")
    inputs = (args.file, args.checkpoint, args.reference, args.digests, args.base, args.trunk)
    for out in filter(None, (args.out, args.publish)):
        atomic.refuse_overwriting(out, *inputs, args.head_from, *args.target)
    limit = _limit(args.split, args.file, args.publish)
    llama = programs.from_options(args)
    for name in ("llama-server", "llama-gguf-split"):
        llama.find(name)  # missing, they say nothing about the file
    request = _request(args, llama)
    try:
        report = verify(args.file, request, llama)
    except errors.VerificationError as error:
        print(error.table, end="")
        raise
    if args.head_record:
        report = replace(report, head_source=head_source(args.head_record))
    if args.publish:
        report = _publish(args, report, limit=limit, request=request, llama=llama)
    report.write(args.out)
    print(as_table(report.file, report.checks))
    print(accepted_drafts(report) or f"{len(report.checks)} checks passed")


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "file",
        type=Path,
        metavar="F.gguf",
        help="the GGUF to verify; if split, its first file or folder",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="compare the file with this checkpoint"
    )
    source.add_argument(
        "--reference", type=Path, metavar="BF16.gguf", help="compare with this upstream conversion"
    )
    parser.add_argument(
        "--head-from", type=Path, metavar="HEAD",
        help="compare the head with this checkpoint or GGUF: the trunk only with --checkpoint, if "
        "it is given, and with --base or --trunk",
    )  # fmt: skip
    parser.add_argument(
        "--digests", type=Path, metavar="FILE",
        help="sha256 of its tensors, recorded by convert.py or quantize.py",
    )  # fmt: skip
    trunk = parser.add_mutually_exclusive_group()
    trunk.add_argument("--base", type=Path, metavar="GGUF", help="compare the trunk with this base")
    trunk.add_argument(
        "--trunk", type=Path, metavar="FILE", help="the same, with inject.py's --digests"
    )
    parser.add_argument(
        "--target", type=Path, action="append", default=[], metavar="GGUF",
        help="the model of a draft sidecar or a vision tower; given several times, the first that "
        "fits into the memory",
    )  # fmt: skip
    parser.add_argument(
        "--head-record", type=Path, metavar="FILE",
        help="record of fetch_head.py, to report how far the head is trusted",
    )  # fmt: skip
    recorded_digests.add_option(parser, "--recorded", "the checkpoint or reference")
    recorded_digests.add_option(parser, "--head-recorded", "--head-from")
    recorded_digests.add_option(parser, "--target-recorded", "each target", action="append")
    _add_requested(parser)
    _add_thresholds(parser)
    prompts.add_option(parser)
    programs.add_options(parser)
    parser.add_argument("--out", type=Path, required=True, help="the report, as JSON")
    parser.add_argument(
        "--publish", type=Path, metavar="FILE", help="final name of the file, if it passes"
    )
    parser.add_argument(
        "--split", metavar="SIZE",
        help="publish a folder of files of at most this size: 500M, 48G",
    )  # fmt: skip
    return parser


def _add_requested(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--type", metavar="T", help="requested file type")
    parser.add_argument("--head", metavar="T", help="requested type of the head; none: no head")
    parser.add_argument(
        "--head-tensors", type=Path, metavar="FILE", help="requested exceptions to --head"
    )
    parser.add_argument("--tensors", type=Path, metavar="FILE", help="requested recipe")
    parser.add_argument(
        "--tokenizer-pre", metavar="NAME", help="pre-tokenizer, as given to convert.py"
    )
    parser.add_argument("--name", help="name of the model, as given to convert.py")
    chat_templates.add_option(parser)
    norm_shift.add_option(parser)


def _add_thresholds(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--min-acceptance", type=float, default=LEAST_ACCEPTANCE, metavar="SHARE",
        help="share of drafts that must be accepted (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--unquantized", type=Path, metavar="FILE",
        help="acceptance of the BF16 file, from acceptance.py",
    )  # fmt: skip
    parser.add_argument(
        "--max-acceptance-drop", type=float, default=0.2, metavar="SHARE",
        help="how far below BF16 the acceptance may be (default: %(default)s)",
    )  # fmt: skip


def _check_donor(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Refuse a donor of the head with which nothing would prove the trunk."""
    if args.head_from is None:
        return
    if args.reference or args.head == NO_HEAD:
        parser.error("--head-from does not go with --reference or --head none")
    if args.checkpoint and args.head_from.is_file():
        parser.error("--head-from must be a checkpoint's folder if there is a --checkpoint")
    if not (args.checkpoint or args.base or args.trunk):
        parser.error(
            "--head-from says nothing about the trunk: add --base, --trunk or --checkpoint"
        )


def _request(args: argparse.Namespace, llama: LlamaCpp) -> Request:
    target, recorded, note = None, None, ""
    if args.target:
        target, note = choose_target(args.file, args.target, llama)
        if args.target_recorded:
            recorded = args.target_recorded[args.target.index(target)]
    return Request(
        checkpoint=args.checkpoint,
        reference=args.reference,
        digests=args.digests,
        base=args.base,
        trunk=args.trunk,
        head_from=args.head_from,
        recorded=args.recorded,
        head_recorded=args.head_recorded,
        target_recorded=recorded,
        name=args.name,
        target=target,
        target_note=note,
        file_type=args.type,
        head=args.head,
        head_tensors=read_recipe(args.head_tensors),
        recipe=read_recipe(args.tensors),
        tokenizer_pre=args.tokenizer_pre,
        chat_template=args.chat_template,
        norm_form=args.norms,
        unquantized=args.unquantized,
        max_acceptance_drop=args.max_acceptance_drop,
        prompts=tuple(prompts.read_prompts(args.prompts).values()),
        min_acceptance=args.min_acceptance,
    )


def _limit(size: str | None, file: Path, folder: Path | None) -> int | None:
    """The size limit of a split, in bytes.

    Raises ForgeError now, not after minutes of verification, if the file cannot be split so.
    """
    if folder and size is None and len(shards(file)) > 1:
        raise errors.ConfigError(
            f"{file}: is split: verify it without --publish, or with the --split that it has, or "
            "merge it with llama-gguf-split --merge"
        )
    if size is None:
        if folder:
            atomic.check_room(file, folder)
        return None
    if folder is None:
        raise errors.ConfigError("--split: name the folder with --publish")
    limit = parse_size(size)
    check_target(file, folder, folder.name)
    check_space(split.read(file), folder, limit)
    return limit


def _publish(
    args: argparse.Namespace, report: Report, limit: int | None, request: Request, llama: LlamaCpp
) -> Report:
    """Give the verified file its final name; returns the report on the published file."""
    if limit is None:
        report = replace(report, file=args.publish.name)
        atomic.give_name(args.file, args.publish)  # without a second copy on the disk
        if not args.publish.samefile(args.file):  # unless the file system has no links
            _check_copy(args.publish, report)
        return report
    files, checks = publish_split(
        args.file, args.publish, limit=limit, request=request, llama=llama
    )
    checks = [*report.checks, *checks]
    return replace(report, file=args.publish.name, files=files, checks=tuple(checks))


def _check_copy(path: Path, report: Report) -> None:
    """Delete a copy that is not what was verified. Raises DamagedError."""
    try:
        published.check([(path, report)])
    except errors.DamagedError:
        path.unlink()
        raise


if __name__ == "__main__":
    cli.run(main)
