"""DeepSeek-V4: what is refused before upstream's converter starts, and its rules."""

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CHECKPOINTS
from deepseek4 import CONFIG, tensors, write_deepseek4
from gguf.constants import GGMLQuantizationType
from gguf.quants import dequantize
from layouts import Tensors, write_checkpoint
from mtpforge.checkpoint.checkpoint import Checkpoint
from mtpforge.convert import convertible, deepseek4, upstream, upstream_head
from mtpforge.errors import CheckpointError, ConfigError
from mtpforge.rules.build import Build
from test_rules import wildcards

EXPERT = "mtp.0.ffn.experts.1.w2"
CODES = (0, 0.5, 1, 1.5, 2, 3, 4, 6)
"""Magnitudes of the codes of E2M1."""


SOURCE = {"repo": "Owner/Name", "revision": "0" * 40}


def build(**change: Any) -> Build:
    model = {
        "source": SOURCE,
        "converter": "llama.cpp",
        "sidecar": "MXFP4",
        "variants": {"MXFP4": {"head": "none"}},
    }
    return Build({"models": {"m": {**model, **change}}})


def test_trunk_and_head_are_two_files(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_deepseek4(tmp_path / "v4"))
    for part in ("trunk", "draft"):
        upstream.check(checkpoint, part)
    with pytest.raises(CheckpointError, match=r"a draft model only: set `head: none`.*MXFP4"):
        convertible.choose(checkpoint, "all")


def test_the_head_is_all_of_mtp_without_scales(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_deepseek4(tmp_path / "v4"))
    weights = {n for n in checkpoint.tensors if n.startswith("mtp.") and not n.endswith(".scale")}
    found = {each.name: each for each in upstream_head.expected_head(checkpoint)}
    assert found.keys() == weights - {"mtp.0.h_proj.weight"}  # part of the fusion
    packed = [name for name, each in found.items() if each.stored is GGMLQuantizationType.MXFP4]
    assert len(packed) == 12 and all(".ffn.experts." in name for name in packed)
    assert upstream_head.count_blocks(checkpoint) == 1


def test_experts_keep_their_values(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_deepseek4(tmp_path / "v4"))
    [(kind, raw)] = deepseek4.repacked(checkpoint, checkpoint.tensors[f"{EXPERT}.weight"])
    made = tensors()
    codes = made[f"{EXPERT}.weight"][1].view(np.uint8)
    exponents = made[f"{EXPERT}.scale"][1].astype(int) - 127
    signed = np.array([*CODES, *(-each for each in CODES)])
    values = np.empty((codes.shape[0], 2 * codes.shape[1]))
    values[:, ::2], values[:, 1::2] = signed[codes & 15], signed[codes >> 4]
    values *= 2.0 ** exponents.repeat(32, axis=1)
    assert np.array_equal(dequantize(raw.reshape(len(codes), -1), kind), values)


def test_the_fusion_is_embedding_then_hidden_state(tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_deepseek4(tmp_path / "v4"))
    [(kind, raw)] = deepseek4.repacked(checkpoint, checkpoint.tensors["mtp.0.e_proj.weight"])
    values = dequantize(raw, kind)
    assert np.allclose(values, np.hstack([np.eye(64), np.zeros((64, 64))]), atol=0.01)


CHANGES: list[tuple[Callable[[Tensors], object], str, tuple[str, ...]]] = [
    (lambda t: t.pop("layers.1.attn.wq_a.scale"), "wq_a.scale is missing", ("trunk", "draft")),
    (lambda t: t.pop(f"{EXPERT}.scale"), f"{EXPERT}.scale is missing", ("draft",)),
    (
        lambda t: t.update({f"{EXPERT}.scale": ("F32", np.ones((64, 1), "<f4"))}),
        "is missing or not F8_E8M0 of shape [64, 1]",
        ("draft",),
    ),
    (
        lambda t: t.update({f"{EXPERT}.weight": ("BF16", np.zeros((64, 32), "<u2"))}),
        "reads experts in MXFP4 only",
        ("draft",),
    ),
    (
        lambda t: [t.pop(f"mtp.0.{half}_proj.{end}") for half in "eh" for end in CHANGED],
        "has a head without mtp.0.e_proj.weight",
        ("draft",),
    ),
    (
        lambda t: t.update({"mtp.1.enorm.weight": t["mtp.0.enorm.weight"]}),
        "has tensors of 2 head layers",
        ("draft",),
    ),
]
CHANGED = ("weight", "scale")


@pytest.mark.parametrize(("change", "named", "parts"), CHANGES)
def test_what_upstream_would_convert_wrongly_is_refused(
    tmp_path: Path, change: Callable[[Tensors], object], named: str, parts: tuple[str, ...]
) -> None:
    changed = tensors()
    change(changed)
    source = CHECKPOINTS / "tiny-qwen3.5"
    folder = write_checkpoint(tmp_path / "v4", source, CONFIG, changed)
    for part in parts:
        with pytest.raises(CheckpointError) as caught:
            upstream.check(Checkpoint(folder), part)
        assert named in str(caught.value)


def test_a_packed_sidecar_is_the_converted_draft_of_the_trunk() -> None:
    made = build()
    work = "results/m/work/convert"
    asked = wildcards(type="MXFP4")
    found = {conversion for _, conversion in made.config.models["m"].conversions()}
    assert found == {"llama.cpp:trunk", "llama.cpp:draft"}
    assert made.verify.sidecar(asked) == f"{work}/draft.gguf"
    assert made.verify.sidecar_digests(asked) == f"{work}/draft.json"
    assert made.verify.sidecar_target(asked) == f"{work}/trunk.gguf"
    assert made.verify.sidecar_unquantized(asked) == []
    options = shlex.split(made.verify.sidecar_options(asked))
    assert options[:2] == ["--type", "MXFP4"] and "--head" not in options


def test_another_sidecar_is_quantized_and_drafts_for_the_whole_model() -> None:
    made = build(sidecar="Q8_0", variants={"Q4_K_M": {}})
    asked = wildcards(type="Q8_0")
    assert made.verify.sidecar(asked) == "results/m/work/draft/Q8_0.gguf"
    assert made.verify.sidecar_target(asked) == "results/m/work/convert/all.gguf"
    assert made.verify.sidecar_unquantized(asked) == ["results/m/work/acceptance.json"]
    options = shlex.split(made.verify.sidecar_options(asked))
    assert options[:4] == ["--type", "Q8_0", "--head", "Q8_0"]


def test_a_packed_sidecar_needs_upstreams_converter() -> None:
    with pytest.raises(ConfigError, match=r"models/m/sidecar: only llama.cpp's converter writes"):
        build(converter="mtpforge", variants={"Q4_K_M": {}})


def test_the_configuration_is_the_one_that_the_message_proposes(tmp_path: Path) -> None:
    """Every part that the rules convert is one that upstream can write."""
    checkpoint = Checkpoint(write_deepseek4(tmp_path / "v4"))
    for _, conversion in build().config.models["m"].conversions():
        converter, part = conversion.split(":")
        convertible.check(checkpoint, converter, part)
