"""Files, and folders of them, that appear whole or not at all.

A file is written under a hidden temporary name in its own directory, flushed to the disk, and renamed. A reader of the
final name therefore sees the old file, or the whole new one; a killed run leaves only the temporary name behind.
"""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from mtpforge.errors import ForgeError


@contextmanager
def replacing(path: Path, keep: bool = False) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it to `path`, on any error remove it.

    Raises ForgeError where another process is writing the same file. What a killed run left behind is removed or, with `keep`,
    which also leaves it after an error, to be gone on from.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.part")
    lock = os.open(temporary, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        _lock(lock, temporary, path)
        if (
            not keep and os.fstat(lock).st_size
        ):  # a program that outlived the run may still be writing into it
            temporary.unlink()
            left, lock = lock, os.open(temporary, os.O_RDWR | os.O_CREAT, 0o644)
            os.close(left)
            _lock(lock, temporary, path)
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
        except BaseException:
            if not keep:
                temporary.unlink(missing_ok=True)
            raise
        sync(path.parent)  # the rename itself must survive a power cut
    finally:
        os.close(lock)


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield an empty temporary folder beside `path`; on success fsync all in it and rename it to `path`, else remove it.

    A folder of that name is replaced with all that it holds; a reader may find none for a moment, but never half of one.
    Raises ForgeError where another process is writing the same folder. What a killed run left behind is removed.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary, replaced = (
        path.with_name(f".{path.name}.part"),
        path.with_name(f".{path.name}.old.part"),
    )
    temporary.mkdir(exist_ok=True)
    lock = os.open(temporary, os.O_RDONLY)
    try:
        _lock(lock, temporary, path)
        try:
            _empty(temporary)
            yield temporary
            for written in (*temporary.rglob("*"), temporary):
                sync(written)
            shutil.rmtree(replaced, ignore_errors=True)
            if path.is_dir():
                os.replace(
                    path, replaced
                )  # a folder cannot be renamed over one that holds something
            os.replace(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        sync(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        os.close(lock)


@contextmanager
def scratch_folder(beside: Path) -> Iterator[Path]:
    """Yield an empty hidden folder beside the file that is to be made, on the disk that has the room; removed in the end.

    Raises ForgeError where another process is making the same file. What a killed run left behind is removed.
    """
    folder = beside.with_name(f".{beside.name}.scratch")
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY)
    try:
        _lock(lock, folder, beside)
        try:
            _empty(folder)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(lock)


def _empty(folder: Path) -> None:
    """Remove what a folder holds, but not the folder, which is locked."""
    for entry in folder.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry)
        else:
            entry.unlink()


def _lock(lock: int, temporary: Path, path: Path) -> None:
    """Lock what is temporary; the kernel releases it with the process, however that ends. Raises ForgeError."""
    with suppress(OSError):  # a file system without locks
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = (
                os.fstat(lock).st_ino == temporary.stat().st_ino
            )  # not one that its writer has just renamed
        except (BlockingIOError, FileNotFoundError):
            ours = False
        if not ours:
            raise ForgeError(f"{path}: another process is writing it: wait for that one, or end it")


def refuse_overwriting(out: Path, *inputs: Path | None) -> None:
    """Raise ForgeError where writing `out` would destroy an input, a file or anything in a folder."""
    for given in inputs:
        if given is not None and out.resolve().is_relative_to(given.resolve()):
            raise ForgeError(f"{out}: is an input, or inside one: --out must name another file")


def give_name(source: Path, target: Path) -> None:
    """Let `target` be the same bytes as `source`, as a second name of the file where the file system can."""
    with replacing(target) as temporary:
        temporary.unlink()  # a link cannot be made over a file
        link_or_copy(source, temporary)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, without a second copy on the disk where the file system can. Raises OSError."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def write_text(path: Path, text: str) -> None:
    """Write a small UTF-8 text file in one piece."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file, in the order given, ending in a newline."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def sync(path: Path) -> None:
    """Flush one file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
