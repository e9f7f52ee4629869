"""The tensors of a checkpoint by the names in a family's tables.

Buffers are not among them: a model recomputes them. Names of wrapper classes are refused, because
nothing tells whether the wrapper changed more than the names.
"""

import re
from collections.abc import Iterable

from mtpforge.checkpoint import fp8, nvfp4
from mtpforge.checkpoint.checkpoint import Checkpoint, Outline
from mtpforge.checkpoint.families.family import Family
from mtpforge.checkpoint.safetensors import CheckpointTensor
from mtpforge.errors import CheckpointError
from mtpforge.io.text import member

EMBEDDINGS, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"

_WRAPPERS = {
    "module": "DDP or DeepSpeed",
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_flat_param": "FSDP",
    "_checkpoint_wrapped_module": "activation checkpointing",
    "base_model": "PEFT",
    "base_layer": "PEFT",
    "modules_to_save": "PEFT",
    "original_module": "PEFT",
    "lora_A": "PEFT",
    "lora_B": "PEFT",
}
"""Part of a tensor's name -> what adds it."""
_WRAPPED = re.compile(rf"(?<![^.])({'|'.join(_WRAPPERS)})(?![^.])")

_BUFFERS = {
    "inv_freq", "original_inv_freq", "cos_cached", "sin_cached", "cos_cache", "sin_cache",
    "freqs_cis", "masked_bias", "position_ids", "causal_mask", "attn_mask", "attention_mask",
    "total_ops", "total_params", "_extra_state",
}  # fmt: skip
"""Last parts of names: rotation, masks, positions, and counters of tools."""
_MASKS = ("self_attn.bias", "attention.bias", "attn.bias")


def canonical_names(checkpoint: Outline, family: Family) -> dict[str, CheckpointTensor]:
    """Return the text model's tensors by the names in the family's tables.

    Raises CheckpointError for names of wrapper classes, and for two names of one tensor.
    """
    check_wrappers(checkpoint.tensors.values())
    names: dict[str, CheckpointTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        if name.startswith(family.ignored) or name.endswith(family.constants) or is_buffer(tensor):
            continue
        canonical = family.canonical(name)
        if canonical in names:
            raise CheckpointError(
                f"{checkpoint.directory}: {name} and {names[canonical].name} are the same tensor"
            )
        names[canonical] = tensor
    if EMBEDDINGS not in names and OUTPUT in names and _ties(checkpoint):
        names[EMBEDDINGS] = names.pop(OUTPUT)  # safetensors' save_model keeps one of two names
    _check_prefix(names, family)
    return names


def is_buffer(tensor: CheckpointTensor) -> bool:
    """Whether a tensor is not a weight: rotation, mask or positions, or a scale of activations."""
    name = tensor.name
    if name.endswith(_MASKS):  # a weight of this name would be a vector
        return len(tensor.shape) > 1 or tensor.dtype in ("BOOL", "U8")
    return name.rpartition(".")[2] in _BUFFERS or name.endswith(fp8.UNUSED)


def left_out(checkpoint: Checkpoint, ignored: tuple[str, ...] = ()) -> list[str]:
    """Return a note on the files that are not read, and one on the buffers, if there are any.

    `ignored` are prefixes of tensors outside the text model.
    """
    written = fp8.UNUSED if nvfp4.is_nvfp4(checkpoint.config) else ()
    buffers = [
        tensor.name
        for tensor in checkpoint.tensors.values()
        if is_buffer(tensor)
        and not tensor.name.startswith(ignored)
        and not tensor.name.endswith(written)
    ]
    notes = []
    if checkpoint.beside:
        notes.append(f"left alone, as no part of the model: {_some(checkpoint.beside)}")
    if buffers:
        notes.append(f"skipped {len(buffers)} buffers, which are not weights: {_some(buffers)}")
    return notes


def check_wrappers(tensors: Iterable[CheckpointTensor]) -> None:
    """Raise CheckpointError if a tensor's name is that of a wrapper class or an adapter."""
    for tensor in tensors:
        if found := _WRAPPED.search(tensor.name):
            raise _wrapped(tensor, found[1], _WRAPPERS[found[1]])
        if tensor.name.startswith("model.model."):
            raise _wrapped(tensor, "model", "an unknown one")


def _some(names: list[str]) -> str:
    return ", ".join([*names[:3], *(["..."] if len(names) > 3 else [])])


def _ties(checkpoint: Outline) -> bool:
    """Whether config.json ties the embeddings at one level at least."""
    text = member(checkpoint.config, "text_config", dict, "config.json") or {}
    return True in (level.get("tie_word_embeddings") for level in (checkpoint.config, text))


def _check_prefix(names: dict[str, CheckpointTensor], family: Family) -> None:
    """Refuse an unknown prefix of all names, such as a doubled `model.`."""
    for known in (EMBEDDINGS, f"{family.head_prefix}fc.weight"):
        for name, tensor in names.items():
            if known not in names and name.endswith(f".{known}"):
                raise _wrapped(tensor, name.removesuffix(f".{known}"), "an unknown one")
    for name, tensor in names.items():
        in_head = name.startswith(family.head_prefix)
        if EMBEDDINGS not in names and name.endswith("embed_tokens.weight") and not in_head:
            raise CheckpointError(
                f"{tensor.shard}: {tensor.name} is not named as in the original model "
                "(model.language_model.embed_tokens.weight): rename all tensors as they are there"
            )


def _wrapped(tensor: CheckpointTensor, part: str, wrapper: str) -> CheckpointError:
    how = "merge the adapter" if wrapper == "PEFT" else "unwrap the model"
    return CheckpointError(
        f"{tensor.shard}: {tensor.name} has `{part}.` in its name, from a wrapper ({wrapper}): "
        f"{how} before saving, or rename all tensors as in the original model"
    )
