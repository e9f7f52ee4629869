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
    for variant in ("BF16", "IQ4_XS"):
        done = run(
            "measure.py", results / f"{MODEL}-{variant}.gguf", "--n-max", "2,1", "--repeats", 2,
            "--p-min", "0.75,0", "--forms", "raw,chat", "--threads", 1, "--serve=-fa on",
            "--prompts", CHECKPOINTS / MODEL / "prompts", "--reference-logits", folder / "logits",
            "--out", folder / f"{variant}.json",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    return {**found, "stdout": done.stdout}


def pair(entry: dict[str, Any]) -> tuple[int, float]:
    return entry["n_max"], entry["p_min"]


def test_every_pair_is_measured_cold_and_warm_with_each_kind(measured: dict[str, Any]) -> None:
    found = measured["IQ4_XS"]
    pairs = [(0, 0), (1, 0), (1, 0.75), (2, 0), (2, 0.75)]
    assert [pair(total) for total in found["by_n_max"]] == pairs
    raw = [run for run in found["runs"] if run["form"] == "raw"]
    assert [(pair(run), run["kind"], run["state"]) for run in raw] == [
        (each, kind, state)
        for each in pairs
        for state, kind in (
            ("cold", "code"), ("warm", "code"), ("warm", "prose"), ("warm", "structured"),
        )
    ]  # fmt: skip
    for run in found["runs"]:
        low, high = run["spread"]
        assert 0 < low <= run["median"] <= high and len(run["tokens_per_second"]) == run["repeats"]
        assert len(run["by_position"]) == run["n_max"]
        assert (run["drafts"] > 0) == (run["n_max"] > 0) == (run["acceptance"] is not None)


def test_the_fastest_pair_alternates_with_no_drafting_in_all_forms(
    measured: dict[str, Any],
) -> None:
    found = measured["IQ4_XS"]
    kinds = [(kind, form) for kind in ("code", "prose", "structured") for form in ("raw", "chat")]
    assert [(each["kind"], each["form"]) for each in found["by_kind"]] == kinds
    (fastest,) = {pair(each) for each in found["by_kind"]}
    rounds = {pair(total): total["repeats"] for total in found["by_n_max"]}
    assert rounds[fastest] == rounds[0, 0] == 2
    assert all(each["without"] > 0 and each["acceptance"] > 0.3 for each in found["by_kind"])
    share = found["waiting"]
    assert share is None or 0 <= share < 1


def test_a_higher_p_min_drafts_fewer_tokens_and_more_are_accepted(
    measured: dict[str, Any],
) -> None:
    totals = {pair(total): total for total in measured["IQ4_XS"]["by_n_max"]}
    for n_max in (1, 2):
        every, sure = totals[n_max, 0], totals[n_max, 0.75]
        drafts = [total["drafts"] / total["repeats"] for total in (every, sure)]
        assert drafts[1] < 0.95 * drafts[0] and sure["acceptance"] > every["acceptance"]


def test_the_options_of_the_server_are_recorded(measured: dict[str, Any]) -> None:
    assert measured["IQ4_XS"]["options"] == ["-fa", "on"]


def test_acceptance_equals_that_of_verification(measured: dict[str, Any], built: Path) -> None:
    """Prompts and lengths are the same, so with one draft token repeats draft like verification."""
    total = measured["IQ4_XS"]["by_n_max"][1]
    report = json.loads(
        (built / "results" / MODEL / "reports" / f"{MODEL}-IQ4_XS.json").read_text()
    )
    drafts = total["drafts"] / total["repeats"]
    assert pair(total) == (1, 0) and drafts == pytest.approx(report["drafts"], rel=0.02)
    assert total["acceptance"] == pytest.approx(report["acceptance"], abs=0.02)


def test_positions_add_up_to_the_acceptance(measured: dict[str, Any]) -> None:
    one, _, two, _ = measured["IQ4_XS"]["by_n_max"][1:]
    assert one["by_position"] == [pytest.approx(one["acceptance"], abs=0.01)]
    assert sum(two["by_position"]) / 2 == pytest.approx(two["acceptance"], abs=0.02)
    assert two["by_position"][0] > two["by_position"][1] > 0


def test_the_recommendation_follows_from_the_figures(measured: dict[str, Any]) -> None:
    found = measured["IQ4_XS"]
    compared = pair(found["by_kind"][0])
    off, *others = found["by_n_max"]
    (best,) = [total for total in others if pair(total) == compared]
    expected = compared if best["spread"][0] > off["spread"][1] else (0, 0)
    if not found["steady"]:
        expected = (None, None)
        assert {total["speedup"] for total in found["by_n_max"]} == {None}
    assert (found["recommended_n_max"], found["recommended_p_min"]) == expected
    assert f"{MODEL}-IQ4_XS.gguf: {found['verdict']}" in measured["stdout"]


def test_memory_is_at_least_the_size_of_the_weights(measured: dict[str, Any]) -> None:
    found = measured["BF16"]
    assert found["bytes"] < found["memory_bytes"] < 2e9
    assert found["memory_bytes"] == max(entry["memory_bytes"] for entry in found["by_n_max"])


def test_kl_divergence_is_zero_for_bf16_and_not_for_a_quant(measured: dict[str, Any]) -> None:
    itself, mixed = measured["BF16"]["kl_divergence"], measured["IQ4_XS"]["kl_divergence"]
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
    assert found["verdict"].startswith("no head that llama.cpp can draft with")
    assert found["perplexity"] is None


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
        assert [entry["n_max"] for entry in found["by_n_max"]] == [0, 1, 1, 2, 2]
    assert abs(measured[f"{model}-BF16"]["kl_divergence"]["mean"]) < 1e-5
    divergences = {stem: found["kl_divergence"]["mean"] for stem, found in measured.items()}
    assert divergences[f"{model}-Q8_0"] < divergences[f"{model}-Q4_K_M"]
