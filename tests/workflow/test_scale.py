"""The largest model, by its headers alone: forecast and dry run are quick, and small in memory."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import CHECKPOINTS
from repository import Repository
from sparse import write_397b

SECONDS = 60
MEMORY = 10**9
PIECES = 8
VARIANTS = {"Q8_0": 428.5, "Q4_K_M": 247.0, "IQ4_XS": 221.0}  # GB, as docs/sizing.md says


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, toolchain: Path) -> Repository:
    folder = tmp_path_factory.mktemp("scale")
    write_397b(folder / "397b")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINTS / "tiny-qwen3.5" / name, folder / "397b" / name)
    made = Repository(folder / "repository", toolchain)
    model = {
        "source": {"path": str(folder / "397b")},
        "tokenizer_pre": "qwen35",
        "pieces": PIECES,
        "variants": {name: {} for name in VARIANTS},
    }
    made.config["models"] = {"qwen3.5-397b-a17b": model}
    made.write_config()
    return made


# A program inherits the peak of the process that started it, so the tests, which are large by now,
# do not start what they measure themselves.
MEASURE = """
import os, subprocess, sys
process = subprocess.Popen(sys.argv[1:])
_, status, usage = os.wait4(process.pid, 0)
print(status, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024, file=sys.stderr)
"""


def run(repository: Repository, *command: str) -> str:
    """Run Python within the limits of time and memory, and return its output."""
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, sys.executable, *command],
        cwd=repository.path,
        capture_output=True,
        text=True,
        check=True,
    )
    output = ran.stdout + ran.stderr
    status, seconds, memory = ran.stderr.splitlines()[-1].split()
    assert status == "0", output
    assert float(seconds) < SECONDS
    assert int(memory) < MEMORY
    return output


def test_the_largest_model_is_forecast_from_its_headers(repository: Repository) -> None:
    text = run(repository, "workflow/scripts/plan.py")
    found = {name: float(size) for name, size in re.findall(r"397b-(\S+) +\| +([0-9.]+) GB", text)}
    assert found == pytest.approx(VARIANTS, rel=1e-3)
    assert "warning: too little disk" in text
    assert max(len(line) for line in text.splitlines() if line.startswith("|")) <= 100


def test_the_largest_model_has_a_dry_run_with_all_pieces(repository: Repository) -> None:
    text = run(repository, "-m", "snakemake", "--cores", "16", "--dry-run", "all")
    assert re.search(rf"^piece +{PIECES * len(VARIANTS)}$", text, re.MULTILINE)
