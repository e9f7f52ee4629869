"""Bytes on their way into a file: ranges of other files, or buffers, copied without holding them in memory.

Ranges go through the kernel where it can (`copy_file_range`) and through a bounded buffer elsewhere. File systems that can
share what two files have in common (Btrfs, XFS) do so in that call for whole blocks, if a range goes to the place in a block
that it comes from; then nothing is copied. An I/O error is never taken for "not supported".
"""

import errno
import hashlib
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

CHUNK = 16 << 20
BLOCK = 4096  # bytes that a file system shares or moves as one, or a multiple of that
_UNSUPPORTED = {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP}


@dataclass(frozen=True)
class FileRange:
    """`size` bytes of the file at `path`, from `offset` on."""

    path: Path
    offset: int
    size: int


Payload: TypeAlias = Iterable[FileRange | memoryview]


class Sink:
    """A place in a file at which ranges of others, or buffers, are written; that they go to the disk starts at once.

    Without that, the system lets gigabytes gather in memory, and the final fsync takes as long again as the copying.
    """

    def __init__(
        self, descriptor: int, grown: Callable[[int], None] = lambda size: None, size: int = 0, flush: bool = True
    ) -> None:  # fmt: skip
        """`size` is the position at which the descriptor stands; `grown` gets it after each step.

        Without `flush` no writing to the disk is started.
        """
        self.descriptor, self.size, self._started, self._grown = descriptor, size, size, grown
        self._flush = flush and hasattr(os, "posix_fadvise")

    def append(self, payload: Payload) -> int:
        """Write all of `payload`; the number of bytes written. Raises OSError."""
        before = self.size
        for piece in payload:
            if isinstance(piece, FileRange):
                self._append_range(piece)
            else:
                self._append_buffer(piece)
        return self.size - before

    def _grow(self, count: int) -> None:
        self.size += count
        self._grown(self.size)
        if self.size - self._started >= CHUNK:
            self.flush()

    def flush(self) -> None:
        """Let what has come since the last time be written to the disk."""
        if self._flush:
            # Pages that are still to be written stay in memory; Linux only begins to write them.
            os.posix_fadvise(
                self.descriptor, self._started, self.size - self._started, os.POSIX_FADV_DONTNEED
            )
            self._started = self.size

    def _append_buffer(self, buffer: memoryview) -> None:
        rest = buffer.cast("B")
        while rest:
            written = os.write(self.descriptor, rest[:CHUNK])
            rest = rest[written:]
            self._grow(written)

    def _append_range(self, piece: FileRange) -> None:
        source = os.open(piece.path, os.O_RDONLY)
        try:
            done = self._kernel_copy(source, piece)
            while done < piece.size:
                block = os.pread(source, min(CHUNK, piece.size - done), piece.offset + done)
                if not block:
                    raise OSError(errno.EIO, "file ends before the range does", str(piece.path))
                self._append_buffer(memoryview(block))
                done += len(block)
        finally:
            os.close(source)

    def _kernel_copy(self, source: int, piece: FileRange) -> int:
        """Copy as much as the kernel will; the bytes copied, which is 0 where it does not support the pair of files."""
        if not hasattr(os, "copy_file_range"):
            return 0
        done, limit = 0, CHUNK
        if (piece.offset - self.size) % BLOCK == 0:
            limit = -piece.offset % BLOCK or CHUNK  # from the next block on, it can be shared
        while done < piece.size:
            try:
                step = os.copy_file_range(
                    source, self.descriptor, min(limit, piece.size - done), piece.offset + done
                )
            except OSError as error:
                if error.errno in _UNSUPPORTED and done == 0:
                    return 0
                raise
            if step == 0:
                break
            done += step
            limit = CHUNK
            self._grow(step)
        return done


def forget(piece: FileRange) -> None:
    """Free the memory that holds a range of a file, where the system can, but for what is still to be written to the disk."""
    with suppress(OSError, AttributeError):
        descriptor = os.open(piece.path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, piece.offset, piece.size, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def sha256(piece: FileRange) -> str:
    """The digest of a range of a file, read once and not held."""
    digest, left = hashlib.sha256(), piece.size
    buffer = memoryview(bytearray(min(left, 1 << 20)))  # stays in the processor's cache
    with piece.path.open("rb", buffering=0) as file:
        file.seek(piece.offset)
        while left and (count := file.readinto(buffer[:left])):
            digest.update(buffer[:count])
            left -= count
    return digest.hexdigest()


def digest_of(path: Path) -> str:
    """The sha256 of a whole file."""
    return sha256(FileRange(path, 0, path.stat().st_size))
