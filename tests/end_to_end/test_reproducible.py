"""The same input gives the same bytes: threads, folder, order and environment change nothing."""

import os
import shutil
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from conftest import CHECKPOINTS
from hub import COMMIT, serve
from repository import Repository

CANARY = "hf_canary0123456789"


@pytest.mark.parametrize("model", ["tiny-qwen3.5", "tiny-qwen3.5-moe"])
def test_quantization_does_not_depend_on_threads(
    built: Path, run: Callable[..., Any], tmp_path: Path, model: str
) -> None:
    source, digests = built / "results" / model / "work/convert/all.gguf", set()
    for threads in (1, 2, 4):
        out = tmp_path / f"{threads}.gguf"
        done = run("quantize.py", source, "--type", "Q4_K_M", "--threads", threads, "--out", out)
        assert done.returncode == 0, done.stderr
        digests.add(sha256(out.read_bytes()).hexdigest())
    assert digests == {
        sha256((built / f"results/{model}/{model}-Q4_K_M.gguf").read_bytes()).hexdigest()
    }


def test_another_environment_changes_no_byte_and_no_secret_stays(
    built: Path, toolchain: Path, tmp_path: Path
) -> None:
    """A second build: elsewhere, from a gated Hub, one job at a time, with hostile variables."""
    model = "tiny-qwen3.5"
    remote = Path(
        shutil.copytree(
            CHECKPOINTS / model, tmp_path / "remote", ignore=shutil.ignore_patterns("prompts")
        )
    )
    copy = Repository(tmp_path / "another folder", toolchain)
    variants = {"Q4_K_M-injected": {"base": {"type": "Q4_K_M"}, "head": "Q8_0"}, "BF16": {}}
    source = {"repo": f"Owner/{model}", "revision": COMMIT}
    copy.config["models"][model] |= {"source": source, "variants": variants}
    copy.write_config()
    with serve({source["repo"]: remote}) as hub:
        hub.gated.add(source["repo"])
        variables = hostile_variables(tmp_path) | {"HF_ENDPOINT": hub.endpoint}
        before = os.umask(0o027)
        try:
            done = copy.snakemake("--cores", "1", **variables)
        finally:
            os.umask(before)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        assert ("hub", f"Bearer {CANARY}") in hub.tokens
    for variant in variants:
        name = Path("results", model, f"{model}-{variant}.gguf")
        assert (copy.path / name).read_bytes() == (built / name).read_bytes(), variant
        assert (copy.path / name).stat().st_mode & 0o777 == 0o640
    assert CANARY not in done.stdout + done.stderr
    files = [path for path in copy.path.rglob("*") if path.is_file()]
    assert any(".snakemake" in path.parts for path in files)
    assert not [path for path in files if CANARY.encode() in path.read_bytes()]


def hostile_variables(folder: Path) -> dict[str, str]:
    """Another gguf and hash seed, a C locale, options of llama.cpp, and tokens."""
    (folder / "path/gguf").mkdir(parents=True)
    (folder / "path/gguf/__init__.py").write_text("raise SystemExit('another gguf')\n")
    (folder / "home").mkdir()
    (folder / "home/token").write_text(CANARY)
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "LLAMA_API_KEY")
    return {
        **dict.fromkeys(names, CANARY),
        "HF_HOME": str(folder / "home"),
        "TZ": "Asia/Tokyo",
        "USER": "another",
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONHASHSEED": "7",
        "PYTHONSAFEPATH": "1",
        "PYTHONOPTIMIZE": "1",
        "PYTHONPATH": str(folder / "path"),
        "OMP_NUM_THREADS": "1",
        "LLAMA_ARG_CTX_SIZE": "64",
        "LLAMA_ARG_SPEC_DRAFT_N_MAX": "5",
        "GGML_BACKEND_PATH": str(folder / "path"),
    }


def test_a_pattern_that_matches_no_tensor_is_refused(
    built: Path, fails: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text("atn_.*: Q6_K\n")
    source = built / "results/tiny-qwen3.5/work/convert/all.gguf"
    message = fails(
        "quantize.py",
        source,
        "--type",
        "Q4_K_M",
        "--tensors",
        tmp_path / "recipe.yaml",
        out=tmp_path / "out.gguf",
    )
    assert "'atn_.*' matches no tensor" in message
