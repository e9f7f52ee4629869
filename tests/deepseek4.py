"""A tiny random DeepSeek-V4: FP8 and MXFP4 weights, a head that llama.cpp keeps in its own file.

It drafts as `other_architectures` describes.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
from layouts import CHECKPOINTS, Tensors, write_checkpoint
from mtpforge.checkpoint import fp8
from other_architectures import (
    COMMON,
    EXPERTS,
    FEED,
    HEADS,
    HIDDEN,
    VOCABULARY,
    Shapes,
    bf16,
    prefixed,
    tensors_of,
)

SIZE, RANK, INDEX, STREAMS = 32, 32, 64, 4  # of a head, low-rank, of the indexer, hyper-connection
MIX = (2 + STREAMS) * STREAMS

CONFIG: dict[str, Any] = {
    **COMMON,
    "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4",
    "num_hidden_layers": 3, "num_hash_layers": 1, "compress_ratios": [0, 4, 128, 0],
    "num_key_value_heads": 1, "head_dim": SIZE, "qk_rope_head_dim": 16, "q_lora_rank": RANK,
    "o_lora_rank": RANK, "o_groups": 2, "sliding_window": 128, "swiglu_limit": 10.0,
    "index_n_heads": HEADS, "index_head_dim": INDEX, "index_topk": 64,
    "compress_rope_theta": 40000.0, "hc_mult": STREAMS, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6,
    "n_routed_experts": EXPERTS, "n_shared_experts": 1, "scoring_func": "sqrtsoftplus",
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}  # fmt: skip


def projections() -> Shapes:
    """Gate, down and up of an expert."""
    return {
        "w1.weight": (FEED, HIDDEN), "w2.weight": (HIDDEN, FEED), "w3.weight": (FEED, HIDDEN)
    }  # fmt: skip


def layer(prefix: str) -> Shapes:
    """A layer without compression, whose router has a bias."""
    shapes: Shapes = {
        "attn_norm.weight": (HIDDEN,), "ffn_norm.weight": (HIDDEN,),
        "attn.attn_sink": (HEADS,), "attn.wq_a.weight": (RANK, HIDDEN),
        "attn.q_norm.weight": (RANK,), "attn.wq_b.weight": (HEADS * SIZE, RANK),
        "attn.wkv.weight": (SIZE, HIDDEN), "attn.kv_norm.weight": (SIZE,),
        "attn.wo_a.weight": (2 * RANK, HEADS * SIZE // 2), "attn.wo_b.weight": (HIDDEN, 2 * RANK),
        "ffn.gate.weight": (EXPERTS, HIDDEN), "ffn.gate.bias": (EXPERTS,),
        **prefixed("ffn.shared_experts.", projections()),
    }  # fmt: skip
    for kind in ("attn", "ffn"):
        shapes |= {f"hc_{kind}_fn": (MIX, STREAMS * HIDDEN)}
        shapes |= {f"hc_{kind}_base": (MIX,), f"hc_{kind}_scale": (3,)}
    for expert in range(EXPERTS):
        shapes |= prefixed(f"ffn.experts.{expert}.", projections())
    return prefixed(prefix, shapes)


def compressor(prefix: str, ratio: int, width: int, size: int) -> Shapes:
    shapes: Shapes = {
        "ape": (ratio, width), "wkv.weight": (width, HIDDEN), "wgate.weight": (width, HIDDEN),
        "norm.weight": (size,),
    }  # fmt: skip
    return prefixed(f"{prefix}compressor.", shapes)


def shapes() -> Shapes:
    output: Shapes = {
        "hc_head_fn": (STREAMS, STREAMS * HIDDEN), "hc_head_base": (STREAMS,), "hc_head_scale": (1,)
    }  # fmt: skip
    found: Shapes = {"embed.weight": (VOCABULARY, HIDDEN), "norm.weight": (HIDDEN,), **output}
    found |= {"head.weight": (VOCABULARY, HIDDEN)}
    for number in range(3):
        found |= layer(f"layers.{number}.")
    found |= compressor("layers.1.attn.", 4, 2 * SIZE, SIZE)
    found |= compressor("layers.1.attn.indexer.", 4, 2 * INDEX, INDEX)
    found |= {"layers.1.attn.indexer.wq_b.weight": (HEADS * INDEX, RANK)}
    found |= {"layers.1.attn.indexer.weights_proj.weight": (HEADS, HIDDEN)}
    found |= compressor("layers.2.attn.", 128, SIZE, SIZE)
    found |= layer("mtp.0.") | prefixed("mtp.0.", output)
    found |= {f"mtp.0.{name}.weight": (HIDDEN,) for name in ("enorm", "hnorm", "norm")}
    return found | {f"mtp.0.{half}_proj.weight": (HIDDEN, HIDDEN) for half in "eh"}


def eight_bit(values: np.ndarray) -> Tensors:
    """A matrix smaller than a block in FP8: `weight`, and a power of two as `scale`."""
    exponent = int(np.ceil(np.log2(max(np.abs(values).max(), 1e-6) / 448)))
    order = np.argsort(fp8.FINITE, kind="stable")
    place = np.searchsorted(fp8.FINITE[order], values / 2.0**exponent)
    codes = order[np.clip(place, 1, 254)].astype(np.uint8)
    count = (-(-values.shape[0] // 128), -(-values.shape[1] // 128))
    scale = np.full(count, exponent + 127, np.uint8)
    return {"weight": ("F8_E4M3", codes), "scale": ("F8_E8M0", scale)}


def four_bit(rng: np.random.Generator, shape: tuple[int, ...]) -> Tensors:
    """A random matrix in MXFP4, small enough to add almost nothing."""
    codes = rng.integers(0, 256, (shape[0], shape[1] // 2)).astype(np.uint8).view(np.int8)
    scale = rng.integers(118, 121, (shape[0], shape[1] // 32)).astype(np.uint8)
    return {"weight": ("I8", codes), "scale": ("F8_E8M0", scale)}


def tensors() -> Tensors:
    rng = np.random.default_rng(7)
    plain = shapes()
    embedding, output = plain.pop("embed.weight"), plain.pop("head.weight")
    result = tensors_of("v4", {"embed.weight": embedding, "head.weight": output})
    for name, shape in plain.items():
        stem = name.removesuffix(".weight")
        values = (rng.standard_normal(shape) * 0.05).astype("<f4")
        if stem.endswith(("e_proj", "h_proj")):
            values = np.eye(HIDDEN, dtype="<f4") * stem.endswith("e_proj")
        elif stem.endswith("norm"):
            values += 1
        elif stem.endswith((".wo_b", ".w2")):
            values *= 0.02
        if ".ffn.experts." in name:
            found = four_bit(rng, shape)
        elif len(shape) == 2 and is_eight_bit(stem):
            found = eight_bit(values)
        elif stem == name:
            result[name] = ("F32", values)
            continue
        else:
            found = {"weight": bf16(values)}
        result |= {f"{stem}.{key}": value for key, value in found.items()}
    del result["layers.0.ffn.gate.bias"]  # a layer that routes by token
    experts = np.stack([np.arange(VOCABULARY) % EXPERTS, np.arange(1, VOCABULARY + 1) % EXPERTS])
    result["layers.0.ffn.gate.tid2eid"] = ("I64", np.ascontiguousarray(experts.T, "<i8"))
    return result


def is_eight_bit(stem: str) -> bool:
    """Whether a matrix is in FP8: of attention or indexer, a shared expert, or the fusion."""
    last = stem.rpartition(".")[2]
    attention = (
        ".attn." in stem and "compressor" not in stem and last.startswith(("wq", "wk", "wo"))
    )
    return attention or "shared_experts" in stem or last in ("e_proj", "h_proj")


def write_deepseek4(folder: Path, drop: str = "\0", **changes: Any) -> Path:
    """Write the checkpoint in two shards, without tensors whose name contains `drop`."""
    kept = {name: tensor for name, tensor in tensors().items() if drop not in name}
    source = CHECKPOINTS / "tiny-qwen3.5"
    write_checkpoint(folder, source, {**CONFIG, **changes}, kept, shards=2)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings |= {"tokenizer_class": "LlamaTokenizerFast", "bos_token": "<|endoftext|>"}
    del settings["add_prefix_space"]
    path.write_text(json.dumps(settings))
    return folder
