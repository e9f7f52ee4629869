"""Measure what share of its head's drafts an unquantized GGUF accepts, for its quantizations to be compared with.

example: acceptance.py Qwen3.5-4B-BF16.gguf --out acceptance.json
"""

from pathlib import Path

from mtpforge import cli
from mtpforge.io import atomic
from mtpforge.llama_cpp import programs
from mtpforge.prompts import PROMPTS, read_prompts
from mtpforge.verify.request import Request
from mtpforge.verify.running import acceptance


def main() -> None:
    """Parse the command line and measure."""
    parser = cli.parser(__doc__)
    parser.add_argument("file", type=Path, metavar="BF16.gguf")
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="DIR",
        default=PROMPTS,
        help="folder of *.txt prompts to draft on",
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
    parser.add_argument("--out", type=Path, required=True, help="what was measured, as JSON")
    args = parser.parse_args()
    atomic.refuse_overwriting(args.out, args.file)
    prompts = tuple(read_prompts(args.prompts).values())
    request = Request(prompts=prompts, min_acceptance=0, threads=programs.threads(args.threads))
    atomic.write_json(args.out, acceptance(args.file, request, args.bin))


if __name__ == "__main__":
    cli.run(main)
