"""What killed runs left: temporary files of `io.atomic`, and pieces that no plan needs any more."""

import fcntl
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator
from pathlib import Path

from mtpforge.io import journal
from mtpforge.run_owner import TAG, lives_here

FOLDERS = (Path("results"), Path("resources"))
"""Where jobs write."""
_INSTALLED = {Path("resources/converter/environment"), Path("resources/converter/source")}
"""Tens of thousands of files, none of them ours."""
_NAME = re.compile(r"\..+\.(part|scratch)|[^.].*\.yaml(\.\d+)?\.part")
_TAG = re.compile(rf"\.({TAG})(?:\.old)?\.(?:part|scratch)")
_WEEK = 7 * 86400.0
"""Seconds without a change after which a process on another machine no longer writes."""
_PIECES = ("work/manifests/pieces", "work/manifests/quantized/*.gguf")


def remove(*folders: Path, codes: Collection[str] = ()) -> list[Path]:
    """Remove what killed jobs left in these folders, or in all where jobs write.

    Returns the removed paths. What the next run goes on with stays: downloads, and what programs
    with the digests `codes` have a journal of.
    """
    left = list(find(*folders))  # before a journal is removed without its file
    found = [path for path in left if not (is_download(path) or journal.can_go_on(path, codes))]
    for path in found:
        delete(path)
    return found


def find(*folders: Path) -> Iterator[Path]:
    """What no living process writes to, in these folders, or in all where jobs write."""
    for top in folders or FOLDERS:
        for parent, inside, files in os.walk(top):
            for name in [*inside, *files]:
                if _NAME.fullmatch(name) and not _in_use(Path(parent, name)):
                    yield Path(parent, name)
            entered = [name for name in inside if not _NAME.fullmatch(name)]
            inside[:] = [name for name in entered if Path(parent, name) not in _INSTALLED]


def beside(path: Path, ending: str) -> list[Path]:
    """What processes that have ended here left under names of their own for `path`, longest first.

    `ending` is "part" or "scratch".
    """
    name = re.compile(rf"\.{re.escape(path.name)}\.{TAG}(\.old)?\.{ending}")
    found = [each for each in path.parent.iterdir() if name.fullmatch(each.name)]
    left = [each for each in found if not _in_use(each)]
    return sorted(left, key=lambda each: -each.lstat().st_size)


def pieces(results: Path) -> Iterator[Path]:
    """Tensors of quantizations that have not been finished, or verified, in a model's folder.

    Once all files of the model are verified, no plan wants them.
    """
    for pattern in _PIECES:
        yield from sorted(results.glob(pattern))


def is_download(path: Path) -> bool:
    """Whether this is the beginning of a file from the Hub, or of a checkpoint's head."""
    parts = path.parts
    start = parts.index("hub") if "hub" in parts else len(parts)
    # hub/<owner>/<name>/<revision>/<name>/... or hub/<owner>/<name>/<revision>/head/<name>/...
    return len(parts) > start + 5 and parts[start + 4] in (parts[start + 2], "head")


def delete(path: Path) -> None:
    """Remove a file, or a folder with everything in it, as far as that is possible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _in_use(path: Path) -> bool:
    """Whether a living process writes to it: the one that it is named after, or has locked it."""
    if tag := _TAG.search(path.name):
        lives = lives_here(tag[1])
        return not _is_old(path) if lives is None else lives
    locked = journal.written_by(path).name.replace(".old.part", ".part")
    return _is_locked(path.with_name(locked))


def _is_old(path: Path) -> bool:
    try:
        return time.time() - path.lstat().st_mtime > _WEEK
    except OSError:  # gone
        return False


def _is_locked(path: Path) -> bool:
    """Whether a process has locked it; a folder that was replaced has its writer's lock."""
    try:
        descriptor = _open(path)
    except OSError:  # a link, or gone
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:  # by another process, or a file system without locks
        return True
    finally:
        os.close(descriptor)
    return False


def _open(path: Path) -> int:
    """Open anything but a link: for writing if possible, because NFS locks nothing else."""
    flags = os.O_NONBLOCK | os.O_NOFOLLOW
    try:
        return os.open(path, os.O_RDWR | flags)
    except (IsADirectoryError, PermissionError):
        return os.open(path, os.O_RDONLY | flags)
