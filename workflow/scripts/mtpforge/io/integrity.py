"""Checks what a job reads against the digests that were recorded when it was made.

A disk, a cable or memory can flip a bit and leave a file's size and time alone. So the ranges that
a job reads are hashed in a thread beside it, from the same page cache, and compared before its
result gets a name. A job of one thread hashes them itself, just before it reads them.
"""

from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from threading import Event, Thread

from mtpforge import processors
from mtpforge.errors import DamagedError, StorageError
from mtpforge.io.ranges import CHUNK, FileRange, Hash, sha256_of_parts

HEADER = "header"
"""Name of everything before the tensors of a file."""
WHOLE = "file"
"""Name of a whole file."""
AGAIN = "delete it and run again"


@dataclass(frozen=True)
class Part:
    """A part of a file: its name, its bytes, the recorded sha256, and how to get it again.

    Without a sha256 there is nothing to compare with: the part is read for the first time. If only
    `kept` of its bytes are left (offset and size of each range), the sha256 is theirs.
    """

    name: str
    place: FileRange
    sha256: str | None
    advice: str = AGAIN
    kept: tuple[tuple[int, int], ...] | None = None


class Reading:
    """The parts of files that a job reads; `check` says whether they are as they were recorded."""

    def __init__(self, threads: int = 1) -> None:
        self._stopped = Event()
        self._waiting: SimpleQueue[tuple[Part, Future[str]] | None] = SimpleQueue()
        self._hashed: list[tuple[Part, Future[str]]] = []
        count = threads if processors.allotted() > 1 else 0
        # Daemons, because they must not keep a program alive.
        self._threads = [Thread(target=self._hash, daemon=True) for _ in range(count)]

    def add(self, parts: Iterable[Part]) -> None:
        """Hash these parts too, in this order."""
        for part in parts:
            self._hashed.append((part, Future()))
            if self._threads:
                self._waiting.put(self._hashed[-1])
            else:
                self._finish(*self._hashed[-1])
        for thread in self._threads:
            if self._hashed and not thread.ident:
                thread.start()

    def check(self) -> list[tuple[Part, str]]:
        """Wait until everything is hashed; each part with the sha256 of what was read.

        Raises DamagedError for the first part that differs.
        """
        return [(part, _compared(part, hashed)) for part, hashed in self._hashed]

    def stop(self) -> None:
        """End the threads, without waiting for parts that are not hashed yet."""
        self._stopped.set()
        for _ in self._threads:
            self._waiting.put(None)

    def _hash(self) -> None:
        while (waiting := self._waiting.get()) and not self._stopped.is_set():
            self._finish(*waiting)

    def _finish(self, part: Part, hashed: "Future[str]") -> None:
        try:
            hashed.set_result(self._digest(part))
        except OSError as error:
            hashed.set_exception(error)

    def _digest(self, part: Part) -> str:
        place = part.place
        if part.kept is not None:
            return sha256_of_parts(place.path, part.kept)
        digest = Hash()
        end = place.offset + place.size
        for offset in range(place.offset, end, CHUNK):
            if self._stopped.is_set():
                break
            digest.update(FileRange(place.path, offset, min(CHUNK, end - offset)))
        return digest.hexdigest()


@contextmanager
def reading(parts: Iterable[Part], threads: int = 1) -> Iterator[Reading]:
    """Hash parts of files while the block reads them, and compare them at its end.

    Raises DamagedError, also in place of an error of the block, because damage can cause any.
    """
    hashing = Reading(threads)
    try:
        hashing.add(parts)
        try:
            yield hashing
        except StorageError:  # a full disk need not wait for the hashes
            raise
        except OSError:  # a full disk, not damage
            raise
        except Exception:
            hashing.check()
            raise
        hashing.check()
    finally:
        hashing.stop()


def check(parts: Iterable[Part], threads: int = 1) -> list[tuple[Part, str]]:
    """Hash parts of files now, and return them as `Reading.check`. Raises DamagedError."""
    with reading(parts, threads) as hashing:
        return hashing.check()


def whole(path: Path, sha256: str | None, advice: str = AGAIN) -> Part:
    """A whole file as a part. Raises OSError."""
    return Part(WHOLE, FileRange(path, 0, path.stat().st_size), sha256, advice)


def _compared(part: Part, hashed: "Future[str]") -> str:
    try:
        digest = hashed.result()
    except OSError as error:
        raise _damaged(part, f"cannot be read ({error.strerror})") from None
    if part.sha256 is not None and digest != part.sha256:
        raise _damaged(part, "has changed since its digest was recorded")
    return digest


def _damaged(part: Part, problem: str) -> DamagedError:
    place = part.place
    inside = f"{part.name} (bytes {place.offset:,} to {place.offset + place.size:,}) "
    where = "" if part.name == WHOLE else inside
    return DamagedError(f"{place.path}: damaged: {where}{problem}: {part.advice}")
