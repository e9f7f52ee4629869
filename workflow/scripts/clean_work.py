"""List what killed runs and finished builds leave on the disk, with sizes; delete it with --yes.

Published files stay. A file whose bytes also have a published name frees nothing, and is left out.

example: clean_work.py
         clean_work.py --yes
"""

import sys

sys.path.insert(0, __file__.rpartition("/")[0])  # PYTHONSAFEPATH leaves it out

import os
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path

from mtpforge import cli, table
from mtpforge.io import leftovers
from mtpforge.progress import say
from mtpforge.rules.folder_lock import holding

RESULTS = Path("results")
STATE = Path(".snakemake")


def main() -> None:
    """Parse the command line; list, and delete if that is asked for."""
    parser = cli.parser(__doc__)
    parser.add_argument("--yes", action="store_true", help="delete all that is listed")
    args = parser.parse_args()
    with holding(STATE, "clean_work.py", say) if args.yes else nullcontext():
        sizes: dict[tuple[int, int], int] = {}
        for title, paths in found().items():
            sizes |= show(title, paths, delete=args.yes)
    if not args.yes:
        total = sum(sizes.values())
        print(f"{table.size(total)} in all; nothing was deleted: make clean-work YES=1")


def found() -> dict[str, list[Path]]:
    """What can be deleted, by what it is."""
    temporary = list(leftovers.find())
    downloads = [path for path in temporary if leftovers.is_download(path)]
    return {
        "left by killed jobs": [path for path in temporary if path not in downloads],
        "beginnings of downloads, which the next run would continue": downloads,
        "pieces and files of unverified quantizations, which the next run would reuse": [
            path for folder in sorted(RESULTS.glob("*")) for path in leftovers.pieces(folder)
        ],
        "intermediates, which a new variant would make again": sorted(intermediates()),
    }


def intermediates() -> Iterator[Path]:
    """GGUFs, logits and importance matrices under work/ whose bytes have no published name."""
    names = Counter(map(inode, RESULTS.glob("*/work/**/*")))
    for path in RESULTS.glob("*/work/*/*"):
        inside = list(path.glob("*.gguf")) if path.parent.name == "split" else [path]
        made = [each for each in inside if each.suffix in (".gguf", ".bin") and each.is_file()]
        if made and all(each.stat().st_nlink == names[inode(each)] for each in made):
            yield path


def inode(path: Path) -> tuple[int, int]:
    """Equal for two names of one file."""
    about = path.lstat()
    return about.st_dev, about.st_ino


def show(title: str, paths: Iterable[Path], delete: bool) -> dict[tuple[int, int], int]:
    """Print the paths and their sizes, and delete them if asked; the bytes of each file once."""
    sizes = {path: size(path) for path in paths}
    once = {inode(path): taken for path, taken in sizes.items()}
    if sizes:
        print(f"{title}:")
    for path, taken in sizes.items():
        print(f"  {table.size(taken):>10}  {path}")
        if delete:
            leftovers.delete(path)
    return once


def size(path: Path) -> int:
    """The bytes of a file, or of all files in a folder."""
    if path.is_symlink() or not path.is_dir():
        return path.lstat().st_size
    inside = (Path(parent, name) for parent, _, names in os.walk(path) for name in names)
    return sum(each.lstat().st_size for each in inside)


if __name__ == "__main__":
    cli.run(main)
