"""Run every command of README and tour in a copy of the repository with its built results."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from conftest import ROOT
from pages import Command, commands

pytestmark = pytest.mark.alone  # `make` measures speeds on all processors

STORY = "tests/workflow/test_stories.py runs it"
NOT_RUN = {
    "make test": "runs this test",
    "make quant REPO=Qwen/Qwen3.5-4B TYPE=IQ4_XS": STORY,
    "make inject BASE=OWNER/NAME-GGUF:Q4_K_M SOURCE=Qwen/Qwen3.5-4B": STORY,
    "make add REPO=Qwen/Qwen3.5-4B PRESET=publisher MEASURE=1 PUBLISH=OWNER/NAME-MTP-GGUF": STORY,
    "make publish": STORY,
}
"""Lines that are not run here, and why; `tests/workflow/test_docs.py` parses them."""

MAKE = ["make", "-o", "setup", "-o", "setup-test"]
"""Skips the setup: the environment is the one that runs the tests."""


@pytest.fixture(scope="module")
def copy(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The repository with its built files, but without environments."""
    folder = tmp_path_factory.mktemp("tour") / "mtpforge"
    folder.mkdir()
    left_out = (".git", ".venv", ".venv-lock", ".pytest_cache", ".mypy_cache", ".ruff_cache")
    names = [str(path) for path in built.iterdir() if path.name not in (*left_out, "resources")]
    subprocess.run(["cp", "-a", *names, str(folder)], check=True)
    shutil.copytree(built / "resources/toolchain", folder / "resources/toolchain")
    return folder


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "PATH": path, "HF_HOME": str(tmp_path)}


def test_the_tables_match_the_summary(built: Path) -> None:
    """Sizes and types: acceptance can differ by a token between processors, and speed differs."""
    made = _rows(built / "results/summary.md")
    assert made == _rows(ROOT / "docs/tour.md")
    shown = _rows(ROOT / "README.md")
    assert shown and shown <= made


def _rows(page: Path) -> set[tuple[str, ...]]:
    """File, size, bits per weight and head type of each row of a table of files."""
    lines = re.findall(r"^\| [\w.-]+\.gguf .*\|$", page.read_text(), re.MULTILINE)
    return {tuple(cell.strip() for cell in line.split("|")[1:5]) for line in lines}


def test_every_skipped_line_exists() -> None:
    assert NOT_RUN.keys() <= {_bare(command) for page in _pages() for command in commands(page)}


def test_the_commands_of_the_readme(copy: Path, environment: dict[str, str]) -> None:
    for command in commands(ROOT / "README.md"):
        run(command, copy, environment)


def test_the_commands_of_the_tour(copy: Path, environment: dict[str, str]) -> None:
    for command in commands(ROOT / "docs/tour.md"):
        run(command, copy, environment)
    log = (copy / "logs/mine/quantized-Q4_K_M.log").read_text()
    assert "reused 62 of 70 tensors" in log and "quantized 8" in log
    assert (copy / "report.html").exists()


def _pages() -> list[Path]:
    return [ROOT / "README.md", ROOT / "docs/tour.md"]


def _bare(command: Command) -> str:
    return " ".join(command.words)


def run(command: Command, folder: Path, environment: dict[str, str]) -> str:
    """Run a line like a reader; it may fail only if the page says so. Returns its output."""
    program, *arguments = command.words
    if _bare(command) in NOT_RUN or program in (
        "export",
        "curl",
    ):  # curl: what the server that drafts is asked
        return ""
    if program.endswith("llama-server"):
        return drafts(command.words, folder)
    words = [*MAKE, *arguments] if program == "make" else command.words
    done = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, timeout=900
    )
    said = done.stdout + done.stderr
    assert (done.returncode != 0) == command.fails, f"{command.line}\n{said[-4000:]}"
    return said


def drafts(words: list[str], folder: Path) -> str:
    """Start the server on a free port, send the request of the tour, and check drafts."""
    with started(words, folder) as address:
        (curl,) = [c.words for c in commands(ROOT / "docs/tour.md") if c.words[0] == "curl"]
        asked = [
            word.replace("http://127.0.0.1:8080", address) for word in [*curl, "--noproxy", "*"]
        ]
        answer = json.loads(subprocess.run(asked, capture_output=True, check=True).stdout)
        assert answer["timings"]["draft_n_accepted"] > 0
    return ""


@contextmanager
def started(words: list[str], folder: Path) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen(
        [*words, "--host", "127.0.0.1", "--port", str(port)], cwd=folder, **quiet
    )
    try:
        address = f"http://127.0.0.1:{port}"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not _healthy(address):
            assert server.poll() is None, "llama-server ended"
            time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait()


def _healthy(address: str) -> bool:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            f"{address}/health", timeout=5
        ) as answer:
            return answer.status == 200
    except OSError:
        return False
