"""As many threads as a job has, or as there are processors: a container's quota counts."""

import hashlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import convert
import inject
import pytest
from conftest import CHECKPOINTS, ROOT
from mtpforge import processors
from mtpforge.errors import DamagedError
from mtpforge.io import integrity, ranges
from mtpforge.io.ranges import FileRange
from mtpforge.llama_cpp.programs import LlamaCpp


@pytest.fixture(autouse=True)
def _eight(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine of eight processors, without control groups."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(processors, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(processors, "OWN_CGROUP", tmp_path / "own")


@pytest.mark.parametrize(
    ("own", "limits", "count"),
    [
        ("0::/", {}, 8),
        ("0::/", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/", {"cpu.max": "250000 100000\n"}, 3),
        ("0::/", {"cpu.max": "10000 100000\n"}, 1),
        ("0::/", {"cpu.max": "max 100000\n"}, 8),
        ("0::/", {"cpu.max": "damaged\n"}, 8),
        ("0::/pod/job", {"pod/cpu.max": "300000 100000", "pod/job/cpu.max": "max 100000"}, 3),
        ("3:cpu,cpuacct:/a\n0::/", {"cpu/a/cpu.cfs_quota_us": "400000"}, 4),
        ("3:cpu,cpuacct:/a\n0::/", {"cpu/a/cpu.cfs_quota_us": "-1"}, 8),
        ("4:memory:/a", {"cpu.max": "9900000 100000"}, 8),
    ],
)
def test_the_quota_of_a_container_counts(
    tmp_path: Path, own: str, limits: dict[str, str], count: int
) -> None:
    (tmp_path / "own").write_text(own)
    for name, limit in limits.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(limit)
        path.with_name("cpu.cfs_period_us").write_text("100000\n")
    assert processors.available() == count
    assert LlamaCpp().processors == count
    assert LlamaCpp(threads=99).processors == count


@pytest.mark.parametrize(
    ("given", "count"),
    [("", 8), ("1", 1), ("3", 3), ("64", 8), ("0", 8), ("4,2", 8), ("many", 8)],
)
def test_a_program_may_use_the_threads_of_its_job(
    monkeypatch: pytest.MonkeyPatch, given: str, count: int
) -> None:
    monkeypatch.setenv(processors.VARIABLE, given)
    assert processors.allotted() == count
    assert processors.available() == 8


def test_snakemake_tells_a_job_its_threads(tmp_path: Path) -> None:
    (tmp_path / "Snakefile").write_text(
        f"rule job:\n output: 'told'\n threads: 3\n shell: 'echo ${processors.VARIABLE} > told'\n"
    )
    command = [sys.executable, "-m", "snakemake", "--cores", "8", "--quiet", "all"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "told").read_text() == "3\n"


@pytest.mark.parametrize("threads", [1, 3])
def test_converting_and_injecting_use_the_threads_of_their_jobs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, threads: int
) -> None:
    used = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, most: int | None = None) -> None:
            used.append(most)
            super().__init__(most)

    for name, module in list(sys.modules.items()):
        if name.startswith("mtpforge.") and hasattr(module, "ThreadPoolExecutor"):
            monkeypatch.setattr(module, "ThreadPoolExecutor", Pool)

    def call(program: Callable[[], None], *arguments: object) -> None:
        monkeypatch.setattr(sys, "argv", ["", *map(str, arguments)])
        program()
        assert max(used) == threads  # some have one for what goes on beside
        used.clear()

    monkeypatch.setenv(processors.VARIABLE, str(threads))
    source, trunk, digests = CHECKPOINTS / "tiny-qwen3.5", tmp_path / "trunk.gguf", tmp_path / "d"
    given = ("--tokenizer-pre", "qwen35", "--resume", "x", "--digests", digests)
    call(convert.main, source, *given, "--part", "trunk", "--out", trunk)
    call(inject.main, trunk, "--head", source, "--digests", digests, "--out", tmp_path / "o.gguf")
    monkeypatch.setenv(processors.VARIABLE, "8")
    call(convert.main, source, *given, "--threads", threads, "--out", tmp_path / "whole.gguf")


@pytest.mark.parametrize(("threads", "beside"), [(1, 0), (2, 1), (8, 1)])
def test_a_job_of_one_thread_hashes_in_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, threads: int, beside: int
) -> None:
    monkeypatch.setenv(processors.VARIABLE, str(threads))
    before = {*threading.enumerate()}
    good, damaged = tmp_path / "good", tmp_path / "damaged"
    good.write_bytes(b"good")
    damaged.write_bytes(b"bad")
    parts = [integrity.whole(path, hashlib.sha256(b"good").hexdigest()) for path in (good, damaged)]
    with integrity.reading(parts[:1]) as read:
        assert len({*threading.enumerate()} - before) == beside
        assert [digest for _, digest in read.check()] == [parts[0].sha256]
    with pytest.raises(DamagedError, match="damaged"), integrity.reading(parts):
        pass


def test_a_file_is_hashed_with_its_parts_in_one_thread(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(range(200)))
    before = {*threading.enumerate()}
    whole, parts = ranges.hash_parts(path, {"a": FileRange(path, 20, 30)})
    assert {*threading.enumerate()} <= before
    assert whole == hashlib.sha256(bytes(range(200))).hexdigest()
    assert parts["a"] == hashlib.sha256(bytes(range(20, 50))).hexdigest()


# They ask for the machine: a forecast, what jobs ask for, and those that are told a job's threads.
OF_THE_MACHINE = {
    "toolchain.py", "mtpforge/llama_cpp/programs.py", "mtpforge/llama_cpp/server.py",
    "mtpforge/rules/resources.py",
}  # fmt: skip


def test_all_other_programs_keep_to_the_threads_of_their_jobs() -> None:
    programs = ROOT / "workflow/scripts"
    sources = {path: path.read_text(encoding="utf-8") for path in programs.rglob("*.py")}
    asking = [path for path, text in sources.items() if "processors.available" in text]
    assert {str(path.relative_to(programs)) for path in asking} == OF_THE_MACHINE
    unlimited = [path for path, text in sources.items() if "ThreadPoolExecutor()" in text]
    assert not unlimited


def test_make_counts_them_with_python_alone() -> None:
    """Before anything is installed."""
    (command,) = re.findall(r"^CORES \?= \$\(shell \$\(PYTHON\) (.+)\)$", MAKEFILE, re.MULTILINE)
    done = subprocess.run(
        ["python3", "-I", "-S", command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) >= 1


MAKEFILE = (ROOT / "Makefile").read_text()
