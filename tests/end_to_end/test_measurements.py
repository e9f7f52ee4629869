"""Measurements of an embedded file by a real llama-server and llama-perplexity.

No test compares times, which depend on the machine.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import CHECKPOINTS, MODELS, Run

MODEL = "tiny-qwen3.5"
TEXT = CHECKPOINTS / "held-out.txt"


@pytest.fixture(scope="module")
def measured(built: Path, run: Run, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("measured")
    results = built / "results" / MODEL
    done = run(
        "reference_logits.py", results / "work/convert/all.gguf", "--text", TEXT, "--out",
        folder / "logits", "--chunks", 2, "--threads", 1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "at most 0.00 GB, for 2 chunks of 512 tokens and 1,280 logits a token" in done.stdout
    for variant in ("BF16", "IQ3_S-mix"):
        done = run(
            "measure.py", results / f"{MODEL}-{variant}.gguf", "--n-max", "2,1", "--repeats", 2,
            "--threads", 1, "--serve=-fa on", "--prompts", CHECKPOINTS / MODEL / "prompts",
            "--reference-logits", folder / "logits", "--out", folder / f"{variant}.json",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    return {**found, "stdout": done.stdout}


def test_every_n_max_and_kind_is_measured_cold_and_warm(measured: dict[str, Any]) -> None:
    runs = measured["IQ3_S-mix"]["runs"]
    assert [(run["n_max"], run["kind"], run["state"], run["repeats"]) for run in runs] == [
        (n_max, kind, state, repeats)
        for kind in ("code", "prose", "structured")
        for n_max in (0, 1, 2)
        for state, repeats in (("cold", 1), ("warm", 2))
    ]
    for run in runs:
        low, high = run["spread"]
        assert 0 < low <= run["median"] <= high and len(run["tokens_per_second"]) == run["repeats"]
        assert len(run["by_position"]) == run["n_max"]
        assert (run["drafts"] > 0) == (run["n_max"] > 0) == (run["acceptance"] is not None)


def test_the_options_of_the_server_are_recorded(measured: dict[str, Any]) -> None:
    assert measured["IQ3_S-mix"]["options"] == ["-fa", "on"]


def test_acceptance_equals_that_of_verification(measured: dict[str, Any], built: Path) -> None:
    """Prompts and lengths are the same, so with one draft token repeats draft like verification."""
    total = measured["IQ3_S-mix"]["by_n_max"][1]
    report = json.loads(
        (built / "results" / MODEL / "reports" / f"{MODEL}-IQ3_S-mix.json").read_text()
    )
    assert total["n_max"] == 1 and total["drafts"] == pytest.approx(2 * report["drafts"], rel=0.02)
    assert total["acceptance"] == pytest.approx(report["acceptance"], abs=0.02)


def test_positions_add_up_to_the_acceptance(measured: dict[str, Any]) -> None:
    one, two = measured["IQ3_S-mix"]["by_n_max"][1:]
    assert one["by_position"] == [pytest.approx(one["acceptance"], abs=0.01)]
    assert sum(two["by_position"]) / 2 == pytest.approx(two["acceptance"], abs=0.02)
    assert two["by_position"][0] > two["by_position"][1] > 0


def test_the_recommendation_follows_from_the_figures(measured: dict[str, Any]) -> None:
    found = measured["IQ3_S-mix"]
    fastest = max(found["by_n_max"], key=lambda entry: entry["tokens_per_second"])
    if fastest["n_max"] == 0 or fastest["spread"][0] <= found["by_n_max"][0]["spread"][1]:
        fastest = found["by_n_max"][0]
    assert found["recommended_n_max"] == fastest["n_max"]
    assert f"{MODEL}-IQ3_S-mix.gguf: {found['verdict']}" in measured["stdout"]


def test_memory_is_at_least_the_size_of_the_weights(measured: dict[str, Any]) -> None:
    found = measured["BF16"]
    assert found["bytes"] < found["memory_bytes"] < 2e9
    assert found["memory_bytes"] == max(entry["memory_bytes"] for entry in found["by_n_max"])


def test_kl_divergence_is_zero_for_bf16_and_not_for_a_quant(measured: dict[str, Any]) -> None:
    itself, mixed = measured["BF16"]["kl_divergence"], measured["IQ3_S-mix"]["kl_divergence"]
    assert abs(itself["mean"]) < 1e-5 and itself["same_top"] > 0.999
    assert mixed["mean"] > 1e-4 and mixed["p99.9"] > mixed["mean"] and mixed["same_top"] < 1
    assert mixed["maximum"] >= mixed["p99.9"] and mixed["mean"] > mixed["mean_error"] > 0
    assert 0 < mixed["same_top_error"] < 0.1
    assert measured["BF16"]["perplexity"] > 1


def test_a_text_without_logits_gives_only_perplexity(
    built: Path, run: Run, tmp_path: Path, measured: dict[str, Any]
) -> None:
    done = run(
        "measure.py", built / "results" / MODEL / f"{MODEL}-BF16.gguf", "--n-max", 1, "--repeats",
        1, "--threads", 1, "--prompts", CHECKPOINTS / MODEL / "prompts", "--text", TEXT, "--chunks",
        2, "--out", tmp_path / "out.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert found["kl_divergence"] is None and found["perplexity"] == pytest.approx(
        measured["BF16"]["perplexity"], abs=0.001
    )


def test_a_short_text_is_refused(built: Path, fails, tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("Too short.")
    model = built / "results" / MODEL / "work/convert/all.gguf"
    assert "too short" in fails(
        "reference_logits.py", model, "--text", text, out=tmp_path / "logits"
    )


def test_a_file_without_a_head_is_measured_without_drafting(
    built: Path, run: Run, tmp_path: Path
) -> None:
    done = run(
        "measure.py", built / "results" / MODEL / "work/convert/trunk.gguf", "--n-max", 1,
        "--repeats", 1, "--threads", 1, "--prompts", CHECKPOINTS / MODEL / "prompts", "--out",
        tmp_path / "out.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert {run["n_max"] for run in found["runs"]} == {0} == {found["recommended_n_max"]}
    assert found["verdict"] == "no head to draft with" and found["perplexity"] is None


@pytest.mark.parametrize("model", MODELS)
def test_make_has_measured_each_file(built: Path, model: str) -> None:
    results = built / "results" / model
    measured = {
        path.stem: json.loads(path.read_text()) for path in (results / "measure").glob("*.json")
    }
    assert set(measured) == {path.stem for path in results.glob("*.gguf")}
    for stem, found in measured.items():
        assert (
            found["file"] == f"{stem}.gguf"
            and found["bytes"] == (results / f"{stem}.gguf").stat().st_size
        )
        assert [entry["n_max"] for entry in found["by_n_max"]] == [0, 1, 2]
    assert abs(measured[f"{model}-BF16"]["kl_divergence"]["mean"]) < 1e-5
    divergences = {stem: found["kl_divergence"]["mean"] for stem, found in measured.items()}
    assert divergences[f"{model}-Q8_0"] < divergences[f"{model}-Q4_K_M"]
