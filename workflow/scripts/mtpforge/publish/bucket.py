"""Upload of a results folder to object storage: exactly the files on its list that lack there.

The sha256 of each file is noted with its object. Large files go in parts, each with its sha256,
which the service compares; an interrupted upload continues with the parts that arrived.
"""

import base64
import hashlib
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from mtpforge import progress
from mtpforge.errors import UploadError, VerificationError
from mtpforge.publish import receipts
from mtpforge.publish.sums import SUMS, Sums
from mtpforge.publish.upload import UploadPlan, gone, listed
from mtpforge.s3 import client
from mtpforge.s3.address import Address

PART = 64 << 20
"""Bytes of a part, more for files with over 10,000 parts; a smaller file is sent whole."""
MOST_PARTS = 10_000
AT_ONCE = 4
"""Parts that are sent at the same time, and held in memory."""


def compare(folder: Path, address: Address) -> UploadPlan:
    """Compare a results folder with a folder of a bucket, which must exist.

    Raises VerificationError if a file differs from the list, UploadError if the service fails.
    """
    sums = listed(folder)
    bucket = _Bucket(address)
    there = bucket.sizes()
    missing = bucket.missing(folder, sums, there)
    foreign = sorted(there.keys() - sums.keys())
    found = UploadPlan(folder, str(address), exists=True, missing=missing, foreign=foreign)
    return replace(found, where="bucket")


def upload(plan: UploadPlan) -> None:
    """Upload what is missing, the list last; each file is hashed while it is sent.

    Raises VerificationError if a file differs from the list, UploadError.
    """
    bucket = _Bucket(Address.parse(plan.repo))
    sums = listed(plan.folder)  # in the order of the list, which comes last itself
    for name, _ in plan.missing:
        bucket.send(name, plan.folder / name, sums[name])


def send(folder: Path, address: Address, files: Sums) -> int:
    """Upload those of `files` that the bucket lacks, before the rest of the folder; how many.

    The others are compared, because a killed upload may not have done so, and they may be deleted
    here. Raises VerificationError if one differs from its digest, UploadError.
    """
    bucket = _Bucket(address)
    missing = dict(bucket.missing(folder, files, bucket.sizes()))
    for name, digest in files.items():
        if name in missing:
            bucket.send(name, folder / name, digest)
        elif (folder / name).is_file():
            bucket.confirm(name, folder / name, digest)
    return len(missing)


class _Stale(Exception):
    """An unfinished upload is that of another file."""


@dataclass
class _Upload:
    """An upload in parts; `there` are the parts that arrived before, by number."""

    id: str
    there: dict[int, dict[str, Any]] = field(default_factory=dict)

    def has(self, number: int, block: bytes) -> dict[str, Any] | None:
        """The part with these bytes, if it arrived. Raises _Stale if it has others."""
        part = self.there.get(number)
        if part is None:
            return None
        given = part.get("ChecksumSHA256")
        md5 = hashlib.md5(block, usedforsecurity=False).hexdigest()
        same = given == _sha256(block) if given else part["ETag"].strip('"') == md5
        if not same:
            raise _Stale
        return _part(number, part["ETag"], block)


class _Bucket:
    """The folder at `address`, by file names in it."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._client = client.connect()

    def sizes(self) -> dict[str, int]:
        """Bytes of each file."""
        at = {"Bucket": self._address.bucket, "Prefix": self._address.prefix}
        with _asking(str(self._address)):
            pages = self._client.get_paginator("list_objects_v2").paginate(**at)
            return {
                entry["Key"].removeprefix(self._address.prefix): entry["Size"]
                for page in pages
                for entry in page.get("Contents", [])
            }

    def missing(self, folder: Path, files: Sums, there: Mapping[str, int]) -> list[tuple[str, int]]:
        """Those of `files` that the bucket lacks, with their bytes; `there` are its sizes."""
        sent = receipts.known(folder)
        found = []
        for name, digest in files.items():
            here = (folder / name).is_file()
            if not here and name not in sent:
                raise gone(folder, name, str(self._address))
            size = (folder / name).stat().st_size if here else sent[name].bytes
            if there.get(name) != size or self.noted(name) != digest:
                if not here:
                    raise gone(folder, name, str(self._address))
                found.append((name, size))
        return found

    def noted(self, name: str) -> str:
        """The sha256 that was noted with a file; empty if it was not uploaded from here."""
        with self._asking(name):
            found = self._client.head_object(**self._at(name))
            return str(found.get("Metadata", {}).get("sha256", ""))

    def send(self, name: str, path: Path, digest: str) -> None:
        """Upload a file with this sha256, and check what arrived."""
        size = path.stat().st_size
        part = _part_size(size)
        with self._asking(name), path.open("rb") as file:
            if size <= part:
                checksum = self._put(name, file, digest)
            else:
                checksum = self._put_parts(name, file, part=part, digest=digest)
            self._check(name, checksum, size=size, digest=digest)

    def confirm(self, name: str, path: Path, digest: str) -> None:
        """Compare a file that is there already, as `send` does."""
        size = path.stat().st_size
        with self._asking(name), path.open("rb") as file:
            blocks = iter(lambda: file.read(_part_size(size)), b"")
            sums = [hashlib.sha256(block).digest() for block in blocks]
            whole = sums[0] if len(sums) == 1 else hashlib.sha256(b"".join(sums)).digest()
            self._check(name, base64.b64encode(whole).decode(), size=size, digest=digest)

    def _put(self, name: str, file: BinaryIO, digest: str) -> str:
        content = file.read()
        if hashlib.sha256(content).hexdigest() != digest:
            raise _changed(file)
        self._client.put_object(
            **self._at(name),
            Body=content,
            ChecksumSHA256=_sha256(content),
            Metadata={"sha256": digest},
        )
        return _sha256(content)

    def _put_parts(self, name: str, file: BinaryIO, part: int, digest: str) -> str:
        """Send the parts that are not there; the checksum of all."""
        upload = self._begun(name) or self._begin(name, digest)
        try:
            parts = self._send_parts(name, file, upload=upload, size=part, digest=digest)
        except (_Stale, VerificationError) as error:
            self._client.abort_multipart_upload(**self._at(name), UploadId=upload.id)
            if isinstance(error, VerificationError):
                raise
            file.seek(0)
            upload = self._begin(name, digest)
            parts = self._send_parts(name, file, upload=upload, size=part, digest=digest)
        self._client.complete_multipart_upload(
            **self._at(name), UploadId=upload.id, MultipartUpload={"Parts": parts}
        )
        return _sha256(b"".join(base64.b64decode(each["ChecksumSHA256"]) for each in parts))

    def _send_parts(
        self, name: str, file: BinaryIO, upload: _Upload, size: int, digest: str
    ) -> list[dict[str, Any]]:
        """Send a file in parts of `size` bytes. Raises _Stale, and VerificationError at its end."""

        def send(numbered: tuple[int, bytes]) -> dict[str, Any]:
            number, block = numbered
            return upload.has(number, block) or self._send_part(name, upload, numbered)

        whole, parts = hashlib.sha256(), list[dict[str, Any]]()
        total = Path(file.name).stat().st_size
        blocks = enumerate(iter(lambda: file.read(size), b""), 1)
        with ThreadPoolExecutor(AT_ONCE) as pool, progress.bar(name) as show:
            while batch := list(islice(blocks, AT_ONCE)):
                sending = pool.map(send, batch)
                for _, block in batch:
                    whole.update(block)
                parts += sending
                show(min(size * len(parts), total), total)
        if whole.hexdigest() != digest:
            raise _changed(file)
        return parts

    def _send_part(self, name: str, upload: _Upload, numbered: tuple[int, bytes]) -> dict[str, Any]:
        number, block = numbered
        sent = self._client.upload_part(
            **self._at(name),
            UploadId=upload.id,
            PartNumber=number,
            Body=block,
            ChecksumSHA256=_sha256(block),
        )
        return _part(number, sent["ETag"], block)

    def _begin(self, name: str, digest: str) -> _Upload:
        begun = self._client.create_multipart_upload(
            **self._at(name), ChecksumAlgorithm="SHA256", Metadata={"sha256": digest}
        )
        return _Upload(begun["UploadId"])

    def _begun(self, name: str) -> _Upload | None:
        """The latest unfinished upload of a file; None without one, or the right to list them."""
        at = self._at(name)
        try:
            pages = self._client.get_paginator("list_multipart_uploads").paginate(
                Bucket=at["Bucket"], Prefix=at["Key"]
            )
            found = [each for page in pages for each in page.get("Uploads", [])]
            uploads = [each for each in found if each["Key"] == at["Key"]]
            if not uploads:
                return None
            latest = max(uploads, key=lambda each: each["Initiated"])["UploadId"]
            listed = self._client.get_paginator("list_parts").paginate(**at, UploadId=latest)
            parts = [part for page in listed for part in page.get("Parts", [])]
            return _Upload(latest, {part["PartNumber"]: part for part in parts})
        except client.failures():
            return None

    def _check(self, name: str, checksum: str, size: int, digest: str) -> None:
        """Compare what the service has with what was sent, and delete it if it differs.

        A service that keeps no checksum, or that of other parts, must send the file back.
        """
        found = self._client.head_object(**self._at(name), ChecksumMode="ENABLED")
        kept = found.get("ChecksumSHA256", "").partition("-")[0]  # after it the number of parts
        same = kept == checksum or self._read_back(name) == digest
        noted = found.get("Metadata", {}).get("sha256")
        if not same or (found["ContentLength"], noted) != (size, digest):
            self._client.delete_object(**self._at(name))
            raise UploadError(
                f"{self._label(name)}: another file arrived than was sent: deleted it there: "
                "run again"
            )

    def _read_back(self, name: str) -> str:
        digest = hashlib.sha256()
        for block in self._client.get_object(**self._at(name))["Body"].iter_chunks(1 << 20):
            digest.update(block)
        return digest.hexdigest()

    def _at(self, name: str) -> dict[str, str]:
        return {"Bucket": self._address.bucket, "Key": self._address.key(name)}

    def _label(self, name: str) -> str:
        return f"{self._address}/{name}"

    def _asking(self, name: str) -> Any:
        return _asking(self._label(name))


@contextmanager
def _asking(what: str) -> Iterator[None]:
    """Raise UploadError for a failed request."""
    try:
        yield
    except client.failures() as error:
        raise UploadError(f"{what}: {client.explain(error)}") from None


def _part_size(size: int) -> int:
    """Bytes of each part of a file."""
    return max(PART, -(-size // MOST_PARTS))


def _part(number: int, etag: str, block: bytes) -> dict[str, Any]:
    return {"PartNumber": number, "ETag": etag, "ChecksumSHA256": _sha256(block)}


def _sha256(content: bytes) -> str:
    """The sha256 as the service writes it."""
    return base64.b64encode(hashlib.sha256(content).digest()).decode()


def _changed(file: BinaryIO) -> VerificationError:
    return VerificationError(
        f"{file.name}: changed after {SUMS} was written: delete it and run again"
    )
