"""The memory that llama-server needs for a file, reckoned from its size and metadata.

llama.cpp keeps keys and values of each token for the blocks with attention, of the last tokens only
for those with a sliding window, and none for those that share another's. For recurrent blocks it
keeps a state of fixed size per request, with one more copy per drafted token. The head has a cache
of its own. Windows that the metadata does not list by block are reckoned as full attention.
"""

from dataclasses import dataclass
from typing import Any

from mtpforge.errors import GgufError
from mtpforge.gguf.reader import Gguf

TOKENS = 8192
"""The context that is reckoned with unless the options say otherwise."""
SLOTS = 4
"""Requests that llama-server serves at a time unless told otherwise."""
BUFFERS = 10**9
"""Bytes for llama.cpp's buffers, which depend on the backend: an allowance."""
CACHE_TYPES = {"f16": 2.0, "q8_0": 34 / 32}
"""Bytes of a value in the cache."""
_F32 = 4
_BATCH, _STEP = 512, 256
"""Tokens that llama.cpp caches beside a sliding window, and of which its size is a multiple."""
_MOST = 1 << 40
"""No number that enters a sum is larger in a real model."""


@dataclass(frozen=True)
class Context:
    """What a model keeps while it runs."""

    values: int
    """Cached values of the whole context: keys and values of all blocks of the trunk."""
    head_values: int
    """The same of the head."""
    state: int
    """Bytes of the recurrent blocks' state of one request."""

    def cache(self, kind: str) -> int:
        """Bytes of the trunk's cache at a type of `CACHE_TYPES`."""
        return round(self.values * CACHE_TYPES[kind])

    def states(self, slots: int, draft_length: int) -> int:
        """Bytes of all states: each drafted token may have to be taken back."""
        return slots * (1 + draft_length) * self.state

    @property
    def head_cache(self) -> int:
        """Bytes of the head's cache, which stays at f16 if that of the trunk is smaller."""
        return round(self.head_values * CACHE_TYPES["f16"])


def context(gguf: Gguf, slots: int = SLOTS, tokens: int = TOKENS) -> Context | None:
    """What a model keeps; None if its metadata does not tell, or contradicts itself.

    `slots` are the requests that are served at a time: each has a sliding window of its own. They
    share the context of `tokens`.
    """
    try:
        return _context(gguf, slots, tokens)
    except GgufError:
        return None


def head_bytes(gguf: Gguf) -> int:
    """Bytes of the head's tensors."""
    return sum(place.size for place in gguf.head.ranges.values())


def _context(gguf: Gguf, slots: int, tokens: int) -> Context:
    blocks = _number(gguf, "block_count")
    if blocks > len(gguf.tensors):
        raise GgufError(f"{gguf.path}: {blocks} blocks in a file of {len(gguf.tensors)} tensors")
    trunk = blocks - len(gguf.head_blocks)
    recurrent = _recurrent(gguf, blocks, trunk)
    cached = _values(gguf, blocks, slots, tokens)
    values = [0 if recurrent[block] else each for block, each in enumerate(cached)]
    return Context(
        values=sum(values[:trunk]),
        head_values=sum(values[trunk:]),
        state=_state(gguf) * sum(recurrent) if any(recurrent) else 0,
    )


def _values(gguf: Gguf, blocks: int, slots: int, tokens: int) -> list[int]:
    """The cached values of all tokens by block. With latent attention (MLA) there are only keys."""
    heads = _by_block(gguf, "attention.head_count", blocks)
    kv_heads = _by_block(gguf, "attention.head_count_kv", blocks, heads)
    width = _number(gguf, "embedding_length") // max(*heads, 1)
    keys = _number(gguf, "attention.key_length", width)
    values = _number(gguf, "attention.value_length", width)
    sliding_keys = _number(gguf, "attention.key_length_swa", keys)
    sliding_values = _number(gguf, "attention.value_length_swa", values)
    if _number(gguf, "attention.key_length_mla", 0):
        values = sliding_values = 0
    indexer = _number(gguf, "attention.indexer.key_length", 0)
    window, slides = _windows(gguf, blocks, slots, tokens)
    kinds = [(tokens, keys + values), (window, sliding_keys + sliding_values)]
    owners = blocks - _number(gguf, "attention.shared_kv_layers", 0)
    cached = []
    for block, count in enumerate(kv_heads):
        kept, both = kinds[slides[block]]
        cached.append(kept * (count * both + indexer) if count and block < owners else 0)
    return cached


def _windows(gguf: Gguf, blocks: int, slots: int, tokens: int) -> tuple[int, list[bool]]:
    """The tokens that a sliding window caches, and whether each block has one."""
    size = _number(gguf, "attention.sliding_window", 0)
    listed = gguf.get(f"{gguf.architecture}.attention.sliding_window_pattern")
    if not size or not isinstance(listed, list):
        return tokens, [False] * blocks
    window = -(-(slots * size + _BATCH) // _STEP) * _STEP
    return min(window, tokens), [bool(each) for each in _of_length(gguf, listed, blocks)]


def _recurrent(gguf: Gguf, blocks: int, trunk: int) -> list[bool]:
    """Whether each block is recurrent instead of having attention."""
    listed = gguf.get(f"{gguf.architecture}.attention.recurrent_layers")
    if isinstance(listed, list):
        return [bool(each) for each in _of_length(gguf, listed, blocks)]
    if every := _number(gguf, "full_attention_interval", 0):
        return [block < trunk and (block + 1) % every != 0 for block in range(blocks)]
    if not _number(gguf, "ssm.state_size", 0) and not _number(gguf, "kda.head_dim", 0):
        return [False] * blocks
    kv_heads = _by_block(gguf, "attention.head_count_kv", blocks, [1] * blocks)
    widths = _by_block(gguf, "feed_forward_length", blocks, [0] * blocks)
    return [
        not heads and (not width or len(set(widths)) == 1)
        for heads, width in zip(kv_heads, widths, strict=True)
    ]


def _state(gguf: Gguf) -> int:
    """Bytes of the state of one recurrent block: its convolution's, and its own."""
    kernel = max(_number(gguf, "ssm.conv_kernel", 4), 1) - 1
    if width := _number(gguf, "kda.head_dim", 0):
        heads = _number(gguf, "attention.head_count")
        return _F32 * heads * width * (3 * kernel + width)
    inner, size = _number(gguf, "ssm.inner_size"), _number(gguf, "ssm.state_size")
    groups = _number(gguf, "ssm.group_count", 0)
    return _F32 * (kernel * (inner + 2 * groups * size) + size * inner)


def _by_block(gguf: Gguf, key: str, blocks: int, default: list[int] | None = None) -> list[int]:
    """A number of each block: the same for all, or listed."""
    value = gguf.get(f"{gguf.architecture}.{key}")
    if value is None and default is not None:
        return default
    listed = value if isinstance(value, list) else [value] * blocks
    return [_checked(gguf, key, each) for each in _of_length(gguf, listed, blocks)]


def _of_length(gguf: Gguf, listed: list[Any], blocks: int) -> list[Any]:
    if len(listed) != blocks:
        raise GgufError(f"{gguf.path}: lists {len(listed)} blocks of {blocks}")
    return listed


def _number(gguf: Gguf, key: str, default: int | None = None) -> int:
    """A number of the metadata. Raises GgufError if it is malformed, or missing without default."""
    value = gguf.get(f"{gguf.architecture}.{key}")
    if value is None and default is not None:
        return default
    return _checked(gguf, key, value)


def _checked(gguf: Gguf, key: str, value: Any) -> int:
    if type(value) is not int or not 0 <= value < _MOST:
        raise GgufError(f"{gguf.path}: {key} is {str(value)[:40]}")
    return value
