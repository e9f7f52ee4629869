"""Where llama.cpp's programs are, and how many threads they get."""

import os
from pathlib import Path

from mtpforge.errors import ToolchainError

DEFAULT_BIN = Path("resources/toolchain/bin")


def find(bin_dir: Path, name: str) -> Path:
    """The program's path. Raises ToolchainError where it is missing."""
    path = Path(bin_dir) / name
    if not os.access(path, os.X_OK):
        raise ToolchainError(f"{path}: missing or not executable: `make toolchain` builds it, --bin names another folder")
    return path.resolve()


def threads(asked: int) -> int:
    """How many threads a program gets: no more than there are processors, and 0 stands for all of them."""
    processors = os.cpu_count() or 1
    return min(asked or processors, processors)
