"""Real Snakemake quantizes a tensor once: pieces survive a kill, and finished files are reused."""

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
VARIANTS: dict[str, Any] = {
    "Q4_K_S": {},
    "mix": {"type": "Q4_K_S", "tensors": {"attn_qkv": "Q6_K"}, "pieces": 3},
}
AFTER = {"verify": 1, "summary": 1, "provenance": 1, "card": 1, "sums": 1}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, toolchain: Path) -> Repository:
    made = Repository(tmp_path_factory.mktemp("pieces") / "repository", toolchain)
    set_variants(made, VARIANTS)
    jobs = {
        "program": 5,
        "toolchain": 1,
        "convert": 1,
        "local_files": 1,
        "materials": 1,
        "acceptance": 1,
        "recipe": 2,
        "plan_types": 2,
        "piece": 3,
        "quantize": 2,
    }
    assert made.pending() == {
        **jobs,
        "verify": 2,
        "summary": 1,
        "provenance": 2,
        "card": 1,
        "sums": 1,
    }
    run(made)
    return made


def set_variants(repository: Repository, variants: dict[str, Any], **model: Any) -> None:
    repository.config["models"] = {
        "tiny-qwen3.5": {**CONFIG["models"]["tiny-qwen3.5"], "variants": variants, **model}
    }
    repository.write_config()


def run(repository: Repository, *arguments: str, target: str = "all") -> Counter[str]:
    """Run Snakemake; the number of finished jobs of each rule except `all`."""
    done = repository.snakemake("--verbose", *arguments, target=target)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    rules = [
        line.rstrip(")").rsplit("Rule: ", 1)[1]
        for line in done.stderr.splitlines()
        if line.startswith("Finished jobid: ")
    ]
    return Counter(rule for rule in rules if rule != "all")


def log(repository: Repository, name: str) -> str:
    return (repository.path / f"logs/tiny-qwen3.5/{name}.log").read_text().splitlines()[-1]


def quantized(repository: Repository, name: str) -> int:
    """The number of tensors that a job has quantized, by its log."""
    return int(log(repository, name).rsplit("; quantized ", 1)[1])


def test_a_file_is_assembled_from_its_pieces(repository: Repository) -> None:
    """And from tensors of the other variant; the pieces are then deleted."""
    in_pieces = sum(quantized(repository, f"piece-quantized-mix-{i}-of-3") for i in (1, 2, 3))
    line = log(repository, "quantized-mix")
    assert in_pieces >= 3, line
    assert line.endswith(f"; {in_pieces} from pieces; quantized 0"), line
    assert line.startswith(f"reused {70 - in_pieces} of 70 tensors "), line
    assert not (repository.path / MODEL / "work/manifests/pieces/quantized/mix").exists()
    assert repository.pending() == {}


def test_a_target_with_an_unknown_name_is_refused(repository: Repository) -> None:
    why = {"quantized/nothing": "MissingRuleException", "trunk/Q9_K": "MissingRuleException"}
    why |= {
        "quantized/IQ1_S": "variants has no IQ1_S",
        "trunk/mix": "unknown quantization type 'mix'",
    }
    for name, reason in why.items():
        done = repository.snakemake("--dry-run", target=f"{MODEL}/work/{name}.gguf")
        said = done.stdout + done.stderr
        assert done.returncode, said
        assert reason in said, said
        assert "KeyError" not in said, said


def test_a_changed_recipe_requantizes_its_tensors(repository: Repository) -> None:
    variants = copy.deepcopy(VARIANTS)
    variants["mix"] = {"type": "Q4_K_S", "tensors": {"attn_qkv": "Q3_K"}}
    set_variants(repository, variants)
    assert run(repository) == {"recipe": 1, "plan_types": 1, "quantize": 1, **AFTER}
    line = log(repository, "quantized-mix")
    assert line.startswith("reused 67 of 70 tensors "), line
    assert line.endswith("; quantized 3"), line
    expected = (repository.path / MODEL / "tiny-qwen3.5-mix.gguf").read_bytes()
    program = repository.path / "resources/toolchain/bin/llama-quantize"
    source = repository.path / MODEL / "work/convert/all.gguf"
    plain = repository.path / "plain.gguf"
    patterns = ("--tensor-type", r"blk\.4\.=q8_0", "--tensor-type", "attn_qkv=q3_k")
    command = [program, *patterns, source, plain, "Q4_K_S"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    assert plain.read_bytes() == expected
    plain.unlink()


def test_a_recipe_with_equal_types_quantizes_nothing(repository: Repository) -> None:
    """The new plan equals the old one. The file is verified again, because that uses the recipe."""
    variants = copy.deepcopy(VARIANTS)
    variants["mix"] = {"type": "Q4_K_S", "tensors": {"attn_qkv.weight": "Q3_K"}}
    set_variants(repository, variants)
    assert run(repository) == {"recipe": 1, "plan_types": 1, **AFTER}
    assert repository.pending() == {}


def test_a_recipe_changed_after_a_failed_verification_requantizes_its_tensors(
    repository: Repository,
) -> None:
    """The file that failed is reused, and deleted once the next one passes."""
    variant = {"type": "IQ4_XS", "tensors": {"attn_qkv": "Q6_K"}}
    file = f"{MODEL}/tiny-qwen3.5-lone.gguf"
    set_variants(repository, {**VARIANTS, "lone": variant}, min_acceptance=1)
    done = repository.snakemake(target=file)
    assert done.returncode, done.stderr[-3000:]
    assert "drafting" in done.stderr, done.stderr[-3000:]
    assert not (repository.path / file).exists()
    kept = repository.path / MODEL / "work/manifests/quantized/lone.gguf"
    assert kept.exists()
    set_variants(repository, {**VARIANTS, "lone": {**variant, "tensors": {"attn_qkv": "Q5_0"}}})
    done = repository.snakemake(target=file)
    assert done.returncode == 0, done.stderr[-3000:]
    line = log(repository, "quantized-lone")
    assert line.startswith("reused 67 of 70 tensors "), line
    assert line.endswith("; quantized 3"), line
    assert (repository.path / file).exists()
    assert not kept.exists()


def test_a_recipe_changed_between_two_pieces_requantizes_its_tensors(
    repository: Repository,
) -> None:
    variant = {"type": "IQ4_NL", "tensors": {"attn_qkv": "Q6_K"}, "pieces": 3}
    set_variants(repository, {**VARIANTS, "lone": variant})
    for number in (1, 2):
        done = repository.snakemake(target=f"{MODEL}/work/pieces/quantized/lone/{number}-of-3.json")
        assert done.returncode == 0, done.stderr[-3000:]
    before = sum(quantized(repository, f"piece-quantized-lone-{i}-of-3") for i in (1, 2))
    set_variants(repository, {**VARIANTS, "lone": {**variant, "tensors": {"attn_qkv": "Q5_1"}}})
    done = repository.snakemake(target=f"{MODEL}/work/quantized/lone.gguf")
    assert done.returncode == 0, done.stderr[-3000:]
    after = sum(quantized(repository, f"piece-quantized-lone-{i}-of-3") for i in (1, 2, 3))
    made = int(log(repository, "quantized-lone").split(" from pieces; ")[0].rsplit(" ", 1)[1])
    assert before > 10
    assert before + after <= made + 3, (before, after, made)
    assert quantized(repository, "quantized-lone") == 0


def test_a_killed_run_keeps_its_finished_pieces(repository: Repository) -> None:
    set_variants(repository, {"IQ3_S": {"pieces": 4}})
    work = repository.path / MODEL / "work"
    process = subprocess.Popen(
        [sys.executable, "-m", "snakemake", "--cores", "1", f"{MODEL}/tiny-qwen3.5-IQ3_S.gguf"],
        cwd=repository.path,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def finished() -> dict[str, int]:
        paths = (work / "pieces/quantized/IQ3_S").glob("*.json")
        return {path.stem: path.stat().st_mtime_ns for path in paths}

    deadline = time.monotonic() + 300
    while len(finished()) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = finished()
    assert 2 <= len(before) < 4
    assert not (work / "quantized/IQ3_S.gguf").exists()
    # The target is a file, because --until with a checkpoint can find nothing to do.
    jobs = run(repository, target=f"{MODEL}/work/quantized/IQ3_S.gguf")
    again = [name for name, written in finished().items() if before.get(name, written) != written]
    assert jobs["quantize"] == 1, jobs
    assert jobs["piece"] == 4 - len(before) + len(again), jobs
    # The last piece runs again, with nothing to quantize, if Snakemake had not recorded its end.
    assert len(again) <= 1
    assert all(quantized(repository, f"piece-quantized-IQ3_S-{name}") == 0 for name in again)
    assert quantized(repository, "quantized-IQ3_S") == 0


def test_the_default_number_of_pieces_is_planned_once(repository: Repository) -> None:
    """A later run with another number of cores has nothing to do."""
    library = repository.path / "workflow/scripts/mtpforge/quantize/piece_count.py"
    code = library.read_text()
    assert "PIECE_SECONDS = 2 * 3600" in code
    library.write_text(code.replace("PIECE_SECONDS = 2 * 3600", "PIECE_SECONDS = 1e-3"))
    del repository.config["threads"]  # so that the number of cores decides
    set_variants(repository, {"Q5_1": {}})
    target = f"{MODEL}/work/quantized/Q5_1.gguf"
    done = repository.snakemake("--verbose", target=target)
    assert done.returncode == 0, done.stderr[-3000:]
    number = int((repository.path / MODEL / "work/plans/quantized/Q5_1.pieces").read_text())
    assert 2 <= number < 100
    assert done.stderr.count("Rule: piece)") == number
    assert quantized(repository, "quantized-Q5_1") == 0
    done = repository.snakemake("--cores", "1", "--dry-run", target=target)
    assert done.returncode == 0, done.stderr
    assert "Nothing to be done" in done.stdout + done.stderr
