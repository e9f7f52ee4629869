"""Records of fetched shards whose weights were freed once they were converted (profiles/lean).

Or whose weights have not been downloaded yet (`lean: shards`).

Such a shard keeps its size, its header, and the rows that verification compares. Its record lies in
`freed/`, beside the folder of the records of downloads, and is there before anything is freed.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from mtpforge.errors import RecordError
from mtpforge.io import atomic, text

SMALL = 1 << 16
"""Bytes; smaller tensors stay: norms and constants decide how others are converted."""
_FOLDER = "freed"


@dataclass(frozen=True)
class Kept:
    """The ranges that a tensor still has: offset and size in the shard, and their sha256."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)
    ranges: list[tuple[int, int]]
    sha256: str


@dataclass(frozen=True)
class FreedShard:
    """The tensors of a shard that are not whole any more."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)
    tensors: dict[str, Kept] = field(default_factory=dict)
    never_whole: bool = False
    """Whether the shard has not been downloaded yet (see `sparse`), so nothing proves its bytes."""

    def write(self, path: Path) -> None:
        """Write the record as JSON, and flush it to the disk."""
        atomic.write_json(path, asdict(self))


def record(beside: Path, shard: str) -> Path:
    """The record of a freed shard, beside the folder of the downloads or of their records."""
    return beside.parent / _FOLDER / f"{shard}.json"


def read(path: Path) -> FreedShard:
    """Read what `write` wrote. Raises RecordError if the file is malformed."""
    content = text.read_bytes(path, RecordError, within=text.ANYWHERE)
    try:
        return TypeAdapter(FreedShard).validate_json(content)
    except ValidationError as error:
        reason = error.errors(include_url=False)[0]["msg"]
        raise RecordError(
            f"{path}: malformed record of a freed shard ({reason}): delete it, the shard and its "
            "other record, and run again"
        ) from None
