"""Shared fixtures: the repository, its built results, and a way to run a program as a user does."""

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from environments import make_environment

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "workflow" / "scripts"
CHECKPOINTS = ROOT / "tests" / "checkpoints"
BIN = ROOT / "resources" / "toolchain" / "bin"
MODELS = ("tiny-qwen3.5", "tiny-qwen3.5-moe")
ALONE = ("end_to_end", "workflow")
BESIDE_OTHERS = ("test_quantizing_in_pieces.py",)  # six minutes of llama-quantize, and no server

os.environ["MTPFORGE_FORECAST"] = "told"  # it takes seconds, in each run

Run = Callable[..., "subprocess.CompletedProcess[str]"]
Snakemake = Callable[..., None]


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Builds and servers need the machine for themselves, as `make test` tells by this marker."""
    for item in items:
        if item.path.parent.name in ALONE and item.path.name not in BESIDE_OTHERS:
            item.add_marker(pytest.mark.alone)


@pytest.fixture(scope="session")
def run() -> Run:
    """Run a program of workflow/scripts: `run("convert.py", checkpoint, "--out", out)`."""

    def call(program: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, str(SCRIPTS / program), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=600)

    return call


@pytest.fixture(scope="session")
def snakemake(tmp_path_factory: pytest.TempPathFactory) -> Snakemake:
    """Run Snakemake in the repository: `snakemake("all")`.

    The processes of pytest-xdist, whose folders are in one, do so one after the other.
    """
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    lock = folder / "snakemake.lock"

    def call(*arguments: str) -> None:
        command = [sys.executable, "-m", "snakemake", "--cores", "all", *arguments]
        with lock.open("w") as held:
            fcntl.flock(held, fcntl.LOCK_EX)
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]

    return call


@pytest.fixture(scope="session")
def built(snakemake: Snakemake) -> Path:
    """The repository after real Snakemake has built config.yaml (nothing to do after `make`)."""
    snakemake("all")
    return ROOT


@pytest.fixture(scope="session")
def toolchain(snakemake: Snakemake) -> Path:
    """The folder of llama.cpp programs."""
    snakemake("toolchain")
    return BIN


@pytest.fixture(scope="session")
def of_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The environment that `make setup` makes, without what only the tests need: its `bin`."""
    return make_environment(tmp_path_factory.mktemp("environment") / "venv", ROOT / "envs/run.txt")


@pytest.fixture
def terminal_signals() -> Iterator[None]:
    """SIGINT and SIGHUP as in a terminal, also for tests that `&` or `nohup` started."""
    defaults = {signal.SIGINT: signal.default_int_handler, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in defaults.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


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
