"""A quantization is done once, by real Snakemake: in pieces that outlive a kill, and with what finished files have already."""

import copy
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from repository import CONFIG, Repository

MODEL = "results/tiny-qwen3.5"
VARIANTS: dict[str, Any] = {"Q4_K_S": {}, "mix": {"type": "Q4_K_S", "tensors": {"attn_qkv": "Q6_K"}, "pieces": 3}}
AFTER = {"verify": 1, "summary": 1, "provenance": 1, "card": 1, "sums": 1}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, toolchain: Path) -> Repository:
    made = Repository(tmp_path_factory.mktemp("pieces") / "repository", toolchain)
    set_variants(made, VARIANTS)
    jobs = {"toolchain": 1, "convert": 1, "materials": 1, "acceptance": 1, "recipe": 2, "plan": 2, "piece": 3, "quantize": 2}
    assert made.pending() == {**jobs, "verify": 2, "summary": 1, "provenance": 2, "card": 1, "sums": 1}
    run(made)
    return made


def set_variants(repository: Repository, variants: dict[str, Any]) -> None:
    repository.config["models"] = {"tiny-qwen3.5": {**CONFIG["models"]["tiny-qwen3.5"], "variants": variants}}
    repository.write_config()


def run(repository: Repository, *arguments: str) -> Counter[str]:
    """How many jobs of each rule a run has had, `all` left out."""
    done = repository.snakemake(*arguments)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rules = [line.rstrip(")").rsplit("Rule: ", 1)[1] for line in done.stderr.splitlines() if line.startswith("Finished jobid: ")]
    return Counter(rule for rule in rules if rule != "all")


def log(repository: Repository, name: str) -> str:
    return (repository.path / f"logs/tiny-qwen3.5/{name}.log").read_text().splitlines()[-1]


def test_a_file_in_pieces_is_made_of_them(repository: Repository) -> None:
    said = [log(repository, f"piece-quantized-mix-{i}-of-3") for i in (1, 2, 3)]
    assert "; quantized 0" in log(repository, "quantized-mix") and repository.pending() == {}
    assert all(line.startswith("reused ") for line in said)


def test_a_changed_recipe_costs_its_tensors(repository: Repository) -> None:
    variants = copy.deepcopy(VARIANTS)
    variants["mix"] = {"type": "Q4_K_S", "tensors": {"attn_qkv": "Q3_K"}}
    set_variants(repository, variants)
    assert run(repository) == {"recipe": 1, "plan": 1, "quantize": 1, **AFTER}
    line = log(repository, "quantized-mix")
    assert "67 of 70 tensors" in line and line.endswith("; quantized 3"), line
    expected = (repository.path / MODEL / "tiny-qwen3.5-mix.gguf").read_bytes()
    program, source = "resources/toolchain/bin/llama-quantize", repository.path / MODEL / "work/convert/all.gguf"
    patterns = ("--tensor-type", r"blk\.4\.=q8_0", "--tensor-type", "attn_qkv=q3_k")
    plain = [repository.path / program, *patterns, source, repository.path / "plain.gguf", "Q4_K_S"]
    subprocess.run(list(map(str, plain)), check=True, capture_output=True)
    assert (repository.path / "plain.gguf").read_bytes() == expected
    (repository.path / "plain.gguf").unlink()


def test_a_change_that_changes_no_type_quantizes_nothing(repository: Repository) -> None:
    """What is planned anew is compared by what it says; the recipe itself is what the file is verified against."""
    variants = copy.deepcopy(VARIANTS)
    variants["mix"] = {"type": "Q4_K_S", "tensors": {"attn_qkv.weight": "Q3_K"}}
    set_variants(repository, variants)
    assert run(repository) == {"recipe": 1, "plan": 1, **AFTER}
    assert repository.pending() == {}


def test_a_killed_run_keeps_its_finished_pieces(repository: Repository) -> None:
    set_variants(repository, {**VARIANTS, "IQ3_S": {"pieces": 4}})
    folder = repository.path / MODEL / "work/manifests/pieces/quantized/IQ3_S"
    process = subprocess.Popen(
        [sys.executable, "-m", "snakemake", "--cores", "1", f"{MODEL}/tiny-qwen3.5-IQ3_S.gguf"],
        cwd=repository.path, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while len(list(folder.glob("*.json"))) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    finished = len(list(folder.glob("*.json")))
    assert 2 <= finished < 4 and not (repository.path / MODEL / "work/quantized/IQ3_S.gguf").exists()
    assert repository.snakemake("--unlock").returncode == 0
    jobs = run(repository, "--until", "quantize")
    assert jobs["quantize"] >= 1 and jobs["piece"] <= 3 + 4 - finished + 1, jobs  # one may have been in the making
    assert "; quantized 0" in log(repository, "quantized-IQ3_S")
