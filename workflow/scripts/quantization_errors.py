"""Measure the error of a tensor type in each matrix of a model, on one row in 16.

example: quantization_errors.py Qwen3.5-4B-BF16.gguf --type Q4_K --out Q4_K.json
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from pathlib import Path

from mtpforge import cli, recorded_digests
from mtpforge.gguf import split
from mtpforge.gguf.file_names import first_file
from mtpforge.io import atomic
from mtpforge.llama_cpp import programs
from mtpforge.search.errors import measure_errors


def main() -> None:
    """Parse the command line and measure."""
    parser = cli.parser(__doc__)
    parser.add_argument("source", type=Path, metavar="BF16.gguf", help="the unquantized GGUF")
    parser.add_argument("--type", required=True, metavar="T", help="tensor type: Q4_K, IQ4_XS, ...")
    parser.add_argument("--imatrix", type=Path, metavar="FILE", help="importance matrix to use")
    parser.add_argument("--out", type=Path, required=True, help="the errors to write, a JSON file")
    recorded_digests.add_option(parser, "--recorded", "the GGUF")
    recorded_digests.add_option(parser, "--imatrix-recorded", "--imatrix")
    programs.add_options(parser, log=True)
    args = parser.parse_args()
    args.source = first_file(args.source)
    atomic.refuse_overwriting(args.out, args.source, args.imatrix)
    recorded_digests.check_whole(args.imatrix, args.imatrix_recorded)
    llama = programs.from_options(args)
    # Hashes only the headers: it reads a sixteenth of the rest, once a type, and quantize.py, which
    # reads all of it, refuses what is damaged.
    source = split.joined(recorded_digests.shards(args.source, args.recorded))
    errors = measure_errors(source, args.type, args.imatrix, llama)
    errors.write(args.out)
    found = [each.error for each in errors.tensors.values()]
    print(f"{args.type}: relative error {(sum(found) / len(found)) ** 0.5:.3f}")


if __name__ == "__main__":
    cli.run(main)
