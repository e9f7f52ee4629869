"""Variables of the environment change no byte of what a program writes, and break none."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CHECKPOINTS, ROOT, SCRIPTS

PROGRAMS = sorted(path.name for path in SCRIPTS.glob("*.py") if path.name != "run_upstream.py")
STRICT = {
    "PYTHONSAFEPATH": "1",
    "PYTHONOPTIMIZE": "2",
    "PYTHONWARNINGS": "error",
    "PYTHONUTF8": "0",
    "PYTHONHASHSEED": "3",
    "PYTHONIOENCODING": "utf-16",
    "PYTHONINSPECT": "1",
    "LC_ALL": "C",
    "TZ": "Asia/Tokyo",
    "USER": "another",
    "HOME": "/nonexistent",
    "HF_ENDPOINT": "http://x",
}


def convert(
    out: Path, *options: str, umask: int = 0o022, cwd: Path = ROOT, **variables: str
) -> bytes:
    command = [sys.executable, str(SCRIPTS / "convert.py"), str(CHECKPOINTS / "tiny-qwen3.5")]
    command += ["--part", "draft", "--tokenizer-pre", "qwen35", "--out", str(out), *options]
    done = subprocess.run(
        command,
        capture_output=True,
        cwd=cwd,
        umask=umask,
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr.decode()
    return out.read_bytes()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return convert(tmp_path_factory.mktemp("plain") / "draft.gguf")


def test_another_gguf_is_not_imported(tmp_path: Path, plain: bytes) -> None:
    (tmp_path / "gguf.py").write_text("raise SystemExit('another gguf')")
    assert convert(tmp_path / "a.gguf", PYTHONPATH=str(tmp_path)) == plain
    assert convert(tmp_path / "b.gguf", cwd=tmp_path) == plain


def test_variables_of_python_change_nothing(tmp_path: Path, plain: bytes) -> None:
    assert convert(tmp_path / "out.gguf", "--threads", "1", cwd=tmp_path, **STRICT) == plain


@pytest.mark.parametrize(("umask", "mode"), [(0o077, 0o600), (0o002, 0o664), (0o022, 0o644)])
def test_the_umask_decides_permissions_alone(
    tmp_path: Path, plain: bytes, umask: int, mode: int
) -> None:
    assert convert(tmp_path / "out.gguf", umask=umask) == plain
    assert (tmp_path / "out.gguf").stat().st_mode & 0o777 == mode


def test_every_program_starts_without_its_folder_on_the_path() -> None:
    started = [
        subprocess.Popen(
            [sys.executable, str(SCRIPTS / name), "--help"],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env={**os.environ, **STRICT},
        )
        for name in PROGRAMS
    ]
    for name, process in zip(PROGRAMS, started, strict=True):
        said = process.communicate()[0].decode()
        assert process.returncode == 0 and said.startswith("usage: "), (name, said)
