"""Reads byte ranges of a file on the Hub, and checks every response.

huggingface_hub provides the file's address and the token. Since 2.4 it restarts an interrupted
download and accepts any range the server sends. So this module reads itself: if a response does not
match the request or breaks off, it requests the rest.
"""

import re
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit

import httpx2
from huggingface_hub import constants, get_session, get_token, hf_hub_url
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, not typed
    build_hf_headers,
    hf_raise_for_status,
)

from mtpforge.errors import DownloadError
from mtpforge.hub.listing import File
from mtpforge.hub.retry import (
    REQUEST_ERRORS,
    RangeIgnored,
    Retry,
    UnusableAnswer,
    requested_wait,
)

REDIRECTS = 5
SECONDS = 120.0
"""For a small range, besides the time that `SLOWEST` takes."""
SLOWEST = 10_000
"""Bytes per second."""
STALL_RATE = 1000
"""Bytes per second of a large range, on average over a window. Slower is a failure to retry."""
STALL_SECONDS = 600.0
"""The window."""
_SHA256 = re.compile(r"\b[0-9a-f]{64}\b")


class RemoteFile:
    """A file of a commit, as listed. Nothing is requested before the first read."""

    def __init__(self, repo: str, revision: str, name: str, file: File) -> None:
        self.name = name
        self.size = file.bytes
        self._repo = repo
        self._revision = revision
        self._digest = file.digest
        self._is_lfs = file.lfs
        self._address: str | None = None
        self._etag: str | None = None

    def read(self, begin: int, end: int, write: Callable[[bytes], object]) -> None:
        """Pass bytes `begin` to `end` to `write`, in order, each once.

        Raises DownloadError, and anything that `write` raises.
        """
        retry, pace = Retry(self._label), _Pace()
        while begin < end:
            pace.answer()
            try:
                for block in self._blocks(begin, end):
                    write(block)
                    begin += len(block)
                    if pace.suffices(len(block)):
                        retry.reset()
            except REQUEST_ERRORS as error:
                # A signed URL expires, and a new one may lead to a better server.
                self._address = None
                retry.wait(error)

    def get(self, begin: int, end: int) -> bytes:
        """Return bytes `begin` to `end`; for small ranges. Raises DownloadError."""
        blocks: list[bytes] = []
        deadline = time.monotonic() + SECONDS + (end - begin) / SLOWEST

        def keep(block: bytes) -> None:
            if time.monotonic() > deadline:
                raise DownloadError(f"{self._label}: the Hub sends it too slowly: run again later")
            blocks.append(block)

        self.read(begin, end, keep)
        return b"".join(blocks)

    @property
    def _label(self) -> str:
        return f"{self._repo}: {self.name}"

    def _blocks(self, begin: int, end: int) -> Iterator[bytes]:
        address, headers = self._locate()
        partial = (begin, end) != (0, self.size)
        if partial:
            headers["Range"] = f"bytes={begin}-{end - 1}"
        with get_session().stream(
            "GET",
            address,
            headers=headers,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            follow_redirects="authorization" not in headers,  # a redirect must not see the token
        ) as response:
            self._check(response, begin, end)
            left = end - begin
            for block in response.iter_bytes():
                if len(block) > left:
                    raise UnusableAnswer(f"sent more than the {end - begin:,} bytes requested")
                left -= len(block)
                yield block
        if left:
            raise UnusableAnswer(f"ended {left:,} bytes too early")

    def _locate(self) -> tuple[str, dict[str, str]]:
        """Return the current address and headers, with the token only for the Hub itself."""
        if self._address is None:
            found = _metadata(hf_hub_url(self._repo, self.name, revision=self._revision))
            self._check_commit(found)
            secure = urlsplit(constants.ENDPOINT).scheme == "https"
            if secure and urlsplit(found.address).scheme != "https":
                raise DownloadError(
                    f"{self._label}: refusing the Hub's redirect to an unencrypted address"
                )
            self._address = found.address
        return self._address, _headers(self._address)

    def _check_commit(self, found: "Metadata") -> None:
        """Raise DownloadError if the server has another file than the listing.

        Only the sha256 that the Hub links to a large file says so. The ETag of a mirror can be
        anything, and the content of a whole file is hashed in any case.
        """
        digest = (self._is_lfs and found.digest) or self._digest
        if digest != self._digest or found.size not in (None, str(self.size)):
            raise DownloadError(
                f"{self._label}: the server now reports {digest} of {found.size} bytes, "
                f"the listing has {self._digest} of {self.size}: a commit does not change: "
                "do not trust this server (HF_ENDPOINT)"
            )

    def _check(self, response: httpx2.Response, begin: int, end: int) -> None:
        """Raise UnusableAnswer unless the headers promise exactly the requested bytes."""
        headers = response.headers
        partial = (begin, end) != (0, self.size)
        self._check_status(response, partial)
        encoded = headers.get("Content-Encoding", "identity") != "identity"
        if partial:
            self._check_range(headers, f"bytes {begin}-{end - 1}/{self.size}", encoded)
        length = headers.get("Content-Length", str(end - begin))
        if not encoded and length != str(end - begin):
            raise UnusableAnswer(f"Content-Length is {length}, expected {end - begin}")
        self._check_etag(headers.get("ETag", "").removeprefix("W/"))

    def _check_status(self, response: httpx2.Response, partial: bool) -> None:
        status = response.status_code
        if partial and status == 200:
            raise RangeIgnored("the server sent the whole file instead of a range")
        if status != (206 if partial else 200):
            reason = "the address has expired" if status == 403 else f"status {status}"
            raise UnusableAnswer(reason, requested_wait(response.headers))

    def _check_range(self, headers: httpx2.Headers, expected: str, encoded: bool) -> None:
        found = headers.get("Content-Range")
        if found != expected:
            raise UnusableAnswer(f"Content-Range is {found!r}, expected {expected!r}")
        if encoded:
            raise UnusableAnswer("the range is compressed")

    def _check_etag(self, etag: str) -> None:
        """Raise DownloadError if the file changed between two requests, as far as ETags tell."""
        if etag and self._etag not in (None, etag):
            raise DownloadError(
                f"{self._label}: changed during the download (ETag {self._etag}, then {etag}): "
                "run again"
            )
        self._etag = etag or self._etag


class _Pace:
    """How fast bytes arrive, over all tries."""

    def __init__(self) -> None:
        self._start = self._window_start = time.monotonic()
        self._received = self._in_window = 0

    def answer(self) -> None:
        """Begin a window with an answer."""
        self._window_start, self._in_window = time.monotonic(), 0

    def suffices(self, size: int) -> bool:
        """Count a block; whether `STALL_RATE` has been kept since the last window that kept it.

        Raises UnusableAnswer after a window that has not.
        """
        now = time.monotonic()
        self._received += size
        self._in_window += size
        if (passed := now - self._window_start) >= STALL_SECONDS:
            if self._in_window < STALL_RATE * passed:
                rate = self._in_window / passed
                raise UnusableAnswer(f"only {rate:.0f} bytes per second for {passed / 60:.0f} min")
            self._start, self._received = now, 0
            self.answer()
        return self._received >= STALL_RATE * max(now - self._start, 1)


class Metadata(NamedTuple):
    """Address of a file, and its sha256 and size as far as the first answer reports them."""

    address: str
    digest: str | None
    size: str | None


def _metadata(url: str) -> Metadata:
    """Follow redirects within the Hub only, and return where the file is.

    huggingface_hub would send the token to huggingface.co even if the Hub is a mirror.
    """
    for _ in range(REDIRECTS):
        response = get_session().request(
            "HEAD",
            url,
            headers=_headers(url),
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
            follow_redirects=False,
        )
        hf_raise_for_status(response)
        found = response.headers
        location = found.get("Location")
        target = urljoin(url, location) if location else url
        within = bool(location) and _origin(target) == _origin(constants.ENDPOINT)
        if within and "X-Linked-ETag" not in found:
            url = target
            continue
        linked = _SHA256.search(found.get("X-Linked-ETag", "").lower())
        size = found.get("X-Linked-Size") or (None if location else found.get("Content-Length"))
        return Metadata(target, linked and linked[0], size)
    raise UnusableAnswer(f"more than {REDIRECTS} redirects")


def _headers(url: str) -> dict[str, str]:
    """Return headers, with the token only if the URL is on the Hub. Raises DownloadError."""
    token = get_token() if _origin(url) == _origin(constants.ENDPOINT) else None
    if token and not (token.isascii() and token.isprintable()):
        raise DownloadError(
            "the Hub token contains invalid characters: check HF_TOKEN, or log in again "
            "with `.venv/bin/hf auth login`"
        )
    return {**build_hf_headers(token=token or False), "Accept-Encoding": "identity"}


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port
