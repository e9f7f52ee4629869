"""The vocabulary in which a family of architectures is described: rows of names, shapes and transforms.

A family says which tensors its GGUF has, from the configuration alone, and for each of them where its values come from in
a checkpoint. Conversion, inventory and verification all read these rows, so they cannot disagree.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType

from mtpforge.checkpoint.hparams import Hparams

F32, BF16 = GGMLQuantizationType.F32, GGMLQuantizationType.BF16

View = Callable[[Sequence[np.ndarray]], list[np.ndarray]]
Change = Callable[[np.ndarray], np.ndarray]


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
        return name.replace("language_model.", "").replace(
            f"model.{self.head_prefix}", self.head_prefix
        )

    def rows(self, hparams: Hparams, part: str) -> list[Row]:
        """The rows of part `all`, `trunk`, `head`, or `draft`: the head with what it shares with the trunk."""
        rows = self.trunk(hparams) if part != "head" else []
        if part == "draft":
            rows = [row for row in rows if not row.name.startswith("blk.")]
        return rows + (self.head(hparams) if part != "trunk" else [])
