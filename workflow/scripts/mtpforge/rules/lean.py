"""Which fetched shards a build with `lean` frees as they are converted.

A shard can be freed if one conversion reads all of it, and others only the head.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from mtpforge.rules import layout
from mtpforge.rules.config import Config, Model
from mtpforge.rules.variant import HubRepository, OwnBase


@dataclass(frozen=True)
class Freed:
    """The conversion that frees the shards, and the parts for which it leaves what they need."""

    part: str
    others: tuple[str, ...] = ()


def freed(config: Config, model: Model) -> Freed | None:
    """What frees a model's shards; None if nothing does: see `why_not`."""
    if not isinstance(model.source, HubRepository) or why_not(config, model):
        return None
    parts = _parts(model)
    part = "all" if "all" in parts else "trunk"
    return Freed(part, tuple(sorted(parts - {part})))


def why_not(config: Config, model: Model) -> str:
    """Why a model's shards stay; empty if they are freed."""
    if not (isinstance(model.source, HubRepository) and model.uses_source) or model.head_only:
        return "no whole checkpoint is fetched for it"
    if model.needs_upstream:
        return "llama.cpp's converter reads its shards"
    if any(each.foreign and not model.adopts(each) for each in model.variants.values()):
        return "a base from elsewhere is compared with all of its checkpoint"
    if {"all", "trunk"} <= _parts(model):
        return "it is converted twice, with and without the head"
    sharing = [other.key for other in config.models.values() if other is not model]
    sharing = [key for key in sharing if _reads(config.models[key], model.source)]
    return f"{sharing[0]} is made from the same checkpoint" if sharing else ""


def _reads(model: Model, source: HubRepository) -> bool:
    """Whether a model is made from a commit, more than a head that is fetched on its own."""
    return any(
        isinstance(each, HubRepository)
        and layout.commit(each) == layout.commit(source)
        and conversion != "mtpforge:head"
        for each, conversion in model.conversions()
    )


def _parts(model: Model) -> set[str]:
    return set(_converted(model))


def _converted(model: Model) -> Iterator[str]:
    """The parts that are converted of a model's own checkpoint."""
    for variant in model.variants.values():
        if isinstance(variant.base, OwnBase):
            yield from ("trunk",) if model.donor(variant) else ("trunk", "head")
        elif not variant.foreign:
            yield variant.part
        own = variant.head_types and not (variant.foreign or variant.head_from)
        if own and not variant.unquantized and model.max_acceptance_drop < 1:
            yield "all"  # whose acceptance is compared
    if model.sidecar:
        yield from ("all", "draft")
    if model.measure and model.measure.text:
        yield model.part
