"""`publish: {when: verified, delete_after: true}`: file by file, and none stays on the disk."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Run
from hub import Fault, Hub, serve
from repository import CONFIG, Repository

MODEL = "tiny-qwen3.5"
TARGET = "Owner/tiny-qwen3.5-MTP-GGUF"
GGUFS = ["tiny-qwen3.5-BF16.gguf", "tiny-qwen3.5-Q8_0.gguf"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    new = tmp_path_factory.mktemp("hub")
    (new / "objects").mkdir()
    with serve({}, new) as running:
        yield running


@pytest.fixture(scope="module")
def variables(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("home")
    return {
        "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_token", "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(home),
    }  # fmt: skip


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, toolchain: Path) -> Repository:
    copy = Repository(tmp_path_factory.mktemp("publish") / "repository", toolchain)
    set_variants(copy, "BF16", "Q8_0")
    return copy


def set_variants(copy: Repository, *names: str) -> None:
    publish = {"repo": TARGET, "when": "verified", "delete_after": True}
    model = {**CONFIG["models"][MODEL], "publish": publish, "variants": {n: {} for n in names}}
    model["max_acceptance_drop"] = 1  # the BF16 file is not run once more
    copy.config["models"] = {MODEL: model}
    copy.write_config()


def results(copy: Repository) -> Path:
    return copy.path / "results" / MODEL


def here(copy: Repository) -> list[str]:
    """Published files, and those that are verified under their first names."""
    quantized = results(copy).glob("work/quantized/*.gguf")
    return sorted(path.name for path in (*results(copy).glob("*.gguf"), *quantized))


def test_a_killed_run_has_sent_and_deleted_what_had_passed(
    repository: Repository, hub: Hub, variables: dict[str, str]
) -> None:
    hub.faults["put"] = [Fault("stall", skip=1)]
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "publish"]
    process = subprocess.Popen(
        command, cwd=repository.path, env={**os.environ, **variables}, start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while len(hub.received) < 2:
            assert process.poll() is None, "ended before the second upload"
            time.sleep(0.1)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert len(hub.commits) == 1 and hub.commits[0][0] in GGUFS
    (left,) = set(GGUFS) - set(hub.commits[0])
    assert left in here(repository) and hub.commits[0][0] not in here(repository)
    assert not (results(repository) / "README.md").exists()


def test_the_next_run_sends_the_other_file_and_then_the_rest(
    repository: Repository, hub: Hub, variables: dict[str, str]
) -> None:
    hub.received.clear()
    done = repository.snakemake(target="publish", **variables)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    first, second, rest = hub.commits
    assert sorted([*first, *second]) == GGUFS
    assert {"README.md", "SHA256SUMS"} <= set(rest) and not set(rest) & set(GGUFS)
    assert len(hub.received) == 1  # the others are small, and are sent with the commit
    there = hub.repositories[TARGET]
    assert {path.name for path in there.glob("*.gguf")} == set(GGUFS)
    assert here(repository) == []


def test_nothing_is_left_to_do(
    repository: Repository, hub: Hub, variables: dict[str, str], run: Run
) -> None:
    assert repository.pending() == {}
    hub.received.clear()
    done = repository.snakemake(target="publish", **variables)
    assert done.returncode == 0 and "0 files to upload" in done.stdout + done.stderr
    assert len(hub.commits) == 3 and not hub.received
    checked = run("check_results.py", results(repository))
    assert checked.returncode == 0, checked.stderr
    assert "tiny-qwen3.5-Q8_0.gguf: not here: it was uploaded" in checked.stderr


def test_a_new_variant_makes_only_itself(repository: Repository) -> None:
    set_variants(repository, "BF16", "Q8_0", "Q4_0")
    new = {"recipe", "plan_types", "quantize", "verify", "provenance", "summary"}
    assert repository.pending() == dict.fromkeys(new, 1)
    done = repository.snakemake("--dry-run", target="publish")
    for rule in ("upload", "delete", "card", "sums", "quantize"):
        assert f"\n{rule} " in done.stdout + done.stderr
    assert "tiny-qwen3.5-Q8_0.gguf" not in done.stdout
    set_variants(repository, "BF16", "Q8_0")


def test_a_file_is_made_again_if_another_repository_lacks_it(repository: Repository) -> None:
    model = repository.config["models"][MODEL]
    model["publish"] = {**model["publish"], "repo": "Owner/another"}
    repository.write_config()
    assert repository.pending() == {}  # `all` uploads nothing
    done = repository.snakemake("--dry-run", target="publish")
    text = done.stdout + done.stderr
    assert all(f"\n{rule} " in text for rule in ("upload", "verify", "quantize"))
