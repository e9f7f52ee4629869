"""Configuration and headers tell if a checkpoint can be converted, before any download."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import CHECKPOINTS
from mtpforge.checkpoint.checkpoint import Checkpoint, Outline
from mtpforge.checkpoint.quantization import with_modelopt
from mtpforge.checkpoint.safetensors import CheckpointTensor
from mtpforge.convert import convertible
from mtpforge.errors import CheckpointError

Packed = dict[str, tuple[str, tuple[int, ...]]]
"""The tensors that a quantizer writes for a matrix: ending of the name -> type and shape."""


def nvfp4(rows: int, columns: int) -> Packed:
    scale = ("F8_E4M3", (rows, columns // 16))
    one: tuple[str, tuple[int, ...]] = ("F32", ())
    return {
        "weight": ("U8", (rows, columns // 2)),
        "weight_scale": scale,
        "weight_scale_2": one,
        "input_scale": one,
    }


def gptq(rows: int, columns: int) -> Packed:
    return {
        "qweight": ("I32", (columns // 8, rows)),
        "qzeros": ("I32", (columns // 128, rows // 8)),
        "scales": ("F16", (columns // 128, rows)),
        "g_idx": ("I32", (columns,)),
    }


def awq(rows: int, columns: int) -> Packed:
    return {
        "qweight": ("I32", (columns, rows // 8)),
        "qzeros": ("I32", (columns // 128, rows // 8)),
        "scales": ("F16", (columns // 128, rows)),
    }


def mlx(rows: int, columns: int) -> Packed:
    group = ("BF16", (rows, columns // 64))
    return {"weight": ("U32", (rows, columns // 8)), "scales": group, "biases": group}


def bitsandbytes(rows: int, columns: int) -> Packed:
    return {
        "weight": ("U8", (rows * columns // 2, 1)),
        "weight.absmax": ("F32", (rows * columns // 64,)),
        "weight.quant_map": ("F32", (16,)),
        "weight.quant_state.bitsandbytes__nf4": ("U8", (80,)),
    }


def eight_bit_integers(rows: int, columns: int) -> Packed:
    return {"weight": ("I8", (rows, columns)), "weight_scale": ("BF16", (rows, 1))}


KINDS: dict[str, tuple[Callable[[int, int], Packed], dict[str, Any], str]] = {
    "nvfp4": (
        nvfp4,
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
        "quant_method modelopt, quant_algo NVFP4",
    ),
    "gptq": (
        gptq,
        {"quantization_config": {"quant_method": "gptq", "bits": 4, "group_size": 128}},
        "quant_method gptq, bits 4",
    ),
    "awq": (
        awq,
        {"quantization_config": {"quant_method": "awq", "bits": 4}},
        "quant_method awq, bits 4",
    ),
    "mlx": (mlx, {"quantization": {"group_size": 64, "bits": 4}}, "bits 4"),
    "bitsandbytes": (
        bitsandbytes,
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}},
        "quant_method bitsandbytes",
    ),
    "compressed-tensors": (
        eight_bit_integers,
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "int-quantized"}},
        "quant_method compressed-tensors, format int-quantized",
    ),
    "without a word": (mlx, {}, "is U32"),
}


def outline(name: str = "tiny-qwen3.5") -> Outline:
    """An embedded checkpoint, as a listing describes it."""
    found = Checkpoint(CHECKPOINTS / name)
    return Outline(Path("Owner/model"), found.config, found.tensors)


def quantized(kind: str, head: bool) -> Outline:
    """The projections of the trunk, and of the head if asked, as a quantizer stores them."""
    store, settings, _ = KINDS[kind]
    plain = outline()
    tensors: dict[str, CheckpointTensor] = {}
    for name, tensor in plain.tensors.items():
        if not name.endswith("_proj.weight") or (name.startswith("mtp.") and not head):
            tensors[name] = tensor
            continue
        for ending, (dtype, shape) in store(*tensor.shape).items():
            stored = name.removesuffix("weight") + ending
            tensors[stored] = replace(tensor, name=stored, dtype=dtype, shape=shape)
    return Outline(plain.directory, plain.config | settings, tensors)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["all", "trunk", "draft"])
def test_quantized_weights_are_refused_by_the_name_of_the_quantization(
    kind: str, part: str
) -> None:
    error = convertible.refusal(quantized(kind, head=True), "mtpforge", part)
    assert re.search(rf"its weights are quantized \(.*{KINDS[kind][2]}", str(error))


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_that_is_not_quantized_converts_alone(kind: str) -> None:
    assert convertible.refusal(quantized(kind, head=False), "mtpforge", "head") is None
    assert convertible.refusal(quantized(kind, head=True), "mtpforge", "head") is not None


def test_settings_of_modelopt_beside_config_json_are_named() -> None:
    packed = quantized("nvfp4", head=True)
    config = {key: value for key, value in packed.config.items() if key != "quantization_config"}
    beside = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    found = Outline(packed.directory, with_modelopt(config, beside), packed.tensors)
    error = convertible.refusal(found, "mtpforge", "all")
    assert "quant_method modelopt, quant_algo NVFP4" in str(error)


@pytest.mark.parametrize("name", ["tiny-qwen3.5", "tiny-qwen3.5-moe"])
def test_what_can_be_converted_is_planned_without_values(name: str) -> None:
    for part in ("all", "trunk", "head", "draft"):
        convertible.check(outline(name), "mtpforge", part)
    assert convertible.choose(outline(name), "all") == "mtpforge"


def test_a_lost_head_is_refused_unless_only_the_trunk_is_wanted() -> None:
    whole = outline()
    kept = {name: t for name, t in whole.tensors.items() if not name.startswith("mtp.")}
    lost = Outline(whole.directory, whole.config, kept)
    with pytest.raises(CheckpointError, match=r"no mtp\.\* tensors: this checkpoint has lost"):
        convertible.check(lost, "mtpforge", "all")
    convertible.check(lost, "mtpforge", "trunk")
    assert convertible.head_tensors(lost, "mtpforge") == []


def test_a_missing_tensor_is_named() -> None:
    whole = outline()
    gone = next(name for name in whole.tensors if name.endswith("down_proj.weight"))
    kept = {name: t for name, t in whole.tensors.items() if name != gone}
    with pytest.raises(CheckpointError, match=r"no tensor model\.layers\.\d+\.mlp\.down_proj"):
        convertible.check(Outline(whole.directory, whole.config, kept), "mtpforge", "all")


def test_metadata_that_cannot_be_written_are_refused() -> None:
    whole = outline()
    text = {**whole.config["text_config"], "rope_parameters": {"rope_type": "spiral"}}
    odd = Outline(whole.directory, {**whole.config, "text_config": text}, whole.tensors)
    with pytest.raises(CheckpointError, match="rope_type is 'spiral'"):
        convertible.check(odd, "mtpforge", "all")


def glm(**changes: Any) -> Outline:
    """The least of a GLM-4.5: an embedding, and a head as the layer after the last."""
    config = {
        "architectures": ["Glm4MoeForCausalLM"],
        "num_hidden_layers": 2,
        "num_nextn_predict_layers": 1,
    }
    names = ("embed_tokens.weight", "layers.2.eh_proj.weight", "layers.2.enorm.weight")
    tensors = {
        f"model.{name}": CheckpointTensor(
            f"model.{name}", "BF16", shape=(4, 4), shard="a", offset=0, size=32
        )
        for name in names
    }
    return Outline(Path("Owner/model"), config | changes, tensors)


def test_the_converter_of_an_architecture_is_found() -> None:
    assert convertible.choose(glm(), "all") == "llama.cpp"
    with pytest.raises(CheckpointError, match=r"unknown architecture Glm4.*converter: llama\.cpp"):
        convertible.check(glm(), "mtpforge", "all")
    with pytest.raises(CheckpointError, match="converter: mtpforge"):
        convertible.check(outline(), "llama.cpp", "trunk")


def test_quantizations_that_upstream_cannot_read_are_refused_before_it_runs() -> None:
    def found(**settings: Any) -> str:
        return str(convertible.refusal(glm(quantization_config=settings), "llama.cpp", "all"))

    for method in ("awq", "bitsandbytes", "quark", "torchao"):
        assert f"quant_method {method}), which llama.cpp's converter" in found(quant_method=method)
    assert "cannot read" in found(quant_method="compressed-tensors", format="marlin-24")
    assert "quant_method must be a text, not \"['fp8']\"" in found(quant_method=["fp8"])
    assert "by MLX, bits 4" in str(
        convertible.refusal(glm(quantization={"group_size": 64, "bits": 4}), "llama.cpp", "trunk")
    )
    assert found(quant_method="fp8") == found(quant_method="modelopt") == "None"
    assert found(quant_algo="NVFP4") == "None"
    assert found(quant_method="compressed-tensors", format="pack-quantized") == "None"


def test_a_refusal_names_the_blocks_that_are_missing_or_the_architecture() -> None:
    with pytest.raises(CheckpointError, match=r"1 head layers.*2 blocks are declared"):
        convertible.choose(glm(num_nextn_predict_layers=2), "all")
    unknown = r"unknown architecture KimiForCausalLM: .* models with an MTP head: Qwen.*Glm4Moe"
    with pytest.raises(CheckpointError, match=unknown):
        convertible.choose(glm(architectures=["KimiForCausalLM"]), "all")


def test_a_label_names_the_quantization_once() -> None:
    error = CheckpointError("unknown architecture A")
    said = convertible.explain(error, quantized("nvfp4", head=True), "Owner/model")
    assert str(said) == (
        "Owner/model (quant_method modelopt, quant_algo NVFP4): unknown architecture A"
    )
    assert str(convertible.explain(said, quantized("nvfp4", head=True), "x")).count("NVFP4") == 1
