"""Without Snakemake's records of earlier runs, times alone decide; `--touch` makes both anew."""

import os
import random
import re
import shutil
from pathlib import Path

import pytest
from repository import Repository

TARGET = "results/tiny-qwen3.5/work/quantized/Q8_0.json"
NOT_KEPT = ("convert/all.gguf", "quantized/Q8_0.gguf")
"""Files that `--delete-temp-output` deletes."""


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, toolchain: Path) -> Repository:
    """A copy in which one file has been made, without records, whose files have times of chance."""
    copy = Repository(tmp_path_factory.mktemp("lost") / "copy", toolchain)
    done = copy.snakemake(target=TARGET)
    assert done.returncode == 0, done.stdout + done.stderr
    work = (copy.path / TARGET).parents[1]
    for name in NOT_KEPT:
        (work / name).unlink()
    assert jobs(copy) == set()
    shutil.rmtree(copy.path / ".snakemake")
    assert jobs(copy) == set()
    files = sorted(path for path in copy.path.rglob("*") if path.is_file())
    random.Random(1).shuffle(files)
    for number, path in enumerate(files):
        os.utime(path, (1_700_000_000 + number, 1_700_000_000 + number))
    return copy


def jobs(copy: Repository) -> set[str]:
    """The rules that a run would run."""
    done = copy.snakemake("--dry-run", target=TARGET)
    assert done.returncode == 0, done.stdout + done.stderr
    return set(re.findall(r"^(\w+) +\d+$", done.stdout, re.MULTILINE)) - {"total"}


def test_touch_ends_the_reruns_and_later_changes_are_noticed(quantized: Repository) -> None:
    assert {"convert", "quantize"} <= jobs(quantized)
    before = (quantized.path / TARGET).read_bytes()
    done = quantized.snakemake("--touch", target=TARGET)
    assert done.returncode == 0, done.stdout + done.stderr
    assert jobs(quantized) == set()
    assert (quantized.path / TARGET).read_bytes() == before
    quantized.config["models"]["tiny-qwen3.5"]["variants"]["Q8_0"] = {"head": "BF16"}
    quantized.write_config()
    assert {"plan_types", "quantize"} <= jobs(quantized)
