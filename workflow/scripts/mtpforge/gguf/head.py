"""The head and the trunk of a GGUF: which blocks and tensors belong to the MTP head."""

from mtpforge.errors import GgufError
from mtpforge.gguf import reader
from mtpforge.gguf.reader import Gguf, TensorInfo, view

VISION = "clip"  # general.architecture of every vision tower


def head_blocks(source: Gguf) -> range:
    """The numbers of the head's blocks, the last ones by the file's own metadata; empty without a head. Raises GgufError."""
    architecture = source.architecture
    blocks, heads = (
        source.need(f"{architecture}.block_count", int),
        source.get(f"{architecture}.nextn_predict_layers", 0),
    )
    if type(heads) is not int or not 0 <= heads < blocks or heads > len(source.tensors):
        raise GgufError(f"{source.path}: {str(heads)[:40]} head blocks of {blocks}: that cannot be")
    return range(blocks - heads, blocks)


def quantizable(info: TensorInfo) -> bool:
    """Whether llama-quantize changes this tensor: a matrix that is no norm, router or convolution (`llama-quant.cpp`)."""
    kept = ("_norm.weight", "ffn_gate_inp.weight", "ssm_conv1d.weight")
    return (
        sum(n > 1 for n in info.shape) > 1
        and info.name.endswith(".weight")
        and not info.name.endswith(kept)
    )


def trunk_digests(base: Gguf) -> dict[str, str]:
    """The sha256 of each tensor that is not the head's."""
    return reader.hashes(trunk_only(base).ranges)


def head_names(source: Gguf) -> list[str]:
    """The tensors of the head's blocks; none where the file has no head, or declares one that it has lost."""
    prefixes = tuple(f"blk.{block}." for block in head_blocks(source))
    return [name for name in source.tensors if name.startswith(prefixes)] if prefixes else []


def head_only(source: Gguf) -> Gguf:
    """The same file with only its head's tensors in view."""
    return view(source, head_names(source))


def trunk_only(source: Gguf) -> Gguf:
    """The same file without its head's tensors in view."""
    head = set(head_names(source))
    return view(source, [name for name in source.tensors if name not in head])


def types_of(head: Gguf) -> set[str]:
    """The types of the head's matrices; norms and routers are F32 in every file."""
    return {info.type.name for name, info in head.tensors.items() if quantizable(info)}
