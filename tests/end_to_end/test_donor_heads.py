"""Quantizations of a fine-tune get the original's head: drafted, published and named after it."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import CHECKPOINTS, Run
from hub import COMMIT, serve
from layouts import fine_tune
from mtpforge.gguf import head, reader
from repository import Repository

ORIGINAL = CHECKPOINTS / "tiny-qwen3.5"
GIVEN = {
    "tokenizer_pre": "qwen35",
    "prompts": "prompts",
}
DONOR = {"repo": "Owner/tiny-qwen3.5", "revision": COMMIT}
BASE = {"repo": "Tuner/My-Tune-GGUF", "revision": COMMIT, "file": "My-Tune-Q4_K_M.gguf"}
CARD = "---\nlicense: cc-by-4.0\n---\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, toolchain: Path, run: Run) -> Repository:
    """A fine-tune, quantized by another and published; and the same fine-tune quantized here."""
    folder = tmp_path_factory.mktemp("donor")
    copy = Repository(folder / "repository", toolchain)
    tune = fine_tune(copy.path / "My-Tune")
    (copy.path / "prompts").mkdir()
    shutil.copy(min((ORIGINAL / "prompts").glob("*.txt")), copy.path / "prompts")
    published = folder / "published"
    published.mkdir()
    (published / "README.md").write_text(CARD)
    convert = ("--part", "trunk", "--tokenizer-pre", "qwen35", "--out", folder / "trunk.gguf")
    quantize = ("--type", "Q4_K_M", "--out", published / BASE["file"])
    for program, *arguments in (
        ("convert.py", tune, *convert),
        ("quantize.py", folder / "trunk.gguf", *quantize),
    ):
        done = run(program, *arguments)
        assert done.returncode == 0, done.stderr
    copy.config["models"] = {
        "adopted": {**GIVEN, "head_from": DONOR, "variants": {"Q4_K_M": {"base": BASE}}},
        "tuned": {
            **GIVEN,
            "source": {"path": "My-Tune"},
            "head_from": {"path": "tests/checkpoints/tiny-qwen3.5"},
            "name": "Our-Tune",
            "variants": {"Q8_0": {}},
        },
    }
    copy.write_config()
    remote = shutil.copytree(
        ORIGINAL, folder / "remote", ignore=shutil.ignore_patterns("prompts", "reference.json")
    )
    with serve({DONOR["repo"]: Path(remote), BASE["repo"]: published}) as hub:
        variables = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "home")}
        done = copy.snakemake(**variables)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        sent = sum(count for name, count in hub.sent.items() if name.endswith(".safetensors"))
    total = sum(path.stat().st_size for path in Path(remote).glob("*.safetensors"))
    assert 0 < sent < total / 2  # the head alone
    return copy


def load(repository: Repository, name: str) -> Any:
    return json.loads((repository.path / "results" / name).read_text())


def checks(repository: Repository, report: str) -> dict[str, str]:
    found = load(repository, report)["checks"]
    assert all(check["passed"] for check in found)
    return {check["name"]: check["detail"] for check in found}


def test_the_trunk_is_the_bases_and_the_head_the_originals(made: Repository) -> None:
    result = reader.read(made.path / "results/adopted/My-Tune-Q4_K_M.gguf")
    base = reader.read(next((made.path / "resources/hub/Tuner").rglob(BASE["file"])))
    assert head.trunk_digests(result) == head.trunk_digests(base)
    report = load(made, "adopted/reports/My-Tune-Q4_K_M.json")
    assert report["acceptance"] > 0.8 and report["drafts"] > 30
    assert sum(report["head_source"].values()) == 15
    found = checks(made, "adopted/reports/My-Tune-Q4_K_M.json")
    assert "15 tensors" in found["values"] and "55 tensors equal" in found["trunk"]
    assert "acceptance" not in found  # there is no BF16 file to compare with


def test_the_fine_tune_is_quantized_here_with_the_originals_head(made: Repository) -> None:
    found = checks(made, "tuned/reports/Our-Tune-Q8_0.json")
    assert "70 tensors" in found["values"] and "BF16 has" in found["acceptance"]
    result = reader.read(made.path / "results/tuned/Our-Tune-Q8_0.gguf")
    assert result.get("general.name") == "Our-Tune"
    assert load(made, "tuned/reports/Our-Tune-Q8_0.json")["acceptance"] > 0.8


def test_card_and_provenance_name_base_and_donor(made: Repository) -> None:
    text = (made.path / "results/adopted/README.md").read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["base_model"] == [BASE["repo"]] and front["base_model_relation"] == "quantized"
    assert front["license"] == "cc-by-4.0"
    assert text.count(f"Head from: [{DONOR['repo']}]") == 1 and "# My-Tune-MTP-GGUF" in text
    statement = load(made, "adopted/provenance/My-Tune-Q4_K_M.json")
    inputs = statement["predicate"]["buildDefinition"]["resolvedDependencies"]
    roles = {
        entry["annotations"]["role"]: entry["uri"].partition("@")[0]
        for entry in inputs
        if "role" in entry.get("annotations", {})
    }
    assert roles == {
        "base": f"pkg:huggingface/{BASE['repo']}",
        "head": f"pkg:huggingface/{DONOR['repo']}",
    }
    assert "config.json" not in {entry["name"] for entry in inputs}  # no checkpoint of the trunk


def test_nothing_is_left_to_do(made: Repository) -> None:
    assert made.pending() == {}
