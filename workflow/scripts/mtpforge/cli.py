"""Parser and exit of all programs in workflow/scripts."""

import argparse
import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TextIO

from mtpforge import run_owner
from mtpforge.errors import ConfigError, ForgeError, ToolchainError, printable
from mtpforge.io import storage
from mtpforge.io.text import parse_json

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LONGEST_MESSAGE = 2000  # characters; a hostile input can put megabytes into a message
_MOST_LINES = 40
_REPOSITORY = Path(__file__).resolve().parents[3]


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with a program's docstring as its description, line breaks included."""
    return _Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


class _Parser(argparse.ArgumentParser):
    """One whose errors are one line like all others, however long an argument is."""

    def error(self, message: str) -> NoReturn:
        """End with exit code 2."""
        _fail(f"{_line(message)} ({self.prog} --help lists the options)", code=2)


def json_object(argument: str) -> dict[str, Any]:
    """The JSON object in an argument of the command line. Raises ConfigError."""
    return parse_json(Path("JSON"), argument, ConfigError)


def installed(path: str) -> Path:
    """The path of something that `make` installs: here, or else in the program's repository."""
    in_repository = _REPOSITORY / path
    return in_repository if in_repository.exists() and not Path(path).exists() else Path(path)


def run(main: Callable[[], None]) -> None:
    """Call `main`. Expected errors end the program with `error: ...` and exit code 1.

    Control characters in what it prints are escaped.

    An interrupt, SIGTERM, a closed terminal and the end of the run of Snakemake that started the
    program unwind the stack, so that temporary files are removed and child processes end; the exit
    code is 128 plus the signal. Any other exception is a bug and keeps its traceback.
    """
    for number in _SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _unwind)
    run_owner.follow()
    try:
        with contextlib.redirect_stdout(_Escaped(sys.stdout)):
            main()
        sys.stdout.flush()
    except ToolchainError as error:
        lines = str(error).splitlines() or [""]  # it may quote the end of a log
        _fail("\n".join(map(_shortened, lines[:_MOST_LINES])))
    except ForgeError as error:
        _fail(_line(str(error)))
    except OSError as error:
        _fail(_line(str(storage.explain(error))))
    except MemoryError:
        _fail("out of memory")


def _unwind(number: int, _: Any) -> None:
    """End the program; a second signal must not interrupt the cleaning up."""
    for each in _SIGNALS:
        signal.signal(each, signal.SIG_IGN)
    sys.exit(128 + number)


def _line(message: str) -> str:
    return _shortened(" ".join(message.split()))  # an input can put line breaks into a message


def _shortened(line: str) -> str:
    text = printable(line[: _LONGEST_MESSAGE + 1])
    return text[:_LONGEST_MESSAGE] + " ..." if len(text) > _LONGEST_MESSAGE else text


def _fail(message: str, code: int = 1) -> NoReturn:
    """End with an exit code, even if nothing can be printed because the disk of the log is full."""
    for stream, text in ((sys.stdout, ""), (sys.stderr, f"error: {message}\n")):
        try:
            stream.write(text)
            stream.flush()
        except OSError:  # Python would try again at its end, and exit with another code
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


class _Escaped(io.TextIOBase):
    """Standard output without control characters of others: names of tensors, files, keys."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(printable(text))

    def flush(self) -> None:
        self._stream.flush()
