"""Progress of long work on stderr: one rewritten line on a terminal, some lines in a log.

Time left is what the rest takes at the mean speed so far.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mtpforge import table
from mtpforge.errors import printable

_INTERVAL = 10.0
"""Seconds between two lines in a log."""
_LAST = 10.0
"""Seconds that are too few to announce."""

Show = Callable[[int, int], None]
"""Takes the bytes done and the total."""


@contextmanager
def bar(label: str) -> Iterator[Show]:
    """Yield a function that shows bytes, share and rate: twice a second, or in a log every 10 s.

    Work that is finished before the first interval has passed shows nothing.
    """
    progress = _Bar(label)
    try:
        yield progress.show
    finally:
        progress.close()


def say(line: str) -> None:
    """Print a note on stderr."""
    print(printable(line), file=sys.stderr, flush=True)


class Left:
    """How long work that starts now still takes."""

    def __init__(self) -> None:
        self.start = self.shown = time.monotonic()

    def of(self, done: float, total: float) -> str:
        """Such as `, 3 min 5 s left`; empty for the last seconds, and while nothing is done."""
        if not 0 < done < total:
            return ""
        seconds = (time.monotonic() - self.start) * (total - done) / done
        return f", {table.duration(seconds)} left" if seconds >= _LAST else ""

    def due(self) -> bool:
        """Whether it is time for another line in a log."""
        now = time.monotonic()
        if now - self.shown < _INTERVAL:
            return False
        self.shown = now
        return True


class _Bar:
    def __init__(self, label: str) -> None:
        self.label = printable(label)
        self.terminal = sys.stderr.isatty()
        self.interval = 0.5 if self.terminal else _INTERVAL
        self.left = Left()
        self.start = self.last = time.monotonic()
        self.first = 0
        self.before: int | None = None

    def show(self, done: int, total: int) -> None:
        """Show progress if the interval has passed; the rate is the one since the last line."""
        if self.before is None:
            self.first = self.before = done  # an earlier run may have done this much already
        now = time.monotonic()
        if now - self.last < self.interval:
            return
        rate = (done - self.before) / (now - self.last)
        self.before = done
        self.last = now
        self._print(
            f"{self.label}: {done / 1e9:.2f} of {total / 1e9:.2f} GB "
            f"({100 * done / max(total, 1):.0f}%), {rate / 1e6:.0f} MB/s"
            + self.left.of(done - self.first, total - self.first)
        )

    def _print(self, line: str) -> None:
        if self.terminal:
            print(f"\r\x1b[K{line}", end="", file=sys.stderr, flush=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the line, if one was shown."""
        if self.terminal and self.last > self.start:
            print(file=sys.stderr)
