"""SHA256SUMS, the list of all published files of a results folder, and checking a copy with it.

Files in the folder that are not on the list, such as those of a removed variant, are reported and
never published.
"""

import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from mtpforge import progress
from mtpforge.errors import ForgeError, VerificationError
from mtpforge.gguf import reader
from mtpforge.io.atomic import write_text
from mtpforge.io.ranges import digest_of
from mtpforge.io.text import JSON_LIMIT, YAML_LIMIT, read_text
from mtpforge.publish import provenance, receipts
from mtpforge.verify.report import Report, Shard

SUMS = "SHA256SUMS"
MATRIX = "-imatrix.gguf"
"""The end of the name of a published importance matrix."""
SLACK = 10.0
"""Seconds by which a file may be newer than its record: Snakemake gives both the time of the job's
end."""
_LINE = re.compile(r"([0-9a-f]{64})  (\S.*)")
_UNPUBLISHED = ("work", ".cache", ".git")
"""Folders that are never published: intermediates, and what a download leaves behind."""

Sums = dict[str, str]
"""Path within the folder -> sha256."""


def collect(folder: Path, reports: Iterable[Path], others: Iterable[Path]) -> Sums:
    """The files to publish: those that the verification reports cover, the reports, and `others`.

    Digests of GGUFs come from the reports. A file that has been uploaded need not be there. Raises
    VerificationError if a file has changed since.
    """
    sums: Sums = {}
    sent = receipts.known(folder)
    for path in reports:
        for name, size, digest in Report.read(path).published:
            sums[name] = digest
            if not (folder / name).exists() and sent.get(name) == Shard(name, size, digest):
                continue
            if (folder / name).stat().st_size != size:
                raise VerificationError(
                    f"{folder / name}: its size differs from that in {path.name}: "
                    "delete it and run again"
                )
            check_unchanged_since(folder / name, digest, path)
        sums[path.relative_to(folder).as_posix()] = digest_of(path)
    sums |= {path.relative_to(folder).as_posix(): digest_of(path) for path in others}
    return dict(sorted(sums.items()))


def shown_pictures(folder: Path, pictures: Iterable[Path]) -> list[Path]:
    """The pictures that the folder's card shows: the others may have nothing to draw."""
    card = folder / "README.md"
    text = read_text(card, VerificationError, most=JSON_LIMIT) if card.exists() else ""
    return [path for path in pictures if path.relative_to(folder).as_posix() in text]


def write_sums(path: Path, sums: Sums) -> None:
    """Write a list that `sha256sum --check` reads."""
    write_text(path, "".join(f"{digest}  {name}\n" for name, digest in sums.items()))


def read_sums(path: Path) -> Sums:
    """Read a list.

    Raises VerificationError if it is malformed or names a file outside its folder.
    """
    if not path.exists():
        raise VerificationError(f"{path}: no such file: name a results folder that contains {SUMS}")
    lines = read_text(path, VerificationError, most=YAML_LIMIT).splitlines()
    sums: Sums = {}
    for number, line in enumerate(lines, 1):
        match = _LINE.fullmatch(line)
        if match is None:
            raise VerificationError(f"{path}:{number}: malformed line, expected `<sha256>  <path>`")
        if not _is_inside(match[2]):
            raise VerificationError(f"{path}:{number}: not a plain path within the folder")
        if match[2] in sums:
            raise VerificationError(f"{path}:{number}: lists {match[2]} twice")
        sums[match[2]] = match[1]
    return sums


def check(folder: Path) -> list[str]:
    """The problems of a results folder, file by file; only what the folder contains is needed.

    Files that were uploaded and deleted here are no problem. Raises VerificationError if it has no
    list.
    """
    sums = read_sums(folder / SUMS)
    sent = receipts.known(folder)
    away = {
        name
        for name, digest in sums.items()
        if name in sent and sent[name].sha256 == digest and not (folder / name).exists()
    }
    for name in sorted(away):
        progress.say(f"{name}: not here: it was uploaded, and deleted then")
    problems: list[str] = []
    if not any(name.endswith(".gguf") for name in sums):
        problems.append(f"{SUMS}: lists no GGUF: is it truncated?")
    sizes = {name: (folder / name).stat().st_size for name in sums if (folder / name).is_file()}
    done = 0
    with progress.bar(folder.name) as show:
        for name, digest in sums.items():
            if name in away:
                continue
            problems += _check_file(folder / name, name, digest)
            done += sizes.get(name, 0)
            show(done, sum(sizes.values()))
    problems += [f"{name}: not listed in {SUMS}" for name in unlisted(folder, sums)]
    return problems + _check_statements(folder, sums)


def unlisted(folder: Path, sums: Sums) -> list[str]:
    """GGUFs of the folder that its list does not name: sorted paths within it."""
    found = [path.relative_to(folder) for path in folder.rglob("*.gguf")]
    published = [path.as_posix() for path in found if path.parts[0] not in _UNPUBLISHED]
    return sorted(set(published) - sums.keys())


def check_unchanged_since(path: Path, digest: str, record: Path) -> None:
    """Raise VerificationError if a file changed after `record`; only a newer file is hashed."""
    if path.stat().st_mtime > record.stat().st_mtime + SLACK:
        check_unchanged(path, digest, record)


def check_unchanged(path: Path, digest: str, record: Path) -> None:
    """The same, but always hash the file: a copy or a disk fault does not change its time."""
    if digest_of(path) != digest:
        raise VerificationError(
            f"{path}: changed after {record.name} was written: delete it and run again"
        )


def _is_inside(name: str) -> bool:
    """Whether a listed path is printable, relative and free of `.` and `..`."""
    parts = PurePosixPath(name).parts
    if not name.isprintable() or "\\" in name or name != "/".join(parts):
        return False
    return not {"/", ".", ".."} & set(parts)


def _check_file(path: Path, name: str, digest: str) -> list[str]:
    if not path.is_file():
        return [f"{name}: missing"]
    if digest_of(path) != digest:
        return [f"{name}: its sha256 differs from {SUMS}"]
    if name.endswith(".gguf"):
        try:
            reader.read(path)
        except ForgeError as error:
            return [f"{name}: {error}"]
    return []


def _check_statements(folder: Path, sums: Sums) -> list[str]:
    """Every model must be the subject of a provenance statement, with the digest of the list.

    Importance matrices have none.
    """
    problems: list[str] = []
    subjects: Sums = {}
    for name in sums:
        if name.startswith(f"{provenance.FOLDER}/") and (folder / name).is_file():
            try:
                subjects |= provenance.subjects(folder / name)
            except ForgeError as error:
                problems.append(f"{name}: {error}")
    ggufs = {name: digest for name, digest in sums.items() if name.endswith(".gguf")}
    models = (name for name in ggufs if not name.endswith(MATRIX))
    problems += [f"{name}: no provenance statement" for name in models if name not in subjects]
    for name, digest in subjects.items():
        if ggufs.get(name, "") != digest:
            problems.append(f"{name}: sha256 in its provenance statement differs from {SUMS}")
    return problems
