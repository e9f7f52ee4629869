"""Whether a head fits a base: architecture, sizes, rotation, number of blocks, vocabulary."""

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from gguf.constants import Keys

from mtpforge.errors import GgufError
from mtpforge.gguf.metadata import Value
from mtpforge.gguf.reader import Gguf

# Keys of the architecture that may differ between a base and a head of the same model.
_FREE = ("block_count", "nextn_predict_layers", "context_length")
# Keys that the base must have if the head's file has them.
_NEEDED = (
    "embedding_length",
    "attention.head_count",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.dimension_sections",
)


class Difference(NamedTuple):
    """The first difference between two models: its name, and the value on both sides."""

    name: str
    found: Any
    expected: Any


def check_match(base: Gguf, head: Gguf) -> None:
    """Raise GgufError if the head belongs to another model, or if the base is incomplete."""
    if head.architecture != base.architecture:
        raise GgufError(
            f"{base.path} is {base.architecture}, {head.path} is {head.architecture}: "
            "the head belongs to another model"
        )
    _check_blocks(base, head)
    difference = (
        _key_difference(base, head)
        or _size_difference(base, head)
        or vocabulary_difference(base.metadata, head.metadata)
    )
    if difference:
        found = str(difference.found)[:200]
        expected = str(difference.expected)[:200]
        raise GgufError(
            f"{difference.name} is {found} in {base.path} and {expected} in {head.path}: "
            "the head belongs to another model"
        )


def vocabulary_difference(
    found: Mapping[str, Value], expected: Mapping[str, Value]
) -> Difference | None:
    """How two vocabularies differ; None if a head fits both, or if one has no vocabulary.

    Up to 1% of the tokens may differ in text, because publishers rename reserved tokens. Merges
    must be equal.
    """
    return _token_difference(found, expected) or _merge_difference(found, expected)


def same_value(base: Gguf, key: str, head: Gguf) -> bool:
    """Whether both have the same value; for an array with an entry per block, in the trunk."""
    ours = base.get(key)
    theirs = head.get(key)
    if ours == theirs or not (isinstance(ours, list) and isinstance(theirs, list)):
        return bool(ours == theirs)
    trunk = base.head_blocks.start
    extra = (len(ours) - trunk, len(theirs) - trunk)
    per_block = extra == (len(base.head_blocks), len(head.head_blocks))
    return per_block and bool(ours[:trunk] == theirs[:trunk])


def _check_blocks(base: Gguf, head: Gguf) -> None:
    blocks = base.head_blocks.start
    if blocks != head.head_blocks.start:
        raise GgufError(
            f"{base.path} has {blocks} blocks, the head in {head.path} is block "
            f"{head.head_blocks.start}: it belongs to another model"
        )
    matches = (re.match(r"blk\.([0-9]+)\.", name) for name in base.tensors)
    numbers = {match.string: int(match[1]) for match in matches if match}
    if surplus := [name for name, number in numbers.items() if number >= base.head_blocks.stop]:
        raise GgufError(f"{base.path}: has {surplus[0]}, but its metadata declares no such block")
    if missing := set(range(blocks)) - set(numbers.values()):
        raise GgufError(
            f"{base.path}: is incomplete: it declares {blocks} blocks, "
            f"but has no tensor of block {min(missing)}"
        )


def _key_difference(base: Gguf, head: Gguf) -> Difference | None:
    """The first key of the architecture that differs, and is in both files or needed."""
    prefix = f"{base.architecture}."
    for key in head.metadata:
        name = key.removeprefix(prefix)
        if name == key or name in _FREE or same_value(base, key, head):
            continue
        if key in base.metadata or name in _NEEDED:
            return Difference(key, base.get(key), head.get(key))
    return None


def _size_difference(base: Gguf, head: Gguf) -> Difference | None:
    found = _vocabulary_size(base)
    expected = _vocabulary_size(head)
    if expected is None or found == expected:
        return None
    return Difference("the number of tokens", found, expected)


def _vocabulary_size(opened: Gguf) -> int | None:
    """The number of tokens that a file has embeddings of, or that it states."""
    if embeddings := opened.tensors.get("token_embd.weight"):
        return embeddings.shape[0]
    stated = opened.get(f"{opened.architecture}.vocab_size")
    return stated if isinstance(stated, int) else None


def _token_difference(
    found: Mapping[str, Value], expected: Mapping[str, Value]
) -> Difference | None:
    ours = found.get(Keys.Tokenizer.LIST)
    theirs = expected.get(Keys.Tokenizer.LIST)
    if ours is None or theirs is None or ours == theirs:
        return None
    if len(ours) != len(theirs):
        return Difference("the number of tokens", len(ours), len(theirs))
    pairs = enumerate(zip(ours.decode(), theirs.decode(), strict=True))
    differing = [Difference(f"token {i}", our, their) for i, (our, their) in pairs if our != their]
    return differing[0] if 100 * len(differing) > len(theirs) else None


def _merge_difference(
    found: Mapping[str, Value], expected: Mapping[str, Value]
) -> Difference | None:
    key = Keys.Tokenizer.MERGES
    ours = found.get(key)
    theirs = expected.get(key)
    if ours is None or theirs is None or ours == theirs:
        return None
    return Difference(key, f"a list of {len(ours)}", f"another list of {len(theirs)}")
