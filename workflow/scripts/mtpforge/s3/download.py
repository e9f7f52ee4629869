"""Download of a folder in object storage: a checkpoint, or what was uploaded.

A list beside the folder has the size, ETag and sha256 of each file: what changed since it was
written is refused. A file gets its name once it is whole.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from mtpforge import progress
from mtpforge.errors import DownloadError
from mtpforge.hub.listing import FILE_PATH, check_name
from mtpforge.io import atomic, text
from mtpforge.io.ranges import digest_of
from mtpforge.publish.sums import SUMS
from mtpforge.s3 import client
from mtpforge.s3.address import Address

ENDING = ".s3.json"
"""Of the list: its name begins like the folder's."""
KINDS = (".json", ".safetensors", ".jinja", ".txt", ".md", ".model", ".gguf", f"/{SUMS}")
"""Endings of files that are downloaded. No code reaches the disk."""
TRIES = 6
"""Failures in a row, without a byte in between, before giving up."""
FIRST_WAIT = float(os.environ.get("MTPFORGE_RETRY_WAIT", "1"))
"""Seconds before the second try; doubled before each further one."""
_BLOCK = 1 << 20
_SUM = re.compile(r"([0-9a-f]{64}) [ *](.+)")


@dataclass(frozen=True)
class Stored:
    """A file in the bucket; `sha256` is empty if nothing says it before the first download."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)
    bytes: int
    etag: str
    sha256: str = ""


@dataclass(frozen=True)
class Listing:
    """The files of a folder by name."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)
    url: str
    files: dict[str, Stored]

    @classmethod
    def read(cls, path: Path) -> "Listing":
        """Read what `write` wrote. Raises DownloadError if the file is malformed."""
        content = text.read_bytes(path, DownloadError, within=text.ANYWHERE)
        try:
            text.parse_json(path, content, DownloadError)
            found = TypeAdapter(cls).validate_json(content)
        except ValidationError as error:
            where = ".".join(map(str, error.errors(include_url=False)[0]["loc"]))
            raise DownloadError(f"{path}: malformed at {where}: delete it and run again") from None
        for name in found.files:
            check_name(name)
        return found

    def write(self, path: Path) -> None:
        """Write the list as JSON."""
        atomic.write_text(path, json.dumps(asdict(self), indent=1) + "\n")


def download(address: Address, folder: Path) -> Listing:
    """Download what is missing in `folder`, and check all of it; the list of its files.

    Raises DownloadError if the service fails, or a file differs from the list; a second call
    resumes.
    """
    source = _Source(address)
    path = Path(f"{folder if folder.name else folder.resolve()}{ENDING}")
    is_new = not path.exists()
    now = source.list()
    if is_new:
        listing = source.with_sums(now)
        listing.write(path)
    else:
        listing = Listing.read(path)
        _check_same(listing, now, path)
    for name, stored in listing.files.items():
        digest = source.fetch(name, stored, folder / name, keep=not is_new)
        if digest != stored.sha256:  # nothing has said it before
            files = {**listing.files, name: replace(stored, sha256=digest)}
            listing = replace(listing, files=files)
            listing.write(path)
    return listing


def _check_same(listing: Listing, now: Listing, path: Path) -> None:
    if listing.url != now.url:
        raise DownloadError(f"{path}: lists {listing.url}: name another folder for {now.url}")
    for name, stored in listing.files.items():
        found = now.files.get(name)
        if found is None or (found.bytes, found.etag) != (stored.bytes, stored.etag):
            what = "changed" if found else "is gone"
            raise DownloadError(
                f"{now.url}/{name}: {what} since {path} was written: delete that list and the "
                "folder to take what is there now"
            )


class _Source:
    """The folder at `address`."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._client = client.connect()

    def list(self) -> Listing:
        """The files that may be downloaded. Raises DownloadError if there are none."""
        at = {"Bucket": self._address.bucket, "Prefix": self._address.prefix}
        with _asking(str(self._address)):
            pages = self._client.get_paginator("list_objects_v2").paginate(**at)
            found = [entry for page in pages for entry in page.get("Contents", [])]
        names = [entry["Key"].removeprefix(self._address.prefix) for entry in found]
        files = {
            name: Stored(entry["Size"], entry["ETag"])
            for name, entry in zip(names, found, strict=True)
            if FILE_PATH.fullmatch(name) and f"/{name}".endswith(KINDS)
        }
        if not files:
            raise DownloadError(f"{self._address}: has no file of a checkpoint: check the address")
        return Listing(str(self._address), files)

    def fetch(self, name: str, stored: Stored, path: Path, keep: bool) -> str:
        """Download a file unless it is there; its sha256. `keep` goes on with its beginning."""
        is_there = path.is_file() and path.stat().st_size == stored.bytes
        if is_there and digest_of(path) == stored.sha256:
            return stored.sha256
        with atomic.replacing(path, keep=True, needed=stored.bytes) as partial:
            if not keep or partial.stat().st_size > stored.bytes:
                os.truncate(partial, 0)
            digest = self._append(name, stored, partial)
            if stored.sha256 not in ("", digest):
                os.truncate(partial, 0)
                raise DownloadError(
                    f"{self._address}/{name}: its sha256 is {digest}, expected {stored.sha256}: "
                    "run again"
                )
        return digest

    def with_sums(self, listing: Listing) -> Listing:
        """The same list with the digests that SHA256SUMS there has."""
        sums = listing.files.get(SUMS)
        if sums is None or sums.bytes > text.YAML_LIMIT:
            return listing
        with _asking(f"{self._address}/{SUMS}"):
            content = self._open(SUMS, sums, 0).read()
        lines = [_SUM.fullmatch(line) for line in content.decode("utf-8", "replace").splitlines()]
        digests = {line[2].removeprefix("./"): line[1] for line in lines if line}
        files = {
            name: replace(stored, sha256=digests.get(name, ""))
            for name, stored in listing.files.items()
        }
        return replace(listing, files=files)

    def _append(self, name: str, stored: Stored, partial: Path) -> str:
        """Add what is missing at the end of a file; the sha256 of all of it."""
        digest, failures = hashlib.sha256(), 0
        with partial.open("r+b") as out, progress.bar(name) as show:
            while block := out.read(_BLOCK):
                digest.update(block)
            while (begin := out.tell()) < stored.bytes:
                try:
                    for block in self._blocks(name, stored, begin):
                        out.write(block)
                        digest.update(block)
                        show(out.tell(), stored.bytes)
                except client.failures() as error:
                    failures = 1 if out.tell() > begin else failures + 1
                    self._wait(name, error, failures)
        return digest.hexdigest()

    def _blocks(self, name: str, stored: Stored, begin: int) -> Iterator[bytes]:
        with _asking(f"{self._address}/{name}"):
            body = self._open(name, stored, begin)
        yield from body.iter_chunks(_BLOCK)

    def _open(self, name: str, stored: Stored, begin: int) -> Any:
        """The bytes of a file from `begin` on. Raises DownloadError if it is not the listed one."""
        asked = {"Range": f"bytes={begin}-"} if begin else {}
        key = self._address.key(name)
        found = self._client.get_object(
            Bucket=self._address.bucket, Key=key, IfMatch=stored.etag, **asked
        )
        expected = f"bytes {begin}-{stored.bytes - 1}/{stored.bytes}"
        whole = begin == 0 or found.get("ContentRange") == expected
        if not whole or (found["ContentLength"], found["ETag"]) != (
            stored.bytes - begin,
            stored.etag,
        ):
            raise DownloadError(
                f"{self._address}/{name}: the service sends another file or part than was asked "
                "for: do not trust it"
            )
        return found["Body"]

    def _wait(self, name: str, error: Exception, failures: int) -> None:
        why = f"{self._address}/{name}: {client.explain(error)}"
        if failures >= TRIES:
            raise DownloadError(f"{why} ({failures} tries without a byte)")
        progress.say(f"{why}: going on")
        time.sleep(FIRST_WAIT * 2 ** (failures - 1))


@contextmanager
def _asking(what: str) -> Iterator[None]:
    """Raise DownloadError for a failed request."""
    try:
        yield
    except client.failures() as error:
        raise DownloadError(f"{what}: {client.explain(error)}") from None
