"""Compute an importance matrix of a model from a text, with llama-imatrix.

example: imatrix.py Qwen3.5-4B-BF16.gguf --text calibration.txt --out imatrix.gguf
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from pathlib import Path

from mtpforge import cli, recorded_digests, table
from mtpforge.gguf.file_names import first_file
from mtpforge.io import atomic
from mtpforge.llama_cpp import programs
from mtpforge.quantize import imatrix


def main() -> None:
    """Parse the command line and compute."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "model", type=Path, metavar="IN.gguf", help="a BF16 GGUF, with or without a head"
    )
    parser.add_argument(
        "--text", type=Path, required=True, help="plain text similar to what the model will see"
    )
    parser.add_argument(
        "--out", type=Path, required=True, help="the importance matrix to write, a GGUF"
    )
    recorded_digests.add_option(parser, "--recorded", "the GGUF")
    recorded_digests.add_option(parser, "--text-recorded", "--text")
    recorded_digests.add_digest_option(parser)
    programs.add_options(parser, log=True)
    args = parser.parse_args()
    args.model = first_file(args.model)
    atomic.refuse_overwriting(args.out, args.model, args.text)
    recorded_digests.check_whole(args.text, args.text_recorded)
    llama = programs.from_options(args)
    imatrix.compute(args.model, args.text, args.out, llama=llama, recorded_at=args.recorded)
    recorded_digests.write_digest(args.digest, args.out)
    print(table.size_of(args.out))


if __name__ == "__main__":
    cli.run(main)
