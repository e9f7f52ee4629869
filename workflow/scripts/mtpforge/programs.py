"""Calls of the toolchain's programs: all they say goes to a log, where they are goes to the terminal, a failure is an error."""

import os
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from .errors import ToolchainError

DEFAULT_BIN = Path("resources/toolchain/bin")
_STEP = re.compile(r"\[ *\d+/ *\d+\] \S+")  # "[  12/ 441] blk.3.attn_q.weight", as llama-quantize counts
_INTERVAL = 10.0  # seconds between two lines of progress


def find(bin_dir: Path, name: str) -> Path:
    """The program's path. Raises ToolchainError where it is missing."""
    path = Path(bin_dir) / name
    if not os.access(path, os.X_OK):
        raise ToolchainError(f"{path}: missing or not executable: `make toolchain` builds it, --bin names another folder")
    return path.resolve()


def call(command: Sequence[str | Path], log: Path | None = None) -> None:
    """Run a program to its end, its output into `log`. Raises ToolchainError with the reason that it gave."""
    words = [str(word) for word in command]
    name, tail, shown = Path(words[0]).name, deque[str](maxlen=8), time.monotonic()
    with (
        (log or Path(os.devnull)).open("w", encoding="utf-8") as kept,
        subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for line in process.stdout:
                kept.write(line)
                tail.append(line.strip())
                if (step := _STEP.search(line)) and time.monotonic() - shown > _INTERVAL:
                    shown = time.monotonic()
                    print(f"{name}: {step[0]}", file=sys.stderr, flush=True)
        except BaseException:  # whoever ends us must not leave it running
            process.kill()
            raise
    if process.returncode:
        how = f"signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"
        reasons = [line for line in tail if re.search("error|fail", line, re.IGNORECASE)] or [line for line in tail if line]
        raise ToolchainError(f"{name} failed with {how}: {reasons[0] if reasons else 'it said nothing'}")
