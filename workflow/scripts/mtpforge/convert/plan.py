"""Plans a conversion: which tensors the GGUF gets, and from which tensors of the checkpoint."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from mtpforge.checkpoint import fp8
from mtpforge.checkpoint.checkpoint import Outline
from mtpforge.checkpoint.families.family import Family, Row, Source, unchanged
from mtpforge.checkpoint.hparams import Hparams
from mtpforge.checkpoint.model_files import INDEX
from mtpforge.checkpoint.safetensors import CheckpointTensor
from mtpforge.convert.tensor_names import EMBEDDINGS, OUTPUT, canonical_names
from mtpforge.errors import CheckpointError
from mtpforge.gguf.reader import TensorInfo

# Limits of a plausible configuration. Qwen3.5-397B-A17B has 60 layers and 30,720 experts in total.
MOST_LAYERS = 1000
MOST_EXPERTS = 200_000

PLACEHOLDER = (
    "a placeholder of DeepSpeed ZeRO-3: gather the weights (zero_to_fp32.py, or "
    "stage3_gather_16bit_weights_on_model_save) and save them again"
)
_TIED = "tie_word_embeddings"
_HEADLESS = "build without a head (`head: none` in config.yaml, or --part trunk)"


@dataclass(frozen=True)
class ConvertedTensor:
    """A tensor of the GGUF and the checkpoint's tensors for it, in the order of `source`."""

    row: Row
    source: Source
    tensors: tuple[CheckpointTensor, ...]
    scales: tuple[CheckpointTensor | None, ...] = ()
    """If one of `tensors` is FP8, the scale of each; None for one that is not FP8."""

    @property
    def info(self) -> TensorInfo:
        """The tensor's entry in the GGUF."""
        return TensorInfo(self.row.name, self.row.shape, self.row.type)


def plan_conversion(
    checkpoint: Outline, family: Family, hparams: Hparams, part: str
) -> list[ConvertedTensor]:
    """Find the source of each tensor of a part, in upstream's order. Raises CheckpointError."""
    check_sizes(hparams)
    names = canonical_names(checkpoint, family)
    if part not in ("trunk", "shared"):
        _check_lost(checkpoint, family, names)
        check_head(names, family, hparams)
    if hparams.flag(_TIED) and OUTPUT in names:
        _check_tied(checkpoint, names)
        del names[OUTPUT]
    planned = [
        _plan_row(row, names, checkpoint=checkpoint, family=family)
        for row in family.rows(hparams, part)
    ]
    _check_all_used(
        {name: names[name] for name in names if _belongs(name, family, part)}, planned, family
    )
    # Upstream goes through shards and their tensors by name, and writes a tensor made from several
    # when it has seen the last of them.
    return sorted(planned, key=lambda item: max((t.shard, t.name) for t in item.tensors))


def check_sizes(hparams: Hparams) -> None:
    """Refuse a configuration whose table would exhaust the memory. Raises CheckpointError."""
    layers = hparams.count("num_hidden_layers")
    experts = hparams.count("num_experts", 1) if hparams.has("num_experts") else 1
    if layers > MOST_LAYERS or layers * experts > MOST_EXPERTS:
        raise CheckpointError(
            f"config.json: {layers} layers with {experts} experts each: more than any real model"
        )


def settled_hparams(checkpoint: Outline, family: Family) -> Hparams:
    """Return the hyperparameters, with `tie_word_embeddings` and constants as the tensors say.

    Savers write the former to either level of config.json, or to both with different values. Raises
    CheckpointError.
    """
    hparams = Hparams(checkpoint.config)
    names = canonical_names(checkpoint, family)
    levels = [checkpoint.config, checkpoint.config.get("text_config", {})]
    said = {
        Hparams({_TIED: level[_TIED]}).flag(_TIED)
        for level in levels
        if level.get(_TIED) is not None
    }
    if OUTPUT not in names:
        tied = True in said or (not said and EMBEDDINGS in names)
    else:
        tied = said == {True} or (True in said and _same_values(checkpoint, names))
    constants = {
        name.rpartition(".")[2]: numbers
        for name, tensor in checkpoint.tensors.items()
        if name.endswith(family.constants)
        for numbers in [checkpoint.integers(tensor)]
        if numbers is not None
    }
    return Hparams({**hparams.values, **constants, "text_config": {}, _TIED: tied})


def check_head(names: Mapping[str, CheckpointTensor], family: Family, hparams: Hparams) -> None:
    """Check that there is a head of one layer, as configured. Raises CheckpointError.

    A configuration may leave the head out: some tools remove the key, and Qwen3-Next has none.
    """
    declared = hparams.get("mtp_num_hidden_layers", 0)
    head = [name for name in names if name.startswith(family.head_prefix)]
    if not head:
        raise CheckpointError(
            f"no {family.head_prefix}* tensors: this checkpoint has lost its head "
            f"(config.json declares {declared} layers): take the original's (`head_from`, "
            f"--head-from), or {_HEADLESS}"
        )
    if more := [name for name in head if re.search(r"\.layers\.[1-9]\d*\.", name)]:
        raise CheckpointError(
            f"{more[0]}: the head has more than one layer, which is not supported: {_HEADLESS}"
        )
    if type(declared) is not int or declared not in (0, 1):
        raise CheckpointError(
            f"config.json: mtp_num_hidden_layers is {declared!r}, but the checkpoint has tensors "
            f"of a one-layer head: correct the wrong one, or {_HEADLESS}"
        )


def _check_lost(checkpoint: Outline, family: Family, names: Mapping[str, CheckpointTensor]) -> None:
    """Refuse an index that lists tensors of the head which no shard has."""
    lost = {
        family.canonical(name): shard
        for name, shard in sorted(checkpoint.lost.items())
        if family.canonical(name).startswith(family.head_prefix)
    }
    if not lost:
        return
    name, shard = next(iter(lost.items()))
    if shard not in checkpoint.files:
        raise CheckpointError(
            f"{checkpoint.directory / shard}: missing, and it has {len(lost)} tensors of the head "
            f"({name}, ...): download it again, take the original's (`head_from`, --head-from), "
            f"or {_HEADLESS}"
        )
    partly = any(known.startswith(family.head_prefix) for known in names)
    raise CheckpointError(
        f"{checkpoint.directory / INDEX}: lists {len(lost)} tensors of the head ({name}, ...) that "
        f"the shards lack: the head is {'incomplete' if partly else 'lost'}, the index is stale: "
        f"take the original's (`head_from`, --head-from), or {_HEADLESS}"
    )


def _belongs(name: str, family: Family, part: str) -> bool:
    """Whether a part must use this tensor. A draft model may ignore the rest of the trunk."""
    is_head = name.startswith(family.head_prefix)
    return {"all": True, "trunk": not is_head, "shared": False}.get(part, is_head)


def _check_tied(checkpoint: Outline, names: Mapping[str, CheckpointTensor]) -> None:
    """Check that a second copy of tied embeddings is identical. Raises CheckpointError."""
    output = names[OUTPUT]
    if not _same_values(checkpoint, names):
        if EMBEDDINGS in names:
            _check_tensor(OUTPUT, output, names[EMBEDDINGS].shape)
        raise CheckpointError(
            f"{output.shard}: {output.name} differs from the embeddings, but config.json ties them "
            "(tie_word_embeddings): set it to false if the output matrix was trained separately"
        )


def _same_values(checkpoint: Outline, names: Mapping[str, CheckpointTensor]) -> bool:
    """Whether the output matrix is a copy of the embeddings."""
    embeddings = names.get(EMBEDDINGS)
    return embeddings is not None and checkpoint.same(names[OUTPUT], embeddings)


def _plan_row(
    row: Row, names: Mapping[str, CheckpointTensor], checkpoint: Outline, family: Family
) -> ConvertedTensor:
    """Find the source of a tensor, with its scales. Raises CheckpointError."""
    try:
        return _with_scales(_locate(row, names), names, checkpoint)
    except (_ShapeError, _MissingError, _PlaceholderError) as error:
        if not row.sources[0].names[0].startswith(family.head_prefix):
            raise
        raise CheckpointError(f"{error}{error.OF_HEAD}{_HEADLESS}") from None


class _ShapeError(CheckpointError):
    """A tensor has another shape than config.json says."""

    OF_HEAD = (
        ": the head does not fit the trunk, which was changed without it (pruned experts?): use a "
        "head of the trunk's sizes, or "
    )


class _PlaceholderError(CheckpointError):
    """A tensor is a placeholder."""

    OF_HEAD = ", or "


class _MissingError(CheckpointError):
    """A tensor is missing."""

    OF_HEAD = " If it is, use the original's head (`head_from`, --head-from), or "


def _locate(row: Row, names: Mapping[str, CheckpointTensor]) -> ConvertedTensor:
    """Find the layout in which the checkpoint has a tensor. Raises CheckpointError."""
    sources = [source for source in row.sources if source.names[0] in names]
    if not sources:
        raise _missing(" or ".join(dict.fromkeys(s.names[0] for s in row.sources)), row)
    fitting = [source for source in sources if names[source.names[0]].shape == source.shape]
    source = (fitting or sources)[0]
    tensors: list[CheckpointTensor] = []
    for name in source.names:
        if name not in names:
            raise _missing(name, row)
        tensor = names[name]
        _check_tensor(name, tensor, source.shape)
        if source.view is not unchanged and tensors and tensor.dtype != tensors[0].dtype:
            raise CheckpointError(
                f"{tensor.shard}: {name} is {tensor.dtype}, {tensors[0].name} is {tensors[0].dtype}"
            )
        tensors.append(tensor)
    return ConvertedTensor(row, source, tuple(tensors))


def _missing(name: str, row: Row) -> _MissingError:
    if name == OUTPUT:
        return _MissingError(
            f"no tensor {OUTPUT}, and config.json does not tie the embeddings: is the checkpoint "
            "complete? If they are tied, set tie_word_embeddings to true"
        )
    return _MissingError(f"no tensor {name}, needed for {row.name}: is the checkpoint complete?")


def _check_tensor(name: str, tensor: CheckpointTensor, shape: tuple[int, ...]) -> None:
    if tensor.shape in ((0,), (1,)) and shape != (1,):
        raise _PlaceholderError(
            f"{tensor.shard}: {name} has shape {list(tensor.shape)}: {PLACEHOLDER}"
        )
    if tensor.dtype not in ("BF16", "F16", "F32", fp8.DTYPE):
        raise CheckpointError(
            f"{tensor.shard}: {name} is {tensor.dtype}: only BF16, F16, F32 and FP8 (E4M3) "
            "can be converted"
        )
    if tensor.shape != shape:
        raise _ShapeError(
            f"{tensor.shard}: {name} has shape {list(tensor.shape)}, config.json says {list(shape)}"
        )


def _with_scales(
    item: ConvertedTensor, names: Mapping[str, CheckpointTensor], checkpoint: Outline
) -> ConvertedTensor:
    """Add the scales of FP8 tensors. Raises CheckpointError if one is missing or malformed."""
    if all(tensor.dtype != fp8.DTYPE for tensor in item.tensors):
        return item
    if len(item.tensors) > 1 and item.source.view is not unchanged:
        raise CheckpointError(
            f"{item.tensors[0].shard}: {item.tensors[0].name} is {fp8.DTYPE}: only BF16, F16 and "
            f"F32 can be joined to {item.row.name}"
        )
    block = fp8.block_size(checkpoint.config)
    scales = tuple(
        fp8.scale_of(name, names, block) if tensor.dtype == fp8.DTYPE else None
        for name, tensor in zip(item.source.names, item.tensors, strict=True)
    )
    return replace(item, scales=scales)


def _check_all_used(
    names: Mapping[str, CheckpointTensor], planned: list[ConvertedTensor], family: Family
) -> None:
    used = {tensor.name for item in planned for tensor in (*item.tensors, *item.scales) if tensor}
    unused = {name: tensor.name for name, tensor in names.items() if tensor.name not in used}
    fp8.check_leftover(names, unused)
    if unused:
        named = ", ".join([*list(unused.values())[:3], *(["..."] if len(unused) > 3 else [])])
        of_head = all(name.startswith(family.head_prefix) for name in unused)
        raise CheckpointError(
            f"this architecture does not use {len(unused)} tensors of the checkpoint ({named}): "
            f"refusing to drop them silently{f': {_HEADLESS}' if of_head else ''}"
        )
