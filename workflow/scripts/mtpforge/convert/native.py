"""A checkpoint to a BF16 GGUF with its head as block N, without torch and without holding a tensor in memory.

What the file must contain comes from the family's table; each row takes its values from the checkpoint through views, so
that most bytes go from shard to GGUF inside the kernel. Tensors are stored in upstream's order.
"""

from pathlib import Path

import numpy as np
import yaml
from gguf import GGUFWriter, Metadata, size_label
from gguf.constants import GGML_QUANT_VERSION, GGUFType, GGUFValueType
from gguf.gguf_writer import GGUFValue

from mtpforge.checkpoint.families.registry import family_of
from mtpforge.checkpoint.families.table import Family
from mtpforge.checkpoint.hparams import Hparams
from mtpforge.checkpoint.safetensors import Checkpoint
from mtpforge.convert import tokenizer
from mtpforge.convert.plan import plan
from mtpforge.convert.values import payload
from mtpforge.errors import CheckpointError, GgufError
from mtpforge.gguf.metadata import Value
from mtpforge.gguf.reader import TensorInfo
from mtpforge.gguf.writer import write

PARTS = ("all", "trunk", "head", "draft")


def convert(
    directory: Path,
    out: Path,
    part: str = "all",
    tokenizer_pre: str | None = None,
) -> None:
    """Write the `part` (all, trunk, head or draft) of a checkpoint as a BF16 GGUF. Raises CheckpointError.

    A head alone carries no tokenizer: it is there to be quantized and injected. A draft is the head with what it shares with
    the trunk (embeddings, output norm and matrix), which llama-server takes beside a trunk.
    """
    checkpoint = Checkpoint(directory)
    family, hparams = family_of(checkpoint.architecture), Hparams(checkpoint.config)
    planned = plan(checkpoint, family, hparams, part)
    metadata = describe(
        checkpoint, family, hparams, part, [item.info for item in planned], tokenizer_pre
    )
    write(out, metadata, [(item.info, payload(checkpoint, item)) for item in planned])


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
        writer.add_tensor_info(
            info.name, info.shape, np.dtype(np.float32), info.size, raw_dtype=info.type
        )
    writer.add_type(GGUFType.MODEL)
    _model_metadata(checkpoint.directory, writer).set_gguf_meta_model(writer)
    family.describe(writer, hparams, 0 if part == "trunk" else 1)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    if part == "head":
        writer.add_vocab_size(
            hparams.count("vocab_size")
        )  # has no embeddings that would tell which model it belongs to
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
        raise CheckpointError(
            f"{key}: the checkpoint gives a value that a GGUF cannot hold ({error})"
        ) from None


def _model_metadata(directory: Path, writer: GGUFWriter) -> Metadata:
    """Name, license, tags and sampling defaults from the model card and its neighbours, as gguf-py derives them."""
    total, shared, experts, expert_count = writer.get_total_parameter_count()
    try:
        metadata = Metadata.load(None, directory, None, total)
        # gguf 0.19.0 does not know the name under which generation_config.json has it; the pinned upstream does.
        generation = Metadata.load_generation_config(directory)
        metadata.sampling_penalty_repeat = generation.get(
            "repetition_penalty", metadata.sampling_penalty_repeat
        )
    except (ValueError, TypeError, AttributeError, KeyError, IndexError, yaml.YAMLError) as error:
        what = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{directory}: README.md, generation_config.json or config.json is malformed ({what})"
        ) from None
    metadata.name = metadata.name or directory.name
    metadata.size_label = metadata.size_label or size_label(total, shared, experts, expert_count)
    return metadata
