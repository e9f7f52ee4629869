"""File systems without locks, and those that lock on one machine only: outputs are whole too."""

import errno
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SCRIPTS
from mtpforge import run_owner
from mtpforge.errors import ForgeError
from mtpforge.io import atomic, leftovers, storage, temporary

FAILURES = ("ENOLCK", "EOPNOTSUPP", "ENOSYS", "EINTR", "ESTALE", "EINVAL", "EBADF", "EIO", "EACCES")
NO_LOCKS = """
import errno, fcntl, os, sys
from pathlib import Path
def flock(*_):
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
fcntl.flock = flock
from mtpforge.io import atomic
path, letter = Path(sys.argv[1]), sys.argv[2]
"""
SIZE = 200_000


def fail(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    def flock(*_: object) -> None:
        raise OSError(getattr(errno, name), os.strerror(getattr(errno, name)))

    monkeypatch.setattr(fcntl, "flock", flock)


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    fail(monkeypatch, "ENOLCK")


def start(program: str, *arguments: object) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-c", NO_LOCKS + program, *map(str, arguments)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(SCRIPTS)})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("name", FAILURES)
@pytest.mark.parametrize("keep", [False, True])
def test_each_of_two_writers_gives_its_own_file_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, keep: bool
) -> None:
    fail(monkeypatch, name)
    path = tmp_path / "x"
    with atomic.replacing(path, keep) as first:
        first.write_text("half")
        with atomic.replacing(path, keep) as second:
            second.write_text("the second's")
        assert path.read_text() == "the second's"
        first.write_text("all of the first's")
    assert path.read_text() == "all of the first's"
    assert names(tmp_path) == ["x"]


@pytest.mark.parametrize("name", FAILURES)
def test_each_of_two_writers_gives_its_own_folder_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fail(monkeypatch, name)
    path = tmp_path / "x"
    with atomic.replacing_folder(path) as first, atomic.scratch_folder(path) as scratch:
        (first / "1").touch()
        (scratch / "1").touch()
        with atomic.replacing_folder(path) as second, atomic.scratch_folder(path) as other:
            assert names(second) == names(other) == []
            (second / "2").touch()
        assert (names(path), names(first), names(scratch)) == (["2"], ["1"], ["1"])
    assert names(path) == ["1"]
    assert names(tmp_path) == ["x"]


@pytest.mark.usefixtures("no_locks")
def test_a_writer_that_fails_leaves_the_file_of_the_other(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with pytest.raises(RuntimeError), atomic.replacing(path) as first:
        first.write_text("half")
        atomic.write_text(path, "whole")
        raise RuntimeError
    assert path.read_text() == "whole"
    assert names(tmp_path) == ["x"]


def test_a_writer_without_locks_leaves_one_with_them_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    with atomic.replacing(path) as locked:
        locked.write_text("half")
        fail(monkeypatch, "ENOLCK")
        atomic.write_text(path, "of the other")
        assert locked.read_text() == "half"
        locked.write_text("whole")
    assert path.read_text() == "whole"
    assert names(tmp_path) == ["x"]


FILES = """
for _ in range(60):
    with atomic.replacing(path) as written, written.open("w") as file:
        for _ in range(20):
            file.write(letter * 10_000)
            file.flush()
"""
FOLDERS = """
for _ in range(60):
    with atomic.replacing_folder(path) as written:
        for number in range(5):
            (written / f"{number}").write_text(letter)
"""


def racing(program: str, path: Path) -> Iterator[None]:
    """Run two writers of the same output, and go on as long as they do."""
    writers = [start(program, path, letter) for letter in "ab"]
    while any(writer.poll() is None for writer in writers):
        yield
    yield
    assert [writer.returncode for writer in writers] == [0, 0]


def test_a_file_of_two_processes_is_never_torn(tmp_path: Path) -> None:
    path = tmp_path / "x"
    seen = set()
    for _ in racing(FILES, path):
        if path.exists():
            seen.add(path.read_text())
    assert seen == {"a" * SIZE, "b" * SIZE}
    assert names(tmp_path) == ["x"]


def test_a_folder_of_two_processes_is_never_torn(tmp_path: Path) -> None:
    path = tmp_path / "x"
    for _ in racing(FOLDERS, path):
        time.sleep(0.05)
    assert len({(path / f"{number}").read_text() for number in range(5)}) == 1
    assert names(path) == list("01234")
    assert names(tmp_path) == ["x"]


KILLED = """
import signal
with atomic.replacing(path, keep=letter == "k") as written:
    written.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.usefixtures("no_locks")
@pytest.mark.parametrize("keep", [False, True])
def test_what_a_killed_writer_left_is_removed_or_continued(tmp_path: Path, keep: bool) -> None:
    path = tmp_path / "x"
    assert start(KILLED, path, "k" if keep else "-").wait() == -9
    assert len(names(tmp_path)) == 1
    with atomic.replacing(path, keep) as written:
        assert written.read_text() == ("half" if keep else "")
        assert len(names(tmp_path)) == 1
    assert names(tmp_path) == ["x"]


@pytest.mark.usefixtures("no_locks")
def test_a_living_writer_loses_nothing_to_one_that_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with atomic.replacing(path, keep=True) as first:
        first.write_text("half")
        with atomic.replacing(path, keep=True) as second:
            assert second.read_text() == ""
        assert first.read_text() == "half"


def tag(host: str, pid: int, started: str) -> str:
    return f"{host}-{pid}-{started}-0123ab"


def test_leftovers_are_those_of_processes_that_have_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host, pid, started, _ = run_owner.tag().split("-")
    living = tag(host, int(pid), started)
    ended = [tag(host, 2**22 + 1, started), tag(host, int(pid), "1")]
    elsewhere = tag("01234567", int(pid), started)
    for owner in (living, elsewhere, *ended):
        (tmp_path / f".x.gguf.{owner}.part").touch()
        (tmp_path / f".x.{owner}.old.part").mkdir()
        (tmp_path / f".x.gguf.{owner}.scratch").mkdir()
    old = tmp_path / f".y.{elsewhere}.part"
    old.touch()
    os.utime(old, (0, 0))
    expected = {name for name in names(tmp_path) if any(owner in name for owner in ended)}
    for name in ("", "ENOLCK"):  # the kernel's lock does not matter
        if name:
            fail(monkeypatch, name)
        assert {path.name for path in leftovers.find(tmp_path)} == expected | {old.name}


def test_a_folder_of_a_network_is_not_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each machine has its own lock on it."""
    kinds = ("nfs4", "lustre", "fuse.sshfs", "virtiofs", "ext4")
    for kind in kinds:
        monkeypatch.setattr(storage, "file_system", lambda _, kind=kind: kind)
        path = tmp_path / kind / "x"  # in a folder that is not there yet
        with atomic.scratch_folder(path) as folder:
            is_own = folder != temporary.usual_name(path, "scratch")
            assert is_own == (kind != "ext4")
        with atomic.replacing_folder(path, keep=True) as folder:
            assert (folder != temporary.usual_name(path, "part")) == is_own


MOUNTS = {
    "nfs4 host:/a rw,vers=4.2,local_lock=none": False,
    "nfs host:/a rw,vers=3,nolock,local_lock=all": True,
    "nfs host:/a rw,vers=3,local_lock=flock": True,
    "nfs host:/a rw,vers=3,local_lock=posix": False,
    "lustre host:/a rw,flock": False,
    "lustre host:/a rw,localflock": True,
    "cifs //host/a rw,nobrl": True,
    "fuse.sshfs host:/a rw,user_id=0": True,
    "fuse.rclone remote:/a rw,user_id=0": True,
    "9p host0 rw,trans=virtio": True,
    "virtiofs shared rw": True,
    "fuseblk /dev/sdb1 rw": False,  # a disk of this machine
    "ext4 /dev/sda rw": False,
}


@pytest.mark.parametrize("mount", MOUNTS)
def test_a_file_that_is_locked_on_one_machine_is_not_shared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mount: str
) -> None:
    device = tmp_path.stat().st_dev
    mounts = tmp_path / "mounts"
    mounts.write_text(
        "9 1 0:999 / /x rw - nfs x:/ nolock\n"
        f"9 1 {os.major(device)}:{os.minor(device)} / /a\\040- rw,noatime shared:1 - {mount}\n"
    )
    monkeypatch.setattr(storage, "_MOUNTS", mounts)
    assert storage.file_system(tmp_path) == mount.split()[0]
    with atomic.replacing(tmp_path / "x") as written:
        is_own = written != temporary.usual_name(tmp_path / "x", "part")
        assert is_own == MOUNTS[mount]
    assert storage.locks_work(tmp_path) != MOUNTS[mount]


@pytest.mark.usefixtures("no_locks")
def test_locks_that_fail_do_not_work(tmp_path: Path) -> None:
    assert not storage.locks_work(tmp_path)


def test_a_job_waits_for_the_other_writer_and_then_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x"
    with atomic.replacing(path) as first:
        first.write_text("half")
        with pytest.raises(ForgeError, match="another process"), atomic.replacing(path):
            pass
        monkeypatch.setenv(run_owner.VARIABLE, "a run")
        monkeypatch.setattr(temporary, "PATIENCE", 0.3)
        start = time.monotonic()
        atomic.write_text(path, "of the job")
        assert time.monotonic() - start >= 0.3
        assert path.read_text() == "of the job"
        assert first.read_text() == "half"


def test_an_error_names_the_output(tmp_path: Path) -> None:
    own = tmp_path / f".x.gguf.{run_owner.tag()}.part"
    assert storage.final_name(own / "y") == tmp_path / "x.gguf" / "y"
    assert storage.final_name(own.with_name(own.name[:-4] + "old.part")) == tmp_path / "x.gguf"


def test_the_inode_of_a_name_of_ones_own_may_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """FUSE gives a file that is not open another number, when it needs room in its table."""
    fail(monkeypatch, "ENOLCK")
    with atomic.replacing(tmp_path / "x") as written:
        same = written.with_name("same")
        same.write_text("made")
        same.replace(written)
    assert (tmp_path / "x").read_text() == "made"
