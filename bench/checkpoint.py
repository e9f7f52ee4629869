"""Checkpoints of real size with random weights, in the layout of the real repositories.

Names and shapes come from the family's table, and the vocabulary has the real 248,320 rows. The
weights repeat one block of random BF16 values, because only their size matters for a benchmark.
"""

import json
import math
import struct
from pathlib import Path
from typing import Any

import numpy as np
from mtpforge.checkpoint.families.family import Source
from mtpforge.checkpoint.families.registry import family_of
from mtpforge.checkpoint.fp8 import scale_shape
from mtpforge.checkpoint.hparams import Hparams
from mtpforge.checkpoint.safetensors import DTYPES

VOCABULARY = 248_320
SHARD_BYTES = 4_000_000_000
BLOCK = 1 << 25  # values

# The shapes of the real models (their config.json); the experts with two of forty layers.
QWEN3_5_2B = {
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "num_hidden_layers": 24,
    "full_attention_interval": 4,
    "head_dim": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": True,
    "mtp_num_hidden_layers": 1,
    "max_position_embeddings": 262144,
    "rms_norm_eps": 1e-6,
    "partial_rotary_factor": 0.25,
    "rope_parameters": {"rope_theta": 10000000, "mrope_section": [11, 11, 10]},
}
QWEN3_5_35B_A3B = {
    **QWEN3_5_2B,
    "num_hidden_layers": 2,
    "full_attention_interval": 2,
    "num_attention_heads": 16,
    "linear_num_value_heads": 32,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
}
del QWEN3_5_35B_A3B["intermediate_size"]


def write_checkpoint(folder: Path, settings: dict[str, Any], eight_bit: bool = False) -> Path:
    """Write a checkpoint with these hyperparameters, in FP8 if asked; an existing one is kept."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    architecture = f"Qwen3_5{'Moe' if 'num_experts' in settings else ''}ForConditionalGeneration"
    _write_tokenizer(folder)
    _write_shards(folder, _sources(architecture, settings, eight_bit))
    config = {"architectures": [architecture], "model_type": "qwen3_5", "text_config": settings}
    if eight_bit:
        config["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "weight_block_size": [128, 128],
        }
    (folder / "config.json").write_text(json.dumps(config))  # last: it marks the rest as complete
    return folder


Stored = tuple[str, tuple[int, ...]]
"""A type by its name in safetensors, and a shape."""


def _sources(architecture: str, settings: dict[str, Any], eight_bit: bool) -> dict[str, Stored]:
    """How each tensor is stored; as in real checkpoints, experts are fused in the trunk only.

    Of a head's experts, the way with the most tensors is the one without any fusing.
    """
    stored: dict[str, Stored] = {}
    for row in family_of(architecture).rows(Hparams(settings), "all"):
        source: Source = row.sources[0]
        if source.names[0].startswith("mtp."):
            source = max(row.sources, key=lambda way: len(way.names))
        for name in source.names:
            name = name.replace("model.", "model.language_model.", 1)
            if eight_bit and "_proj" in name:
                stored[name] = "F8_E4M3", source.shape
                stored[name + "_scale_inv"] = "BF16", scale_shape(source.shape, (128, 128))
            else:
                stored[name] = "BF16", source.shape
    return stored


def _size(stored: Stored) -> int:
    return DTYPES[stored[0]].itemsize * math.prod(stored[1])


def _write_shards(folder: Path, tensors: dict[str, Stored]) -> None:
    shards: list[dict[str, Stored]] = [{}]
    for name, stored in tensors.items():
        if sum(map(_size, shards[-1].values())) + _size(stored) > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = stored
    rng = np.random.default_rng(0)
    block = (rng.standard_normal(BLOCK, np.float32) * np.float32(0.02)).view(np.uint32) >> 16
    raw = (block.astype("<u2") & np.uint16(0xF7F7)).tobytes()  # no byte is NaN as FP8
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        name = f"model-{i:05}-of-{len(shards):05}.safetensors"
        _write_shard(folder / name, shard, raw)
        weight_map |= dict.fromkeys(shard, name)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def _write_shard(path: Path, tensors: dict[str, Stored], raw: bytes) -> None:
    header: dict[str, Any] = {}
    offset = 0
    for name, stored in tensors.items():
        end = offset + _size(stored)
        header[name] = {"dtype": stored[0], "shape": stored[1], "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        while offset:
            offset -= file.write(raw[:offset])


def _write_tokenizer(folder: Path) -> None:
    """Write a byte-level BPE tokenizer with the real numbers of tokens and merges."""
    vocabulary, merges = _tokens()
    tokenizer = _tokenizer(vocabulary, merges)
    text = json.dumps(tokenizer, ensure_ascii=False)
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    settings = {
        "tokenizer_class": "Qwen2Tokenizer",
        "eos_token": "<|special_0|>",
        "add_bos_token": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def _tokens() -> tuple[dict[str, int], list[list[str]]]:
    """The vocabulary without special tokens, and its merges."""
    letters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))]
    letters += [chr(256 + i) for i in range(256 - len(letters))]
    vocabulary = dict(zip(letters, range(256), strict=True))
    merges: list[list[str]] = []
    level = letters
    while len(vocabulary) < VOCABULARY - 276:
        longer = []
        for left in level:
            for right in letters:
                if len(vocabulary) == VOCABULARY - 276:
                    break
                vocabulary[left + right] = len(vocabulary)
                merges.append([left, right])
                longer.append(left + right)
        level = longer
    return vocabulary, merges


def _tokenizer(vocabulary: dict[str, int], merges: list[list[str]]) -> dict[str, Any]:
    """The contents of tokenizer.json."""
    added = [
        {
            "id": len(vocabulary) + i,
            "content": f"<|special_{i}|>",
            "special": True,
            "normalized": False,
            "lstrip": False,
            "rstrip": False,
            "single_word": False,
        }
        for i in range(26)
    ]
    pattern = (
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    byte_level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": merges,
        },
    }
