"""Set up llama.cpp's converter: its source, and an environment from its lock (with torch, 1 GB).

The stamp is written last: if it exists, the rest is complete.

example: converter.py --requirement envs/llama.cpp.txt --lock envs/converter.txt --out stamp.json
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from pathlib import Path

from mtpforge import cli
from mtpforge.llama_cpp.toolchain import install_converter


def main() -> None:
    """Parse the command line, and set up `source` and `environment` beside the stamp."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--requirement",
        type=Path,
        required=True,
        help="requirements file that pins the source archive",
    )
    parser.add_argument(
        "--lock", type=Path, required=True, help="hashed requirements of the environment"
    )
    parser.add_argument("--out", type=Path, required=True, help="the stamp, as JSON")
    args = parser.parse_args()
    args.out.unlink(missing_ok=True)
    install_converter(args.requirement, args.lock, args.out.parent).write(args.out)


if __name__ == "__main__":
    cli.run(main)
