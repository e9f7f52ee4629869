"""Types and digests of the head and the trunk of a GGUF.

`Gguf.head` and `Gguf.trunk` in `reader` select their tensors.
"""

from mtpforge.gguf import reader
from mtpforge.gguf.reader import Gguf, TensorInfo

_NEVER_QUANTIZED = (
    "_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel",
    "per_layer_model_proj", "ssm_conv1d", "shortconv.conv.weight", "indexer.k_proj.weight",
    "indexer.q_proj.weight", "attn_rel_b.weight",
    *(f"time_mix_{name}.weight" for name in (
        "first", "w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2", "decay_w1",
        "decay_w2", "lerp_fused",
    )),
)  # fmt: skip
"""Parts of the names of matrices that llama-quantize leaves alone."""
_POSITIONS = ("position_embd.weight", "token_types.weight")
_SMALL = {
    "glm5-next": (
        "hc_", "indexer.attn_", "indexer.proj", "indexer_compressor_", "ssm_f_", "ssm_g_",
        "ssm_beta.", "attn_kv_a_mqa.", "attn_k_b.", "attn_v_b.",
    ),
}  # fmt: skip
"""Architecture -> parts of the names of matrices that llama-quantize leaves alone."""


def quantizable(info: TensorInfo, architecture: str) -> bool:
    """Whether llama-quantize changes a tensor: a matrix, and none that is small or a table.

    Source: `tensor_allows_quantization` in llama.cpp's `llama-quant.cpp`.
    """
    name = info.name
    is_matrix = sum(size > 1 for size in info.shape) > 1 and name.endswith(".weight")
    parts = (*_NEVER_QUANTIZED, *_SMALL.get(architecture, ()))
    return is_matrix and name not in _POSITIONS and not any(part in name for part in parts)


def types_of(head: Gguf) -> set[str]:
    """The types of a head's matrices; its norms and routers are F32 in every file."""
    infos = head.tensors.values()
    return {info.type.name for info in infos if quantizable(info, head.architecture)}


def trunk_digests(base: Gguf) -> dict[str, str]:
    """The sha256 of each tensor of the trunk."""
    return reader.hashes(base.trunk.ranges)
