"""The head of a checkpoint on the Hub, by byte ranges, as a small checkpoint of its own.

Its shards have the names that they have in the whole checkpoint, so that conversion makes the same bytes of both. A part of a
file cannot be compared with the digest of all of it: a head is trusted on first use, until whole shards confirm it.
"""

import hashlib
import json
import os
import struct
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

from mtpforge import progress
from mtpforge.checkpoint.families.registry import family_of
from mtpforge.checkpoint.families.table import Family
from mtpforge.checkpoint.safetensors import INDEX, Checkpoint, CheckpointTensor, architecture_of
from mtpforge.errors import CheckpointError, DownloadError
from mtpforge.hub import download
from mtpforge.hub.listing import Listing
from mtpforge.hub.remote import RemoteFile
from mtpforge.io import atomic
from mtpforge.io.ranges import FileRange, Sink, sha256
from mtpforge.io.text import parse_json, read_json

PIECE = 64 << 20  # is fetched again after an interruption
VERIFIED, FIRST_USE = "verified", "trusted on first use"


def head_tensors(listing: Listing, family: Family) -> list[CheckpointTensor]:
    """The tensors of the head, scales of FP8 weights among them, as they lie in the shards."""
    names = [
        name for name in listing.tensors if family.canonical(name).startswith(family.head_prefix)
    ]
    return sorted(
        (listing.tensors[name] for name in names), key=lambda tensor: (tensor.shard, tensor.offset)
    )


def architecture_in(listing: Listing) -> str:
    """The architecture of the checkpoint, from its config.json. Raises DownloadError, CheckpointError."""
    path = Path(listing.repo, "config.json")
    return architecture_of(path, parse_json(path, download.read_text(listing, path.name)))


def fetch(listing: Listing, folder: Path, whole: Path | None = None) -> dict[str, Any]:
    """Make the small checkpoint in `folder`; its record: sha256 and standing (verified, trusted on first use) of each tensor.

    Shards that lie in `whole`, or in the local Hub cache, are read there. Raises DownloadError, CheckpointError; what has come
    until then stays, and a second call goes on from there.
    """
    config = folder / "config.json"
    download.download(
        listing, config.name, folder
    )  # says which tensors are the head's, and so how much room it needs
    tensors = head_tensors(listing, family_of(architecture_of(config, read_json(config))))
    if not tensors:
        raise CheckpointError(
            f"{listing.repo} at {listing.revision}: this checkpoint has lost its head: take the original one"
        )
    total = sum(tensor.size for tensor in tensors)
    written = sum(path.stat().st_size for path in folder.iterdir())
    download.demand_space(
        total + sum(listing.files[name].bytes for name in listing.small_files()) - written, folder
    )
    for name in listing.small_files():
        download.download(listing, name, folder)
    atomic.write_json(
        folder / INDEX,
        {"metadata": {"total_size": total}, "weight_map": {t.name: t.shard for t in tensors}},
    )
    standings, done = {}, 0
    with progress.bar(f"head of {listing.repo}") as show:
        for shard, members in groupby(tensors, key=lambda tensor: tensor.shard):
            mine = list(members)
            local = _local(listing, shard, whole)
            standings[shard] = VERIFIED if local else FIRST_USE
            if local:
                download.check_listing(listing, local, shard)
                with atomic.replacing(folder / shard) as temporary:
                    _copy(local, temporary, mine)
            else:

                def step(count: int, before: int = done) -> None:
                    show(before + count, total)

                _fetch_shard(listing, folder / shard, mine, step)
            done += sum(tensor.size for tensor in mine)
    made = Checkpoint(folder)
    for shard in [shard for shard, standing in standings.items() if standing == FIRST_USE]:
        if (
            local := _local(listing, shard, whole)
        ) is not None:  # it has come while we were fetching
            _confirm(listing, local, [tensor for tensor in tensors if tensor.shard == shard], made)
            standings[shard] = VERIFIED
    entries = {
        name: {
            "shard": t.shard,
            "bytes": t.size,
            "sha256": made.digest(t),
            "standing": standings[t.shard],
        }
        for name, t in sorted(made.tensors.items())
    }
    return {"repo": listing.repo, "revision": listing.revision, "tensors": entries}


def _local(listing: Listing, shard: str, whole: Path | None) -> Path | None:
    """A whole copy of a shard on this machine whose content is right."""
    for path in ([whole / shard] if whole else []) + [download.cached(listing, shard)]:
        digest = download.Digest(listing.files[shard])
        if path.is_file() and digest.read(path) and digest.right:
            return path
    return None


def _confirm(
    listing: Listing, local: Path, tensors: list[CheckpointTensor], made: Checkpoint
) -> None:
    """Compare tensors that were trusted with those of a whole shard. Raises DownloadError."""
    download.check_listing(listing, local, tensors[0].shard)
    for tensor in tensors:
        if sha256(FileRange(local, tensor.offset, tensor.size)) != made.digest(
            made.tensors[tensor.name]
        ):
            raise DownloadError(
                f"{made.directory}: {tensor.name} is not that of the whole shard: delete this folder, and run again"
            )


def _header(tensors: list[CheckpointTensor]) -> bytes:
    """What a shard with these tensors alone begins with: its header's length, and its header."""
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
    with out.open("wb") as file:
        sink = Sink(file.fileno())
        sink.append(
            [
                memoryview(_header(tensors)),
                *(FileRange(local, tensor.offset, tensor.size) for tensor in tensors),
            ]
        )


def pieces(tensors: list[CheckpointTensor]) -> list[tuple[int, int]]:
    """Byte ranges (begin, end) of a shard that hold its tensors and nothing else: neighbours joined, then cut into `PIECE`."""
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


def _fetch_shard(
    listing: Listing, path: Path, tensors: list[CheckpointTensor], show: Callable[[int], None]
) -> None:
    """Write a shard with these tensors alone. Each piece's digest is kept beside it: that tells later what of it is whole."""
    file, header, ranges = listing.files[path.name], _header(tensors), pieces(tensors)
    sums = path.with_name(f".{path.name}.sums")
    known = sums.read_text(encoding="ascii", errors="replace").split() if sums.exists() else []
    if path.exists() and _whole_pieces(path, header, ranges, known) == len(ranges):
        return
    remote = RemoteFile(listing.repo, listing.revision, path.name, file.bytes, file.digest)
    with atomic.replacing(path, keep=True) as partial:
        have = _whole_pieces(partial, header, ranges, known)
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


def _whole_pieces(path: Path, header: bytes, ranges: list[tuple[int, int]], sums: list[str]) -> int:
    """How many pieces, from the first on, a file has in full."""
    with path.open("rb") as file:
        if file.read(len(header)) != header:
            return 0
    position = len(header)
    for i, ((begin, end), digest) in enumerate(zip(ranges, sums, strict=False)):
        if sha256(FileRange(path, position, end - begin)) != digest:
            return i
        position += end - begin
    return min(len(ranges), len(sums))
