"""Files that were uploaded one by one: a receipt for each, and what stands in for deleted ones.

Both lie in `work/uploaded/` of a results folder. A stand-in has the header of its file, and a hole
as large as the tensors: card and figures need no more.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from mtpforge.errors import DamagedError, VerificationError
from mtpforge.gguf import reader
from mtpforge.io import atomic, ranges
from mtpforge.io.ranges import digest_of
from mtpforge.io.records import Record
from mtpforge.verify.report import Report, Shard

FOLDER = Path("work", "uploaded")
_TIMESTAMP = ".snakemake_timestamp"
"""What Snakemake leaves in a folder that is an output."""


@dataclass(frozen=True, kw_only=True)
class Receipt(Record):
    """The repository or bucket that has these files, named by their paths in the results folder."""

    written_by: ClassVar[str] = "publish_file.py"
    place: str
    files: tuple[Shard, ...]


def path_of(file: Path) -> Path:
    """The receipt of a published file, or of the folder of a split one."""
    name = f"{file.stem}.json" if file.suffix == ".gguf" else f"{file.name}.split.json"
    return file.parent / FOLDER / name


def stand_in(file: Path) -> Path:
    """What stands in for a published file, or for the folder of a split one."""
    name = f"{file.stem}.header" if file.suffix == ".gguf" else file.name
    return file.parent / FOLDER / name


def shards(report: Report) -> tuple[Shard, ...]:
    """The files that a report is about, by their paths in the results folder."""
    return tuple(Shard(name, size, digest) for name, size, digest in report.published)


def known(folder: Path) -> dict[str, Shard]:
    """What has been uploaded of a results folder, by path in it. Raises RecordError."""
    return {shard.name: shard for receipt in _receipts(folder).values() for shard in receipt.files}


def listing(folder: Path, name: str) -> Path | None:
    """The receipt that lists a file, by its path in the results folder. Raises RecordError."""
    found = _receipts(folder).items()
    lists = (path for path, receipt in found if any(each.name == name for each in receipt.files))
    return next(lists, None)


def check_uploaded(receipt: Path, file: Path) -> None:
    """Raise VerificationError unless a file, or all in the folder of a split one, was uploaded.

    One that has not changed since then is not hashed.
    """
    folder = receipt.parent.parent.parent
    sent = {folder / each.name: each for each in Receipt.read(receipt).files}
    inside = file.iterdir() if file.is_dir() else [file] if file.exists() else []
    for path in inside:
        about = path.stat()
        shard = sent.get(path)
        is_old = about.st_ctime <= receipt.stat().st_mtime
        same = (
            shard is not None
            and about.st_size == shard.bytes
            and (is_old or digest_of(path) == shard.sha256)
        )
        if not same and path.name != _TIMESTAMP:
            raise VerificationError(
                f"{path}: is not the file that was uploaded, so it is not deleted: move it "
                "elsewhere and run again"
            )


def write_stand_in(folder: Path, report: Report) -> None:
    """Keep the headers of the files of a report, and no others of a split one.

    Raises GgufError, StorageError.
    """
    if report.files:
        shutil.rmtree(stand_in(folder / report.file), ignore_errors=True)
    for name, size, _ in report.published:
        kept = folder / FOLDER / name if report.files else stand_in(folder / name)
        header = reader.header_range(reader.read(folder / name))
        with atomic.replacing(kept, needed=header.size) as written, written.open("wb") as out:
            ranges.Sink(out.fileno()).append([header])
            out.truncate(size)


def is_stand_in(file: Path) -> bool:
    """Whether this is a stand-in, or the folder of those of a split file."""
    return file.parent.parts[-2:] == FOLDER.parts


def check_stand_in(file: Path, report: Report) -> None:
    """Raise DamagedError unless the receipt beside a stand-in is for the files of the report."""
    name = f"{file.stem}.json" if file.suffix == ".header" else f"{file.name}.split.json"
    receipt = file.with_name(name)
    if Receipt.read(receipt).files != shards(report):
        raise DamagedError(
            f"{receipt}: is about another file than its report: delete it and run again"
        )


def _receipts(folder: Path) -> dict[Path, Receipt]:
    return {path: Receipt.read(path) for path in sorted((folder / FOLDER).glob("*.json"))}
