"""Files as memory maps, whose truncation ends a program with a message and not with a core dump.

If a mapped file becomes shorter, or its disk fails, reading the map raises SIGBUS. Python cannot
handle that signal: its handlers run after the instruction, which never completes.
"""

import ctypes
import os
import signal
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from mtpforge.errors import CheckpointError, printable

Bytes: TypeAlias = np.memmap[Any, np.dtype[np.uint8]]

_sizes: dict[Path, int] = {}
"""The mapped files, and their sizes when they were mapped."""


def open_map(path: Path) -> Bytes:
    """Map a file for reading. Raises CheckpointError if it is empty.

    From then on the program ends with exit code 1 if a mapped file is truncated while it is read.
    """
    if not _sizes:
        ctypes.CDLL(None).signal(signal.SIGBUS, _handler)
    _sizes[path] = path.stat().st_size
    if not _sizes[path]:
        raise CheckpointError(f"{path}: truncated while it was read")
    return np.memmap(path, dtype=np.uint8, mode="r")


def _end(_: int) -> None:
    """End the program. The fault is in reading a map, so no lock of Python's or C's is held."""
    shorter = [path for path, size in _sizes.items() if _size(path) < size]
    if shorter:
        message = f"{shorter[0]}: truncated while it was read"
    else:
        message = f"{', '.join(map(str, _sizes))}: a disk failed while it was read"
    os.write(2, printable(f"error: {message}"[:2000]).encode(errors="replace") + b"\n")
    os._exit(1)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


_handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(_end)
