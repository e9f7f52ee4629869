"""Downloads files of a commit: resumes interrupted downloads and checks every digest.

A file gets its final name only if its content matches the commit.
"""

import hashlib
import os
from collections.abc import Collection, Mapping
from dataclasses import replace
from itertools import accumulate, repeat
from pathlib import Path

from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name

from mtpforge import progress
from mtpforge.checkpoint import quantization, safetensors
from mtpforge.checkpoint.checkpoint import Outline
from mtpforge.errors import DownloadError, GgufError
from mtpforge.gguf import reader
from mtpforge.hub import freed
from mtpforge.hub.fetch_records import FetchRecord, HeadRecord
from mtpforge.hub.listing import File, Listing
from mtpforge.hub.ranged_reads import RemoteFile
from mtpforge.hub.retry import RangesRefused
from mtpforge.io import atomic, storage, text
from mtpforge.io.ranges import CHUNK, FileRange, PartHashes, digest_of
from mtpforge.io.text import parse_json


def download(
    listing: Listing, name: str, folder: Path, together: Collection[str] = ()
) -> FetchRecord:
    """Download a file of the listing into `folder`, unless it is there already; return its record.

    A GGUF that is there only in parts (NAME.gguf.part1of2, ...) is joined. The disk must
    have room for the file and for the missing files of `together`, which are useless without each
    other. Raises DownloadError; a second call resumes from the hidden partial file.
    """
    parts = listing.parts(name)
    final = folder / name
    digests = _matching(listing, parts, final)
    if not digests:
        check_space(listing, {*parts, *together}, folder)
        linked = len(parts) == 1 and _linkable(listing, name, folder)
        needed = None if linked else sum(listing.files[part].bytes for part in parts)
        with atomic.replacing(final, keep=True, needed=needed) as partial:
            digests = _fetch_parts(listing, parts, partial)
    if name.endswith(".safetensors"):
        check_listing(listing, final, name)
    freed.record(folder, name).unlink(missing_ok=True)  # it is whole
    size = sum(listing.files[part].bytes for part in parts)
    found = digests[0].parts or _digests_in(final)
    if parts == [name]:
        return FetchRecord(name, size, digests[0].sha256, digests=found)
    by_part = {part: each.sha256 for part, each in zip(parts, digests, strict=True)}
    return FetchRecord(name, size, sha256=digest_of(final), parts=by_part, digests=found)


def read_text(listing: Listing, name: str) -> str:
    """Return the content of a small text file, without keeping it on disk. Raises DownloadError."""
    file = listing.files.get(name)
    if file is None or file.bytes > text.JSON_LIMIT:
        limit = text.JSON_LIMIT >> 20
        raise DownloadError(f"{listing.label}: {name} is missing, or larger than {limit} MB")
    blob = cached(listing, name)
    if blob.is_file() and blob.stat().st_size == file.bytes:
        content = text.read_bytes(blob, DownloadError, within=text.ANYWHERE)
    else:
        content = remote_file(listing, name).get(0, file.bytes)
    digest = Digest(file)
    digest.update(content)
    if not digest.matches:
        raise DownloadError(f"{listing.repo}: {name}: {digest.mismatch}: run again")
    return content.decode("utf-8", "replace")


def outline(listing: Listing) -> Outline:
    """Return the checkpoint without its values. Raises DownloadError, CheckpointError."""
    path = Path(listing.repo)
    config = parse_json(path / "config.json", read_text(listing, "config.json"))
    beside = {}
    if quantization.MODELOPT in listing.files:
        beside = parse_json(path / quantization.MODELOPT, read_text(listing, quantization.MODELOPT))
    config = quantization.with_modelopt(config, beside)
    found = Outline(path, config, tensors=listing.tensors, files=listing.files)
    found.lost = listing.lost
    return found


def remote_file(listing: Listing, name: str) -> RemoteFile:
    """Return a file of the listing for reading from the Hub."""
    return RemoteFile(listing.repo, listing.revision, name=name, file=listing.files[name])


def cached(listing: Listing, name: str) -> Path:
    """Return a file's path in the local cache of huggingface_hub, whether it exists or not."""
    repository = repo_folder_name(repo_id=listing.repo, repo_type="model")
    return Path(constants.HF_HUB_CACHE, repository, "blobs", listing.files[name].digest)


class Digest:
    """Hashes a file's content, and compares it with the digest in the commit.

    It hashes `parts` of the file too, so that nothing has to read it again.
    """

    def __init__(self, file: File, parts: Mapping[str, FileRange] | None = None) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        self._git = hashlib.sha1(b"blob %d\0" % file.bytes, usedforsecurity=False)
        self._parts = PartHashes(parts or {})

    def update(self, block: bytes) -> None:
        """Hash the next bytes."""
        self._parts.update(block)
        self._sha256.update(block)
        if not self._file.lfs:
            self._git.update(block)

    @property
    def parts(self) -> dict[str, str]:
        """The sha256 of each part, as hex digits."""
        return self._parts.hexdigests()

    def update_from(self, path: Path, begin: int = 0) -> int:
        """Hash a file on disk from byte `begin` on, at most this file's size; return the number."""
        left = self._file.bytes
        with path.open("rb") as file:
            file.seek(begin)
            while block := file.read(min(CHUNK, left)):
                self.update(block)
                left -= len(block)
        return self._file.bytes - left

    def matches_file(self, path: Path) -> bool:
        """Hash a file on disk; True if it exists and matches."""
        there = path.is_file() and path.stat().st_size == self._file.bytes
        return there and self.matches_part(path, 0)

    def matches_part(self, path: Path, begin: int) -> bool:
        """Hash a part of a file on disk, from byte `begin` on; True if it matches."""
        return self.update_from(path, begin) == self._file.bytes and self.matches

    @property
    def sha256(self) -> str:
        """The sha256 of the content so far, as hex digits."""
        return self._sha256.hexdigest()

    @property
    def matches(self) -> bool:
        """Whether the content so far is the file's."""
        return self._found == self._file.digest

    @property
    def mismatch(self) -> str:
        """The actual and the expected digest, for messages."""
        kind = "sha256" if self._file.lfs else "git id"
        return f"its {kind} is {self._found}, the Hub says {self._file.digest}"

    @property
    def _found(self) -> str:
        return self.sha256 if self._file.lfs else self._git.hexdigest()


# ── disk space ──


def check_space(listing: Listing, names: Collection[str], folder: Path) -> None:
    """Raise StorageError if the disk has no room for those of `names` that are missing.

    It names the largest of them, and the need of all.
    """
    folder.mkdir(parents=True, exist_ok=True)

    def is_missing(name: str) -> bool:
        return not _linkable(listing, name, folder) and not (folder / name).exists()

    known = [name for name in names if name in listing.files]
    missing = {name: listing.files[name].bytes for name in known if is_missing(name)}
    partial = sum(path.stat().st_size for path in folder.rglob(".*.part") if path.is_file())
    if missing:
        largest = max(missing, key=lambda name: missing[name])
        storage.require(folder / largest, sum(missing.values()) - partial)


def _linkable(listing: Listing, name: str, folder: Path) -> bool:
    """Whether a file is in the local Hub cache, on the disk of `folder`."""
    blob = cached(listing, name)
    return blob.exists() and blob.stat().st_dev == folder.stat().st_dev


# ── fetching ──


def _digest(listing: Listing, name: str) -> Digest:
    """What hashes a file; a shard's header and tensors too, which the listing knows."""
    file = listing.files[name]
    if not name.endswith(".safetensors"):
        return Digest(file)
    tensors = [tensor for tensor in listing.tensors.values() if tensor.shard == name]
    return Digest(file, safetensors.places(Path(name), tensors, file.bytes))


def _digests_in(path: Path) -> dict[str, str]:
    """Hash header and tensors of a GGUF, which no listing knows; nothing for other files."""
    try:
        return reader.digests(path) if path.suffix == ".gguf" else {}
    except GgufError:  # for the job that needs it to report
        return {}


def _matching(listing: Listing, parts: list[str], path: Path) -> list[Digest]:
    """Hash the file that these parts make up; empty if it does not exist or does not match."""
    sizes = [listing.files[part].bytes for part in parts]
    if not path.is_file() or path.stat().st_size != sum(sizes):
        return []
    digests = [_digest(listing, part) for part in parts]
    starts = accumulate(sizes, initial=0)
    return digests if all(map(Digest.matches_part, digests, repeat(path), starts)) else []


def _fetch_parts(listing: Listing, parts: list[str], partial: Path) -> list[Digest]:
    """Write the parts to `partial`, one after the other; those that are whole there are kept."""
    if len(parts) == 1:
        return [_link_cached(listing, parts[0], partial) or _fetch(listing, parts[0], partial)]
    progress.say(f"{len(parts)} parts, to be joined: {', '.join(parts)}")
    digests = []
    start = 0
    for part in parts:
        digest = Digest(listing.files[part])
        if not digest.matches_part(partial, start):
            digest = _fetch(listing, part, partial=partial, start=start)
        digests.append(digest)
        start += listing.files[part].bytes
    return digests


def _link_cached(listing: Listing, name: str, partial: Path) -> Digest | None:
    """Link a file from the local Hub cache, or copy it; None if the cache does not have it."""
    source = cached(listing, name)
    digest = _digest(listing, name)
    if not digest.matches_file(source):
        return None
    atomic.link_or_copy(source.resolve(), partial)
    progress.say(f"{name}: taken from the local Hub cache")
    return digest


def _fetch(listing: Listing, name: str, partial: Path, start: int = 0) -> Digest:
    """Append a file's missing bytes to `partial`, in which it begins at byte `start`.

    Deletes it there and raises DownloadError if its content is wrong.
    """
    file = listing.files[name]
    remote = remote_file(listing, name)
    if partial.stat().st_size - start > file.bytes:
        os.truncate(partial, start)
    digest = _digest(listing, name)
    done = digest.update_from(partial, start)
    with partial.open("r+b") as out, progress.bar(name) as show:
        out.seek(start + done)

        def write(block: bytes) -> None:
            out.write(block)
            digest.update(block)
            show(out.tell() - start, file.bytes)

        try:
            remote.read(done, file.bytes, write)
        except RangesRefused as error:
            progress.say(f"{error}: starting over from the first byte")
            digest = _digest(listing, name)
            out.seek(start)
            out.truncate()
            remote.read(0, file.bytes, write)
    if not digest.matches:
        os.truncate(partial, start)
        raise DownloadError(
            f"{listing.repo}: {name}: {digest.mismatch}: deleted the download: run again"
        )
    return digest


# ── whole shards confirm what was read by range ──


def check_listing(listing: Listing, shard: Path, name: str) -> None:
    """Compare a whole, verified shard with the listing, which comes from byte ranges.

    Raises DownloadError if they differ.
    """
    found = [replace(tensor, shard=name) for tensor in safetensors.read_shard_header(shard)]
    listed = [tensor for tensor in listing.tensors.values() if tensor.shard == name]
    if sorted(found, key=lambda t: t.name) != listed:
        raise DownloadError(
            f"{listing.label}: the tensors of {name} differ from the listing: "
            "delete files.json and everything made from it, and run again"
        )


def confirm_head(record: Path, shard: FetchRecord) -> int:
    """Compare a whole, verified shard with a head that was downloaded on its own.

    Returns how many of the head's tensors it has. Raises DownloadError if they differ.
    """
    head = HeadRecord.read(record)
    expected = {name: t.sha256 for name, t in head.tensors.items() if t.shard == shard.name}
    for name, digest in expected.items():
        if shard.digests.get(name) != digest:
            raise DownloadError(
                f"{shard.name}: {name} differs from the head that was downloaded on its own: "
                f"delete {record}, that head's folder, and everything made from it"
            )
    return len(expected)
