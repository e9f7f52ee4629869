"""Qwen3-Next, the predecessor of Qwen3.5.

Differences from `qwen3_5`: fused inputs of linear attention, and a head that config.json does not
declare. Follows llama.cpp's `conversion/qwen.py` at b11434.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
from gguf import GGUFWriter

from mtpforge.checkpoint.families import qwen3_5
from mtpforge.checkpoint.families.family import F32, Family, Row, Source, View, unchanged
from mtpforge.checkpoint.families.qwen3_5 import LinearHeads, convolution, matrix, minus_exp
from mtpforge.checkpoint.hparams import Hparams


def linear_attention(hp: Hparams, to: str, of: str) -> list[Row]:
    """The gated delta rule with two input matrices; value heads stay grouped by key head."""
    hidden = hp.count("hidden_size")
    kernel = hp.count("linear_conv_kernel_dim")
    heads = LinearHeads(hp)
    n = heads.values
    of += "linear_attn."
    fused = (f"{of}in_proj_qkvz.weight",), (heads.channels + heads.value_rows, hidden)
    conv1d = convolution(f"{of}conv1d.weight", heads.channels, kernel=kernel, view=unchanged)
    return [
        Row(
            f"{to}attn_qkv.weight", (heads.channels, hidden), (Source(*fused, _parts(heads, 0, 3)),)
        ),
        Row(
            f"{to}attn_gate.weight",
            (heads.value_rows, hidden),
            (Source(*fused, _parts(heads, 3, 4)),),
        ),
        matrix(f"{to}ssm_ba.weight", f"{of}in_proj_ba.weight", 2 * n, hidden),
        matrix(f"{to}ssm_out.weight", f"{of}out_proj.weight", hidden, heads.value_rows),
        Row(f"{to}ssm_conv1d.weight", (heads.channels, kernel), conv1d, F32),
        Row(f"{to}ssm_a", (n,), (Source((f"{of}A_log",), (n,)),), F32, minus_exp),
        Row(f"{to}ssm_dt.bias", (n,), (Source((f"{of}dt_bias",), (n,)),), F32),
        matrix(f"{to}ssm_norm.weight", f"{of}norm.weight", heads.value_dim, type=F32),
    ]


def _parts(heads: LinearHeads, first: int, end: int) -> View:
    """Select some of [query, key, values, gates], which the rows hold for each key head in turn."""

    def view(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        keys = heads.key_rows // heads.keys
        values = heads.value_rows // heads.keys
        grouped = arrays[0].reshape(heads.keys, 2 * (keys + values), -1)
        return np.split(grouped, np.cumsum([keys, keys, values]), axis=1)[first:end]

    return view


def describe(writer: GGUFWriter, hp: Hparams, head_blocks: int) -> None:
    """Write Qwen3.5's metadata without rope sections, and `layer_types` even if only implied."""
    complete = Hparams({**hp.values, "layer_types": qwen3_5.layer_types(hp)})
    qwen3_5.describe(writer, complete, head_blocks, sections=False)


MOE = Family(
    gguf_architecture="qwen3next",
    huggingface_architectures=("Qwen3NextForCausalLM",),
    trunk=partial(qwen3_5.trunk, mlp=qwen3_5.expert_mlp, linear=linear_attention),
    head=partial(qwen3_5.head, mlp=qwen3_5.expert_mlp),
    describe=describe,
)
