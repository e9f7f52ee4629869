"""Records of the files that a user gives.

NAME.json lists the sha256 of each file of a checkpoint, or of each file of a GGUF. Snakemake
compares it, so that a touch or a copy changes nothing. NAME/FILE.json is the record of one file:
size, times, its sha256 and those of its parts, from one pass. Only a file with another size or
time is read again for it, and jobs compare what they read with it.
"""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

from mtpforge.checkpoint import safetensors
from mtpforge.errors import ForgeError, RecordError
from mtpforge.gguf import reader
from mtpforge.io import integrity
from mtpforge.io.integrity import HEADER
from mtpforge.io.ranges import FileRange, hash_parts
from mtpforge.io.records import Record
from mtpforge.progress import say

ADVICE = "restore it, or if it is right, `touch` it, and run again"
"""What to do about a file that has changed, but not its time."""
_LONG = 1 << 30
"""Bytes that take seconds to read."""

_Kind = TypeVar("_Kind", bound=Record)


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
class LocalRecord(Record):
    """A file as it was when it was read: the times are in ns.

    The digests are those of header and tensors; none for a file without these. `target` is the file
    behind a symbolic link.
    """

    written_by: ClassVar[str] = "local_files.py"
    bytes: int
    modified: int
    status_changed: int
    sha256: str
    digests: dict[str, str]
    target: str = ""

    def describes(self, status: os.stat_result) -> bool:
        """Whether a file of this size and these times need not be read again."""
        times = (status.st_mtime_ns, status.st_ctime_ns)
        return (status.st_size, *times) == (self.bytes, self.modified, self.status_changed)


def record(folder: Path, names: Iterable[str], out: Path) -> LocalFiles:
    """Write the list of files in a folder, and their records, unless right. Raises OSError."""
    files = {name: _content(folder / name, _record_at(out, name)) for name in sorted(names)}
    made = LocalFiles(files)
    if made != _read(LocalFiles, out):
        made.write(out)
    return made


def refresh(folder: Path, names: Iterable[str], out: Path) -> None:
    """Bring an existing list up to date. Raises OSError."""
    if out.exists():
        record(folder, names, out)


def records(out: Path) -> dict[str, LocalRecord]:
    """The records of the files of a list. Raises RecordError, OSError."""
    return {name: LocalRecord.read(_record_at(out, name)) for name in LocalFiles.read(out).files}


def checked_digest(path: Path, known: LocalRecord) -> str:
    """The sha256 of a file by its record; a file with other times is read, and compared with it.

    Raises DamagedError, OSError.
    """
    if not known.describes(path.stat()):
        integrity.check([integrity.whole(path, known.sha256, ADVICE)])
    return known.sha256


def _content(path: Path, at: Path) -> LocalFile:
    """The content of a file, which is read if its record does not describe it."""
    status = path.stat()
    known = _read(LocalRecord, at)
    if known and known.describes(status):
        return LocalFile(known.bytes, known.sha256)
    if known and status.st_size >= _LONG:
        say(f"{path}: has another time: reading it again")
    sha256, digests = hash_parts(path, _parts(path))
    times = (status.st_mtime_ns, status.st_ctime_ns)
    target = str(path.resolve()) if path.is_symlink() else ""
    made = LocalRecord(status.st_size, *times, sha256, digests, target)
    # Other content with the old time is damage, unless a link leads to another file. The list shows
    # it, so jobs rerun; the record is as before, so they refuse the file.
    same = known and (made.modified, made.target) == (known.modified, known.target)
    if known is None or made.sha256 == known.sha256 or not same:
        made.write(at)
    return LocalFile(made.bytes, made.sha256)


def _parts(path: Path) -> dict[str, FileRange]:
    """Header and tensors of a file; none of one that has none, or that cannot be parsed."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.ranges(path)
        if path.suffix == ".gguf":
            opened = reader.read(path)
            return {HEADER: reader.header_range(opened), **opened.ranges}
    except ForgeError:  # for the job that needs it to report
        pass
    return {}


def _read(kind: type[_Kind], path: Path) -> _Kind | None:
    """What was recorded; None if nothing was, or the file is malformed."""
    try:
        return kind.read(path)
    except (OSError, RecordError):
        return None


def _record_at(out: Path, name: str) -> Path:
    return out.with_suffix("") / f"{name}.json"
