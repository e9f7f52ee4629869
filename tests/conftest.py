"""Shared fixtures: the repository, its built results, and a way to run a program as a user does."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "workflow" / "scripts"
CHECKPOINTS = ROOT / "tests" / "checkpoints"
BIN = ROOT / "resources" / "toolchain" / "bin"
MODELS = ("tiny-qwen3.5", "tiny-qwen3.5-moe")

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="session")
def run() -> Run:
    """Run a program of workflow/scripts: `run("convert.py", checkpoint, "--out", out)`."""

    def call(program: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, str(SCRIPTS / program), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)

    return call


@pytest.fixture(scope="session")
def built() -> Path:
    """The repository after real Snakemake has built config.yaml (nothing to do after `make`)."""
    _snakemake("all")
    return ROOT


@pytest.fixture(scope="session")
def toolchain() -> Path:
    """The folder of llama.cpp programs."""
    _snakemake("toolchain")
    return BIN


def _snakemake(target: str) -> None:
    command = [sys.executable, "-m", "snakemake", "--cores", "all", target]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture
def fails(run: Run) -> Callable[..., str]:
    """Run a program that must refuse its input, and return its message.

    Exit code 1, at most two lines, no traceback, no output and no temporary file.
    """

    def call(program: str, *arguments: object, out: Path) -> str:
        done = run(program, *arguments, "--out", out)
        assert done.returncode == 1, done.stdout + done.stderr
        assert done.stderr.startswith("error: ") and "Traceback" not in done.stderr
        assert len(done.stderr.splitlines()) <= 2
        assert not out.exists()
        assert [path.name for path in out.parent.glob(f".{out.name}*")] == []
        return done.stderr

    return call
