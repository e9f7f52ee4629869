"""Shards that are downloaded when they are converted (`lean: shards`): until then they are sparse.

Such a shard has its final size, its header and its small tensors, from which a conversion is
planned. It has the record of a freed shard, in which it was never whole: conversion downloads it
before it uses any of it, and compares it with what was read by range.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from mtpforge.checkpoint import safetensors
from mtpforge.checkpoint.safetensors import CheckpointTensor
from mtpforge.hub import download, freed
from mtpforge.hub.fetch_records import FetchRecord
from mtpforge.hub.freed import FreedShard, Kept
from mtpforge.hub.listing import Listing
from mtpforge.hub.ranged_reads import RemoteFile
from mtpforge.io import atomic, holes, storage
from mtpforge.io.ranges import sha256

_GAP = 1 << 20
"""Bytes between two tensors that are read rather than requested apart."""
_MOST = 16 << 20
"""Bytes of a request."""


def is_possible(listing: Listing, name: str, folder: Path) -> bool:
    """Whether a file is a shard that is not here yet, and whose ranges the disk can free.

    Nor was it freed: its conversion would not run again, and verification reads what was left.
    """
    tensors = _tensors_of(listing, name)
    left = freed.record(folder, name)
    is_here = not freed.read(left).never_whole if left.exists() else (folder / name).exists()
    return (
        bool(tensors)
        and listing.files[name].lfs
        and not is_here
        and not download.cached(listing, name).exists()
        and holes.are_supported(storage.existing(folder))
    )


def lay_out(listing: Listing, name: str, folder: Path) -> FetchRecord:
    """Write a sparse shard, and the record of what it lacks. Raises DownloadError.

    The digests of the result are those of what it has, the sha256 is that of the whole shard.
    """
    file = listing.files[name]
    tensors = _tensors_of(listing, name)
    start = min(tensor.offset for tensor in tensors)
    small = [tensor for tensor in tensors if tensor.size <= freed.SMALL]
    lacking = {tensor.name for tensor in tensors} - {tensor.name for tensor in small}
    nothing = hashlib.sha256().hexdigest()
    kept = FreedShard({each: Kept([], nothing) for each in sorted(lacking)}, never_whole=True)
    final = folder / name
    remote = download.remote_file(listing, name)
    parts = {0: remote.get(0, start), **_read(remote, small)}
    with atomic.replacing(final, needed=sum(map(len, parts.values()))) as temporary:
        os.truncate(temporary, file.bytes)
        _write(temporary, parts)
        download.check_listing(listing, temporary, name)
        kept.write(freed.record(folder, name))  # before anybody sees a shard without weights
    places = safetensors.places(final, tensors, file.bytes)
    found = {each: sha256(place) for each, place in places.items() if each not in lacking}
    return FetchRecord(name, file.bytes, file.digest, digests=found)


def _tensors_of(listing: Listing, name: str) -> list[CheckpointTensor]:
    found = [tensor for tensor in listing.tensors.values() if tensor.shard == name]
    return sorted(found, key=lambda tensor: tensor.offset)


def _read(remote: RemoteFile, tensors: Iterable[CheckpointTensor]) -> dict[int, bytes]:
    """The bytes of tensors by their offset; those that are neighbours come in one request."""
    found: dict[int, bytes] = {}
    for group in _grouped(tensors):
        begin, end = group[0].offset, group[-1].offset + group[-1].size
        content = remote.get(begin, end)
        for each in group:
            found[each.offset] = content[each.offset - begin :][: each.size]
    return found


def _grouped(tensors: Iterable[CheckpointTensor]) -> list[list[CheckpointTensor]]:
    found: list[list[CheckpointTensor]] = []
    for tensor in tensors:
        group = found[-1] if found else [tensor]
        gap = tensor.offset - (group[-1].offset + group[-1].size)
        if found and gap <= _GAP and tensor.offset + tensor.size - group[0].offset <= _MOST:
            group.append(tensor)
        else:
            found.append([tensor])
    return found


def _write(path: Path, parts: Mapping[int, bytes]) -> None:
    with path.open("r+b") as file:
        for begin, content in parts.items():
            file.seek(begin)
            file.write(content)
