"""The GGUFs that a build will make, without their weights: tensors, types and sizes."""

import re
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate
from math import prod
from pathlib import Path

import numpy as np
from gguf.constants import GGMLQuantizationType, GGUFValueType

from mtpforge.checkpoint.checkpoint import Outline
from mtpforge.checkpoint.families.registry import family_of
from mtpforge.checkpoint.safetensors import BITS
from mtpforge.convert import native
from mtpforge.convert.plan import check_sizes, settled_hparams
from mtpforge.errors import ToolchainError
from mtpforge.gguf import quant_types, writer
from mtpforge.gguf.head import quantizable
from mtpforge.gguf.metadata import Value
from mtpforge.gguf.reader import Gguf, TensorInfo, aligned
from mtpforge.inject.inject import merged_metadata, planned_head
from mtpforge.io.ranges import FileRange
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.quantize.llama_quantize import default_and_chosen_types
from mtpforge.quantize.mixture import Types
from mtpforge.quantize.pieces import split_by_cost
from mtpforge.quantize.recipe import Recipe, by_recipe, plan_overrides
from mtpforge.quantize.request import QuantizeRequest


def converted(outline: Outline, part: str, tokenizer_pre: str | None = None) -> Gguf:
    """The BF16 GGUF of a part, as conversion will write it. Raises CheckpointError.

    The files that describe the checkpoint must be in its folder, the shards need not.
    """
    family = family_of(outline.architecture)
    hparams = settled_hparams(outline, family)
    check_sizes(hparams)
    infos = [TensorInfo(row.name, row.shape, row.type) for row in family.rows(hparams, part)]
    metadata = native.describe(
        outline, family, hparams, part=part, infos=infos, tokenizer_pre=tokenizer_pre
    )
    return laid_out(outline.directory, metadata, infos)


def quantized(
    source: Gguf, request: QuantizeRequest, llama: LlamaCpp, covered: bool = False
) -> Gguf:
    """The GGUF that llama-quantize will make of `source`. Raises ForgeError.

    `covered`: whether there will be an importance matrix, which changes some types. Before the
    program is built, its mixture is estimated: see `is_exact`.
    """
    if not is_exact(llama):
        return estimated(source, request)
    return _at(source, _chosen_types(source, request, llama, covered), request.file_type)


def estimated(source: Gguf, request: QuantizeRequest) -> Gguf:
    """The same without llama-quantize, about. Raises ConfigError."""
    return _at(source, _estimated_types(source, request), request.file_type)


def _at(source: Gguf, types: Types, file_type: str) -> Gguf:
    infos = [replace(info, type=types[name]) for name, info in source.tensors.items()]
    added = {
        "general.quantization_version": Value.of(2, GGUFValueType.UINT32),
        "general.file_type": Value.of(quant_types.FILE_TYPES[file_type], GGUFValueType.UINT32),
    }
    return laid_out(source.path, source.metadata | added, infos)


def is_exact(llama: LlamaCpp) -> bool:
    """Whether llama-quantize is there, so that sizes are exact and not only about right."""
    with suppress(ToolchainError):
        return bool(llama.find("llama-quantize"))
    return False


def injected(base: Gguf, head: Gguf, types: Recipe) -> Gguf:
    """The GGUF of a base with the head at these types. Raises ForgeError."""
    infos = [*base.trunk.tensors.values(), *planned_head(head, types)]
    tensors = [(info, ()) for info in infos]
    metadata = writer.padded(merged_metadata(base, head), tensors, base.trunk)
    return laid_out(base.path, metadata, infos)


def size(file: Gguf) -> int:
    """Its bytes."""
    last = max(file.ranges.values(), key=lambda place: place.offset)
    return aligned(last.offset + last.size)


def quantize_seconds(source: Gguf, made: Gguf) -> float:
    """Approximate CPU seconds of llama-quantize."""
    return sum(_costs(source, made).values())


def largest_piece(source: Gguf, made: Gguf, count: int) -> int:
    """Bytes that the largest of `count` pieces has in the source."""
    pieces = split_by_cost(_costs(source, made), count)
    return max(sum(source.tensors[name].size for name in piece) for piece in pieces)


def _costs(source: Gguf, made: Gguf) -> dict[str, float]:
    """CPU seconds for each tensor, in the order of the source."""
    kinds = {
        name: "BF16" if made.tensors[name].type == info.type else made.tensors[name].type.name
        for name, info in source.tensors.items()
    }
    return {
        name: source.tensors[name].elements * quant_types.SECONDS[kind] / 1e9
        for name, kind in kinds.items()
    }


def laid_out(path: Path, metadata: Mapping[str, Value], infos: Sequence[TensorInfo]) -> Gguf:
    """A GGUF that is on no disk, with the byte range that each tensor would have."""
    start = len(writer.header(metadata, infos))
    offsets = accumulate((aligned(info.size) for info in infos), initial=start)
    ranges = {
        info.name: FileRange(path, offset, info.size)
        for info, offset in zip(infos, offsets, strict=False)
    }
    return Gguf(path, dict(metadata), tensors={info.name: info for info in infos}, ranges=ranges)


def share_per_token(trunk: Gguf) -> float:
    """The share of a trunk that is read to decode a token: of experts, only those that run."""
    experts = trunk.get(f"{trunk.architecture}.expert_count") or 1
    used = trunk.get(f"{trunk.architecture}.expert_used_count") or 1
    read = 0.0
    for name, info in trunk.tensors.items():
        is_row = name == "token_embd.weight" and "output.weight" in trunk.tensors
        read += 0 if is_row else info.size * (used / experts if "_exps." in name else 1)
    return read / sum(info.size for info in trunk.tensors.values())


def computed_share(outline: Outline) -> float:
    """The share of a checkpoint's weights that it has in 8 or 4 bits, so that they are computed."""
    weights = [0, 0]
    for each in outline.tensors.values():
        in_one = 2 if each.dtype == "U8" else 1
        weights[BITS[each.dtype] <= 8] += in_one * prod(each.shape)
    return weights[True] / sum(weights)


def _chosen_types(source: Gguf, request: QuantizeRequest, llama: LlamaCpp, covered: bool) -> Types:
    with tempfile.TemporaryDirectory() as folder:
        matrix = _placeholder_imatrix(Path(folder), source) if covered else None
        asked = replace(request, imatrix=matrix)
        return default_and_chosen_types(source, asked, llama)[1]


def _estimated_types(source: Gguf, request: QuantizeRequest) -> Types:
    """About the mixture of a file type: one type for all blocks, and Q6_K for the embeddings."""
    overrides = plan_overrides(source, request.file_type, head=request.head, recipe=())
    of_head = dict(overrides)
    of_trunk = by_recipe(source.tensors, request.recipe)
    usual = quant_types.main_type(request.file_type)
    types = {}
    for name, info in source.tensors.items():
        default = "Q6_K" if name in quant_types.EMBEDDINGS and usual != "Q8_0" else usual
        asked = of_head.get(rf"^{re.escape(name)}$") or of_trunk.get(name, default)
        kind = quant_types.effective_type(asked, info.shape[-1])
        changes = quantizable(info, source.architecture)
        types[name] = GGMLQuantizationType[kind if changes else info.type.name]
    return types


def _placeholder_imatrix(folder: Path, source: Gguf) -> Path:
    """An importance matrix for one tensor: a dry run only asks whether there is one."""
    name = next(name for name, info in source.tensors.items() if len(info.shape) > 1)
    columns = source.tensors[name].shape[-1]
    path = folder / "imatrix.gguf"
    metadata = {
        "general.type": Value.of("imatrix", GGUFValueType.STRING),
        "imatrix.datasets": Value.of(["none"], GGUFValueType.ARRAY, GGUFValueType.STRING),
        "imatrix.chunk_count": Value.of(1, GGUFValueType.UINT32),
        "imatrix.chunk_size": Value.of(512, GGUFValueType.UINT32),
    }
    rows = {f"{name}.in_sum2": (1, columns), f"{name}.counts": (1, 1)}
    tensors = [
        (TensorInfo(key, shape, GGMLQuantizationType.F32), [np.ones(shape, "<f4").data.cast("B")])
        for key, shape in rows.items()
    ]
    writer.write(path, metadata, tensors)
    return path
