"""A model whose source is a repository of the Hub goes through the whole workflow, to the bytes that the folder gives."""

import shutil
from pathlib import Path

from conftest import CHECKPOINTS
from hub import COMMIT, serve
from repository import CONFIG, Repository


def test_a_repository_gives_the_same_file_as_the_folder(tmp_path: Path, built: Path, toolchain: Path) -> None:
    remote = Path(shutil.copytree(CHECKPOINTS / "tiny-qwen3.5", tmp_path / "remote", ignore=shutil.ignore_patterns("prompts")))
    copy = Repository(tmp_path / "repository", toolchain)
    model = {**CONFIG["models"]["tiny-qwen3.5"], "source": {"repo": "Owner/tiny-qwen3.5", "revision": COMMIT}}
    copy.config["models"] = {"fetched": {**model, "variants": {"BF16": {}}}}
    copy.write_config()
    with serve({"Owner/tiny-qwen3.5": remote}) as hub:
        done = copy.snakemake(HF_ENDPOINT=hub.endpoint, HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    name = "tiny-qwen3.5-BF16.gguf"
    assert (copy.path / "results/fetched" / name).read_bytes() == (built / "results/tiny-qwen3.5" / name).read_bytes()
    assert copy.pending() == {}  # without the Hub: a commit does not change
