"""A Gemma 4 from this machine with its drafter from the Hub: converted, quantized, drafted."""

import json
from pathlib import Path
from typing import Any

import pytest
from gemma4 import DRAFTER, write_gemma4
from hub import COMMIT, Hub, serve
from mtpforge.gguf import reader
from repository import Repository
from test_outputs import CONVERTER, share_converter

DONOR = {"repo": "Owner/gemma-assistant", "revision": COMMIT}

pytestmark = pytest.mark.skipif(
    not (CONVERTER / "stamp.json").exists(),
    reason="llama.cpp's converter is missing: `make converter`",
)


def repository(folder: Path, toolchain: Path, hub: Hub) -> tuple[Repository, dict[str, str]]:
    copy = Repository(folder / "repository", toolchain)
    share_converter(copy)
    (copy.path / "prompts").mkdir()
    (copy.path / "prompts/fox.txt").write_text("the quick brown fox")
    copy.config["models"] = {
        "gemma": {
            "source": {"path": "../gemma"},
            "head_from": DONOR,
            "converter": "llama.cpp",
            "sidecar": "Q8_0",
            "min_acceptance": 0.9,
            "prompts": "prompts",
            "variants": {"Q8_0": {"head": "none"}},
        }
    }
    copy.write_config()
    return copy, {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "home")}


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def test_the_sidecar_is_the_drafter(tmp_path: Path, toolchain: Path) -> None:
    _, drafter = write_gemma4(tmp_path)
    with serve({DONOR["repo"]: drafter}) as hub:
        copy, variables = repository(tmp_path, toolchain, hub)
        done = copy.snakemake(**variables)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    results = copy.path / "results/gemma"
    made = reader.read(results / "mtp-gemma-Q8_0.gguf")
    assert made.is_drafter and list(made.head_blocks) == [0, 1]
    assert not reader.read(results / "gemma-Q8_0.gguf").head_blocks
    report = load(results / "reports/mtp-gemma-Q8_0.json")
    found = {check["name"]: check["detail"] for check in report["checks"]}
    assert report["acceptance"] > 0.95 and "BF16 has 100.0%" in found["acceptance"]
    assert {"bytes", "values", "target", "drafting", "same text"} < found.keys()
    inputs = load(results / "provenance/mtp-gemma-Q8_0.json")["predicate"]["buildDefinition"]
    assert any("gemma-assistant" in str(each) for each in inputs["resolvedDependencies"])
    card = (results / "README.md").read_text()
    assert "-md mtp-gemma-Q8_0.gguf --spec-type draft-mtp --spec-draft-n-max 1" in card
    assert "draft with a `gemma4-assistant` model, use llama.cpp b9551 (for" in card
    assert "instead of the file's own head" not in card


def test_another_models_drafter_is_refused_before_it_is_fetched(
    tmp_path: Path, toolchain: Path
) -> None:
    text = {**DRAFTER["text_config"], "head_dim": 32}
    _, drafter = write_gemma4(tmp_path, text_config=text)
    with serve({DONOR["repo"]: drafter}) as hub:
        copy, variables = repository(tmp_path, toolchain, hub)
        listing = f"resources/hub/{DONOR['repo']}/{COMMIT}/files.json"
        done = copy.snakemake(target=listing, **variables)
        headers = [n for name, n in hub.sent.items() if name.endswith(".safetensors")]
    assert done.returncode == 1 and max(headers) <= 65536
    assert "its head_dim is 32, the model's head_dim is 16" in done.stdout + done.stderr
