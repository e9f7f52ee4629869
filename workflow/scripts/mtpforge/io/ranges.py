"""Copying byte ranges of files, and buffers, into a file without holding them in memory.

The kernel copies ranges if it can (`copy_file_range`). Btrfs and XFS then share whole blocks
instead of copying them, if a range has the same offset within a block in both files. Otherwise a
bounded buffer is used. I/O errors are raised, never taken for "not supported".
"""

import errno
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import TypeAlias

from mtpforge.io import storage

CHUNK = 16 << 20
BLOCK = 4096
"""Bytes of a file system's block, or a multiple of it: the unit in which blocks are shared."""

_UNSUPPORTED = {errno.ENOSYS, errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP}


@dataclass(frozen=True)
class FileRange:
    """`size` bytes of the file at `path`, from `offset` on."""

    path: Path
    offset: int
    size: int


Payload: TypeAlias = Iterable[FileRange | memoryview]


class Sink:
    """Appends ranges of other files, and buffers, to a file, and starts flushing them at once.

    Otherwise gigabytes of unwritten data pile up in memory, and the final fsync takes as long again
    as the copying.
    """

    def __init__(
        self,
        descriptor: int,
        grown: Callable[[int], None] = lambda size: None,
        size: int = 0,
        flush: bool = True,
    ) -> None:
        """`size` is the descriptor's position in the file; `grown` gets it after each step."""
        self.descriptor = descriptor
        self.size = size
        self._grown = grown
        self._flushed = size
        self._flush = flush and hasattr(os, "posix_fadvise")

    def append(self, payload: Payload) -> int:
        """Write all of `payload`; return the number of bytes written. Raises OSError."""
        before = self.size
        for piece in payload:
            if isinstance(piece, FileRange):
                self._append_range(piece)
            else:
                self._append_buffer(piece)
        return self.size - before

    def skip(self, size: int) -> None:
        """Leave the next bytes of the file as they are."""
        self.flush()
        self.size = self._flushed = os.lseek(self.descriptor, size, os.SEEK_CUR)
        self._grown(self.size)

    def flush(self) -> None:
        """Start writing to the disk all data appended since the last call."""
        if self._flush:
            # Linux keeps dirty pages in memory and only starts to write them.
            size = self.size - self._flushed
            os.posix_fadvise(self.descriptor, self._flushed, size, os.POSIX_FADV_DONTNEED)
            self._flushed = self.size

    def _grow(self, count: int) -> None:
        self.size += count
        self._grown(self.size)
        if self.size - self._flushed >= CHUNK:
            self.flush()

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
                with storage.reading(piece.path):
                    block = os.pread(source, min(CHUNK, piece.size - done), piece.offset + done)
                if not block:
                    raise OSError(errno.ENODATA, "ends before the range does", str(piece.path))
                self._append_buffer(memoryview(block))
                done += len(block)
        finally:
            os.close(source)

    def _kernel_copy(self, source: int, piece: FileRange) -> int:
        """Copy as much as the kernel will; return the bytes copied, 0 if it does not support it."""
        if not hasattr(os, "copy_file_range"):
            return 0
        done = 0
        limit = CHUNK
        if (piece.offset - self.size) % BLOCK == 0:
            limit = -piece.offset % BLOCK or CHUNK  # from the next block on, blocks can be shared
        while done < piece.size:
            count = min(limit, piece.size - done)
            try:
                step = os.copy_file_range(source, self.descriptor, count, piece.offset + done)
            except OSError as error:
                if error.errno in _UNSUPPORTED and done == 0:
                    return 0
                with storage.reading(piece.path):  # which of the two files is it?
                    os.pread(source, count, piece.offset + done)
                raise
            if step == 0:
                break
            done += step
            limit = CHUNK
            self._grow(step)
        return done


def forget(piece: FileRange) -> None:
    """Drop a range from the page cache, if the system can; unwritten data stays."""
    with suppress(OSError, AttributeError):
        descriptor = os.open(piece.path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, piece.offset, piece.size, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


class Hash:
    """The sha256 of ranges of files, one after the other, which are not held in memory."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()

    def update(self, piece: FileRange) -> None:
        """Hash the next range. Raises OSError."""
        _update(self._digest, piece)

    def hexdigest(self) -> str:
        """The digest so far, as hex digits."""
        return self._digest.hexdigest()


class PartHashes:
    """The sha256 of parts of a file whose bytes come in order. The parts do not overlap."""

    def __init__(self, parts: Mapping[str, FileRange]) -> None:
        self._digests = {name: hashlib.sha256() for name in parts}
        places = [(each.offset, each.offset + each.size, name) for name, each in parts.items()]
        self._left = deque(sorted(places))
        self._position = 0

    def update(self, block: bytes | memoryview) -> None:
        """Hash the next bytes of the file."""
        start, view = self._position, memoryview(block)
        self._position += len(view)
        while self._left:
            begin, end, name = self._left[0]
            self._digests[name].update(view[max(0, begin - start) : max(0, end - start)])
            if end > self._position:
                break
            self._left.popleft()

    def hexdigests(self) -> dict[str, str]:
        """The digests so far, as hex digits."""
        return {name: digest.hexdigest() for name, digest in self._digests.items()}


def sha256(piece: FileRange) -> str:
    """The sha256 of a range of a file, which is read once and not held in memory."""
    digest = Hash()
    digest.update(piece)
    return digest.hexdigest()


def digest_of(*paths: Path) -> str:
    """The sha256 of a whole file, or of several, one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        _update(digest, FileRange(path, 0, path.stat().st_size))
    return digest.hexdigest()


def sha256_of_parts(path: Path, parts: Iterable[tuple[int, int]]) -> str:
    """The sha256 of many small parts of a file, one after the other: offset and size of each."""
    digest = hashlib.sha256()
    with storage.reading(path), path.open("rb", buffering=0) as file:
        for offset, size in parts:
            file.seek(offset)
            for block in _blocks(file, size):
                digest.update(block)
    return digest.hexdigest()


def hash_parts(path: Path, parts: Mapping[str, FileRange]) -> tuple[str, dict[str, str]]:
    """The sha256 of a whole file, and of parts of it, which is read once. Raises OSError.

    The parts do not overlap.
    """
    whole, found = hashlib.sha256(), PartHashes(parts)
    with storage.reading(path), path.open("rb", buffering=0) as file:
        for block in _blocks(file, path.stat().st_size):
            whole.update(block)
            found.update(block)
    return whole.hexdigest(), found.hexdigests()


def _update(digest: "hashlib._Hash", piece: FileRange) -> None:
    with storage.reading(piece.path), piece.path.open("rb", buffering=0) as file:
        file.seek(piece.offset)
        for block in _blocks(file, piece.size):
            digest.update(block)


def _blocks(file: FileIO, size: int) -> Iterator[memoryview]:
    """The next bytes of a file, in a buffer that the next block overwrites.

    None if the size is negative: the file has shrunk meanwhile.
    """
    size = max(size, 0)
    buffer = memoryview(bytearray(min(size, 1 << 20)))  # fits into the processor's cache
    while size and (count := file.readinto(buffer[:size])):
        yield buffer[:count]
        size -= count
