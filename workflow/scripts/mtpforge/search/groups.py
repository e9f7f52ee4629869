"""The matrices that a search chooses types for, and the groups in which it tries them."""

import re
from collections.abc import Callable, Iterable
from typing import Literal

from mtpforge.gguf.head import quantizable
from mtpforge.gguf.reader import Gguf

Groups = dict[str, list[str]]
"""The names of the tensors of each group, in the order of the file."""

By = Literal["class", "tensor"]

_BLOCK = re.compile(r"^blk\.(\d+)\.")
_GATE_OR_UP = re.compile(r"\bffn_(gate|up)(?=(_[a-z]*exps?)?\.weight$)")


def matrices(source: Gguf) -> list[str]:
    """The tensors of the trunk that llama-quantize changes."""
    infos = source.trunk.tensors.values()
    return [info.name for info in infos if quantizable(info, source.architecture)]


def units(source: Gguf) -> Groups:
    """Tensors that take one type: gate and up of a block, which are read together, or one alone."""
    return _grouped(matrices(source), unit_of)


def classes(source: Gguf) -> Groups:
    """The same unit of all blocks, such as `attn_q.weight`."""
    return _grouped(matrices(source), class_of)


def layers(source: Gguf) -> Groups:
    """All matrices of each block."""
    names = [name for name in matrices(source) if layer_of(name)]
    return _grouped(names, layer_of)


def tried(source: Gguf, by: By) -> Groups:
    """The groups that are quantized alone: each unit, or each class and then each layer."""
    return units(source) if by == "tensor" else classes(source) | layers(source)


def unit_of(name: str) -> str:
    """The unit of a tensor, which is its name unless it is a gate or up."""
    return _GATE_OR_UP.sub("ffn_gate_up", name)


def class_of(name: str) -> str:
    """The class of a tensor: its unit without the block."""
    return _BLOCK.sub("", unit_of(name))


def layer_of(name: str) -> str:
    """The block of a tensor, as `blk.3`; empty for embeddings and output."""
    block = _BLOCK.match(name)
    return f"blk.{block[1]}" if block else ""


def _grouped(names: Iterable[str], key: Callable[[str], str]) -> Groups:
    found: Groups = {}
    for name in names:
        found.setdefault(key(name), []).append(name)
    return found
