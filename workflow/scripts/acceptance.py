"""Measure an unquantized GGUF's acceptance, as the reference for its quants.

example: acceptance.py Qwen3.5-4B-BF16.gguf --out acceptance.json
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from pathlib import Path

from mtpforge import cli, prompts, recorded_digests
from mtpforge.gguf.file_names import first_file
from mtpforge.io import atomic
from mtpforge.llama_cpp import programs
from mtpforge.verify.report import Acceptance, accepted_drafts
from mtpforge.verify.request import Request
from mtpforge.verify.running import measure_acceptance

FREED = "BF16 was not run: it was freed while it was quantized (lean: shards)"


def main() -> None:
    """Parse the command line and measure."""
    parser = cli.parser(__doc__)
    parser.add_argument("file", type=Path, metavar="BF16.gguf", help="the unquantized GGUF")
    recorded_digests.add_option(parser, "--recorded", "FILE")
    recorded_digests.add_option(parser, "--target-recorded", "the target")
    parser.add_argument(
        "--target", type=Path, metavar="GGUF", help="the model that FILE drafts for, if it is one"
    )
    prompts.add_option(parser)
    programs.add_options(parser)
    parser.add_argument("--out", type=Path, required=True, help="the acceptance, as JSON")
    args = parser.parse_args()
    args.file = first_file(args.file)
    args.target = args.target and first_file(args.target)
    atomic.refuse_overwriting(args.out, args.file)
    if args.recorded and recorded_digests.is_freed(args.recorded):
        Acceptance(skipped=FREED).write(args.out)
        print(f"not measured: {FREED}")
        return
    texts = list(prompts.read_prompts(args.prompts).values())
    llama = programs.from_options(args)
    request = Request(
        prompts=tuple(texts),
        min_acceptance=0,
        digests=args.recorded,
        target=args.target,
        target_recorded=args.target_recorded,
    )
    found = measure_acceptance(args.file, request, llama)
    found.write(args.out)
    print(accepted_drafts(found) or f"not measured: {found.skipped}")


if __name__ == "__main__":
    cli.run(main)
