"""Types and digests of the head and the trunk of a GGUF; `Gguf.head` and `Gguf.trunk` select their tensors."""

from mtpforge.gguf import reader
from mtpforge.gguf.reader import Gguf, TensorInfo


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
    return reader.hashes(base.trunk.ranges)


def types_of(head: Gguf) -> set[str]:
    """The types of the head's matrices; norms and routers are F32 in every file."""
    return {info.type.name for name, info in head.tensors.items() if quantizable(info)}
