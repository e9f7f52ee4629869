"""Bytes on their way into a file: ranges of other files, or buffers, copied without holding them in memory.

Ranges go through the kernel where it can (`copy_file_range`) and through a bounded buffer elsewhere. File systems that can
share what two files have in common (Btrfs, XFS) do so in that call for whole blocks, if a range goes to the place in a block
that it comes from; then nothing is copied. An I/O error is never taken for "not supported".
"""

import errno
import hashlib
import os
from collections.abc import Callable, Iterable
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
    """A file that grows at its end, by ranges of others or by buffers; its writing to the disk starts at once.

    Without that, the system lets gigabytes gather in memory, and the final fsync takes as long again as the copying.
    """

    def __init__(
        self, descriptor: int, grown: Callable[[int], None] = lambda size: None, size: int = 0, flush: bool = True
    ) -> None:  # fmt: skip
        """`size` is that of the file, at whose end the descriptor stands; `grown` gets it after each step.

        Without `flush` no writing to the disk is started.
        """
        self.descriptor, self.size, self._started, self._grown = descriptor, size, size, grown
        self._flush = flush and hasattr(os, "posix_fadvise")

    def append(self, payload: Payload) -> int:
        """Write all of `payload` at the end; the number of bytes written. Raises OSError."""
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
        if self._flush and self.size - self._started >= CHUNK:
            # Pages that are still to be written stay in memory; Linux only begins to write them.
            os.posix_fadvise(self.descriptor, self._started, self.size - self._started, os.POSIX_FADV_DONTNEED)
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
                step = os.copy_file_range(source, self.descriptor, min(limit, piece.size - done), piece.offset + done)
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
