"""Downloads a shard again whose weights were freed, or for the first time (see `sparse`)."""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

from mtpforge import progress
from mtpforge.errors import DownloadError
from mtpforge.hub import download, freed
from mtpforge.hub.fetch_records import FetchRecord, digests_record, read_record
from mtpforge.hub.listing import Listing

Refetch = Callable[[str], Mapping[str, str]]
"""Downloads a shard; the sha256 of its header and tensors. Raises DownloadError."""


def from_hub(folder: Path, recorded: Path | None) -> Refetch | None:
    """Return what downloads a shard of `folder` again; None if `recorded` has no records of it."""
    if recorded is None or not recorded.is_dir():
        return None
    return partial(_download, folder, recorded)


def _download(folder: Path, recorded: Path, shard: str) -> Mapping[str, str]:
    path = recorded / f"{shard}.json"
    left = freed.record(recorded, shard)
    if not (left.exists() and freed.read(left).never_whole):
        progress.say(f"{shard}: was freed once it was converted, and is needed again")
    found = download.download(Listing.read(recorded.parent / "files.json"), shard, folder)
    known = read_record(path) if path.exists() else None
    if known is not None and known != found:
        _check_ranges(path, known, found)
        found.write(digests_record(recorded, shard))
    return found.digests


def _check_ranges(path: Path, known: object, found: FetchRecord) -> None:
    """Compare a whole, verified shard with the parts that were read by range."""
    parts = known.digests.items() if isinstance(known, FetchRecord) else ()
    differing = [name for name, digest in parts if found.digests.get(name) != digest]
    if differing:
        raise DownloadError(
            f"{path}: {differing[0]} differs from what was downloaded by byte range: delete this "
            "record and its shard, and run again"
        )
