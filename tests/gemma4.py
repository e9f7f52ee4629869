"""A tiny random Gemma 4 and its drafter, a checkpoint of its own that llama.cpp serves with `-md`.

The next token depends only on the current one, as `other_architectures` describes. The drafter
passes on the embedding half of its input in orthogonal rows, and its own embeddings are the
target's output in the same rows: it drafts what the target says next.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from layouts import Tensors, write_shard
from other_architectures import Shapes, bf16, mlp, prefixed

HIDDEN, WIDE, HEADS, KEYS, SIZE, FULL = 64, 96, 4, 2, 16, 32  # WIDE: hidden size of the drafter
LAYERS = ("sliding_attention", "full_attention")
LETTERS = "abcdefghijklmnopqrstuvwxyz"
SPECIAL = ("<pad>", "<eos>", "<bos>", "<unk>", "<turn|>", "<|tool_call>")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))
PAIRS = tuple((a, b) for a in LETTERS for b in LETTERS)
TOKENS = (*SPECIAL, *BYTES, "\u2581", *LETTERS, *(a + b for a, b in PAIRS))
FIRST = len(SPECIAL) + len(BYTES)  # lower ids are never generated
EXTRA = "<|video|>"
"""A special token that transformers 5 lists where older ones expect an object."""

TEXT: dict[str, Any] = {
    "hidden_size": HIDDEN, "intermediate_size": 128, "num_hidden_layers": len(LAYERS),
    "layer_types": list(LAYERS), "num_attention_heads": HEADS, "num_key_value_heads": KEYS,
    "num_global_key_value_heads": 1, "head_dim": SIZE, "global_head_dim": FULL,
    "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "moe_intermediate_size": None,
    "sliding_window": 512, "final_logit_softcapping": None, "rms_norm_eps": 1e-6,
    "vocab_size": len(TOKENS) + 1, "max_position_embeddings": 4096, "use_double_wide_mlp": False,
    "hidden_activation": "gelu_pytorch_tanh", "bos_token_id": 2, "eos_token_id": 1,
    "pad_token_id": 0, "rope_parameters": {
        "full_attention": {
            "partial_rotary_factor": 0.25, "rope_theta": 1e6, "rope_type": "proportional",
        },
        "sliding_attention": {"rope_theta": 1e4, "rope_type": "default"},
    },
}  # fmt: skip

TARGET: dict[str, Any] = {
    "architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4",
    "dtype": "bfloat16", "text_config": TEXT,
}  # fmt: skip
DRAFTER: dict[str, Any] = {
    "architectures": ["Gemma4AssistantForCausalLM"], "model_type": "gemma4_assistant",
    "dtype": "bfloat16", "backbone_hidden_size": HIDDEN,
    "text_config": {**TEXT, "hidden_size": WIDE, "num_kv_shared_layers": len(LAYERS)},
}  # fmt: skip


def layer(prefix: str, kind: str, width: int, keys: bool) -> Shapes:
    """A decoder layer, without keys and values if it reads the target's."""
    size, heads = (FULL, 1) if kind == "full_attention" else (SIZE, KEYS)
    feed: Shapes = {name: tuple(width if n == HIDDEN else n for n in shape) for name, shape in
                    mlp().items()}  # fmt: skip
    shapes: Shapes = {
        "self_attn.q_proj.weight": (HEADS * size, width), "self_attn.q_norm.weight": (size,),
        "self_attn.o_proj.weight": (width, HEADS * size), "layer_scalar": (1,),
        **prefixed("mlp.", feed),
    }  # fmt: skip
    if keys:
        shapes |= {f"self_attn.{name}_proj.weight": (heads * size, width) for name in "kv"}
        shapes["self_attn.k_norm.weight"] = (size,)
    for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
        shapes[f"{name}_layernorm.weight"] = (width,)
    return prefixed(prefix, shapes)


def values_of(shapes: Shapes, rng: np.random.Generator) -> Tensors:
    """Random values; what attention and MLP add is scaled down by the norms after them."""
    made: Tensors = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape) * 0.05
        if name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
            values *= 0.2
        elif "norm" in name or name.endswith("layer_scalar"):
            values += 1
        made[name] = bf16(values)
    return made


def tensors() -> tuple[Tensors, Tensors]:
    """Target and drafter."""
    rng = np.random.default_rng(7)
    rows = TEXT["vocab_size"]
    embedding = rng.standard_normal((rows, HIDDEN)) / 8
    words = np.arange(len(TOKENS) - FIRST)
    output = np.zeros((rows, HIDDEN))
    output[FIRST + (5 * words + 7) % len(words)] = embedding[FIRST + words]
    target: Shapes = {"norm.weight": (HIDDEN,)}
    drafter: Shapes = {"norm.weight": (WIDE,)}
    for number, kind in enumerate(LAYERS):
        target |= layer(f"layers.{number}.", kind, HIDDEN, keys=True)
        drafter |= layer(f"layers.{number}.", kind, WIDE, keys=False)
    wider = np.linalg.qr(rng.standard_normal((WIDE, HIDDEN)))[0]
    text = "model.language_model."
    made = values_of(prefixed(text, target), rng)
    made |= {f"{text}embed_tokens.weight": bf16(embedding), "lm_head.weight": bf16(output)}
    made["model.vision_tower.patch_embedder.weight"] = bf16(np.ones((4, 4)))
    drafts = values_of(prefixed("model.", drafter), rng)
    drafts["model.embed_tokens.weight"] = bf16(output @ wider.T)
    drafts["pre_projection.weight"] = bf16(np.hstack([wider, np.zeros((WIDE, HIDDEN))]))
    drafts["post_projection.weight"] = bf16(wider.T)
    drafts["masked_embedding.centroids.weight"] = bf16(np.ones((8, WIDE)))
    drafts["masked_embedding.token_ordering"] = ("I64", np.arange(rows, dtype="<i8"))
    return made, drafts


def write_gemma4(folder: Path, unified: str = "", **changes: Any) -> tuple[Path, Path]:
    """Write target and drafter below `folder`; `changes` are of the drafter's config.json.

    `unified` is Unified for the other kind of both.
    """
    written = folder / "gemma", folder / "gemma-assistant"
    configs = [
        {**config, "architectures": [config["architectures"][0].replace("4", f"4{unified}", 1)]}
        for config in (TARGET, {**DRAFTER, **changes})
    ]
    for path, config, made in zip(written, configs, tensors(), strict=True):
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(config))
        write_shard(path / "model.safetensors", made)
        write_tokenizer(path)
    return written


def write_tokenizer(folder: Path) -> None:
    """A tokenizer of Gemma's kind: BPE over characters, with bytes for all others."""
    space = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    fields = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = [
        {"id": number, "content": token, **fields, "special": True}
        for number, token in [*enumerate(SPECIAL), (len(TOKENS), EXTRA)]
    ]
    model = {
        "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None,
        "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True,
        "ignore_merges": False, "vocab": {token: number for number, token in enumerate(TOKENS)},
        "merges": [list(pair) for pair in PAIRS],
    }  # fmt: skip
    back = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    tokenizer = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
        "normalizer": space, "pre_tokenizer": None, "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"},
                                                     {"type": "Fuse"}]},
        "model": model,
    }  # fmt: skip
    settings = {
        "tokenizer_class": "GemmaTokenizer", "bos_token": "<bos>", "eos_token": "<eos>",
        "pad_token": "<pad>", "unk_token": "<unk>", "extra_special_tokens": [EXTRA],
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
