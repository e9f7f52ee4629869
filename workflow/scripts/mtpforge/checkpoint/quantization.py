"""How a checkpoint says that its weights are quantized, for the messages that refuse it."""

from collections.abc import Mapping
from typing import Any

MODELOPT = "hf_quant_config.json"
"""Settings of NVIDIA's ModelOpt, whose older versions leave them out of config.json."""

_SHOWN = ("quant_method", "quant_algo", "format", "bits")


def with_modelopt(config: dict[str, Any], beside: Mapping[str, Any]) -> dict[str, Any]:
    """Return config.json with the settings of the ModelOpt file beside it, if it has none."""
    settings = beside.get("quantization")
    if not isinstance(settings, dict) or settings_in(config):
        return config
    return {**config, "quantization_config": {"quant_method": "modelopt", **settings}}


def describe(config: Mapping[str, Any]) -> str:
    """Return method, algorithm and bits as config.json has them; empty if not quantized."""
    settings = settings_in(config)
    shown = [f"{key} {str(settings[key])[:50]}" for key in _SHOWN if settings.get(key) is not None]
    if "group_size" in settings and not {"quant_method", "quant_algo"} & settings.keys():
        shown.insert(0, "by MLX")
    return ", ".join(shown) or ("quantization_config" if settings else "")


def settings_in(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the settings of the quantization in config.json; empty if there are none."""
    text = config.get("text_config")
    for part in (config, text if isinstance(text, dict) else {}):
        for key in ("quantization_config", "compression_config", "quantization"):
            if isinstance(part.get(key), dict) and part[key]:
                return part[key]  # type: ignore[no-any-return]
    return {}
