"""Measure a GGUF in a real llama-server: decoding speed and acceptance for each n_max and without drafting, memory, perplexity.

A head that makes decoding slower is reported as that, and the recommended n_max is then 0.

example: measure.py Qwen3.5-4B-IQ4_XS.gguf --n-max 1,2,3,4 --out measure.json
"""

import shlex
from pathlib import Path
from typing import Any

from mtpforge import cli
from mtpforge.gguf import names
from mtpforge.io import atomic
from mtpforge.io.ranges import digest_of
from mtpforge.llama_cpp import programs
from mtpforge.measure import perplexity
from mtpforge.measure.speed import measure
from mtpforge.prompts import PROMPTS, read_prompts


def main() -> None:
    """Parse the command line, measure, and write what was measured."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "file",
        type=Path,
        metavar="F.gguf",
        help="of a split one, the first file or the folder of them",
    )
    parser.add_argument("--out", type=Path, required=True, help="the measurements, as JSON")
    parser.add_argument(
        "--n-max",
        type=_numbers,
        default=(1, 2, 3, 4),
        metavar="N,N",
        help="tokens drafted ahead (default: 1,2,3,4)",
    )
    parser.add_argument(
        "--repeats",
        type=_positive,
        default=3,
        help="warm requests of each kind and n_max (default: %(default)s)",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="DIR",
        default=PROMPTS,
        help="folder of *.txt prompts, named by kind",
    )
    parser.add_argument(
        "--text",
        type=Path,
        metavar="FILE",
        help="measure the perplexity on this text; with --reference-logits, what they are of",
    )
    parser.add_argument(
        "--chunks",
        type=_positive,
        default=16,
        help="of 512 tokens, at most so many (default: %(default)s)",
    )
    parser.add_argument(
        "--reference-logits",
        type=Path,
        metavar="FILE",
        help="of reference_logits.py: also the KL divergence from them",
    )
    parser.add_argument(
        "--serve",
        type=shlex.split,
        default=[],
        metavar="OPTIONS",
        help='of llama-server: --serve="-fa on"',
    )
    parser.add_argument(
        "--threads", type=int, default=0, help="threads of llama.cpp (default: all processors)"
    )
    parser.add_argument(
        "--bin",
        type=Path,
        default=programs.DEFAULT_BIN,
        help="where its programs are (default: %(default)s)",
    )
    args = parser.parse_args()
    atomic.refuse_overwriting(args.out, args.file, args.prompts, args.text, args.reference_logits)
    threads, file = programs.threads(args.threads), names.first_of(args.file)
    distance: dict[str, Any] = {"perplexity": None, "kl_divergence": None}
    if args.reference_logits:
        distance = perplexity.against_reference(file, args.reference_logits, threads, args.bin)
    elif args.text:
        distance = perplexity.of_text(file, args.text, args.chunks, threads, args.bin)
    if args.text:
        distance["text"] = {
            "name": args.text.name,
            "sha256": digest_of(args.text),
            "chunks": args.chunks,
        }
    found = measure(
        file, read_prompts(args.prompts), args.n_max, args.repeats, threads, args.bin, args.serve
    )
    atomic.write_json(args.out, {**found, "file": args.file.name, **distance})
    if distance["kl_divergence"]:
        print(
            f"{args.file.name}: KL divergence {distance['kl_divergence']['mean']:.5f}, perplexity {distance['perplexity']:.4f}"
        )
    print(f"{args.file.name}: {found['verdict']}")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


if __name__ == "__main__":
    cli.run(main)
