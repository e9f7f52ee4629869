"""A folder of results as it is published: the list of its files with their sha256, and whether a copy of it is whole.

`SHA256SUMS` says what belongs to it. Whatever else lies in the folder, such as a file of a variant that is asked for no more,
is not published and is told of.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from mtpforge.errors import ForgeError, VerificationError
from mtpforge.gguf import reader
from mtpforge.io.atomic import write_text
from mtpforge.io.ranges import digest_of
from mtpforge.io.text import read_json
from mtpforge.progress import Show
from mtpforge.publish import provenance

SUMS = "SHA256SUMS"
SLACK = 10.0
"""Seconds by which a file may be younger than the record of it: Snakemake gives both the time when it has seen them."""
_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")
_OURS = ("work", ".cache", ".git")
"""Folders that are no part of what is published: intermediates, and what a download leaves."""

Sums = dict[str, str]
"""Path within the folder -> sha256."""


def files_of(report: Mapping[str, Any]) -> Iterator[tuple[str, int, str]]:
    """(path within the folder, bytes, sha256) of each file that a report of verification is about."""
    if "files" in report:
        for file in report["files"]:
            yield f"{report['file']}/{file['name']}", file["bytes"], file["sha256"]
    else:
        yield report["file"], report["bytes"], report["sha256"]


def unchanged(path: Path, digest: str, record: Path) -> None:
    """Raise VerificationError where a file is not as it was when `record` was written; it is read only where it is younger."""
    if path.stat().st_mtime > record.stat().st_mtime + SLACK:
        certainly_unchanged(path, digest, record)


def certainly_unchanged(path: Path, digest: str, record: Path) -> None:
    """The same, and the file is read in any case: a copy, or a fault of the disk, does not change its time."""
    if digest_of(path) != digest:
        raise VerificationError(
            f"{path}: has changed since {record.name} was written: delete it and run again"
        )


def collect(folder: Path, reports: Iterable[Path], others: Iterable[Path]) -> Sums:
    """What is published of `folder`: the files that `reports` are about, whose digests they know, the reports, and `others`.

    Raises VerificationError where a file is not the one that was verified.
    """
    sums: Sums = {}
    for path in reports:
        for name, size, digest in files_of(read_json(path)):
            if (folder / name).stat().st_size != size:
                raise VerificationError(
                    f"{folder / name}: is not of the size that {path.name} says: delete it and run again"
                )
            unchanged(folder / name, digest, path)
            sums[name] = digest
        sums[path.relative_to(folder).as_posix()] = digest_of(path)
    sums |= {path.relative_to(folder).as_posix(): digest_of(path) for path in others}
    return dict(sorted(sums.items()))


def write_sums(path: Path, sums: Sums) -> None:
    """As `sha256sum --check` reads it."""
    write_text(path, "".join(f"{digest}  {name}\n" for name, digest in sums.items()))


def read_sums(path: Path) -> Sums:
    """The list that a folder has. Raises VerificationError where it is none, or names a file outside of the folder."""
    sums: Sums = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, NotADirectoryError):
        raise VerificationError(
            f"{path}: no such file: name a folder of results, with its {SUMS}"
        ) from None
    except UnicodeDecodeError as error:
        raise VerificationError(f"{path}: is not UTF-8 ({error})") from None
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if match is None or not _is_inside(match[2]) or match[2] in sums:
            raise VerificationError(
                f"{path}: line {number} is no line of it: a sha256, two spaces, a new path within the folder"
            )
        sums[match[2]] = match[1]
    return sums


def _is_inside(name: str) -> bool:
    parts = PurePosixPath(name).parts
    return (
        name.isprintable()
        and "\\" not in name
        and name == "/".join(parts)
        and not {"/", ".", ".."} & set(parts)
    )


def surplus(folder: Path, sums: Sums) -> list[str]:
    """GGUFs of `folder` that its list does not name: sorted paths within it."""
    found = (path.relative_to(folder) for path in folder.rglob("*.gguf"))
    return sorted(
        path.as_posix()
        for path in found
        if path.parts[0] not in _OURS and path.as_posix() not in sums
    )


def check(folder: Path, show: Show) -> list[str]:
    """What is wrong with a folder of results, file by file; it needs nothing else. `show` is told of bytes read.

    Raises VerificationError where it has no list.
    """
    sums, problems, done = read_sums(folder / SUMS), list[str](), 0
    if not any(name.endswith(".gguf") for name in sums):
        problems.append(f"{SUMS}: lists no GGUF: is it cut off?")
    sizes = {name: (folder / name).stat().st_size for name in sums if (folder / name).is_file()}
    for name, digest in sums.items():
        if name not in sizes:
            problems.append(f"{name}: is missing")
            continue
        if digest_of(folder / name) != digest:
            problems.append(f"{name}: has another sha256 than {SUMS} says")
        elif name.endswith(".gguf"):
            problems += _unreadable(folder / name, name)
        done += sizes[name]
        show(done, sum(sizes.values()))
    problems += [
        f"{name}: does not belong there, {SUMS} does not name it" for name in surplus(folder, sums)
    ]
    return problems + _check_statements(folder, sums)


def _unreadable(path: Path, name: str) -> list[str]:
    try:
        reader.read(path)
    except ForgeError as error:
        return [f"{name}: {error}"]
    return []


def _check_statements(folder: Path, sums: Sums) -> list[str]:
    """Every GGUF is the subject of a statement, and every subject is listed with the digest that its statement has."""
    problems, subjects = list[str](), Sums()
    for name in sums:
        if name.startswith(f"{provenance.FOLDER}/") and (folder / name).is_file():
            try:
                subjects |= provenance.subjects(folder / name)
            except ForgeError as error:
                problems.append(f"{name}: {error}")
    ours = {name: digest for name, digest in sums.items() if name.endswith(".gguf")}
    problems += [
        f"{name}: no statement of provenance is about it" for name in ours if name not in subjects
    ]
    wrong = [name for name, digest in subjects.items() if ours.get(name, "") != digest]
    return problems + [
        f"{name}: its statement of provenance is about another sha256 than {SUMS} has"
        for name in wrong
    ]
