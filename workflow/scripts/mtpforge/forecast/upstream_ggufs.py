"""The GGUFs that llama.cpp's converter will make, about: only the converter knows them exactly.

Shapes and types follow from the checkpoint's tensors, names from gguf-py's tables. A tensor that is
in no table keeps its name, which changes no size.
"""

import re
from collections import Counter
from collections.abc import Iterator
from functools import cache

from gguf.constants import (
    MODEL_ARCH_NAMES,
    MODEL_TENSOR,
    MODEL_TENSORS,
    TENSOR_NAMES,
    GGMLQuantizationType,
    GGUFValueType,
)
from gguf.tensor_mapping import TensorNameMap

from mtpforge.checkpoint import fp8, nvfp4, quantization
from mtpforge.checkpoint.checkpoint import Outline
from mtpforge.checkpoint.hparams import Hparams
from mtpforge.checkpoint.safetensors import CheckpointTensor
from mtpforge.convert import upstream, upstream_head
from mtpforge.convert.tensor_names import is_buffer
from mtpforge.forecast.planned_ggufs import laid_out
from mtpforge.gguf.metadata import Value
from mtpforge.gguf.reader import VISION, Gguf, TensorInfo
from mtpforge.io import text
from mtpforge.llama_cpp.converter_architectures import Architecture, entry_of

_ELSEWHERE = re.compile(r"(^|\.)(visual|vision|audio|embed_vision|embed_audio|multi_modal)\w*\.")
"""Tensors of other modes than text."""
_HELPS = (
    "_scale", "_scale_2", "_scale_inv", "_global_scale", ".scales", ".qzeros", ".g_idx",
    "_zero_point", "_shape",
)  # fmt: skip
"""Endings of what only helps to read packed weights."""
_KEPT = re.compile(r"\.ffn_gate_inp\.|_conv1d|\.hc_|\.indexer\.proj\.")
"""Matrices that stay at F32."""
_F16 = GGMLQuantizationType.F16
_USED = ("num_experts_per_tok", "moe_top_k", "top_k_experts", "num_experts_per_token")
_LAYER = re.compile(r"\blayers\.(\d{1,5})\.(.+)")
_EXPERT = re.compile(r"\.experts\.\d{1,5}\.")


def converted(checkpoint: Outline, part: str) -> Gguf:
    """A part of a checkpoint, whose tokenizer must be in its folder; the shards need not.

    Raises CheckpointError if the converter cannot convert it.
    """
    upstream.check(checkpoint, part)
    if part == "mmproj":
        tower = upstream_head.vision_tensors(checkpoint)
        infos = [TensorInfo(each.name, each.shape, _F16) for each in tower]
        metadata = {"general.architecture": Value.of(VISION, GGUFValueType.STRING)}
        return laid_out(checkpoint.directory, metadata, infos)
    named = [(_name(tensor.name, checkpoint), tensor) for tensor in _tensors(checkpoint, part)]
    experts = Counter(name for name, tensor in named if _EXPERT.search(tensor.name))
    infos = [
        _info(name, tensor, checkpoint, experts=experts[name])
        for name, tensor in dict(named).items()
    ]
    return laid_out(checkpoint.directory, _metadata(checkpoint, part, infos), infos)


def _tensors(checkpoint: Outline, part: str) -> Iterator[CheckpointTensor]:
    """The tensors of a part that are written."""
    head = {tensor.name for tensor in upstream_head.head_tensors(checkpoint)}
    for name, tensor in checkpoint.tensors.items():
        kept = {
            "trunk": name not in head,
            "draft": name in head or ".layers." not in f".{name}",
        }.get(part, True)
        helps = name.endswith(_HELPS) or is_buffer(tensor) or _ELSEWHERE.search(name)
        if kept and not helps and upstream_head.is_written(tensor, checkpoint):
            yield tensor


def _info(name: str, tensor: CheckpointTensor, checkpoint: Outline, experts: int = 0) -> TensorInfo:
    *rows, columns = tensor.shape or (1,)
    kind = "BF16" if rows and not _KEPT.search(name) else "F32"
    if tensor.dtype in ("U8", "I8"):  # two weights in a byte
        columns *= 2
        kind = "NVFP4" if nvfp4.is_nvfp4(checkpoint.config) else "MXFP4"
    elif name.endswith(quantization.CODES):
        bits = quantization.settings_in(checkpoint.config).get("bits")
        columns *= 32 // (8 if bits == 8 else 4)
    elif tensor.dtype in ("I32", "I64"):
        kind = "I32"
    elif tensor.dtype == fp8.DTYPE and entry_of(checkpoint.architecture).repacked:
        kind = "Q8_0"
    shape = (*([experts] if experts else []), *rows, columns)
    return TensorInfo(name, shape, GGMLQuantizationType[kind])


def _name(name: str, checkpoint: Outline) -> str:
    """The name in the GGUF, the same for all experts of a matrix."""
    entry = entry_of(checkpoint.architecture)
    merged = _EXPERT.sub(".experts.", name)
    stem, dot, ending = merged.rpartition(".")
    if ending not in ("weight", "bias"):
        stem, dot, ending = merged, ".", "weight"
    known = _names(entry.gguf)
    block = _block(name, checkpoint, entry)
    if block is None:
        return f"{known.get(stem.replace('language_model.', ''), stem)}{dot}{ending}"
    rest = re.split(r"\.\d{1,5}\.", stem, maxsplit=1)[-1]
    of_experts = re.sub(r".*\bexperts\.(gate|up|down)_proj$", r"ffn_\1_exps", rest)
    return f"blk.{block}.{known.get(f'{{bid}}.{rest}', of_experts)}{dot}{ending}"


def _block(name: str, checkpoint: Outline, entry: Architecture) -> int | None:
    """The number of a tensor's block; None outside of blocks."""
    if entry.prefix and entry.prefix in name:
        layer = upstream_head.layer_of(name, entry) or 0
        return Hparams(checkpoint.config).count("num_hidden_layers") + layer // entry.layers
    found = _LAYER.search(name)
    return int(found[1]) if found else None


@cache
def _names(architecture: str) -> dict[str, str]:
    """GGUF's names of tensors by those of checkpoints, in blocks without what is before `{bid}`."""
    arch = next((key for key, name in MODEL_ARCH_NAMES.items() if name == architecture), None)
    kinds = [*(MODEL_TENSORS[arch] if arch is not None else ()), *MODEL_TENSOR]
    found: dict[str, str] = {}
    for kind in kinds:
        name = TENSOR_NAMES[kind].removeprefix("blk.{bid}.")
        for pattern in TensorNameMap.block_mappings_cfg.get(kind, ()):
            found.setdefault(pattern[pattern.find("{bid}") :], name)
        for pattern in TensorNameMap.mappings_cfg.get(kind, ()):
            found.setdefault(pattern, name)
    return found


def _metadata(checkpoint: Outline, part: str, infos: list[TensorInfo]) -> dict[str, Value]:
    """What the size follows from: architecture, blocks, experts and vocabulary."""
    entry = entry_of(checkpoint.architecture)
    hparams = Hparams(checkpoint.config)
    heads = 0 if part == "trunk" else upstream_head.count_blocks(checkpoint)
    blocks = hparams.count("num_hidden_layers") + (0 if entry.only else heads)
    experts = [info.shape[0] for info in infos if "_exps." in info.name]
    used = next((hparams.get(key) for key in _USED if hparams.has(key)), 0)
    counts = {"block_count": blocks, "nextn_predict_layers": heads}
    if experts and used:
        counts |= {"expert_count": experts[0], "expert_used_count": used}
    metadata = {"general.architecture": Value.of(entry.gguf, GGUFValueType.STRING)}
    for key, count in counts.items():
        metadata[f"{entry.gguf}.{key}"] = Value.of(count, GGUFValueType.UINT32)
    return metadata | _vocabulary(checkpoint)


def _vocabulary(checkpoint: Outline) -> dict[str, Value]:
    """The vocabulary, most of a file's header; empty without a tokenizer.json."""
    path = checkpoint.directory / "tokenizer.json"
    if not text.is_there(path):
        return {}
    settings = text.read_json(path, entries=text.MANY_ENTRIES)
    model = text.member(settings, "model", dict, str(path)) or {}
    tokens = [str(token) for token in text.member(model, "vocab", dict, str(path)) or ()]
    merges = text.member(model, "merges", list, str(path)) or []
    joined = [each if isinstance(each, str) else " ".join(map(str, each)) for each in merges]
    strings = {"tokens": tokens, "merges": joined}
    found = {
        f"tokenizer.ggml.{key}": Value.of(words, GGUFValueType.ARRAY, GGUFValueType.STRING)
        for key, words in strings.items()
        if words
    }
    types = Value.of([1] * len(tokens), GGUFValueType.ARRAY, GGUFValueType.INT32)
    return found | ({"tokenizer.ggml.token_type": types} if tokens else {})
