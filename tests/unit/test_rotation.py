"""Where configurations put the rotation, and what the GGUF says about it."""

from typing import Any

import pytest
from gguf import GGUFWriter
from mtpforge.checkpoint.families import qwen3_5
from mtpforge.checkpoint.hparams import Hparams
from mtpforge.errors import CheckpointError

BASE = {"rope_theta": 1e7, "partial_rotary_factor": 0.25}
SECTIONS = {"mrope_section": [11, 11, 10]}
YARN = {"factor": 4.0, "original_max_position_embeddings": 4096}


def described(config: dict[str, Any]) -> dict[str, Any]:
    """The GGUF's keys about the rotation, without their prefix."""
    writer = GGUFWriter(path=None, arch="x")
    qwen3_5.describe_rope(writer, qwen3_5.rope_parameters(Hparams(config)))
    return {
        key.removeprefix("x.rope."): entry.value
        for key, entry in writer.kv_data[0].items()
        if key.startswith("x.rope.")
    }


DEFAULT = {"dimension_sections": [11, 11, 10, 0], "freq_base": 1e7}
SCALED = {"scaling.type": "yarn", "scaling.factor": 4.0, "scaling.original_context_length": 4096}


@pytest.mark.parametrize(
    ("config", "keys"),
    [
        ({"rope_parameters": {"rope_type": "default", **BASE, **SECTIONS}}, DEFAULT),
        ({**BASE, "rope_scaling": {"type": "mrope", **SECTIONS}}, DEFAULT),
        ({**BASE, "rope_scaling": {"type": "mrope", "rope_type": "default", **SECTIONS}}, DEFAULT),
        ({**BASE, "rope_scaling": {"rope_type": "mrope", **SECTIONS}}, DEFAULT),
        ({**BASE, "rope_scaling": SECTIONS, "rope_parameters": None}, DEFAULT),
        ({**BASE, "rope_parameters": {"type": "mrope", **SECTIONS}, "rope_scaling": None}, DEFAULT),
        ({"rope_parameters": {**BASE, **SECTIONS}, "rope_scaling": {"type": "mrope"}}, DEFAULT),
        ({"rope_parameters": {"full_attention": {**BASE, **SECTIONS}}}, DEFAULT),
        ({"rope_parameters": {**BASE, **SECTIONS}, "rope_theta": 5.0}, DEFAULT),
        ({**BASE, "rope_scaling": None}, {"freq_base": 1e7}),
        ({**BASE, "rope_scaling": {"type": "yarn", **SECTIONS, **YARN}}, DEFAULT | SCALED),
        ({**BASE, "rope_parameters": {"rope_type": "yarn", **YARN}}, SCALED | {"freq_base": 1e7}),
        (
            {**BASE, "rope_scaling": {"type": "yarn", **YARN, "attn_factor": 1.5, "beta_fast": 32}},
            SCALED
            | {"freq_base": 1e7, "scaling.yarn_attn_factor": 1.5, "scaling.yarn_beta_fast": 32.0},
        ),
        (
            {
                **BASE,
                "rope_scaling": {"type": "yarn", **YARN, "attn_factor": 1, "attention_factor": 2},
            },
            SCALED | {"freq_base": 1e7, "scaling.yarn_attn_factor": 2.0},
        ),
        (
            {**BASE, "rope_scaling": {"type": "linear", "factor": 2}},
            {"freq_base": 1e7, "scaling.type": "linear", "scaling.factor": 2.0},
        ),
    ],
)
def test_the_rotation_is_found_in_each_place(config: dict[str, Any], keys: dict[str, Any]) -> None:
    found = described(config)
    assert {key: getattr(value, "value", value) for key, value in found.items()} == keys


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"rope_scaling": {"type": kind, "factor": 2.0}}, f"rope_type is '{kind}'")
        for kind in ("dynamic", "llama3", "longrope", "su", "ntk")
    ]
    + [
        ({"rope_scaling": {"type": "yarn", "rope_type": "default"}}, "and type 'yarn': remove"),
        ({"rope_parameters": BASE, "rope_scaling": {"type": "yarn", **YARN}}, "rope_type is 'def"),
        ({"rope_parameters": BASE, "rope_scaling": {"rope_theta": 5.0}}, "rope_theta is 1"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "original_max_position_embeddings"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": "mrope"}, "rope_scaling must be an object"),
        ({"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}}, "'dynamic'"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        # If a tool lost it, llama.cpp would take 10,000, whatever the model was trained with.
        ({"rope_parameters": SECTIONS}, "rope_theta is missing, for which"),
        ({}, "rope_theta is missing, for which"),
        ({"rope_scaling": {"mrope_section": [11, 11]}}, "mrope_section"),
    ],
)
def test_an_unknown_or_contradictory_rotation_is_refused(
    config: dict[str, Any], named: str
) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json") as caught:
        described(config)
    assert named in str(caught.value)
