"""Recipes and importance matrices in a build: shared, and an edit reruns only their users."""

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
from conftest import CHECKPOINTS
from mtpforge.gguf import reader
from repository import CONFIG, Repository, described

TEXT = "texts/calibration.txt"
MATRIX = f"calibration-{hashlib.sha256(TEXT.encode()).hexdigest()[:8]}.gguf"


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, toolchain: Path) -> Repository:
    made = Repository(tmp_path_factory.mktemp("recipes") / "repository", toolchain)
    (made.path / "texts").mkdir()
    (made.path / TEXT).write_bytes((CHECKPOINTS / "corpus.py").read_bytes())
    variants: dict[str, Any] = {
        "IQ2_XS": {"tensors": "one", "imatrix": {"text": TEXT}},
        "IQ3_XXS": {"imatrix": {"text": TEXT}},
        "Q8_0": {"tensors": "two"},
        "plain": {"type": "IQ2_XS", "tensors": "one", "imatrix": {"text": TEXT}, "head": "none"},
    }
    made.config["recipes"] = {"one": {"attn_": "Q4_K"}, "two": {"ffn_": "Q6_K"}}
    made.config["models"] = {
        "tiny-qwen3.5": {**CONFIG["models"]["tiny-qwen3.5"], "variants": variants}
    }
    made.write_config()
    jobs = {
        "convert": 2,
        "imatrix": 1,
        "coverage": 1,
        "recipe": 4,
        "plan_types": 4,
        "quantize": 4,
        "verify": 4,
        "summary": 1,
    }
    jobs |= {**described(4), "local_files": 2, "materials": 1, "acceptance": 1}
    assert made.pending() == {"program": 5, "toolchain": 1, **jobs}
    done = made.snakemake()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    logs = (made.path / "logs/tiny-qwen3.5").glob("plan-quantized-*.log")
    assert any("| blk.{0-2}.attn_qkv.weight" in log.read_text() for log in logs)
    assert made.pending() == {}
    return made


def test_low_bit_files_with_a_computed_matrix_draft(repository: Repository) -> None:
    results = repository.path / "results/tiny-qwen3.5"
    for variant in ("IQ2_XS", "IQ3_XXS"):
        opened = reader.read(results / f"tiny-qwen3.5-{variant}.gguf")
        assert opened.tensors["blk.0.ffn_up.weight"].type.name == variant
        assert opened.get("quantize.imatrix.file") == MATRIX
        assert opened.get("quantize.imatrix.dataset") == "calibration.txt"
        report = json.loads((results / f"reports/tiny-qwen3.5-{variant}.json").read_text())
        assert report["accepted"] > 0
        assert all(check["passed"] for check in report["checks"])
        log = repository.path / f"logs/tiny-qwen3.5/plan-quantized-{variant}.log"
        assert log.read_text().startswith("| tensor ")
    tensors = reader.read(results / "tiny-qwen3.5-IQ2_XS.gguf").tensors
    assert tensors["blk.3.attn_q.weight"].type.name == "Q4_K"


def test_the_provenance_has_the_name_and_digest_of_the_text(repository: Repository) -> None:
    results = repository.path / "results/tiny-qwen3.5"
    text = (results / "provenance/tiny-qwen3.5-IQ2_XS.json").read_text()
    definition = json.loads(text)["predicate"]["buildDefinition"]
    variant = definition["externalParameters"]["variants"]["IQ2_XS"]
    assert variant["imatrix"] == {"text": "calibration.txt", "chat": False}
    digest = hashlib.sha256((repository.path / TEXT).read_bytes()).hexdigest()
    dependency = {"name": "calibration.txt", "digest": {"sha256": digest}}
    assert dependency in definition["resolvedDependencies"]
    assert "texts/" not in text + (results / "README.md").read_text()


def test_an_edited_recipe_reruns_the_variants_that_use_it(repository: Repository) -> None:
    before = copy.deepcopy(repository.config)
    repository.config["recipes"]["two"]["ffn_"] = "Q5_K"
    repository.config["recipes"]["three"] = {"ffn_": "Q4_K"}
    repository.write_config()
    assert repository.pending() == {
        "recipe": 1,
        "plan_types": 1,
        "quantize": 1,
        "verify": 1,
        "summary": 1,
        **described(1),
    }
    repository.config = before
    repository.write_config()
    assert repository.pending() == {}


def test_an_edited_text_reruns_its_matrix_and_variants(repository: Repository) -> None:
    text = repository.path / TEXT
    text.touch()
    assert repository.pending() == {}
    before = text.read_text()
    text.write_text(before + "another line\n")
    assert repository.pending() == {
        "imatrix": 1,
        "coverage": 1,
        "plan_types": 3,
        "quantize": 3,
        "verify": 3,
        "summary": 1,
        **described(3),
    }
    text.write_text(before)
    assert repository.pending() == {}


def test_a_recomputed_matrix_has_the_same_bytes(repository: Repository) -> None:
    matrix = repository.path / "results/tiny-qwen3.5/work/imatrix" / MATRIX
    before = matrix.read_bytes()
    assert repository.snakemake("--forcerun", "imatrix", "--until", "imatrix").returncode == 0
    assert matrix.read_bytes() == before
