"""A file appears whole or not at all."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SCRIPTS
from mtpforge.atomic import replacing, write_json
from mtpforge.errors import ForgeError


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "x"
    target.write_text("old")
    with pytest.raises(RuntimeError), replacing(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_a_kill_leaves_the_old_file(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys; from pathlib import Path; from mtpforge.atomic import replacing\n"
        "with replacing(Path(sys.argv[1])) as t: t.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    target = tmp_path / "x"
    target.write_text("old")
    done = subprocess.run([sys.executable, "-c", program, str(target)], env={**os.environ, "PYTHONPATH": str(SCRIPTS)})
    assert done.returncode == -signal.SIGKILL and target.read_text() == "old"


def test_what_a_kill_left_is_written_over(tmp_path: Path) -> None:
    test_a_kill_leaves_the_old_file(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # the half-written file lies beside it
    with replacing(tmp_path / "x") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "x").read_text() == "new" and list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_two_writers_of_one_file_do_not_mix(tmp_path: Path) -> None:
    with replacing(tmp_path / "x") as first:
        first.write_text("first")
        with pytest.raises(ForgeError, match="another process is writing it"), replacing(tmp_path / "x"):
            pass
    assert (tmp_path / "x").read_text() == "first"


def test_json_is_stable_text(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"b": 1, "a": "é"})
    assert (tmp_path / "x.json").read_text() == '{\n "b": 1,\n "a": "é"\n}\n'
