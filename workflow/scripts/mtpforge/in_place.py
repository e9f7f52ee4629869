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

from mtpforge.errors import ForgeError, GgufError
from mtpforge.gguf import reader, writer
from mtpforge.gguf.reader import Gguf, TensorInfo, Value, aligned
from mtpforge.io import atomic
from mtpforge.io.ranges import BLOCK, FileRange, Payload, Sink, sha256

_INSERT_RANGE = 0x20  # FALLOC_FL_INSERT_RANGE of linux/falloc.h
_UNSUPPORTED = {
    errno.ENOSYS,
    errno.EOPNOTSUPP,
    errno.EINVAL,
}  # EINVAL: the file system's blocks are larger than ours


@contextmanager
def held(path: Path, change: bool) -> Iterator[int]:
    """The base open and locked, so that nobody changes it in place; with `change` for writing, whole, and by nobody else.

    Raises GgufError where an interrupted run has left it torn or, without `change`, unfinished; ForgeError where another process
    has it, and for what must not be changed: a link.
    """
    if change and path.is_symlink():
        raise ForgeError(f"{path}: is a link: name the file itself")
    if not path.is_file():
        raise GgufError(f"{path}: no such file")
    descriptor = os.open(path, os.O_RDWR if change else os.O_RDONLY)
    try:
        # Locked, and not one that somebody has just replaced.
        if not _lock(descriptor, change) or not os.path.samestat(os.fstat(descriptor), path.stat()):
            raise ForgeError(f"{path}: another process is using it: wait for that one, or end it")
        if _journal(path).exists():
            if not change:
                raise GgufError(
                    f"{path}: a run that was putting a head into it was interrupted: run inject.py --in-place on it again"
                )
            _repair(path, descriptor)
        yield descriptor
    finally:
        os.close(descriptor)


def insert(
    base: Gguf, descriptor: int, metadata: Mapping[str, Value], head: Sequence[tuple[TensorInfo, Payload]],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> bool:  # fmt: skip
    """Append the tensors of `head` to the base's own file, held by `descriptor`, under `metadata`; False where that cannot be.

    `metadata` must make the header larger by whole blocks. `progress` gets bytes of the head written, and in all. Raises ForgeError
    for a file with other names, OSError; the file is then as it was, or the next `held` repairs it.
    """
    if os.fstat(descriptor).st_nlink != 1:
        raise ForgeError(
            f"{base.path}: has other names (hard links), which would change with it: write to a new file instead (--out)"
        )
    if not base.ranges:
        return False
    header = writer.header(metadata, [*base.tensors.values(), *(info for info, _ in head)])
    start, end = (
        pick(piece.offset + at * piece.size for piece in base.ranges.values())
        for pick, at in ((min, 0), (max, 1))
    )
    size, shift = os.fstat(descriptor).st_size, len(header) - start
    if size not in (end, aligned(end)) or shift <= 0 or shift % BLOCK:
        return False
    tail, journal = sum(aligned(info.size) for info, _ in head), _journal(base.path)
    plan = {
        "size": size,
        "shifted": aligned(end) + tail + shift,
        "start": start,
        "header": sha256(FileRange(base.path, 0, start)),
        "edges": _edges(base),
    }
    with atomic.replacing(journal) as temporary:
        temporary.write_bytes(json.dumps(plan).encode() + b"\n" + header)
    moved = False
    try:
        os.lseek(descriptor, 0, os.SEEK_END)
        sink = Sink(descriptor, lambda written: progress(written - size, tail), size)
        sink.append([memoryview(bytes(aligned(end) - size))])
        for info, payload in head:
            writer.append_run(sink, [info], payload)
        os.fsync(descriptor)
        moved = _make_room(descriptor, shift)
    finally:
        if not moved and os.fstat(descriptor).st_size != plan["shifted"]:
            os.ftruncate(descriptor, size)
            journal.unlink()
    if moved:
        _write_header(descriptor, header)
        journal.unlink()
    return moved


def _repair(path: Path, descriptor: int) -> None:
    """Finish, or take back, what an interrupted run has left; what is there is recognized before anything is written.

    Raises GgufError where a power cut has torn the file, or another has come in its place.
    """
    journal = _journal(path)
    try:
        text, _, header = journal.read_bytes().partition(b"\n")
        plan = json.loads(text)
        size, shifted, start, digest, edges = (
            plan[key] for key in ("size", "shifted", "start", "header", "edges")
        )
        there = os.fstat(descriptor).st_size
        if (
            size <= there <= shifted
            and sha256(FileRange(path, 0, start)) == digest
            and _edges(reader.read(path)) == edges
        ):
            os.ftruncate(descriptor, size)  # nothing has been moved
        elif (
            there == shifted and edges.items() <= _edges(reader.parse(path, header, there)).items()
        ):
            _write_header(descriptor, header)
        else:
            raise GgufError("neither as it was nor as it would have been")
    except (GgufError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise GgufError(
            f"{path}: a run that was putting a head into it was interrupted, and it cannot be repaired ({error}): "
            f"get it again from where it came, and delete {journal}"
        ) from None
    journal.unlink()


def _lock(descriptor: int, alone: bool) -> bool:
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_EX if alone else fcntl.LOCK_SH) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def _journal(path: Path) -> Path:
    return path.with_name(f".{path.name}.journal")


def _edges(opened: Gguf) -> dict[str, str]:
    """Of each tensor, the sha256 of where it begins and where it ends: its bytes are moved, never written, and so this tells."""
    edges = {}
    for name, piece in opened.ranges.items():
        size = min(BLOCK, piece.size)
        ends = (
            FileRange(piece.path, offset, size)
            for offset in (piece.offset, piece.offset + piece.size - size)
        )
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
