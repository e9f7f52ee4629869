"""Temporary names that one process at a time writes to.

If the kernel's locks hold, all processes use one name for an output, and lock it. Else each has a
name of its own: on Lustre without `-o flock`, on NFS without a lock daemon or with `nolock`, and
for folders on any network file system, because a folder is locked on one machine only.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mtpforge import run_owner
from mtpforge.errors import ForgeError
from mtpforge.io import leftovers, storage

PATIENCE = 30.0
"""Seconds that a job waits for another writer, perhaps one of a run that was killed, to end."""
_INTERVAL = 0.2


@contextmanager
def claimed_file(path: Path, keep: bool) -> Iterator[Path]:
    """Yield the temporary name of a file that is there, and that nobody else writes to.

    It is empty, unless `keep` and a killed run has left its beginning. Raises ForgeError if another
    process is writing it, unless this is a job of Snakemake: it waits, and then writes its own.
    """
    usual = usual_name(path, "part")
    alone = storage.locks_alone(path.parent)
    lock = None if alone else _claim(usual, path)
    if lock is None:
        yield _own_file(path, keep)
        return
    left = os.fstat(lock)
    is_link = left.st_nlink > 1  # to what a killed run was about to publish
    if left.st_size and (is_link or not keep):
        lock = _start_over(lock, usual, path)
    try:
        yield usual
    finally:
        os.close(lock)


@contextmanager
def claimed_folder(path: Path, ending: str, keep: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that nobody else writes to.

    It is empty, and removed after an error, unless `keep`. Raises as `claimed_file` does.
    """
    usual = usual_name(path, ending)
    lock = None if storage.is_network(path.parent) else _claim(usual, path, is_folder=True)
    if lock is None:
        yield _own_folder(path, ending)
        return
    try:
        if not keep:
            _empty(usual)
        yield usual
    except BaseException:
        if not keep:
            shutil.rmtree(usual, ignore_errors=True)
        raise
    finally:
        os.close(lock)


def usual_name(path: Path, ending: str) -> Path:
    """The temporary name that all processes use for `path` if the kernel's locks hold."""
    return path.with_name(f".{path.name}.{ending}")


def in_use(path: Path) -> ForgeError:
    """The error that another process is writing `path`."""
    return ForgeError(f"{path}: another process is writing it: wait for it, or stop it")


# ── one name, locked ──


def _claim(usual: Path, target: Path, is_folder: bool = False) -> int | None:
    """Open and lock a temporary file or folder; the kernel unlocks it when the process ends.

    None if it cannot be locked, or a job has waited for its other writer. Raises ForgeError.
    """
    is_job = run_owner.VARIABLE in os.environ
    deadline = time.monotonic() + (PATIENCE if is_job else 0)
    while True:
        with suppress(BlockingIOError):
            return _try_to_claim(usual, is_folder)
        if time.monotonic() < deadline:
            time.sleep(_INTERVAL)
        elif is_job:
            return None
        else:
            raise in_use(target)


def _try_to_claim(usual: Path, is_folder: bool) -> int | None:
    """One try. Raises BlockingIOError if another process has locked it."""
    lock, is_new = _open(usual, is_folder)
    try:
        if _lock(lock, usual):
            return lock
    except BaseException:
        os.close(lock)
        raise
    os.close(lock)
    if is_new:
        with suppress(OSError):
            usual.rmdir() if is_folder else usual.unlink()
    return None


def _open(usual: Path, is_folder: bool) -> tuple[int, bool]:
    """Open a temporary file or folder; whether it is new. Only who made it may remove it."""
    if not is_folder:
        with suppress(FileExistsError):
            return os.open(usual, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), True  # less the umask
    usual.parent.mkdir(parents=True, exist_ok=True)
    is_new = is_folder and _made(usual)
    try:
        return os.open(usual, (os.O_RDONLY if is_folder else os.O_RDWR) | os.O_NOFOLLOW), is_new
    except FileNotFoundError:  # another process has just renamed or removed it
        return _open(usual, is_folder)
    except OSError:
        if is_new:
            usual.rmdir()
        raise


def _made(folder: Path) -> bool:
    with suppress(FileExistsError):
        folder.mkdir()
        return True
    return False


def _lock(descriptor: int, usual: Path) -> bool:
    """Lock it; False if the file system has no locks. Raises BlockingIOError."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    with suppress(FileNotFoundError):  # another process may just have renamed what we opened
        if os.fstat(descriptor).st_ino == usual.stat().st_ino:
            return True
    raise BlockingIOError


def _start_over(lock: int, usual: Path, target: Path) -> int:
    """Use a new temporary file: a program that outlived its run may still write to the old one."""
    try:
        usual.unlink()
        found = _claim(usual, target)
    finally:
        os.close(lock)
    if found is None:
        raise in_use(target)
    return found


def _empty(folder: Path) -> None:
    """Remove the contents of a folder, but not the folder, which is locked."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


# ── a name of one's own ──


def own_name(path: Path, ending: str) -> Path:
    """A temporary name that no other process uses."""
    return path.with_name(f".{path.name}.{run_owner.tag()}.{ending}")


def _own_file(path: Path, keep: bool) -> Path:
    """A new file; with `keep` the longest that a killed process of this machine has left."""
    own = own_name(path, "part")
    for left in leftovers.beside(path, "part"):
        if keep and not own.exists():
            with suppress(FileNotFoundError):  # another process was first
                left.rename(own)
        else:
            leftovers.delete(left)
    os.close(os.open(own, os.O_RDWR | os.O_CREAT, 0o666))
    return own


def _own_folder(path: Path, ending: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in leftovers.beside(path, ending):
        leftovers.delete(left)
    own = own_name(path, ending)
    own.mkdir()
    return own
