"""Real Snakemake measures new files, and all files again only if the measuring code changes."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from repository import CONFIG, Repository, described

MODEL = "tiny-qwen3.5"
MEASURED = {
    **CONFIG["models"][MODEL],
    "measure": {"n_max": [1], "repeats": 1, "text": "held-out.txt", "chunks": 2},
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, toolchain: Path) -> Repository:
    copy = Repository(tmp_path_factory.mktemp("measuring") / "repository", toolchain)
    shutil.copy(ROOT / "tests/checkpoints/held-out.txt", copy.path)
    copy.config["models"] = {MODEL: {**MEASURED, "variants": {"BF16": {}, "Q8_0": {"split": "2M"}}}}
    copy.write_config()
    done = copy.snakemake()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return copy


def test_all_files_are_measured_even_split_ones(repository: Repository) -> None:
    found = repository.path / "results" / MODEL / "measure"
    assert sorted(path.name for path in found.iterdir()) == [
        f"{MODEL}-BF16.json",
        f"{MODEL}-Q8_0.json",
    ]
    table, _, distances = (repository.path / "results/summary.md").read_text().partition("\n\n")
    rows = table.splitlines()[2:]
    assert f"| {MODEL}-Q8_0 " in distances
    assert len(rows) == 2 and all(row.split("|")[-3].strip() != "-" for row in rows)
    assert repository.pending() == {}


def test_a_measurement_and_the_card_name_the_text(repository: Repository) -> None:
    results = repository.path / "results" / MODEL
    found = json.loads((results / f"measure/{MODEL}-BF16.json").read_text())
    digest = hashlib.sha256((repository.path / "held-out.txt").read_bytes()).hexdigest()
    assert (
        found["text"] == {"name": "held-out.txt", "sha256": digest, "chunks": 2}
        and found["repeats"] == 1
    )
    assert found["prompts"].keys() == {"code", "prose", "structured"}
    assert digest in (results / "README.md").read_text()


def test_only_a_new_variant_is_measured(repository: Repository) -> None:
    before = dict(repository.config["models"])
    variants = {**before[MODEL]["variants"], "Q4_0": {}}
    repository.config["models"] = {MODEL: {**before[MODEL], "variants": variants}}
    repository.write_config()
    assert repository.pending() == {
        "recipe": 1,
        "plan_types": 1,
        "quantize": 1,
        "verify": 1,
        "measure": 1,
        "plot": 2,
        "summary": 1,
        **described(1),
    }
    repository.config["models"] = before
    repository.write_config()
    assert repository.pending() == {}


@pytest.mark.parametrize(
    ("edited", "pending"),
    [
        ("measure.py", {"measuring": 1, "measure": 2, "plot": 2, "summary": 1, **described(0)}),
        (
            "mtpforge/measure/speed.py",
            {"measuring": 1, "measure": 2, "plot": 2, "summary": 1, **described(0)},
        ),
        ("verify.py", {"verify": 1, "verify_split": 1, "summary": 1, **described(2)}),
        (
            "mtpforge/measure/perplexity.py",
            {
                "measuring": 1,
                "reference_logits": 1,
                "measure": 2,
                "plot": 2,
                "summary": 1,
                **described(0),
            },
        ),
    ],
)
def test_edited_code_reruns_only_what_uses_it(
    repository: Repository, edited: str, pending: dict[str, int]
) -> None:
    path = repository.path / "workflow/scripts" / edited
    before = path.read_text()
    path.write_text(before + "\n# edited\n")
    found = repository.pending()
    path.write_text(before)
    assert found == pending and repository.pending() == {}


def test_another_limit_or_a_touched_file_measures_nothing(repository: Repository) -> None:
    (repository.path / f"results/{MODEL}/{MODEL}-BF16.gguf").touch()
    assert repository.pending() == {}
    before = dict(repository.config["models"])
    repository.config["models"] = {MODEL: {**before[MODEL], "max_acceptance_drop": 0.3}}
    repository.write_config()
    assert repository.pending() == {"verify_split": 1, "summary": 1, **described(2)}
    repository.config["models"] = before
    repository.write_config()
    assert repository.pending() == {}


def test_another_n_max_measures_again(repository: Repository) -> None:
    before = dict(repository.config["models"])
    repository.config["models"] = {
        MODEL: {**before[MODEL], "measure": {**MEASURED["measure"], "n_max": [1, 2]}}
    }
    repository.write_config()
    assert repository.pending() == {
        "measuring": 1,
        "measure": 2,
        "plot": 2,
        "summary": 1,
        **described(0),
    }
    repository.config["models"] = before
    repository.write_config()
    assert repository.pending() == {}


def test_a_measurement_that_was_removed_is_made_again(repository: Repository) -> None:
    """As the summary advises for speeds that were not steady."""
    path = repository.path / f"results/{MODEL}/measure/{MODEL}-BF16.json"
    away = path.rename(repository.path / "away.json")
    found = repository.pending()
    away.rename(path)
    assert found == {"measure": 1, "plot": 2, "summary": 1, **described(0)}
    assert repository.pending() == {}
