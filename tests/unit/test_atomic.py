"""A file, or a folder of files, appears whole or not at all."""

import errno
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest
import quantize
from conftest import SCRIPTS
from mtpforge.errors import ForgeError, StorageError
from mtpforge.io import temporary
from mtpforge.io.atomic import (
    give_name,
    link,
    link_or_copy,
    replacing,
    replacing_folder,
    write_json,
)


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.write_text("old")
    with pytest.raises(RuntimeError), replacing(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_a_kill_leaves_the_old_file(tmp_path: Path) -> None:
    program = """
import os, signal, sys
from pathlib import Path
from mtpforge.io.atomic import replacing
with replacing(Path(sys.argv[1])) as temporary:
    temporary.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""
    target = tmp_path / "x"
    target.write_text("old")
    done = subprocess.run(
        [sys.executable, "-c", program, str(target)], env={**os.environ, "PYTHONPATH": str(SCRIPTS)}
    )
    assert done.returncode == -signal.SIGKILL and target.read_text() == "old"


def test_the_rest_of_a_killed_run_is_overwritten(tmp_path: Path) -> None:
    test_a_kill_leaves_the_old_file(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # the half-written file lies beside it
    with replacing(tmp_path / "x") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "x").read_text() == "new" and list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_a_program_that_outlived_a_killed_run_cannot_damage_the_new_file(
    tmp_path: Path,
) -> None:
    with (tmp_path / ".out.part").open("wb", buffering=0) as outlived:
        outlived.write(b"of the run before")
        with replacing(tmp_path / "out") as temporary:
            temporary.write_bytes(b"of this run, and longer")
            outlived.write(b"late")
    assert (tmp_path / "out").read_bytes() == b"of this run, and longer" and list(
        tmp_path.iterdir()
    ) == [tmp_path / "out"]


def test_a_second_writer_of_a_file_is_refused(tmp_path: Path) -> None:
    with replacing(tmp_path / "x") as first:
        first.write_text("first")
        with (
            pytest.raises(ForgeError, match="another process is writing it"),
            replacing(tmp_path / "x"),
        ):
            pass
    assert (tmp_path / "x").read_text() == "first"


def test_a_file_that_is_renamed_while_it_is_locked_is_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = tmp_path / "old"
    old.touch()
    monkeypatch.setattr(Path, "exists", lambda _: True)  # it goes just after this question
    with old.open() as opened:
        old.rename(tmp_path / "new")
        with pytest.raises(BlockingIOError):
            temporary._lock(opened.fileno(), old)


def test_the_file_of_a_second_writer_does_not_get_the_name(tmp_path: Path) -> None:
    """A hard link is not locked, so a second writer can start a new file under its name."""
    (tmp_path / "made").write_text("first")
    with ExitStack() as second:
        with (
            pytest.raises(ForgeError, match="another process is writing it"),
            replacing(tmp_path / "x") as first,
        ):
            link_or_copy(tmp_path / "made", first)
            other = second.enter_context(replacing(tmp_path / "x"))
            other.write_text("half")
        assert not (tmp_path / "x").exists()
        other.write_text("second")
    assert (tmp_path / "x").read_text() == "second" and (tmp_path / "made").read_text() == "first"


def test_a_copy_in_place_of_a_link_stays_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "made").write_text("first")
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    with replacing(tmp_path / "x") as first:
        link_or_copy(tmp_path / "made", first)
        with pytest.raises(ForgeError, match="another process"), replacing(tmp_path / "x"):
            pass
    assert (tmp_path / "x").read_text() == "first"


def test_a_folder_replaces_another_with_everything_in_it(tmp_path: Path) -> None:
    for name in ("old", "new"):
        with replacing_folder(tmp_path / "x") as temporary:
            (temporary / name).mkdir()
            (temporary / name / "file").write_text(name)
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["new"] and list(
        tmp_path.iterdir()
    ) == [tmp_path / "x"]


def test_a_failure_leaves_the_old_folder_and_nothing_else(tmp_path: Path) -> None:
    with replacing_folder(tmp_path / "x") as temporary:
        (temporary / "file").write_text("old")
    with pytest.raises(RuntimeError), replacing_folder(tmp_path / "x") as temporary:
        (temporary / "file").write_text("half")
        raise RuntimeError
    assert (tmp_path / "x" / "file").read_text() == "old" and list(tmp_path.iterdir()) == [
        tmp_path / "x"
    ]


def test_a_file_is_not_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("precious")
    with pytest.raises(StorageError, match="x: Not a directory"), replacing_folder(tmp_path / "x"):
        pass
    assert (tmp_path / "x").read_text() == "precious" and list(tmp_path.iterdir()) == [
        tmp_path / "x"
    ]


def test_the_rest_of_a_killed_folder_is_removed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for left in (".x.part", ".x.old.part"):  # killed before, or between, the two renames
        (tmp_path / left / "deep").mkdir(parents=True)
        (tmp_path / left / "deep" / "file").write_text("half")
        (tmp_path / left / "link").symlink_to(outside)
    with replacing_folder(tmp_path / "x") as temporary:
        assert list(temporary.iterdir()) == []
    assert sorted(tmp_path.iterdir()) == [outside, tmp_path / "x"]


def test_a_second_writer_of_a_folder_is_refused(tmp_path: Path) -> None:
    with replacing_folder(tmp_path / "x") as first:
        (first / "file").write_text("first")
        with (
            pytest.raises(ForgeError, match="another process is writing it"),
            replacing_folder(tmp_path / "x"),
        ):
            pass
    assert (tmp_path / "x" / "file").read_text() == "first"


def test_a_second_name_is_a_link_if_possible_else_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_text("content")
    link_or_copy(tmp_path / "x", tmp_path / "link")
    assert (tmp_path / "link").samefile(tmp_path / "x")

    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    link_or_copy(tmp_path / "x", tmp_path / "copy")
    assert (tmp_path / "copy").read_text() == "content" and not (tmp_path / "copy").samefile(
        tmp_path / "x"
    )


def test_an_error_of_the_disk_is_not_taken_for_a_missing_hard_link(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_text("content")
    monkeypatch.setattr(os, "link", failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        link_or_copy(tmp_path / "x", tmp_path / "copy")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("call", ["link", "replace", "fsync"])
def test_a_second_name_that_fails_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    (tmp_path / "x").write_text("content")
    monkeypatch.setattr(os, call, failing(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        quantize.hard_link(tmp_path / "x", tmp_path / "kept")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_second_name_is_left_out_without_hard_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x").write_text("content")
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    quantize.hard_link(tmp_path / "x", tmp_path / "kept")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_name_that_the_file_has_already_leaves_no_other(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("content")
    for _ in range(2):
        give_name(tmp_path / "x", tmp_path / "published")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["published", "x"]


def test_a_link_that_is_there_already_leaves_no_other_name(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("content")
    for _ in range(2):
        link(tmp_path / "x", tmp_path / "y")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x", "y"]


def failing(number: int, *calls: int) -> Callable[..., None]:
    """A system call that fails, always or at these calls of it, counted from 0."""
    counted = itertools.count()

    def fail(*arguments: Path) -> None:
        if next(counted) in calls or not calls:
            raise OSError(number, os.strerror(number), str(arguments[0]))
        arguments[0].rename(arguments[1])

    return fail


@pytest.mark.parametrize("call", [0, 1])
def test_an_old_folder_is_put_back_if_a_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int
) -> None:
    with replacing_folder(tmp_path / "x") as temporary:
        (temporary / "file").write_text("old")
    monkeypatch.setattr(os, "replace", failing(errno.EIO, call))
    with (
        pytest.raises(OSError, match="Input/output error"),
        replacing_folder(tmp_path / "x") as new,
    ):
        (new / "file").write_text("new")
    assert (tmp_path / "x" / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_the_folder_that_was_replaced_goes_even_if_the_last_flush_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with replacing_folder(tmp_path / "x") as temporary:
        (temporary / "file").write_text("old")
    flushes = 3  # the file, the temporary folder, and the folder around it
    monkeypatch.setattr(os, "fsync", failing_flush(flushes))
    with (
        pytest.raises(OSError, match="Input/output error"),
        replacing_folder(tmp_path / "x") as new,
    ):
        (new / "file").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def failing_flush(number: int) -> Callable[[int], None]:
    """An fsync whose call with this number, from 1, fails."""
    counted = itertools.count(1)

    def flush(_: int) -> None:
        if next(counted) == number:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    return flush


def test_json_is_stable_text(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"b": 1, "a": "é"})
    assert (tmp_path / "x.json").read_text() == '{\n "b": 1,\n "a": "é"\n}\n'
