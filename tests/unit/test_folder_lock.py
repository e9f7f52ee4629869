"""The lock of a folder: who holds it, and when it may be taken over."""

import errno
import fcntl
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import SCRIPTS
from mtpforge.errors import ForgeError
from mtpforge.rules import folder_lock
from mtpforge.run_owner import JOBS_LOCK, RUN_LOCK, VARIABLE, Owner, announce

FOLLOWING = """
import time
from mtpforge import cli, run_owner
run_owner._FAR_INTERVAL = 0.1
cli.run(lambda: time.sleep(60))
"""


@pytest.fixture
def said() -> list[str]:
    return []


def leave(folder: Path, owner: Owner) -> None:
    (folder / RUN_LOCK).write_text(owner.as_text())


def no_locks(*_: object) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def test_one_run_at_a_time_holds_a_folder(tmp_path: Path, said: list[str]) -> None:
    with folder_lock.holding(tmp_path, "snakemake all", said.append) as taken_over:
        assert not taken_over
        owner = folder_lock.owner_of(tmp_path)
        assert owner
        assert (owner.pid, owner.command) == (os.getpid(), "snakemake all")
        with (
            pytest.raises(ForgeError, match=f"in use by process {os.getpid()} on .*snakemake all"),
            folder_lock.holding(tmp_path, "another", said.append),
        ):
            pass
    assert folder_lock.owner_of(tmp_path) is None
    assert said == []


def test_temporary_files_go_with_the_run(tmp_path: Path, said: list[str]) -> None:
    outside = tempfile.gettempdir()
    with folder_lock.holding(tmp_path, "", said.append):
        inside = Path(os.environ["TMPDIR"])
        assert Path(tempfile.mkdtemp()).parent == inside
    assert tempfile.gettempdir() == outside
    assert not inside.exists()


def test_temporary_files_of_a_killed_run_are_removed(tmp_path: Path, said: list[str]) -> None:
    scratch = Path(tempfile.mkdtemp(prefix="mtpforge-"))
    other = tmp_path / "mtpforge-precious"
    other.mkdir()
    for folder in (scratch, other):
        gone = replace(Owner.this_process("", str(folder)), started="1")
        leave(tmp_path, gone)
        with folder_lock.holding(tmp_path, "", said.append) as taken_over:
            assert taken_over
    assert not scratch.exists()
    assert other.exists()  # not where a run makes its folder
    assert "Taking over from a run that was killed" in said[0]


@pytest.mark.parametrize("lives", [True, False])
def test_without_locks_the_process_decides(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch, lives: bool
) -> None:
    here = Owner.this_process("snakemake all")
    leave(tmp_path, here if lives else replace(here, started="1"))
    monkeypatch.setattr(fcntl, "flock", no_locks)
    if lives:
        with (
            pytest.raises(ForgeError, match="in use"),
            folder_lock.holding(tmp_path, "", said.append),
        ):
            pass
    else:
        with folder_lock.holding(tmp_path, "", said.append) as taken_over:
            assert taken_over


Change = Callable[[Owner], Owner]
GONE: dict[str, Change] = {
    "another process has its number": lambda owner: replace(owner, started="1"),
    "no process has its number": lambda owner: replace(owner, pid=2**22 + 1),
    "the machine was restarted": lambda owner: replace(owner, boot="other"),
    "a container with another name": lambda owner: replace(owner, host="other", started="1"),
}


@pytest.mark.parametrize("change", GONE.values(), ids=GONE)
def test_a_run_that_is_gone_is_taken_over(tmp_path: Path, said: list[str], change: Change) -> None:
    owner = change(Owner.this_process("snakemake all"))
    assert not owner.lives()
    leave(tmp_path, owner)
    with folder_lock.holding(tmp_path, "", said.append) as taken_over:
        assert taken_over
    assert said == [f"Taking over from a run that was killed: {owner}"]


def test_a_run_on_another_machine_is_left_alone(tmp_path: Path, said: list[str]) -> None:
    leave(tmp_path, replace(Owner.this_process("snakemake"), host="elsewhere", boot="other"))
    with (
        pytest.raises(ForgeError, match=r"on elsewhere, .*`.venv/bin/snakemake --unlock`"),
        folder_lock.holding(tmp_path, "", said.append),
    ):
        pass
    folder_lock.forget(tmp_path)
    with folder_lock.holding(tmp_path, "", said.append):
        pass


def test_a_run_in_another_container_cannot_be_seen(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's lock shows that it has ended, and without one it counts as living."""
    owner = replace(Owner.this_process("snakemake"), host="other", namespace="other", started="1")
    assert owner.lives()
    leave(tmp_path, owner)
    with folder_lock.holding(tmp_path, "", said.append) as taken_over:
        assert taken_over
    leave(tmp_path, owner)
    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(ForgeError, match="in use"), folder_lock.holding(tmp_path, "", said.append):
        pass


def test_the_name_of_a_run_is_one_line() -> None:
    owner = Owner.this_process("snakemake --cores 1 all", "/tmp/x")
    assert Owner.parse(owner.as_text()) == owner
    assert owner.lives()
    assert re.fullmatch(r"process \d+ on .+, since [\d: -]+: snakemake --cores 1 all", str(owner))


@pytest.mark.parametrize("text", ["", "\n", "{", "[]", '{"pid": 1}', '{"pid": "x"}'])
def test_a_torn_name_is_no_name(tmp_path: Path, said: list[str], text: str) -> None:
    (tmp_path / RUN_LOCK).write_text(text)
    with folder_lock.holding(tmp_path, "", said.append) as taken_over:
        assert not taken_over


def test_a_shorter_name_replaces_a_longer_one(tmp_path: Path, said: list[str]) -> None:
    leave(tmp_path, replace(Owner.this_process("x" * 1000), started="1"))
    with folder_lock.holding(tmp_path, "short", said.append):
        owner = folder_lock.owner_of(tmp_path)
        assert owner
        assert owner.command == "short"


STUCK = """
import signal, threading
from mtpforge import run_owner
run_owner.GRACE = 0.1
lock = threading.Lock()
signal.signal(signal.SIGTERM, lambda *_: lock.acquire())
with lock:
    run_owner.follow(is_snakemake=True)
    signal.raise_signal(signal.SIGTERM)
"""


def start_job(
    folder: Path, owner: Owner, monkeypatch: pytest.MonkeyPatch, program: str = FOLLOWING
) -> "subprocess.Popen[bytes]":
    monkeypatch.setenv("PYTHONPATH", str(SCRIPTS))
    monkeypatch.setenv(VARIABLE, "")
    announce(owner, folder)
    job = subprocess.Popen([sys.executable, "-c", program])
    with (folder / JOBS_LOCK).open("a") as file:
        while folder_lock._is_free(file):
            fcntl.flock(file, fcntl.LOCK_UN)
    return job


def test_the_next_run_waits_for_jobs(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "JOBS_LIMIT", 0.3)
    job = start_job(tmp_path, Owner.this_process(""), monkeypatch)
    with (
        pytest.raises(ForgeError, match="jobs of a run that was stopped are still running"),
        folder_lock.holding(tmp_path, "", said.append),
    ):
        pass
    assert said == ["Waiting for stopped jobs to end"]
    job.kill()
    job.wait()
    with folder_lock.holding(tmp_path, "", said.append):
        pass


@pytest.mark.parametrize("program", [FOLLOWING, STUCK], ids=["program", "Snakemake"])
def test_a_job_ends_with_its_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str
) -> None:
    run = subprocess.Popen(["sleep", "60"])
    stat = Path(f"/proc/{run.pid}/stat").read_text().rpartition(")")[2].split()
    owner = replace(Owner.this_process(""), pid=run.pid, started=stat[19])
    job = start_job(tmp_path, owner, monkeypatch, program)
    assert job.poll() is None
    run.kill()
    run.wait()
    assert job.wait(timeout=10) == 143


def test_a_job_elsewhere_ends_when_the_next_run_has_the_folder(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It cannot see that its own was killed."""
    monkeypatch.setattr(folder_lock, "JOBS_LIMIT", 10.0)
    before = replace(Owner.this_process(""), boot="other", started="1")
    leave(tmp_path, before)
    job = start_job(tmp_path, before, monkeypatch)
    time.sleep(0.5)
    assert job.poll() is None
    with folder_lock.holding(tmp_path, "", said.append) as taken_over:
        assert taken_over
        assert job.wait(timeout=0) == 143
        late = subprocess.run(
            [sys.executable, "-c", FOLLOWING],
            env={**os.environ, VARIABLE: f"{tmp_path}\n{before.as_text()}"},
            capture_output=True,
            text=True,
        )
        assert late.returncode == 143
        assert "the run that this job belongs to has ended" in late.stderr


def test_a_run_that_gives_up_waiting_leaves_the_name_of_the_one_before(
    tmp_path: Path, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_lock, "JOBS_LIMIT", 0.3)
    job = start_job(tmp_path, Owner.this_process(""), monkeypatch)
    before = replace(Owner.this_process("before"), started="1")
    leave(tmp_path, before)
    with pytest.raises(ForgeError, match="jobs of a run that was stopped"):
        folder_lock.holding(tmp_path, "", said.append).__enter__()
    assert folder_lock.owner_of(tmp_path) == before
    job.kill()
    job.wait()
