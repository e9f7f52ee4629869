"""Whether a head fits a base: architecture, shapes of the model, and vocabulary."""

import re
from collections.abc import Mapping
from typing import Any

from gguf.constants import Keys

from mtpforge.errors import GgufError
from mtpforge.gguf.reader import Gguf, Value


def belong(base: Gguf, key: str, head: Gguf) -> bool:
    """Whether both say the same under a key; of an array with an entry for each block, as far as the trunk goes."""
    ours, theirs = base.get(key), head.get(key)
    if ours == theirs or not (isinstance(ours, list) and isinstance(theirs, list)):
        return bool(ours == theirs)
    trunk, blocks = base.head_blocks.start, (len(base.head_blocks), len(head.head_blocks))
    return (len(ours) - trunk, len(theirs) - trunk) == blocks and bool(
        ours[:trunk] == theirs[:trunk]
    )


# Keys that may differ between a base and the head's file without telling two models apart, and those that a base must have.
_FREE = ("block_count", "nextn_predict_layers", "context_length")
_NEEDED = (
    "embedding_length",
    "attention.head_count",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.dimension_sections",
)


def check_match(base: Gguf, head: Gguf) -> None:
    """Raise GgufError with both sides where architecture, a size, the vocabulary, a rotation or the number of blocks differs."""
    architecture = base.architecture
    if head.architecture != architecture:
        raise GgufError(
            f"{base.path} is {architecture}, {head.path} is {head.architecture}: the head belongs to another model"
        )
    blocks, block = base.head_blocks.start, head.head_blocks.start
    if blocks != block:
        raise GgufError(
            f"{base.path} has {blocks} blocks, the head in {head.path} is block {block}: it belongs to another model"
        )
    numbers = {
        name: int(name.split(".")[1]) for name in base.tensors if re.match(r"blk\.[0-9]+\.", name)
    }
    if surplus := [name for name, number in numbers.items() if number >= base.head_blocks.stop]:
        raise GgufError(
            f"{base.path}: has {surplus[0]}, a tensor of a block that its metadata does not declare"
        )
    if missing := set(range(blocks)) - set(numbers.values()):
        raise GgufError(
            f"{base.path}: has no tensor of block {min(missing)}, though it declares {blocks}: it is incomplete"
        )
    sides = _differing_keys(base, head)
    if (ours := _vocabulary(base)) != (theirs := _vocabulary(head)) and theirs is not None:
        sides.append(("the number of tokens", ours, theirs))
    if differing := vocabulary_difference(base.metadata, head.metadata):
        sides.append(differing)
    if sides:
        key, our, their = sides[0]
        raise GgufError(
            f"{key} is {str(our)[:200]} in {base.path} and {str(their)[:200]} in {head.path}: the head belongs to another model"
        )


def _differing_keys(base: Gguf, head: Gguf) -> list[tuple[str, Any, Any]]:
    prefix = f"{base.architecture}."
    return [
        (key, base.get(key), head.get(key))
        for key in head.metadata
        if key.startswith(prefix) and key.removeprefix(prefix) not in _FREE
        if not belong(base, key, head)
        if key in base.metadata or key.removeprefix(prefix) in _NEEDED
    ]


def _vocabulary(opened: Gguf) -> int | None:
    """The number of tokens that a file has embeddings of, or that it states."""
    if embeddings := opened.tensors.get("token_embd.weight"):
        return embeddings.shape[0]
    stated = opened.get(f"{opened.architecture}.vocab_size")
    return stated if isinstance(stated, int) else None


def vocabulary_difference(
    found: Mapping[str, Value], expected: Mapping[str, Value]
) -> tuple[str, Any, Any] | None:
    """What tells two vocabularies apart: its name, and what both sides have; None if a head fits both or one has none.

    Up to one token in a hundred may have another text, because publishers rename reserved tokens. Merges must be equal.
    """
    key = Keys.Tokenizer.LIST
    ours, theirs = found.get(key), expected.get(key)
    if ours is not None and theirs is not None and ours != theirs:
        if len(ours) != len(theirs):
            return "the number of tokens", len(ours), len(theirs)
        pairs = zip(ours.decode(), theirs.decode(), strict=True)
        differing = [
            (f"token {number}", our, their)
            for number, (our, their) in enumerate(pairs)
            if our != their
        ]
        if 100 * len(differing) > len(theirs):
            return differing[0]
    ours, theirs = found.get(Keys.Tokenizer.MERGES), expected.get(Keys.Tokenizer.MERGES)
    if ours is not None and theirs is not None and ours != theirs:
        return Keys.Tokenizer.MERGES, f"a list of {len(ours)}", f"another list of {len(theirs)}"
    return None
