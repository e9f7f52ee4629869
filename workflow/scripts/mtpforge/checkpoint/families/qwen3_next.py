"""Qwen3-Next: Qwen3.5's predecessor, whose linear attention has its inputs fused and whose configuration is silent on the head.

Everything else is as in `qwen3_5`; the differences follow llama.cpp's `conversion/qwen.py` at 0c1e57098.
"""

from collections.abc import Sequence
from functools import partial

import numpy as np
from gguf import GGUFWriter

from mtpforge.checkpoint.families import qwen3_5
from mtpforge.checkpoint.families.qwen3_5 import LinearHeads, matrix, minus_exp, squeezed
from mtpforge.checkpoint.families.table import F32, Family, Row, Source, View, unchanged
from mtpforge.checkpoint.hparams import Hparams


def linear_attention(hp: Hparams, to: str, of: str) -> list[Row]:
    """The gated delta rule with its inputs in two matrices; value heads stay grouped by key head."""
    hidden, kernel, heads = (
        hp.count("hidden_size"),
        hp.count("linear_conv_kernel_dim"),
        LinearHeads(hp),
    )
    n, of = heads.values, f"{of}linear_attn."
    fused = (f"{of}in_proj_qkvz.weight",), (heads.channels + heads.value_rows, hidden)
    convolution = Source((f"{of}conv1d.weight",), (heads.channels, 1, kernel), squeezed(unchanged))
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
        Row(f"{to}ssm_conv1d.weight", (heads.channels, kernel), (convolution,), F32),
        Row(f"{to}ssm_a", (n,), (Source((f"{of}A_log",), (n,)),), F32, minus_exp),
        Row(f"{to}ssm_dt.bias", (n,), (Source((f"{of}dt_bias",), (n,)),), F32),
        matrix(f"{to}ssm_norm.weight", f"{of}norm.weight", heads.value_dim, type=F32),
    ]


def _parts(heads: LinearHeads, first: int, end: int) -> View:
    """Of a matrix whose rows are [query, key, values, gates] for each key head: some of the four, each over all heads."""

    def view(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        keys, values = heads.key_rows // heads.keys, heads.value_rows // heads.keys
        grouped = arrays[0].reshape(heads.keys, 2 * (keys + values), -1)
        return np.split(grouped, np.cumsum([keys, keys, values]), axis=1)[first:end]

    return view


def describe(writer: GGUFWriter, hp: Hparams, head_blocks: int) -> None:
    """As Qwen3.5's, without rope sections; `layer_types` is written out also where the configuration leaves it to the interval."""
    complete = Hparams({**hp.values, "layer_types": qwen3_5.layer_types(hp)})
    qwen3_5.describe(writer, complete, head_blocks, sections=False)


MOE = Family(
    gguf_architecture="qwen3next",
    huggingface_architectures=("Qwen3NextForCausalLM",),
    trunk=partial(qwen3_5.trunk, mlp=qwen3_5.expert_mlp, linear=linear_attention),
    head=partial(qwen3_5.head, mlp=qwen3_5.expert_mlp),
    describe=describe,
    declares_head=False,
)
