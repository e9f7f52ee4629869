"""Builds llama.cpp's programs from the pinned source archive, or links ones that exist, and writes a stamp of them.

The stamp is written last: where it is, the programs are. By hand, the first time in about 10 minutes on 2 cores:
`python workflow/scripts/toolchain.py --requirement envs/llama.cpp.txt --bin bin --out stamp.json`.
"""

import argparse
import os
from pathlib import Path

from mtpforge.cli import run
from mtpforge.io.atomic import write_json
from mtpforge.llama_cpp.toolchain import adopt, built, install


def main() -> None:
    """Parse the arguments, and build or link."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--requirement", type=Path, required=True, help="requirements file with the source archive"
    )
    parser.add_argument(
        "--bin", type=Path, required=True, help="directory that receives the programs"
    )
    parser.add_argument("--out", type=Path, required=True, help="the stamp, a JSON file")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="cores to compile on")
    parser.add_argument(
        "--bin-dir", default="", help="programs that exist already: link them, build nothing"
    )
    args = parser.parse_args()
    args.out.unlink(missing_ok=True)
    if args.bin_dir:
        stamp = adopt(Path(args.bin_dir).expanduser(), args.bin)
    else:
        stamp = install(built(args.requirement, args.jobs), args.bin)
    write_json(args.out, stamp)


if __name__ == "__main__":
    run(main)
