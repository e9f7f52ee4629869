"""Runs a program on a disk that is full or fails, and then once more on a good one.

example: unshare -Urm python tests/faults.py FOLDER 4096 -- python workflow/scripts/convert.py ...

Mounts a small file system in FOLDER, which only this process and its children see, and fills it up
to some bytes with `FOLDER/ballast`. Programs write to `FOLDER/in`. Prints what came of both runs,
as JSON.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

SIZE = 64 << 20
FILLER = """#!/bin/sh
case "$*" in
*--help*|*--dry-run*|*--version*) ;;
*) [ -e {folder}/ballast ] || [ -e {folder}/again ] || /usr/bin/fallocate \
-l $(( $(/usr/bin/stat -f -c '%a * %S' {folder}) - {leave} )) {folder}/ballast ;;
esac
exec {program} "$@"
"""
"""A program that fills the disk after mtpforge has checked the space, and then is another one."""


@dataclass(frozen=True)
class Outcome:
    """What a run left: exit code, its messages, and the files that it made, hidden ones too."""

    code: int
    errors: str
    left: list[str] = field(default_factory=list)

    @property
    def line(self) -> str:
        """The only error line."""
        lines = [line for line in self.errors.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "Traceback" not in self.errors, self.errors
        return lines[0]


def on_a_full_disk(folder: Path, leave: int, command: Sequence[object]) -> list[Outcome]:
    """Run a command on a disk with `leave` bytes free, then on the same disk with room."""
    inside = [sys.executable, __file__, folder, leave, "--", *command]
    done = subprocess.run(
        ["unshare", "-Urm", *map(str, inside)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return [Outcome(**each) for each in json.loads(done.stdout)]


def unsupported() -> str:
    """Why no file system can be mounted here; empty if it can."""
    try:
        done = subprocess.run(
            ["unshare", "-Urm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True
        )
    except OSError as error:
        return f"no unshare ({error})"
    return "" if done.returncode == 0 else "an ordinary user cannot mount a file system here"


def filling(programs: Path, into: Path, folder: Path, leave: int) -> Path:
    """A folder of programs which, when they work, first fill the disk up to `leave` bytes."""
    into.mkdir()
    for program in programs.iterdir():
        text = FILLER.format(folder=folder, leave=leave, program=program.resolve())
        (into / program.name).write_text(text)
        (into / program.name).chmod(0o755)
    return into


# ── system calls ──

CALLS = "write,writev,pwrite64,copy_file_range,ftruncate,fallocate,openat,fsync,rename,linkat,link"
_CALL = re.compile(r"^(\d+) +(\w+)\(", re.MULTILINE)


def count_calls(command: Sequence[object], paths: Sequence[Path], log: Path) -> Counter[str]:
    """How often a process of a command calls the system for these paths, by call."""
    done = _traced(command, paths, log, f"trace={CALLS}")
    assert done.code == 0, done.errors
    by_process = Counter(_CALL.findall(log.read_text(errors="replace")))
    counts: Counter[str] = Counter()
    for (_, call), count in by_process.items():
        counts[call] = max(counts[call], count)
    return counts


def with_fault(
    command: Sequence[object], paths: Sequence[Path], log: Path, fault: tuple[str, str, int]
) -> Outcome:
    """Run a command in which such a call for these paths fails with an error, such as EIO.

    It is the n-th one of each process.
    """
    call, error, number = fault
    return _traced(
        command, paths, log, f"trace={call}", f"inject={call}:error={error}:when={number}"
    )


def _traced(
    command: Sequence[object], paths: Sequence[Path], log: Path, *expressions: str
) -> Outcome:
    options = [word for path in paths for word in ("-P", str(path))]
    options += [word for expression in expressions for word in ("-e", expression)]
    words = ["strace", "-f", "--seccomp-bpf", "-qq", "-o", str(log), *options, *map(str, command)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    return Outcome(done.returncode, done.stderr)


def has_strace() -> bool:
    """Whether strace can make system calls fail here."""
    if not shutil.which("strace"):
        return False
    probe = ["strace", "-f", "--seccomp-bpf", "-qq", "-e", "trace=fsync", "true"]
    return subprocess.run(probe, capture_output=True).returncode == 0


def _main() -> None:
    folder, leave, command = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[4:]
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", folder], check=True)
    ballast = folder / "ballast"
    if leave < SIZE:
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, SIZE - leave)
    outcomes = [_run(command, folder)]
    ballast.unlink(missing_ok=True)
    (folder / "again").touch()
    outcomes.append(_run(command, folder))
    print(json.dumps([outcome.__dict__ for outcome in outcomes]))


def _run(command: Sequence[str], folder: Path) -> Outcome:
    done = subprocess.run(command, capture_output=True, text=True)
    inside = folder / "in"
    left = [str(path.relative_to(inside)) for path in inside.rglob("*") if not path.is_dir()]
    return Outcome(done.returncode, done.stderr, sorted(left))


if __name__ == "__main__":
    _main()
