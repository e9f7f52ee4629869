"""Hostile text is refused with one line, at once, within little memory; nothing is left.

Kinds and programs are in `hostile_text`; `bench/hostile_text.py` prints the worst of each kind.
"""

import gzip
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import hostile_text
import pytest
from hostile_text import CASES, Case
from huggingface_hub import close_session, constants
from mtpforge.errors import DownloadError
from mtpforge.hub import answers, ranged_reads, resolve, retry
from mtpforge.hub.listing import File
from mtpforge.hub.ranged_reads import RemoteFile
from mtpforge.hub.retry import UnusableAnswer

SECONDS = 5.0
"""Of CPU time far less is used; a machine that is busy with other tests takes longer."""
MEGABYTES = 200.0
"""On top of what this process has."""


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}-{case.name}")
def test_hostile_text_is_refused(case: Case, tmp_path: Path) -> None:
    before = hostile_text.resident()
    outcome = hostile_text.attempt(hostile_text.prepared(case, tmp_path))
    assert hostile_text.problem(outcome, tmp_path) == ""
    if case.kind == "another type":
        assert case.name.partition(":")[0].rpartition("/")[2] in outcome.errors
    assert outcome.seconds < SECONDS
    assert outcome.megabytes - before < MEGABYTES


def test_there_are_enough_cases_of_each_kind() -> None:
    assert len(CASES) > 400
    kinds = [case.kind for case in CASES]
    assert min(map(kinds.count, kinds)) >= 3


BODIES: dict[str, tuple[Callable[[], bytes], str]] = {
    "deep": (lambda: b"[" * 100_000, "nested"),
    "digits": (lambda: b'{"sha": ' + b"9" * 5000 + b"}", "number"),
    "lists": (lambda: b'{"siblings": [' + b"[]," * 4_000_000 + b"[]]}", "entries"),
    "large": (lambda: b'"' + bytes(70 << 20) + b'"', "more than 64 MB"),
    "a list": (lambda: b"[1]", "malformed answer"),
    "a number": (lambda: b"7", "malformed answer"),
    "no commit": (lambda: b'{"id": "a/b", "sha": 7}', "malformed answer"),
    "an escape": (lambda: b'{"id": "a/b", "sha": "\\u001b[31m"}', "malformed answer"),
    "files of a number": (
        lambda: b'{"id": "a/b", "sha": "%s", "siblings": 7}' % (b"0" * 40),
        "malformed",
    ),
    "cut": (lambda: b'{"id": "a/b"', "malformed answer"),
    "nothing": (lambda: b"", "malformed answer"),
    "not UTF-8": (lambda: b'{"id": "\xff"}', "malformed answer"),
    "compressed": (lambda: gzip.compress(bytes(64 << 20)), "compressed"),
    "slow": (lambda: b"{" + b" " * 50, "takes longer than"),
}


class _Answers(BaseHTTPRequestHandler):
    """Answers every request with the body that its path names."""

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        kind = self.path.rpartition("/")[2].partition("?")[0].replace("%20", " ")
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        if kind == "compressed":
            self.send_header("Content-Encoding", "gzip")
        self.end_headers()
        try:
            if kind != "slow":
                self.wfile.write(BODIES[kind][0]())
                return
            for byte in BODIES[kind][0]():
                self.wfile.write(bytes([byte]))
                time.sleep(0.05)
        except OSError:
            pass


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    close_session()
    yield
    close_session()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("kind", BODIES)
def test_a_hostile_answer_of_the_hub_is_refused(
    kind: str, endpoint: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(answers, "SECONDS", 0.3 if kind == "slow" else 60.0)
    with pytest.raises(DownloadError, match=BODIES[kind][1]) as caught:
        resolve.model_info("a/b", kind)
    assert str(caught.value).isprintable()


def test_a_file_that_trickles_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def blocks(self: RemoteFile, begin: int, end: int) -> Iterator[bytes]:
        for _ in range(begin, end):
            time.sleep(0.02)
            yield b"a"

    monkeypatch.setattr(RemoteFile, "_blocks", blocks)
    monkeypatch.setattr(ranged_reads, "SECONDS", 1.0)
    file = RemoteFile("a/b", "0" * 40, name="config.json", file=File(500, "0" * 40))
    assert file.get(0, 2) == b"aa"
    with pytest.raises(DownloadError, match="too slowly"):
        file.get(0, 500)


class Clock:
    """Time that passes only while a server sends."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(ranged_reads, "time", self)
        monkeypatch.setattr(retry, "FIRST_WAIT", 0.0)

    def monotonic(self) -> float:
        return self.now


Sent = list[tuple[float, int]]
"""Seconds before a block, and its bytes."""


@pytest.mark.parametrize(
    ("answer", "longest"),
    [
        ([(1.0, 900)] * 10_000, 3700),
        ([(9.0, 1)] * 10_000, 3700),
        ([(550.0, 1)], 3700),  # closed before the window ends
        ([(0.0, 1)], 1),
        ([(0.001, 100_000), *[(9.0, 1)] * 10_000], 3700),
    ],
    ids=["below the rate", "a byte at a time", "cut off", "one byte", "fast at first"],
)
def test_a_shard_that_trickles_is_given_up(
    monkeypatch: pytest.MonkeyPatch, answer: Sent, longest: float
) -> None:
    clock = Clock(monkeypatch)
    _answer(monkeypatch, clock, answer)
    shard = RemoteFile("a/b", "0" * 40, "model.safetensors", File(70 << 30, "0" * 64))
    reason = "ended .* bytes too early" if len(answer) == 1 else r"bytes per second for 10 min"
    with pytest.raises(DownloadError, match=rf"model.safetensors: .*{reason}.*gave up after 6 tri"):
        shard.read(0, shard.size, lambda block: None)
    assert clock.now < longest


@pytest.mark.parametrize("answer", [[(1.0, 1100)] * 1000, [(500.0, 1 << 20)], [(0.1, 1024)] * 9])
def test_a_slow_shard_arrives(monkeypatch: pytest.MonkeyPatch, answer: Sent) -> None:
    _answer(monkeypatch, Clock(monkeypatch), answer)
    shard = RemoteFile("a/b", "0" * 40, "model.safetensors", File(50 << 10, "0" * 64))
    if answer[0][1] > 50 << 10:
        shard = RemoteFile("a/b", "0" * 40, "model.safetensors", File(50 << 20, "0" * 64))
    found = 0

    def count(block: bytes) -> None:
        nonlocal found
        found += len(block)

    shard.read(0, shard.size, count)
    assert found == shard.size


def _answer(monkeypatch: pytest.MonkeyPatch, clock: Clock, answer: Sent) -> None:
    """Let each request be answered with these blocks, and then be cut off."""

    def blocks(self: RemoteFile, begin: int, end: int) -> Iterator[bytes]:
        for seconds, size in answer:
            clock.now += seconds
            yield bytes(min(size, end - begin))
            begin += size
            if begin >= end:
                return
        raise UnusableAnswer(f"ended {end - begin:,} bytes too early")

    monkeypatch.setattr(RemoteFile, "_blocks", blocks)
