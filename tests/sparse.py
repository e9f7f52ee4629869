"""Checkpoints of real sizes: zeros in sparse files, which take no disk space."""

import json
import math
import struct
from pathlib import Path
from typing import Any

from mtpforge.checkpoint.families.registry import family_of
from mtpforge.checkpoint.hparams import Hparams


def write_sparse_shard(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """Write a sparse safetensors file of BF16 zeros."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        header[name] = {
            "dtype": "BF16",
            "shape": list(shape),
            "data_offsets": [offset, offset := offset + 2 * math.prod(shape)],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)


_COMMON = {
    "architectures": ["Qwen3_5MoeForConditionalGeneration"], "vocab_size": 248320, "head_dim": 256,
    "num_key_value_heads": 2, "linear_num_key_heads": 16, "linear_key_head_dim": 128,
    "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "full_attention_interval": 4,
    "mtp_num_hidden_layers": 1, "partial_rotary_factor": 0.25, "rope_theta": 1e7,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 262144, "tie_word_embeddings": False,
}  # fmt: skip


def write_35b(folder: Path) -> int:
    """Write Qwen3.5-35B-A3B with zero weights, without its vision tower; return the head's bytes.

    The trunk's experts are fused, the head's are not; the head is in the last two of 14 shards.
    """
    config = {
        "num_hidden_layers": 40, "hidden_size": 2048, "num_attention_heads": 16,
        "num_experts": 256, "num_experts_per_tok": 8, "moe_intermediate_size": 512,
        "shared_expert_intermediate_size": 512, "linear_num_value_heads": 32,
    }  # fmt: skip
    return _write(folder, _COMMON | config, count=14)


def write_397b(folder: Path) -> int:
    """Write Qwen3.5-397B-A17B in the same way, in 94 shards: 806 GB, of which none is stored."""
    config = {
        "num_hidden_layers": 60, "hidden_size": 4096, "num_attention_heads": 32,
        "num_experts": 512, "num_experts_per_tok": 10, "moe_intermediate_size": 1024,
        "shared_expert_intermediate_size": 1024, "linear_num_value_heads": 64,
    }  # fmt: skip
    return _write(folder, _COMMON | config, count=94)


def _write(folder: Path, config: dict[str, Any], count: int) -> int:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    trunk, head = _shapes(config, "trunk"), _shapes(config, "head")
    size = sum(2 * math.prod(shape) for shape in head.values())
    last = {name: head.pop(name) for name in list(head)[len(head) // 2 :]}
    last["lm_head.weight"] = trunk.pop("lm_head.weight")
    shards: list[dict[str, tuple[int, ...]]] = [{} for _ in range(count - 1)]
    before, total = 0, sum(math.prod(shape) for shape in trunk.values())
    for name, shape in (trunk | head).items():
        place = min((count - 1) * before // total, count - 2)
        shards[place][name] = shape
        before += math.prod(shape)
    weight_map: dict[str, str] = {}
    for number, members in enumerate([*shards, last], 1):
        file = f"model-{number:05}-of-{count:05}.safetensors"
        write_sparse_shard(folder / file, members)
        weight_map |= dict.fromkeys(members, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


def _shapes(config: dict[str, Any], part: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a checkpoint: fused experts in the trunk, single ones in the head."""
    found: dict[str, tuple[int, ...]] = {}
    for row in family_of(config["architectures"][0]).rows(Hparams(config), part):
        source = row.sources[0]
        if part == "head" and len(row.sources) > 1:
            source = row.sources[1]
        for name in source.names:
            found[name.replace("model.", "model.language_model.")] = source.shape
    return found
