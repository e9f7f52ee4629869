"""The vocabulary in which a family of architectures is described: rows of names, shapes and transforms.

A family says which tensors its GGUF has, from the configuration alone, and for each of them where its values come from in
a checkpoint. Conversion, inventory and verification all read these rows, so they cannot disagree.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType

from mtpforge.errors import CheckpointError

F32, BF16 = GGMLQuantizationType.F32, GGMLQuantizationType.BF16

View = Callable[[Sequence[np.ndarray]], list[np.ndarray]]
Change = Callable[[np.ndarray], np.ndarray]


class Hparams:
    """The text model's hyperparameters: `config.json`, with `text_config` laid over it."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        text = config.get("text_config", {})
        if not isinstance(text, dict):
            raise CheckpointError("config.json: text_config must be an object")
        self.values: dict[str, Any] = {**config, **text}

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it stands, or `default` where it is missing or null."""
        value = self.values.get(key)
        return default if value is None else value

    def count(self, key: str, default: int | None = None) -> int:
        """A positive integer below 2^31. Raises CheckpointError."""
        value = self.get(key, default)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise CheckpointError(f"config.json: {key} must be a positive integer, not {value!r}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A finite number. Raises CheckpointError."""
        value = self.get(key, default)
        if type(value) not in (int, float) or not abs(value) < 3e38:  # what a float32 holds
            raise CheckpointError(f"config.json: {key} must be a number, not {value!r}")
        return float(value)

    def flag(self, key: str) -> bool:
        """True or false, false where it is missing. Raises CheckpointError."""
        value = self.get(key, False)
        if type(value) is not bool:
            raise CheckpointError(f"config.json: {key} must be true or false, not {value!r}")
        return value


def unchanged(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The source as it is; of several sources (experts), each after the other."""
    return list(arrays)


def identity(values: np.ndarray) -> np.ndarray:
    """No change of values."""
    return values


@dataclass(frozen=True)
class Source:
    """One way in which a checkpoint may hold a row: tensor names, the shape of each, and how to look at them.

    `view` maps the arrays to views that, one after the other in C order, are the row's values; it must not compute.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    view: View = unchanged


@dataclass(frozen=True)
class Row:
    """One tensor of the GGUF: `shape` rows first, `sources` the layouts it may have, `change` its elementwise function."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    type: GGMLQuantizationType = BF16
    change: Change = field(default=identity)


@dataclass(frozen=True)
class Family:
    """A family: the architectures it serves and, as functions of the hyperparameters, its rows and its metadata."""

    gguf_architecture: str
    huggingface_architectures: tuple[str, ...]
    trunk: Callable[[Hparams], list[Row]]
    head: Callable[[Hparams], list[Row]]
    describe: Callable[[GGUFWriter, Hparams, int], None]
    """Writes the architecture's metadata; the last argument is the number of head blocks (0 or 1)."""
    ignored: tuple[str, ...] = ()
    """Prefixes of checkpoint tensors that a text model does not have (a vision tower)."""
    head_prefix: str = "mtp."
    declares_head: bool = True
    """Whether config.json says with `mtp_num_hidden_layers` that there is a head."""

    def canonical(self, name: str) -> str:
        """A checkpoint tensor's name as the tables have it, whatever wrapper class saved it."""
        return name.replace("language_model.", "").replace(f"model.{self.head_prefix}", self.head_prefix)

    def rows(self, hparams: Hparams, part: str) -> list[Row]:
        """The rows of part `all`, `trunk`, `head`, or `draft`: the head with what it shares with the trunk."""
        rows = self.trunk(hparams) if part != "head" else []
        if part == "draft":
            rows = [row for row in rows if not row.name.startswith("blk.")]
        return rows + (self.head(hparams) if part != "trunk" else [])
