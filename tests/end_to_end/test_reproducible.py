"""The same input gives the same bytes with any number of threads."""

from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest


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
