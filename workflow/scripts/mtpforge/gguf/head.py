"""Types and digests of the head and the trunk of a GGUF.

`Gguf.head` and `Gguf.trunk` in `reader` select their tensors.
"""

from mtpforge.gguf import reader
from mtpforge.gguf.reader import Gguf, TensorInfo

_NEVER_QUANTIZED = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "ssm_conv1d.weight",
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
)


def quantizable(info: TensorInfo) -> bool:
    """Whether llama-quantize changes a tensor: a matrix, and no norm, router, convolution, indexer.

    Source: `tensor_allows_quantization` in llama.cpp's `llama-quant.cpp`.
    """
    is_matrix = sum(size > 1 for size in info.shape) > 1
    return is_matrix and info.name.endswith(".weight") and not info.name.endswith(_NEVER_QUANTIZED)


def types_of(head: Gguf) -> set[str]:
    """The types of a head's matrices; its norms and routers are F32 in every file."""
    return {info.type.name for info in head.tensors.values() if quantizable(info)}


def trunk_digests(base: Gguf) -> dict[str, str]:
    """The sha256 of each tensor of the trunk."""
    return reader.hashes(base.trunk.ranges)
