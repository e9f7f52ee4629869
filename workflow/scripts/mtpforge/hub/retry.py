"""Retries of Hub requests: what is worth another try, how long to wait, when to give up.

Not tenacity: a download resets the count whenever bytes arrive, and a server may ask for a wait
that ends the run. Both would have to be written into tenacity's state, in more lines than these.
"""

import os
import re
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import TypeVar

import httpx2
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, not typed
    parse_ratelimit_headers,
)

from mtpforge import progress
from mtpforge.errors import DownloadError

TRIES = 6
"""Failures in a row, without enough bytes in between, before giving up."""
FIRST_WAIT = float(os.environ.get("MTPFORGE_RETRY_WAIT", "1"))
"""Seconds before the second try; doubled before each further one."""
LONGEST_WAIT = 600.0
"""Seconds; a server that asks for a longer wait ends the run."""
_TRANSIENT_STATUS = (408, 425, 429, 500, 502, 503, 504)

# A refusal means something else if the request had no token.
_LOG_IN = "set HF_TOKEN or log in with `.venv/bin/hf auth login`"
_GATED = f"is gated: accept its terms on its page, then {_LOG_IN}"
_STILL_GATED = (
    "is gated, and your token does not open it: accept its terms on its page with the token's "
    "account, and let a fine-grained token read gated repositories"
)
_REJECTED = (
    "your token was rejected (expired, revoked or mistyped): drop it if the repository is public "
    "(unset HF_TOKEN, or `hf auth logout`), or renew it at https://huggingface.co/settings/tokens"
)
_NOT_FOUND = f"no such repository, or a private one: check the name, {_LOG_IN}"
_STILL_NOT_FOUND = (
    "no such repository, or a private one that your token cannot read: check the name, and the "
    "rights of the token"
)
_DENIED = "access denied: set HF_TOKEN to a token with access, or run `.venv/bin/hf auth login`"
_STILL_DENIED = "access denied: your token has no right to do this: give it the right"

T = TypeVar("T")


class UnusableAnswer(Exception):
    """The response is not what was requested; another try may help."""

    def __init__(self, reason: str, wait: float = 0) -> None:
        super().__init__(reason)
        self.wait = wait


class RangeIgnored(UnusableAnswer):
    """The server sent the whole file instead of the requested range."""


class RangesRefused(DownloadError):
    """The server never sends a range: the file must be read from its start."""


REQUEST_ERRORS = (
    HfHubHTTPError,
    HFValidationError,
    OfflineModeIsEnabled,
    httpx2.HTTPError,
    httpx2.InvalidURL,
    UnusableAnswer,
)
"""Exceptions of a failed request, transient or not."""


class Retry:
    """Counts consecutive failures of one request or file, waits after each, and gives up.

    `what` names the repository or file in messages.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self.failures = 0

    def reset(self) -> None:
        """Start counting again, because data has arrived."""
        self.failures = 0

    def wait(self, error: Exception) -> None:
        """Wait before the next try. Raises DownloadError if that is pointless or too late."""
        reason, asked = _transient(error)
        if reason is None:
            raise DownloadError(f"{self.what}: {explain(error)}") from None
        self.failures += 1
        seconds = max(asked, FIRST_WAIT * 2 ** (self.failures - 1))
        if self.failures >= TRIES or seconds > LONGEST_WAIT:
            later = f" (the server asks to wait {asked:.0f} s)" if asked > LONGEST_WAIT else ""
            kind = RangesRefused if isinstance(error, RangeIgnored) else DownloadError
            raise kind(
                f"{self.what}: {reason}{later}: gave up after {self.failures} tries: "
                "run again later"
            ) from None
        progress.say(f"{self.what}: {reason}: retrying in {seconds:.1f} s")
        time.sleep(seconds)

    def call(self, request: Callable[[], T]) -> T:
        """Call `request`, and again after transient failures. Raises DownloadError."""
        while True:
            try:
                return request()
            except REQUEST_ERRORS as error:
                self.wait(error)


def explain(error: Exception) -> str:
    """Describe a failed request in one line; huggingface_hub's messages have no token."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set: unset it to use the Hub"
    response = getattr(error, "response", None)
    if response is None:
        return first_line(error)
    status = response.status_code
    with_token = "Authorization" in response.request.headers
    if isinstance(error, GatedRepoError):
        return _STILL_GATED if with_token else _GATED
    if status == 401 and with_token and response.headers.get("X-Error-Code") != "RepoNotFound":
        return _REJECTED
    if isinstance(error, RevisionNotFoundError):
        return "has no such branch, tag or commit"
    if isinstance(error, RepositoryNotFoundError):
        return _STILL_NOT_FOUND if with_token else _NOT_FOUND
    if status in (401, 403):
        return _STILL_DENIED if with_token else _DENIED
    return first_line(error)


def first_line(error: Exception) -> str:
    """Return the first line of an exception's message, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def requested_wait(headers: Mapping[str, str]) -> float:
    """Return the seconds until `Retry-After` or the rate limit expires; 0 without both."""
    value = headers.get("Retry-After", "").strip()
    if re.fullmatch(r"\d{1,9}", value):
        return float(value)
    with suppress(ValueError, TypeError):  # not a date, or one without a time zone
        return (parsedate_to_datetime(value) - datetime.now(UTC)).total_seconds()
    limit = parse_ratelimit_headers(headers)
    return float(limit.reset_in_seconds) if limit and limit.remaining == 0 else 0.0


def _transient(error: Exception) -> tuple[str | None, float]:
    """Return why a request failed, None if for good, and the wait the server asked for."""
    if isinstance(error, UnusableAnswer):
        return str(error), error.wait
    if isinstance(error, HfHubHTTPError) and error.response.status_code in _TRANSIENT_STATUS:
        return f"status {error.response.status_code}", requested_wait(error.response.headers)
    if isinstance(error, httpx2.TimeoutException):
        return "no answer in time", 0
    if isinstance(error, httpx2.TransportError):
        return f"the connection failed ({first_line(error)})", 0
    return None, 0
