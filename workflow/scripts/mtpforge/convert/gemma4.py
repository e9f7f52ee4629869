"""Drafters of Gemma 4: checkpoints of their own, which read the keys and values of their target."""

import numpy as np

from mtpforge.checkpoint.checkpoint import Outline
from mtpforge.checkpoint.hparams import Hparams
from mtpforge.errors import CheckpointError
from mtpforge.io.text import member

FREQUENCIES = "rope_freqs.weight"
"""A tensor of the GGUF that upstream computes from config.json."""

_SHARED = ("vocab_size", "head_dim", "num_key_value_heads")
_LAST = ["sliding_attention", "full_attention"]
"""The layers whose keys a drafter reads: llama.cpp takes the last two of the target."""


def check_drafter(drafter: Outline) -> None:
    """Check that a drafter has both projections: upstream converts it without.

    Raises CheckpointError.
    """
    hparams = Hparams(drafter.config)
    own, target = hparams.count("hidden_size"), hparams.count("backbone_hidden_size")
    for name, shape in (("pre", (own, 2 * target)), ("post", (target, own))):
        full_name = f"{name}_projection.weight"
        found = drafter.tensors.get(full_name)
        if found is None:
            raise CheckpointError(f"no tensor {full_name}: is the checkpoint complete?")
        if found.shape != shape:
            raise CheckpointError(
                f"{found.shard}: {full_name} has shape {list(found.shape)}, but hidden_size and "
                f"backbone_hidden_size in config.json make it {list(shape)}"
            )
    frequencies(hparams)


def check_pair(target: Outline, drafter: Outline) -> None:
    """Check that a drafter can read its target's hidden state, keys and values.

    Raises CheckpointError, naming the value of config.json that differs.
    """
    ours, theirs = Hparams(target.config), Hparams(drafter.config)
    sizes = {("hidden_size", "backbone_hidden_size"), *((key, key) for key in _SHARED)}
    values = [(same, theirs.count(same), key, ours.count(key)) for key, same in sorted(sizes)]
    heads = "head size of full attention"
    values.append((heads, _full_head_size(theirs), heads, _full_head_size(ours)))
    for same, found, key, right in values:
        if found != right:
            raise CheckpointError(
                f"{drafter.directory}: is not a drafter for {target.directory}: its {same} is "
                f"{found}, the model's {key} is {right}"
            )
    kinds = ours.get("layer_types")
    if not isinstance(kinds, list) or kinds[-2:] != _LAST:
        raise CheckpointError(
            f"{target.directory}: llama.cpp drafts with the keys of the last two layers, which "
            f"must be {' and '.join(_LAST)} (layer_types in config.json)"
        )


def frequencies(hparams: Hparams) -> np.ndarray:
    """Return what upstream writes as `rope_freqs`: float32, 1e30 where nothing is rotated.

    Raises CheckpointError.
    """
    size = _full_head_size(hparams)
    kinds = member(hparams.values, "rope_parameters", dict, "config.json") or {}
    full = member(kinds, "full_attention", dict, "config.json: rope_parameters") or {}
    share = Hparams(full).number("partial_rotary_factor")
    if not 0 < share <= 1:
        raise CheckpointError(f"config.json: partial_rotary_factor must be up to 1, not {share}")
    rotated = int(size * share / 2)
    return np.array([1.0] * rotated + [1e30] * (size // 2 - rotated), dtype=np.float32)


def _full_head_size(hparams: Hparams) -> int:
    """Return the head size of full attention: a key of its own, or that of the first such layer."""
    layers = member(hparams.values, "per_layer_config", dict, "config.json")
    kinds = hparams.get("layer_types")
    if layers and isinstance(kinds, list) and not hparams.has("global_head_dim"):
        for number in [str(n) for n, kind in enumerate(kinds) if kind == _LAST[1]]:
            layer = member(layers, number, dict, "config.json: per_layer_config") or {}
            if "head_dim" in layer:
                return Hparams(layer).count("head_dim")
    return hparams.count("global_head_dim")
