"""The conversion plan of a checkpoint: which tensors the GGUF gets, and from which tensors of the checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from mtpforge.checkpoint import fp8
from mtpforge.checkpoint.families.table import Family, Row, Source
from mtpforge.checkpoint.hparams import Hparams
from mtpforge.checkpoint.safetensors import Checkpoint, CheckpointTensor
from mtpforge.errors import CheckpointError
from mtpforge.gguf.reader import TensorInfo

EMBEDDINGS, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
MOST_LAYERS, MOST_EXPERTS = (
    1000,
    200_000,
)  # experts in all layers together; Qwen3.5-397B-A17B has 60 layers and 30,720


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


def plan(checkpoint: Checkpoint, family: Family, hparams: Hparams, part: str) -> list[Planned]:
    """Where each row's values come from, in the order in which upstream writes them. Raises CheckpointError."""
    check_sizes(hparams)
    names = canonical_names(checkpoint, family)
    check_head(names, family, hparams, part)
    if hparams.flag("tie_word_embeddings") and OUTPUT in names:
        _check_tied(checkpoint, names)
        del names[OUTPUT]
    planned = [
        _with_scales(_locate(row, names), names, checkpoint) for row in family.rows(hparams, part)
    ]
    _check_all_used(
        {name: tensor for name, tensor in names.items() if _belongs(name, family, part)}, planned
    )
    # Upstream goes through the shards by name, and through the tensors of a shard by name; what it makes of several tensors
    # comes with the last of them.
    return sorted(
        planned, key=lambda item: max((tensor.shard, tensor.name) for tensor in item.tensors)
    )


def check_sizes(hparams: Hparams) -> None:
    """Refuse a configuration of which a table would outgrow the memory. Raises CheckpointError."""
    layers, experts = (
        hparams.count("num_hidden_layers"),
        hparams.count("num_experts", 1) if hparams.get("num_experts") else 1,
    )
    if layers > MOST_LAYERS or layers * experts > MOST_EXPERTS:
        raise CheckpointError(
            f"config.json: {layers} layers or experts ({experts} a layer): more than any real model has"
        )


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
            raise CheckpointError(
                f"{checkpoint.directory}: {name} and {names[canonical].name} are the same tensor"
            )
        names[canonical] = tensor
    return names


def check_head(
    names: Mapping[str, CheckpointTensor], family: Family, hparams: Hparams, part: str
) -> None:
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
        raise CheckpointError(
            f"no tensor {wanted}, of which {row.name} is made: is the checkpoint complete?"
        )
    tensors: list[CheckpointTensor] = []
    for name in source.names:
        if name not in names:
            raise CheckpointError(
                f"no tensor {name}, of which {row.name} is made: is the checkpoint complete?"
            )
        tensor = names[name]
        if tensor.shape != source.shape:
            raise CheckpointError(
                f"{tensor.shard}: {name} has shape {list(tensor.shape)}, config.json says {list(source.shape)}"
            )
        if tensor.dtype not in ("BF16", "F16", "F32", fp8.DTYPE):
            raise CheckpointError(
                f"{tensor.shard}: {name} is {tensor.dtype}: BF16, F16, F32 and FP8 checkpoints can be converted"
            )
        if tensors and tensor.dtype != tensors[0].dtype:
            raise CheckpointError(
                f"{tensor.shard}: {name} is {tensor.dtype}, {tensors[0].name} is {tensors[0].dtype}"
            )
        tensors.append(tensor)
    return Planned(row, source, tuple(tensors))


def _with_scales(
    item: Planned, names: Mapping[str, CheckpointTensor], checkpoint: Checkpoint
) -> Planned:
    """The same with the scales of its tensors, if they are FP8. Raises CheckpointError where a scale is missing."""
    if item.tensors[0].dtype != fp8.DTYPE:
        return item
    block, scales = fp8.block_size(checkpoint.config), []
    for name, tensor in zip(item.source.names, item.tensors, strict=True):
        scale = names.get(name + fp8.SUFFIX)
        if (
            scale is None
            or scale.shape != fp8.scale_shape(tensor.shape, block)
            or scale.dtype not in ("BF16", "F32")
        ):
            raise CheckpointError(
                f"{tensor.shard}: {name} is FP8 and {name}{fp8.SUFFIX} is missing or of another shape"
            )
        scales.append(scale)
    return replace(item, scales=tuple(scales))


def _check_all_used(names: Mapping[str, CheckpointTensor], planned: list[Planned]) -> None:
    used = {tensor.name for item in planned for tensor in (*item.tensors, *item.scales)}
    unused = [tensor.name for tensor in names.values() if tensor.name not in used]
    if unused:
        named = ", ".join([*unused[:3], *(["..."] if len(unused) > 3 else [])])
        raise CheckpointError(
            f"{len(unused)} tensors have no place in this architecture ({named}): refusing to drop them silently"
        )
