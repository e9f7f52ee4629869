"""Bounds answers of the Hub's API: their size, their time, and what is in their JSON.

Files are not bounded here: `ranged_reads` and `download` know their sizes.
"""

import time
from collections.abc import Iterator
from contextlib import closing
from functools import cache
from pathlib import Path

import httpx2
from huggingface_hub import set_client_factory
from huggingface_hub.utils._http import default_client_factory

from mtpforge.errors import DownloadError
from mtpforge.io import text

SECONDS = 120.0
"""From the first byte of an answer to its last."""


@cache
def bound() -> None:
    """Let huggingface_hub refuse answers beyond the limits; once for each process."""
    set_client_factory(client)


def client() -> httpx2.Client:
    """A client of huggingface_hub that does so."""
    made = default_client_factory()
    made.headers["Accept-Encoding"] = "identity"
    made.event_hooks = {**made.event_hooks, "response": [_check]}
    return made


def _check(response: httpx2.Response) -> None:
    """Read an answer within the limits. Raises DownloadError."""
    url = response.url
    if not url.path.startswith("/api/") or "resolve-cache" in url.path:
        return
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise DownloadError(f"{url}: the answer is compressed, which was not asked for")
    assert isinstance(response.stream, httpx2.SyncByteStream)
    with closing(response.stream):  # or its connection stays taken
        content = b"".join(_bounded(response, str(url)))
    if "json" in response.headers.get("Content-Type", ""):
        text.check_json(Path(url.path), content, DownloadError, entries=text.MANY_ENTRIES)
    response.stream = httpx2.ByteStream(content)


def _bounded(response: httpx2.Response, url: str) -> Iterator[bytes]:
    assert isinstance(response.stream, httpx2.SyncByteStream)
    deadline = time.monotonic() + SECONDS
    left = text.JSON_LIMIT
    for block in response.stream:
        left -= len(block)
        if left < 0:
            raise DownloadError(f"{url}: an answer of more than {text.JSON_LIMIT >> 20} MB")
        if time.monotonic() > deadline:
            raise DownloadError(f"{url}: the answer takes longer than {SECONDS:.0f} s")
        yield block
