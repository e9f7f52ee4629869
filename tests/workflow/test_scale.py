"""The largest model, by its headers alone: forecast and dry run are quick, and small in memory."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from conftest import CHECKPOINTS, ROOT
from mtpforge.checkpoint.checkpoint import Checkpoint
from mtpforge.forecast.costs import Machine
from mtpforge.forecast.steps import ModelForecast, ShardByShardForecast
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.rules.build import Build
from repository import Repository
from sparse import write_397b

NAME = "qwen3.5-397b-a17b"
SECONDS = 60
MEMORY = 10**9
PAGE = (ROOT / "docs/scale.md").read_text(encoding="utf-8")
PIECES = 24
MACHINE = Machine(threads=16, memory=640 * 10**9, disk=0.5e9, bandwidth=200e9)
FAST_DISK = 3e9
NETWORK = 0.1e9
SHARDS = 807e9  # with the vision tower, which the headers here leave out
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
    made.config["models"] = {NAME: model}
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
    total = re.search(r"^total +(\d+)$", text, re.MULTILINE)
    assert total and f"a dry run of its {total[1]} jobs" in " ".join(PAGE.split())


def table() -> dict[str, list[str]]:
    """The rows of the page's table of stages, by their first words."""
    rows = [line.split("|")[1:-1] for line in PAGE.splitlines() if line.startswith("| ")]
    cells = [[cell.strip(" *") for cell in row] for row in rows]
    return {re.split(r" to | \d|, ", row[0])[0]: row for row in cells if len(row) == 5}


def test_the_page_says_what_is_forecast(repository: Repository, toolchain: Path) -> None:
    model = Build(repository.config).config.models[NAME]
    example = re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert example
    described = yaml.safe_load(example[1])["models"][NAME]
    assert described["pieces"] == model.pieces and described["variants"].keys() == VARIANTS.keys()
    slow, fast, computing, by_shards = (
        kind(
            model,
            Checkpoint(Path(model.source.path)),
            LlamaCpp(toolchain),
            machine=replace(MACHINE, disk=disk),
            given_size=lambda _: 0,
        )
        for kind, disk in (
            (ModelForecast, MACHINE.disk),
            (ModelForecast, FAST_DISK),
            (ModelForecast, float("inf")),
            (ShardByShardForecast, MACHINE.disk),
        )
    )
    results = sum(file.bytes for file in slow.files)
    expected = {
        "fetch": ("", *[f"{SHARDS / NETWORK / 3600:.2f}"] * 2),
        "upload": ("", *[f"{results / NETWORK / 3600:.2f}"] * 2),
    }
    together = [(SHARDS + results) / NETWORK] * 2
    for steps in zip(slow.steps, fast.steps, strict=True):
        if steps[0].stage == "local_files":  # the page's checkpoint is the Hub's
            continue
        name = "" if steps[0].stage == "convert" else steps[0].name.rpartition("-")[2]
        size = f"{steps[0].memory / 1e9:.{0 if steps[0].memory > 1e10 else 1}f} GB"
        hours = [f"{step.reckoned / 3600:.2f}" for step in steps]
        expected[f"{steps[0].stage} {name}".strip()] = (size, *hours)
        together = [a + step.reckoned for a, step in zip(together, steps, strict=True)]
    expected["together"] = ("", *(f"{seconds / 3600:.1f}" for seconds in together))
    rows = table()
    assert {name: tuple(rows[name][1:4]) for name in expected} == expected

    def hours(forecast: ModelForecast) -> str:
        seconds = [step.reckoned for step in forecast.steps if step.stage != "local_files"]
        return f"{sum(seconds) / 3600:.1f}"

    said = " ".join(PAGE.split())
    assert f"would take {hours(computing)} of these {hours(slow)} hours" in said
    assert f"of 3 GB/s they take {hours(fast)}, and" in said
    assert f"{(SHARDS + slow.peak) / 1e12:.1f} TB at the peak" in said
    assert f"frees the shards, {(SHARDS + slow.peak - slow.freed('all')[0]) / 1e12:.1f} TB" in said
    most, shards = by_shards.by_shards("all")
    assert f"no BF16 file either, {(SHARDS - shards + most) / 1e12:.2f} TB" in said
    assert f"results {results / 1e9:.0f} GB, and up to {slow.scratch / 1e9:.0f} GB while" in said
