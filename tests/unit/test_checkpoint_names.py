"""Tensors that are no weights, and names, shapes and flags that contradict each other."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CHECKPOINTS
from layouts import Tensors, read_tensors, separate_experts, write_checkpoint
from mtpforge.checkpoint.checkpoint import Checkpoint
from mtpforge.convert import native, upstream_head
from mtpforge.errors import CheckpointError
from mtpforge.gguf import reader

DENSE, MOE = CHECKPOINTS / "tiny-qwen3.5", CHECKPOINTS / "tiny-qwen3.5-moe"
EMBEDDINGS = "model.language_model.embed_tokens.weight"


def load(source: Path) -> tuple[dict[str, Any], Tensors]:
    return json.loads((source / "config.json").read_text()), read_tensors(source)


def convert(
    tmp_path: Path, config: dict[str, Any], tensors: Tensors, part: str = "all"
) -> reader.Gguf:
    """Convert a checkpoint that is named as the embedded one, so that the metadata are equal."""
    folder = tmp_path / "tiny-qwen3.5"
    if not folder.exists():
        write_checkpoint(folder, DENSE, config, tensors)
    native.convert(folder, tmp_path / f"{part}.gguf", part, "qwen35")
    return reader.read(tmp_path / f"{part}.gguf")


def refusal(*arguments: Any) -> str:
    with pytest.raises(CheckpointError) as caught:
        convert(*arguments)
    return str(caught.value)


BUFFERS: Tensors = {
    "model.language_model.rotary_emb.inv_freq": ("F32", np.ones(8, "<f4")),
    "model.language_model.rotary_emb.original_inv_freq": ("F32", np.ones(8, "<f4")),
    "model.language_model.layers.3.self_attn.rotary_emb.cos_cached": ("BF16", np.ones(8, "<u2")),
    "model.language_model.layers.3.self_attn.masked_bias": ("F32", np.ones((), "<f4")),
    "model.language_model.layers.3.attn.bias": ("F32", np.ones((1, 1, 8, 8), "<f4")),
    "model.language_model.embeddings.position_ids": ("F32", np.ones((1, 8), "<f4")),
    "mtp.layers.0.self_attn.rotary_emb.inv_freq": ("F32", np.ones(8, "<f4")),
}


@pytest.mark.parametrize("part", ["all", "trunk", "head", "draft"])
def test_buffers_are_skipped_with_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], part: str
) -> None:
    config, tensors = load(DENSE)
    made = convert(tmp_path, config, {**tensors, **BUFFERS}, part)
    plain = convert(tmp_path / "plain", config, tensors, part)
    assert made.path.read_bytes() == plain.path.read_bytes()
    assert "skipped 7 buffers, which are not weights" in capsys.readouterr().err


def test_a_doubled_language_model_in_all_names_changes_nothing(tmp_path: Path) -> None:
    """As a text model wrote them that was loaded from a checkpoint with a vision tower."""
    config, tensors = load(DENSE)
    doubled = {
        name.replace("model.", "model.language_model.", 1) if "mtp." not in name else name: tensor
        for name, tensor in tensors.items()
    }
    assert {"visual", "language_model"} == {n.split(".")[2] for n in doubled if "mtp." not in n}
    made = convert(tmp_path, config, doubled)
    plain = convert(tmp_path / "plain", config, tensors)
    assert reader.digests(made.path, 1) == reader.digests(plain.path, 1)


@pytest.mark.parametrize(
    "vision",
    [
        "visual",
        "vision_tower",
        "model.vision_tower",
        "language_model.visual",
        "language_model.model.visual",
    ],
)
def test_a_vision_tower_is_left_out_under_each_of_its_names(tmp_path: Path, vision: str) -> None:
    config, tensors = load(DENSE)
    renamed = {name.replace("model.visual.", f"{vision}."): t for name, t in tensors.items()}
    made = convert(tmp_path, config, renamed)
    plain = convert(tmp_path / "plain", config, tensors)
    assert made.path.read_bytes() == plain.path.read_bytes()
    tower = upstream_head.vision_tensors(Checkpoint(tmp_path / "tiny-qwen3.5"))
    assert bool(tower) == (vision == "visual")  # upstream knows no other name


@pytest.mark.parametrize("top", [True, False])
def test_tied_embeddings_may_be_saved_as_the_output_matrix(tmp_path: Path, top: bool) -> None:
    """As safetensors' save_model does: of two names of one tensor it keeps the first."""
    config, tensors = load(DENSE)
    plain = convert(tmp_path / "plain", config, tensors)
    config["tie_word_embeddings"] = top
    tensors["lm_head.weight"] = tensors.pop(EMBEDDINGS)
    made = convert(tmp_path, config, tensors)
    assert reader.digests(made.path, 1) == reader.digests(plain.path, 1)


def test_an_unused_tensor_of_integers_does_not_make_a_checkpoint_quantized(tmp_path: Path) -> None:
    config, tensors = load(DENSE)
    counter = {"model.language_model.rope_deltas": ("I64", np.ones(1, "<i8"))}
    message = refusal(tmp_path, config, {**tensors, **counter})
    assert "does not use 1 tensors" in message and "quantized" not in message


def test_a_bias_is_no_buffer(tmp_path: Path) -> None:
    config, tensors = load(DENSE)
    name = "model.language_model.layers.3.self_attn.bias"
    assert name in refusal(tmp_path, config, {**tensors, name: ("F32", np.ones(8, "<f4"))})


@pytest.mark.parametrize("shape", [(0,), (1,)])
@pytest.mark.parametrize("chosen", ["mlp", "mtp.", "norm", "embed_tokens"])
def test_placeholders_of_zero_3_are_named(
    tmp_path: Path, shape: tuple[int, ...], chosen: str
) -> None:
    config, tensors = load(DENSE)
    emptied = {
        name: (dtype, np.zeros(shape, array.dtype) if chosen in name else array)
        for name, (dtype, array) in tensors.items()
    }
    message = refusal(tmp_path, config, emptied)
    assert "ZeRO-3" in message and "zero_to_fp32.py" in message
    assert ("head: none" in message) == (chosen == "mtp.")


def test_a_placeholder_beside_tied_embeddings_is_named(tmp_path: Path) -> None:
    config, tensors = load(DENSE)
    tensors["lm_head.weight"] = ("BF16", np.zeros(0, "<u2"))
    assert "ZeRO-3" in refusal(tmp_path, config, tensors)


@pytest.mark.parametrize(
    ("before", "after", "named"),
    [
        ("^", "module.", "`module.` in its name, from a wrapper (DDP or DeepSpeed)"),
        (
            "^",
            "base_model.model.",
            "`base_model.` in its name, from a wrapper (PEFT): merge the adapter",
        ),
        ("^", "_orig_mod.", "torch.compile"),
        ("^model.", "model._orig_mod.", "torch.compile"),
        ("layers", "_fsdp_wrapped_module.layers", "FSDP"),
        ("self_attn", "_checkpoint_wrapped_module.self_attn", "activation checkpointing"),
        ("q_proj", "q_proj.base_layer", "PEFT"),
        (
            "^model.language_model",
            "model.model",
            "`model.` in its name, from a wrapper (an unknown one)",
        ),
        ("^", "policy.", "`policy.` in its name, from a wrapper (an unknown one)"),
        ("embed_tokens", "embed_tokens.original_module", "PEFT"),
        (
            "^model.language_model",
            "model.text_model",
            "model.text_model.embed_tokens.weight is not named as in the original model",
        ),
        ("^model.language_model.", "", "embed_tokens.weight is not named as in the original"),
        ("^mtp", "student.mtp", "`student.` in its name, from a wrapper (an unknown one)"),
    ],
)
def test_names_of_wrappers_are_refused(tmp_path: Path, before: str, after: str, named: str) -> None:
    config, tensors = load(DENSE)
    renamed = {re.sub(before, after, name, count=1): t for name, t in tensors.items()}
    assert named in refusal(tmp_path, config, renamed)


def pruned(tensors: Tensors, keep: int, head: bool) -> Tensors:
    """The checkpoint with the first `keep` experts in the head, or else in the trunk."""
    experts = re.compile(r".*\.mlp\.(gate\.weight|experts\.(gate_up|down)_proj)")
    return {
        name: (dtype, np.ascontiguousarray(array[:keep]))
        if name.startswith("mtp.") == head and experts.fullmatch(name)
        else (dtype, array)
        for name, (dtype, array) in tensors.items()
    }


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("head", [False, True])
def test_a_head_with_other_experts_than_the_trunk_is_refused(
    tmp_path: Path, separate: bool, head: bool
) -> None:
    config, tensors = load(MOE)
    tensors = pruned(tensors, 3, head)
    if not head:
        config["text_config"]["num_experts"] = 3
    if separate:
        tensors = separate_experts(config, tensors)
    message = refusal(tmp_path, config, tensors)
    assert "does not fit the trunk" in message and "head: none" in message
    made = convert(tmp_path, config, tensors, "trunk")
    assert made.tensors["blk.0.ffn_gate_exps.weight"].shape[0] == (6 if head else 3)


def test_a_head_of_another_width_is_refused(tmp_path: Path) -> None:
    config, tensors = load(DENSE)
    name = "mtp.layers.0.mlp.up_proj.weight"
    tensors[name] = ("BF16", np.concatenate([tensors[name][1]] * 2))
    message = refusal(tmp_path, config, tensors)
    assert f"{name} has shape [512, 256], config.json says [256, 256]" in message
    assert "does not fit the trunk" in message and "--part trunk" in message


@pytest.mark.parametrize(
    ("top", "inner", "tied"),
    [
        (True, False, True), (False, True, True), (True, None, True), (None, True, True),
        (None, None, True), (False, False, None), (None, False, None), (False, None, None),
    ],
)  # fmt: skip
@pytest.mark.parametrize("matrix", ["none", "copy", "other"])
def test_the_tensors_decide_whether_embeddings_are_tied(
    tmp_path: Path, matrix: str, top: bool | None, inner: bool | None, tied: bool | None
) -> None:
    config, tensors = load(DENSE)
    for level, value in ((config, top), (config["text_config"], inner)):
        level.pop("tie_word_embeddings", None)
        if value is not None:
            level["tie_word_embeddings"] = value
    dtype, embeddings = tensors[EMBEDDINGS]
    if matrix != "none":
        tensors["lm_head.weight"] = (dtype, embeddings if matrix == "copy" else embeddings[::-1])
    said = {top, inner} - {None}
    if matrix == "none" and said == {False}:
        assert "set tie_word_embeddings to true" in refusal(tmp_path, config, tensors)
    elif matrix == "other" and said == {True}:
        assert "config.json ties them" in refusal(tmp_path, config, tensors)
    else:
        made = convert(tmp_path, config, tensors)
        dropped = matrix == "copy" and True in said
        assert ("output.weight" in made.tensors) == (matrix != "none" and not dropped)


@pytest.mark.parametrize("name", ["mtp.embed_tokens.weight", "mtp.layers.0.mlp.bias"])
def test_an_unused_tensor_of_the_head_leaves_the_trunk(tmp_path: Path, name: str) -> None:
    config, tensors = load(DENSE)
    message = refusal(tmp_path, config, {**tensors, name: ("F32", np.ones(8, "<f4"))})
    assert name in message and "head: none" in message
    convert(tmp_path, config, tensors, "trunk")


def test_a_missing_tensor_of_the_head_leaves_the_trunk(tmp_path: Path) -> None:
    config, tensors = load(DENSE)
    del tensors["mtp.norm.weight"]
    message = refusal(tmp_path, config, tensors)
    assert "no tensor mtp.norm.weight" in message and "head: none" in message
    convert(tmp_path, config, tensors, "trunk")


@pytest.mark.parametrize("top", [None, []])
def test_the_architecture_may_be_that_of_the_text_model(tmp_path: Path, top: Any) -> None:
    config, tensors = load(DENSE)
    config["architectures"] = top
    config["text_config"]["architectures"] = ["Qwen3_5ForCausalLM"]
    assert convert(tmp_path, config, tensors).architecture == "qwen35"
