"""Only stale steps rerun: real Snakemake decides, in a private copy of the repository."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from repository import CONFIG, Repository, described


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, toolchain: Path) -> Repository:
    copy = Repository(tmp_path_factory.mktemp("with space") / "repository", toolchain)
    done = copy.snakemake()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return copy


@pytest.fixture(autouse=True)
def unchanged(repository: Repository) -> Iterator[None]:
    """Each test starts and ends with nothing left to run."""
    before = {
        path: path.read_bytes()
        for path in (repository.path / "workflow").rglob("*")
        if path.is_file()
    }
    yield
    for path, data in before.items():
        if path.read_bytes() != data:
            path.write_bytes(data)
    repository.config = {**CONFIG, "toolchain": repository.config["toolchain"]}
    repository.write_config()
    assert repository.pending() == {}


def edit(path: Path) -> None:
    path.write_text(path.read_text() + "\n# edited\n")


def test_a_second_run_does_nothing(repository: Repository) -> None:
    done = repository.snakemake()
    assert done.returncode == 0 and "Nothing to be done" in done.stdout + done.stderr


def test_a_touch_reruns_nothing(repository: Repository) -> None:
    for path in (repository.path / "workflow").rglob("*"):
        path.touch()
    for name in ("Snakefile", "config.yaml", "tests/checkpoints/tiny-qwen3.5/config.json"):
        (repository.path / name).touch()
    assert repository.pending() == {}


def test_other_threads_and_memory_rerun_nothing(repository: Repository) -> None:
    repository.config |= {"threads": 2, "memory": "900M"}
    repository.write_config()
    assert repository.pending() == {}


def test_times_and_copies_rerun_nothing(repository: Repository) -> None:
    """Not even those of files above 1 MB, which Snakemake compares by time."""
    paths = [path for path in repository.path.rglob("*") if ".snakemake" not in path.parts]
    for path in sorted(paths, key=lambda path: path.name[::-1]):
        path.touch()
    assert repository.pending() == {}
    repository.config = dict(reversed(repository.config.items()))
    repository.write_config()
    with (repository.path / "config.yaml").open("a") as config:
        config.write("# a comment\n")
    assert repository.pending() == {}


def test_a_changed_weight_reruns_everything_after_it(repository: Repository) -> None:
    """The same size and times do not hide it."""
    shard = repository.path / "tests/checkpoints/tiny-qwen3.5/model-00001-of-00004.safetensors"
    before, times = shard.read_bytes(), (shard.stat().st_atime_ns, shard.stat().st_mtime_ns)
    shard.write_bytes(before[:-2] + bytes([before[-2] ^ 1]) + before[-1:])
    os.utime(shard, ns=times)
    found = repository.pending()
    shard.write_bytes(before)
    assert found["convert"] == 1 and found["verify"] == 2 and found["materials"] == 1


def test_comments_of_requirements_rerun_only_what_lists_them(repository: Repository) -> None:
    for name in ("llama.cpp", "run"):
        path = repository.path / f"envs/{name}.txt"
        before = path.read_text()
        path.write_text(before + "# a comment\n")
        found = repository.pending()
        path.write_text(before)
        assert found == {"provenance": 2, "sums": 1}


@pytest.mark.parametrize(
    ("lost", "made"),
    [
        ("provenance/tiny-qwen3.5-Q8_0.json", {"provenance": 1, "sums": 1}),
        ("README.md", {"card": 1, "sums": 1}),
        ("SHA256SUMS", {"sums": 1}),
        ("reports/tiny-qwen3.5-Q8_0.json", {"verify": 1, "summary": 1, **described(1)}),
    ],
)
def test_a_lost_file_is_made_again(repository: Repository, lost: str, made: dict[str, int]) -> None:
    path = repository.path / "results/tiny-qwen3.5" / lost
    hidden = path.rename(path.with_suffix(".hidden"))
    found = repository.pending()
    hidden.rename(path)
    assert found == made


def test_an_edited_module_reruns_the_rules_that_import_it(repository: Repository) -> None:
    library = repository.path / "workflow/scripts/mtpforge"
    after = {"verify": 2, "summary": 1, "provenance": 2, "card": 1, "sums": 1}
    edit(library / "llama_cpp/server.py")
    assert repository.pending() == {"acceptance": 1, **after}
    edit(library / "quantize/llama_quantize.py")
    assert repository.pending() == {"acceptance": 1, "plan_types": 1, "quantize": 1, **after}
    edit(library / "convert/tokenizer.py")
    assert repository.pending() == {
        "acceptance": 1,
        "convert": 1,
        "plan_types": 1,
        "quantize": 1,
        **after,
    }


def test_an_edited_program_reruns_its_rule(repository: Repository) -> None:
    edit(repository.path / "workflow/scripts/publish.py")  # `all` does not need its rule
    assert repository.pending() == {}
    edit(repository.path / "workflow/scripts/card.py")
    assert repository.pending() == {"card": 1, "sums": 1}
    edit(repository.path / "workflow/scripts/summary.py")
    assert repository.pending() == {"summary": 1, "card": 1, "sums": 1}


def test_a_new_variant_runs_its_own_jobs(repository: Repository) -> None:
    model = CONFIG["models"]["tiny-qwen3.5"]
    variants = {**model["variants"], "Q6_K": {}, "mine": {"base": {"type": "Q4_0"}}}
    repository.config["models"] = {"tiny-qwen3.5": {**model, "variants": variants}}
    repository.write_config()
    assert repository.pending() == {
        "recipe": 2,
        "plan_types": 2,
        "quantize": 2,
        "convert": 2,
        "inject": 1,
        "verify": 2,
        "summary": 1,
        "provenance": 2,
        "card": 1,
        "sums": 1,
    }


def test_a_changed_head_type_reruns_its_variant(repository: Repository) -> None:
    model = CONFIG["models"]["tiny-qwen3.5"]
    repository.config["models"] = {
        "tiny-qwen3.5": {**model, "variants": {"BF16": {}, "Q8_0": {"head": "Q6_K"}}}
    }
    repository.write_config()
    assert repository.pending() == {
        "plan_types": 1,
        "quantize": 1,
        "verify": 1,
        "summary": 1,
        "provenance": 1,
        "card": 1,
        "sums": 1,
    }


def test_a_new_model_runs_its_own_jobs(repository: Repository) -> None:
    model = {**CONFIG["models"]["tiny-qwen3.5"], "variants": {"Q8_0": {}}}
    repository.config["models"] = {**CONFIG["models"], "second": model}
    repository.write_config()
    own = {"recipe": 1, "convert": 1, "plan_types": 1, "quantize": 1, "acceptance": 1, "verify": 1}
    own |= {"materials": 1, "provenance": 1, "card": 1, "sums": 1}
    assert repository.pending() == {**own, "summary": 1}


def test_a_report_does_not_depend_on_what_else_is_built(repository: Repository) -> None:
    """Not even on the BF16 file, although acceptance is compared with it."""
    model = CONFIG["models"]["tiny-qwen3.5"]
    repository.config["models"] = {"tiny-qwen3.5": {**model, "variants": {"Q8_0": {}}}}
    repository.write_config()
    assert repository.pending() == {"summary": 1, "card": 1, "sums": 1}


def test_a_publish_target_reruns_only_the_card(repository: Repository) -> None:
    model = CONFIG["models"]["tiny-qwen3.5"]
    repository.config["models"] = {
        "tiny-qwen3.5": {**model, "publish": {"repo": "Owner/tiny-MTP-GGUF"}}
    }
    repository.write_config()
    assert repository.pending() == {"card": 1, "sums": 1}


def test_a_misspelt_key_is_refused_with_its_path(repository: Repository) -> None:
    model = CONFIG["models"]["tiny-qwen3.5"]
    repository.config["models"] = {
        "tiny-qwen3.5": {**model, "variants": {"Q8_0": {"haed": "Q6_K"}}}
    }
    repository.write_config()
    done = repository.snakemake()
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "models/tiny-qwen3.5/variants/Q8_0/haed: unknown key" in done.stderr


def test_a_file_that_fails_verification_is_not_published(repository: Repository) -> None:
    """No head accepts every draft: the candidate stays in work/, the final name does not appear."""
    model = CONFIG["models"]["tiny-qwen3.5"]
    repository.config["models"] = {
        "second": {**model, "min_acceptance": 1.0, "variants": {"IQ4_XS": {}}}
    }
    repository.write_config()
    done = repository.snakemake()
    results = repository.path / "results/second"
    assert done.returncode == 1 and "drafts accepted, fewer than 100%" in done.stdout + done.stderr
    assert list(results.glob("*.gguf")) == [] and (results / "work/quantized/IQ4_XS.gguf").exists()


def test_a_touched_conversion_reruns_nothing(repository: Repository) -> None:
    """The published BF16 file and the converted one are hard links, which Snakemake touches."""
    (repository.path / "results/tiny-qwen3.5/work/convert/all.gguf").touch()
    assert repository.pending() == {}
    assert repository.snakemake().returncode == 0
