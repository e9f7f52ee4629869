"""The largest model, by its headers alone: forecast and dry run are quick, and small in memory."""

import os
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


def run(repository: Repository, *command: str) -> str:
    """Run Python within the limits of time and memory, and return its output."""
    out = repository.path / "out.txt"
    with out.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=repository.path, stdout=file, stderr=subprocess.STDOUT
        )
        _, status, usage = os.wait4(process.pid, 0)
    assert status == 0, out.read_text()
    assert usage.ru_utime + usage.ru_stime < SECONDS
    assert usage.ru_maxrss * 1024 < MEMORY
    return out.read_text()


def test_the_largest_model_is_forecast_from_its_headers(repository: Repository) -> None:
    text = run(repository, "workflow/scripts/plan.py")
    found = {name: float(size) for name, size in re.findall(r"397b-(\S+) +\| +([0-9.]+) GB", text)}
    assert found == pytest.approx(VARIANTS, rel=1e-3)
    assert "warning: too little disk" in text


def test_the_largest_model_has_a_dry_run_with_all_pieces(repository: Repository) -> None:
    text = run(repository, "-m", "snakemake", "--cores", "16", "--dry-run", "all")
    assert re.search(rf"^piece +{PIECES * len(VARIANTS)}$", text, re.MULTILINE)
