"""A head put into the base's own file: its data is moved up within the file system, not copied (`fallocate(INSERT_RANGE)`).

A journal beside the file says what was there and what is to become of it, so that a run that was killed can be finished or taken
back. In order: the journal, the head behind the old end, room at the beginning, the new header, the journal away.
"""

import ctypes
import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from . import atomic, gguf_file
from .errors import ForgeError, GgufError
from .gguf_file import Gguf, TensorInfo, Value, aligned
from .ranges import BLOCK, FileRange, Payload, Sink, sha256

_INSERT_RANGE = 0x20  # FALLOC_FL_INSERT_RANGE of linux/falloc.h
_UNSUPPORTED = {errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # EINVAL: the file system's blocks are larger than ours


def insert(
    base: Gguf, metadata: Mapping[str, Value], head: Sequence[tuple[TensorInfo, Payload]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> bool:  # fmt: skip
    """Append the tensors of `head` to the base's own file, under `metadata`; False where the file system cannot.

    `metadata` must make the header larger by whole blocks. `progress` gets bytes of the head written, and in all. Raises GgufError,
    OSError; the file is then as it was, or `repair` makes it whole.
    """
    header = gguf_file.header(metadata, [*base.tensors.values(), *(info for info, _ in head)])
    start, end = (pick(piece.offset + at * piece.size for piece in base.ranges.values()) for pick, at in ((min, 0), (max, 1)))
    size, shift = base.path.stat().st_size, len(header) - start
    if size not in (end, aligned(end)) or shift % BLOCK:
        return False
    tail, journal = sum(aligned(info.size) for info, _ in head), _journal(base.path)
    with _held(base.path) as descriptor:
        with atomic.replacing(journal) as temporary:
            shifted = aligned(end) + tail + shift
            plan = {"inode": os.fstat(descriptor).st_ino, "size": size, "shifted": shifted, "edges": _edges(base)}
            temporary.write_bytes(json.dumps(plan).encode() + b"\n" + header)
        moved = False
        try:
            os.lseek(descriptor, 0, os.SEEK_END)
            sink = Sink(descriptor, lambda written: progress(written, tail))
            sink.append([memoryview(bytes(aligned(end) - size))])
            for info, payload in head:
                gguf_file.append_run(sink, [info], payload)
            os.fsync(descriptor)
            moved = _make_room(descriptor, shift)
        finally:
            if not moved and os.fstat(descriptor).st_size != shifted:
                os.ftruncate(descriptor, size)
                journal.unlink()
        if moved:
            _write_header(descriptor, header)
            journal.unlink()
    return moved


def repair(path: Path) -> None:
    """Finish, or take back, what an interrupted run has left. Raises GgufError where a power cut has torn the file.

    Raises ForgeError for a link, behind which another file would change.
    """
    journal = _journal(path)
    if path.is_symlink():
        raise ForgeError(f"{path}: is a link: name the file itself")
    if not journal.exists():
        return
    text, _, header = journal.read_bytes().partition(b"\n")
    plan = json.loads(text)
    with _held(path) as descriptor:
        found = os.fstat(descriptor)
        if found.st_ino != plan["inode"] or not plan["size"] <= found.st_size <= plan["shifted"]:
            raise GgufError(f"{path}: is not the file that an interrupted run has left: if it is a new one, delete {journal}")
        if found.st_size == plan["shifted"]:
            _write_header(descriptor, header)
        else:
            os.ftruncate(descriptor, plan["size"])  # nothing before its old end has been touched
        if not plan["edges"].items() <= _edges(gguf_file.read(path)).items():
            raise GgufError(f"{path}: was torn while a head was put into it: get it again from where it came, and delete {journal}")
        journal.unlink()


def refuse_unfinished(path: Path) -> None:
    """Raise GgufError where an in-place run on this file was interrupted."""
    if _journal(path).exists():
        raise GgufError(f"{path}: a run that was putting a head into it was interrupted: run inject.py --in-place on it again")


def _journal(path: Path) -> Path:
    return path.with_name(f".{path.name}.journal")


@contextmanager
def _held(path: Path) -> Iterator[int]:
    """The file open for writing, and locked. Raises ForgeError where it has other names, under which it must not change."""
    if path.stat().st_nlink != 1:
        raise ForgeError(f"{path}: has other names (hard links), which would change with it: write to a new file instead (--out)")
    descriptor = os.open(path, os.O_RDWR)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ForgeError(f"{path}: another process is changing it: wait for that one, or end it") from None
        yield descriptor
    finally:
        os.close(descriptor)


def _edges(opened: Gguf) -> dict[str, str]:
    """Of each tensor, the sha256 of where it begins and where it ends: its bytes are moved, never written, and so this tells."""
    edges = {}
    for name, piece in opened.ranges.items():
        size = min(BLOCK, piece.size)
        ends = (FileRange(piece.path, offset, size) for offset in (piece.offset, piece.offset + piece.size - size))
        edges[name] = " ".join(map(sha256, ends))
    return edges


def _make_room(descriptor: int, count: int) -> bool:
    """Move all that is in the file up by `count` bytes; False where the file system has no such operation. Raises OSError."""
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate", None)
    if fallocate is None:  # not Linux
        return False
    if fallocate(descriptor, _INSERT_RANGE, ctypes.c_longlong(0), ctypes.c_longlong(count)) == 0:
        return True
    if (code := ctypes.get_errno()) in _UNSUPPORTED:
        return False
    raise OSError(code, os.strerror(code))


def _write_header(descriptor: int, header: bytes) -> None:
    rest, position = memoryview(header), 0
    while rest:
        written = os.pwrite(descriptor, rest, position)
        rest, position = rest[written:], position + written
    os.fsync(descriptor)
