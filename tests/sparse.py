"""Checkpoints of real sizes: zeros in sparse files, which take no disk space."""

import json
import math
import struct
from pathlib import Path

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


def write_35b(folder: Path) -> int:
    """Write Qwen3.5-35B-A3B with zero weights, without its vision tower; return the head's bytes.

    The trunk's experts are fused, the head's are not; the head is in the last two of 14 shards.
    """
    config = {
        "architectures": ["Qwen3_5MoeForConditionalGeneration"], "vocab_size": 248320,
        "head_dim": 256, "num_hidden_layers": 40,
        "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 2,
        "num_experts": 256, "num_experts_per_tok": 8,
        "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
        "linear_conv_kernel_dim": 4,
        "full_attention_interval": 4, "mtp_num_hidden_layers": 1, "partial_rotary_factor": 0.25,
        "rope_theta": 1e7,
        "rms_norm_eps": 1e-6, "max_position_embeddings": 262144, "tie_word_embeddings": False,
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    family, hparams = family_of("Qwen3_5MoeForConditionalGeneration"), Hparams(config)

    def shapes(part: str, layout: int) -> dict[str, tuple[int, ...]]:
        sources = [
            row.sources[min(layout, len(row.sources) - 1)] for row in family.rows(hparams, part)
        ]
        return {
            name.replace("model.", "model.language_model."): s.shape
            for s in sources
            for name in s.names
        }

    trunk, head = shapes("trunk", 0), shapes("head", 1)
    last = {name: head.pop(name) for name in list(head)[len(head) // 2 :]} | {
        "lm_head.weight": trunk.pop("lm_head.weight")
    }
    shards: list[dict[str, tuple[int, ...]]] = [{} for _ in range(13)]
    before, total = 0, sum(math.prod(shape) for shape in (trunk | head).values())
    for name, shape in (trunk | head).items():
        shards[min(13 * before // (total - sum(math.prod(s) for s in head.values())), 12)][name] = (
            shape
        )
        before += math.prod(shape)
    weight_map = {}
    for i, members in enumerate([*shards, last]):
        name = f"model-{i + 1:05}-of-00014.safetensors"
        write_sparse_shard(folder / name, members)
        weight_map |= dict.fromkeys(members, name)
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return sum(2 * math.prod(shape) for shape in shapes("head", 1).values())
