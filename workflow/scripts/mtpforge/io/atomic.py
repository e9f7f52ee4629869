"""Files, and folders of files, that appear whole or not at all.

A file is written under a hidden temporary name in its own folder (see `temporary`), flushed to the
disk and renamed. Readers of the final name see the old file or the complete new one; a killed run
leaves only the temporary name behind.
"""

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mtpforge.errors import ForgeError
from mtpforge.io import storage, temporary
from mtpforge.io.ranges import FileRange, Sink

Keep = Callable[[BaseException], bool] | bool
"""Whether an unfinished output stays after an error, so that the caller can resume."""
_REPLACED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOENT)
_SWAPS = 100
_UNLINKABLE = {errno.EPERM, errno.EXDEV, errno.EMLINK, errno.ENOSYS, errno.EOPNOTSUPP}


@contextmanager
def replacing(
    path: Path, keep: Keep = False, needed: int | None = None, shared: int = 0
) -> Iterator[Path]:
    """Yield a temporary path; on success flush it and rename it to `path`, on any error remove it.

    Leftovers of a killed run are removed. With `keep` they stay, also after an error (or some), so
    that the caller can resume. `needed` bytes must be free (see `storage.require`). Raises
    ForgeError if another process is writing the same file, StorageError if the disk is full or
    fails.
    """
    path = Path(path)
    _check_output(path)
    usual = temporary.usual_name(path, "part")
    with storage.naming(usual, needed), _replacing(path, keep) as written:
        if needed is not None:
            storage.require(written, needed, shared)
        yield written


def _check_output(path: Path) -> None:
    """Raise ForgeError for a path without a name, or of a device or pipe: root can replace one."""
    if not path.name:
        raise ForgeError(f"{path}: has no file name: name another output")
    with suppress(OSError):
        mode = path.stat().st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
            raise ForgeError(f"{path}: is a device or pipe: name another output")


@contextmanager
def _replacing(path: Path, keep: Keep) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    with temporary.claimed_file(path, bool(keep)) as written:
        locked = written == temporary.usual_name(path, "part")
        claimed = written.stat().st_ino if locked else None
        try:
            yield written
            if not _is_own(written, claimed):
                raise temporary.in_use(path)
            sync(written)
            _rename(written, path)
        except BaseException as error:
            if _is_own(written, claimed) and not _kept(keep, error):
                written.unlink(missing_ok=True)
            raise
        sync(path.parent)  # or a power cut can undo the renaming


def _is_own(written: Path, claimed: int | None) -> bool:
    """Whether a temporary file is still the one that was claimed, or a hard link put in its place.

    A link is not locked, so a second writer can put a new file in its place. If the name is this
    process's own, nobody can, and `claimed` is None: on FUSE, the inode of a file that is not open
    may change.
    """
    with suppress(FileNotFoundError):
        found = written.stat()
        return claimed in (None, found.st_ino) or found.st_nlink > 1
    return False


def _kept(keep: Keep, error: BaseException) -> bool:
    return keep(error) if callable(keep) else keep


@contextmanager
def replacing_folder(
    path: Path, needed: int | None = None, shared: int = 0, keep: Keep = False
) -> Iterator[Path]:
    """Yield an empty temporary folder; on success flush it and rename it to `path`, else remove it.

    An existing folder `path` is replaced with everything in it. A reader may find no folder for a
    moment, but never an incomplete one. Leftovers of a killed run are removed, unless `keep` (see
    `replacing`). `needed` bytes must be free (see `storage.require`). Raises ForgeError if another
    process is writing the same folder, StorageError if the disk is full or fails.
    """
    path = Path(path)
    _check_output(path)
    usual = temporary.usual_name(path, "part")
    with storage.naming(usual, needed), _replacing_folder(path, keep) as written:
        if needed is not None:
            storage.require(written, needed, shared)
        yield written


@contextmanager
def _replacing_folder(path: Path, keep: Keep) -> Iterator[Path]:
    with temporary.claimed_folder(path, "part", bool(keep)) as written:
        replaced = written.with_name(written.name.removesuffix("part") + "old.part")
        try:
            yield written
            for each in (*storage.inside(written), written):
                sync(each)
            _swap(written, path, replaced)
        except BaseException as error:
            if not _kept(keep, error):
                shutil.rmtree(written, ignore_errors=True)
            raise
        finally:
            shutil.rmtree(replaced, ignore_errors=True)
        sync(path.parent)


@contextmanager
def scratch_folder(beside: Path) -> Iterator[Path]:
    """Yield an empty hidden folder next to `beside`, on the same disk; remove it at the end.

    Leftovers of a killed run are removed. Raises ForgeError if another process is using the same
    folder.
    """
    usual = temporary.usual_name(beside, "scratch")
    with storage.naming(usual), temporary.claimed_folder(beside, "scratch") as folder:
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def refuse_overwriting(out: Path, *inputs: Path | None) -> None:
    """Raise ForgeError if writing `out` would destroy an input: a file, or anything in a folder."""
    for given in inputs:
        if given is not None and _real(out).is_relative_to(_real(given)):
            raise ForgeError(f"{out}: is an input, or inside one: name another output file")


def _real(path: Path) -> Path:
    """A path without links. `Path.resolve` fails at a link to itself."""
    return Path(os.path.realpath(path))


def give_name(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`: a hard link if the file system can, else a copy."""
    with replacing(target) as written:
        link_or_copy(source, written)


def link_or_copy(source: Path, target: Path) -> None:
    """Make `target` a hard link to `source`, or a copy if the file system cannot link them.

    A copy is written into a file that is there, which may be locked. Raises StorageError if it does
    not fit, or the disk fails.
    """
    try:
        link(source, target)
    except OSError as error:
        if not unlinkable(error):
            raise
        _copy(source, target)


def link(source: Path, target: Path) -> None:
    """Make `target`, which may be there, a hard link to `source`. Raises OSError."""
    own = temporary.own_name(target, "part")
    try:
        os.link(source, own)
        os.replace(own, target)
    finally:
        own.unlink(missing_ok=True)  # a rename leaves it if `target` was this link before


def check_room(source: Path, target: Path) -> None:
    """Raise StorageError if `target` must become a copy of `source`, and does not fit."""
    folder = storage.existing(target.parent)
    if source.stat().st_dev != folder.stat().st_dev:
        storage.require(target, source.stat().st_size)


def unlinkable(error: OSError) -> bool:
    """Whether files cannot have hard links here: not so if the disk is full or fails."""
    return error.errno in _UNLINKABLE


def write_text(path: Path, text: str) -> None:
    """Write a small UTF-8 text file, whole or not at all."""
    content = text.encode()
    with replacing(path, needed=len(content)) as written:
        written.write_bytes(content)


def write_scratch(path: Path, text: str) -> None:
    """Write a text file in place, in a temporary folder. Raises StorageError."""
    content = text.encode()
    with storage.naming(path, len(content)):
        path.write_bytes(content)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, keys in the order given, ending in a newline."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _copy(source: Path, target: Path) -> None:
    size = source.stat().st_size
    with storage.naming(target, size), target.open("wb") as file:
        shared = storage.shareable([(source, size)], target)
        storage.require(target, size, shared)
        Sink(file.fileno()).append([FileRange(source, 0, size)])


def _rename(written: Path, path: Path) -> None:
    if path.exists() and path.samefile(written):
        written.unlink()  # rename does nothing between two names of one file
    else:
        os.replace(written, path)


def _swap(written: Path, path: Path, replaced: Path) -> None:
    """Rename a folder to `path`, again if another process has just done so too."""
    for number in range(1, _SWAPS + 1):
        try:
            _swap_once(written, path, replaced)
        except OSError as error:
            if error.errno not in _REPLACED or number == _SWAPS:
                raise
        else:
            break


def _swap_once(written: Path, path: Path, replaced: Path) -> None:
    """Rename a folder to `path`; an older one gets the name `replaced`, or is put back."""
    if not path.is_dir():
        os.replace(written, path)
        return
    shutil.rmtree(replaced, ignore_errors=True)
    try:
        os.replace(path, replaced)  # a folder cannot be renamed to one that is not empty
        os.replace(written, path)
    except BaseException:
        if replaced.exists() and not path.exists():
            os.replace(replaced, path)
        raise
