"""A checkpoint to a BF16 GGUF with its head as block N, without torch and without holding a tensor in memory.

What the file must contain comes from the family's table; each row takes its values from the checkpoint through views, so
that most bytes go from shard to GGUF inside the kernel. Tensors are stored in upstream's order.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import yaml
from gguf import GGUFWriter, Metadata, size_label
from gguf.constants import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFType, GGUFValueType
from gguf.gguf_writer import GGUFValue

from . import fp8, gguf_file, tokenizer
from .checkpoint import Checkpoint, CheckpointTensor
from .errors import CheckpointError, GgufError
from .families import Family, Hparams, Row, Source, family_of
from .families.table import BF16, F32, identity
from .gguf_file import TensorInfo, Value
from .ranges import CHUNK, Payload

PARTS = ("all", "trunk", "head", "draft")
SLICE = 1 << 17  # values that are worked on at a time: what a processor's cache holds
EMBEDDINGS, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
MOST_LAYERS, MOST_EXPERTS = 1000, 200_000  # experts in all layers together; Qwen3.5-397B-A17B has 60 layers and 30,720


@dataclass(frozen=True)
class Planned:
    """A row, the layout in which this checkpoint has it, and the checkpoint's tensors in that layout's order."""

    row: Row
    source: Source
    tensors: tuple[CheckpointTensor, ...]
    scales: tuple[CheckpointTensor, ...] = ()
    """Of an FP8 row, the scales of each of `tensors`."""

    @property
    def info(self) -> TensorInfo:
        """The tensor's entry in the GGUF."""
        return TensorInfo(self.row.name, self.row.shape, self.row.type)

    @property
    def dtype(self) -> str:
        """The type in which `arrays` has the row, the same for all its tensors."""
        return "F32" if self.scales else self.tensors[0].dtype


def convert(
    directory: Path,
    out: Path,
    part: str = "all",
    tokenizer_pre: str | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write the `part` (all, trunk, head or draft) of a checkpoint as a BF16 GGUF. Raises CheckpointError.

    A head alone carries no tokenizer: it is there to be quantized and injected. A draft is the head with what it shares with
    the trunk (embeddings, output norm and matrix), which llama-server takes beside a trunk.
    """
    checkpoint = Checkpoint(directory)
    family, hparams = family_of(checkpoint.architecture), Hparams(checkpoint.config)
    planned = plan(checkpoint, family, hparams, part)
    metadata = describe(checkpoint, family, hparams, part, [item.info for item in planned], tokenizer_pre)
    gguf_file.write(out, metadata, [(item.info, payload(checkpoint, item)) for item in planned], progress)


def plan(checkpoint: Checkpoint, family: Family, hparams: Hparams, part: str) -> list[Planned]:
    """Where each row's values come from, in the order in which upstream writes them. Raises CheckpointError."""
    check_sizes(hparams)
    names = canonical_names(checkpoint, family)
    check_head(names, family, hparams, part)
    if hparams.flag("tie_word_embeddings") and OUTPUT in names:
        _check_tied(checkpoint, names)
        del names[OUTPUT]
    planned = [_with_scales(_locate(row, names), names, checkpoint) for row in family.rows(hparams, part)]
    _check_all_used({name: tensor for name, tensor in names.items() if _belongs(name, family, part)}, planned)
    # Upstream goes through the shards by name, and through the tensors of a shard by name; what it makes of several tensors
    # comes with the last of them.
    return sorted(planned, key=lambda item: max((tensor.shard, tensor.name) for tensor in item.tensors))


def check_sizes(hparams: Hparams) -> None:
    """Refuse a configuration of which a table would outgrow the memory. Raises CheckpointError."""
    layers, experts = hparams.count("num_hidden_layers"), hparams.count("num_experts", 1) if hparams.get("num_experts") else 1
    if layers > MOST_LAYERS or layers * experts > MOST_EXPERTS:
        raise CheckpointError(f"config.json: {layers} layers or experts ({experts} a layer): more than any real model has")


def _belongs(name: str, family: Family, part: str) -> bool:
    """Whether a part must have a place for this tensor: a draft's other ones are the trunk's affair."""
    return part == "all" or name.startswith(family.head_prefix) == (part != "trunk")


def canonical_names(checkpoint: Checkpoint, family: Family) -> dict[str, CheckpointTensor]:
    """The tensors of the text model by the names that the tables use, whatever wrapper class saved them."""
    names: dict[str, CheckpointTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        if name.startswith(family.ignored):
            continue
        canonical = family.canonical(name)
        if canonical in names:
            raise CheckpointError(f"{checkpoint.directory}: {name} and {names[canonical].name} are the same tensor")
        names[canonical] = tensor
    return names


def check_head(names: Mapping[str, CheckpointTensor], family: Family, hparams: Hparams, part: str) -> None:
    """The tensors say whether there is a head; the configuration must not contradict them. Raises CheckpointError."""
    present = any(name.startswith(family.head_prefix) for name in names)
    declared = hparams.get("mtp_num_hidden_layers", 0)
    if part == "trunk":
        return
    if not present:
        raise CheckpointError(
            f"no {family.head_prefix}* tensors: this checkpoint has lost its head (config.json declares {declared} layers of it): "
            "take the original checkpoint, or build without a head (`head: none` in config.yaml, or --part trunk)"
        )
    if declared != 1 and (declared or family.declares_head):
        raise CheckpointError(
            f"config.json: mtp_num_hidden_layers is {declared!r}, but there are tensors of a one-layer head: correct the one that "
            "is wrong, or build without a head (`head: none` in config.yaml, or --part trunk)"
        )


def _check_tied(checkpoint: Checkpoint, names: Mapping[str, CheckpointTensor]) -> None:
    """Some tools save tied embeddings twice. The second copy is left out, but only if it is one. Raises CheckpointError."""
    output, embeddings = names[OUTPUT], names.get(EMBEDDINGS)
    if embeddings is None or checkpoint.digest(output) != checkpoint.digest(embeddings):
        raise CheckpointError(
            f"{output.shard}: {output.name} is not equal to the embeddings, and config.json says that it is (tie_word_embeddings): "
            "set tie_word_embeddings to false if it was trained by itself"
        )


def _locate(row: Row, names: Mapping[str, CheckpointTensor]) -> Planned:
    for source in row.sources:
        if source.names[0] in names:
            break
    else:
        wanted = " or ".join(source.names[0] for source in row.sources)
        raise CheckpointError(f"no tensor {wanted}, of which {row.name} is made: is the checkpoint complete?")
    tensors: list[CheckpointTensor] = []
    for name in source.names:
        if name not in names:
            raise CheckpointError(f"no tensor {name}, of which {row.name} is made: is the checkpoint complete?")
        tensor = names[name]
        if tensor.shape != source.shape:
            raise CheckpointError(f"{tensor.shard}: {name} has shape {list(tensor.shape)}, config.json says {list(source.shape)}")
        if tensor.dtype not in ("BF16", "F16", "F32", fp8.DTYPE):
            raise CheckpointError(f"{tensor.shard}: {name} is {tensor.dtype}: BF16, F16, F32 and FP8 checkpoints can be converted")
        if tensors and tensor.dtype != tensors[0].dtype:
            raise CheckpointError(f"{tensor.shard}: {name} is {tensor.dtype}, {tensors[0].name} is {tensors[0].dtype}")
        tensors.append(tensor)
    return Planned(row, source, tuple(tensors))


def _with_scales(item: Planned, names: Mapping[str, CheckpointTensor], checkpoint: Checkpoint) -> Planned:
    """The same with the scales of its tensors, if they are FP8. Raises CheckpointError where a scale is missing."""
    if item.tensors[0].dtype != fp8.DTYPE:
        return item
    block, scales = fp8.block_size(checkpoint.config), []
    for name, tensor in zip(item.source.names, item.tensors, strict=True):
        scale = names.get(name + fp8.SUFFIX)
        if scale is None or scale.shape != fp8.scale_shape(tensor.shape, block) or scale.dtype not in ("BF16", "F32"):
            raise CheckpointError(f"{tensor.shard}: {name} is FP8 and {name}{fp8.SUFFIX} is missing or of another shape")
        scales.append(scale)
    return replace(item, scales=tuple(scales))


def _check_all_used(names: Mapping[str, CheckpointTensor], planned: list[Planned]) -> None:
    used = {tensor.name for item in planned for tensor in (*item.tensors, *item.scales)}
    unused = [tensor.name for tensor in names.values() if tensor.name not in used]
    if unused:
        named = ", ".join([*unused[:3], *(["..."] if len(unused) > 3 else [])])
        raise CheckpointError(f"{len(unused)} tensors have no place in this architecture ({named}): refusing to drop them silently")


# ── values ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def payload(checkpoint: Checkpoint, item: Planned) -> Payload:
    """The row's bytes: ranges of the shards where nothing changes, computed slices where something does."""
    if item.row.change is identity and item.row.type is BF16 and item.dtype == "BF16":
        for view in item.source.view([checkpoint.array(tensor) for tensor in item.tensors]):
            for block in blocks(view):
                yield checkpoint.locate(block) or block.data
    else:
        for piece in values(checkpoint, item):
            yield encode(piece, item.row.type)
    checkpoint.release()


def values(checkpoint: Checkpoint, item: Planned) -> Iterator[np.ndarray]:
    """The row's values as flat float32 slices of whole rows, in the order and with the changes that the GGUF should have."""
    if item.scales:
        pieces = _dequantized(checkpoint, item)
    else:
        views = item.source.view([checkpoint.array(tensor) for tensor in item.tensors])
        pieces = (decode(piece, item.dtype) for view in views for (piece,) in cut([view]))
    for piece in pieces:
        yield item.row.change(piece.reshape(-1))
        checkpoint.release()


def _dequantized(checkpoint: Checkpoint, item: Planned) -> Iterator[np.ndarray]:
    """The values of an FP8 row; each code finds its scale by where it came from, so a view may take it anywhere."""
    block = fp8.block_size(checkpoint.config)
    for tensor, scale in zip(item.tensors, item.scales, strict=True):
        scales = decode(checkpoint.array(scale), scale.dtype)
        # Rows that are made of several tensors are stacks of them, so a view of one tensor is a view of its part.
        sources = [checkpoint.array(tensor), *fp8.scale_index(tensor.shape, block)]
        for views in zip(*(item.source.view([source]) for source in sources), strict=True):
            for codes, rows, columns in cut(views):
                yield fp8.VALUES[codes] * scales.reshape(-1)[rows + columns]


def rows(checkpoint: Checkpoint, item: Planned, numbers: np.ndarray) -> np.ndarray:
    """The values that the GGUF should have in some rows of a tensor, as float32 [rows, row length]; no other is read.

    `numbers` are ascending, and count the rows of all matrices of the tensor.
    """
    width, done, found = item.row.shape[-1], 0, []
    if numbers[-1] - numbers[0] >= len(numbers):
        for tensor in item.tensors:
            checkpoint.scatter(tensor)
    for views, decoded in _parts(checkpoint, item):
        count = views[0].size // width
        first, last = np.searchsorted(numbers, (done, done + count))
        if first < last:
            found.append(decoded(*(_pick(view, numbers[first:last] - done, width) for view in views)))
        done += count
    values = item.row.change(np.concatenate(found))
    checkpoint.release()
    return values


def _parts(checkpoint: Checkpoint, item: Planned) -> Iterator[tuple[list[np.ndarray], Callable[..., np.ndarray]]]:
    """Views that one after the other have the row's values, with how to decode these; of FP8, codes and places of their scales."""
    if not item.scales:
        for view in item.source.view([checkpoint.array(tensor) for tensor in item.tensors]):
            yield [view], lambda values: decode(values, item.dtype)
        return
    block = fp8.block_size(checkpoint.config)
    for tensor, scale in zip(item.tensors, item.scales, strict=True):

        def decoded(codes: np.ndarray, rows: np.ndarray, columns: np.ndarray, scale: CheckpointTensor = scale) -> np.ndarray:
            return np.asarray(fp8.VALUES[codes] * decode(checkpoint.array(scale), scale.dtype).reshape(-1)[rows + columns])

        sources = [checkpoint.array(tensor), *fp8.scale_index(tensor.shape, block)]
        for views in zip(*(item.source.view([source]) for source in sources), strict=True):
            yield list(views), decoded


def _pick(view: np.ndarray, numbers: np.ndarray, width: int) -> np.ndarray:
    """Rows of `width` values out of a view, in which a row may be split into several axes."""
    axis, size = view.ndim, 1
    while size < width:
        axis -= 1
        size *= view.shape[axis]
    leading = view.shape[:axis]
    return (view[np.unravel_index(numbers, leading)] if leading else view).reshape(len(numbers), width)


def cut(views: Sequence[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Views of one shape in slices along their leading axes, of bounded size: whole rows, many at a time."""
    entries, size = len(views[0]), views[0].size // len(views[0])
    if size > SLICE:
        for i in range(entries):
            yield from cut([view[i] for view in views])
    else:
        step = SLICE // size
        for start in range(0, entries, step):
            yield [view[start : start + step] for view in views]


def blocks(view: np.ndarray) -> Iterator[np.ndarray]:
    """`view` cut along its leading axes into C-contiguous pieces, copied only where the view itself is not contiguous."""
    if view.flags.c_contiguous:
        yield view
    elif view.nbytes <= CHUNK:
        yield np.ascontiguousarray(view)
    else:
        for entry in view:
            yield from blocks(entry)


def decode(array: np.ndarray, dtype: str) -> np.ndarray:
    """Checkpoint values as float32, exactly."""
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float32)


def encode(array: np.ndarray, kind: GGMLQuantizationType) -> memoryview:
    """float32 values as the bytes of F32, or of BF16 rounded to nearest even. Raises CheckpointError on NaN in BF16."""
    if kind is F32:
        return np.ascontiguousarray(array, dtype="<f4").data
    if np.isnan(array).any():
        raise CheckpointError("a weight is not a number (NaN): the checkpoint is damaged")
    bits = array.view(np.uint32)
    rounded: np.ndarray = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return rounded.astype("<u2").data


# ── metadata ────────────────────────────────────────────────────────────────────────────────────────────────────────


def describe(
    checkpoint: Checkpoint,
    family: Family,
    hparams: Hparams,
    part: str,
    infos: list[TensorInfo],
    tokenizer_pre: str | None,
) -> dict[str, Value]:
    """All metadata in upstream's order."""
    writer = GGUFWriter(path=None, arch=family.gguf_architecture)
    for info in infos:
        writer.add_tensor_info(info.name, info.shape, np.dtype(np.float32), info.size, raw_dtype=info.type)
    writer.add_type(GGUFType.MODEL)
    _model_metadata(checkpoint.directory, writer).set_gguf_meta_model(writer)
    family.describe(writer, hparams, 0 if part == "trunk" else 1)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    if part == "head":
        writer.add_vocab_size(hparams.count("vocab_size"))  # has no embeddings that would tell which model it belongs to
    else:
        tokenizer.describe(writer, checkpoint.directory, hparams.count("vocab_size"), tokenizer_pre)
    return {key: _encoded(key, entry) for key, entry in writer.kv_data[0].items()}


def _encoded(key: str, entry: GGUFValue) -> Value:
    if isinstance(entry.value, Value):  # made while something else was at work
        return entry.value
    try:
        item = entry.sub_type
        if entry.type is GGUFValueType.ARRAY and item is None:
            item = GGUFValueType.get_type(entry.value[0])
        return Value.of(entry.value, entry.type, item)
    except (GgufError, ValueError, TypeError, LookupError) as error:
        raise CheckpointError(f"{key}: the checkpoint gives a value that a GGUF cannot hold ({error})") from None


def _model_metadata(directory: Path, writer: GGUFWriter) -> Metadata:
    """Name, license, tags and sampling defaults from the model card and its neighbours, as gguf-py derives them."""
    total, shared, experts, expert_count = writer.get_total_parameter_count()
    try:
        metadata = Metadata.load(None, directory, None, total)
        # gguf 0.19.0 does not know the name under which generation_config.json has it; the pinned upstream does.
        generation = Metadata.load_generation_config(directory)
        metadata.sampling_penalty_repeat = generation.get("repetition_penalty", metadata.sampling_penalty_repeat)
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, yaml.YAMLError) as error:
        what = str(error).partition("\n")[0]
        raise CheckpointError(f"{directory}: README.md, generation_config.json or config.json is malformed ({what})") from None
    metadata.name = metadata.name or directory.name
    metadata.size_label = metadata.size_label or size_label(total, shared, experts, expert_count)
    return metadata
