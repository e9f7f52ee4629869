"""The version of llama.cpp's programs, as they print it."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mtpforge.errors import ToolchainError
from mtpforge.llama_cpp import process


@dataclass(frozen=True)
class Version:
    """The answer to --version. `build` is None if a build does not know its number."""

    llama_cpp: str
    build: str | None
    commit: str
    compiler: str

    def __str__(self) -> str:
        """Version and commit."""
        return f"{self.llama_cpp} {self.commit}"


def version_of(folder: Path, programs: Iterable[str]) -> Version:
    """The version of the programs in a folder.

    Raises ToolchainError if one does not start, or if they are of different builds.
    """
    answers = {name: _ask(folder / name) for name in programs}
    known = {name: answer for name, answer in answers.items() if answer}
    if not known:
        raise ToolchainError(f"{folder}: no program answers --version as llama.cpp's do")
    first = next(iter(known))
    for name, answer in known.items():
        if answer != known[first]:
            raise ToolchainError(
                f"{folder}: programs of different builds: {first} {known[first]}, {name} {answer}"
            )
    return known[first]


def _ask(program: Path) -> Version | None:
    """A program's version; None if it starts but does not tell (llama-quantize)."""
    code, printed = process.answer([program, "--version"])
    if code not in (0, 1):  # a signal, or 127 for a missing library
        last = "\n".join(printed.rstrip().splitlines()[-3:])
        raise ToolchainError(f"{program}: does not run (exit code {code}):\n{last}")
    pattern = r"^version: (\S+) \((?:build (?P<build>\d+), commit )?(\w+)\)$"
    found = re.search(pattern, printed, re.MULTILINE)
    if found is None:
        return None
    compiler = re.search(r"^built with (.+)$", printed, re.MULTILINE)
    return Version(
        found[1], found["build"], commit=found[3], compiler=compiler[1] if compiler else "unknown"
    )
