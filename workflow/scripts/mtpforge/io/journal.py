"""Journals: what a killed run has written of a file, for the next run to go on from there.

While a file, or a folder of files, is written under its temporary name, a journal beside it lists
the parts that are on the disk, with the sha256 of their bytes. Its first line says what these bytes
depend on. A part is only kept if that has not changed, and if its bytes still have this sha256.
"""

import json
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

STEP = 1 << 30
"""Bytes written between two entries: what a kill can cost."""
_ENDING = ".journal.part"
_PART = ".part"


class Journal:
    """The journal of the file or folder `target`, which depends on `origin`, a JSON object.

    `origin` has at least `code`, the digest of the program, and `inputs` (see `inputs`). There is
    no journal on file systems without locks, where a temporary name has one writer.
    """

    def __init__(self, target: Path, origin: Mapping[str, Any]) -> None:
        target = target.resolve()
        self._temporary = target.with_name(f".{target.name}{_PART}")
        self._path = beside(self._temporary)
        self._origin = dict(origin)
        self._active: bool | None = None
        self._waiting: dict[str, str] = {}
        self._size = 0
        self.digests: dict[str, str] = {}
        """The sha256 of each part that is there."""
        self.step = STEP
        """Bytes written between two entries."""
        self.spare = 0
        """Bytes that `listed` frees meanwhile, so the disk need not have them."""
        self.listed: Callable[[Collection[str]], None] | None = None
        """What is called with parts that a kill does not lose any more."""
        self.settled: Callable[[], Collection[str]] = tuple
        """Parts from which everything has been made, so their bytes may have been freed."""

    @property
    def temporary(self) -> Path:
        """The file or folder whose parts it lists."""
        return self._temporary

    @property
    def is_kept(self) -> bool:
        """Whether there is a journal, once it is started."""
        return bool(self._active)

    def depends_on(self, **origin: Any) -> None:
        """Add to the origin, before `start`."""
        self._origin |= origin

    def start(self, temporary: Path) -> bool:
        """Load what an earlier run left, once `temporary` is locked; False if nothing."""
        if self._active is None:
            self._active = temporary.resolve() == self._temporary
            if self._active and temporary.is_file() and not temporary.stat().st_size:
                self.remove()  # it is a new file: the old one has got its name, or is gone
            self.digests = self._read() if self._active else {}
        return bool(self.digests)

    def add(self, digests: Mapping[str, str], size: int, are_last: bool = False) -> None:
        """Note parts of `size` bytes that have been flushed to the disk.

        They are listed once they, and those added before, make a step; the last ones of a file if
        there is a `listed`.
        """
        self.digests |= digests
        self._waiting |= digests
        self._size += size
        is_due = self._size >= self.step or (are_last and self.listed is not None)
        if self._active and is_due:
            self._append(json.dumps(entry) for entry in self._waiting.items())
            listed, self._waiting, self._size = self._waiting, {}, 0
            self.tell(listed)

    def tell(self, names: Collection[str]) -> None:
        """Call `listed`, if there is one, with parts that the journal lists."""
        if self.listed and names:
            self.listed(names)

    def forget(self, names: Iterable[str]) -> None:
        """Take back parts whose bytes have changed."""
        self.digests = {name: self.digests[name] for name in self.digests.keys() - set(names)}

    def keeps(self, error: BaseException) -> bool:
        """Whether the temporary file should stay after an error.

        Only if the program was ended, or what the file was made from is freed.
        """
        failed = isinstance(error, Exception) and self.listed is None
        if failed or not (self._active and self._path.exists()):
            with suppress(OSError):  # the disk may be what fails
                self.remove()
            return False
        return True

    def remove(self) -> None:
        """Delete the journal: the file is finished, or will be started anew."""
        if self._active:
            self._path.unlink(missing_ok=True)

    def _append(self, lines: Iterable[str]) -> None:
        is_new = not self._path.exists()
        with self._path.open("a", encoding="utf-8") as file:
            first = [json.dumps(self._origin, sort_keys=True)] if is_new else []
            file.writelines(f"{line}\n" for line in (*first, *lines))
            file.flush()
            os.fsync(file.fileno())

    def _read(self) -> dict[str, str]:
        """The entries of an earlier run of the same origin. Removes another journal."""
        lines = _lines(self._path)
        if not lines or lines[0] != json.dumps(self._origin, sort_keys=True):
            self.remove()
            return {}
        entries = {}
        for line in lines[1:]:
            match _parsed(line):
                case [str() as name, str() as digest]:
                    entries[name] = digest
        os.truncate(self._path, sum(len(line.encode()) + 1 for line in lines))  # a torn last line
        return entries


def inputs(folders: Iterable[Path], without: Collection[Path] = ()) -> dict[str, list[int]]:
    """Size and times of the files in these folders: other ones mean another file.

    The time of the last change of status is among them, because no program can set it back.
    Temporary files are none, such as a download that was interrupted. Files `without` are left out
    too: others stand for them.
    """
    found = [path for folder in folders if folder.is_dir() for path in folder.absolute().iterdir()]
    left_out = {path.absolute() for path in without}
    return {
        str(path): _about(path)
        for path in sorted({*found} - left_out)
        if path.is_file() and not (path.name.startswith(".") and path.suffix == _PART)
    }


def beside(temporary: Path) -> Path:
    """The journal of a temporary file or folder."""
    return temporary.with_name(temporary.name.removesuffix(_PART) + _ENDING)


def written_by(path: Path) -> Path:
    """The temporary file of a journal; any other path as it is."""
    is_journal = path.name.endswith(_ENDING)
    return path.with_name(path.name.removesuffix(_ENDING) + _PART) if is_journal else path


def can_go_on(path: Path, codes: Collection[str]) -> bool:
    """Whether the next run can use a temporary file, or this journal of one.

    That is so if its program is one of `codes`, and its inputs are as they were.
    """
    temporary = written_by(path)
    origin = _parsed("".join(_lines(beside(temporary))[:1]))
    known = origin.get("inputs") if isinstance(origin, dict) else None
    if not isinstance(known, dict) or str(origin.get("code")) not in codes:
        return False
    with suppress(OSError, ValueError):  # gone, or not the name of a file
        return temporary.exists() and all(
            _about(Path(name)) == about for name, about in known.items()
        )
    return False


def _lines(path: Path) -> list[str]:
    """The whole lines of a file; none if it cannot be read."""
    with suppress(OSError, ValueError):
        return path.read_text(encoding="utf-8").split("\n")[:-1]
    return []


def _parsed(line: str) -> Any:
    with suppress(ValueError, RecursionError):
        return json.loads(line)
    return None


def _about(path: Path) -> list[int]:
    about = path.stat()
    return [about.st_size, about.st_mtime_ns, about.st_ctime_ns]
