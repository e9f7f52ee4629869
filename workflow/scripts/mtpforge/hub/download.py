"""Files of the Hugging Face Hub, pinned to a commit: listed, fetched where an earlier run stopped, and hashed.

huggingface_hub asks and says who we are; a file gets its name when its content is what the commit has.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Collection, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.hf_api import ModelInfo, RepoSibling

from mtpforge import progress
from mtpforge.checkpoint import safetensors
from mtpforge.checkpoint.safetensors import INDEX, CheckpointTensor
from mtpforge.errors import DownloadError
from mtpforge.hub.listing import COMMIT, FILE_NAME, File, Listing, check_name
from mtpforge.hub.remote import Patience, RangesRefused, RemoteFile
from mtpforge.io import atomic, text
from mtpforge.io.ranges import CHUNK, FileRange, sha256

_FIRST_READ = 64 << 10  # holds most headers of shards, so that they take one request


def model_info(repo: str, revision: str | None = None) -> ModelInfo:
    """What the Hub says about a commit, branch or tag (default: its main branch), file sizes included. Raises DownloadError."""
    what = f"{repo} at {revision}" if revision else repo

    def ask() -> ModelInfo:
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        info = HfApi().model_info(repo, revision=revision, files_metadata=True, timeout=timeout)
        if not COMMIT.fullmatch(str(info.sha)):
            raise ValueError(f"its commit is {info.sha!r}")
        return info

    try:
        return Patience(what).call(ask)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DownloadError(
            f"{what}: the Hub's answer is malformed ({type(error).__name__}: {error})"
        ) from None


def resolve(repo: str, revision: str) -> Listing:
    """All files and tensors of a commit; of the weights, only the headers are read. Raises DownloadError, CheckpointError."""
    info = model_info(repo, revision)
    if revision != info.sha:
        raise DownloadError(
            f"{repo}: {revision} is no full commit, and what it names can change: write `revision: {info.sha}`"
        )
    files = dict(sorted(_files(info.siblings or [])))
    present = [name for name in files if name.endswith(".safetensors")]
    return Listing(
        repo, revision, files, _tensors(repo, revision, files, present) if present else {}
    )


def _files(siblings: Iterable[RepoSibling]) -> Iterable[tuple[str, File]]:
    """The files at the top of a repository whose names are plain; the others cannot be asked for."""
    for sibling in siblings:
        name, size, lfs = sibling.rfilename, sibling.size, sibling.lfs
        if (
            not isinstance(name, str)
            or not name.isprintable()
            or "\\" in name
            or {"", ".", ".."} & set(name.split("/"))
        ):
            raise DownloadError(f"the Hub lists a file {name!r}, which can be none: refused")
        if not FILE_NAME.fullmatch(name):
            continue
        digest = lfs.sha256 if lfs else sibling.blob_id
        if (
            type(size) is not int
            or size < 0
            or not re.fullmatch(r"[0-9a-f]{64}" if lfs else r"[0-9a-f]{40}", str(digest))
        ):
            raise DownloadError(
                f"the Hub lists {name} with size {size!r} and digest {digest!r}: refused"
            )
        yield name, File(size, str(digest))


def _tensors(
    repo: str, revision: str, files: dict[str, File], present: list[str]
) -> dict[str, CheckpointTensor]:
    def read_header(shard: str) -> list[CheckpointTensor]:
        if shard not in files:
            raise DownloadError(
                f"{repo} at {revision}: {INDEX} names {shard}, which the repository does not have"
            )
        remote, place = (
            RemoteFile(repo, revision, shard, files[shard].bytes, files[shard].digest),
            Path(repo, shard),
        )
        start = remote.get(0, min(_FIRST_READ, remote.size))
        end = 8 + safetensors.header_length(place, start[:8], remote.size)
        header = (start + remote.get(len(start), end))[8:end]
        return safetensors.parse_shard_header(place, header, remote.size)

    index = read_text(Listing(repo, revision, files, {}), INDEX) if INDEX in files else None
    return dict(sorted(safetensors.gather_tensors(Path(repo), index, present, read_header).items()))


def read_text(listing: Listing, name: str) -> str:
    """The content of a small text file, which is not kept. Raises DownloadError."""
    file = listing.files.get(name)
    if file is None or file.bytes > text.TEXT_LIMIT:
        raise DownloadError(
            f"{listing.repo} at {listing.revision}: has no {name}, or one larger than any real one"
        )
    blob, digest = cached(listing, name), Digest(file)
    if blob.is_file() and blob.stat().st_size == file.bytes:
        content = blob.read_bytes()
    else:
        content = RemoteFile(listing.repo, listing.revision, name, file.bytes, file.digest).get(
            0, file.bytes
        )
    digest.update(content)
    if not digest.right:
        raise DownloadError(f"{listing.repo}: {name}: {digest.complaint()}: run again")
    return content.decode("utf-8", "replace")


class Digest:
    """Of a file's content: its sha256, and whether it is what the commit has."""

    def __init__(self, file: File) -> None:
        self._file, self._sha256 = file, hashlib.sha256()
        self._git = hashlib.sha1(b"blob %d\0" % file.bytes, usedforsecurity=False)

    def update(self, block: bytes) -> None:
        """Go on with the next bytes."""
        self._sha256.update(block)
        if not self._file.lfs:
            self._git.update(block)

    @property
    def sha256(self) -> str:
        """As hex digits."""
        return self._sha256.hexdigest()

    @property
    def right(self) -> bool:
        """Whether the content so far is the file's."""
        return self._found() == self._file.digest

    def complaint(self) -> str:
        """What is wrong, where something is."""
        kind = "sha256" if self._file.lfs else "git id"
        return f"its {kind} is {self._found()}, and the Hub says {self._file.digest}"

    def _found(self) -> str:
        return self.sha256 if self._file.lfs else self._git.hexdigest()

    def read(self, path: Path) -> int:
        """Go on with all bytes of a file on disk; their number."""
        with path.open("rb") as file:
            while block := file.read(CHUNK):
                self.update(block)
            return file.tell()


def download(
    listing: Listing, name: str, folder: Path, together: Collection[str] = ()
) -> dict[str, Any]:
    """Fetch a file of the listing into `folder`; its record: name, bytes, sha256. What is there already is kept.

    There must be room for it and for what is missing of `together`, the files that are of no use without each other.
    Raises DownloadError; what has come until then stays beside, under a hidden name, and a second call goes on from there.
    """
    if check_name(name) not in listing.files:
        what = (
            "has no *.safetensors"
            if name == "model.safetensors"
            else f"has no file {name} (none in a folder is taken)"
        )
        raise DownloadError(
            f"{listing.repo} at {listing.revision}: {what}: name another repository, or another of its files"
        )
    final, file = folder / name, listing.files[name]
    digest = Digest(file)
    if not (
        final.is_file()
        and final.stat().st_size == file.bytes
        and digest.read(final)
        and digest.right
    ):
        check_space(listing, {name, *together}, folder)
        with atomic.replacing(final, keep=True) as partial:
            digest = _link_cached(listing, name, partial) or _fetch(listing, name, partial)
    if name.endswith(".safetensors"):
        check_listing(listing, final, name)
    return {"name": name, "bytes": file.bytes, "sha256": digest.sha256}


def check_space(listing: Listing, names: Collection[str], folder: Path) -> None:
    """Raise DownloadError where the file system of `folder` has no room for what is missing of all `names`."""
    folder.mkdir(parents=True, exist_ok=True)

    def is_missing(name: str) -> bool:
        blob = cached(listing, name)
        linkable = blob.exists() and blob.stat().st_dev == folder.stat().st_dev
        return not linkable and not (folder / name).exists()

    missing = [listing.files[name] for name in names if name in listing.files and is_missing(name)]
    partial = sum(path.stat().st_size for path in folder.glob(".*.part") if path.is_file())
    demand_space(sum(file.bytes for file in missing) - partial, folder)


def demand_space(needed: int, folder: Path) -> None:
    """Raise DownloadError where the file system of `folder` has not that many bytes left."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise DownloadError(
            f"{folder}: {needed / 1e9:.1f} GB are to be fetched, and {free / 1e9:.1f} GB are free there: make room, or set up "
            "this repository on a larger disk"
        )


def cached(listing: Listing, name: str) -> Path:
    """Where the local cache of huggingface_hub has a file, if it has it."""
    repository = Path(
        constants.HF_HUB_CACHE, repo_folder_name(repo_id=listing.repo, repo_type="model")
    )
    return repository / "blobs" / listing.files[name].digest


def _link_cached(listing: Listing, name: str, partial: Path) -> Digest | None:
    """Take a file from the local Hub cache, without a second copy where the file system can; None where it is not there."""
    source, digest = cached(listing, name), Digest(listing.files[name])
    if not source.is_file() or digest.read(source) != listing.files[name].bytes or not digest.right:
        return None
    partial.unlink()  # a link cannot be made over a file
    atomic.link_or_copy(source.resolve(), partial)
    print(f"{name}: taken from the local Hub cache", file=sys.stderr)
    return digest


def _fetch(listing: Listing, name: str, partial: Path) -> Digest:
    """Append to `partial` what it lacks. Raises DownloadError, and removes it where its content is wrong."""
    file = listing.files[name]
    remote = RemoteFile(listing.repo, listing.revision, name, file.bytes, file.digest)
    if partial.stat().st_size > file.bytes:
        os.truncate(partial, 0)
    digest = Digest(file)
    done = digest.read(partial)
    with partial.open("r+b") as out, progress.bar(name) as show:
        out.seek(done)

        def write(block: bytes) -> None:
            out.write(block)
            digest.update(block)
            show(out.tell(), file.bytes)

        try:
            remote.read(done, file.bytes, write)
        except RangesRefused as error:
            print(f"{error}: from the beginning, then", file=sys.stderr)
            digest = Digest(file)
            out.seek(0)
            out.truncate()
            remote.read(0, file.bytes, write)
    if not digest.right:
        partial.unlink()
        raise DownloadError(f"{listing.repo}: {name}: {digest.complaint()}: removed it, run again")
    return digest


def check_listing(listing: Listing, shard: Path, name: str) -> None:
    """Compare what a whole, verified shard has with the listing, which was read by ranges. Raises DownloadError."""
    found = [replace(tensor, shard=name) for tensor in safetensors.read_shard_header(shard)]
    listed = [tensor for tensor in listing.tensors.values() if tensor.shard == name]
    if sorted(found, key=lambda t: t.name) != listed:
        raise DownloadError(
            f"{listing.repo} at {listing.revision}: {name} has other tensors than the Hub's answers said when it was "
            "listed: delete files.json, and all that was made of it, and run again"
        )


def confirm_head(record: Path, shard: Path) -> int:
    """Compare a whole, verified shard with a head that was fetched by itself; how many tensors of the head it has.

    Raises DownloadError where they differ.
    """
    try:
        recorded = {
            name: t["sha256"]
            for name, t in json.loads(record.read_text())["tensors"].items()
            if t["shard"] == shard.name
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DownloadError(
            f"{record}: is not what fetch_head.py writes ({error}): delete it and run again"
        ) from None
    found = {
        t.name: sha256(FileRange(shard, t.offset, t.size))
        for t in safetensors.read_shard_header(shard)
        if t.name in recorded
    }
    for name, digest in recorded.items():
        if found.get(name) != digest:
            raise DownloadError(
                f"{shard}: {name} is not what was fetched by itself, and trusted, before: delete {record} and the folder of that "
                "head, and whatever was made of it"
            )
    return len(recorded)
