"""Types and digests of the head and the trunk of a GGUF.

`Gguf.head` and `Gguf.trunk` in `reader` select their tensors.
"""

from mtpforge.gguf import reader
from mtpforge.gguf.reader import Gguf, TensorInfo

_NEVER_QUANTIZED = (
    "_norm.weight",
    "ffn_gate_inp.weight",
    "indexer.k_proj.weight",
    "indexer.q_proj.weight",
)
_CONVOLUTION = "ssm_conv1d"
_SMALL = {
    "glm5-next": (
        "hc_", "indexer.attn_", "indexer.proj", "indexer_compressor_", "ssm_f_", "ssm_g_",
        "ssm_beta.", "attn_kv_a_mqa.", "attn_k_b.", "attn_v_b.",
    ),
}  # fmt: skip
"""Architecture -> parts of the names of matrices that llama-quantize leaves alone."""


def quantizable(info: TensorInfo, architecture: str) -> bool:
    """Whether llama-quantize changes a tensor: a matrix, and no norm, router, convolution, indexer.

    Source: `tensor_allows_quantization` in llama.cpp's `llama-quant.cpp`.
    """
    name = info.name
    is_matrix = sum(size > 1 for size in info.shape) > 1 and name.endswith(".weight")
    kept = name.endswith(_NEVER_QUANTIZED) or _CONVOLUTION in name
    return is_matrix and not (kept or any(part in name for part in _SMALL.get(architecture, ())))


def types_of(head: Gguf) -> set[str]:
    """The types of a head's matrices; its norms and routers are F32 in every file."""
    infos = head.tensors.values()
    return {info.type.name for info in infos if quantizable(info, head.architecture)}


def trunk_digests(base: Gguf) -> dict[str, str]:
    """The sha256 of each tensor of the trunk."""
    return reader.hashes(base.trunk.ranges)
