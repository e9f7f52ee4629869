"""Which fetched shards a build with `lean` frees as they are converted.

A shard can be freed if one conversion reads all of it, and others only the head. `lean: shards`
builds a model shard by shard if only its quants are made of its BF16 file, which is never whole on
the disk then.
"""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtpforge.io import holes, storage
from mtpforge.rules import layout
from mtpforge.rules.config import SHARDS, Config, Model
from mtpforge.rules.variant import HubRepository, ImatrixText, OwnBase


@dataclass(frozen=True)
class Freed:
    """The conversion that frees the shards, and the parts for which it leaves what they need."""

    part: str
    others: tuple[str, ...] = ()


def take_from_profile(config: dict[str, Any], workflow: Any) -> None:
    """Set `lean` as profiles/lean and profiles/shards do, unless the command line sets it.

    They do with a resource: any `--config` replaces all that a profile sets with `config`.
    """
    asked = by_profile(workflow, "convert", "lean")
    if asked and "lean" not in workflow.config_settings.overwrite_config:
        config["lean"] = asked


def by_profile(workflow: Any, rule: str, resource: str) -> str:
    """A resource as a profile's `set-resources` sets it; empty if it does not."""
    found = workflow.resource_settings.overwrite_resources.get(rule, {}).get(resource)
    return str(found.raw).strip("'") if found else ""


def freed(config: Config, model: Model) -> Freed | None:
    """What frees a model's shards; None if nothing does: see `why_not`."""
    if not isinstance(model.source, HubRepository) or why_not(config, model):
        return None
    part = whole_part(model)
    return Freed(part, tuple(sorted(_parts(model) - {part})))


def why_not_here() -> str:
    """Why this disk has to hold shards and BF16 file whole; empty if it need not."""
    hub, results = (storage.existing(Path(name)) for name in ("resources/hub", "results"))
    with suppress(OSError):  # which the build will report
        if not all(map(holes.are_supported, (hub, results))):
            return "this file system cannot free a part of a file"
        if not storage.locks_work(results):
            return "file locks do not work on this file system"
    return ""


def whole_part(model: Model) -> str:
    """The part whose conversion reads all of the shards: others need the head alone."""
    return "all" if "all" in _parts(model) else "trunk"


def by_shards(config: Config, model: Model) -> bool:
    """Whether a model is built shard by shard."""
    return config.lean == SHARDS and not why_not_by_shards(config, model)


def why_not_by_shards(config: Config, model: Model) -> str:
    """Why a model cannot be built shard by shard; empty if it can."""
    if reason := why_not(config, model):
        return reason
    variants = model.variants.values()
    needing = {
        "a BF16 file is published": any(each.converted for each in variants),
        "a base is made of its trunk": any(each.base for each in variants),
        "a search of types reads its BF16 file": any(each.searched for each in variants),
        "its importance matrix is computed with its BF16 file": any(
            isinstance(each.imatrix, ImatrixText) for each in variants
        ),
        "KL divergence is measured from its BF16 file": bool(model.measure and model.measure.text),
        "its sidecar is verified with its BF16 file": model.sidecar is not None,
        "it has variants with and without a head": len({each.part for each in variants}) > 1,
    }
    found = [reason for reason, applies in needing.items() if applies]
    return found[0] if found else _other_head(config, model)


def notes(config: Config, model: Model) -> list[str]:
    """What a lean build of a model leaves out, or why it needs more disk than it could."""
    if not config.is_lean:
        return []
    if reason := why_not(config, model):
        return [f"note: {model.key}: no shards are freed: {reason}"]
    if by_shards(config, model):
        left_out = "the acceptance of quants is not compared with that of BF16"
        return [f"note: {model.key}: shard by shard, without a BF16 file: {left_out}"]
    reason = why_not_by_shards(config, model) if config.lean == SHARDS else ""
    return [f"note: {model.key}: not shard by shard: {reason}"] if reason else []


def _other_head(config: Config, model: Model) -> str:
    """A model that takes only the head of the same checkpoint, which whole shards confirm."""
    assert isinstance(model.source, HubRepository)
    commit = layout.commit(model.source)
    for other in config.models.values():
        sources = [each for each, _ in other.conversions() if isinstance(each, HubRepository)]
        if other is not model and commit in map(layout.commit, sources):
            return f"{other.key} has the head of the same checkpoint"
    return ""


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
