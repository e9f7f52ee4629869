"""Checked reads of a file on the Hub, by byte range, over lines that break and servers that err.

huggingface_hub says where a file lies and who we are; since 2.4 it begins an interrupted download anew and believes any range
it is given, so the reading is done here. What does not fit is read again from where it broke; what never fits is an error.
"""

import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar
from urllib.parse import urljoin, urlsplit

import httpx2
from huggingface_hub import constants, get_session, get_token, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, parse_ratelimit_headers  # type: ignore[attr-defined]  # documented, not typed

from mtpforge.errors import DownloadError

TRIES = 6  # in a row without a byte between them
FIRST_WAIT = float(os.environ.get("MTPFORGE_RETRY_WAIT", "1"))
"""Seconds before the second try; each further wait is twice as long."""
REDIRECTS = 5
LONGEST_WAIT = 600.0
"""Seconds that a server may ask us to wait."""
_TRANSIENT = (408, 425, 429, 500, 502, 503, 504)
_FAILURES = (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    httpx2.HTTPError,
    httpx2.InvalidURL,
)

T = TypeVar("T")


class UnusableAnswer(Exception):
    """An answer that is not what was asked for; another try may bring a better one."""

    def __init__(self, reason: str, wait: float = 0) -> None:
        super().__init__(reason)
        self.wait = wait


class RangeIgnored(UnusableAnswer):
    """The whole file came for a part of it."""


class RangesRefused(DownloadError):
    """A server that never sends a part: the file must be read from its beginning."""


class Patience:
    """Counts the failures in a row on one thing, waits after each, and gives up. `what` begins its messages."""

    def __init__(self, what: str) -> None:
        self.what, self.failures = what, 0

    def failed(self, error: Exception) -> None:
        """Wait, so that the caller can try again. Raises DownloadError where that is pointless, or was often enough."""
        reason, asked = _transient(error)
        if reason is None:
            raise DownloadError(f"{self.what}: {explain(error)}") from None
        self.failures += 1
        wait = max(asked, FIRST_WAIT * 2 ** (self.failures - 1))
        if self.failures >= TRIES or wait > LONGEST_WAIT:
            later = f", and asks to wait {asked:.0f} s" if asked > LONGEST_WAIT else ""
            kind = RangesRefused if isinstance(error, RangeIgnored) else DownloadError
            raise kind(
                f"{self.what}: {reason}{later}: given up after {self.failures} tries: run again later"
            ) from None
        print(f"{self.what}: {reason}: trying again in {wait:.1f} s", file=sys.stderr, flush=True)
        time.sleep(wait)

    def call(self, request: Callable[[], T]) -> T:
        """The result of `request`, tried until it comes. Raises DownloadError."""
        while True:
            try:
                return request()
            except (*_FAILURES, UnusableAnswer) as error:
                self.failed(error)


class RemoteFile:
    """A file of a commit, `size` bytes long; `digest` is what the Hub calls its ETag. Nothing is requested before a read."""

    def __init__(self, repo: str, revision: str, name: str, size: int, digest: str) -> None:
        self.repo, self.revision, self.name, self.size, self.digest = (
            repo,
            revision,
            name,
            size,
            digest,
        )
        self._address: str | None = None
        self._etag: str | None = None

    def read(self, begin: int, end: int, write: Callable[[bytes], object]) -> None:
        """Hand the bytes from `begin` up to `end` to `write`, in order and each once.

        Raises DownloadError, and whatever `write` raises.
        """
        patience = Patience(f"{self.repo}: {self.name}")
        while begin < end:
            blocks = self._blocks(begin, end)
            while True:
                try:
                    block = next(blocks, b"")
                except (*_FAILURES, UnusableAnswer) as error:
                    self._address = (
                        None  # a signed address expires, and another may lead to a better server
                    )
                    patience.failed(error)
                    break
                if not block:
                    break
                write(block)
                begin += len(block)
                patience.failures = 0

    def get(self, begin: int, end: int) -> bytes:
        """The same as bytes, for what is small."""
        blocks: list[bytes] = []
        self.read(begin, end, blocks.append)
        return b"".join(blocks)

    def _blocks(self, begin: int, end: int) -> Iterator[bytes]:
        address, headers = self._locate()
        partial = (begin, end) != (0, self.size)
        if partial:
            headers["Range"] = f"bytes={begin}-{end - 1}"
        # The token is only ever in a request that stays where it was sent.
        redirects = "authorization" not in headers
        timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
        with get_session().stream(
            "GET", address, headers=headers, timeout=timeout, follow_redirects=redirects
        ) as response:
            self._check(response, begin, end, partial)
            left = end - begin
            for block in response.iter_bytes():
                if len(block) > left:
                    raise UnusableAnswer(
                        f"sent more than the {end - begin:,} bytes that were asked for"
                    )
                left -= len(block)
                yield block
        if left:
            raise UnusableAnswer(f"ended {left:,} bytes too early")

    def _locate(self) -> tuple[str, dict[str, str]]:
        """Where the file lies now, and the headers of a request for it: the token only for the Hub itself."""
        if self._address is None:
            address, etag, size = _metadata(
                hf_hub_url(self.repo, self.name, revision=self.revision)
            )
            if etag != self.digest or size not in (None, str(self.size)):
                raise DownloadError(
                    f"{self.repo}: {self.name}: is {etag} of {size} bytes now, and was {self.digest} of {self.size} "
                    "when it was listed: a commit does not change, so this server is not to be trusted"
                )
            if urlsplit(constants.ENDPOINT).scheme == "https" != urlsplit(address).scheme:
                raise DownloadError(
                    f"{self.repo}: {self.name}: the Hub leads to an address without encryption: refused"
                )
            self._address = address
        return self._address, _headers(self._address)

    def _check(self, response: httpx2.Response, begin: int, end: int, partial: bool) -> None:
        """Raises UnusableAnswer where the answer's head does not promise exactly what was asked for."""
        status, headers = response.status_code, response.headers
        if partial and status == 200:
            raise RangeIgnored("the whole file was sent for a part of it")
        if status != (206 if partial else 200):
            what = "the address has expired" if status == 403 else f"status {status}"
            raise UnusableAnswer(what, _asked_to_wait(headers))
        expected = f"bytes {begin}-{end - 1}/{self.size}"
        if partial and headers.get("Content-Range") != expected:
            raise UnusableAnswer(
                f"Content-Range is {headers.get('Content-Range')!r}, expected {expected!r}"
            )
        encoded = headers.get("Content-Encoding", "identity") != "identity"
        if partial and encoded:
            raise UnusableAnswer("a part of the file came compressed")
        length = headers.get("Content-Length", str(end - begin))
        if not encoded and length != str(end - begin):
            raise UnusableAnswer(f"Content-Length is {length}, expected {end - begin}")
        etag = headers.get("ETag", "")
        if partial and not etag:
            raise UnusableAnswer("a part of the file came without an ETag")
        if self._etag not in (None, etag):
            raise DownloadError(
                f"{self.repo}: {self.name}: changed while it was read (ETag {self._etag}, then {etag}): run again"
            )
        self._etag = etag


def _metadata(url: str) -> tuple[str, str, str | None]:
    """Address, ETag and size of a file, as the Hub's first answer says that leads elsewhere.

    huggingface_hub would follow it, with the token, to huggingface.co also where the Hub is a mirror.
    """
    for _ in range(REDIRECTS):
        headers = _headers(url)
        response = get_session().request(
            "HEAD",
            url,
            headers=headers,
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
            follow_redirects=False,
        )
        hf_raise_for_status(response)
        found, leads = response.headers, response.headers.get("Location")
        target = urljoin(url, leads) if leads else url
        if (
            leads
            and _origin(target) == _origin(constants.ENDPOINT)
            and "X-Linked-ETag" not in found
        ):
            url = target
            continue
        etag = found.get("X-Linked-ETag") or found.get("ETag") or ""
        size = found.get("X-Linked-Size") or (None if leads else found.get("Content-Length"))
        return target, etag.removeprefix("W/").strip('"'), size
    raise UnusableAnswer(f"more than {REDIRECTS} redirects")


def _headers(url: str) -> dict[str, str]:
    """Of a request, with the token where it goes to the Hub itself. Raises DownloadError for a token that can be none."""
    token = get_token() if _origin(url) == _origin(constants.ENDPOINT) else None
    if token and not (token.isascii() and token.isprintable()):
        raise DownloadError(
            "the token has characters that no token has: check HF_TOKEN, or log in again with `hf auth login`"
        )
    return {**build_hf_headers(token=token or False), "Accept-Encoding": "identity"}


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


def _transient(error: Exception) -> tuple[str | None, float]:
    """What failed, if a further try may succeed, and how many seconds the server wants to be left alone."""
    if isinstance(error, UnusableAnswer):
        return str(error), error.wait
    if isinstance(error, HfHubHTTPError) and error.response.status_code in _TRANSIENT:
        return f"status {error.response.status_code}", _asked_to_wait(error.response.headers)
    if isinstance(error, httpx2.TimeoutException):
        return "no answer in time", 0
    if isinstance(error, httpx2.TransportError):
        return f"the connection failed ({_first_line(error)})", 0
    return None, 0


def _asked_to_wait(headers: Mapping[str, str]) -> float:
    """Seconds from `Retry-After`, or until the Hub's rate limit ends; 0 where nothing is asked."""
    value = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,9}", value):
        return float(value)
    with suppress(ValueError, TypeError):  # no date either, or one without a time zone
        return (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
    limit = parse_ratelimit_headers(headers)
    return float(limit.reset_in_seconds) if limit and limit.remaining == 0 else 0.0


def explain(error: Exception) -> str:
    """What went wrong, in a line; no message of huggingface_hub carries the token."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so the Hub is not asked"
    if isinstance(error, GatedRepoError):
        return "is gated: accept its terms on its page, then set HF_TOKEN or log in with `hf auth login`"
    if isinstance(error, RepositoryNotFoundError):
        return "no such repository, or one that needs a token: set HF_TOKEN or log in with `hf auth login`"
    if isinstance(
        error, (HfHubHTTPError, httpx2.HTTPStatusError)
    ) and error.response.status_code in (401, 403):
        return "is not allowed: set HF_TOKEN to a token that may, or log in with `hf auth login`"
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
