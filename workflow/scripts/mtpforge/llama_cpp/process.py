"""Child processes: they end with their caller, and their output goes to a log or into the error message."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

from mtpforge.errors import ToolchainError

# "[  12/ 441] blk.3.attn_q.weight", as llama-quantize counts; "Writing:  45%", as upstream's converter does; "ETA 4 hours 12.30
# minutes" and "[90]7.1234,", chunks and the perplexity so far, as llama-imatrix does, ten to a line
_STEP = re.compile(
    r"\[ *\d+/ *\d+\] \S+|Writing: +\d+%|ETA [\d.]+ (hours|minutes).*|\[\d+\][\d.]+(?=,$)"
)
_EXCEPTION = re.compile(
    r"[A-Za-z_.]*(Error|Exception|Exit|Interrupt)\b"
)  # how the last line of a Python traceback begins
_INTERVAL = 10.0  # seconds between two lines of progress


@contextmanager
def running(command: Sequence[str], **options: Any) -> Iterator["subprocess.Popen[Any]"]:
    """A child process, with the options of Popen, that has ended when the block is left, however that happens.

    A termination waits while the child is started: raised in Popen's constructor, it would leave a child that nobody knows of.
    """
    came: list[int] = []
    raising = [
        number for number in (signal.SIGINT, signal.SIGTERM) if callable(signal.getsignal(number))
    ]
    numbers = raising if threading.current_thread() is threading.main_thread() else []
    handlers = {
        number: signal.signal(number, lambda number, _: came.append(number)) for number in numbers
    }
    try:
        process = subprocess.Popen(command, **options)
    except BaseException:
        _restore(handlers, came)
        raise
    with process:
        try:
            _restore(handlers, came)
            yield process
        except BaseException:
            process.kill()
            raise


def _restore(handlers: Mapping[signal.Signals, Any], came: Iterable[int]) -> None:
    """Put the handlers of signals back, and give them those that came meanwhile."""
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for caught in came:
        signal.raise_signal(caught)


def call(
    command: Sequence[str | Path],
    log: Path | None = None,
    environment: Mapping[str, str] | None = None,
    name: str | None = None,
    cwd: Path | None = None,
) -> None:
    """Run a program to its end, its output appended to `log`.

    `environment` is all that the program gets of one; None passes on our own, without defaults for llama.cpp's options, which
    would change what it makes. `name` is what messages call it. Raises ToolchainError with the reason that it gave.
    """
    name, tail, shown = name or Path(command[0]).name, deque[str](maxlen=8), time.monotonic()
    with (
        (log or Path(os.devnull)).open("a", buffering=1, encoding="utf-8") as kept,
        _heard(command, environment, cwd) as process,
    ):
        assert process.stdout is not None
        for line in process.stdout:
            kept.write(line)
            tail.append(line)
            if (step := _STEP.search(line)) and time.monotonic() - shown > _INTERVAL:
                shown = time.monotonic()
                print(f"{name}: {step[0]}", file=sys.stderr, flush=True)
    _check(process, name, tail)


def outputs(commands: Iterable[Sequence[str | Path]], cwd: Path) -> list[str]:
    """What programs say that run for moments only, side by side. Raises ToolchainError like `call`."""
    said = []
    with ExitStack() as stack:
        started = [
            (Path(command[0]).name, stack.enter_context(_heard(command, None, cwd)))
            for command in commands
        ]
        for name, process in started:
            said.append(process.communicate()[0])
            _check(process, name, said[-1].splitlines()[-8:])
    return said


def knows(program: str | Path, option: str) -> bool:
    """Whether a program's help has an option; it can come with any exit code."""
    with _heard([program, "--help"], None, None) as process:
        return option in process.communicate()[0]


def environment() -> dict[str, str]:
    """Our environment without LLAMA_ARG_*, which would change what llama.cpp's programs make."""
    return {key: value for key, value in os.environ.items() if not key.startswith("LLAMA_ARG_")}


def _heard(
    command: Sequence[str | Path], given: Mapping[str, str] | None, cwd: Path | None
) -> AbstractContextManager["subprocess.Popen[str]"]:
    """A child whose output can be read as text."""
    env = environment() if given is None else given
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return running(
        [str(word) for word in command], **pipes, text=True, errors="replace", env=env, cwd=cwd
    )


def _check(process: "subprocess.Popen[str]", name: str, tail: Iterable[str]) -> None:
    """Raise ToolchainError where a child that has ended did so with an error."""
    if process.returncode:
        how = (
            f"signal {-process.returncode}"
            if process.returncode < 0
            else f"exit code {process.returncode}"
        )
        raise ToolchainError(f"{name} failed with {how}: {_reason(tail)}")


def _reason(tail: Iterable[str]) -> str:
    """The most telling of a program's last lines."""
    lines = [line.strip() for line in tail if line.strip()]
    errors = [line for line in lines if re.search(r"error|fail|^[\d.]+ E ", line, re.IGNORECASE)]
    exceptions = [line for line in lines if _EXCEPTION.match(line)]
    return next(iter([*exceptions[-1:], *errors, *lines]), "it said nothing")
