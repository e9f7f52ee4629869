"""Progress is silent for short work, some lines in a log, one rewritten line on a terminal."""

import sys

import pytest
from mtpforge import progress

GB = 10**9


def show_four_steps(monkeypatch: pytest.MonkeyPatch, seconds: float, done: int = 0) -> None:
    """Copy 4 GB in steps of 1 GB that take this long each."""
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    with progress.bar("x.gguf") as show:
        for step in range(5):
            show(done + step * GB, done + 4 * GB)
            clock[0] += seconds


def test_short_work_shows_nothing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    show_four_steps(monkeypatch, 0.1)
    assert capsys.readouterr().err == ""


def test_a_log_gets_a_line_every_ten_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    show_four_steps(monkeypatch, 5)
    assert capsys.readouterr().err.splitlines() == [
        "x.gguf: 2.00 of 4.00 GB (50%), 200 MB/s, 10 s left",
        "x.gguf: 4.00 of 4.00 GB (100%), 200 MB/s",
    ]


def test_the_rate_excludes_what_an_earlier_run_did(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    show_four_steps(monkeypatch, 10, done=4 * GB)
    assert capsys.readouterr().err.startswith(
        "x.gguf: 5.00 of 8.00 GB (62%), 100 MB/s, 30 s left\n"
    )


def test_a_terminal_gets_one_line_that_is_ended(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    show_four_steps(monkeypatch, 1)
    shown = capsys.readouterr().err
    assert shown.count("\r\x1b[K") == 4 and shown.count("\n") == 1 and shown.endswith("MB/s\n")


def test_time_left_is_that_of_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    left = progress.Left()
    assert left.of(0, 8) == "" and not left.due()
    clock[0] = 60.0
    assert left.of(1, 8) == ", 7 min 0 s left" and left.due() and not left.due()
    assert left.of(7, 8) == "" and left.of(8, 8) == ""
