"""A variant with a size in a build: another size keeps all that does not depend on it."""

import re
from pathlib import Path

import pytest
from mtpforge.quantize.recipe import read_recipe
from repository import CONFIG, Repository

MODEL = "results/tiny-qwen3.5"
TARGET = f"{MODEL}/work/quantized/auto.gguf"
LAST = re.compile(r"reused (\d+) of (\d+) tensors .*; quantized (\d+)\n\Z")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, toolchain: Path) -> Repository:
    made = Repository(tmp_path_factory.mktemp("sizes") / "repository", toolchain)
    set_size(made, size="Q4_K_M")
    done = made.snakemake(target=TARGET)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return made


def set_size(repository: Repository, **size: object) -> None:
    variant = {"candidates": ["Q4_K", "Q8_0"], **size}
    model = {**CONFIG["models"]["tiny-qwen3.5"], "variants": {"auto": variant}}
    repository.config["models"] = {"tiny-qwen3.5": model}
    repository.write_config()


def types(repository: Repository) -> dict[str, str]:
    return dict(read_recipe(repository.path / MODEL / "work/found/auto.yaml"))


def test_another_size_reruns_the_allocation_and_the_tensors_that_changed(
    repository: Repository,
) -> None:
    before = types(repository)
    set_size(repository, bits=6.2)
    assert repository.pending(TARGET) == {"allocate": 1, "plan_types": 1, "quantize": 1}
    done = repository.snakemake(target=TARGET)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    after = types(repository)
    changed = [name for name, kind in after.items() if before[name] != kind]
    assert before.keys() == after.keys() and 0 < len(changed) < len(after) / 2
    said = (repository.path / "logs/tiny-qwen3.5/quantized-auto.log").read_text()
    reused, total, quantized = map(int, LAST.search(said).groups())  # type: ignore[union-attr]
    assert (quantized, reused) == (len(changed), total - len(changed))


def test_another_kind_of_sensitivity_keeps_errors_and_logits(repository: Repository) -> None:
    set_size(repository, size="Q4_K_M", sensitivity="tensor")
    jobs = ("sensitivities", "allocate", "plan_types", "quantize")
    assert repository.pending(TARGET) == dict.fromkeys(jobs, 1)
