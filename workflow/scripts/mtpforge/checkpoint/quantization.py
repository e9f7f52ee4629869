"""How a checkpoint says that its weights are quantized, for the messages that refuse it."""

from collections.abc import Mapping
from typing import Any

from mtpforge.io.text import member

MODELOPT = "hf_quant_config.json"
"""Settings of NVIDIA's ModelOpt, whose older versions leave them out of config.json."""

CODES = ("qweight", "weight_packed")
"""Endings of weights of which several, usually 8, are in an integer of 32 bits (I32)."""

_PLACES = ("quantization_config", "compression_config", "quantization")
_SHOWN = ("quant_method", "quant_algo", "format", "bits")


def with_modelopt(config: dict[str, Any], beside: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json with the settings of the ModelOpt file beside it, if it has none.

    Raises CheckpointError if either has settings that are malformed.
    """
    settings = member(beside, "quantization", dict, MODELOPT)
    if settings_in(config) or settings is None:
        return config
    whole = {**config, "quantization_config": {"quant_method": "modelopt", **settings}}
    _check(settings, MODELOPT)
    return whole


def describe(config: Mapping[str, Any]) -> str:
    """Return method, algorithm and bits as config.json has them; empty if not quantized."""
    settings = settings_in(config)
    shown = [f"{key} {str(settings[key])[:50]}" for key in _SHOWN if settings.get(key) is not None]
    if "group_size" in settings and not {"quant_method", "quant_algo"} & settings.keys():
        shown.insert(0, "by MLX")
    return ", ".join(shown) or ("quantization_config" if settings else "")


def settings_in(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of the quantization in config.json; empty if there are none.

    Raises CheckpointError if they are malformed.
    """
    text = member(config, "text_config", dict, "config.json") or {}
    found = [member(part, key, dict, "config.json") for part in (config, text) for key in _PLACES]
    settings = next(filter(None, found), {})
    _check(settings, "config.json: its quantization")
    return settings


def groups_in(settings: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    """Return the objects in an object of the settings: groups of layers, or single ones."""
    groups = member(settings, key, dict, "config.json: its quantization") or {}
    return [member(groups, name, dict, f"config.json: {key}") or {} for name in groups]


def _check(settings: Mapping[str, Any], place: str) -> None:
    """Raise CheckpointError if a setting that is read has another type than it should."""
    groups = groups_in(settings, "config_groups")
    for each in (settings, *groups, *groups_in(settings, "quantized_layers")):
        for key in ("quant_method", "quant_algo", "format"):
            member(each, key, str, place)
    for group in groups:
        member(group, "weights", dict, place)
