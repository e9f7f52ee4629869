"""Downloads the head of a checkpoint by byte range, as a small checkpoint.

Its shards have the same names as in the whole checkpoint, so both convert to the same bytes. Part
of a file cannot be compared with the digest of the whole: the head is trusted on first use, until
whole shards confirm it.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable
from itertools import groupby
from pathlib import Path
from typing import Any

from mtpforge import progress
from mtpforge.checkpoint.checkpoint import Checkpoint, architecture_of
from mtpforge.checkpoint.families.family import Family
from mtpforge.checkpoint.families.registry import family_of
from mtpforge.checkpoint.model_files import INDEX, head_names
from mtpforge.checkpoint.safetensors import CheckpointTensor, ranges
from mtpforge.errors import CheckpointError, DownloadError
from mtpforge.hub import download
from mtpforge.hub.fetch_records import FIRST_USE, VERIFIED, HeadRecord, HeadTensor
from mtpforge.hub.listing import Listing
from mtpforge.io import atomic, storage
from mtpforge.io.integrity import HEADER
from mtpforge.io.ranges import FileRange, Sink, digest_of, sha256
from mtpforge.io.text import read_json

PIECE = 64 << 20
"""Maximum number of bytes to download again after an interruption."""


def fetch(listing: Listing, folder: Path, whole: Path | None = None) -> HeadRecord:
    """Write the head as a checkpoint into `folder`, and return sha256 and standing of its tensors.

    Shards in `whole`, or in the local Hub cache, are read from there. Raises DownloadError,
    CheckpointError; a second call resumes.
    """
    config = folder / "config.json"
    download.download(listing, config.name, folder)  # it says which tensors are the head's
    family = family_of(architecture_of(config, read_json(config)))
    tensors = head_tensors(listing, family)
    if not tensors:
        stale = f", and {INDEX}, which lists it, is stale" if head_names(listing.lost) else ""
        raise CheckpointError(
            f"{listing.label}: this checkpoint has lost its head{stale}: name the original in "
            "`head_from`"
        )
    _write_small_files(listing, folder, tensors)
    standings = _write_shards(listing, folder, tensors=tensors, whole=whole)
    checkpoint = Checkpoint(folder)
    for shard in [shard for shard, standing in standings.items() if standing == FIRST_USE]:
        local = _local_shard(listing, shard, whole)  # may have arrived in the meantime
        if local is not None:
            _confirm(
                listing, local, tensors=[t for t in tensors if t.shard == shard], head=checkpoint
            )
            standings[shard] = VERIFIED
    return HeadRecord(
        listing.repo,
        listing.revision,
        {
            name: HeadTensor(
                t.shard, t.size, sha256=checkpoint.digest(t), standing=standings[t.shard]
            )
            for name, t in sorted(checkpoint.tensors.items())
        },
        _other_digests(listing, folder, shards=standings),
    )


def head_tensors(listing: Listing, family: Family) -> list[CheckpointTensor]:
    """Return the head's tensors, with the scales of FP8 weights, in the order of the shards."""
    found = [
        tensor
        for name, tensor in listing.tensors.items()
        if family.canonical(name).startswith(family.head_prefix)
    ]
    return sorted(found, key=lambda tensor: (tensor.shard, tensor.offset))


def pieces(tensors: list[CheckpointTensor]) -> list[tuple[int, int]]:
    """Return byte ranges (begin, end) of a shard that hold exactly its tensors.

    Adjacent tensors are joined, and long ranges cut into `PIECE`.
    """
    joined: list[list[int]] = []
    for tensor in tensors:
        if joined and joined[-1][1] == tensor.offset:
            joined[-1][1] += tensor.size
        else:
            joined.append([tensor.offset, tensor.offset + tensor.size])
    return [
        (start, min(start + PIECE, end))
        for begin, end in joined
        for start in range(begin, end, PIECE)
    ]


def _write_small_files(listing: Listing, folder: Path, tensors: list[CheckpointTensor]) -> None:
    """Download configuration and tokenizer, and write an index of the head's tensors."""
    total = sum(tensor.size for tensor in tensors)
    small = sum(listing.files[name].bytes for name in listing.small_files())
    written = sum(path.stat().st_size for path in folder.iterdir())
    storage.require(folder / tensors[0].shard, total + small - written)
    for name in listing.small_files():
        download.download(listing, name, folder)
    weight_map = {tensor.name: tensor.shard for tensor in tensors}
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    atomic.write_json(folder / INDEX, index)


def _other_digests(listing: Listing, folder: Path, shards: Iterable[str]) -> dict[str, str]:
    """Hash the small files and the headers of the shards."""
    whole = {name: digest_of(folder / name) for name in [*listing.small_files(), INDEX]}
    headers = {shard: sha256(ranges(folder / shard)[HEADER]) for shard in sorted(shards)}
    return dict(sorted(whole.items())) | headers


def _write_shards(
    listing: Listing, folder: Path, tensors: list[CheckpointTensor], whole: Path | None
) -> dict[str, str]:
    """Write the shards with the head's tensors alone; return the standing of each."""
    total = sum(tensor.size for tensor in tensors)
    standings = {}
    done = 0
    with progress.bar(f"head of {listing.repo}") as show:
        for shard, group in groupby(tensors, key=lambda tensor: tensor.shard):
            members = list(group)
            local = _local_shard(listing, shard, whole)
            standings[shard] = VERIFIED if local else FIRST_USE
            if local:
                download.check_listing(listing, local, shard)
                _copy(local, folder / shard, members)
            else:

                def step(count: int, before: int = done) -> None:
                    show(before + count, total)

                _fetch_shard(listing, folder / shard, tensors=members, show=step)
            done += sum(tensor.size for tensor in members)
    return standings


def _local_shard(listing: Listing, shard: str, whole: Path | None) -> Path | None:
    """Return a whole copy of a shard on this machine, if there is one with the right digest."""
    candidates = [whole / shard] if whole else []
    for path in [*candidates, download.cached(listing, shard)]:
        if download.Digest(listing.files[shard]).matches_file(path):
            return path
    return None


def _confirm(
    listing: Listing, local: Path, tensors: list[CheckpointTensor], head: Checkpoint
) -> None:
    """Compare downloaded tensors with those of a whole shard. Raises DownloadError."""
    download.check_listing(listing, local, tensors[0].shard)
    for tensor in tensors:
        expected = sha256(FileRange(local, tensor.offset, tensor.size))
        if head.digest(head.tensors[tensor.name]) != expected:
            raise DownloadError(
                f"{head.directory}: {tensor.name} differs from the whole shard: "
                "delete this folder and run again"
            )


def _header(tensors: list[CheckpointTensor]) -> bytes:
    """Return the header of a shard with these tensors alone, its length first."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + tensor.size],
        }
        position += tensor.size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _copy(local: Path, out: Path, tensors: list[CheckpointTensor]) -> None:
    """Write a shard with these tensors alone from a whole one."""
    ranges = [FileRange(local, tensor.offset, tensor.size) for tensor in tensors]
    header = _header(tensors)
    size = len(header) + sum(tensor.size for tensor in tensors)
    shared = storage.shareable([(local, size - len(header))], out)
    with (
        atomic.replacing(out, needed=size, shared=shared) as temporary,
        temporary.open("wb") as file,
    ):
        Sink(file.fileno()).append([memoryview(header), *ranges])


def _fetch_shard(
    listing: Listing, path: Path, tensors: list[CheckpointTensor], show: Callable[[int], None]
) -> None:
    """Download a shard with these tensors alone.

    The digest of each piece is kept in a file beside it, so that a later run knows what is whole.
    """
    header = _header(tensors)
    ranges = pieces(tensors)
    sums = path.with_name(f".{path.name}.sums")
    known = sums.read_text(encoding="ascii", errors="replace").split() if sums.exists() else []
    if path.exists() and _count_whole(path, header, ranges=ranges, sums=known) == len(ranges):
        return
    remote = download.remote_file(listing, path.name)
    size = len(header) + sum(tensor.size for tensor in tensors)
    with atomic.replacing(path, keep=True, needed=size) as partial:
        have = _count_whole(partial, header, ranges=ranges, sums=known)
        atomic.write_text(sums, "".join(f"{digest}\n" for digest in known[:have]))
        done = sum(end - begin for begin, end in ranges[:have])
        os.truncate(partial, len(header) + done if have else 0)
        with partial.open("ab") as out, sums.open("a", encoding="ascii") as log:
            if not have:
                out.write(header)
            for begin, end in ranges[have:]:
                digest = hashlib.sha256()

                def write(block: bytes, digest: Any = digest) -> None:
                    out.write(block)
                    digest.update(block)
                    show(out.tell() - len(header))

                remote.read(begin, end, write)
                out.flush()
                log.write(f"{digest.hexdigest()}\n")
                log.flush()


def _count_whole(path: Path, header: bytes, ranges: list[tuple[int, int]], sums: list[str]) -> int:
    """Return how many pieces, counted from the first, a file has in full."""
    with path.open("rb") as file:
        if file.read(len(header)) != header:
            return 0
    position = len(header)
    for i, ((begin, end), digest) in enumerate(zip(ranges, sums, strict=False)):
        if sha256(FileRange(path, position, end - begin)) != digest:
            return i
        position += end - begin
    return min(len(ranges), len(sums))
