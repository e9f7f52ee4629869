"""Records of the files that a user gives: their sha256, so that a touch or a copy changes nothing.

Beside a record, `NAME.seen` keeps the size and times with which each file was read: only a file
with others is read again.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mtpforge.errors import RecordError
from mtpforge.io.ranges import digest_of
from mtpforge.io.records import Record
from mtpforge.progress import say

_LONG = 1 << 30
"""Bytes that take seconds to read."""


@dataclass(frozen=True)
class LocalFile:
    """The content of a file."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class LocalFiles(Record):
    """The contents of files, by their names in a folder."""

    written_by: ClassVar[str] = "local_files.py"
    files: dict[str, LocalFile]


@dataclass(frozen=True)
class _Seen(Record):
    """Size, and times of the last change of content and of status (in ns), of each file."""

    written_by: ClassVar[str] = "local_files.py"
    files: dict[str, list[int]]


def record(folder: Path, names: Iterable[str], out: Path) -> LocalFiles:
    """Write the record of files in a folder, unless it is right as it is. Raises OSError."""
    known, seen_before = _read(out)
    files: dict[str, LocalFile] = {}
    seen: dict[str, list[int]] = {}
    for name in sorted(names):
        status = (folder / name).stat()
        seen[name] = [status.st_size, status.st_mtime_ns, status.st_ctime_ns]
        if name not in known or seen[name] != seen_before.get(name):
            if name in known and status.st_size >= _LONG:
                say(f"{folder / name}: has another time: reading it again")
            files[name] = LocalFile(status.st_size, digest_of(folder / name))
        else:
            files[name] = known[name]
    made = LocalFiles(files)
    if files != known:
        made.write(out)
    if seen != seen_before:
        _Seen(seen).write(_seen_path(out))
    return made


def refresh(folder: Path, names: Iterable[str], out: Path) -> None:
    """Bring an existing record up to date. Raises OSError."""
    if out.exists():
        record(folder, names, out)


def _read(out: Path) -> tuple[dict[str, LocalFile], dict[str, list[int]]]:
    """What is known of the files, and how they were when they were read; empty if it is damaged."""
    try:
        return LocalFiles.read(out).files, _Seen.read(_seen_path(out)).files
    except (OSError, RecordError):
        return {}, {}


def _seen_path(out: Path) -> Path:
    return out.with_suffix(".seen")
