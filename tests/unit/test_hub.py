"""A checkpoint is fetched by commit with the real huggingface_hub client, only what conversion needs, and hashed."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import CHECKPOINTS, SCRIPTS
from hub import COMMIT, Hub, serve

TOKEN = "hf_thisIsASecretThatMustNotAppear"


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A Hub with the dense checkpoint as Owner/tiny-qwen3.5, and things in it that must not be fetched."""
    folder = Path(shutil.copytree(CHECKPOINTS / "tiny-qwen3.5", tmp_path / "repository", ignore=shutil.ignore_patterns("prompts")))
    for name in ("modeling.py", "pytorch_model.bin", "weights.pt"):
        (folder / name).write_text("raise SystemExit('executed')")
    with serve({"Owner/tiny-qwen3.5": folder}) as running:
        yield running


def fetch(hub: Hub, tmp_path: Path, repo: str = "Owner/tiny-qwen3.5", revision: str = COMMIT) -> "subprocess.CompletedProcess[str]":
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": TOKEN}
    command = [sys.executable, str(SCRIPTS / "fetch.py"), repo, "--revision", revision]
    paths = ["--folder", str(tmp_path / "tiny-qwen3.5"), "--out", str(tmp_path / "manifest.json")]
    return subprocess.run([*command, *paths], capture_output=True, text=True, env=environment, timeout=120)


def test_a_checkpoint_is_fetched_by_commit(hub: Hub, tmp_path: Path) -> None:
    done = fetch(hub, tmp_path)
    assert done.returncode == 0, done.stderr
    source = hub.repositories["Owner/tiny-qwen3.5"]
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert (manifest["repo"], manifest["revision"]) == ("Owner/tiny-qwen3.5", COMMIT)
    for entry in manifest["files"]:
        content = (tmp_path / "tiny-qwen3.5" / entry["name"]).read_bytes()
        assert content == (source / entry["name"]).read_bytes() and len(content) == entry["bytes"]
    names = {entry["name"] for entry in manifest["files"]}
    assert {"config.json", "tokenizer.json", "README.md"} < names and sum(n.endswith(".safetensors") for n in names) == len(
        list(source.glob("*.safetensors"))
    )
    asked = " ".join(hub.requests)
    assert ".py" not in asked and ".bin" not in asked and ".pt" not in asked
    assert TOKEN not in done.stdout + done.stderr + (tmp_path / "manifest.json").read_text()


def test_a_second_fetch_downloads_nothing(hub: Hub, tmp_path: Path) -> None:
    assert fetch(hub, tmp_path).returncode == 0
    hub.requests.clear()
    assert fetch(hub, tmp_path).returncode == 0
    assert not [request for request in hub.requests if request.startswith("GET") and "/resolve/" in request]


def test_wrong_content_of_the_right_size_is_refused_and_removed(hub: Hub, tmp_path: Path) -> None:
    hub.corrupt = sorted(hub.repositories["Owner/tiny-qwen3.5"].glob("*.safetensors"))[0].name
    done = fetch(hub, tmp_path)
    assert done.returncode == 1 and "sha256" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "manifest.json").exists() and not (tmp_path / "tiny-qwen3.5" / hub.corrupt).exists()


@pytest.mark.parametrize(("repo", "revision"), [("Owner/other", COMMIT), ("Owner/tiny-qwen3.5", "f" * 40)])
def test_what_the_hub_does_not_have_is_an_error_of_a_line(hub: Hub, tmp_path: Path, repo: str, revision: str) -> None:
    done = fetch(hub, tmp_path, repo, revision)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 1 and len(errors) == 1 and repo in errors[0] and "Traceback" not in done.stderr
    assert not (tmp_path / "manifest.json").exists()
