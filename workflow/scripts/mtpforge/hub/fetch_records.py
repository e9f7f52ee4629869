"""Records of downloads: one for each file, and one for a head that was downloaded on its own."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from mtpforge.errors import DownloadError
from mtpforge.hub import freed
from mtpforge.io import atomic, text

VERIFIED, FIRST_USE = "verified", "trusted on first use"
"""Standings of a head's tensor: its whole shard had the right sha256, or was never seen."""
DIGESTS = "digests"
"""The folder of such records, beside that of the others: see `digests_record`."""


@dataclass(frozen=True)
class FetchRecord:
    """A downloaded file whose content matches the commit."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)
    name: str
    bytes: int
    sha256: str
    parts: dict[str, str] = field(default_factory=dict)
    """The sha256 of each part of the commit that was joined to the file; empty for a whole file."""
    digests: dict[str, str] = field(default_factory=dict)
    """The sha256 of the header and of each tensor, for jobs that read some of them."""

    def write(self, path: Path) -> None:
        """Write the record as JSON."""
        atomic.write_json(path, {key: value for key, value in asdict(self).items() if value != {}})


@dataclass(frozen=True)
class HeadTensor:
    """A tensor of a head that was downloaded by byte range."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)
    shard: str
    bytes: int
    sha256: str
    standing: str


@dataclass(frozen=True)
class HeadRecord:
    """A head that was downloaded without the rest of its checkpoint: its tensors by name."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)
    repo: str
    revision: str
    tensors: dict[str, HeadTensor]
    files: dict[str, str] = field(default_factory=dict)
    """The sha256 of each other file of the folder, and of each shard's header."""

    @classmethod
    def read(cls, path: Path) -> "HeadRecord":
        """Read what `write` wrote. Raises DownloadError if the file is malformed."""
        record = read_record(path)
        if not isinstance(record, HeadRecord):
            raise DownloadError(f"{path}: not a head record: delete it and run again")
        return record

    def write(self, path: Path) -> None:
        """Write the record as JSON."""
        atomic.write_json(path, asdict(self))

    def count_standings(self, records: Path) -> dict[str, int]:
        """Count the tensors by standing today; `records` is the folder of the files' records.

        Those that a whole shard had with the same sha256 are verified.
        """
        shards = {tensor.shard for tensor in self.tensors.values()}
        proven = {shard: _proven(records, shard) for shard in shards}
        return dict(
            Counter(
                VERIFIED if proven[tensor.shard].get(name) == tensor.sha256 else tensor.standing
                for name, tensor in self.tensors.items()
            )
        )


def digests_record(records: Path, name: str) -> Path:
    """The record of a file that is downloaded after its record in the folder `records` was written.

    It has digests that the other lacks, which is an input of jobs and must not change.
    """
    return records.parent / DIGESTS / f"{name}.json"


def _proven(records: Path, shard: str) -> Mapping[str, str]:
    """The digests that a shard had while it was whole; none if it never was (see `sparse`)."""
    left = freed.record(records, shard)
    if left.exists() and freed.read(left).never_whole:
        return {}
    for path in (digests_record(records, shard), records / f"{shard}.json"):
        if path.exists():
            record = read_record(path)
            return record.digests if isinstance(record, FetchRecord) else {}
    return {}


def recorded_bytes(path: Path) -> int:
    """The size of a downloaded file, from the start of its record: the graph asks for thousands.

    Raises DownloadError if the record is malformed.
    """
    with text.open_regular(path, DownloadError, within=text.ANYWHERE) as file:
        found = re.search(rb'"bytes": (\d{1,18})[,}\s]', file.read(4096))
    if found is None:
        raise DownloadError(f"{path}: malformed download record: delete it and run again")
    return int(found[1])


def read_record(path: Path) -> FetchRecord | HeadRecord:
    """Read a record of either kind. Raises DownloadError if the file is malformed."""
    try:
        content = text.read_bytes(path, DownloadError, within=text.ANYWHERE)
        is_head = "tensors" in text.parse_json(path, content, DownloadError)
        kind: type[FetchRecord | HeadRecord] = HeadRecord if is_head else FetchRecord
        return TypeAdapter(kind).validate_json(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise DownloadError(
            f"{path}: malformed download record ({where}: {first['msg']}): delete it and run again"
        ) from None
