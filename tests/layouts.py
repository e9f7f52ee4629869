"""The embedded checkpoints in other layouts of real repositories: other names, shards and fusions.

A layout is a function of configuration and tensors; `write_layout` writes it as a checkpoint. Needs
only numpy, so that the golden script can run it in the environment of upstream's converter.
"""

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

CHECKPOINTS = Path(__file__).parent / "checkpoints"

Tensors = dict[str, tuple[str, np.ndarray]]
"""Name -> (safetensors type, raw array), in storage order."""

_NUMPY = {
    "BF16": np.dtype("<u2"), "F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "I64": np.dtype("<i8"),
}  # fmt: skip


_CODE = np.arange(127)
E4M3 = np.where(
    _CODE >> 3, (1 + (_CODE & 7) / 8) * 2.0 ** ((_CODE >> 3) - 7), (_CODE & 7) / 8 * 2.0**-6
)
"""The positive values of E4M3, by code."""


def read_tensors(folder: Path) -> Tensors:
    """Read all tensors of a checkpoint, in the order of its shards."""
    tensors: Tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= read_shard(shard)
    return tensors


def read_shard(path: Path) -> Tensors:
    """Read all tensors of a safetensors file, in the order of its header."""
    tensors: Tensors = {}
    raw = path.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    for name, entry in json.loads(raw[8 : 8 + length]).items():
        if name != "__metadata__":
            begin, end = (8 + length + offset for offset in entry["data_offsets"])
            array = np.frombuffer(raw[begin:end], _NUMPY[entry["dtype"]]).reshape(entry["shape"])
            tensors[name] = (entry["dtype"], array)
    return tensors


def write_shard(path: Path, tensors: Tensors) -> None:
    """Write a safetensors file."""
    header, offset = {}, 0
    for name, (dtype, array) in tensors.items():
        header[name] = {
            "dtype": dtype,
            "shape": list(array.shape),
            "data_offsets": [offset, offset + array.nbytes],
        }
        offset += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(
        struct.pack("<Q", len(text))
        + text
        + b"".join(array.tobytes() for _, array in tensors.values())
    )


def write_checkpoint(
    folder: Path, source: Path, config: dict[str, Any], tensors: Tensors, shards: int = 1
) -> Path:
    """Write a checkpoint with the tokenizer and card of `source`; an index if `shards` > 1."""
    folder.mkdir(parents=True)
    for path in source.iterdir():
        if path.is_file() and not path.name.endswith(
            (".safetensors", "index.json", "reference.json")
        ):
            shutil.copy(path, folder / path.name)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    names = list(tensors)
    weight_map = {}
    for i in range(shards):
        part = names[len(names) * i // shards : len(names) * (i + 1) // shards]
        shard = (
            f"model-{i + 1:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        )
        write_shard(folder / shard, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, shard)
    if shards > 1:
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"metadata": {}, "weight_map": weight_map})
        )
    return folder


def fused_head(config: dict[str, Any], tensors: Tensors) -> Tensors:
    """Fuse the head's experts, as in Qwen3.6."""
    experts = config["text_config"]["num_experts"]
    result, stacked = {}, "mtp.layers.0.mlp.experts"

    def stack(projection: str) -> np.ndarray:
        return np.stack(
            [tensors[f"{stacked}.{e}.{projection}_proj.weight"][1] for e in range(experts)]
        )

    for name, value in tensors.items():
        if name == f"{stacked}.0.gate_proj.weight":
            result[f"{stacked}.gate_up_proj"] = (
                "BF16",
                np.concatenate([stack("gate"), stack("up")], axis=1),
            )
            result[f"{stacked}.down_proj"] = ("BF16", stack("down"))
        if not name.startswith(f"{stacked}."):
            result[name] = value
    return result


def separate_experts(config: dict[str, Any], tensors: Tensors) -> Tensors:
    """Split the trunk's experts into a matrix each."""
    result: Tensors = {}
    for name, (dtype, array) in tensors.items():
        if match := re.fullmatch(r"(model\..*\.experts)\.(gate_up|down)_proj", name):
            for e, matrix in enumerate(array):
                halves = np.split(matrix, 2) if match[2] == "gate_up" else [matrix]
                for projection, half in zip(
                    ("gate", "up") if match[2] == "gate_up" else ("down",), halves, strict=True
                ):
                    result[f"{match[1]}.{e}.{projection}_proj.weight"] = (dtype, half)
        else:
            result[name] = (dtype, array)
    return result


def mixed_experts(config: dict[str, Any], tensors: Tensors) -> Tensors:
    """Separate experts in the trunk, fused experts in the head."""
    return separate_experts(config, fused_head(config, tensors))


def odd_experts(config: dict[str, Any], tensors: Tensors) -> Tensors:
    """Separate experts, some in wider types; those of the head fused, with the suffix `.weight`."""
    result: Tensors = {}
    for name, (dtype, array) in mixed_experts(config, tensors).items():
        if name.startswith("mtp.") and name.endswith(("gate_up_proj", "down_proj")):
            name += ".weight"
        wide = re.search(r"layers\.1\.mlp\.experts\.([02])\.", name)
        if wide:
            values = (array.astype(np.uint32) << 16).view(np.float32)
            kind = ("F32", "<f4") if wide[1] == "0" else ("F16", "<f2")
            # 0.3% more, so that rounding to BF16 must be right.
            dtype, array = kind[0], (values * np.float32(1.003)).astype(kind[1])
        result[name] = (dtype, array)
    return result


def text_only(config: dict[str, Any], tensors: Tensors) -> Tensors:
    """A `ForCausalLM` checkpoint: no vision tower, no wrapper, untied output matrix."""
    text = config.pop("text_config")
    architecture = config["architectures"][0].replace("ForConditionalGeneration", "ForCausalLM")
    config.clear()
    config.update(text, architectures=[architecture], tie_word_embeddings=False)
    result = {
        n.replace("language_model.", ""): t
        for n, t in tensors.items()
        if not n.startswith("model.visual.")
    }
    return {**result, "lm_head.weight": result["model.embed_tokens.weight"]}


def wide_types(config: dict[str, Any], tensors: Tensors) -> Tensors:
    """F32 for the first half of the tensors, F16 for the remaining matrices."""
    result: Tensors = {}
    for i, (name, (dtype, array)) in enumerate(tensors.items()):
        values = (array.astype(np.uint32) << 16).view(np.float32) if dtype == "BF16" else array
        half = i > len(tensors) // 2 and array.ndim > 1
        result[name] = ("F16", values.astype("<f2")) if half else ("F32", values.astype("<f4"))
    return result


def as_tools_save(config: dict[str, Any], tensors: Tensors) -> Tensors:
    """The head's key removed, older keys of the rotation, one level tied, and buffers."""
    text = config["text_config"]
    del text["mtp_num_hidden_layers"]
    rotation = text.pop("rope_parameters")
    text.update({key: rotation[key] for key in ("rope_theta", "partial_rotary_factor")})
    text["rope_scaling"] = {"type": "mrope", "mrope_section": rotation["mrope_section"]}
    config["tie_word_embeddings"], text["tie_word_embeddings"] = True, False
    text["time_step_limit"] = [0.0, float("inf")]
    buffer = ("F32", np.ones(8, "<f4"))
    names = ("rotary_emb.inv_freq", "layers.3.self_attn.rotary_emb.inv_freq")
    return {**tensors, **{f"model.language_model.{name}": buffer for name in names}}


def qwen3_next() -> tuple[dict[str, Any], Tensors]:
    """A tiny random Qwen3-Next: fused linear attention, separate experts, undeclared head."""
    config: dict[str, Any] = {
        "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "hidden_size": 128,
        "num_hidden_layers": 2,
        "full_attention_interval": 2, "head_dim": 64, "num_attention_heads": 2,
        "num_key_value_heads": 1, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "intermediate_size": 256, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 64, "vocab_size": 1280, "rms_norm_eps": 1e-6,
        "rope_theta": 10000000,
        "partial_rotary_factor": 0.25, "rope_scaling": None, "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }  # fmt: skip
    shapes = {
        "model.embed_tokens.weight": (1280, 128),
        "model.norm.weight": (128,),
        "lm_head.weight": (1280, 128),
    }
    linear = {
        "in_proj_qkvz.weight": (384, 128), "in_proj_ba.weight": (8, 128), "conv1d.weight": (256, 1,
        4), "A_log": (4,),
        "dt_bias": (4,), "norm.weight": (32,), "out_proj.weight": (128, 128),
    }  # fmt: skip
    full = {
        "q_proj.weight": (256, 128), "k_proj.weight": (64, 128), "v_proj.weight": (64, 128),
        "o_proj.weight": (128, 128),
        "q_norm.weight": (64,), "k_norm.weight": (64,),
    }  # fmt: skip
    mlp = {"gate.weight": (4, 128), "shared_expert_gate.weight": (1, 128)}
    for expert in ("shared_expert", *(f"experts.{e}" for e in range(4))):
        mlp |= {
            f"{expert}.gate_proj.weight": (64, 128),
            f"{expert}.up_proj.weight": (64, 128),
            f"{expert}.down_proj.weight": (128, 64),
        }
    for block, attention in (
        ("model.layers.0", linear),
        ("model.layers.1", full),
        ("mtp.layers.0", full),
    ):
        name = "linear_attn" if attention is linear else "self_attn"
        shapes |= {
            f"{block}.{norm}_layernorm.weight": (128,) for norm in ("input", "post_attention")
        }
        shapes |= {f"{block}.{name}.{key}": shape for key, shape in attention.items()}
        shapes |= {f"{block}.mlp.{key}": shape for key, shape in mlp.items()}
    shapes |= {"mtp.fc.weight": (128, 256), "mtp.norm.weight": (128,)}
    shapes |= {f"mtp.pre_fc_norm_{which}.weight": (128,) for which in ("embedding", "hidden")}
    rng = np.random.default_rng(3)
    bits = {
        name: rng.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16
        for name, shape in shapes.items()
    }
    return config, {name: ("BF16", array.astype("<u2")) for name, array in bits.items()}


QWEN4_EXP: dict[str, Any] = {
    "model_type": "qwen4_exp_text", "hidden_size": 128, "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"], "full_attention_interval": 2,
    "head_dim": 64, "num_attention_heads": 2, "num_key_value_heads": 1, "linear_num_key_heads": 2,
    "linear_num_value_heads": 4, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4, "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "vocab_size": 1280,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 4096, "partial_rotary_factor": 0.25,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000000, "mrope_section": [4, 2, 2]},
    "hc_count": 2, "hc_lowrank": 16, "indexer_n_heads": 2, "indexer_kv_heads": 1,
    "indexer_head_dim": 32, "indexer_budget": 64, "indexer_compress_ratio": 4,
    "ple_layer_ids": [1], "ple_embed_dim": 128, "ple_conv_kernel_size": 4, "ngram_size": 3,
    "heads_per_ngram": 2, "ngram_vocab_size_base": 31, "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 4, "eos_token_id": 1257, "mtp_num_hidden_layers": 1,
    "tie_word_embeddings": False,
}  # fmt: skip


def qwen4_exp() -> tuple[dict[str, Any], Tensors]:
    """A tiny random Qwen4Exp whose head drafts: hyper-connections, an indexer, n-grams in parts.

    Its blocks add almost nothing, so the next token depends on the current one alone. The head has
    the trunk's last mixer, and passes on the embedding, so it predicts the token after the next.
    """
    config = {
        "architectures": ["Qwen4ExpForConditionalGeneration"], "image_token_id": 1258,
        "model_type": "qwen4_exp", "text_config": QWEN4_EXP, "tie_word_embeddings": False,
    }  # fmt: skip
    rng = np.random.default_rng(4)
    values: dict[str, np.ndarray] = {
        name: rng.standard_normal(shape).astype(np.float32) * _scale_of(name)
        for name, shape in _shapes_of_qwen4_exp().items()
    }
    mixer = "model.language_model.hyper_connection_mixer."
    for name in [name for name in values if name.startswith(mixer)]:
        values[name.replace("model.language_model.", "mtp.")] = values[name]
    values["mtp.fc_embedding.weight"] = np.eye(128, dtype=np.float32)
    words = values["model.language_model.embed_tokens.weight"]
    words *= 10
    values["lm_head.weight"] = np.zeros_like(words)
    values["lm_head.weight"][:1257] = words[rng.permutation(1257)] / 10
    tensors: Tensors = {
        name: ("BF16", (array.view(np.uint32) >> 16).astype("<u2"))
        for name, array in values.items()
    }
    table = "model.language_model.layers.0.ple.ple_embedding."
    for name, numbers in {
        "layer_multipliers": [9_123_456_789_011, 23_456_789_012_345, 1_234_567_890_123],
        "ngram_heads_offsets": [0, 31, 68, 109],
        "ngram_heads_vocab_sizes": [31, 37, 41, 43],
    }.items():
        tensors[table + name] = ("I64", np.array(numbers, "<i8"))
    return config, tensors


def seeing_qwen4_exp() -> tuple[dict[str, Any], Tensors]:
    """The same with the dense checkpoint's vision tower, whose last matrix is cut to its width."""
    config, tensors = qwen4_exp()
    dense = CHECKPOINTS / "tiny-qwen3.5"
    theirs = json.loads((dense / "config.json").read_text())
    config |= {key: theirs[key] for key in theirs if key.endswith("token_id")}
    config["vision_config"] = {**theirs["vision_config"], "out_hidden_size": 128}
    for name, (dtype, array) in read_tensors(dense).items():
        if name.startswith("model.visual."):
            tensors[name] = (dtype, array[:128] if "merger.linear_fc2" in name else array)
    return config, tensors


def _scale_of(name: str) -> float:
    quiet = ("out_proj", "o_proj", "down_proj", "ple.value_proj", "fc_hidden")
    if name.removesuffix(".weight").endswith(quiet):
        return 0.001
    return 0.05 if any(part in name for part in ("norm", "A_log", "dt_bias")) else 0.1


def _shapes_of_qwen4_exp() -> dict[str, tuple[int, ...]]:
    full = {
        "q_proj": (256, 128), "k_proj": (64, 128), "v_proj": (64, 128), "o_proj": (128, 128),
        "q_norm": (64,), "k_norm": (64,), "indexer.index_qk_proj": (96, 128),
        "indexer.q_layernorm": (32,), "indexer.k_layernorm": (32,),
    }  # fmt: skip
    linear = {
        "in_proj_qkv": (256, 128), "in_proj_z": (128, 128), "in_proj_a": (4, 128),
        "in_proj_b": (4, 128), "conv1d": (256, 1, 4), "norm": (32,), "out_proj": (128, 128),
    }  # fmt: skip
    mixer = {
        "hc_norm": (256,),
        "input_mix_weight_down": (16, 256),
        "input_mix_weight_up": (256, 16),
    }
    feed = {"gate": (4, 128), "shared_expert_gate": (1, 128)}
    feed |= {f"shared_expert.{n}_proj": (64, 128) for n in ("gate", "up")}
    feed["shared_expert.down_proj"] = (128, 64)
    ngrams = {
        "key_proj": (256, 128), "value_proj": (128, 128), "conv1d": (256, 1, 4),
        "norm_key": (256,), "norm_query": (256,), "norm_conv": (256,),
    }  # fmt: skip
    ngrams |= {f"ple_embedding.ngram_embedding.shard_{i}": (38, 32) for i in range(4)}
    model = "model.language_model."
    shapes: dict[str, tuple[int, ...]] = {f"{model}embed_tokens.weight": (1280, 128)}
    shapes["lm_head.weight"] = (1280, 128)

    def add(prefix: str, parts: dict[str, tuple[int, ...]]) -> None:
        shapes.update({f"{prefix}{name}.weight": shape for name, shape in parts.items()})

    for to, attention in (("0.", linear), ("1.", full), ("", full)):
        block = f"{model}layers.{to}" if to else "mtp.layers.0."
        for connection in ("attn", "mlp"):
            inject = {"block_inject_weight": (2, 256)}
            add(f"{block}{connection}_hyper_connection.", {**mixer, **inject})
        add(f"{block}{'linear_attn' if attention is linear else 'self_attn'}.", attention)
        add(f"{block}mlp.", feed)
        shapes[f"{block}mlp.experts.gate_up_proj"] = (4, 128, 128)
        shapes[f"{block}mlp.experts.down_proj"] = (4, 128, 64)
    shapes |= {f"{model}layers.0.linear_attn.{name}": (4,) for name in ("A_log", "dt_bias")}
    add(f"{model}layers.0.ple.", ngrams)
    add(f"{model}hyper_connection_mixer.", mixer)
    add("mtp.", {"fc_hidden": (128, 128), "fc_embedding": (128, 128)})
    add("mtp.", {"pre_fc_norm_embedding": (128,), "pre_fc_norm_hidden": (256,)})
    return shapes


def eight_bit(config: dict[str, Any], tensors: Tensors) -> Tensors:
    """Matrices of trunk and head in FP8 with a scale per 128 x 128 block, as in FP8 releases."""
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
    }
    return _quantized(tensors, _block_scales, "_scale_inv")


def eight_bit_static(config: dict[str, Any], tensors: Tensors) -> Tensors:
    """Block scales that are powers of two, and scales of activations, which change no weight."""
    result = eight_bit(config, tensors)
    config["quantization_config"]["activation_scheme"] = "static"
    result |= _quantized(tensors, _block_scales, "_scale_inv", kind="F8_E8M0")
    for name in [name for name in result if name.endswith("_scale_inv")]:
        unused = name.replace("weight_scale_inv", "activation_scale")
        result[unused] = ("F32", np.array(0.02, "<f4"))
    return result


def eight_bit_rows(config: dict[str, Any], tensors: Tensors) -> Tensors:
    """A scale per row, as llm-compressor writes them; the head stays in BF16."""
    weights = {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False}
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": ["lm_head", "re:mtp.*"],
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
    }

    def largest(values: np.ndarray) -> np.ndarray:
        return np.asarray(np.abs(values).max(-1, keepdims=True))

    head = {name: tensor for name, tensor in tensors.items() if name.startswith("mtp.")}
    trunk = {name: tensor for name, tensor in tensors.items() if name not in head}
    return _quantized(trunk, largest, "_scale", kind="BF16") | head


def eight_bit_whole(config: dict[str, Any], tensors: Tensors) -> Tensors:
    """One scale per matrix, and those of activations and cache, as ModelOpt writes them."""
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "FP8"}
    result = _quantized(tensors, lambda values: np.abs(values).max(), "_scale")
    for name in [name for name in result if name.endswith("weight_scale")]:
        unused = [name.replace("weight_scale", "input_scale")]
        unused += [
            name.replace(f"{which}_proj.weight_scale", f"{which}_scale")
            for which in "kv"
            if f"{which}_proj." in name
        ]
        result |= dict.fromkeys(unused, ("F32", np.array(0.02, "<f4")))
    return result


def eight_bit_experts(config: dict[str, Any], tensors: Tensors) -> Tensors:
    """Fused experts with one scale per expert, other matrices with one scale."""
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": None}
    return _quantized(
        fused_head(config, tensors), lambda values: np.abs(values).max((-2, -1)), "_scale_inv"
    )


def four_bit(config: dict[str, Any], tensors: Tensors) -> Tensors:
    """NVFP4 as ModelOpt writes it: two codes a byte, scales of 16 codes and of the matrix.

    The head stays in BF16.
    """
    config["quantization_config"] = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    result: Tensors = {}
    for name, (dtype, array) in tensors.items():
        if not name.endswith("_proj.weight") or name.startswith("mtp.") or "visual" in name:
            result[name] = (dtype, array)
            continue
        values = (array.astype(np.uint32) << 16).view(np.float32)
        groups = values.reshape(len(values), -1, 16)
        whole = np.float32(np.abs(values).max() / (6 * 448))
        scales = _codes(np.abs(groups).max(-1) / (6 * whole))
        parts = groups / np.maximum(E4M3[scales] * whole, 1e-12)[..., None]
        steps = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        nearest = np.searchsorted((steps[1:] + steps[:-1]) / 2, np.abs(parts)).astype(np.uint8)
        codes = (nearest | np.signbit(parts) * np.uint8(8)).reshape(len(values), -1, 2)
        module = name.removesuffix(".weight")
        result[name] = ("U8", np.asarray(codes[..., 0] | codes[..., 1] << 4, np.uint8))
        result[f"{module}.weight_scale"] = ("F8_E4M3", scales)
        result[f"{module}.weight_scale_2"] = ("F32", np.array(whole, "<f4"))
        result[f"{module}.input_scale"] = ("F32", np.array(0.02, "<f4"))
    return result


def _block_scales(values: np.ndarray) -> np.ndarray:
    """The largest value of each block of 128 x 128."""
    rows, columns = np.arange(0, values.shape[0], 128), np.arange(0, values.shape[1], 128)
    by_row = np.maximum.reduceat(np.abs(values), rows, 0)
    return np.asarray(np.maximum.reduceat(by_row, columns, 1))


def _quantized(
    tensors: Tensors,
    largest: Callable[[np.ndarray], np.ndarray],
    suffix: str,
    kind: str = "F32",
) -> Tensors:
    """The same with FP8 codes and scales in place of the projections of the text model.

    `largest` returns the largest values of the parts of a matrix that each have a scale.
    """
    result: Tensors = {}
    for name, (dtype, array) in tensors.items():
        if not name.removesuffix(".weight").endswith("_proj") or "visual" in name:
            result[name] = (dtype, array)
            continue
        values = (array.astype(np.uint32) << 16).view(np.float32)
        stored, scales = _stored(np.asarray(largest(values) / 448, np.float32), kind)
        result[name + suffix] = (kind, stored)
        if largest is _block_scales:
            scales = scales.repeat(128, 0).repeat(128, 1)[: values.shape[0], : values.shape[1]]
        scales = scales.reshape(*scales.shape, *(1,) * (values.ndim - scales.ndim))
        result[name] = ("F8_E4M3", _codes(values / scales))
    return result


def _stored(scales: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Scales as a safetensors type stores them, and their values."""
    if kind == "F8_E8M0":
        powers = np.ceil(np.log2(scales))
        return (powers + 127).astype(np.uint8), np.exp2(powers).astype(np.float32)
    if kind == "BF16":
        bits = scales.view(np.uint32) >> 16
        return bits.astype("<u2"), (bits << 16).view(np.float32)
    return scales, scales


def _codes(values: np.ndarray) -> np.ndarray:
    """The nearest codes of E4M3, without NaN."""
    middles = (E4M3[1:] + E4M3[:-1]) / 2
    nearest = np.searchsorted(middles, np.abs(values)).astype(np.uint8)
    return np.asarray(nearest | (np.signbit(values) * np.uint8(128)))


Layout = Callable[[dict[str, Any], Tensors], Tensors]

LAYOUTS: dict[str, tuple[str, Layout, int]] = {
    "moe-fused-head": ("tiny-qwen3.5-moe", fused_head, 3),
    "moe-separate-experts": ("tiny-qwen3.5-moe", separate_experts, 2),
    "moe-odd-experts": ("tiny-qwen3.5-moe", odd_experts, 2),
    "moe-text-only": (
        "tiny-qwen3.5-moe",
        lambda config, tensors: text_only(config, mixed_experts(config, tensors)),
        2,
    ),
    "dense-text-only": ("tiny-qwen3.5", text_only, 1),
    "dense-fp8": ("tiny-qwen3.5", eight_bit, 2),
    "moe-fp8": (
        "tiny-qwen3.5-moe",
        lambda config, tensors: eight_bit(config, separate_experts(config, tensors)),
        2,
    ),
    "dense-fp8-rows": ("tiny-qwen3.5", eight_bit_rows, 2),
    "dense-fp8-whole": ("tiny-qwen3.5", eight_bit_whole, 2),
    "dense-fp8-static": ("tiny-qwen3.5", eight_bit_static, 2),
    "moe-fp8-experts": ("tiny-qwen3.5-moe", eight_bit_experts, 2),
    "dense-wide-types": ("tiny-qwen3.5", wide_types, 2),
    "dense-as-tools-save": ("tiny-qwen3.5", as_tools_save, 2),
}
"""Name of a derived checkpoint -> (embedded checkpoint, layout, number of shards)."""


def end_with_eos(folder: Path) -> None:
    """A post-processor that adds EOS although config denies it, as in embedding models."""
    path = folder / "tokenizer.json"
    tokenizer, eos = (
        json.loads(path.read_text()),
        json.loads((folder / "tokenizer_config.json").read_text())["eos_token"],
    )
    (token,) = (token["id"] for token in tokenizer["added_tokens"] if token["content"] == eos)
    first, last = (
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": eos, "type_id": 0}},
    )
    template = {
        "type": "TemplateProcessing", "single": [first, last], "pair": [first, last,
        {"Sequence": {"id": "B", "type_id": 1}}, last],
        "special_tokens": {eos: {"id": eos, "ids": [token], "tokens": [eos]}},
    }  # fmt: skip
    tokenizer["post_processor"] = {
        "type": "Sequence",
        "processors": [tokenizer["post_processor"], template],
    }
    path.write_text(json.dumps(tokenizer))


def _change_tokenizer_config(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    change(settings)
    path.write_text(json.dumps(settings))


def add_tokens(folder: Path) -> None:
    """Tokens only in `tokenizer_config.json`, like the seven audio tokens of real Qwen3.5."""

    def token(content: str, special: bool, normalized: bool = False) -> dict[str, Any]:
        flags = dict.fromkeys(("lstrip", "rstrip", "single_word"), False)
        return {"content": content, "special": special, "normalized": normalized, **flags}

    def change(settings: dict[str, Any]) -> None:
        settings["added_tokens_decoder"] |= {
            "1268": token("<|audio_start|>", True),
            "1269": token("<tts_pad>", False),
            "1270": token("Ａudio\u2581text", False, normalized=False),
            "1264": token("<tool_call>", True),
        }
        settings["additional_special_tokens"] += ["<think>", "<brand new>"]
        settings["extra_special_tokens"] = {"audio_token": "<|audio_pad|>", "im_end": "<|im_end|>"}

    _change_tokenizer_config(folder, change)


def add_tokens_as_older_transformers(folder: Path) -> None:
    """The same tokens in `added_tokens.json` and `special_tokens_map.json` instead."""
    _change_tokenizer_config(folder, lambda settings: settings.pop("added_tokens_decoder"))
    (folder / "added_tokens.json").write_text(json.dumps({"<|audio_end|>": 1270, "<more>": 1269}))
    flags = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    roles = {
        "eos_token": {"content": "<|im_end|>", **flags},
        "additional_special_tokens": ["<think>", {"content": "<more>", **flags}],
    }
    (folder / "special_tokens_map.json").write_text(json.dumps(roles))


def name_templates(folder: Path) -> None:
    """Two named chat templates; upstream keeps one as the default."""
    named = {"default": "{{ 'default' }}", "tool-use": "{{ 'tools' }}"}
    entries = [{"name": name, "template": text} for name, text in named.items()]
    _change_tokenizer_config(folder, lambda settings: settings.update(chat_template=entries))


def add_templates(folder: Path) -> None:
    """A chat template in its own file, and another in a folder, as newer transformers saves."""
    _change_tokenizer_config(folder, lambda settings: settings.pop("chat_template"))
    (folder / "chat_template.jinja").write_text("{{ 'default' }}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool-use.jinja").write_text("{{ 'tools' }}")


FOLDERS: dict[str, Callable[[Path], None]] = {
    "dense-eos": end_with_eos,
    "dense-added-tokens": add_tokens,
    "dense-added-tokens-older": add_tokens_as_older_transformers,
    "dense-named-templates": name_templates,
    "dense-additional-templates": add_templates,
}
"""Name of a copy of the dense checkpoint -> the function that changes its folder."""


def write_layout(name: str, parent: Path) -> Path:
    """Return a checkpoint's folder: an embedded one, or a layout written below `parent`."""
    if name == "qwen3-next":
        return write_checkpoint(
            parent / name, CHECKPOINTS / "tiny-qwen3.5", *qwen3_next(), shards=2
        )
    if name == "qwen4-exp":
        return write_checkpoint(parent / name, CHECKPOINTS / "tiny-qwen3.5", *qwen4_exp(), shards=2)
    if name in FOLDERS:
        folder = Path(shutil.copytree(CHECKPOINTS / "tiny-qwen3.5", parent / name))
        FOLDERS[name](folder)
        return folder
    if name not in LAYOUTS:
        return CHECKPOINTS / name
    embedded, layout, shards = LAYOUTS[name]
    config = json.loads((CHECKPOINTS / embedded / "config.json").read_text())
    tensors = layout(config, read_tensors(CHECKPOINTS / embedded))
    return write_checkpoint(parent / name, CHECKPOINTS / embedded, config, tensors, shards)


ALL = ("tiny-qwen3.5", "tiny-qwen3.5-moe", *LAYOUTS, "qwen3-next", "qwen4-exp", *FOLDERS)


def fine_tune(folder: Path, noise: float = 0.15, model: str = "tiny-qwen3.5") -> Path:
    """A checkpoint whose trunk has moved by this share of each matrix, and whose head is lost."""
    config = json.loads((CHECKPOINTS / model / "config.json").read_text())
    rng = np.random.default_rng(0)
    moved: Tensors = {}
    for name, (dtype, array) in read_tensors(CHECKPOINTS / model).items():
        if dtype == "BF16" and array.ndim > 1 and "visual" not in name:
            values = (array.astype(np.uint32) << 16).view(np.float32)
            scale = noise * float(np.sqrt((values**2).mean()))
            values = values + scale * rng.standard_normal(values.shape, np.float32)
            array = (values.view(np.uint32) >> 16).astype("<u2")
        if not name.startswith("mtp."):
            moved[name] = (dtype, array)
    return write_checkpoint(folder, CHECKPOINTS / model, config, moved)


def head_alone(folder: Path, model: str = "tiny-qwen3.5") -> Path:
    """A checkpoint that has only its head."""
    config = json.loads((CHECKPOINTS / model / "config.json").read_text())
    tensors = read_tensors(CHECKPOINTS / model)
    head = {name: tensor for name, tensor in tensors.items() if name.startswith("mtp.")}
    return write_checkpoint(folder, CHECKPOINTS / model, config, head)
