"""Bytes on their way into a file: ranges of other files, or buffers, copied without holding them in memory.

Ranges go through the kernel where it can (`copy_file_range`, which shares extents on file systems that know how) and
through a bounded buffer elsewhere. An I/O error is never taken for "not supported".
"""

import errno
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

CHUNK = 16 << 20
_UNSUPPORTED = {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP}


@dataclass(frozen=True)
class FileRange:
    """`size` bytes of the file at `path`, from `offset` on."""

    path: Path
    offset: int
    size: int


Payload: TypeAlias = Iterable[FileRange | memoryview]


def append(descriptor: int, payload: Payload) -> int:
    """Write all of `payload` at the descriptor's position; the number of bytes written. Raises OSError."""
    written = 0
    for piece in payload:
        written += _append_range(descriptor, piece) if isinstance(piece, FileRange) else _append_buffer(descriptor, piece)
    return written


def _append_buffer(descriptor: int, buffer: memoryview) -> int:
    buffer = buffer.cast("B")
    for start in range(0, len(buffer), CHUNK):
        rest = buffer[start : start + CHUNK]
        while rest:
            rest = rest[os.write(descriptor, rest) :]
    return len(buffer)


def _append_range(descriptor: int, piece: FileRange) -> int:
    source = os.open(piece.path, os.O_RDONLY)
    try:
        done = _kernel_copy(source, descriptor, piece)
        while done < piece.size:
            block = os.pread(source, min(CHUNK, piece.size - done), piece.offset + done)
            if not block:
                raise OSError(errno.EIO, "file ends before the range does", str(piece.path))
            done += _append_buffer(descriptor, memoryview(block))
    finally:
        os.close(source)
    return piece.size


def _kernel_copy(source: int, descriptor: int, piece: FileRange) -> int:
    """Copy as much as the kernel will; the bytes copied, which is 0 where it does not support the pair of files."""
    if not hasattr(os, "copy_file_range"):
        return 0
    done = 0
    while done < piece.size:
        try:
            step = os.copy_file_range(source, descriptor, piece.size - done, piece.offset + done)
        except OSError as error:
            if error.errno in _UNSUPPORTED and done == 0:
                return 0
            raise
        if step == 0:
            break
        done += step
    return done


def sha256(piece: FileRange) -> str:
    """The digest of a range of a file, read once and not held."""
    digest = hashlib.sha256()
    with piece.path.open("rb") as file:
        file.seek(piece.offset)
        left = piece.size
        while left and (block := file.read(min(left, CHUNK))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()
