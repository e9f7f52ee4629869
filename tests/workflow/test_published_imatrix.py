"""The importance matrix that was computed for a model is published with it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, Run
from hub import Hub, serve
from mtpforge.io.ranges import digest_of
from mtpforge.quantize import imatrix
from repository import CONFIG, Repository

MODEL = "tiny-qwen3.5"
TARGET = "Owner/tiny-qwen3.5-MTP-GGUF"
MATRIX = "tiny-qwen3.5-imatrix.gguf"
FILE = "tiny-qwen3.5-Q4_0.gguf"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    new = tmp_path_factory.mktemp("hub")
    (new / "objects").mkdir()
    with serve({}, new) as running:
        yield running


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, toolchain: Path) -> Repository:
    copy = Repository(tmp_path_factory.mktemp("publish") / "repository", toolchain)
    shutil.copy(ROOT / "tests/checkpoints/held-out.txt", copy.path / "text.txt")
    set_model(copy, publish={"repo": TARGET})
    return copy


def set_model(copy: Repository, **keys: object) -> None:
    variants = {"Q4_0": {"imatrix": {"text": "text.txt"}}}
    model = {**CONFIG["models"][MODEL], "variants": variants, "max_acceptance_drop": 1, **keys}
    copy.config["models"] = {MODEL: model}
    copy.write_config()


def publish(copy: Repository, hub: Hub) -> str:
    variables = {
        "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_token", "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(copy.path / "home"),
    }  # fmt: skip
    done = copy.snakemake(target="publish", **variables)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def results(copy: Repository) -> Path:
    return copy.path / "results" / MODEL


def test_it_is_uploaded_listed_and_linked(repository: Repository, hub: Hub, run: Run) -> None:
    publish(repository, hub)
    there = hub.repositories[TARGET]
    assert {path.name for path in there.glob("*.gguf")} == {FILE, MATRIX}
    line = f"{digest_of(there / MATRIX)}  {MATRIX}"
    assert line in (there / "SHA256SUMS").read_text().splitlines()
    assert f"[{MATRIX}]({MATRIX}) is the importance matrix" in (there / "README.md").read_text()
    assert imatrix.read(there / MATRIX)
    done = run("check_results.py", there)
    assert done.returncode == 0, done.stderr


def test_it_is_another_name_of_the_intermediate(repository: Repository) -> None:
    (made,) = results(repository).glob("work/imatrix/*.gguf")
    assert made.samefile(results(repository) / MATRIX)


def test_it_stays_if_intermediates_are_deleted(repository: Repository) -> None:
    done = repository.snakemake("--delete-temp-output")
    assert done.returncode == 0 and (results(repository) / MATRIX).exists()
    assert not [*results(repository).glob("work/imatrix/*.gguf")]
    assert repository.pending() == {}
    assert set(repository.pending("publish")) == {"publish"}


def test_it_stays_if_models_are_deleted_after_their_upload(
    repository: Repository, hub: Hub, run: Run
) -> None:
    target = {"repo": "Owner/another", "when": "verified", "delete_after": True}
    set_model(repository, publish=target)
    commits = len(hub.commits)
    publish(repository, hub)
    first, rest = hub.commits[commits:]
    assert first == [FILE] and {MATRIX, "SHA256SUMS"} <= set(rest)
    assert [path.name for path in results(repository).glob("*.gguf")] == [MATRIX]
    assert run("check_results.py", results(repository)).returncode == 0
    assert set(repository.pending("publish")) == {"publish"}


def test_a_damaged_one_is_neither_published_nor_listed(repository: Repository, run: Run) -> None:
    folder = results(repository)
    content = (folder / MATRIX).read_bytes()
    (folder / MATRIX).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    digest = folder / "work/published" / f"{Path(MATRIX).stem}.json"
    reports = sorted(folder.glob("reports/*.json"))
    done = run("sums.py", folder, "--reports", *reports, "--matrices", digest)
    assert done.returncode == 1 and f"{MATRIX}: " in done.stderr
    out = folder / "other.gguf"
    done = run("publish_imatrix.py", folder / MATRIX, "--recorded", digest, "--out", out)
    assert done.returncode == 1 and f"{MATRIX}: " in done.stderr and not out.exists()


def test_nothing_is_published_for_a_model_that_is_not(repository: Repository) -> None:
    set_model(repository)
    assert "publish_imatrix" not in repository.pending()
