"""A running job, and the messages in its log."""

import re
from dataclasses import dataclass
from pathlib import Path

from mtpforge.errors import printable

TAIL = 8192  # bytes at the end of a log
WIDTH = 160  # characters of a line
ERROR_LINES = 12
LINE_ENDS = re.compile(r"[\r\n]+")  # progress bars rewrite their line
COUNT = re.compile(r" *\[ *\d+(/ *\d+)?\]")
ESCAPES = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


@dataclass
class Job:
    """A job that has started. Its log may not exist yet."""

    label: str
    output: str
    log: Path
    started: float
    next_progress: float
    seen: bool = True
    """Whether its start and end have lines."""
    announced: bool = False
    """Whether its start has had its line."""
    echoed: bool = False
    """Whether what it logs is on the terminal already."""
    copied: int = 0

    def last_line(self) -> str:
        """A running job's progress, or a finished one's figure; empty if the log is.

        A count of llama.cpp's own gives way to ours before it, which has the time left.
        """
        lines = self._tail()
        ours = [line for line in lines if not COUNT.match(line)]
        return "".join((ours or lines)[-1:]).strip()[:WIDTH]

    def error(self) -> str:
        """Its `error:` line with what follows, or else the last lines of the log."""
        lines = self._tail()
        starts = [number for number, line in enumerate(lines) if line.startswith("error: ")]
        said = lines[starts[-1] :][:ERROR_LINES] if starts else lines[-ERROR_LINES:]
        return "\n         ".join(said).removeprefix("error: ")

    def warnings(self) -> list[str]:
        """The `warning:` lines of the whole log."""
        return [line for line in _lines(self._read(0)) if line.startswith("warning: ")]

    def news(self) -> str:
        """The text added to the log since the last call."""
        data = self._read(self.copied)
        self.copied += len(data)
        return printable(data.decode(errors="replace").replace("\r", "\n"))

    def _tail(self) -> list[str]:
        size = self.log.stat().st_size if self.log.is_file() else 0
        return _lines(self._read(max(0, size - TAIL)))

    def _read(self, position: int) -> bytes:
        if not self.log.is_file():
            return b""
        with self.log.open("rb") as file:
            file.seek(position)
            return file.read()


def _lines(data: bytes) -> list[str]:
    parts = LINE_ENDS.split(data.decode(errors="replace"))
    return [line for part in parts if (line := printable(ESCAPES.sub("", part)).rstrip())]
