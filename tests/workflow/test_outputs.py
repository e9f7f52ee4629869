"""Other outputs: without a head, sidecar, vision tower, split; and upstream's converter."""

import json
from pathlib import Path

import pytest
from conftest import ROOT
from deepseek4 import write_deepseek4
from other_architectures import write_model
from repository import CONFIG, Repository

BEFORE = ["bytes", "types", "inventory", "metadata", "chat template", "finite", "norms", "values"]
CONVERTER = ROOT / "resources" / "converter"
FILES = ("tiny-qwen3.5-plain.gguf", "mtp-tiny-qwen3.5-Q6_K.gguf", "mmproj-tiny-qwen3.5-F16.gguf")

pytestmark = pytest.mark.skipif(
    not (CONVERTER / "stamp.json").exists(),
    reason="llama.cpp's converter is missing: `make converter`",
)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory, toolchain: Path) -> Path:
    copy = Repository(tmp_path_factory.mktemp("outputs") / "repository", toolchain)
    share_converter(copy)
    (copy.path / "tests/checkpoints/tiny-qwen3.5/preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
    )
    model = {
        **CONFIG["models"]["tiny-qwen3.5"],
        "sidecar": "Q6_K",
        "mmproj": True,
        "variants": {
            "plain": {"type": "IQ4_XS", "head": "none", "tensors": {"attn_.*": "Q8_0"}},
            "BF16": {"split": "2M"},
        },
    }
    write_model("glm", copy.path / "glm")
    other = {
        "source": {"path": "glm"},
        "converter": "llama.cpp",
        "tokenizer_pre": "qwen35",
        "sidecar": "Q8_0",
        "min_acceptance": 0.9,
        "variants": {
            "BF16": {},
            "Q4_0": {},
            "Q5_0-injected": {"base": {"type": "Q5_0"}},
            "Q8_0-plain": {"type": "Q8_0", "head": "none"},
        },
    }
    write_deepseek4(copy.path / "v4")
    apart = {
        "source": {"path": "v4"},
        "converter": "llama.cpp",
        "tokenizer_pre": "qwen35",
        "sidecar": "MXFP4",
        "min_acceptance": 0.9,
        "variants": {"MXFP4": {"head": "none"}},
    }
    copy.config["models"] = {"tiny-qwen3.5": model, "glm": other, "v4": apart}
    copy.write_config()
    done = copy.snakemake()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert copy.pending() == {}
    return copy.path / "results/tiny-qwen3.5"


def share_converter(copy: Repository) -> None:
    """Link the repository's converter: another installation takes a minute and a gigabyte."""
    shared = copy.path / "resources/converter"
    shared.mkdir(parents=True)
    for name in ("environment", "source"):
        (shared / name).symlink_to(CONVERTER / name)
    (shared / "stamp.json").write_bytes((CONVERTER / "stamp.json").read_bytes())


def report(results: Path, name: str) -> dict[str, object]:
    return dict(json.loads((results / "reports" / f"{name}.json").read_text()))


def test_only_the_configured_files_are_published(results: Path) -> None:
    assert sorted(path.name for path in results.glob("*.gguf")) == sorted(FILES)


def test_a_file_without_a_head_loads_and_has_no_acceptance(results: Path) -> None:
    found = report(results, "tiny-qwen3.5-plain")
    assert found["head"] == "none" and "drafts" not in found
    assert [check["name"] for check in found["checks"]] == [*BEFORE, "loading", "programs"]
    assert any(
        "plain.gguf" in line and line.rstrip(" |\n").endswith("-")
        for line in (results.parent / "summary.md").open()
    )


def test_a_sidecar_drafts_for_its_model(results: Path) -> None:
    found = report(results, "mtp-tiny-qwen3.5-Q6_K")
    assert found["head"] == "Q6_K" and found["acceptance"] >= 0.8
    assert [check["name"] for check in found["checks"]] == [
        *BEFORE,
        "drafting",
        "acceptance",
        "same text",
        "programs",
    ]


def test_a_split_file_is_a_folder_that_llama_cpp_loads(results: Path) -> None:
    found = report(results, "tiny-qwen3.5-BF16.split")
    names = [f"tiny-qwen3.5-BF16-{i:05}-of-00003.gguf" for i in (1, 2, 3)]
    assert [entry["name"] for entry in found["files"]] == names
    assert sorted(path.name for path in (results / "tiny-qwen3.5-BF16").glob("*.gguf")) == names
    assert {"files", "files load"} <= {check["name"] for check in found["checks"]}


def test_a_vision_tower_reads_a_picture(results: Path) -> None:
    checks = report(results, "mmproj-tiny-qwen3.5-F16")["checks"]
    assert [(check["name"], check["passed"]) for check in checks] == [
        ("bytes", True),
        ("vision", True),
    ]


@pytest.mark.parametrize("name", ["glm-BF16", "glm-Q4_0", "glm-Q5_0-injected", "mtp-glm-Q8_0"])
def test_a_head_converted_by_upstream_is_verified_and_drafts(results: Path, name: str) -> None:
    found = report(results.parent / "glm", name)
    names = [check["name"] for check in found["checks"]]
    before = [*BEFORE[1:], "trunk"] if "injected" in name else BEFORE
    assert names == [
        *before,
        "drafting",
        *([] if "BF16" in name else ["acceptance"]),
        "same text",
        "programs",
    ]
    assert found["acceptance"] > 0.9 and (results.parent / "glm" / f"{name}.gguf").exists()


def test_a_head_that_upstream_keeps_apart_drafts_for_its_trunk(results: Path) -> None:
    trunk, draft = (report(results.parent / "v4", name) for name in ("v4-MXFP4", "mtp-v4-MXFP4"))
    checks = [[check["name"] for check in found["checks"]] for found in (trunk, draft)]
    assert checks[0] == [*BEFORE, "loading", "programs"] and trunk["head"] == "none"
    assert checks[1] == [*BEFORE, "drafting", "same text", "programs"]
    assert draft["acceptance"] > 0.9
