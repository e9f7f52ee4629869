"""Frees ranges of a file: they read as zeros, and all other bytes, and the size, stay.

Linux can do that on ext4, XFS, Btrfs, tmpfs and NFS 4.2.
"""

import ctypes
import errno
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

from mtpforge.io.ranges import BLOCK

_KEEP_SIZE_AND_PUNCH = 3
_UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV}

Ranges = Iterable[tuple[int, int]]
"""Offset and size of each."""


def are_supported(folder: Path) -> bool:
    """Whether ranges of the files in a folder can be freed. Raises OSError if the disk fails."""
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(bytes(BLOCK))
        file.flush()
        try:
            _punch(file.fileno(), 0, BLOCK)
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                return False
            raise
    return True


def punch(path: Path, ranges: Ranges) -> None:
    """Free the whole blocks within these ranges of a file. Raises OSError."""
    descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW)
    try:
        for offset, size in ranges:
            start = -(-offset // BLOCK) * BLOCK
            end = (offset + size) // BLOCK * BLOCK
            if start < end:
                _punch(descriptor, start, end - start)
    finally:
        os.close(descriptor)


def _punch(descriptor: int, offset: int, size: int) -> None:
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is None:  # another system than Linux
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    while fallocate(descriptor, _KEEP_SIZE_AND_PUNCH, offset, size):
        if (number := ctypes.get_errno()) != errno.EINTR:
            raise OSError(number, os.strerror(number))
