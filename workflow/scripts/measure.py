"""Measure a GGUF in llama-server: speed, acceptance by n_max and p_min, memory, perplexity.

If drafting makes decoding slower, the report says so and recommends no drafting (n_max `off`).
If the speeds are not steady, because other programs run, nothing is recommended.
A file larger than the memory is not run, and the report says so.

example: measure.py Qwen3.5-4B-IQ4_XS.gguf --n-max 1,2,3,4 --out measure.json
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

import argparse
import shlex
from dataclasses import replace
from pathlib import Path

from mtpforge import cli, prompts, recorded_digests
from mtpforge.errors import ConfigError
from mtpforge.gguf import file_names, split
from mtpforge.io import atomic
from mtpforge.io.ranges import digest_of
from mtpforge.io.text import ANYWHERE, open_regular
from mtpforge.llama_cpp import memory, programs
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.measure import perplexity, tasks
from mtpforge.measure.measurement import KlDivergence, Score, Text
from mtpforge.measure.prompt_forms import FORMS
from mtpforge.measure.speed import Settings, measure
from mtpforge.verify import published
from mtpforge.verify.report import Report


def main() -> None:
    """Parse the command line, measure, and write the measurement."""
    args = _parser().parse_args()
    atomic.refuse_overwriting(args.out, args.file, args.prompts, args.text, args.reference_logits)
    if args.text:
        open_regular(args.text, ConfigError, within=ANYWHERE).close()
    llama = programs.from_options(args)
    first = file_names.first_file(args.file)
    if args.report:  # before, because hashing beside would take time from what is measured
        published.check([(args.file, Report.read(args.report))])
    split.read(first)  # checks it before llama.cpp's programs read it
    recorded_digests.check_whole(args.reference_logits, args.logits_recorded)
    recorded_digests.check_whole(args.text, args.text_recorded)
    for kind, path, recorded in args.task:
        tasks.check(kind, Path(path))
        recorded_digests.check_whole(Path(path), Path(recorded) if recorded else None)
    reason = memory.too_large([first], llama)
    value, divergence = (None, None) if reason else _perplexity(args, first, llama)
    texts = prompts.read_measured(args.prompts)
    found = replace(
        measure(
            first,
            {} if reason else texts,
            Settings(args.n_max, args.p_min, args.repeats, args.minutes, args.forms),
            llama=llama,
            options=args.serve,
        ),
        file=args.file.name,
        perplexity=value,
        kl_divergence=divergence,
        text=_text(args),
        tasks={} if reason else _scores(args, first, llama),
    )
    if reason:
        found = replace(found, verdict=f"not measured: {reason}")
    found.write(args.out)
    if found.kl_divergence:
        mean = found.kl_divergence.mean
        print(f"{found.file}: KL divergence {mean:.5f}, perplexity {found.perplexity:.4f}")
    print(f"{found.file}: {found.verdict}")


def _parser() -> argparse.ArgumentParser:
    parser = cli.parser(__doc__)
    parser.add_argument(
        "file",
        type=Path,
        metavar="F.gguf",
        help="the GGUF; if split, its first file or folder",
    )
    parser.add_argument("--out", type=Path, required=True, help="the measurement, as JSON")
    parser.add_argument(
        "--n-max", type=_numbers, default=(1, 2, 3, 4, 6), metavar="N,N",
        help="numbers of tokens to draft ahead (default: 1,2,3,4,6)",
    )  # fmt: skip
    parser.add_argument(
        "--p-min", type=_probabilities, default=(0.0, 0.75), metavar="P,P",
        help="probabilities below which no token is drafted (default: 0,0.75)",
    )  # fmt: skip
    parser.add_argument(
        "--minutes", type=_positive, default=60, metavar="N",
        help="try no further pairs when rounds would end later (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--forms", type=_forms, default=FORMS, metavar="FORM,FORM",
        help="forms of prompts: raw, chat, thinking (default: all)",
    )  # fmt: skip
    parser.add_argument(
        "--repeats", type=_positive, default=3, metavar="N",
        help="rounds of the fastest pair and of no drafting (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--report", type=Path, metavar="FILE",
        help="report of verify.py on the file, to refuse it if it has changed since",
    )  # fmt: skip
    recorded_digests.add_option(parser, "--logits-recorded", "--reference-logits")
    recorded_digests.add_option(parser, "--text-recorded", "--text")
    benchmarks = ", or a *.jsonl with `category` and `turns`, such as SPEED-Bench's"
    prompts.add_option(parser, prompts.MEASURED, benchmarks)
    parser.add_argument(
        "--text", type=Path, metavar="FILE",
        help="measure perplexity on this text; with --reference-logits, the text of the logits",
    )  # fmt: skip
    parser.add_argument(
        "--chunks", type=_positive, default=16, metavar="N",
        help="use at most N chunks of 512 tokens (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--reference-logits", type=Path, metavar="FILE",
        help="measure KL divergence from these logits of reference_logits.py",
    )  # fmt: skip
    parser.add_argument(
        "--task", nargs=3, action="append", default=[], metavar=("KIND", "FILE", "RECORDED"),
        help="score on tasks: hellaswag, winogrande or multiple_choice, the file, and the digests "
        "recorded of it by local_files.py, or an empty word",
    )  # fmt: skip
    parser.add_argument(
        "--serve", type=shlex.split, default=[], metavar="OPTIONS",
        help='further options of llama-server: --serve="-fa on"',
    )  # fmt: skip
    programs.add_options(parser)
    return parser


def _perplexity(
    args: argparse.Namespace, model: Path, llama: LlamaCpp
) -> tuple[float | None, KlDivergence | None]:
    if args.reference_logits and args.reference_logits.stat().st_size:
        own, others = perplexity.vocabularies(model, args.reference_logits)
        if own == others:
            return perplexity.against_reference(model, args.reference_logits, llama)
        print(f"{args.file.name}: no KL divergence: it has {own:,} tokens, not {others:,}")
    if args.text:
        return perplexity.of_text(model, args.text, chunks=args.chunks, llama=llama), None
    return None, None


def _scores(args: argparse.Namespace, model: Path, llama: LlamaCpp) -> dict[str, Score]:
    return {kind: tasks.score(kind, model, Path(path), llama) for kind, path, _ in args.task}


def _text(args: argparse.Namespace) -> Text | None:
    if args.text is None:
        return None
    return Text(name=args.text.name, sha256=digest_of(args.text), chunks=args.chunks)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _probabilities(text: str) -> tuple[float, ...]:
    values = tuple(float(part) for part in text.split(","))
    if not all(0 <= value < 1 for value in values):
        raise ValueError
    return values


def _forms(text: str) -> tuple[str, ...]:
    forms = tuple(text.split(","))
    if not set(forms) <= set(FORMS):
        raise ValueError
    return forms


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


if __name__ == "__main__":
    cli.run(main)
