"""Write the logits of a BF16 GGUF on a text, for measure.py to compare its quants with.

If the GGUF is larger than the memory, they are empty.

example: reference_logits.py Qwen3.5-4B-BF16.gguf --text wiki.test.raw --out reference.logits
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from pathlib import Path

from mtpforge import cli, recorded_digests, table
from mtpforge.gguf.file_names import first_file
from mtpforge.io import atomic
from mtpforge.llama_cpp import memory, programs
from mtpforge.measure.perplexity import reference_logits


def main() -> None:
    """Parse the command line and write the logits."""
    parser = cli.parser(__doc__)
    parser.add_argument("model", type=Path, metavar="BF16.gguf", help="the unquantized GGUF")
    parser.add_argument(
        "--text", type=Path, required=True, metavar="FILE", help="text of at least 1024 tokens"
    )
    parser.add_argument(
        "--chunks", type=int, default=16, metavar="N",
        help="use at most N chunks of 512 tokens (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--out", type=Path, required=True,
        help="logits to write: 0.13 GB per chunk for a vocabulary of 248,320",
    )  # fmt: skip
    recorded_digests.add_option(parser, "--recorded", "the GGUF")
    recorded_digests.add_option(parser, "--text-recorded", "--text")
    recorded_digests.add_digest_option(parser)
    programs.add_options(parser)
    args = parser.parse_args()
    args.model = first_file(args.model)
    atomic.refuse_overwriting(args.out, args.model, args.text)
    recorded_digests.check_whole(args.text, args.text_recorded)
    llama = programs.from_options(args)
    if reason := memory.too_large([args.model], llama):
        with atomic.replacing(args.out) as temporary:
            temporary.touch()
        recorded_digests.write_digest(args.digest, args.out)
        print(f"no logits, so no KL divergence: {reason}")
        return
    with (
        atomic.replacing(args.out) as temporary,
        recorded_digests.reading(args.model, args.recorded),
    ):
        reference_logits(args.model, args.text, out=temporary, chunks=args.chunks, llama=llama)
    recorded_digests.write_digest(args.digest, args.out)
    print(table.size_of(args.out))


if __name__ == "__main__":
    cli.run(main)
