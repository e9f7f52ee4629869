"""Finds the norms that a checkpoint stores as w already, and leaves the 1 off them.

MLX stores w, its tools convert all or some of the norms of a head, and people merge heads into
other checkpoints. So each norm is judged by its own values, and by those of the others where they
do not tell. A norm in doubt is an error: in the wrong form it loads, and drafts nothing.
"""

import argparse
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace

import numpy as np

from mtpforge.checkpoint.checkpoint import Checkpoint
from mtpforge.checkpoint.families.family import Family
from mtpforge.checkpoint.families.qwen3_5 import plus_one
from mtpforge.checkpoint.families.registry import family_of
from mtpforge.checkpoint.hparams import Hparams
from mtpforge.convert import plan, values
from mtpforge.convert.plan import ConvertedTensor
from mtpforge.convert.tensor_names import canonical_names
from mtpforge.errors import CheckpointError
from mtpforge.gguf.norm_form import Norm, measure

FORMS = {"w-1": 0, "w": 1}
"""The forms that a norm in doubt can be said to have, and their offsets from w - 1."""
SLACK = 0.65
"""How far the mean of a norm may be from the usual one."""
MANY = 16
"""Norms that agree, so that one with another level is an exception: a head has fewer."""
ODD, USUAL = 1.65, (0.85, 1.15)
"""The final norms of trunk and head are compared: one that is larger by the factor `ODD` as w - 1,
and about equal as w, is in doubt."""


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add --norms."""
    parser.add_argument(
        "--norms", choices=FORMS,
        help="how the checkpoint stores norms whose values do not tell it (default: an error)",
    )  # fmt: skip


def plan_by_values(checkpoint: Checkpoint, part: str) -> list[ConvertedTensor]:
    """Plan the conversion of a part, without the +1 for norms that are stored as w.

    Raises CheckpointError, also if a norm is stored as w + 1, or is in doubt and the checkpoint
    was not opened with a form for those.
    """
    family = family_of(checkpoint.architecture)
    hparams = plan.settled_hparams(checkpoint, family)
    planned = plan.plan_conversion(checkpoint, family, hparams=hparams, part=part)
    own = {item.row.name: item for item in planned if item.row.change is plus_one}
    items = own | _others(checkpoint, family, hparams=hparams, own=own)
    norms = {name: measure(name, _stored(checkpoint, item), SLACK) for name, item in items.items()}
    head = {n for n, item in items.items() if item.source.names[0].startswith(family.head_prefix)}
    judged = judge(norms, head)
    form = FORMS.get(checkpoint.norms or "")
    offsets = {name: form if judged[name] is None else judged[name] for name in own}
    _check(checkpoint, {own[name].tensors[0].name: (norms[name], offsets[name]) for name in own})
    return [_as_stored(item) if offsets.get(item.row.name) == 1 else item for item in planned]


def note(planned: Iterable[ConvertedTensor]) -> str:
    """Say which norms of a plan are stored as w; empty if none is."""
    norms = [item.row for item in planned if item.row.change in (plus_one, stored_as_w)]
    names = [row.name for row in norms if row.change is stored_as_w]
    if not names:
        return ""
    some = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
    return f"{len(names)} of {len(norms)} norms ({some}) were stored as w, not w - 1"


def stored_as_w(stored: np.ndarray) -> np.ndarray:
    """Return the values of a norm that is stored as w."""
    return stored


def judge(norms: Mapping[str, Norm], head: Collection[str]) -> dict[str, int | None]:
    """Return the offset of each norm from w - 1; None if it is in doubt.

    A norm whose bits do not prove its form needs the agreement of the others in head or trunk.
    """
    sides = [[n for n in norms.values() if (n.name in head) is side] for side in (True, False)]
    judged: dict[str, int | None] = {}
    for own, other in (sides, reversed(sides)):
        judged |= _judge_side(own, other)
    doubtful = {name for name, norm in norms.items() if _is_odd(norm, norms, judged)}
    return {name: None if name in doubtful else offset for name, offset in judged.items()}


def _judge_side(own: list[Norm], other: list[Norm]) -> dict[str, int | None]:
    """Judge the norms of the head by each other, or else by the trunk's, or the reverse."""
    votes = _votes(own) or _votes(other)
    firm = _votes(norm for norm in own if not norm.is_contradictory)
    judged = {norm.name: _offset(norm, votes, firm) for norm in own}
    if any(judged[norm.name] is None and norm.is_contradictory for norm in own):
        # They may have been trained as w: then bits that look like w - 1 prove nothing.
        judged |= {norm.name: None for norm in own if len(norm.by_level) > 1}
    return judged


def _votes(norms: Iterable[Norm]) -> Counter[int]:
    return Counter(offset for n in norms if len(n.offsets) == 1 for offset in n.offsets)


def _offset(norm: Norm, votes: Counter[int], firm: Counter[int]) -> int | None:
    """Return a norm's offset, given those of the others; `firm` are not against their level."""
    usual = _usual(firm)
    if not norm.is_proven and usual in norm.by_bits:
        return usual
    if len(norm.offsets) == 1:
        (offset,) = norm.offsets
        return offset if norm.is_proven or 2 * firm[offset] > votes.total() else None
    agreed = norm.offsets & votes.keys()
    return next(iter(agreed)) if len(votes) == 1 and agreed else None


def _usual(firm: Counter[int]) -> int | None:
    """Return the offset of nearly all norms of a trunk; None if they are few, or differ."""
    ((offset, count),) = firm.most_common(1) or [(0, 0)]
    return offset if count >= MANY and 16 * count >= 15 * firm.total() else None


def _is_odd(norm: Norm, norms: Mapping[str, Norm], judged: Mapping[str, int | None]) -> bool:
    """Whether a final norm that is judged by the others looks like w beside the other final one."""
    if not norm.is_final or norm.is_proven or judged[norm.name] != 0:
        return False
    others = [n for n in norms.values() if n.is_final and n.is_proven]
    means = [n.mean + 1 - offset for n in others for offset in n.offsets]  # of w
    least, most = USUAL
    return any(
        norm.mean + 1 > ODD * mean and least * mean < norm.mean < most * mean for mean in means
    )


def _others(
    checkpoint: Checkpoint, family: Family, hparams: Hparams, own: Collection[str]
) -> dict[str, ConvertedTensor]:
    """Return the checkpoint's norms that are not converted, as far as it has them."""
    names = canonical_names(checkpoint, family)
    try:
        rows = family.rows(hparams, "all")
    except CheckpointError:  # a trunk that is not converted may be of any kind
        return {}
    return {
        row.name: ConvertedTensor(row, source, (tensor,))
        for row in rows
        for source in row.sources
        if row.change is plus_one and row.name not in own
        for tensor in [names.get(source.names[0])]
        if tensor and tensor.shape == source.shape and tensor.dtype in ("BF16", "F16", "F32")
    }


def _stored(checkpoint: Checkpoint, item: ConvertedTensor) -> np.ndarray:
    return np.concatenate(list(values.values(checkpoint, _as_stored(item))))


def _as_stored(item: ConvertedTensor) -> ConvertedTensor:
    return replace(item, row=replace(item.row, change=stored_as_w))


def _check(checkpoint: Checkpoint, found: Mapping[str, tuple[Norm, int | None]]) -> None:
    twice = [
        name
        for name, (norm, offset) in found.items()
        if offset == 2 or (offset is None and norm.offsets == {2})
    ]
    if twice:
        raise CheckpointError(
            f"{checkpoint.directory}: norms are stored as w + 1 ({len(twice)}: {twice[0]}, ...): "
            "a converter added 1 twice: use the original checkpoint"
        )
    doubtful = [(name, norm) for name, (norm, offset) in found.items() if offset is None]
    if doubtful:
        name, norm = doubtful[0]
        others = f" and {len(doubtful) - 1} more" if len(doubtful) > 1 else ""
        raise CheckpointError(
            f"{checkpoint.directory}: the values of {name}{others} do not tell if it is stored "
            f"as w - 1 (then w has a mean of {norm.mean + 1:.2f}) or as w, as MLX does "
            f"({norm.mean:.2f}): use the original checkpoint, or say which (norms in config.yaml, "
            "or --norms)"
        )
