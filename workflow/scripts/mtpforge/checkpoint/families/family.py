"""How a family of architectures is described: one row per GGUF tensor, with shape and transforms.

The rows follow from the configuration alone, and name each tensor's source in a checkpoint.
Conversion and verification read the same rows, so they cannot disagree.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType

from mtpforge.checkpoint.hparams import Hparams

F32, BF16 = GGMLQuantizationType.F32, GGMLQuantizationType.BF16

SHARED = ("token_embd.weight", "output_norm.weight", "output.weight")
"""The tensors outside the blocks that a head shares with the trunk."""

View = Callable[[Sequence[np.ndarray]], list[np.ndarray]]
Change = Callable[[np.ndarray], np.ndarray]


def unchanged(arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return the arrays as they are; several (experts) are stacked."""
    return list(arrays)


def identity(values: np.ndarray) -> np.ndarray:
    """Return the values unchanged."""
    return values


@dataclass(frozen=True)
class Source:
    """One layout in which a checkpoint may store a row: tensor names and the shape of each.

    `view` maps the arrays to views that, concatenated in C order, are the row's values. It must not
    compute anything.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    view: View = unchanged


@dataclass(frozen=True)
class Row:
    """One tensor of the GGUF: shape (rows first), possible layouts, and an elementwise function."""

    name: str
    shape: tuple[int, ...]
    sources: tuple[Source, ...]
    type: GGMLQuantizationType = BF16
    change: Change = field(default=identity)


@dataclass(frozen=True)
class Family:
    """Architectures with the same tensors; rows and metadata are functions of hyperparameters."""

    gguf_architecture: str
    huggingface_architectures: tuple[str, ...]
    trunk: Callable[[Hparams], list[Row]]
    head: Callable[[Hparams], list[Row]]
    describe: Callable[[GGUFWriter, Hparams, int], None]
    """Writes the architecture's metadata; the last argument is the number of head blocks."""
    ignored: tuple[str, ...] = ()
    """Prefixes of tensors outside the text model (a vision tower)."""
    head_prefix: str = "mtp."
    constants: tuple[str, ...] = ()
    """Endings of integer tensors that become metadata; they are hyperparameters of that name."""
    without_trunk: Mapping[str, Any] = field(default_factory=dict)
    """Hyperparameters of a file that has no trunk, in place of the checkpoint's."""

    def canonical(self, name: str) -> str:
        """Return a checkpoint tensor's name as in the rows, without prefixes of wrapper classes."""
        return name.replace("language_model.", "").replace(
            f"model.{self.head_prefix}", self.head_prefix
        )

    def rows(self, hparams: Hparams, part: str) -> list[Row]:
        """Return the rows of a part: all, trunk, head, draft (head and shared tensors), or shared.

        Head and trunk share embeddings, output norm and output matrix.
        """
        rows = self.trunk(hparams) if part != "head" else []
        if part in ("draft", "shared"):
            rows = [row for row in rows if row.name in SHARED]
        return rows + (self.head(hparams) if part not in ("trunk", "shared") else [])
