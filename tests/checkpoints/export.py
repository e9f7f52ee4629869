"""Write a trained tiny model in the layout of a Qwen3.5 repository."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from model import TinyModel
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from vocabulary import save_tokenizer

# The last shard of the trunk also holds part of the head, as in real repositories. No shard exceeds
# 3.9 MB.
SHARD_BYTES = 3_300_000
# Real checkpoints mix types: some keep parameters that the recurrence is sensitive to in F32.
FLOAT32_IN_MOE = ("layers.0.linear_attn.A_log", "layers.0.linear_attn.norm.weight")


def stored_dtype(name: str, is_moe: bool) -> torch.dtype:
    return torch.float32 if is_moe and name.endswith(FLOAT32_IN_MOE) else torch.bfloat16


@torch.no_grad()
def round_weights(model: TinyModel) -> None:
    """Round every parameter to the value that its shard will hold, so that results match."""
    for name, parameter in model.named_parameters():
        parameter.copy_(parameter.to(stored_dtype(name, model.is_moe)).float())


def save_checkpoint(
    model: TinyModel,
    tokenizer: Tokenizer,
    config: dict[str, Any],
    reference: dict[str, Any],
    card: str,
    folder: Path,
) -> None:
    """Write every file of the repository to `folder`, and delete the shards of an earlier run."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("model-*.safetensors"):
        old.unlink()
    shards = _plan_shards(
        {name: t.to(stored_dtype(name, model.is_moe)).contiguous() for name, t in model.tensors()}
    )
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, str(folder / file), metadata={"format": "pt"})
        (folder / file).chmod(0o644)  # safetensors makes it private to its owner
        weight_map |= dict.fromkeys(shard, file)
    total = sum(_size(shard.values()) for shard in shards)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _dump(folder / "model.safetensors.index.json", index)
    _dump(folder / "config.json", config)
    end, pad = tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")
    _dump(
        folder / "generation_config.json",
        {
            "do_sample": False,
            "eos_token_id": [end, pad],
            "pad_token_id": pad,
            "transformers_version": config["transformers_version"],
        },
    )
    save_tokenizer(tokenizer, folder)
    _dump(folder / "reference.json", reference)
    # The same prompts as plain files, for programs that do not read reference.json.
    (folder / "prompts").mkdir(exist_ok=True)
    for kind, entry in reference["prompts"].items():
        (folder / "prompts" / f"{kind}.txt").write_text(entry["prompt"], encoding="utf-8")
    (folder / "README.md").write_text(card, encoding="utf-8")


def _plan_shards(tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """Shards of the trunk, then two of the head; the first of these also has the trunk's end."""
    head = {name: t for name, t in tensors.items() if name.startswith("mtp.")}
    tail = {
        name: t
        for name, t in tensors.items()
        if name in ("model.language_model.norm.weight", "lm_head.weight")
    }
    shards: list[dict[str, Tensor]] = [{}]
    body = {name: t for name, t in tensors.items() if name not in head and name not in tail}
    # At least two shards here, so at least four altogether.
    limit = min(SHARD_BYTES, _size(body.values()) // 2 + 300_000)
    for name, tensor in body.items():
        if _size(shards[-1].values()) + _size([tensor]) > limit:
            shards.append({})
        shards[-1][name] = tensor
    first = dict(tail)
    for name in list(head):
        if _size(first.values()) >= _size(head.values()):
            break
        first[name] = head.pop(name)
    return [*shards, first, head]


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _dump(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
