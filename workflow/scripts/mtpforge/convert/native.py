"""Converts a checkpoint to a BF16 GGUF whose head is block N, without torch.

The family's table says what the file must contain. Values are views of the checkpoint, so no tensor
is held in memory and the kernel copies most bytes from shard to GGUF. Tensors are written in
upstream's order.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFWriter, Metadata, size_label
from gguf.constants import GGML_QUANT_VERSION, GGUFType, GGUFValueType, Keys
from gguf.gguf_writer import GGUFValue

from mtpforge import progress
from mtpforge.checkpoint.checkpoint import Checkpoint, Outline
from mtpforge.checkpoint.families.family import Family
from mtpforge.checkpoint.families.registry import family_of
from mtpforge.checkpoint.hparams import Hparams
from mtpforge.convert import chat_templates, norm_shift, tokenizer
from mtpforge.convert.convertible import naming_quantization
from mtpforge.convert.plan import settled_hparams
from mtpforge.convert.tensor_names import left_out
from mtpforge.convert.values import payload
from mtpforge.errors import CheckpointError, GgufError
from mtpforge.gguf.metadata import Value
from mtpforge.gguf.reader import TensorInfo
from mtpforge.gguf.split import SINGLE, Writing, write_any
from mtpforge.io import text

PARTS = ("all", "trunk", "head", "draft")

_ANY_PRE = "qwen35"
"""A pre-tokenizer, where only texts are read."""
_FROM_NAME = ("name", "organization", "basename", "finetune", "version", "size_label")
"""What gguf-py derives from the model's name."""
# gguf 0.19.0 does not know `repetition_penalty` yet; the pinned upstream does.
_SAMPLING = {
    name: name
    for name in (
        "sequence", "top_k", "top_p", "min_p", "xtc_probability", "xtc_threshold",
        "penalty_last_n", "penalty_repeat", "mirostat", "mirostat_tau", "mirostat_eta",
    )
} | {"temperature": "temp", "repetition_penalty": "penalty_repeat"}  # fmt: skip
"""Key in generation_config.json -> gguf-py's name of the sampling default."""


def convert(
    directory: Path,
    out: Path,
    part: str = "all",
    tokenizer_pre: str | None = None,
    name: str | None = None,
    norm_form: str | None = None,
) -> str:
    """Write a part of a checkpoint as a BF16 GGUF. Raises CheckpointError.

    `head` has no tokenizer: it is only quantized and injected. `draft` is the head with what it
    shares with the trunk (embeddings, output norm and matrix), for llama-server beside a trunk.
    `name` is the model's name if it is not the folder's, `norm_form` the form of norms whose values
    do not tell it. Returns a note on norms that were stored as w.
    """
    return convert_checkpoint(Checkpoint(directory, name, norm_form), out, part, tokenizer_pre)


def convert_checkpoint(
    checkpoint: Checkpoint,
    out: Path,
    part: str = "all",
    tokenizer_pre: str | None = None,
    writing: Writing = SINGLE,
) -> str:
    """The same for a checkpoint that is open. Raises DamagedError if it has changed."""
    family = family_of(checkpoint.architecture)
    hparams = settled_hparams(checkpoint, family)
    with naming_quantization(checkpoint, family, part):
        planned = norm_shift.plan_by_values(checkpoint, part)
    metadata = describe(
        checkpoint,
        family,
        hparams,
        part=part,
        infos=[item.info for item in planned],
        tokenizer_pre=tokenizer_pre,
    )
    tensors = [(item.info, payload(checkpoint, item)) for item in planned]

    def check(written: Path) -> None:
        checkpoint.integrity.check()

    write_any(out, metadata, tensors, check, writing)
    say_notes(checkpoint, family, part)
    return norm_shift.note(planned)


def say_notes(checkpoint: Checkpoint, family: Family, part: str = "all") -> None:
    """Say what of the checkpoint is not in the GGUF of a part."""
    notes = left_out(checkpoint, family.ignored)
    if part != "head":
        notes += chat_templates.notes(checkpoint.directory, checkpoint.chat_template)
    if checkpoint.format == "mlx":
        notes.append("MLX wrote this checkpoint: norms are read as w or w - 1, as their values say")
    for note in notes:
        progress.say(note)


def trunk(directory: Path) -> dict[str, TensorInfo]:
    """The tensors of a checkpoint's trunk, as conversion names them, even if only the head is here.

    Raises CheckpointError.
    """
    checkpoint = Checkpoint(directory)
    family = family_of(checkpoint.architecture)
    rows = family.rows(settled_hparams(checkpoint, family), "trunk")
    return {row.name: TensorInfo(row.name, row.shape, row.type) for row in rows}


def vocabulary(directory: Path) -> dict[str, Value]:
    """A checkpoint's tokens and merges, as conversion writes them; none if it cannot.

    A folder that only a head is taken from needs no tokenizer.
    """
    checkpoint = Checkpoint(directory)
    family = family_of(checkpoint.architecture)
    size = settled_hparams(checkpoint, family).count("vocab_size")
    writer = GGUFWriter(path=None, arch=family.gguf_architecture)
    with suppress(CheckpointError):
        tokenizer.describe(writer, directory, vocab_size=size, pre=_ANY_PRE)
    entries = writer.kv_data[0]
    found = (key for key in (Keys.Tokenizer.LIST, Keys.Tokenizer.MERGES) if key in entries)
    return {key: _encoded(key, entries[key]) for key in found}


def describe(
    checkpoint: Outline,
    family: Family,
    hparams: Hparams,
    part: str,
    infos: list[TensorInfo],
    tokenizer_pre: str | None,
) -> dict[str, Value]:
    """Return all metadata in upstream's order. Raises CheckpointError."""
    writer = GGUFWriter(path=None, arch=family.gguf_architecture)
    for info in infos:
        writer.add_tensor_info(
            info.name, info.shape, np.dtype(np.float32), info.size, raw_dtype=info.known_type
        )
    writer.add_type(GGUFType.MODEL)
    _model_metadata(checkpoint, writer).set_gguf_meta_model(writer)
    if part in ("head", "draft"):
        hparams = Hparams({**hparams.values, **family.without_trunk})
    family.describe(writer, hparams, 0 if part == "trunk" else 1)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    vocab_size = hparams.count("vocab_size")
    if part == "head":
        writer.add_vocab_size(vocab_size)  # without embeddings, nothing else says it
    else:
        tokenizer.describe(writer, checkpoint.directory, vocab_size=vocab_size, pre=tokenizer_pre)
        if checkpoint.chat_template is not None:
            chat_templates.replace(writer, checkpoint.chat_template)
    return {key: _encoded(key, entry) for key, entry in writer.kv_data[0].items()}


def _encoded(key: str, entry: GGUFValue) -> Value:
    if isinstance(entry.value, Value):  # the merges, encoded in advance
        return entry.value
    try:
        if (type(entry.value) is bool) is not (entry.type is GGUFValueType.BOOL):
            raise ValueError(f"{entry.value!r} is not {entry.type.name.lower()}")
        if isinstance(entry.value, float) and not math.isfinite(entry.value):
            raise ValueError(f"{entry.value} is not a finite number")
        item = entry.sub_type
        if entry.type is GGUFValueType.ARRAY and item is None:
            item = GGUFValueType.get_type(entry.value[0])
        return Value.of(entry.value, entry.type, item)
    except (GgufError, ValueError, TypeError, LookupError) as error:
        raise CheckpointError(
            f"{key}: the checkpoint's value does not fit into a GGUF ({error})"
        ) from None


def _model_metadata(checkpoint: Outline, writer: GGUFWriter) -> Metadata:
    """Derive name, license, tags and sampling defaults from the model card, as gguf-py does."""
    directory = checkpoint.directory
    total, shared, experts, expert_count = writer.get_total_parameter_count()
    card = _optional(directory / "README.md", text.read_front_matter)
    config = text.read_json(directory / "config.json")
    generation = _optional(directory / "generation_config.json", text.read_json)
    try:
        metadata = Metadata.apply_metadata_heuristic(
            Metadata(), card, config, model_path=directory, total_params=total
        )
        if checkpoint.name != directory.name:
            right = Metadata.apply_metadata_heuristic(
                Metadata(), card, config, model_path=Path(checkpoint.name), total_params=total
            )
            for key in _FROM_NAME:
                setattr(metadata, key, getattr(right, key))
    except (ValueError, TypeError, AttributeError, KeyError, IndexError) as error:
        reason = str(error).partition("\n")[0]
        raise CheckpointError(
            f"{directory}: malformed README.md, generation_config.json or config.json ({reason})"
        ) from None
    for name, key in _SAMPLING.items():
        if name in generation:
            setattr(metadata, f"sampling_{key}", generation[name])
    metadata.name = checkpoint.given_name or metadata.name or checkpoint.name
    metadata.size_label = metadata.size_label or size_label(total, shared, experts, expert_count)
    return metadata


def _optional(path: Path, read: Callable[[Path], dict[str, Any]]) -> dict[str, Any]:
    return read(path) if text.is_there(path) else {}
