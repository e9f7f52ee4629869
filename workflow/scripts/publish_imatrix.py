"""Give a computed importance matrix its final name too: by a hard link if possible, else as a copy.

example: publish_imatrix.py results/qwen3.5-4b/work/imatrix/calibration.gguf \\
             --recorded results/qwen3.5-4b/work/imatrix/calibration.json \\
             --out results/qwen3.5-4b/Qwen3.5-4B-imatrix.gguf
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from pathlib import Path

from mtpforge import cli, recorded_digests
from mtpforge.io import atomic


def main() -> None:
    """Parse the command line, check the matrix, and publish it."""
    parser = cli.parser(__doc__)
    parser.add_argument("matrix", type=Path, metavar="IN.gguf", help="what imatrix.py wrote")
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="final name")
    recorded_digests.add_option(parser, "--recorded", "the matrix")
    recorded_digests.add_digest_option(parser)
    args = parser.parse_args()
    recorded_digests.check_whole(args.matrix, args.recorded)
    atomic.give_name(args.matrix, args.out)
    recorded_digests.write_digest(args.digest, args.out)


if __name__ == "__main__":
    cli.run(main)
