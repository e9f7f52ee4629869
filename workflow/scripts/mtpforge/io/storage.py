"""Disks that are full, over quota, read-only or failing: what to say, and whether a file fits.

An OSError tells neither what was needed nor what is free, and often not even the file. `naming`
adds all three; `require` asks before the work begins; `by_program` finds out why a program failed.
"""

import errno
import fcntl
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mtpforge import progress, table
from mtpforge.errors import ForgeError, GgufError, StorageError
from mtpforge.run_owner import TAG

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_DENIED = (errno.EACCES, errno.EPERM)
_FAILING = (
    errno.EIO, errno.ENXIO, errno.ENODEV, errno.ESTALE, errno.ETIMEDOUT, errno.EBADMSG,
    getattr(errno, "EUCLEAN", errno.EIO), getattr(errno, "EREMOTEIO", errno.EIO),
)  # fmt: skip

_PLAIN = ("ext2", "ext3", "ext4", "tmpfs", "xfs", "vfat", "exfat")
"""File systems on which a file takes its size; others may compress it. XFS may share blocks."""
_SHARING = ("xfs",)
_NETWORK = (
    "nfs", "lustre", "beegfs", "gpfs", "ceph", "cifs", "smb", "afs", "9p", "fuse", "virtiofs",
    "vboxsf", "panfs", "wekafs", "pvfs2", "orangefs",
)  # fmt: skip
"""Beginnings of the names of file systems that several machines may have mounted."""
_LOCKS_IN_DOUBT = ("fuse.", "9p", "virtiofs", "vboxsf")
"""Those of them of which many lock on one machine only, such as SSHFS and virtual machines."""
_LOCAL_LOCKS = {"nolock", "local_lock=all", "local_lock=flock", "localflock", "nobrl"}
"""Options with which NFS, Lustre and CIFS are mounted."""
_MOUNTS = Path("/proc/self/mountinfo")
_PART = re.compile(rf"\.(.+?)(?:\.{TAG})?(?:\.old)?\.part")
_PROBE = 16 << 20


# ── before writing ──


def require(path: Path, needed: int, shared: int = 0) -> None:
    """Raise StorageError if a file of `needed` bytes does not fit on the disk of `path`.

    `shared` of them may share blocks with files that exist. A file system that may store the file
    in less than its size gives a warning instead.
    """
    free = room(path)
    if free is None or needed <= free:
        return
    kind = file_system(path.parent)
    least = needed - shared if kind in _SHARING else needed
    if least <= free:
        return
    name = final_name(path)
    sizes = f"needs {amount(least)}, {amount(free)} are free"
    if kind in _PLAIN:
        raise StorageError(f"{name}: not enough space on the disk: {sizes}: {_FREE}")
    progress.say(f"warning: {name}: {sizes}: it fits only if the file system compresses it enough")


def shareable(files: Iterable[tuple[Path, int]], path: Path) -> int:
    """How many bytes of these files are on the file system of `path`, and could share blocks."""
    there = existing(path.parent).stat().st_dev
    on_disk = {file: file.stat().st_dev == there for file in {file for file, _ in files}}
    return sum(size for file, size in files if on_disk[file])


def room(path: Path) -> int | None:
    """How large `path` can be: free space plus what it already occupies. None if unknown."""
    about = os.statvfs(existing(path.parent))
    if not about.f_blocks:  # a file system that does not tell
        return None
    blocks = about.f_bavail if os.geteuid() else about.f_bfree
    return blocks * about.f_frsize + _taken(path)


def inside(folder: Path) -> Iterator[Path]:
    """Files and folders under a folder. Raises OSError, where `Path.rglob` would leave some out."""

    def fail(error: OSError) -> None:
        raise error

    for parent, folders, files in os.walk(folder, onerror=fail):
        yield from (Path(parent, name) for name in (*folders, *files))


def file_system(folder: Path) -> str:
    """The type of a folder's file system, such as "ext4"; empty if the system does not tell."""
    return _mount(folder)[0]


def is_network(folder: Path) -> bool:
    """Whether other machines may write to a folder too."""
    return file_system(folder).startswith(_NETWORK)


def locks_alone(folder: Path) -> bool:
    """Whether locks on files there may hold on this machine only, though others write there too."""
    kind, options = _mount(folder)
    return kind.startswith(_LOCKS_IN_DOUBT) or not _LOCAL_LOCKS.isdisjoint(options)


def locks_work(folder: Path) -> bool:
    """Whether files in a folder can be locked for all that write there. Raises OSError."""
    if locks_alone(folder):
        return False
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
    return True


def existing(folder: Path) -> Path:
    """The folder, or the nearest one above it that exists."""
    return next((each for each in (folder, *folder.absolute().parents) if each.is_dir()), folder)


def amount(size: int) -> str:
    """Bytes for people, exact if they are few."""
    return table.size(size) if size >= 10**6 else f"{size:,} bytes"


# ── when it fails ──


@contextmanager
def naming(path: Path, needed: int | None = None) -> Iterator[None]:
    """Raise StorageError for an OSError of the block: about `path`, unless it names another file.

    `needed` is the size that the whole file will have.
    """
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if error.errno is None:  # of a connection
            raise
        raise explain(error, path, needed) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Let an OSError of the block that names no file name `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(path)) from error
        raise


def is_failing(error: OSError) -> bool:
    """Whether the disk or its connection fails, so that a file may be right all the same."""
    return error.errno in _FAILING


@contextmanager
def by_program(path: Path, needed: int, build: bool = False) -> Iterator[None]:
    """Find out if the disk is why a program failed to write `path`, or wrote only a part.

    C++ streams do not tell, so a little is written behind what the program wrote. Raises
    StorageError if that fails too; else the program's error, with the sizes if it is about output.
    A `build` writes many files, and `path` is none of them.
    """
    try:
        yield
    except StorageError:
        raise
    except ForgeError as error:
        raise _cause(error, path, needed, build) from error


def explain(error: OSError, path: Path | None = None, needed: int | None = None) -> StorageError:
    """The error for a user: which file, what is wrong, and if space is, what it needs."""
    if isinstance(error, StorageError):
        return error
    if isinstance(error, shutil.Error):
        error = _first_of(error)
    place = _place(error, path)
    name = final_name(place) if place else "standard output, or another file without a name"
    if path and place and not final_name(place).is_relative_to(final_name(path)):
        needed = None  # it is the need of another file
    found = _of_space(error, place, name=name, needed=needed) or _of_disk(error, name)
    found.errno = error.errno
    return found


def final_name(path: Path) -> Path:
    """The name that a temporary file, or one in a temporary folder, will have."""
    parts = [match[1] if (match := _PART.fullmatch(part)) else part for part in path.parts]
    return Path(*parts)


_FREE = "free some space and run again"


def _of_space(
    error: OSError, place: Path | None, name: object, needed: int | None
) -> StorageError | None:
    if error.errno not in _FULL:
        return None
    sizes = _sizes(place, needed)
    if error.errno == errno.EDQUOT:
        return StorageError(
            f"{name}: over your disk quota{sizes}: free some of your files, or ask for a larger "
            "quota, and run again"
        )
    if error.errno == errno.EFBIG:
        return StorageError(
            f"{name}: larger than its file system or `ulimit -f` allows{sizes}: raise the limit, "
            "or use another disk"
        )
    if place and _without_inodes(place):
        return StorageError(f"{name}: the disk can hold no more files{sizes}: delete some")
    return StorageError(f"{name}: the disk is full{sizes}: {_FREE}")


def _of_disk(error: OSError, name: object) -> StorageError:
    reason = error.strerror or error
    if error.errno in _FAILING:
        return StorageError(
            f"{name}: the disk or its connection fails ({reason}): see the system's log (dmesg), "
            "and run again"
        )
    if error.errno == errno.EROFS:
        return StorageError(
            f"{name}: its file system is read-only: mount it writable, or use another; Linux does "
            "this to a disk with errors (dmesg)"
        )
    if error.errno in _DENIED:
        return StorageError(f"{name}: {reason}: give yourself the right, or use another folder")
    if error.errno == errno.ENAMETOOLONG:
        return StorageError(f"{name}: the name is too long for the file system: use a shorter one")
    return StorageError(f"{name}: {reason}")


def _first_of(error: shutil.Error) -> OSError:
    """The first error of a copied folder, of which shutil keeps only the text."""
    match error.args:
        case ([(source, target, str(why)), *_],):
            numbers = [number for number in errno.errorcode if os.strerror(number) in why]
            return OSError(numbers[0] if numbers else None, why, source, None, target)
    return error


def _mount(folder: Path) -> tuple[str, list[str]]:
    """Type and options of a folder's file system; empty if the system does not tell."""
    device = existing(folder).stat().st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    with suppress(OSError, IndexError):
        for line in _MOUNTS.read_text("utf-8", "replace").splitlines():
            if line.split()[2] == number:
                kind, *_, options = line.partition(" - ")[2].split()
                return kind, options.split(",")
    return "", []


def _place(error: OSError, path: Path | None) -> Path | None:
    """The file that an error is about; of two, such as those of a copy, the one that is written."""
    first, second = error.filename, error.filename2
    for given in (first, second) if error.errno == errno.ENOENT else (second, first):
        if isinstance(given, str | bytes | os.PathLike):
            return Path(os.fsdecode(given))
    return path


def _sizes(place: Path | None, needed: int | None) -> str:
    """What a file needs and can have, as far as that is known; begins with a colon."""
    with suppress(OSError):
        free = room(place) if place else None
        parts = [f"needs {amount(needed)}"] if needed is not None else []
        parts += [f"{amount(free)} are free"] if free is not None else []
        return ": " + ", ".join(parts) if parts else ""
    return ""


def _without_inodes(place: Path) -> bool:
    with suppress(OSError):
        about = os.statvfs(existing(place.parent))
        return bool(about.f_files) and not about.f_favail
    return False


def _taken(path: Path) -> int:
    """Bytes on the disk of a file, or of all files in a folder."""
    with suppress(FileNotFoundError):
        files = inside(path) if path.is_dir() else [path]
        return sum(file.lstat().st_blocks for file in files) * 512
    return 0


def _cause(error: ForgeError, path: Path, needed: int, build: bool) -> ForgeError:
    reason = str(error).replace(path.name, final_name(path).name)
    numbers = [number for number in _FULL if os.strerror(number) in reason]
    failed = OSError(numbers[0], os.strerror(numbers[0])) if numbers else _probe(path, needed)
    if failed:
        found = explain(failed, path, needed)
        return StorageError(f"{found} ({reason})")
    if build:
        return error
    if isinstance(error, GgufError) or re.search(r"iostream|wr[io]t|errno", reason, re.I):
        sizes = _sizes(path, needed)
        return type(error)(f"{final_name(path)}: not written whole{sizes} ({reason})")
    return error


def _probe(path: Path, needed: int) -> OSError | None:
    """Try to write a part of what is missing of a file that will be deleted."""
    before = path.exists()
    try:
        missing = needed - path.stat().st_size if before else needed
        with path.open("ab") as file:
            file.write(bytes(min(max(missing, 1), _PROBE)))
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        return error
    finally:
        if not before:
            path.unlink(missing_ok=True)
    return None
