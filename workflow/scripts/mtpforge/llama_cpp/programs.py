"""Calls of llama.cpp's programs.

Functions pass one `LlamaCpp` along: the folder of programs, their threads and their log. `server`
starts llama-server with it, so that an edit of the server's protocol does not redo quantization.
"""

import argparse
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from mtpforge import cli, processors
from mtpforge.errors import ToolchainError
from mtpforge.io.ranges import digest_of
from mtpforge.io.text import member, read_json
from mtpforge.llama_cpp import process
from mtpforge.llama_cpp.installed import libraries, stamp_of
from mtpforge.llama_cpp.version import Version, version_of

DEFAULT_FOLDER = Path("resources/toolchain/bin")
BUFFER = ("--max-buffer-size", "256")
"""MiB of a tensor that llama-quantize works on at a time.

The output is the same, but large tensors do not take gigabytes of memory: on a virtual machine,
getting that much can take longer than quantizing."""

Argument = str | int | Path


@dataclass(frozen=True)
class LlamaCpp:
    """A folder of llama.cpp's programs, their threads (0: all processors), and a log to extend."""

    folder: Path = DEFAULT_FOLDER
    threads: int = 0
    log: Path | None = None
    quiet: bool = False
    """Whether llama-perplexity shows no progress: of one run in many, it says little."""

    @property
    def processors(self) -> int:
        """The number of threads that programs really use: never more than there are processors."""
        most = processors.available()
        return min(self.threads or most, most)

    def find(self, name: str) -> Path:
        """The path of a program.

        Raises ToolchainError if it is missing, or not the one of the toolchain's stamp.
        """
        path = self.folder / name
        if not os.access(path, os.X_OK):
            raise ToolchainError(
                f"{path}: missing or not executable: build it with `make toolchain`, or name "
                "another folder with --bin"
            )
        _check_stamp(path, stamp_of(self.folder, name))
        return path.resolve()

    def quantize(self, arguments: Iterable[Argument], cwd: Path) -> None:
        """Run llama-quantize in `cwd`. Raises ToolchainError."""
        program = self.find("llama-quantize")
        buffer = BUFFER if process.knows(program, BUFFER[0]) else ()  # b10605 lacks the option
        threads = (self.threads,) if self.threads else ()
        self._call([program, *buffer, *arguments, *threads], cwd)

    def dry_runs(self, runs: Iterable[Sequence[Argument]], cwd: Path) -> list[str]:
        """Run `llama-quantize --dry-run` several times in parallel; returns the outputs."""
        program = self.find("llama-quantize")
        return process.outputs([[program, "--dry-run", *map(_word, run)] for run in runs], cwd)

    def imatrix(self, arguments: Iterable[Argument], cwd: Path) -> None:
        """Run llama-imatrix in `cwd`. Raises ToolchainError."""
        threads = ("-t", self.threads) if self.threads else ()
        self._call([self.find("llama-imatrix"), *arguments, *threads], cwd)

    def perplexity(self, arguments: Iterable[Argument]) -> str:
        """Run llama-perplexity; returns its output. Raises ToolchainError."""
        program = self.find("llama-perplexity")
        command = list(map(_word, [program, "--threads", self.processors, *arguments]))
        if self.quiet:
            return process.outputs([command], Path())[0]
        with tempfile.TemporaryDirectory() as scratch:
            log = Path(scratch) / "log"
            process.call(command, log)
            return log.read_text(encoding="utf-8", errors="replace")

    def gguf_split(self, arguments: Iterable[Argument]) -> None:
        """Run llama-gguf-split. Raises ToolchainError."""
        self._call([self.find("llama-gguf-split"), *arguments])

    def version(self, *names: str) -> Version:
        """The version of programs. Raises ToolchainError if they do not run, or differ."""
        return version_of(self.folder, names)

    def devices(self) -> tuple[str, ...]:
        """The devices of llama-server, such as "CUDA0: NAME (8192 MiB)". Raises ToolchainError."""
        listed = process.answer([self.find("llama-server"), "--list-devices"])[1]
        found = re.findall(r"^  (\w+: .+)$", listed, re.MULTILINE)
        return tuple(re.sub(r", \d+ MiB free\)$", ")", each) for each in found)

    def gpu_memory(self) -> int:
        """Bytes of memory of these devices. Raises ToolchainError."""
        return sum(int(size) << 20 for size in re.findall(r"\((\d+) MiB", str(self.devices())))

    def _call(self, command: Iterable[Argument], cwd: Path | None = None) -> None:
        process.call(list(map(_word, command)), self.log, cwd=cwd)


@cache
def _check_stamp(program: Path, stamp: Path) -> None:
    """Check a program against the stamp, if there is one; once, because a server has 15 MB."""
    if not stamp.exists():
        return
    programs = member(read_json(stamp), "programs", dict, str(stamp)) or {}
    if program.name in programs:
        if digest_of(program) != programs[program.name]:
            raise _changed(program, stamp)
        _check_libraries(program.parent, stamp)


@cache
def _check_libraries(folder: Path, stamp: Path) -> None:
    """Check the shared libraries of the programs, once."""
    record = read_json(stamp)
    known = member(record, "libraries", dict, str(stamp)) or {}
    found = libraries(folder / name for name in record["programs"])
    for name in sorted(known.keys() | found):
        if known.get(name) != found.get(name):
            raise _changed(folder / name, stamp)


def _changed(path: Path, stamp: Path) -> ToolchainError:
    return ToolchainError(
        f"{path}: damaged, or not the one of {stamp}: run "
        "`.venv/bin/snakemake --cores all --forcerun program`"
    )


def _word(argument: Argument) -> str:
    return str(argument)


def add_folder_option(parser: argparse.ArgumentParser) -> None:
    """Add --bin."""
    parser.add_argument(
        "--bin", type=cli.installed, default=str(DEFAULT_FOLDER), metavar="DIR",
        help="folder of llama.cpp's programs (default: %(default)s)",
    )  # fmt: skip


def add_options(parser: argparse.ArgumentParser, log: bool = False) -> None:
    """Add --bin and --threads, and --log if the program keeps one."""
    add_folder_option(parser)
    parser.add_argument(
        "--threads", type=int, default=0, metavar="N", help="threads (default: all processors)"
    )
    if log:
        parser.add_argument(
            "--log", type=Path, metavar="FILE", help="append everything that llama.cpp prints"
        )


def from_options(args: argparse.Namespace) -> LlamaCpp:
    """The programs that the options of `add_options` name."""
    return LlamaCpp(args.bin, args.threads, getattr(args, "log", None))
