"""The digests that were recorded of a job's inputs, by whichever program recorded them.

- convert.py, quantize.py and inject.py write the digests of a GGUF as JSON; imatrix.py and
  reference_logits.py that of their file.
- fetch.py writes a record of each file, fetch_head.py one of a head.
- local_files.py lists and records the files that a user gives.
"""

import argparse
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from mtpforge import local_files
from mtpforge.errors import DamagedError, GgufError, RecordError
from mtpforge.gguf import reader, split
from mtpforge.gguf.reader import Gguf
from mtpforge.hub.fetch_records import DIGESTS, FetchRecord, HeadRecord, read_record
from mtpforge.io import atomic, integrity
from mtpforge.io.integrity import HEADER, WHOLE, Part
from mtpforge.io.ranges import FileRange, digest_of
from mtpforge.io.text import ANYWHERE, read_json

Digests = Mapping[str, str]
"""The sha256 of the parts of one file by name: `header` and tensors, or `file` for all of it."""


FREED = "freed"
"""Beside the digests of a BF16 file that was freed while it was quantized (`lean: shards`)."""


class Recorded:
    """The recorded digests of the files in a folder, by their names in it."""

    def __init__(
        self, root: Path, files: Mapping[str, Digests], advice: str = integrity.AGAIN
    ) -> None:
        self._root = root.resolve()
        self._files = dict(files)
        self._advice = advice

    def knows(self, path: Path) -> bool:
        """Whether a file of the folder has digests."""
        return self._name(path) in self._files

    def learn(self, name: str, digests: Digests) -> None:
        """Add digests of a file that has been downloaded again."""
        self._files[name] = {**self._digests_of(name), **digests}

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
            Part(each, place, digests.get(each, ""), advice)  # none: a part that was not there
            for each, place in places.items()
        ]

    def _digests_of(self, name: str) -> Digests:
        return self._files.get(name, {})

    def _name(self, path: Path) -> str:
        return (_resolved(path.parent) / path.name).relative_to(self._root).as_posix()


def add_option(
    parser: argparse.ArgumentParser, option: str, file: str, action: str = "store"
) -> None:
    """Add an option for the digests of `file`, as its help calls it."""
    parser.add_argument(
        option,
        action=action,
        type=Path,
        metavar="PATH",
        help=f"digests recorded of {file}, to refuse it if it has changed: JSON of the program "
        "that made it or of local_files.py, records of fetch.py (the folder) or fetch_head.py",
    )


def open_recorded(path: Path, root: Path) -> Recorded:
    """The digests of the files in the folder `root`. Raises ForgeError if they are malformed."""
    if path.is_dir():
        return _of_records(path, path.parent / _inside(root, path.parent).parts[0])
    value = read_json(path, within=ANYWHERE)
    if "revision" in value:
        return _of_head(path, root)
    return _of_local_files(path, root) if "files" in value else _One(root, value)


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
            return {part.name: digest for part, digest in hashed.check()}

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
        for part in known.parts(path, {HEADER: FileRange(path, 0, 0)}) if known else []:
            if part.name == WHOLE:  # its header could not be read then either
                integrity.check([part])
            elif part.sha256:
                raise DamagedError(
                    f"{error}: damaged, it was whole before: {part.advice}"
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
    integrity.check(known.parts(path, {WHOLE: place}))


def add_digest_option(parser: argparse.ArgumentParser) -> None:
    """Add --digest, for the sha256 of the result."""
    parser.add_argument(
        "--digest", type=Path, metavar="FILE", help="write the sha256 of the result, as JSON"
    )


def write_digest(path: Path | None, file: Path) -> None:
    """Record the sha256 of a whole file as JSON, if `path` asks for it."""
    if path:
        atomic.write_json(path, {"sha256": digest_of(file)})


def mark_freed(path: Path) -> None:
    """Note with its digests that a BF16 file was freed, so that others follow if it is not."""
    atomic.write_json(path, {**read_json(path, within=ANYWHERE), FREED: "lean: shards"})


def is_freed(path: Path) -> bool:
    """Whether `mark_freed` noted that."""
    return path.is_file() and FREED in read_json(path, within=ANYWHERE)


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
    for path in [*folder.rglob("*.json"), *(folder.parent / DIGESTS).rglob("*.json")]:
        record = read_record(path)
        if isinstance(record, FetchRecord):
            files[record.name] = {WHOLE: record.sha256, **record.digests}
    return Recorded(root, files, f"delete it and {folder}/{{name}}.json, and run again")


def _of_local_files(path: Path, root: Path) -> Recorded:
    found = local_files.records(path).items()
    files = {name: {WHOLE: record.sha256, **record.digests} for name, record in found}
    return Recorded(root, files, local_files.ADVICE)


def _of_head(path: Path, root: Path) -> Recorded:
    head = HeadRecord.read(path)
    files = {name: {WHOLE: digest, HEADER: digest} for name, digest in head.files.items()}
    for name, tensor in head.tensors.items():
        files.setdefault(tensor.shard, {})[name] = tensor.sha256
    return Recorded(root, files, f"delete {root} and {path}, and run again")
