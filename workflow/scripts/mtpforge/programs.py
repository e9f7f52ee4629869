"""Calls of the toolchain's programs: their output goes to a log and, as progress, to the terminal; a failure is an error."""

import os
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from .errors import ToolchainError

DEFAULT_BIN = Path("resources/toolchain/bin")


def find(bin_dir: Path, name: str) -> Path:
    """The program's path. Raises ToolchainError where it is missing."""
    path = Path(bin_dir) / name
    if not os.access(path, os.X_OK):
        raise ToolchainError(f"{path}: missing or not executable: `snakemake --cores 1 toolchain` builds it, --bin names another folder")
    return path.resolve()


def call(command: Sequence[str | Path], cwd: Path | None = None) -> None:
    """Run a program to its end, passing its output on to stderr. Raises ToolchainError with its last lines."""
    tail: deque[str] = deque(maxlen=8)
    environment = {**os.environ, "LC_ALL": "C"}
    with subprocess.Popen(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, errors="replace", cwd=cwd, env=environment,
    ) as process:  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            tail.append(line.rstrip())
            sys.stderr.write(line)
    if process.returncode:
        how = f"signal {-process.returncode}" if process.returncode < 0 else f"exit code {process.returncode}"
        said = next((line for line in reversed(tail) if line.strip()), "nothing")
        raise ToolchainError(f"{Path(command[0]).name} failed with {how}; the last it said: {said}")
