"""What else a model can be published as: without a head, with the head as a draft model of its own, in several files."""

import json
from pathlib import Path

import pytest
from repository import CONFIG, Repository

FILES = ("tiny-qwen3.5-plain.gguf", "mtp-tiny-qwen3.5-Q6_K.gguf")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, toolchain: Path) -> Path:
    copy = Repository(tmp_path_factory.mktemp("outputs") / "repository", toolchain)
    model = {
        **CONFIG["models"]["tiny-qwen3.5"],
        "sidecar": "Q6_K",
        "variants": {"plain": {"type": "IQ4_XS", "head": "none", "tensors": {"attn_.*": "Q8_0"}}, "BF16": {"split": "2M"}},
    }
    copy.config["models"] = {"tiny-qwen3.5": model}
    copy.write_config()
    done = copy.snakemake()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert copy.pending() == {}
    return copy.path / "results/tiny-qwen3.5"


def report(results: Path, name: str) -> dict[str, object]:
    return dict(json.loads((results / "reports" / f"{name}.json").read_text()))


def test_nothing_else_is_published(results: Path) -> None:
    assert sorted(path.name for path in results.glob("*.gguf")) == sorted(FILES)


def test_a_file_without_a_head_has_been_loaded_and_has_no_acceptance(results: Path) -> None:
    found = report(results, "tiny-qwen3.5-plain")
    assert found["head"] == "none" and "drafts" not in found
    assert [check["name"] for check in found["checks"]] == ["types", "inventory", "loading"]
    assert any("plain.gguf" in line and line.rstrip(" |\n").endswith("-") for line in (results.parent / "summary.md").open())


def test_a_draft_sidecar_has_drafted_beside_the_model(results: Path) -> None:
    found = report(results, "mtp-tiny-qwen3.5-Q6_K")
    assert found["head"] == "Q6_K" and found["acceptance"] >= 0.8
    assert [check["name"] for check in found["checks"]] == ["types", "inventory", "head values", "drafting"]


def test_a_split_file_is_a_folder_that_llama_cpp_loads(results: Path) -> None:
    found = report(results, "tiny-qwen3.5-BF16.split")
    names = [f"tiny-qwen3.5-BF16-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    assert [entry["name"] for entry in found["files"]] == names
    assert sorted(path.name for path in (results / "tiny-qwen3.5-BF16").glob("*.gguf")) == names
    assert {"files", "files load"} <= {check["name"] for check in found["checks"]}
