"""NVFP4 checkpoints: what llama.cpp's converter is given, and what is refused before it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CHECKPOINTS, Run
from gguf.constants import GGMLQuantizationType
from layouts import Tensors, four_bit, read_tensors, write_checkpoint
from mtpforge.checkpoint.checkpoint import Checkpoint
from mtpforge.checkpoint.nvfp4 import is_nvfp4
from mtpforge.convert import convertible, native, upstream
from mtpforge.errors import CheckpointError, ConfigError
from mtpforge.gguf.reader import Gguf, TensorInfo
from mtpforge.quantize.recipe import plan_overrides
from mtpforge.rules import layout
from mtpforge.rules.build import Build

SOURCE = CHECKPOINTS / "tiny-qwen3.5"
UP = "model.language_model.layers.0.mlp.up_proj"


def write_nvfp4(folder: Path, change: Callable[[Tensors], object] = lambda t: None) -> Path:
    """The dense checkpoint in NVFP4, with its tensors changed."""
    config = json.loads((SOURCE / "config.json").read_text())
    tensors = four_bit(config, read_tensors(SOURCE))
    change(tensors)
    return write_checkpoint(folder / "tiny-nvfp4", SOURCE, config, tensors)


def test_mtpforge_proposes_upstreams_converter(tmp_path: Path) -> None:
    folder = write_nvfp4(tmp_path)
    assert convertible.choose(Checkpoint(folder), "all") == "llama.cpp"
    for part in ("all", "trunk"):
        convertible.check(Checkpoint(folder), "llama.cpp", part)
        with pytest.raises(CheckpointError) as caught:
            native.convert(folder, tmp_path / "out.gguf", part, "qwen35")
        assert "(quant_method modelopt, quant_algo NVFP4)" in str(caught.value)
        assert str(caught.value).count("set `converter: llama.cpp`") == 1
    for part in ("head", "draft"):  # which are not packed
        native.convert(folder, tmp_path / f"{part}.gguf", part, "qwen35")


def test_upstream_sees_the_settings_beside_config_json(tmp_path: Path) -> None:
    folder = write_nvfp4(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    settings = config.pop("quantization_config")
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": settings}))
    checkpoint = Checkpoint(folder)
    upstream.check(checkpoint, "all")
    seen = upstream.without_code(checkpoint, tmp_path) / "hf_quant_config.json"
    assert json.loads(seen.read_text())["quantization"]["quant_algo"] == "NVFP4"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda t: t.pop(f"{UP}.weight_scale"), f"{UP}.weight_scale is missing"),
        (lambda t: t.pop(f"{UP}.weight_scale_2"), f"{UP}.weight_scale_2 is missing"),
        (
            lambda t: t.update({f"{UP}.weight_scale": t[f"{UP}.weight_scale_2"]}),
            f"{UP}.weight_scale is missing or not F8_E4M3 of shape [256, 16]",
        ),
        (
            lambda t: t.update({f"{UP}.weight": ("U8", np.zeros((256, 100), "u1"))}),
            "multiples of 64 weights",
        ),
        (
            lambda t: t.update({"mtp.fc.weight": ("U8", np.zeros((256, 256), "u1"))}),
            "mtp.fc.weight",
        ),
    ],
)
def test_a_scale_that_upstream_would_take_for_1_is_refused(
    tmp_path: Path, change: Callable[[Tensors], object], named: str
) -> None:
    with pytest.raises(CheckpointError) as caught:
        upstream.check(Checkpoint(write_nvfp4(tmp_path, change)), "all")
    assert named in str(caught.value)


def test_what_mtpforge_reads_is_not_for_upstream() -> None:
    with pytest.raises(CheckpointError, match=r"for NVFP4 weights of Qwen3_5.* only"):
        upstream.check(Checkpoint(SOURCE), "all")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, True),
        ({"quant_algo": "W4A16_NVFP4"}, True),
        ({"quant_algo": "NVFP4_AWQ"}, False),
        ({"quant_algo": "FP8"}, False),
        (
            {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "NVFP4"}}},
            True,
        ),
        (
            {"quant_algo": "MIXED_PRECISION", "quantized_layers": {"a": {"quant_algo": "FP8"}}},
            False,
        ),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, True),
        ({"format": "mixed-precision", "config_groups": {}}, False),
        (
            {
                "format": "mixed-precision",
                "config_groups": {"a": {"format": "nvfp4-pack-quantized"}},
            },
            True,
        ),
        (
            {
                "format": "mixed-precision",
                "config_groups": {
                    "a": {"format": "nvfp4-pack-quantized"},
                    "b": {"format": "float-quantized"},
                },
            },
            False,
        ),
        ({}, False),
    ],
)
def test_nvfp4_is_recognized_as_upstream_does(settings: dict[str, Any], expected: bool) -> None:
    assert is_nvfp4({"quantization_config": settings}) is expected


def test_a_packed_variant_is_the_converted_file() -> None:
    model = {
        "source": {"repo": "Owner/Name", "revision": "0" * 40},
        "converter": "llama.cpp",
        "variants": {"NVFP4": {}, "trunk": {"type": "NVFP4", "head": "none"}},
    }
    parsed = Build({"models": {"m": model}}).config.models["m"]
    assert parsed.variants["NVFP4"].head_type == "BF16"
    assert layout.candidate(parsed, "NVFP4") == layout.converted("m", "all")
    assert layout.candidate(parsed, "trunk") == layout.converted("m", "trunk")


@pytest.mark.parametrize("kind", ["NVFP4", "MXFP4"])
def test_packed_weights_are_not_quantized_again(tmp_path: Path, kind: str) -> None:
    info = TensorInfo("blk.0.ffn_up.weight", (64, 64), GGMLQuantizationType[kind])
    source = Gguf(tmp_path / "packed.gguf", {}, {info.name: info}, {})
    with pytest.raises(ConfigError, match=rf"blk\.0\.ffn_up\.weight is {kind} already"):
        plan_overrides(source, "Q4_K_M", head=(), recipe=())


def test_upstreams_conversion_may_be_its_own_reference(run: Run, tmp_path: Path) -> None:
    """The workflow verifies a variant BF16 or NVFP4 so: the head is proven by the conversion."""
    out = tmp_path / "head.gguf"
    native.convert(SOURCE, out, "head")
    options = ("--reference", out, "--prompts", SOURCE / "prompts", "--bin", tmp_path)
    done = run("verify.py", out, *options, "--out", tmp_path / "report.json")
    assert done.returncode == 1 and "is the file itself" not in done.stderr
