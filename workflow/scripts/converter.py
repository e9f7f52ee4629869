"""Sets up llama.cpp's own converter: its source from the pinned archive, and an environment from its lock (with torch, 1 GB).

The stamp is written last: where it is, the rest is.

example: converter.py --requirement envs/llama.cpp.txt --lock envs/converter.txt --out resources/converter/stamp.json
"""

from pathlib import Path

from mtpforge import cli
from mtpforge.io import atomic
from mtpforge.llama_cpp import toolchain


def main() -> None:
    """Parse the command line and set it up beside the stamp, in `source` and `environment`."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--requirement", type=Path, required=True, help="requirements file with the source archive"
    )
    parser.add_argument(
        "--lock", type=Path, required=True, help="hashed requirements of the environment"
    )
    parser.add_argument("--out", type=Path, required=True, help="the stamp, a JSON file")
    args = parser.parse_args()
    args.out.unlink(missing_ok=True)
    folder = args.out.parent
    stamp = toolchain.install_source(args.requirement, folder / "source")
    toolchain.install_environment(args.lock, folder / "environment")
    atomic.write_json(args.out, {**stamp, "lock_sha256": toolchain.sha256(args.lock)})


if __name__ == "__main__":
    cli.run(main)
