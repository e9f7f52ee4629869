"""A head injected into a base of another layout passes all checks and drafts in llama-server."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import base_layouts as layouts
import numpy as np
import pytest
from base_layouts import Base, write_base
from conftest import CHECKPOINTS, ROOT, SCRIPTS, Run
from mtpforge.gguf import reader

DENSE, MOE = "tiny-qwen3.5", "tiny-qwen3.5-moe"
PLAIN = {DENSE: 289 / 306, MOE: 282 / 313}
"""Acceptance of the heads in bases of the usual layout, in BF16."""
Verify = Callable[[str, Path], float]


@pytest.fixture
def trunk(run: Run, tmp_path: Path) -> Callable[[str], Path]:
    """A model's trunk in BF16."""

    def call(model: str) -> Path:
        out = tmp_path / "trunk.gguf"
        options = ("--part", "trunk", "--tokenizer-pre", "qwen35", "--out", out)
        assert run("convert.py", CHECKPOINTS / model, *options).returncode == 0
        return out

    return call


@pytest.fixture
def acceptance(run: Run, toolchain: Path, tmp_path: Path) -> Verify:
    """Inject a model's head into a base and verify it; the acceptance of its drafts."""

    def call(model: str, base: Path) -> float:
        checkpoint, out, report = CHECKPOINTS / model, tmp_path / "out.gguf", tmp_path / "r.json"
        assert run("inject.py", base, "--head", checkpoint, "--out", out).returncode == 0
        options = ("--tokenizer-pre", "qwen35", "--threads", 1, "--out", report)
        given = ("--checkpoint", checkpoint, "--base", base, "--prompts", checkpoint / "prompts")
        done = run("verify.py", out, *given, *options)
        assert done.returncode == 0, done.stdout + done.stderr
        return float(json.loads(report.read_text())["acceptance"])

    return call


def all_fused(base: Base) -> None:
    layouts.fused_experts(base)
    layouts.fused_attention(base)


def biased_heads_of_each_block(base: Base) -> None:
    layouts.biased(base)
    layouts.projected(base)
    layouts.key_heads_of_each_block(base)


def trained_output(base: Base) -> None:
    """An output matrix that a fine-tune has moved by 1%."""
    layouts.own_output(base)
    values = (base.tensors["output.weight"].astype(np.uint32) << 16).view(np.float32)
    noise = np.random.default_rng(1).standard_normal(values.shape, np.float32)
    moved = values + 0.01 * np.sqrt(np.mean(values**2)) * noise
    base.tensors["output.weight"] = (moved.view(np.uint32) >> 16).astype("<u2")


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        (MOE, all_fused),
        (MOE, layouts.scaled),
        (DENSE, trained_output),
        (DENSE, biased_heads_of_each_block),
        (DENSE, layouts.resized(1408)),
        (DENSE, layouts.resized(1268)),
    ],
    ids=["fused", "scaled", "output", "biases", "padded", "cut"],
)
def test_a_head_drafts_as_in_the_usual_layout(
    trunk: Callable[[str], Path],
    acceptance: Verify,
    tmp_path: Path,
    model: str,
    layout: Callable[[Base], None],
) -> None:
    base = write_base(trunk(model), tmp_path / "base.gguf", layout)
    assert acceptance(model, base) == pytest.approx(PLAIN[model], abs=0.01)


@pytest.mark.parametrize("model", [DENSE, MOE])
def test_a_head_drafts_in_an_nvfp4_base_with_scales(
    run: Run, trunk: Callable[[str], Path], acceptance: Verify, tmp_path: Path, model: str
) -> None:
    """As llama.cpp's converter makes them of NVFP4 checkpoints, with scales that are not 1."""
    scaled = write_base(trunk(model), tmp_path / "scaled.gguf", layouts.scaled)
    recipe, base = tmp_path / "recipe.yaml", tmp_path / "base.gguf"
    recipe.write_text("ffn_: NVFP4\n")
    done = run("quantize.py", scaled, "--type", "Q8_0", "--tensors", recipe, "--out", base)
    assert done.returncode == 0, done.stderr
    opened = reader.read(base)
    assert {opened.tensors[name].type.name for name in scale_owners(base)} >= {"NVFP4"}
    assert acceptance(model, base) > PLAIN[model] - 0.1


def scale_owners(base: Path) -> list[str]:
    """The matrices that have a scale."""
    names = reader.read(base).tensors
    return [name.replace(".scale", ".weight") for name in names if name.endswith(".scale")]


# ── fused by upstream's converter ──


CONVERTER = ROOT / "resources" / "converter"
PYTHON = CONVERTER / "environment" / "bin" / "python"


def upstreams(out: Path, *options: str) -> Path:
    """The trunk of the mixture as upstream's converter writes it."""
    program = [PYTHON, "-I", "-B", SCRIPTS / "run_upstream.py", "--tokenizer-pre", "qwen35"]
    arguments = ["--no-mtp", "--outtype", "bf16", "--outfile", out, *options]
    command = [*program, CONVERTER / "source", CHECKPOINTS / MOE, *arguments]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


@pytest.mark.skipif(
    not PYTHON.exists(), reason="upstream's environment is missing: `make converter`"
)
def test_a_head_drafts_in_a_base_that_upstream_fused(acceptance: Verify, tmp_path: Path) -> None:
    fused = upstreams(tmp_path / "fused.gguf", "--fuse-gate-up-exps", "--fuse-qkv")
    plain = upstreams(tmp_path / "plain.gguf")
    ours = write_base(plain, tmp_path / "ours.gguf", all_fused)
    assert tensor_digests(ours) == tensor_digests(fused)
    assert acceptance(MOE, fused) == pytest.approx(PLAIN[MOE], abs=0.01)


def tensor_digests(path: Path) -> dict[str, str]:
    digests = reader.digests(path)
    del digests["header"]
    return digests
