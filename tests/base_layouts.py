"""Trunks as other people's quantizations store them: every layout that llama.cpp loads.

`write_base` writes a BF16 or F32 trunk, which conversion made, in another layout.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGMLQuantizationType, GGUFValueType
from mtpforge.gguf import reader, writer
from mtpforge.gguf.metadata import Value
from mtpforge.gguf.reader import TensorInfo

TOKENS, TYPES = "tokenizer.ggml.tokens", "tokenizer.ggml.token_type"
_TYPES = {2: GGMLQuantizationType.BF16, 4: GGMLQuantizationType.F32}


@dataclass
class Base:
    """A trunk in memory: metadata, and tensors in BF16 (as uint16) or float32."""

    metadata: dict[str, Value]
    tensors: dict[str, np.ndarray]

    def set_array(self, key: str, values: list[Any], kind: GGUFValueType) -> None:
        self.metadata[key] = Value.of(values, GGUFValueType.ARRAY, kind)

    def fuse(self, whole: str, *parts: str) -> None:
        """Replace tensors of each block that has them by one with the rows of all."""
        for first in [name for name in self.tensors if name.endswith(parts[0])]:
            block = first.removesuffix(parts[0])
            found = [self.tensors.pop(f"{block}{part}") for part in parts]
            self.tensors[f"{block}{whole}"] = np.concatenate(found, axis=-2)

    def matrices(self) -> list[str]:
        """The matrices of blocks that llama.cpp reads a scale for."""
        kinds = ("attn_q", "attn_k", "attn_v", "attn_output", "attn_qkv", "attn_gate", "ssm_out")
        ffn = tuple(
            f"ffn_{part}{ending}"
            for part in ("gate", "up", "down")
            for ending in ("", "_exps", "_shexp")
        )
        return [
            name
            for name in self.tensors
            if name.endswith(tuple(f".{k}.weight" for k in kinds + ffn))
        ]


def write_base(trunk: Path, out: Path, change: Callable[[Base], object]) -> Path:
    """Write a changed copy of a trunk."""
    opened = reader.read(trunk)
    tensors = {}
    for name, info in opened.tensors.items():
        piece = opened.ranges[name]
        raw = trunk.read_bytes()[piece.offset : piece.offset + piece.size]
        kind = "<u2" if info.type is GGMLQuantizationType.BF16 else "<f4"
        tensors[name] = np.frombuffer(raw, kind).reshape(info.shape).copy()
    base = Base(dict(opened.metadata), tensors)
    change(base)
    content = [
        (TensorInfo(name, array.shape, _TYPES[array.itemsize]), [memoryview(array.tobytes())])
        for name, array in base.tensors.items()
    ]
    writer.write(out, base.metadata, content)
    return out


def fused_experts(base: Base) -> None:
    """As llama.cpp's converter writes with --fuse-gate-up-exps."""
    base.fuse("ffn_gate_up_exps.weight", "ffn_gate_exps.weight", "ffn_up_exps.weight")


def fused_attention(base: Base) -> None:
    """As llama.cpp's converter writes with --fuse-qkv."""
    base.fuse("attn_qkv.weight", "attn_q.weight", "attn_k.weight", "attn_v.weight")


def scaled(base: Base) -> None:
    """As NVFP4 checkpoints are converted: a scale beside each matrix, or for each expert."""
    for name in base.matrices():
        array = base.tensors[name]
        matrices = array.shape[0] if array.ndim == 3 else 1
        exponents = np.arange(matrices) % 3 + 1
        # Adding 1 to a BF16 exponent doubles the value.
        steps = (exponents << 7).astype("<u2").reshape(-1, *[1] * (array.ndim - 1))
        base.tensors[name] = np.where(
            array & 0x7FFF, array + steps[: array.shape[0]], array
        ).astype("<u2")
        stem = name.removesuffix("weight")
        base.tensors[f"{stem}scale"] = (2.0**-exponents).astype("<f4")
        base.tensors[f"{stem}input_scale"] = np.ones(matrices, "<f4")


def own_output(base: Base) -> None:
    """A fine-tune that trained its output matrix apart from the embeddings."""
    base.tensors["output.weight"] = base.tensors["token_embd.weight"].copy()


def biased(base: Base, value: float = 0.0) -> None:
    """Queries, keys and values with biases, which change nothing if they are zero."""
    for name in [
        name
        for name in base.tensors
        if name.endswith((".attn_q.weight", ".attn_k.weight", ".attn_v.weight"))
    ]:
        rows = base.tensors[name].shape[0]
        base.tensors[name.replace("weight", "bias")] = np.full(rows, value, "<f4")


def projected(base: Base) -> None:
    """A projection of embeddings for retrieval, with its bias."""
    hidden = base.tensors["token_embd.weight"].shape[1]
    base.tensors["cls.output.weight"] = np.eye(hidden, dtype="<f4")
    base.tensors["cls.output.bias"] = np.ones(hidden, "<f4")


def key_heads_of_each_block(base: Base) -> None:
    """One value for each block where llama.cpp also takes one for all."""
    key = f"{base.metadata['general.architecture'].decode()}.attention.head_count_kv"
    blocks = base.metadata[key.replace("attention.head_count_kv", "block_count")].decode()
    base.set_array(key, [base.metadata[key].decode()] * blocks, GGUFValueType.UINT32)


def resized(count: int) -> Callable[[Base], None]:
    """Embeddings and tokens cut or padded to `count`, as fine-tuning frameworks do."""

    def change(base: Base) -> None:
        for name in {"token_embd.weight", "output.weight"} & base.tensors.keys():
            array = base.tensors[name]
            base.tensors[name] = np.zeros((count, array.shape[1]), array.dtype)
            base.tensors[name][: len(array)] = array[:count]
        tokens, kinds = (base.metadata[key].decode() for key in (TOKENS, TYPES))
        added = range(len(tokens), count)
        base.set_array(
            TOKENS,
            [*tokens[:count], *(f"<|tool_{i}|>" for i in added)],
            GGUFValueType.STRING,
        )
        base.set_array(TYPES, [*kinds[:count], *(3 for _ in added)], GGUFValueType.INT32)

    return change


def grouped_by_key_head(base: Base) -> None:
    """As Qwen3-Next was converted first: queries, keys, values and gates of each key head."""
    heads = base.metadata["qwen3next.ssm.group_count"].decode()
    for name in [name for name in base.tensors if name.endswith(".attn_qkv.weight")]:
        gates = base.tensors.pop(name.replace("attn_qkv", "attn_gate"))
        channels = base.tensors.pop(name)
        keys = (len(channels) - len(gates)) // 2
        kinds = [*np.split(channels, [keys, 2 * keys]), gates]
        grouped = [kind.reshape(heads, -1, kind.shape[1]) for kind in kinds]
        base.tensors[name.replace("attn_qkv", "ssm_in")] = np.concatenate(grouped, axis=1).reshape(
            -1, gates.shape[1]
        )
