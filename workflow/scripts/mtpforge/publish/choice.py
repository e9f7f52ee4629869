"""Which file to take: by the memory that there is, and if nothing else is known."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from mtpforge.publish import serving_memory
from mtpforge.publish.result import Result

MEMORIES = (8, 12, 16, 24, 48)
"""Gigabytes of common graphics cards and computers."""
_DEFAULT_TAGS = ("Q4_K_M", "Q8_0")
_NOT_A_MODEL = re.compile("mmproj|imatrix|(mtp|eagle3|dflash|dspark)-")
_SHARD = re.compile(r"-(\d{5})-of-\d{5}\.gguf$")
_LONGEST_LABEL = 24
_SLOT_OPTIONS = ("-np", "--parallel")
_CONTEXT_OPTIONS = ("-c", "--ctx-size")
_MOST_SLOTS, _MOST_TOKENS = 1 << 10, 1 << 30


@dataclass(frozen=True)
class Choice:
    """The file to take with one or several sizes of memory; None if none fits."""

    memory: str
    result: Result | None
    tower: int = 0
    """Bytes of the vision tower that is loaded beside it."""

    def needed(self, cache: str) -> int | None:
        """The memory that it needs with a type of cache."""
        found = None if self.result is None else needed(self.result, cache)
        return None if found is None else found + self.tower


def recommended(results: Iterable[Result]) -> Result | None:
    """The file to start with: that which llama.cpp takes without a tag, if it is one of the best.

    Else the first of these. A file that drafts is better than one that does not, then a quantized
    one than BF16.
    """
    found = [*results]
    candidates = _candidates(found)
    default = without_tag(shard for result in found for shard in result.shards)[:1]
    chosen = [each for each in candidates if each.shards[:1] == default]
    return next(iter(chosen or candidates), None)


def by_memory(results: Sequence[Result]) -> list[Choice]:
    """The best file that fits each size of memory; empty if the need of none is known.

    The best has the smallest KL divergence, or is the largest if not all were measured.
    """
    candidates = [each for each in _candidates(results) if needed(each) is not None]
    tower = tower_bytes(results)
    best = {memory: _best(candidates, memory * 10**9 - tower) for memory in MEMORIES}
    if not candidates:
        return []
    choices: list[Choice] = []
    for memory_size, result in best.items():
        first = memory_size
        if choices and choices[-1].result is result:
            first = int(choices.pop().memory.split()[0])
        words = f"{first} GB" if first == memory_size else f"{first} to {memory_size} GB"
        choices.append(Choice(words, result, tower))
    return choices


def tower_bytes(results: Iterable[Result]) -> int:
    """The size of the vision tower, of the largest if there are several; 0 without one."""
    return max((each.report.bytes for each in results if each.gguf.is_vision), default=0)


def needed(result: Result, cache: str = "f16", at_a_time: int | None = None) -> int | None:
    """The memory that llama-server needs for a file in its context; None if it is not known.

    `at_a_time` requests are served instead of as many as the options say.
    """
    count = at_a_time or slots(result)
    found = kept(result, at_a_time)
    if found is None:
        return None
    length = draft_length(result)
    head = found.head_cache if length else 0
    states = found.states(count, length)
    return result.report.bytes + found.cache(cache) + states + head + serving_memory.BUFFERS


def kept(result: Result, at_a_time: int | None = None) -> serving_memory.Context | None:
    """What a file keeps in its context, in `needed`; None if it is not known."""
    count = tokens(result)
    return serving_memory.context(result.gguf, at_a_time or slots(result), count) if count else None


def needed_with(sidecar: Result, model: Result) -> int | None:
    """How much more a file without a head needs to draft with a sidecar; None if not known."""
    # The metadata of a sidecar is that of the whole model, but it lacks the trunk's tensors.
    whole = replace(model, gguf=replace(model.gguf, metadata=sidecar.gguf.metadata))
    alone, both = kept(model), kept(whole)
    if alone is None:
        return None
    count = slots(model)
    states = alone.states(count, sidecar.gguf.draft_length) - alone.states(count, 0)
    return sidecar.report.bytes + (both.head_cache if both else 0) + states


def draft_length(result: Result) -> int:
    """How far ahead a file is to draft: as measured, else as in its verification; 0 if not."""
    if not result.drafts:
        return 0
    return result.gguf.draft_length if result.n_max is None else result.n_max


def slots(result: Result) -> int:
    """The requests that llama-server serves at a time with the options that were measured."""
    given = _option(result, _SLOT_OPTIONS)
    return min(given, _MOST_SLOTS) if given else serving_memory.SLOTS


def tokens(result: Result) -> int:
    """The context of a file's commands: as measured, else 8K or the model's longest; 0: unknown."""
    given = _option(result, _CONTEXT_OPTIONS)
    if given:
        return min(given, _MOST_TOKENS)
    longest = result.gguf.get(f"{result.gguf.architecture}.context_length")
    if type(longest) is not int or not 0 < longest <= _MOST_TOKENS:
        return serving_memory.TOKENS if given is None else 0
    return min(longest, serving_memory.TOKENS) if given is None else longest


def _option(result: Result, names: Sequence[str]) -> int | None:
    """The number that an option was measured with; None if it has none."""
    for option, value in pairwise(result.options):
        if option in names and value.isdecimal():
            return int(value)
    return None


def by_size(results: Iterable[Result]) -> list[Result]:
    """Models from small to large, then the files to use with them."""
    return sorted(results, key=lambda each: (not each.is_model, each.report.bytes))


def resolve(tag: str, names: Iterable[str]) -> str | None:
    """The file that `-hf repo:TAG` selects in llama.cpp b11434; None if it finds none."""
    return next(iter(_selectable(tag, names)), None)


def without_tag(names: Iterable[str]) -> list[str]:
    """The files of which `-hf repo` selects the first that the Hub lists in llama.cpp b11434.

    They are sorted by name, but the Hub promises no order.
    """
    found = [*names]
    tagged = (_selectable(tag, found) for tag in _DEFAULT_TAGS)
    return next(filter(None, tagged), _selectable("", found))


def labels(results: Iterable[Result], model_name: str) -> Mapping[str, str]:
    """Name of a file -> a short one for tables, without the model's name and the ending."""
    found: dict[str, str] = {}
    for result in results:
        label = _shortened(result.name, model_name)
        taken = label in found.values()
        found[result.name] = f"{label} ({len(found) + 1})" if taken else label
    return found


def _shortened(name: str, model_name: str) -> str:
    label = name.removesuffix(".gguf").replace(f"{model_name}-", "", 1)
    half = _LONGEST_LABEL // 2
    return label if len(label) <= _LONGEST_LABEL else f"{label[:half]}…{label[1 - half :]}"


def _candidates(results: Iterable[Result]) -> list[Result]:
    models = [result for result in results if result.is_model]
    drafting = [model for model in models if model.drafts] or models
    return [model for model in drafting if model.report.bits_per_weight < 16] or drafting


def _best(candidates: Sequence[Result], most: int) -> Result | None:
    fitting = [each for each in candidates if (needed(each) or most + 1) <= most]
    found = [each.measured.kl_divergence for each in candidates if each.measured]
    is_measured = len(found) == len(candidates) and all(found)

    def worse(result: Result) -> tuple[float, int]:
        divergence = result.measured.kl_divergence if result.measured else None
        if is_measured and divergence:
            return max(divergence.mean, 0.0), result.report.bytes
        return 0.0, -result.report.bytes

    return min(fitting, key=worse, default=None)


def _selectable(tag: str, names: Iterable[str]) -> list[str]:
    """The models that a tag matches, sorted; all models if it is empty."""
    matches = re.compile(f"{tag}[.-]" if tag else "", re.IGNORECASE)
    return [*filter(matches.search, filter(_can_be_selected, sorted(names)))]


def _can_be_selected(name: str) -> bool:
    """Whether llama.cpp takes a file for a model, or for the first shard of one."""
    if not name.endswith(".gguf") or _NOT_A_MODEL.search(name.rpartition("/")[2]):
        return False
    shard = _SHARD.search(name)
    return shard is None or int(shard[1]) == 1
