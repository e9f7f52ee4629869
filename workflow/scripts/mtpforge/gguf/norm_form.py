"""In which form norms are stored: as w - 1, as w, or as w + 1, judged by their values.

Checkpoints of Qwen3-Next and Qwen3.5 store norms as w - 1, a GGUF stores w, and so does MLX. Heads
get lost in between: 1 is not added, or twice, and the file loads without a warning. Two kinds of
evidence are combined here.

Bits: the weights were BF16 before anything was added, and BF16 is finer near zero. So w in BF16 has
only multiples of 1/256, w in F32 less 1 fits into BF16 again, and w - 1 does neither.

Level: the mean of w - 1 of each kind of norm, in released models. Final norms differ too much.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mtpforge.gguf.reader import Gguf

ARCHITECTURES = ("qwen35", "qwen35moe", "qwen3next")
"""Architectures whose checkpoints store norms as w - 1."""

FINAL = (".nextn.shared_head_norm.weight", "output_norm.weight")
"""The last norms of head and trunk. Their mean of w - 1 is between 0.1 and 3.3, but released ones
have some values below 0, while w is positive."""

LEVELS = {
    ".attn_norm.weight": 0.1,
    ".post_attention_norm.weight": 0.1,
    ".attn_q_norm.weight": 0.35,
    ".attn_k_norm.weight": 0.35,
    ".nextn.enorm.weight": -0.4,
    ".nextn.hnorm.weight": -0.4,
}
"""Ending of the name in a GGUF -> usual mean of w - 1 (measured: -0.1 to 0.4 for block norms, -0.25
to 0.8 for queries and keys, -0.75 to -0.15 for the inputs of a head)."""

SHIFTS = {
    -1: "1 is not added to {}: the checkpoint stores w - 1",
    1: "1 is added twice to {}",
}
"""A wrong shift of a norm in a GGUF, and the sentence for it."""

SLACK = 0.8
"""How far the mean of a GGUF's norm may be from the usual one; wide, as only clear faults count."""

_MOST_VALUES = 1 << 20
"""Values of a norm that are read; no real one comes near it."""

FEW = 16
"""Different small values that are enough to tell a grid from chance."""


@dataclass(frozen=True)
class Norm:
    """A norm as it is stored, and the offsets from w - 1 that its values allow."""

    name: str
    """In the GGUF."""
    mean: float
    by_bits: frozenset[int]
    """Offsets that leave BF16 values; all of them if none does, as after training in F32."""
    by_level: frozenset[int]
    on_grid: bool
    """Whether small values have no more bits than w in BF16 has."""

    @property
    def offsets(self) -> frozenset[int]:
        """The offsets that both kinds of evidence allow; if none, those of the bits."""
        both = self.by_bits & self.by_level or self.by_bits
        return both - {0} if self.on_grid and 1 in both else both

    @property
    def is_contradictory(self) -> bool:
        """Whether the bits allow no offset that the level does, as in a norm trained as w."""
        return not self.by_bits & self.by_level

    @property
    def is_proven(self) -> bool:
        """Whether the bits tell the offset, and the level does not deny it."""
        alone = len(self.offsets) == 1 and self.offsets <= self.by_level
        is_negative = self.is_final and len(self.by_level) == 1
        told = len(self.by_bits) == 1 or (self.on_grid and 1 in self.offsets) or is_negative
        return alone and told

    @property
    def is_final(self) -> bool:
        """Whether it is the last norm of the trunk or of the head."""
        return self.name.endswith(FINAL)


def is_shifted(name: str) -> bool:
    """Whether a tensor of a GGUF is a norm that checkpoints store as w - 1."""
    return name.endswith((*LEVELS, *FINAL))


def shifts(opened: Gguf) -> dict[str, int]:
    """Return the shift of each norm of a GGUF: 1 or -1 if its values show that it is not w, else 0.

    Empty for architectures that do not store w - 1.
    """
    if opened.architecture not in ARCHITECTURES:
        return {}
    values = {name: _values(opened, name) for name in opened.tensors if is_shifted(name)}
    return {name: shift_of(name, found) for name, found in values.items() if found is not None}


def shift_of(name: str, values: np.ndarray) -> int:
    """Return 1 or -1 if a norm's values show that it is not w, else 0."""
    if not np.isfinite(values).all():  # another check's fault
        return 0
    norm = measure(name, values, SLACK)
    likely = norm.by_bits if norm.is_final else norm.by_bits & norm.by_level
    return 0 if 1 in likely or not likely else min(likely) - 1


def describe(wrong: Mapping[str, int]) -> str:
    """Return a sentence for each wrong shift; empty if there is none."""
    sentences = []
    for shift, text in SHIFTS.items():
        names = [name for name, each in wrong.items() if each == shift]
        if names:
            count = f"{len(names)} norms ({names[-1]}, ...)"
            sentences.append(text.format(count if len(names) > 1 else names[0]))
    return "; ".join(sentences)


def measure(name: str, values: np.ndarray, slack: float) -> Norm:
    """Judge the values of a norm (float32). `slack` is how far its mean may be from the usual."""
    flat = np.asarray(values, dtype=np.float32).reshape(-1)
    mean = float(flat.mean(dtype=np.float64))
    by_bits = frozenset(offset for offset in (0, 1, 2) if _fits_bf16(flat, offset))
    small = np.unique(flat[(np.abs(flat) < 0.5) & (flat != 0)])
    return Norm(
        name,
        mean,
        by_bits=by_bits or frozenset((0, 1, 2)),
        by_level=_by_level(name, mean, slack) - ({1, 2} if _is_negative(name, flat) else set()),
        on_grid=1 in by_bits and len(small) >= FEW and _level(name) is not None,
    )


def _values(opened: Gguf, name: str) -> np.ndarray | None:
    """The values of an unquantized tensor, as float32; None for other types and huge tensors."""
    place = opened.ranges[name]
    kind = opened.tensors[name].type.name
    stored = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}.get(kind)
    if stored is None or opened.tensors[name].elements > _MOST_VALUES:
        return None
    count = place.size // np.dtype(stored).itemsize
    values = np.fromfile(place.path, stored, count, offset=place.offset)
    if kind == "BF16":
        return (values.astype(np.uint32) << 16).view(np.float32)
    return values.astype(np.float32)


def _is_negative(name: str, values: np.ndarray) -> bool:
    return name.endswith(FINAL) and bool((values < 0).any())


def _level(name: str) -> float | None:
    """The usual mean of a kind of norm; None if it tells nothing."""
    return next((level for ending, level in LEVELS.items() if name.endswith(ending)), None)


def _by_level(name: str, mean: float, slack: float) -> frozenset[int]:
    level = _level(name)
    if level is None:
        return frozenset((0, 1, 2))
    above = min(max(mean - level, 0), 2)
    likely = {offset for offset in (1, 2) if abs(above - offset) <= slack}
    return frozenset(likely | {0} if above <= 0.5 else likely)


def _fits_bf16(values: np.ndarray, offset: int) -> bool:
    """Whether all values less `offset` are exact in BF16."""
    exact = values.astype(np.float64) - offset
    narrow = exact.astype(np.float32)
    return bool((narrow == exact).all() and not (narrow.view(np.uint32) & 0xFFFF).any())
