"""Hyperparameters of a checkpoint, read strictly from its config.json."""

from collections.abc import Mapping
from typing import Any

from mtpforge.errors import CheckpointError
from mtpforge.io.text import member


class Hparams:
    """The text model's hyperparameters: `config.json` updated with its `text_config`."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        text = config.get("text_config", {})
        if not isinstance(text, dict):
            raise CheckpointError("config.json: text_config must be an object")
        self.values: dict[str, Any] = {**config, **text}
        kinds = member(self.values, "layers_block_type", list, "config.json")
        if kinds is not None and self.get("num_hidden_layers") is None:
            self.values["num_hidden_layers"] = len(kinds)  # Nemotron-H gives one or the other

    def get(self, key: str, default: Any = None) -> Any:
        """Return the raw value, or `default` if it is missing or null."""
        value = self.values.get(key)
        return default if value is None else value

    def count(self, key: str, default: int | None = None) -> int:
        """Return a positive integer below 2^31. Raises CheckpointError."""
        value = self.get(key, default)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise CheckpointError(f"config.json: {key} must be a positive integer, not {value!r}")
        return value

    def has(self, key: str) -> bool:
        """Whether a count is given; null and 0 mean that it is not. Raises CheckpointError."""
        value = self.get(key, 0)
        return not (type(value) is int and value == 0) and self.count(key) > 0

    def number(self, key: str, default: float | None = None) -> float:
        """Return a finite number. Raises CheckpointError."""
        value = self.get(key, default)
        if type(value) not in (int, float) or not abs(value) < 3e38:  # fits into a float32
            raise CheckpointError(f"config.json: {key} must be a number, not {value!r}")
        return float(value)

    def fraction(self, key: str) -> float:
        """Return a number between 0 and 1, both excluded. Raises CheckpointError."""
        value = self.number(key)
        if not 0 < value < 1:
            raise CheckpointError(f"config.json: {key} must be between 0 and 1, not {value!r}")
        return value

    def flag(self, key: str) -> bool:
        """Return a boolean, False if it is missing. Raises CheckpointError."""
        value = self.get(key, False)
        if type(value) is not bool:
            raise CheckpointError(f"config.json: {key} must be true or false, not {value!r}")
        return value
