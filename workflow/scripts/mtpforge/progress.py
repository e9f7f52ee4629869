"""Progress of long work on stderr: one rewritten line on a terminal, a line every few seconds in a log."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Show = Callable[[int, int], None]
"""Called with bytes done and bytes in all."""


@contextmanager
def bar(label: str) -> Iterator[Show]:
    """Yield a function that shows bytes, share and rate, at most twice a second (in a log, every ten seconds).

    The rate is that since the line before: what an earlier run has done is no part of it, and a line that stalls shows.
    """
    terminal = sys.stderr.isatty()
    interval, start = (0.5 if terminal else 10.0), time.monotonic()
    shown = start  # what is done before the first interval is over needs no line
    before: int | None = None

    def show(done: int, total: int) -> None:
        nonlocal shown, before
        now = time.monotonic()
        if before is None:
            before = done
        if now - shown < interval:
            return
        rate = (done - before) / (now - shown)
        shown, before = now, done
        line = f"{label}: {done / 1e9:.2f} of {total / 1e9:.2f} GB ({100 * done / max(total, 1):.0f}%), {rate / 1e6:.0f} MB/s"
        print(
            f"\r\x1b[K{line}" if terminal else line,
            end="" if terminal else "\n",
            file=sys.stderr,
            flush=True,
        )

    try:
        yield show
    finally:
        if terminal and shown > start:
            print(file=sys.stderr)


def say(line: str) -> None:
    """Print a note on stderr."""
    print(line, file=sys.stderr, flush=True)
