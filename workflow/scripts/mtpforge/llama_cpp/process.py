"""Child processes that end with their caller and write to a log or into the error message."""

import os
import re
import signal
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mtpforge import progress
from mtpforge.errors import ToolchainError

_STEP = re.compile(
    r"\[ *\d+/ *\d+\] \S+"  # llama-quantize: "[  12/ 441] blk.3.attn_q.weight"
    r"|Writing: +\d+%"  # upstream's converter
    r"|ETA [\d.]+ (hours|minutes).*"  # llama-imatrix
    r"|\[\d+\][\d.]+(?=,$)"  # llama-imatrix: chunks and perplexity, "[90]7.1234,", ten to a line
)
_EXCEPTION = re.compile(r"[A-Za-z_.]*(Error|Exception|Exit|Interrupt)\b")
"""The start of the last line of a Python traceback."""
_INTERVAL = 10.0
"""Seconds between two lines of progress."""


@contextmanager
def running(command: Sequence[str], **options: Any) -> Iterator["subprocess.Popen[Any]"]:
    """Start a child process, with options of Popen, and end it when the block is left.

    Signals are held back while the child starts: one raised in Popen's constructor would leave a
    child that nothing can end.
    """
    pending: list[int] = []
    raising = [
        number for number in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(number))
    ]
    numbers = raising if threading.current_thread() is threading.main_thread() else []
    handlers = {
        number: signal.signal(number, lambda number, _: pending.append(number))
        for number in numbers
    }
    try:
        process = subprocess.Popen(command, **options)
    except BaseException:
        _restore(handlers, pending)
        raise
    with process:
        try:
            _restore(handlers, pending)
            yield process
        except BaseException:
            process.kill()
            raise


def call(
    command: Sequence[str | Path],
    log: Path | None = None,
    environment: Mapping[str, str] | None = None,
    name: str | None = None,
    cwd: Path | None = None,
) -> None:
    """Run a program to its end, and append its output to `log`.

    `environment` is the whole environment of the program, by default ours without LLAMA_ARG_*.
    `name` is the program's name in messages. Raises ToolchainError with the program's reason.
    """
    name = name or Path(command[0]).name
    tail = deque[str](maxlen=8)
    shown = time.monotonic()
    with (
        (log or Path(os.devnull)).open("a", buffering=1, encoding="utf-8") as kept,
        _reading(command, environment, cwd) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            kept.write(line)
            tail.append(line)
            if (step := _STEP.search(line)) and time.monotonic() - shown > _INTERVAL:
                shown = time.monotonic()
                progress.say(f"{name}: {step[0]}")
    _raise_failure(process, name, tail)


def outputs(commands: Iterable[Sequence[str | Path]], cwd: Path) -> list[str]:
    """Run short programs in parallel; returns their output. Raises ToolchainError like `call`."""
    printed = []
    with ExitStack() as stack:
        started = [
            (Path(command[0]).name, stack.enter_context(_reading(command, None, cwd)))
            for command in commands
        ]
        for name, process in started:
            printed.append(process.communicate()[0])
            _raise_failure(process, name, printed[-1].splitlines()[-8:])
    return printed


def knows(program: str | Path, option: str) -> bool:
    """Whether a program's --help has an option; --help may end with any exit code."""
    with _reading([program, "--help"], None, None) as process:
        return option in process.communicate()[0]


def environment() -> dict[str, str]:
    """Our environment without LLAMA_ARG_*, which set defaults of llama.cpp's options."""
    return {key: value for key, value in os.environ.items() if not key.startswith("LLAMA_ARG_")}


def _reason(lines: Iterable[str]) -> str:
    """The most telling of a program's last lines: a traceback's end, an error, or the first."""
    kept = [line.strip() for line in lines if line.strip()]
    errors = [line for line in kept if re.search(r"error|fail|^[\d.]+ E ", line, re.IGNORECASE)]
    exceptions = [line for line in kept if _EXCEPTION.match(line)]
    return next(iter([*exceptions[-1:], *errors, *kept]), "no output")


def _restore(handlers: Mapping[signal.Signals, Any], pending: Iterable[int]) -> None:
    """Put signal handlers back, and raise the signals that arrived in between."""
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for arrived in pending:
        signal.raise_signal(arrived)


def _reading(
    command: Sequence[str | Path], given: Mapping[str, str] | None, cwd: Path | None
) -> AbstractContextManager["subprocess.Popen[str]"]:
    """A child process whose output is read as text."""
    env = environment() if given is None else given
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    words = [str(word) for word in command]
    return running(words, **pipes, text=True, errors="replace", env=env, cwd=cwd)


def _raise_failure(process: "subprocess.Popen[str]", name: str, tail: Iterable[str]) -> None:
    code = process.returncode
    if code:
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise ToolchainError(f"{name} failed with {how}: {_reason(tail)}")
