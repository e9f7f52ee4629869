"""What is said of a disk that is full or fails, and which files are refused beforehand."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SCRIPTS
from mtpforge.errors import GgufError, StorageError, ToolchainError
from mtpforge.io import atomic, storage
from mtpforge.io.ranges import FileRange, Sink


def failing(number: int, *names: object) -> OSError:
    return OSError(number, os.strerror(number), *names)


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full: needs 5.00 GB"),
        (errno.EDQUOT, "over your disk quota: needs 5.00 GB"),
        (errno.EFBIG, "larger than its file system or `ulimit -f` allows: needs 5.00 GB"),
        (errno.EIO, "the disk or its connection fails (Input/output error)"),
        (errno.ESTALE, "the disk or its connection fails (Stale file handle)"),
        (errno.EROFS, "its file system is read-only"),
        (errno.EACCES, "Permission denied: give yourself the right"),
        (errno.ENAMETOOLONG, "the name is too long"),
    ],
)
def test_each_error_has_its_own_reason(tmp_path: Path, number: int, words: str) -> None:
    """It names the final name of the file that could not be written, not the temporary one."""
    target = tmp_path / "x.gguf"
    with (
        pytest.raises(StorageError) as raised,
        atomic.replacing(target) as temporary,
        storage.naming(temporary, 5 * 10**9),
    ):
        raise failing(number)
    assert str(raised.value).startswith(f"{target}: {words}")
    assert raised.value.errno == number
    assert (" are free" in str(raised.value)) == ("needs" in words)
    assert list(tmp_path.iterdir()) == []


def test_of_two_files_the_written_one_is_named(tmp_path: Path) -> None:
    """shutil.copyfile names the source first, although the target is full."""
    error = failing(errno.ENOSPC, str(tmp_path / "source"), None, str(tmp_path / "target"))
    assert str(storage.explain(error)).startswith(f"{tmp_path / 'target'}: the disk is full")


def test_a_folder_that_cannot_be_copied_names_a_file(tmp_path: Path) -> None:
    """shutil.copytree raises an error without a number, about all files."""
    error = shutil.Error([("source", str(tmp_path / "x"), str(failing(errno.ENOSPC, "x")))])
    assert str(storage.explain(error)).startswith(f"{tmp_path / 'x'}: the disk is full: ")


def test_an_error_is_explained_once(tmp_path: Path) -> None:
    explained = storage.explain(failing(errno.EIO, str(tmp_path)))
    assert storage.explain(explained, tmp_path / "y") is explained


def test_the_need_of_one_file_is_not_told_of_another(tmp_path: Path) -> None:
    error = failing(errno.ENOSPC, str(tmp_path / "log"))
    message = str(storage.explain(error, tmp_path / "x", 10))
    assert message.startswith(f"{tmp_path / 'log'}: the disk is full: ") and "needs" not in message


def test_a_source_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "source"
    source.write_bytes(bytes(100))

    def fails(*_: object) -> bytes:
        raise failing(errno.EIO)

    monkeypatch.setattr(os, "pread", fails)
    monkeypatch.setattr(os, "copy_file_range", fails, raising=False)
    with (
        pytest.raises(StorageError, match=f"^{source}: the disk or its connection fails"),
        atomic.replacing(tmp_path / "x", needed=100) as temporary,
        temporary.open("wb") as file,
    ):
        Sink(file.fileno()).append([FileRange(source, 0, 100)])


@pytest.mark.parametrize(
    ("kind", "shared", "refused"),
    [
        ("ext4", 0, True),
        ("tmpfs", 0, True),
        ("ext4", 800, True),
        ("xfs", 800, False),  # shares the blocks of what it copies
        ("xfs", 100, True),
        ("btrfs", 0, False),  # may compress it
        ("", 0, False),
    ],
)
def test_what_may_fit_is_not_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    shared: int,
    refused: bool,
) -> None:
    monkeypatch.setattr(storage, "file_system", lambda folder: kind)
    monkeypatch.setattr(storage, "room", lambda path: 500)
    target = tmp_path / "x"
    if refused:
        with pytest.raises(
            StorageError, match=f"^{target}: not enough space .* 500 bytes are free"
        ):
            storage.require(target, 1000, shared)
        return
    storage.require(target, 1000, shared)
    warned = f"warning: {target}: needs 1,000 bytes, 500 bytes are free" in capsys.readouterr().err
    assert warned == (kind != "xfs")


def test_a_file_system_that_does_not_tell_refuses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    about = list(os.statvfs(tmp_path))
    about[2] = about[3] = about[4] = 0
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(about))
    assert storage.room(tmp_path / "x") is None
    storage.require(tmp_path / "x", 10**18)


def test_the_room_of_a_file_includes_what_it_has(tmp_path: Path) -> None:
    """A resumed download needs only the rest."""
    partial = tmp_path / ".x.part"
    partial.write_bytes(os.urandom(1 << 20))
    os.sync()
    with_it, without = storage.room(partial), storage.room(tmp_path / "y")
    assert with_it is not None and without is not None
    assert partial.stat().st_blocks * 512 >= 1 << 20
    assert storage.file_system(tmp_path)


PROGRAM = """
import sys
from pathlib import Path
from mtpforge import cli
from mtpforge.io import atomic
cli.run(lambda: atomic.write_text(Path(sys.argv[1]), "x" * 100_000))
"""


def program(*arguments: object, limit: int = resource.RLIM_INFINITY, **streams: object) -> object:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))

    return subprocess.run(
        [sys.executable, "-c", PROGRAM, *map(str, arguments)], text=True, preexec_fn=limited,
        env={**os.environ, "PYTHONPATH": str(SCRIPTS)}, **streams,
    )  # fmt: skip


def test_a_limit_of_the_shell_is_not_a_full_disk(tmp_path: Path) -> None:
    done = program(tmp_path / "x", limit=5000, capture_output=True)
    assert done.returncode == 1 and "`ulimit -f`" in done.stderr and "full" not in done.stderr
    assert "needs 100,000 bytes" in done.stderr and list(tmp_path.iterdir()) == []


def test_a_full_disk_of_the_log_does_not_change_the_exit_code(tmp_path: Path) -> None:
    with Path("/dev/full").open("w") as full:
        done = program("/dev/null/x", stdout=full, stderr=full)
    assert done.returncode == 1


# ── programs that write ──


def test_a_program_that_failed_for_another_reason_keeps_its_error(tmp_path: Path) -> None:
    with (
        pytest.raises(ToolchainError, match=r"^unknown type$"),
        storage.by_program(tmp_path / "x", 9),
    ):
        raise ToolchainError("unknown type")


@pytest.mark.parametrize("error", [ToolchainError("iostream error"), GgufError("truncated")])
def test_output_that_is_not_whole_is_not_taken_for_a_full_disk(
    tmp_path: Path, error: Exception
) -> None:
    target = tmp_path / ".x.part"
    with pytest.raises(type(error)) as raised, storage.by_program(target, 9):
        raise error
    assert str(raised.value).startswith(f"{tmp_path / 'x'}: not written whole: needs 9 bytes, ")
    assert str(raised.value).endswith(f" are free ({error})")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_writing_a_little_more_tells_why_a_program_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def fails(descriptor: int) -> None:
        raise failing(number)

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(StorageError) as raised, storage.by_program(tmp_path / "x", 9):
        raise ToolchainError("llama-quantize failed")
    assert str(raised.value) == f"{storage.explain(failing(number), tmp_path / 'x', 9)} " + (
        "(llama-quantize failed)"
    )


def test_what_a_program_prints_tells_why_it_failed(tmp_path: Path) -> None:
    said = ToolchainError("OSError: [Errno 122] Disk quota exceeded")
    with (
        pytest.raises(StorageError, match="over your disk quota"),
        storage.by_program(tmp_path / "x", 9),
    ):
        raise said


def test_a_copy_is_made_only_if_the_file_system_has_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_bytes(bytes(5000))

    def refusing(*names: object) -> None:
        raise failing(errno.EXDEV)

    monkeypatch.setattr(os, "link", refusing)
    monkeypatch.setattr(storage, "room", lambda path: 4096)
    monkeypatch.setattr(storage, "file_system", lambda folder: "ext4")
    with pytest.raises(StorageError, match="y: not enough space on the disk: needs 5,000 bytes"):
        atomic.give_name(tmp_path / "x", tmp_path / "y")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
