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
        "toolchain": 1,
        "convert": 1,
        "materials": 1,
        "acceptance": 1,
        "recipe": 2,
        "plan": 2,
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
    """How many jobs of each rule a run has had, `all` left out."""
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
    """How many tensors a job says that it has quantized."""
    return int(log(repository, name).rsplit("; quantized ", 1)[1])


def test_a_file_in_pieces_is_made_of_them(repository: Repository) -> None:
    """And of what the other variant has had by then; the pieces are gone."""
    in_pieces = sum(quantized(repository, f"piece-quantized-mix-{i}-of-3") for i in (1, 2, 3))
    line = log(repository, "quantized-mix")
    assert (
        in_pieces >= 3
        and line.endswith(f"; {in_pieces} from pieces; quantized 0")
        and f"({70 - in_pieces} of 70 " in line
    ), line
    assert (
        not (repository.path / MODEL / "work/manifests/pieces/quantized/mix").exists()
        and repository.pending() == {}
    )


def test_an_unknown_name_is_no_file_that_can_be_made(repository: Repository) -> None:
    why = {"quantized/nothing": "MissingRuleException", "trunk/Q9_K": "MissingRuleException"}
    why |= {
        "quantized/IQ1_S": "variants has no IQ1_S",
        "trunk/mix": "unknown quantization type 'mix'",
    }
    for name, reason in why.items():
        done = repository.snakemake("--dry-run", target=f"{MODEL}/work/{name}.gguf")
        said = done.stdout + done.stderr
        assert done.returncode and reason in said and "KeyError" not in said, said


def test_a_changed_recipe_costs_its_tensors(repository: Repository) -> None:
    variants = copy.deepcopy(VARIANTS)
    variants["mix"] = {"type": "Q4_K_S", "tensors": {"attn_qkv": "Q3_K"}}
    set_variants(repository, variants)
    assert run(repository) == {"recipe": 1, "plan": 1, "quantize": 1, **AFTER}
    line = log(repository, "quantized-mix")
    assert "67 of 70 tensors" in line and line.endswith("; quantized 3"), line
    expected = (repository.path / MODEL / "tiny-qwen3.5-mix.gguf").read_bytes()
    program, source = (
        "resources/toolchain/bin/llama-quantize",
        repository.path / MODEL / "work/convert/all.gguf",
    )
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


def test_a_recipe_that_is_changed_before_anything_was_published_costs_its_tensors(
    repository: Repository,
) -> None:
    """The file that has not passed its verification is still of use, and is no second copy once the next one has."""
    variant, file = (
        {"type": "IQ4_XS", "tensors": {"attn_qkv": "Q6_K"}},
        f"{MODEL}/tiny-qwen3.5-lone.gguf",
    )
    set_variants(repository, {**VARIANTS, "lone": variant}, min_acceptance=1)
    done = repository.snakemake(target=file)
    assert (
        done.returncode and "drafting" in done.stderr and not (repository.path / file).exists()
    ), done.stderr[-3000:]
    kept = repository.path / MODEL / "work/manifests/quantized/lone.gguf"
    assert kept.exists()
    set_variants(repository, {**VARIANTS, "lone": {**variant, "tensors": {"attn_qkv": "Q5_0"}}})
    done = repository.snakemake(target=file)
    assert done.returncode == 0, done.stderr[-3000:]
    line = log(repository, "quantized-lone")
    assert "67 of 70 tensors" in line and line.endswith("; quantized 3"), line
    assert (repository.path / file).exists() and not kept.exists()


def test_a_recipe_that_is_changed_between_two_pieces_costs_its_tensors(
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
    assert (
        before > 10 and before + after <= made + 3 and quantized(repository, "quantized-lone") == 0
    ), (before, after, made)


def test_a_killed_run_keeps_its_finished_pieces(repository: Repository) -> None:
    set_variants(repository, {"IQ3_S": {"pieces": 4}})
    work = repository.path / MODEL / "work"
    process = subprocess.Popen(
        [sys.executable, "-m", "snakemake", "--cores", "1", f"{MODEL}/tiny-qwen3.5-IQ3_S.gguf"],
        cwd=repository.path, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip

    def finished() -> dict[str, int]:
        return {
            path.stem: path.stat().st_mtime_ns
            for path in (work / "pieces/quantized/IQ3_S").glob("*.json")
        }

    deadline = time.monotonic() + 300
    while len(finished()) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = finished()
    assert 2 <= len(before) < 4 and not (work / "quantized/IQ3_S.gguf").exists()
    assert repository.snakemake("--unlock").returncode == 0
    target = str(
        Path(MODEL, "work/quantized/IQ3_S.gguf")
    )  # --until and a checkpoint can end in nothing to do
    jobs = run(repository, target=target)
    again = [name for name, written in finished().items() if before.get(name, written) != written]
    assert jobs["quantize"] == 1 and jobs["piece"] == 4 - len(before) + len(again), jobs
    assert (
        len(again) <= 1
    )  # the last, where the kill came before Snakemake had noted that it is finished: it has all it needs
    assert all(quantized(repository, f"piece-quantized-IQ3_S-{name}") == 0 for name in again)
    assert quantized(repository, "quantized-IQ3_S") == 0


def test_how_many_pieces_there_are_by_default_is_planned(repository: Repository) -> None:
    """Once: a run with other cores has nothing to do."""
    library = repository.path / "workflow/scripts/mtpforge/quantize/plan.py"
    library.write_text(
        library.read_text().replace("PIECE_SECONDS = 2 * 3600", "PIECE_SECONDS = 1e-3")
    )
    set_variants(repository, {"Q5_1": {}})
    target = str(Path(MODEL, "work/quantized/Q5_1.gguf"))
    done = repository.snakemake("--verbose", target=target)
    assert done.returncode == 0, done.stderr[-3000:]
    number = int((repository.path / MODEL / "work/plans/quantized/Q5_1.pieces").read_text())
    assert (
        2 <= number < 100
        and done.stderr.count("Rule: piece)") == number
        and quantized(repository, "quantized-Q5_1") == 0
    )
    done = repository.snakemake("--cores", "1", "--dry-run", target=target)
    assert done.returncode == 0 and "Nothing to be done" in done.stdout + done.stderr, (
        done.stdout + done.stderr
    )
