"""The digests that were recorded of a job's inputs, by whichever program recorded them.

- convert.py, quantize.py and inject.py write the digests of a GGUF as JSON; imatrix.py and
  reference_logits.py that of their file.
- fetch.py writes a record of each file, fetch_head.py one of a head.
- Nobody records the files that a user gives. The first job that reads one notes its digests in a
  ledger, for the jobs after it, with its time: a file with another time is another file.
"""

import argparse
import fcntl
import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import ClassVar

from mtpforge.checkpoint import safetensors
from mtpforge.errors import DamagedError, ForgeError, GgufError, RecordError
from mtpforge.gguf import reader, split
from mtpforge.gguf.reader import Gguf
from mtpforge.hub.fetch_records import FetchRecord, HeadRecord, read_record
from mtpforge.io import atomic, integrity
from mtpforge.io.integrity import HEADER, WHOLE, Part
from mtpforge.io.ranges import FileRange, digest_of
from mtpforge.io.records import Record
from mtpforge.io.text import ANYWHERE, is_there, read_json

Digests = Mapping[str, str]
"""The sha256 of the parts of one file by name: `header` and tensors, or `file` for all of it."""


class Recorded:
    """The recorded digests of the files in a folder, by their names in it."""

    def __init__(
        self, root: Path, files: Mapping[str, Digests], advice: str = integrity.AGAIN
    ) -> None:
        self._root = root.resolve()
        self._files = files
        self._advice = advice

    def knows(self, path: Path) -> bool:
        """Whether a file of the folder has digests, or will get some."""
        return self._name(path) in self._files

    def parts(self, path: Path, places: Mapping[str, FileRange]) -> list[Part]:
        """Parts of a file with their digests; without one where there is nothing to compare.

        Or all of a file of which only that digest is known.
        """
        name = self._name(path)
        digests = self._digests_of(name)
        advice = self._advice.format(name=name)
        if WHOLE in digests and not places.keys() <= digests.keys():
            return [integrity.whole(path, digests[WHOLE], advice)]
        return [
            Part(each, place, self._of(digests, each), advice) for each, place in places.items()
        ]

    def note(self, read: Iterable[tuple[Part, str]]) -> None:
        """Keep the digests of parts that were read for the first time."""

    def _digests_of(self, name: str) -> Digests:
        return self._files.get(name, {})

    def _of(self, digests: Digests, part: str) -> str | None:
        return digests.get(part, "")  # a part that was not there then is a difference

    def _name(self, path: Path) -> str:
        return (_resolved(path.parent) / path.name).relative_to(self._root).as_posix()


@dataclass(frozen=True)
class LedgerEntry:
    """A file as it was when it was first read: its time in nanoseconds, and digests by part."""

    time: int
    digests: dict[str, str]


@dataclass(frozen=True)
class LedgerFile(Record):
    """The entries of a ledger by the names of the files."""

    written_by: ClassVar[str] = "the first job that reads a file"
    files: dict[str, LedgerEntry] = field(default_factory=dict)


class Ledger(Recorded):
    """The digests of files that a user gave. Other jobs may extend the same ledger meanwhile."""

    def __init__(self, path: Path, root: Path) -> None:
        self._path = path
        entries = LedgerFile.read(path).files if path.exists() else {}
        self._times: dict[Path, int] = {}
        advice = "restore it, or if it is right, `touch` it, and run again"
        super().__init__(root, self._current(entries, root), advice)

    def knows(self, path: Path) -> bool:
        return True

    def parts(self, path: Path, places: Mapping[str, FileRange]) -> list[Part]:
        if path not in self._times:  # as it is before it is read
            self._times[path] = path.stat().st_mtime_ns
        return super().parts(path, places)

    def note(self, read: Iterable[tuple[Part, str]]) -> None:
        new: dict[Path, dict[str, str]] = defaultdict(dict)
        for part, digest in read:
            if part.sha256 is None:
                new[part.place.path][part.name] = digest
        if not new:
            return
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.with_suffix(".lock").open("w") as lock:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(lock, fcntl.LOCK_EX)
            entries = LedgerFile.read(self._path).files if self._path.exists() else {}
            known = self._current(entries, self._root)
            for path, digests in new.items():
                name = self._name(path)
                both = {**known.get(name, {}), **digests}
                entries[name] = LedgerEntry(self._times[path], both)
            LedgerFile(entries).write(self._path)

    def _of(self, digests: Digests, part: str) -> str | None:
        return digests.get(part)

    @staticmethod
    def _current(entries: Mapping[str, LedgerEntry], root: Path) -> dict[str, Digests]:
        """The digests of files that have the time that they had."""
        there = {name: root / name for name in entries if (root / name).exists()}
        return {
            name: entries[name].digests
            for name, path in there.items()
            if path.stat().st_mtime_ns == entries[name].time
        }


def add_option(parser: argparse.ArgumentParser, option: str, file: str) -> None:
    """Add an option for the digests of `file`, as its help calls it."""
    parser.add_argument(
        option,
        type=Path,
        metavar="PATH",
        help=f"digests recorded of {file}, to refuse it if it has changed: JSON of the program "
        "that made it, records of fetch.py (the folder) or fetch_head.py, or a ledger to keep",
    )


def open_recorded(path: Path, root: Path) -> Recorded:
    """The digests of the files in the folder `root`. Raises ForgeError if they are malformed."""
    if path.is_dir():
        return _of_records(path, path.parent / _inside(root, path.parent).parts[0])
    value = read_json(path, within=ANYWHERE) if is_there(path) else {"files": {}}
    if "revision" in value:
        return _of_head(path, root)
    return Ledger(path, root) if "files" in value else _One(root, value)


@contextmanager
def reading(path: Path, recorded: Path | None) -> Iterator[Gguf]:
    """Open a GGUF, and check it against its recorded digests while the block reads it.

    `path` is its first file if it is split. Does not hash without `recorded`. Raises GgufError,
    DamagedError.
    """
    files = shards(path, recorded)
    with hashing(recorded, places(files) if recorded else []) as check:
        yield split.joined(files)
        check()


@contextmanager
def hashing(
    recorded: Path | None, places: Iterable[tuple[str, FileRange]], threads: int = 1
) -> Iterator[Callable[[], dict[str, str]]]:
    """Hash parts of files in one folder while the block reads them.

    Yields a function that waits for the digests, and returns them by name. It raises DamagedError
    if one is not the recorded one; so does this, in place of an error of the block.
    """
    by_file: dict[Path, dict[str, FileRange]] = defaultdict(dict)
    for name, place in places:
        by_file[place.path][name] = place
    known = open_recorded(recorded, next(iter(by_file)).parent) if recorded and by_file else None
    with integrity.reading(_parts(by_file, known), threads) as hashed:

        def check() -> dict[str, str]:
            read = hashed.check()
            if known:
                known.note(read)
            return {part.name: digest for part, digest in read}

        yield check


def places(files: Iterable[Gguf]) -> Iterator[tuple[str, FileRange]]:
    """The headers and tensors of the files of a GGUF."""
    for file in files:
        yield HEADER, reader.header_range(file)
        yield from file.ranges.items()


def shards(path: Path, recorded: Path | None) -> list[Gguf]:
    """Open all files of a GGUF, given the first one, and check their headers against the digests.

    Raises GgufError; DamagedError if a header has changed, or if what can be opened no more has a
    digest.
    """
    known = open_recorded(recorded, path.parent) if recorded else None
    try:
        files = split.shards(path)
    except GgufError as error:
        first = known.parts(path, {HEADER: FileRange(path, 0, 0)}) if known else []
        if first and first[0].sha256:
            raise DamagedError(
                f"{error}: damaged, it was whole before: {first[0].advice}"
            ) from None
        raise
    if known:
        for file in files:
            integrity.check(known.parts(file.path, {HEADER: reader.header_range(file)}))
    return files


def check_whole(path: Path | None, recorded: Path | None) -> None:
    """Check a small file against its digest, if it has one. Raises DamagedError."""
    if path is None or recorded is None:
        return
    known = open_recorded(recorded, path.parent)
    place = FileRange(path, 0, path.stat().st_size)
    known.note(integrity.check(known.parts(path, {WHOLE: place})))


def check_given(path: Path, ledger: Path, root: Path) -> None:
    """Check a whole file that a user gave against its ledger, and note what that lacks.

    Raises DamagedError.
    """
    known = Ledger(ledger, root)
    known.note(integrity.check(known.parts(path, _places(path)), os.cpu_count() or 1))


def _places(path: Path) -> dict[str, FileRange]:
    """Header and tensors of a file that has these, else the whole file."""
    whole = FileRange(path, 0, path.stat().st_size)
    try:
        if path.suffix == ".safetensors":
            return safetensors.ranges(path)
        if path.suffix == ".gguf":
            return dict(places([reader.read(path)]))
    except ForgeError:  # a header that cannot be read is not what was recorded
        return {HEADER: whole}
    return {WHOLE: whole}


def add_digest_option(parser: argparse.ArgumentParser) -> None:
    """Add --digest, for the sha256 of the result."""
    parser.add_argument(
        "--digest", type=Path, metavar="FILE", help="write the sha256 of the result, as JSON"
    )


def write_digest(path: Path | None, file: Path) -> None:
    """Record the sha256 of a whole file as JSON, if `path` asks for it."""
    if path:
        atomic.write_json(path, {"sha256": digest_of(file)})


def _parts(
    by_file: Mapping[Path, Mapping[str, FileRange]], known: Recorded | None
) -> Iterator[Part]:
    """Parts of files with their digests, and those that only have one together."""
    for path, places in by_file.items():
        found = known.parts(path, places) if known else []
        yield from found
        named = {part.name for part in found}
        yield from (Part(name, at, None) for name, at in places.items() if name not in named)


@cache
def _resolved(folder: Path) -> Path:
    """A folder without links; cached, because a checkpoint can have 200,000 tensors."""
    return folder.resolve()


class _One(Recorded):
    """The digests of a single GGUF, whatever its name; of a split one, those of all its files."""

    def __init__(self, root: Path, digests: Digests) -> None:
        super().__init__(root, {})
        whole = digests.get("sha256")
        self._digests = {WHOLE: whole} if whole else digests

    def parts(self, path: Path, places: Mapping[str, FileRange]) -> list[Part]:
        named = {
            split.header_name(path) if name == HEADER else name: at for name, at in places.items()
        }
        return super().parts(path, named)

    def _digests_of(self, name: str) -> Digests:
        return self._digests


def _inside(root: Path, folder: Path) -> Path:
    """The path of a fetched folder from the one that has its records too."""
    inside = root.resolve()
    if inside == folder.resolve() or not inside.is_relative_to(folder.resolve()):
        raise RecordError(f"{folder}: has no records of {root}: name the folder of its records")
    return inside.relative_to(folder.resolve())


def _of_records(folder: Path, root: Path) -> Recorded:
    files: dict[str, Digests] = {}
    for path in folder.rglob("*.json"):
        record = read_record(path)
        if isinstance(record, FetchRecord):
            files[record.name] = {WHOLE: record.sha256, **record.digests}
    return Recorded(root, files, f"delete it and {folder}/{{name}}.json, and run again")


def _of_head(path: Path, root: Path) -> Recorded:
    head = HeadRecord.read(path)
    files = {name: {WHOLE: digest, HEADER: digest} for name, digest in head.files.items()}
    for name, tensor in head.tensors.items():
        files.setdefault(tensor.shard, {})[name] = tensor.sha256
    return Recorded(root, files, f"delete {root} and {path}, and run again")
