"""Build llama.cpp's programs from the pinned source archive, or link existing ones; write a stamp.

The stamp is written last: if it exists, the programs are complete. With --program it takes one of
them; a later call builds the others, and --of joins their stamps.

example: toolchain.py --requirement envs/llama.cpp.txt --bin bin --out stamp.json
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

from pathlib import Path

from mtpforge import cli, processors
from mtpforge.llama_cpp.compilation import PROGRAMS
from mtpforge.llama_cpp.stamp import Stamp, joined
from mtpforge.llama_cpp.toolchain import adopt, built, install


def main() -> None:
    """Parse the command line, and build or link."""
    parser = cli.parser(__doc__)
    parser.add_argument(
        "--requirement", type=Path, required=True, metavar="FILE",
        help="requirements file that pins the source archive",
    )  # fmt: skip
    parser.add_argument(
        "--bin", type=Path, required=True, metavar="DIR", help="folder that receives the programs"
    )
    parser.add_argument("--out", type=Path, required=True, help="the stamp, as JSON")
    parser.add_argument(
        "--jobs", type=int, default=processors.available(), metavar="N", help="cores to compile on"
    )
    parser.add_argument(
        "--bin-dir",
        default="",
        metavar="DIR",
        help="link the programs in this folder, build nothing",
    )
    parser.add_argument("--cuda", action="store_true", help="build for NVIDIA's GPUs, with nvcc")
    parser.add_argument("--program", choices=PROGRAMS, help="only this one")
    parser.add_argument(
        "--of", type=Path, nargs="+", metavar="STAMP",
        help="only join the stamps of programs that are there",
    )  # fmt: skip
    args = parser.parse_args()
    if args.of:
        joined(map(Stamp.read, args.of)).write(args.out)
        return
    args.out.unlink(missing_ok=True)
    programs = (args.program,) if args.program else PROGRAMS
    if args.bin_dir:
        stamp = adopt(Path(args.bin_dir).expanduser(), args.bin, programs)
    else:
        entry = built(args.requirement, args.jobs, programs, cuda=args.cuda)
        stamp = install(entry, args.bin, programs)
    stamp.write(args.out)
    print(f"llama.cpp {stamp.llama_cpp} ({stamp.commit[:9]})")


if __name__ == "__main__":
    cli.run(main)
