"""The lock that one run at a time holds on a folder, by its owner's name and the kernel's flock.

The kernel unlocks when the process ends, however it does, and the name stays after a kill.
"""

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from mtpforge.errors import ForgeError
from mtpforge.run_owner import JOBS_LOCK, RUN_LOCK, Owner, announce, withdraw

JOBS_LIMIT = 60.0
"""Seconds that the next run waits for jobs of one that was killed: they end by themselves."""
_SCRATCH = "mtpforge-"

Say = Callable[[str], None]


@contextmanager
def holding(folder: Path, command: str, say: Say) -> Iterator[bool]:
    """Hold the lock of `folder` (.snakemake); yields whether a run that was killed had it.

    Raises ForgeError if another run has it, or has left it on another machine.
    """
    folder.mkdir(exist_ok=True)
    (folder / RUN_LOCK).touch()
    with (folder / RUN_LOCK).open("r+", encoding="utf-8") as file:
        before = _acquire(file)
        scratch = tempfile.mkdtemp(prefix=_SCRATCH)
        owner = Owner.this_process(command, scratch)
        _write(file, owner.as_text())  # this ends jobs of the run before on other machines
        try:
            wait_for_jobs(folder, say)
        except BaseException:
            _remove_scratch(scratch)
            _write(file, before.as_text() if before else "")
            raise
        announce(owner, folder)
        try:
            if before:
                say(f"Taking over from a run that was killed: {before}")
                _remove_scratch(before.scratch)
            with _temporary_files_in(scratch):
                yield before is not None
        finally:
            withdraw()
            _remove_scratch(scratch)
            _write(file, "")


def owner_of(folder: Path) -> Owner | None:
    """The run that holds the lock of `folder`, or was killed while it did."""
    path = folder / RUN_LOCK
    return Owner.parse(path.read_text(encoding="utf-8")) if path.exists() else None


def forget(folder: Path) -> None:
    """Remove the name of a run that was killed, perhaps elsewhere. A living one stays locked."""
    if (folder / RUN_LOCK).exists():
        os.truncate(folder / RUN_LOCK, 0)


def wait_for_jobs(folder: Path, say: Say) -> None:
    """Wait for jobs that outlive their run. Raises ForgeError if they do not end."""
    deadline = time.monotonic() + JOBS_LIMIT
    said = False
    with (folder / JOBS_LOCK).open("a", encoding="utf-8") as file:
        while not _is_free(file):
            if time.monotonic() > deadline:
                raise ForgeError(
                    "jobs of a run that was stopped are still running here, or on a cluster: "
                    "wait for them, or end them, and run again"
                )
            if not said:
                say("Waiting for stopped jobs to end")
                said = True
            time.sleep(0.1)


def _acquire(file: TextIO) -> Owner | None:
    """Lock the file; returns the owner that has left its name there. Raises ForgeError."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _in_use(_read_soon(file)) from None
    except OSError:  # a file system without locks
        before = _read(file)
        if before and before.lives():
            raise _in_use(before) from None
    before = _read(file)
    if before and not before.is_here():
        raise ForgeError(
            f"this folder is in use by {before}: if that run has ended there, "
            "`.venv/bin/snakemake --unlock`, and run again"
        )
    return before


def _in_use(owner: Owner | None) -> ForgeError:
    who = owner or "another run that is just starting"
    return ForgeError(f"this folder is in use by {who}: wait for it, or end it")


def _read(file: TextIO) -> Owner | None:
    file.seek(0)
    return Owner.parse(file.read())


def _read_soon(file: TextIO) -> Owner | None:
    """The owner; one that has just got the lock writes its name at once."""
    for _ in range(20):
        if owner := _read(file):
            return owner
        time.sleep(0.05)
    return None


def _write(file: TextIO, text: str) -> None:
    """Replace the line in the file: a kill leaves the old one or the new one."""
    line = f"{text}\n".encode()
    os.pwrite(file.fileno(), line, 0)
    os.ftruncate(file.fileno(), len(line) if text else 0)
    os.fsync(file.fileno())


def _is_free(file: TextIO) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True


@contextmanager
def _temporary_files_in(folder: str) -> Iterator[None]:
    """Let the jobs make their temporary files where the next run finds them after a kill."""
    before = tempfile.tempdir, os.environ.get("TMPDIR")
    tempfile.tempdir = os.environ["TMPDIR"] = folder
    try:
        yield
    finally:
        tempfile.tempdir = before[0]
        if before[1] is None:
            del os.environ["TMPDIR"]
        else:
            os.environ["TMPDIR"] = before[1]


def _remove_scratch(name: str) -> None:
    path = Path(name)
    if path.name.startswith(_SCRATCH) and path.parent == Path(tempfile.gettempdir()):
        shutil.rmtree(path, ignore_errors=True)
