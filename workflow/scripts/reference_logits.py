"""Write what a BF16 GGUF predicts for a text, for measure.py to compare quantizations with.

example: reference_logits.py Qwen3.5-4B-BF16.gguf --text wiki.test.raw --chunks 16 --out reference.logits
"""

from pathlib import Path

from mtpforge import cli
from mtpforge.io import atomic
from mtpforge.llama_cpp import programs
from mtpforge.measure.perplexity import reference_logits


def main() -> None:
    """Parse the command line and write the logits."""
    parser = cli.parser(__doc__)
    parser.add_argument("model", type=Path, metavar="BF16.gguf")
    parser.add_argument(
        "--text", type=Path, required=True, metavar="FILE", help="at least 1024 tokens"
    )
    parser.add_argument(
        "--chunks",
        type=int,
        default=16,
        help="of 512 tokens, at most so many (default: %(default)s)",
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="0.13 GB a chunk with a vocabulary of 248,320"
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=0,
        help="threads of llama-perplexity (default: all processors)",
    )
    parser.add_argument(
        "--bin", type=Path, default=programs.DEFAULT_BIN, help="where it is (default: %(default)s)"
    )
    args = parser.parse_args()
    atomic.refuse_overwriting(args.out, args.model, args.text)
    with atomic.replacing(args.out) as temporary:
        reference_logits(
            args.model, args.text, temporary, args.chunks, programs.threads(args.threads), args.bin
        )


if __name__ == "__main__":
    cli.run(main)
