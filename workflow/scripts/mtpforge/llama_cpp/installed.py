"""What lies beside programs: their stamp, their shared libraries, and the converter's packages."""

import hashlib
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from mtpforge import processors
from mtpforge.errors import ToolchainError
from mtpforge.io import atomic
from mtpforge.io.ranges import digest_of
from mtpforge.io.text import ANYWHERE, is_there, member, read_json

DIGESTS = "digests.json"
"""The digests of the converter's folders, beside its stamp; they differ from machine to machine."""
PARTS = ("source", "environment/lib")

_LIBRARIES = ("*.so", "*.so.*", "*.dylib")
_OWN = ("libggml", "libllama", "libmtmd")


def stamp_of(folder: Path, name: str) -> Path:
    """The stamp of a program of this folder: its own, else that of all. It need not exist."""
    parent = folder.absolute().parent
    own = parent / f"{name}.json"
    return own if own.exists() else parent / "stamp.json"


def libraries(programs: Iterable[Path]) -> dict[str, str]:
    """The sha256 of the shared libraries of llama.cpp that programs load, by path.

    They lie in the folder of the programs, links followed, or in `lib` beside it. Paths are
    relative to that folder.
    """
    folders = sorted({program.resolve().parent for program in programs})
    found = [
        path
        for folder in folders
        for place in (folder, folder.parent / "lib")
        for pattern in _LIBRARIES
        for path in sorted(place.glob(pattern))
        if path.is_file() and (place == folder or path.name.startswith(_OWN))
    ]
    targets = dict(zip(found, (path.resolve() for path in found), strict=True))
    digests = {target: digest_of(target) for target in {*targets.values()}}
    return {os.path.relpath(path, folders[0]): digests[target] for path, target in targets.items()}


def note_converter(folder: Path) -> None:
    """Note the digests of the converter's folders, for `check_converter`."""
    atomic.write_json(folder / DIGESTS, {part: tree_digest(folder / part) for part in PARTS})


def is_noted(folder: Path, part: str) -> bool:
    """Whether a folder of the converter is as it was noted, or was never noted."""
    noted = folder / DIGESTS
    known = read_json(noted, ToolchainError, within=ANYWHERE) if is_there(noted) else {}
    digest = member(known, part, str, str(noted))
    return digest is None or digest == tree_digest(folder / part)


@cache
def check_converter(folder: Path) -> None:
    """Raise ToolchainError if the converter, or a package of its environment, has changed.

    Once for each process, because these are 900 MB.
    """
    for part in PARTS:
        if not is_noted(folder, part):
            raise ToolchainError(
                f"{folder / part}: has changed since it was set up: run "
                "`.venv/bin/snakemake --cores all --forcerun converter`"
            )


def tree_digest(folder: Path) -> str:
    """The sha256 of names and contents of all files below a folder, without compiled Python."""
    paths = [
        Path(parent, name)
        for parent, folders, names in os.walk(folder)
        for name in (*names, *(each for each in folders if Path(parent, each).is_symlink()))
        if not parent.endswith("__pycache__")
    ]
    with ThreadPoolExecutor(processors.allotted()) as pool:
        lines = pool.map(lambda path: f"{_content(path)}  {path.relative_to(folder)}\n", paths)
        return hashlib.sha256("".join(sorted(lines)).encode("utf-8", "surrogateescape")).hexdigest()


def _content(path: Path) -> str:
    return f"-> {path.readlink()}" if path.is_symlink() else digest_of(path)
