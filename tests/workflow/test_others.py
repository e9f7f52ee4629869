"""Other people's quantizations are fetched, compared with the BF16 file, and deleted."""

import json
from pathlib import Path

import pytest
from conftest import CHECKPOINTS
from hub import COMMIT, serve
from mtpforge.convert import native
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.quantize.llama_quantize import quantize
from mtpforge.quantize.request import QuantizeRequest
from mtpforge.rules.build import Build
from repository import Repository

MODEL = "tiny-qwen3.5"
THEIRS = {"repo": "Somebody/Tiny-GGUF", "revision": COMMIT}


def theirs(folder: Path, toolchain: Path) -> Path:
    """A repository with a quantization of the model, and one of another model."""
    folder.mkdir()
    for name, file in ((MODEL, "Tiny-IQ4_XS.gguf"), ("tiny-qwen3.5-moe", "Other-IQ4_XS.gguf")):
        whole = folder / "whole.gguf"
        native.convert(CHECKPOINTS / name, whole, "trunk", tokenizer_pre="qwen35")
        llama = LlamaCpp(toolchain, threads=1)
        quantize(whole, folder / file, QuantizeRequest("IQ4_XS"), llama)
        whole.unlink()
    return folder


@pytest.fixture
def repository(tmp_path: Path, toolchain: Path) -> Repository:
    copy = Repository(tmp_path / "repository", toolchain)
    text = copy.path / "held-out.txt"
    text.write_bytes((CHECKPOINTS / "held-out.txt").read_bytes())
    (copy.path / "mine.gguf").write_bytes(b"GGUF")
    compare = [{**THEIRS, "file": f"{name}-IQ4_XS.gguf"} for name in ("Tiny", "Other")]
    copy.config["models"][MODEL] |= {
        "measure": {"n_max": [1], "repeats": 1, "text": "held-out.txt", "chunks": 2},
        "compare": [*compare, {"path": "mine.gguf"}],
    }
    copy.write_config()
    return copy


def test_files_from_the_hub_are_compared_and_deleted(
    tmp_path: Path, repository: Repository, toolchain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file of another model, or none at all, gets a reason in place of figures."""
    remote = theirs(tmp_path / "theirs", toolchain)
    size = (remote / "Tiny-IQ4_XS.gguf").stat().st_size
    monkeypatch.chdir(repository.path)
    results = Build(repository.config).measure.all_others()
    with serve({THEIRS["repo"]: remote}) as hub:
        variables = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
        done = repository.snakemake(*results[1:], target=results[0], **variables)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    found = [json.loads((repository.path / path).read_text()) for path in results]
    names = [f"{THEIRS['repo']}/{name}-IQ4_XS.gguf" for name in ("Tiny", "Other")]
    assert [each["name"] for each in found] == [*names, "mine.gguf"]
    assert 0 < found[0]["kl_divergence"]["mean"] < 0.1 and found[0]["bytes"] == size
    assert found[0]["revision"] == COMMIT and "problem" not in found[0]
    assert found[1]["kl_divergence"] is None and found[1]["problem"] == (
        "of another model: its architecture is qwen35moe, not qwen35"
    )
    assert "mine.gguf: truncated" in found[2]["problem"]
    fetched = repository.path / "resources/hub"
    assert not list(fetched.rglob("*.gguf*")) and (repository.path / "mine.gguf").exists()
    assert pending(repository, results) == ""


def pending(repository: Repository, results: list[str]) -> str:
    """The rules of the jobs that a run for these files would have."""
    done = repository.snakemake(*results[1:], "--dry-run", target=results[0])
    assert done.returncode == 0, done.stderr
    return (done.stdout + done.stderr).partition("Job stats:")[2]
