"""Snakemake injects heads into GGUFs on disk: into a split one, and into one with another head."""

import json
from pathlib import Path
from typing import Any

import pytest
from mtpforge.gguf import head, reader
from mtpforge.gguf.reader import Gguf
from mtpforge.inject import inject
from repository import CONFIG, Repository
from splits import split

VARIANTS = {
    "split": {
        "base": {"path": "bases/split-00001-of-00002.gguf"},
        "head": {"type": "Q4_K", "tensors": {"eh_proj": "Q8_0"}},
    },
    "replaced": {"base": {"path": "bases/headed.gguf"}, "head": "Q6_K", "replace_head": True},
    "kept": {"base": {"path": "bases/headed.gguf"}, "head": "BF16"},
}


@pytest.fixture(scope="module")
def repository(
    tmp_path_factory: pytest.TempPathFactory, built: Path, toolchain: Path
) -> Repository:
    copy = Repository(tmp_path_factory.mktemp("bases") / "repository", toolchain)
    bases, work = copy.path / "bases", built / "results/tiny-qwen3.5/work"
    split(work / "trunk/Q4_K_M.gguf", bases, "split", 1_000_000)
    inject.inject(work / "trunk/Q4_K_M.gguf", work / "convert/head.gguf", bases / "headed.gguf")
    copy.config["models"] = {
        "tiny-qwen3.5": {**CONFIG["models"]["tiny-qwen3.5"], "variants": VARIANTS}
    }
    copy.write_config()
    done = copy.snakemake()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return copy


def result(repository: Repository, variant: str) -> Gguf:
    return reader.read(repository.path / f"results/tiny-qwen3.5/tiny-qwen3.5-{variant}.gguf")


def report(repository: Repository, variant: str) -> dict[str, Any]:
    return json.loads(
        (repository.path / f"results/tiny-qwen3.5/reports/tiny-qwen3.5-{variant}.json").read_text()
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_trunk_equals_the_base(repository: Repository, built: Path, variant: str) -> None:
    made, base = (
        result(repository, variant),
        reader.read(built / "results/tiny-qwen3.5/work/trunk/Q4_K_M.gguf"),
    )
    assert head.trunk_digests(made) == head.trunk_digests(base)
    proof = report(repository, variant)["trunk"]
    assert proof["tensors"] == 55 and proof["sha256_before"] == proof["sha256_after"]


def test_the_head_has_the_requested_types(repository: Repository) -> None:
    assert {variant: report(repository, variant)["head"] for variant in VARIANTS} == {
        "split": "Q4_K/Q8_0", "replaced": "Q6_K", "kept": "BF16",
    }  # fmt: skip
    assert result(repository, "split").tensors["blk.4.nextn.eh_proj.weight"].type.name == "Q8_0"


def test_nothing_is_left_to_do(repository: Repository) -> None:
    assert repository.pending() == {}
