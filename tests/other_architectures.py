"""Tiny random checkpoints of architectures that upstream converts, whose heads draft.

The trunk's next token depends only on the current one; attention and MLP add almost nothing. The
head passes on the embedding half of its input, so it predicts the token after the next: nearly all
drafts are accepted if everything is wired correctly, nearly none if the halves are swapped.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from layouts import CHECKPOINTS, Tensors, eight_bit, write_checkpoint

HIDDEN, VOCABULARY, HEADS, KEYS, SIZE, EXPERTS, FEED = 64, 1280, 4, 2, 16, 4, 32
WORDS = 1257  # lower ids are words; the others, control tokens and padding, are never generated
# Tokens of GLM that upstream's converter looks up.
SPECIAL = ("[gMASK]", "<|user|>", "<|observation|>")

Shapes = dict[str, tuple[int, ...]]

COMMON: dict[str, Any] = {
    "hidden_size": HIDDEN, "num_attention_heads": HEADS, "num_key_value_heads": KEYS,
    "head_dim": SIZE, "intermediate_size": 128,
    "moe_intermediate_size": FEED, "vocab_size": VOCABULARY, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "hidden_act": "silu",
    "max_position_embeddings": 4096, "tie_word_embeddings": False, "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "routed_scaling_factor": 1.0, "first_k_dense_replace": 1, "eos_token_id": 1257,
    "dtype": "bfloat16",
    "num_hidden_layers": 2, "num_nextn_predict_layers": 1,
}  # fmt: skip


def prefixed(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


def attention(q: str = "q_proj", o: str = "o_proj", norms: bool = False) -> Shapes:
    """Separate projections, with or without norms for queries and keys."""
    shapes: Shapes = {
        f"{q}.weight": (HEADS * SIZE, HIDDEN), "k_proj.weight": (KEYS * SIZE, HIDDEN),
        "v_proj.weight": (KEYS * SIZE, HIDDEN),
        f"{o}.weight": (HIDDEN, HEADS * SIZE),
    }  # fmt: skip
    return {**shapes, "q_norm.weight": (SIZE,), "k_norm.weight": (SIZE,)} if norms else shapes


def latent_attention() -> Shapes:
    """Multi-head latent attention: low-rank queries, and low-rank keys and values."""
    return {
        "q_a_proj.weight": (32, HIDDEN), "q_a_layernorm.weight": (32,),
        "q_b_proj.weight": (HEADS * (32 + 16), 32),
        "kv_a_proj_with_mqa.weight": (32 + 16, HIDDEN), "kv_a_layernorm.weight": (32,),
        "kv_b_proj.weight": (HEADS * (32 + 64), 32),
        "o_proj.weight": (HIDDEN, HEADS * 64),
    }  # fmt: skip


def mlp(feed: int = 128, gate: bool = True) -> Shapes:
    """Gate, up and down."""
    shapes: Shapes = {"up_proj.weight": (feed, HIDDEN), "down_proj.weight": (HIDDEN, feed)}
    return {"gate_proj.weight": (feed, HIDDEN), **shapes} if gate else shapes


def experts(router: str, bias: str, shared: str, gate: bool = True) -> Shapes:
    """A router, separate experts and a shared expert."""
    shapes: Shapes = {
        router: (EXPERTS, HIDDEN),
        bias: (EXPERTS,),
        **prefixed(f"{shared}.", mlp(FEED, gate)),
    }
    for expert in range(EXPERTS):
        shapes |= prefixed(f"experts.{expert}.", mlp(FEED, gate))
    return shapes


def block(
    prefix: str, attend: Shapes, feed: Shapes, to: str = "self_attn", at: str = "mlp"
) -> Shapes:
    """A decoder layer with its two norms."""
    norms: Shapes = {
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
    }
    return prefixed(prefix, {**norms, **prefixed(f"{to}.", attend), **prefixed(f"{at}.", feed)})


def fusion(prefix: str, norm: str) -> Shapes:
    """The fusion of embedding and hidden state, and the norm before the output."""
    vectors: Shapes = {f"{name}.weight": (HIDDEN,) for name in ("enorm", "hnorm", norm)}
    return prefixed(prefix, {"eh_proj.weight": (HIDDEN, 2 * HIDDEN), **vectors})


ENDS: Shapes = {
    "model.embed_tokens.weight": (VOCABULARY, HIDDEN),
    "model.norm.weight": (HIDDEN,),
    "lm_head.weight": (VOCABULARY, HIDDEN),
}


def glm() -> tuple[dict[str, Any], Shapes]:
    """GLM-4.5: a dense layer, an MoE layer, and a head with its own embedding and output."""
    routed = experts("gate.weight", "gate.e_score_correction_bias", "shared_experts")
    shapes = {
        **ENDS,
        **block("model.layers.0.", attention(), mlp()),
        **block("model.layers.1.", attention(), routed),
    }
    shapes |= block("model.layers.2.", attention(), routed) | fusion(
        "model.layers.2.", "shared_head.norm"
    )
    shapes |= dict.fromkeys(
        ("model.layers.2.embed_tokens.weight", "model.layers.2.shared_head.head.weight"),
        (VOCABULARY, HIDDEN),
    )
    config = {
        "architectures": ["Glm4MoeForCausalLM"],
        "model_type": "glm4_moe",
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
    }
    return {
        **config,
        "n_group": 1,
        "topk_group": 1,
        "partial_rotary_factor": 0.5,
        "attention_bias": False,
    }, shapes


def glm_lite() -> tuple[dict[str, Any], Shapes]:
    """GLM-4.7-Flash: latent attention; upstream splits `kv_b_proj` in two."""
    routed = experts("gate.weight", "gate.e_score_correction_bias", "shared_experts")
    shapes = {
        **ENDS,
        **block("model.layers.0.", latent_attention(), mlp()),
        **block("model.layers.1.", latent_attention(), routed),
    }
    shapes |= block("model.layers.2.", latent_attention(), routed) | fusion(
        "model.layers.2.", "shared_head.norm"
    )
    config = {
        "architectures": ["Glm4MoeLiteForCausalLM"], "model_type": "glm4_moe_lite",
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "q_lora_rank": 32, "kv_lora_rank": 32,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16, "v_head_dim": 64, "num_key_value_heads": HEADS, "head_dim": 48,
    }  # fmt: skip
    return config, shapes


def step() -> tuple[dict[str, Any], Shapes]:
    """Step-3.5: stacked experts, norms stored as w-1, a head of two blocks, one with experts."""
    attend: Shapes = {**attention(norms=True), "g_proj.weight": (HEADS, HIDDEN)}
    stacked: Shapes = {
        "moe.gate.weight": (EXPERTS, HIDDEN), "moe.router_bias": (EXPERTS,),
        "moe.gate_proj.weight": (EXPERTS, FEED, HIDDEN),
        "moe.up_proj.weight": (EXPERTS, FEED, HIDDEN), "moe.down_proj.weight": (EXPERTS, HIDDEN,
        FEED),
        **prefixed("share_expert.", mlp(FEED)),
    }  # fmt: skip
    dense = prefixed("mlp.", mlp())
    shapes = dict(ENDS)
    for layer, feed in enumerate((dense, stacked, dense, stacked)):
        shapes |= block(f"model.layers.{layer}.", attend, {}) | prefixed(
            f"model.layers.{layer}.", feed
        )
    for layer in (2, 3):
        shapes |= fusion(f"model.layers.{layer}.", "transformer.shared_head.norm")
        shapes[f"model.layers.{layer}.transformer.shared_head.output.weight"] = (VOCABULARY, HIDDEN)
    config = {
        "architectures": ["Step3p5ForCausalLM"], "model_type": "step3p5",
        "num_attention_groups": KEYS, "moe_num_experts": EXPERTS,
        "moe_top_k": 2, "share_expert_dim": FEED, "moe_layers_enum": "1",
        "moe_router_scaling_factor": 1.0,
        "norm_expert_weight": True, "sliding_window": 128, "num_nextn_predict_layers": 2,
        "layer_types": ["full_attention", "sliding_attention", "sliding_attention",
        "full_attention"],
        "partial_rotary_factors": [0.5, 1.0, 1.0, 0.5],
        "attention_other_setting": {"num_attention_heads": HEADS, "num_attention_groups": KEYS},
    }  # fmt: skip
    return config, shapes


def nemotron() -> tuple[dict[str, Any], Shapes]:
    """Nemotron-H: Mamba, attention, experts; two numbered layers make one head block."""
    mamba: Shapes = {
        "in_proj.weight": (2 * 128 + 2 * 2 * 16 + 4, HIDDEN), "conv1d.weight": (128 + 2 * 2 * 16, 1,
        4),
        "conv1d.bias": (128 + 2 * 2 * 16,), "dt_bias": (4,), "A_log": (4,), "D": (4,),
        "norm.weight": (128,),
        "out_proj.weight": (HIDDEN, 128),
    }  # fmt: skip
    routed = experts("gate.weight", "gate.e_score_correction_bias", "shared_experts", gate=False)
    shapes: Shapes = {
        "backbone.embeddings.weight": (VOCABULARY, HIDDEN),
        "backbone.norm_f.weight": (HIDDEN,),
    }
    shapes["lm_head.weight"] = (VOCABULARY, HIDDEN)
    layers = (
        ("backbone.layers.0", mamba),
        ("backbone.layers.1", attention()),
        ("backbone.layers.2", routed),
    )
    for prefix, mixer in (*layers, ("mtp.layers.0", attention()), ("mtp.layers.1", routed)):
        shapes |= {f"{prefix}.norm.weight": (HIDDEN,), **prefixed(f"{prefix}.mixer.", mixer)}
    shapes |= {
        "mtp.layers.0.eh_proj.weight": (HIDDEN, 2 * HIDDEN),
        "mtp.layers.1.final_layernorm.weight": (HIDDEN,),
    }
    shapes |= {"mtp.layers.0.enorm.weight": (HIDDEN,), "mtp.layers.0.hnorm.weight": (HIDDEN,)}
    config = {
        "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h",
        "num_hidden_layers": 3,
        "hybrid_override_pattern": "M*E", "mamba_num_heads": 4, "mamba_head_dim": 32, "n_groups": 2,
        "ssm_state_size": 16,
        "conv_kernel": 4, "expand": 2, "layer_norm_epsilon": 1e-5, "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "moe_shared_expert_intermediate_size": FEED, "n_group": 1, "topk_group": 1,
    }  # fmt: skip
    return config, shapes


def mimo() -> tuple[dict[str, Any], Shapes]:
    """MiMo-V2: a head of three blocks, which its configuration does not mention."""
    attend: Shapes = {
        "qkv_proj.weight": ((HEADS + 2 * KEYS) * SIZE, HIDDEN),
        "o_proj.weight": (HIDDEN, HEADS * SIZE),
    }
    sliding: Shapes = {**attend, "attention_sink_bias": (HEADS,)}
    routed = experts("gate.weight", "gate.e_score_correction_bias", "none")
    routed = {name: shape for name, shape in routed.items() if not name.startswith("none.")}
    shapes = {
        **ENDS,
        **block("model.layers.0.", attend, mlp()),
        **block("model.layers.1.", sliding, routed),
    }
    for layer in range(3):
        shapes |= block(f"model.mtp.layers.{layer}.", sliding, mlp()) | fusion(
            f"model.mtp.layers.{layer}.", "final_layernorm"
        )
    config = {
        "architectures": ["MiMoV2ForCausalLM"], "model_type": "mimo_v2",
        "n_routed_experts": EXPERTS, "topk_method": "noaux_tc",
        "scoring_func": "sigmoid", "n_group": 1, "topk_group": 1, "hybrid_layer_pattern": [0, 1],
        "sliding_window": 128,
        "swa_head_dim": SIZE, "v_head_dim": SIZE, "swa_v_head_dim": SIZE,
        "swa_num_attention_heads": HEADS,
        "swa_num_key_value_heads": KEYS, "swa_rope_theta": 10000.0, "partial_rotary_factor": 0.5,
        "layernorm_epsilon": 1e-5,
    }  # fmt: skip
    return config, shapes


def hunyuan() -> tuple[dict[str, Any], Shapes]:
    """Hy3: like GLM, with other names."""
    attend = attention(norms=True)
    routed = experts("router.gate.weight", "expert_bias", "shared_mlp")
    shapes = {
        **ENDS,
        **block("model.layers.0.", attend, mlp()),
        **block("model.layers.1.", attend, routed),
    }
    shapes |= block("model.layers.2.", attend, routed) | fusion(
        "model.layers.2.", "final_layernorm"
    )
    config = {
        "architectures": ["HYV3ForCausalLM"],
        "model_type": "hy_v3",
        "num_experts": EXPERTS,
        "num_shared_experts": 1,
    }
    return {**config, "route_norm": True, "router_scaling_factor": 1.0}, shapes


def bailing() -> tuple[dict[str, Any], Shapes]:
    """Ling 2.0: llama.cpp loads its head but cannot draft with it."""
    attend: Shapes = {
        "query_key_value.weight": ((HEADS + 2 * KEYS) * SIZE, HIDDEN), "dense.weight": (HIDDEN,
        HEADS * SIZE),
        "query_layernorm.weight": (SIZE,), "key_layernorm.weight": (SIZE,),
    }  # fmt: skip
    routed = experts("gate.weight", "gate.expert_bias", "shared_experts")
    ends = {name.replace("embed_tokens", "word_embeddings"): shape for name, shape in ENDS.items()}
    shapes = {**ends, **block("model.layers.0.", attend, mlp(), "attention")}
    shapes |= block("model.layers.1.", attend, routed, "attention") | block(
        "model.layers.2.", attend, routed, "attention"
    )
    shapes |= fusion("model.layers.2.", "final_layernorm")
    config = {
        "architectures": ["BailingMoeV2ForCausalLM"],
        "model_type": "bailing_moe_v2",
        "num_experts": EXPERTS,
    }
    return {
        **config,
        "num_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
        "score_function": "sigmoid",
    }, shapes


def sparse(architecture: str, model_type: str) -> tuple[dict[str, Any], Shapes]:
    """DeepSeek V3.2 and GLM-5: latent attention with an indexer that selects keys."""
    indexer: Shapes = {
        "wq_b.weight": (4 * 64, 32), "wk.weight": (64, HIDDEN), "k_norm.weight": (64,),
        "k_norm.bias": (64,),
        "weights_proj.weight": (4, HIDDEN),
    }  # fmt: skip
    config, shapes = glm_lite()
    for layer in range(3):
        shapes |= prefixed(f"model.layers.{layer}.self_attn.indexer.", indexer)
    config |= {
        "architectures": [architecture],
        "model_type": model_type,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    }
    return {**config, "index_n_heads": 4, "index_head_dim": 64, "index_topk": 256}, shapes


def cohere() -> tuple[dict[str, Any], Shapes]:
    """North-Mini: attention and experts in parallel after one norm."""
    routed = experts("gate.weight", "none", "shared_experts")
    del routed["none"]
    feeds = (mlp(FEED), routed, routed)
    shapes = dict(ENDS)
    for layer, feed in enumerate(feeds):
        shapes |= block(f"model.layers.{layer}.", attention(), feed)
        del shapes[f"model.layers.{layer}.post_attention_layernorm.weight"]
    shapes |= fusion("model.layers.2.", "shared_head.norm")
    config = {
        "architectures": ["Cohere2MoeForCausalLM"], "model_type": "cohere2_moe",
        "intermediate_size": FEED, "logit_scale": 1.0,
        "sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"],
        "num_experts": EXPERTS,
        "num_shared_experts": 1, "expert_selection_fn": "sigmoid",
    }  # fmt: skip
    return config, shapes


def exaone() -> tuple[dict[str, Any], Shapes]:
    """K-EXAONE: llama.cpp loads its head but cannot draft with it."""
    attend = attention(norms=True)
    routed = experts("gate.weight", "e_score_correction_bias", "shared_experts")
    shapes = {
        **ENDS,
        **block("model.layers.0.", attend, mlp()),
        **block("model.layers.1.", attend, routed),
    }
    shapes |= block("mtp.layers.0.", attend, mlp()) | {"mtp.fc.weight": (HIDDEN, 2 * HIDDEN)}
    shapes |= {
        f"mtp.{name}.weight": (HIDDEN,)
        for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    }
    config = {
        "architectures": ["ExaoneMoEForCausalLM"], "model_type": "exaone_moe",
        "num_experts": EXPERTS, "num_shared_experts": 1,
        "scoring_func": "sigmoid", "n_group": 1, "topk_group": 1, "sliding_window": 128,
        "sliding_window_pattern": "LG",
        "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    return config, shapes


def ling() -> tuple[dict[str, Any], Shapes]:
    """Ling 3.0: linear attention, and gated latent attention, which the head has too."""
    attend: Shapes = {
        **latent_attention(),
        "g_proj.weight": (HEADS, HIDDEN),
        "dense.weight": (HIDDEN, HEADS * 64),
    }
    del attend["o_proj.weight"]
    wide = HEADS * SIZE
    linear: Shapes = {f"{name}_proj.weight": (wide, HIDDEN) for name in "qkvfg"} | {
        "o_proj.weight": (HIDDEN, wide)
    }
    linear |= {f"{name}_conv1d.weight": (wide, 1, 4) for name in "qkv"}
    linear |= {
        "b_proj.weight": (HEADS, HIDDEN),
        "A_log": (HEADS,),
        "dt_bias": (wide,),
        "o_norm.weight": (SIZE,),
    }
    routed = experts("gate.weight", "gate.expert_bias", "shared_experts")
    ends = {name.replace("embed_tokens", "word_embeddings"): shape for name, shape in ENDS.items()}
    shapes = {**ends, **block("model.layers.0.", linear, mlp(), "attention")}
    shapes |= block("model.layers.1.", attend, routed, "attention") | block(
        "model.layers.2.", attend, routed, "attention"
    )
    shapes |= fusion("model.layers.2.", "final_layernorm")
    latent = {
        key: value
        for key, value in glm_lite()[0].items()
        if key.endswith(("lora_rank", "head_dim"))
    }
    config = {
        "architectures": ["BailingMoeV3ForCausalLM"], "model_type": "bailing_moe_v3",
        "num_experts": EXPERTS,
        "num_shared_experts": 1, "n_group": 1, "topk_group": 1, "score_function": "sigmoid",
        "layer_group_size": 2,
        "no_kda_lora": True, "kda_safe_gate": True, "kda_lower_bound": -5.0,
        "short_conv_kernel_size": 4,
        "gated_attention_proj_granularity_type": "head_wise",
        "moe_shared_expert_intermediate_size": FEED,
    }  # fmt: skip
    return {**latent, **config, "head_dim": SIZE}, shapes


def glm_next() -> tuple[dict[str, Any], Shapes]:
    """GLM-5.3-Flash: Kimi's linear attention, latent attention without rotation, streams.

    llama.cpp loads its head but cannot draft with it.
    """
    wide, mix = HEADS * SIZE, (2 + 4) * 4
    linear: Shapes = {
        **attention(), **dict.fromkeys(("k_proj.weight", "v_proj.weight"), (wide, HIDDEN)),
        **{f"{name}_conv1d.weight": (wide, 1, 4) for name in "qkv"},
        **{f"{name}_a_proj.weight": (SIZE, HIDDEN) for name in "fg"},
        **{f"{name}_b_proj.weight": (wide, SIZE) for name in "fg"},
        "b_proj.weight": (HEADS, HIDDEN), "A_log": (HEADS,), "dt_bias": (wide,),
        "o_norm.weight": (SIZE,),
    }  # fmt: skip
    attend = latent_attention() | {
        "q_b_proj.weight": (HEADS * 32, 32), "kv_a_proj_with_mqa.weight": (32, HIDDEN)
    }  # fmt: skip
    attend |= prefixed("indexer.", {
        "wq_b.weight": (4 * 64, 32), "wk.weight": (64, HIDDEN), "k_norm.weight": (64,),
        "k_norm.bias": (64,), "weights_proj.weight": (4, HIDDEN),
        "index_kpool_compress_gate": (64, HIDDEN), "index_kpool_compress_ape": (4, 64),
    })  # fmt: skip
    routed = experts("gate.weight", "gate.e_score_correction_bias", "shared_experts")
    shapes = {**ENDS, **block("model.layers.0.", linear, mlp())}
    for layer in (1, 2):
        shapes |= block(f"model.layers.{layer}.", attend, routed)
    for layer, kind in ((0, "attn"), (0, "ffn"), (1, "attn"), (1, "ffn")):
        streams: Shapes = {"fn": (mix, 4 * HIDDEN), "base": (mix,), "scale": (3,)}
        shapes |= prefixed(f"model.layers.{layer}.hc_{kind}_", streams)
    shapes |= fusion("model.layers.2.", "shared_head.norm")
    config = {
        "architectures": ["Glm5NextForConditionalGeneration"], "model_type": "glm5_next",
        "layer_types": ["linear_attention", "full_attention"],
        "linear_attn_config": {
            "num_heads": HEADS, "head_dim": SIZE, "short_conv_kernel_size": 4,
            "gate_lower_bound": -5.0,
        },
        "mla_use_nope": True, "qk_rope_head_dim": 0, "q_lora_rank": 32, "kv_lora_rank": 32,
        "qk_nope_head_dim": 32, "v_head_dim": 64, "num_key_value_heads": HEADS,
        "index_n_heads": 4, "index_head_dim": 64, "index_topk": 256, "index_kpool": 4,
        "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6, "n_routed_experts": EXPERTS,
        "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "scoring_func": "sigmoid",
    }  # fmt: skip
    return config, shapes


MODELS: dict[str, Callable[[], tuple[dict[str, Any], Shapes]]] = {
    "glm": glm, "glm-lite": glm_lite, "step": step, "step-wrapped": step, "nemotron": nemotron,
    "mimo": mimo, "mimo-fp8": mimo,
    "hunyuan": hunyuan, "bailing": bailing, "cohere": cohere, "exaone": exaone, "ling": ling,
    "glm-dsa": lambda: sparse("GlmMoeDsaForCausalLM", "glm_moe_dsa"),
    "glm-next": glm_next,
    "deepseek": lambda: sparse("DeepseekV32ForCausalLM", "deepseek_v32"),
}  # fmt: skip


def bf16(values: np.ndarray) -> tuple[str, np.ndarray]:
    """Round towards zero, which is good enough for random values."""
    return "BF16", (np.ascontiguousarray(values, dtype="<f4").view(np.uint32) >> 16).astype("<u2")


def tensors_of(name: str, shapes: Shapes) -> Tensors:
    """Values for these shapes that make the head draft, as described above."""
    rng = np.random.default_rng(7)
    embedding = rng.standard_normal((VOCABULARY, HIDDEN))
    output = np.zeros((VOCABULARY, HIDDEN))
    output[(np.arange(WORDS) * 5 + 7) % WORDS] = embedding[:WORDS]  # word 5n + 7 follows word n
    result: Tensors = {}
    for key, shape in shapes.items():
        values = rng.standard_normal(shape) * 0.05
        if shape[0] == VOCABULARY:
            values = embedding if "embed" in key else output
        elif key.endswith(("eh_proj.weight", "mtp.fc.weight")):
            values = np.hstack([np.eye(HIDDEN), np.zeros((HIDDEN, HIDDEN))])
        elif "norm" in key and not name.startswith("step"):
            values += 1
        elif key.endswith(("o_proj.weight", "out_proj.weight", "dense.weight", "down_proj.weight")):
            values *= 0.02
        result[key] = bf16(values)
    return result


def by_rank(tensors: Tensors, ranks: int = 4) -> Tensors:
    """Fused projections in FP8 as in MiMo: each of `ranks` has its rows and scales."""
    result = dict(tensors)
    for name, (dtype, codes) in tensors.items():
        if name.endswith("qkv_proj.weight"):
            parts = np.split(codes, [HEADS * SIZE, (HEADS + KEYS) * SIZE])
            halves = [
                np.concatenate(rows)
                for rows in zip(*(np.split(part, ranks) for part in parts), strict=True)
            ]
            result[name] = (dtype, np.concatenate(halves))
            # The whole tensor is smaller than a block, so it has one scale.
            scale = tensors[f"{name}_scale_inv"][1]
            growing = 1 + np.arange(ranks, dtype=np.float32)[:, None] / 8
            result[f"{name}_scale_inv"] = ("F32", scale * growing)
    return result


def write_model(name: str, folder: Path, drop: str = "\0", **changes: Any) -> Path:
    """Write a checkpoint in two shards, without tensors whose name contains `drop`."""
    settings, shapes = MODELS[name]()
    config = {**COMMON, **settings, **changes}
    tensors = {key: value for key, value in tensors_of(name, shapes).items() if drop not in key}
    if name == "mimo-fp8":
        tensors = by_rank(eight_bit(config, tensors))
    if name == "step-wrapped":
        tensors = {
            key.replace("model.", "model.language_model.", 1): value
            for key, value in tensors.items()
        }
        config = {
            "architectures": ["Step3p7ForConditionalGeneration"],
            "vision_config": {},
            "text_config": config,
        }
    write_checkpoint(folder, CHECKPOINTS / "tiny-qwen3.5", config, tensors, shards=2)
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    fields = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    tokenizer["added_tokens"] += [
        {"id": 1268 + i, "content": text, **fields, "special": True}
        for i, text in enumerate(SPECIAL)
    ]
    path.write_text(json.dumps(tokenizer))
    if name == "deepseek":  # upstream requires a first token
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings |= {
            "tokenizer_class": "LlamaTokenizerFast",
            "add_bos_token": True,
            "bos_token": "<|endoftext|>",
        }
        del settings["add_prefix_space"]
        (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder
