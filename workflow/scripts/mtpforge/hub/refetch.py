"""Downloads a shard again whose weights were freed."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from mtpforge import progress
from mtpforge.hub import download
from mtpforge.hub.listing import Listing


def from_hub(folder: Path, recorded: Path | None) -> Callable[[str], None] | None:
    """Return what downloads a shard of `folder` again; None if `recorded` has no records of it."""
    if recorded is None or not recorded.is_dir():
        return None
    return partial(_download, folder, recorded.parent / "files.json")


def _download(folder: Path, listing: Path, shard: str) -> None:
    progress.say(f"{shard}: was freed once it was converted, and is needed again")
    download.download(Listing.read(listing), shard, folder)
