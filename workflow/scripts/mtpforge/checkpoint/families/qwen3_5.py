"""Qwen3.5, dense and mixture of experts: names, shapes and transforms.

Qwen3.6 and 3.8 use the same classes.

Blocks alternate between linear attention (a gated delta rule) and full attention; the head is one
more block of full attention. Follows llama.cpp's `conversion/qwen.py` at b11434; `tests/golden`
compares with it.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
from gguf import GGUFWriter, RopeScalingType
from gguf.constants import GGMLQuantizationType

from mtpforge.checkpoint.families.family import (
    BF16,
    F32,
    Change,
    Family,
    Row,
    Source,
    View,
    identity,
    unchanged,
)
from mtpforge.checkpoint.hparams import Hparams
from mtpforge.errors import CheckpointError
from mtpforge.io.text import member

DEFAULT_MROPE_SECTIONS = [11, 11, 10]  # default of the architecture


# ── values ──


def plus_one(values: np.ndarray) -> np.ndarray:
    """Undo the w - 1 of a stored norm. Without this a model loads silently and drafts nothing."""
    return np.asarray(values + np.float32(1))


def minus_exp(values: np.ndarray) -> np.ndarray:
    """Convert `A_log` to A = -exp(A_log), via float64 for the same bytes on every machine."""
    return np.asarray(-np.exp(values.astype(np.float64)), dtype=np.float32)


# ── views ──


class LinearHeads:
    """Key and value heads of linear attention, and their numbers of rows or columns."""

    def __init__(self, hp: Hparams) -> None:
        self.keys = hp.count("linear_num_key_heads")
        self.values = hp.count("linear_num_value_heads")
        self.value_dim = hp.count("linear_value_head_dim")
        self.key_rows = self.keys * hp.count("linear_key_head_dim")
        self.value_rows = self.values * self.value_dim
        self.channels = 2 * self.key_rows + self.value_rows
        if self.values % self.keys:
            raise CheckpointError(
                f"config.json: linear_num_value_heads is {self.values}, which is not a multiple of "
                f"linear_num_key_heads ({self.keys})"
            )

    def tiled(self, width: int, axis: int = 0, first: int = 0) -> View:
        """Reorder value heads from grouped by key head to tiled over the key heads, as ggml does.

        A head has `width` entries on `axis`; entries before `first` (queries and keys) stay.
        """
        return unchanged if self.keys == self.values else partial(self._tile, width, axis, first)

    def _tile(
        self, width: int, axis: int, first: int, arrays: Sequence[np.ndarray]
    ) -> list[np.ndarray]:
        (array,) = arrays
        kept, heads = np.split(array, [first], axis)
        grid = (self.keys, self.values // self.keys, width)
        heads = heads.reshape(*heads.shape[:axis], *grid, *heads.shape[axis + 1 :]).swapaxes(
            axis, axis + 1
        )
        return [kept, heads] if first else [heads]


def convolution(name: str, channels: int, kernel: int, view: View) -> tuple[Source, ...]:
    """Return the layouts of a convolution, a [channels, kernel] with one more axis.

    It is the second, and in MLX the last.
    """

    def without(axis: int) -> View:
        return lambda arrays: view([array.squeeze(axis) for array in arrays])

    return (
        Source((name,), (channels, 1, kernel), without(1)),
        Source((name,), (channels, kernel, 1), without(2)),
    )


def half(which: int) -> View:
    """Select gate (0) or up (1) of a fused [experts, 2 * ff, hidden]."""

    def view(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
        rows = arrays[0].shape[1] // 2
        return [arrays[0][:, which * rows : (which + 1) * rows]]

    return view


# ── rows ──


def matrix(
    name: str, source: str, *shape: int, view: View = unchanged, type: GGMLQuantizationType = BF16
) -> Row:
    """Return the row of a weight that keeps its shape."""
    return Row(name, shape, (Source((source,), shape, view),), type)


def norm(name: str, source: str, size: int) -> Row:
    """Return the row of a norm that the checkpoint stores as w - 1."""
    return Row(name, (size,), (Source((source,), (size,)),), F32, plus_one)


Part = Callable[[Hparams, str, str], list[Row]]
"""Rows of a part of a block, from hyperparameters and prefixes in GGUF and checkpoint."""


def full_attention(hp: Hparams, to: str, of: str) -> list[Row]:
    """Gated attention: `q_proj` holds queries and gates, so it has twice as many rows."""
    hidden, dim = hp.count("hidden_size"), hp.count("head_dim")
    queries, keys = hp.count("num_attention_heads") * dim, hp.count("num_key_value_heads") * dim
    return [
        matrix(f"{to}attn_q.weight", f"{of}self_attn.q_proj.weight", 2 * queries, hidden),
        matrix(f"{to}attn_k.weight", f"{of}self_attn.k_proj.weight", keys, hidden),
        matrix(f"{to}attn_v.weight", f"{of}self_attn.v_proj.weight", keys, hidden),
        matrix(f"{to}attn_output.weight", f"{of}self_attn.o_proj.weight", hidden, queries),
        norm(f"{to}attn_q_norm.weight", f"{of}self_attn.q_norm.weight", dim),
        norm(f"{to}attn_k_norm.weight", f"{of}self_attn.k_norm.weight", dim),
    ]


def linear_attention(hp: Hparams, to: str, of: str) -> list[Row]:
    """The gated delta rule. Its norm is stored as w, unlike all others."""
    hidden = hp.count("hidden_size")
    kernel = hp.count("linear_conv_kernel_dim")
    heads = LinearHeads(hp)
    of += "linear_attn."
    n = heads.values
    dim = heads.value_dim
    channels = heads.channels
    qkv = heads.tiled(dim, first=2 * heads.key_rows)

    def vector(name: str, source: str, change: Change = identity) -> Row:
        return Row(name, (n,), (Source((source,), (n,), heads.tiled(1)),), F32, change)

    conv1d = convolution(f"{of}conv1d.weight", channels, kernel=kernel, view=qkv)
    return [
        matrix(
            f"{to}attn_qkv.weight",
            f"{of}in_proj_qkv.weight",
            channels,
            hidden,
            view=qkv,
        ),
        matrix(
            f"{to}attn_gate.weight",
            f"{of}in_proj_z.weight",
            heads.value_rows,
            hidden,
            view=heads.tiled(dim),
        ),
        matrix(f"{to}ssm_alpha.weight", f"{of}in_proj_a.weight", n, hidden, view=heads.tiled(1)),
        matrix(f"{to}ssm_beta.weight", f"{of}in_proj_b.weight", n, hidden, view=heads.tiled(1)),
        matrix(
            f"{to}ssm_out.weight",
            f"{of}out_proj.weight",
            hidden,
            heads.value_rows,
            view=heads.tiled(dim, axis=1),
        ),
        Row(f"{to}ssm_conv1d.weight", (channels, kernel), conv1d, F32),
        vector(f"{to}ssm_a", f"{of}A_log", minus_exp),
        vector(f"{to}ssm_dt.bias", f"{of}dt_bias"),
        matrix(f"{to}ssm_norm.weight", f"{of}norm.weight", dim, type=F32),
    ]


def dense_mlp(hp: Hparams, to: str, of: str) -> list[Row]:
    """Gate, up and down."""
    if hp.has("num_experts"):
        raise CheckpointError(
            "config.json: num_experts in a dense architecture: "
            "correct `architectures`, or use the original config.json"
        )
    hidden, ff = hp.count("hidden_size"), hp.count("intermediate_size")
    return [
        matrix(f"{to}ffn_gate.weight", f"{of}mlp.gate_proj.weight", ff, hidden),
        matrix(f"{to}ffn_up.weight", f"{of}mlp.up_proj.weight", ff, hidden),
        matrix(f"{to}ffn_down.weight", f"{of}mlp.down_proj.weight", hidden, ff),
    ]


def expert_mlp(hp: Hparams, to: str, of: str) -> list[Row]:
    """Router, experts (fused, one matrix each, or MLX's stacks) and a shared expert.

    The names of fused experts may end in `.weight`.
    """
    hidden = hp.count("hidden_size")
    n = hp.count("num_experts")
    ff = hp.count("moe_intermediate_size")
    shared = hp.count("shared_expert_intermediate_size")
    of += "mlp."

    def experts(projection: str, shape: tuple[int, int], fused: Source) -> Row:
        suffixed = replace(fused, names=(f"{fused.names[0]}.weight",))
        single = Source(tuple(f"{of}experts.{e}.{projection}_proj.weight" for e in range(n)), shape)
        mlx = Source((f"{of}switch_mlp.{projection}_proj.weight",), (n, *shape))
        return Row(f"{to}ffn_{projection}_exps.weight", (n, *shape), (fused, single, suffixed, mlx))

    gate_up = (f"{of}experts.gate_up_proj",)
    down = (f"{of}experts.down_proj",)
    return [
        matrix(f"{to}ffn_gate_inp.weight", f"{of}gate.weight", n, hidden, type=F32),
        experts("down", (hidden, ff), Source(down, (n, hidden, ff))),
        experts("gate", (ff, hidden), Source(gate_up, (n, 2 * ff, hidden), half(0))),
        experts("up", (ff, hidden), Source(gate_up, (n, 2 * ff, hidden), half(1))),
        matrix(
            f"{to}ffn_gate_inp_shexp.weight", f"{of}shared_expert_gate.weight", 1, hidden, type=F32
        ),
        matrix(f"{to}ffn_gate_shexp.weight", f"{of}shared_expert.gate_proj.weight", shared, hidden),
        matrix(f"{to}ffn_up_shexp.weight", f"{of}shared_expert.up_proj.weight", shared, hidden),
        matrix(f"{to}ffn_down_shexp.weight", f"{of}shared_expert.down_proj.weight", hidden, shared),
    ]


def layer_types(hp: Hparams) -> list[str]:
    """Return the kind of attention of each trunk block. Raises CheckpointError."""
    layers = hp.count("num_hidden_layers")
    interval = hp.count("full_attention_interval", 4)
    periodic = [
        "linear_attention" if (i + 1) % interval else "full_attention" for i in range(layers)
    ]
    types: list[str] = hp.get("layer_types", periodic)
    whole = isinstance(types, list) and len(types) == layers
    if not whole or any(kind not in ("linear_attention", "full_attention") for kind in types):
        raise CheckpointError(
            "config.json: layer_types must have linear_attention or full_attention for each "
            f"of the {layers} layers"
        )
    return types


def block(hp: Hparams, to: str, of: str, attend: Part, mlp: Part) -> list[Row]:
    """Return the rows of one block: two norms, attention and MLP."""
    hidden = hp.count("hidden_size")
    norms = [
        norm(f"{to}attn_norm.weight", f"{of}input_layernorm.weight", hidden),
        norm(f"{to}post_attention_norm.weight", f"{of}post_attention_layernorm.weight", hidden),
    ]
    return norms + attend(hp, to, of) + mlp(hp, to, of)


def trunk(hp: Hparams, mlp: Part, linear: Part = linear_attention) -> list[Row]:
    """Return embeddings, blocks 0 to N-1, output norm and, unless tied, the output matrix."""
    if hp.flag("attention_bias"):
        raise CheckpointError(
            "config.json: attention_bias is true, which llama.cpp does not support"
        )
    hidden = hp.count("hidden_size")
    vocabulary = hp.count("vocab_size")
    rows = [matrix("token_embd.weight", "model.embed_tokens.weight", vocabulary, hidden)]
    for i, attention in enumerate(layer_types(hp)):
        attend = linear if attention == "linear_attention" else full_attention
        rows += block(hp, f"blk.{i}.", f"model.layers.{i}.", attend, mlp)
    rows.append(norm("output_norm.weight", "model.norm.weight", hidden))
    if not hp.flag("tie_word_embeddings"):
        rows.append(matrix("output.weight", "lm_head.weight", vocabulary, hidden))
    return rows


def head(hp: Hparams, mlp: Part) -> list[Row]:
    """Return block N. It shares the trunk's embeddings and output, so it must not have its own."""
    if hp.flag("mtp_use_dedicated_embeddings"):
        raise CheckpointError(
            "config.json: mtp_use_dedicated_embeddings is true, which llama.cpp does not support"
        )
    hidden = hp.count("hidden_size")
    to = f"blk.{hp.count('num_hidden_layers')}."
    return [
        *block(hp, to, "mtp.layers.0.", full_attention, mlp),
        matrix(f"{to}nextn.eh_proj.weight", "mtp.fc.weight", hidden, 2 * hidden),
        norm(f"{to}nextn.enorm.weight", "mtp.pre_fc_norm_embedding.weight", hidden),
        norm(f"{to}nextn.hnorm.weight", "mtp.pre_fc_norm_hidden.weight", hidden),
        norm(f"{to}nextn.shared_head_norm.weight", "mtp.norm.weight", hidden),
    ]


# ── metadata ──


def describe(writer: GGUFWriter, hp: Hparams, head_blocks: int, sections: bool = True) -> None:
    """Write the architecture's keys in upstream's order; `head_blocks` is 0 or 1.

    `sections`: whether the architecture has rope sections even if config.json omits them.
    """
    layers = hp.count("num_hidden_layers")
    dim = hp.count("head_dim")
    writer.add_block_count(layers + head_blocks)
    writer.add_context_length(hp.count("max_position_embeddings"))
    writer.add_embedding_length(hp.count("hidden_size"))
    if hp.has("intermediate_size"):
        writer.add_feed_forward_length(hp.count("intermediate_size"))
    writer.add_head_count(hp.count("num_attention_heads"))
    writer.add_head_count_kv(hp.count("num_key_value_heads"))
    rope = rope_parameters(hp)
    describe_rope(writer, rope)
    writer.add_layer_norm_rms_eps(hp.fraction("rms_norm_eps"))
    if hp.has("num_experts"):
        writer.add_expert_count(hp.count("num_experts"))
        writer.add_expert_used_count(hp.count("num_experts_per_tok"))
    writer.add_key_length(dim)
    writer.add_value_length(dim)
    writer.add_file_type(32)  # MOSTLY_BF16
    if hp.has("num_experts"):
        writer.add_expert_feed_forward_length(hp.count("moe_intermediate_size"))
        writer.add_expert_shared_feed_forward_length(hp.count("shared_expert_intermediate_size"))
    if head_blocks:
        writer.add_nextn_predict_layers(head_blocks)
    describe_linear_attention(writer, hp, head_blocks)
    factor = rope.number("partial_rotary_factor", 0.25)
    if not 0 < factor <= 1:
        raise CheckpointError(
            f"config.json: partial_rotary_factor must be above 0 and at most 1, not {factor}"
        )
    writer.add_rope_dimension_count(int(dim * factor))
    if sections and rope.get("mrope_section") is None:
        writer.add_rope_dimension_sections([*DEFAULT_MROPE_SECTIONS, 0])


def describe_linear_attention(writer: GGUFWriter, hp: Hparams, head_blocks: int) -> None:
    """Write state sizes, and which blocks are recurrent; the head never is."""
    heads = LinearHeads(hp)
    writer.add_ssm_conv_kernel(hp.count("linear_conv_kernel_dim"))
    writer.add_ssm_state_size(hp.count("linear_key_head_dim"))
    writer.add_ssm_group_count(heads.keys)
    writer.add_ssm_time_step_rank(heads.values)
    writer.add_ssm_inner_size(heads.value_rows)
    if hp.get("layer_types") is not None:
        recurrent = [kind == "linear_attention" for kind in layer_types(hp)] + [False] * head_blocks
        writer.add_array(f"{writer.arch}.attention.recurrent_layers", recurrent)
    writer.add_full_attention_interval(hp.count("full_attention_interval", 4))


def rope_parameters(hp: Hparams) -> Hparams:
    """Return `rope_parameters` or `rope_scaling`, completed from the top level like upstream.

    Raises CheckpointError if they contradict each other: upstream would take the first, and
    transformers the second.
    """
    given, older = _rotation(hp, "rope_parameters"), _rotation(hp, "rope_scaling")
    for key in sorted(given.keys() & older.keys()):
        if given[key] != older[key]:
            raise CheckpointError(
                f"config.json: {key} is {given[key]!r} in rope_parameters and {older[key]!r} in "
                "rope_scaling: remove the wrong one"
            )
    shared = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    inherited = {key: hp.get(key) for key in shared if hp.get(key) is not None}
    return Hparams({**inherited, **older, **given})


def _rotation(hp: Hparams, place: str) -> dict[str, Any]:
    """Return the rotation's parameters at a place, `type` renamed; `mrope` is the default type.

    The parameters may be given for each kind of attention.
    """
    given = hp.get(place, {})
    if not isinstance(given, dict):
        raise CheckpointError(f"config.json: {place} must be an object")
    given = {**given, **(member(given, "full_attention", dict, f"config.json: {place}") or {})}
    kinds = [given[key] for key in ("rope_type", "type") if given.get(key) is not None]
    kinds = ["default" if kind == "mrope" else kind for kind in kinds]
    if len(kinds) == 2 and kinds[0] != kinds[1]:
        raise CheckpointError(
            f"config.json: {place} has rope_type {kinds[0]!r} and type {kinds[1]!r}: "
            "remove the wrong one"
        )
    rest = {key: value for key, value in given.items() if key not in ("rope_type", "type")}
    return {**rest, "rope_type": kinds[0] if kinds else "default"} if given else {}


def describe_rope(writer: GGUFWriter, rope: Hparams) -> None:
    """Write scaling (`default`, `linear`, `yarn`), multimodal sections and the base frequency."""
    kind = rope.get("rope_type", "default")
    if kind not in ("default", "linear", "yarn"):
        raise CheckpointError(
            f"config.json: rope_type is {kind!r}: only default, mrope, linear and yarn are "
            "supported: use the original config.json"
        )
    if kind != "default":
        writer.add_rope_scaling_type(RopeScalingType(kind))
        writer.add_rope_scaling_factor(rope.number("factor"))
    if kind == "yarn":
        _describe_yarn(writer, rope)
    _describe_sections(writer, rope)
    if rope.get("rope_theta") is None:
        raise CheckpointError(
            "config.json: rope_theta is missing, for which llama.cpp takes 10,000: add that of the "
            "base model to rope_parameters"
        )
    writer.add_rope_freq_base(rope.number("rope_theta"))


def _describe_yarn(writer: GGUFWriter, rope: Hparams) -> None:
    writer.add_rope_scaling_orig_ctx_len(rope.count("original_max_position_embeddings"))
    methods = {
        "extrapolation_factor": writer.add_rope_scaling_yarn_ext_factor,
        "attention_factor": writer.add_rope_scaling_yarn_attn_factor,
        "beta_fast": writer.add_rope_scaling_yarn_beta_fast,
        "beta_slow": writer.add_rope_scaling_yarn_beta_slow,
    }
    older = {"attention_factor": rope.get("attn_factor")}
    for key, add in methods.items():
        if rope.get(key, older.get(key)) is not None:
            add(rope.number(key, older.get(key)))


def _describe_sections(writer: GGUFWriter, rope: Hparams) -> None:
    sections = rope.get("mrope_section")
    if sections is None:
        return
    sized = isinstance(sections, list) and len(sections) in (3, 4)
    if not sized or any(type(n) is not int for n in sections):
        raise CheckpointError(
            f"config.json: mrope_section must be three or four integers, not {sections!r}"
        )
    writer.add_rope_dimension_sections([*sections, 0][:4])


VISION = ("model.visual.", "visual.")
# As MLX names it, and savers that put the whole model into the text model: upstream cannot convert
# a vision tower of these names.
OTHER_VISION = (
    "language_model.visual.", "language_model.model.visual.", "model.language_model.visual.",
    "vision_tower.", "model.vision_tower.",
)  # fmt: skip

DENSE = Family(
    gguf_architecture="qwen35",
    huggingface_architectures=("Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"),
    trunk=partial(trunk, mlp=dense_mlp),
    head=partial(head, mlp=dense_mlp),
    describe=describe,
    ignored=(*VISION, *OTHER_VISION),
)
MOE = Family(
    gguf_architecture="qwen35moe",
    huggingface_architectures=("Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeForCausalLM"),
    trunk=partial(trunk, mlp=expert_mlp),
    head=partial(head, mlp=expert_mlp),
    describe=describe,
    ignored=(*VISION, *OTHER_VISION),
)
