"""Converts architectures that mtpforge has no family for, with llama.cpp's own converter.

Upstream's program runs in a separate environment, on a copy of the checkpoint without code. The
GGUF gets its name only if it has every tensor of the checkpoint's head, byte for byte.
"""

import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import run_upstream  # for its path, and so that rules track it as code

from mtpforge import progress
from mtpforge.checkpoint import nvfp4, quantization
from mtpforge.checkpoint.checkpoint import Checkpoint, Outline
from mtpforge.checkpoint.hparams import Hparams
from mtpforge.checkpoint.model_files import INDEX, head_names
from mtpforge.checkpoint.safetensors import CheckpointTensor
from mtpforge.convert import chat_templates, plan
from mtpforge.convert.proof import prove
from mtpforge.convert.tensor_names import check_wrappers, is_buffer, left_out
from mtpforge.convert.upstream_head import (
    check_scales,
    check_types,
    count_blocks,
    head_tensors,
    vision_tensors,
)
from mtpforge.errors import CheckpointError, ToolchainError
from mtpforge.gguf import reader
from mtpforge.io import storage, text
from mtpforge.io.atomic import replacing, write_scratch
from mtpforge.llama_cpp import installed, pre_tokenizers, process
from mtpforge.llama_cpp.converter_architectures import ARCHITECTURES, PACKED, VISION, entry_of
from mtpforge.llama_cpp.runtimes import PINNED

PROGRAM = "convert_hf_to_gguf.py"
RUNNER = Path(run_upstream.__file__)
_IMPORT = 600.0
"""Seconds until torch and transformers are loaded, from a slow disk on a busy machine."""

PARTS: dict[str, tuple[str, ...]] = {
    "all": ("--outtype", "bf16"),
    "trunk": ("--outtype", "bf16", "--no-mtp"),
    "draft": ("--outtype", "bf16", "--mtp"),
    "mmproj": ("--outtype", "f16", "--mmproj"),
}
"""Part (whole, trunk, head with embeddings, vision tower) -> upstream's options."""

_PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
_JSON = (
    "config.json",
    quantization.MODELOPT,
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    *_PREPROCESSORS,
    "video_preprocessor_config.json",
    "chat_template.json",
)
_COPIED = ("README.md", "chat_template.jinja", "merges.txt", "tokenizer.model")

_METHODS = {
    "fp8": (),
    "gptq": (),
    "modelopt": (),
    "mxfp4": (),
    "compressed-tensors": (
        "float-quantized", "int-quantized", "naive-quantized", "pack-quantized",
        "nvfp4-pack-quantized", "mixed-precision",
    ),
}  # fmt: skip
"""quant_method that upstream's converter reads -> its formats, if it does not read all."""


def convert_upstream(
    checkpoint: Checkpoint,
    out: Path,
    converter: Path,
    part: str = "all",
    tokenizer_pre: str | None = None,
    log: Path | None = None,
) -> None:
    """Convert a part of a checkpoint with upstream's program in `converter`, and prove the result.

    `log` receives upstream's output. Raises ConfigError if llama.cpp does not know the
    pre-tokenizer; CheckpointError if the checkpoint is unsupported or lacks the part; DamagedError
    if it has changed; ToolchainError if upstream fails; GgufError if the result differs from it.
    """
    if tokenizer_pre:
        pre_tokenizers.check(tokenizer_pre)
    check(checkpoint, part)
    python = converter.absolute() / "environment/bin/python"
    source = converter.resolve() / "source"
    for path in (python, source / PROGRAM):
        if not path.is_file():
            raise ToolchainError(
                f"{path}: missing: run `make converter` "
                f"(delete {converter / 'stamp.json'} first if it exists)"
            )
    installed.check_converter(converter)
    options = ["--tokenizer-pre", tokenizer_pre] if tokenizer_pre else []
    needed = _least_size(checkpoint, part)
    with replacing(out, needed=needed) as temporary, tempfile.TemporaryDirectory() as scratch:
        checkpoint.require(checkpoint.tensors.values())
        checkpoint.integrity.add(_read_tensors(checkpoint, part))
        folder = without_code(checkpoint, Path(scratch))
        command: list[str | Path] = [python, "-I", "-X", "utf8", RUNNER, *options, source]
        command += [folder, *_options(checkpoint, part), "--outfile", temporary]
        with storage.by_program(temporary, needed):
            try:
                environment = _environment(Path(scratch))
                process.call(command, log, environment, name=PROGRAM, start=_IMPORT)
            except ToolchainError as error:
                checkpoint.integrity.check()
                text = f"{checkpoint.directory}: {error}: {_hint(str(error), log)}"
                raise ToolchainError(text) from None
            made = reader.read(temporary)  # upstream ends with exit code 0 if its last write fails
        prove(made, checkpoint, part)
        checkpoint.integrity.check()
    for note in [
        *left_out(checkpoint),
        *chat_templates.notes(checkpoint.directory, checkpoint.chat_template),
    ]:
        progress.say(note)


def check(checkpoint: Outline, part: str) -> None:
    """Check that upstream can convert the part. Raises CheckpointError."""
    name = checkpoint.architecture
    known = VISION if part == "mmproj" else tuple(ARCHITECTURES)
    if part != "mmproj" and name in PACKED:
        if not nvfp4.is_nvfp4(checkpoint.config):
            raise CheckpointError(
                f"{checkpoint.directory}: converter llama.cpp is for NVFP4 weights of {name} only: "
                "mtpforge's converter reads all others"
            )
    elif name not in known:
        what = "a vision tower" if part == "mmproj" else "a head"
        raise CheckpointError(
            f"{checkpoint.directory}: converter llama.cpp does not support {what} of {name}, "
            f"only of {', '.join(known)}"
        )
    plan.check_sizes(Hparams(checkpoint.config))
    check_wrappers(checkpoint.tensors.values())
    _check_quantization(checkpoint)
    _check_whole(checkpoint, part)
    if part == "mmproj":
        _check_vision_files(checkpoint)
        return
    _check_part(checkpoint, part)
    check_scales(checkpoint)
    if part != "trunk":
        count_blocks(checkpoint)
        check_types(checkpoint)


def _options(checkpoint: Outline, part: str) -> tuple[str, ...]:
    """Return upstream's options: none chooses the only part of a checkpoint."""
    entry = ARCHITECTURES.get(checkpoint.architecture)
    return PARTS["all" if entry and entry.only == part else part]


def _check_part(checkpoint: Outline, part: str) -> None:
    """Check that upstream can write this part of the architecture. Raises CheckpointError."""
    name = checkpoint.architecture
    entry = entry_of(name)
    if entry.only == "trunk" and part != "trunk":
        raise CheckpointError(
            f"{name} has no head, its drafter is another checkpoint: set `head: none` on each "
            "variant, and for the drafter `head_from` and `sidecar: Q8_0` on the model "
            "(--part trunk)"
        )
    if entry.only == "draft" and part != "draft":
        raise CheckpointError(
            f"{name} is the drafter of another model: name it there, as `head_from`, with "
            "`sidecar: Q8_0` (--part draft)"
        )
    if part != "all" and not (entry.splits or entry.only):
        raise CheckpointError(
            f"{name}: llama.cpp {PINNED} cannot write its {part} part, only the whole: "
            "convert part all"
        )
    if part == "draft" and not entry.drafts:
        raise CheckpointError(
            f"{name}: llama.cpp {PINNED} cannot draft with its head: a sidecar would be of no use, "
            "remove `sidecar`"
        )
    if part == "all" and not entry.whole:
        raise CheckpointError(
            f"{name}: llama.cpp {PINNED} writes its head as a draft model only: set `head: none` "
            "on each variant, and `sidecar: MXFP4` (--part trunk and --part draft)"
        )


def without_code(checkpoint: Checkpoint, parent: Path) -> Path:
    """Copy to a folder below `parent` what upstream reads, and nothing that could be executed.

    Weights are links. JSON is rewritten without keys that lead to code or out of the folder.
    Returns the folder, which has the checkpoint's name. Raises CheckpointError.
    """
    folder = parent / "checkpoint" / checkpoint.name  # becomes general.name
    folder.mkdir(parents=True)
    shards = {name: tensor.shard for name, tensor in checkpoint.tensors.items()}
    for shard in set(shards.values()):
        (folder / shard).symlink_to((checkpoint.directory / shard).resolve(strict=True))
    write_scratch(folder / INDEX, json.dumps({"metadata": {}, "weight_map": shards}))
    for name in _JSON:
        if text.is_there(checkpoint.directory / name):
            _copy_json(checkpoint.directory / name, folder / name)
    for path in [checkpoint.directory / name for name in _COPIED]:
        if text.is_there(path):
            _copy_text(path, folder / path.name, checkpoint.directory)
    for path in chat_templates.additional(checkpoint.directory):
        (folder / chat_templates.FOLDER).mkdir(exist_ok=True)
        target = folder / chat_templates.FOLDER / path.name
        _copy_text(path, target, checkpoint.directory)
    if checkpoint.chat_template is not None:
        _replace_templates(folder, checkpoint.chat_template)
    return folder


def _replace_templates(folder: Path, template: str) -> None:
    """Leave one chat template in the folder that upstream reads."""
    shutil.rmtree(folder / chat_templates.FOLDER, ignore_errors=True)
    (folder / "chat_template.json").unlink(missing_ok=True)
    settings = folder / "tokenizer_config.json"
    values = text.read_json(settings) if settings.exists() else {}
    write_scratch(settings, json.dumps({**values, "chat_template": template}))


def _read_tensors(checkpoint: Checkpoint, part: str) -> list[CheckpointTensor]:
    """The tensors that upstream reads for a part: a draft model needs no layer of the trunk."""
    if part == "mmproj":
        return vision_tensors(checkpoint)
    head = head_names(checkpoint.tensors)
    return [
        tensor
        for name, tensor in checkpoint.tensors.items()
        if part != "draft" or name in head or ".layers." not in f".{name}"
    ]


def _check_quantization(checkpoint: Outline) -> None:
    if nvfp4.is_nvfp4(checkpoint.config):
        nvfp4.check_scales(checkpoint.tensors)
        return
    found = quantization.settings_in(checkpoint.config)
    method = found.get("quant_method") or ("mlx" if "bits" in found else None)
    formats = _METHODS.get(str(method))
    if method is not None and (formats is None or (formats and found.get("format") not in formats)):
        raise CheckpointError(
            f"its weights are quantized ({quantization.describe(checkpoint.config)}), which "
            "llama.cpp's converter cannot read: use the original checkpoint"
        )


def _check_whole(checkpoint: Outline, part: str) -> None:
    """Refuse a stale index and empty tensors, because upstream would convert the rest."""
    if checkpoint.lost and part != "trunk":
        name, shard = min(checkpoint.lost.items())
        raise CheckpointError(
            f"{checkpoint.directory / INDEX}: lists {len(checkpoint.lost)} tensors that the shards "
            f"lack ({name} in {shard}): the head is lost, the index is stale: use the original "
            "checkpoint, or convert with --part trunk"
        )
    empty = [t for t in checkpoint.tensors.values() if not t.size and not is_buffer(t)]
    if empty:
        raise CheckpointError(
            f"{empty[0].shard}: {empty[0].name} is empty ({len(empty)} such tensors): "
            f"{plan.PLACEHOLDER}"
        )


def _check_vision_files(checkpoint: Outline) -> None:
    if not vision_tensors(checkpoint):
        raise CheckpointError(f"{checkpoint.directory}: has no tensors of a vision tower")
    if not checkpoint.files & set(_PREPROCESSORS):
        raise CheckpointError(
            f"{checkpoint.directory}: no {' or '.join(_PREPROCESSORS)}, "
            "which a vision tower needs: download it from the original repository"
        )


def _least_size(checkpoint: Outline, part: str) -> int:
    """At least so many bytes will the GGUF have: 16 bits a value, or those of packed tensors."""
    tensors = {tensor.name: tensor for tensor in checkpoint.tensors.values()}
    vision = {tensor.name for tensor in vision_tensors(checkpoint)}
    head = set() if part == "mmproj" else {tensor.name for tensor in head_tensors(checkpoint)}
    names = {"mmproj": vision, "draft": head, "trunk": tensors.keys() - vision - head}
    kept = [tensors[name] for name in names.get(part, tensors.keys() - vision)]
    return sum(min(tensor.size, 2 * math.prod(tensor.shape)) for tensor in kept)


def _hint(error: str, log: Path | None) -> str:
    if "pre-tokenizer" in error:
        return "set that of its base model (tokenizer_pre in config.yaml, or --tokenizer-pre)"
    return f"see {log}" if log else "--log FILE keeps the whole output"


def _copy_text(source: Path, target: Path, directory: Path) -> None:
    if source.name == "README.md":
        text.read_front_matter(source)  # upstream reads it without limits
    limit = text.TEMPLATE_LIMIT if source.suffix == ".jinja" else text.JSON_LIMIT
    content = text.read_bytes(source, most=limit, within=directory)
    with storage.naming(target, len(content)):
        target.write_bytes(content)


def _copy_json(source: Path, target: Path) -> None:
    entries = text.MANY_ENTRIES if source.name == "tokenizer.json" else text.ENTRIES
    settings = _harmless(text.read_json(source, entries=entries))
    if source.name == "tokenizer_config.json":
        settings = _of_transformers_4(settings)
    write_scratch(target, json.dumps(settings))


def _harmless(value: Any) -> Any:
    """Remove keys that name code or a file, at any depth.

    A key with an integer value is a vocabulary entry, and stays.
    """
    if isinstance(value, list):
        return [_harmless(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _harmless(entry)
        for key, entry in value.items()
        if type(entry) is int or not _leads_outside(key)
    }


def _of_transformers_4(settings: dict[str, Any]) -> dict[str, Any]:
    """Rename what transformers 5 writes in its own way: upstream runs with version 4 here."""
    extra = settings.get("extra_special_tokens")
    if isinstance(extra, list):
        others = {key: value for key, value in settings.items() if key != "extra_special_tokens"}
        settings = {"additional_special_tokens": extra, **others}
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings = {**settings, "tokenizer_class": "PreTrainedTokenizerFast"}
    return settings


def _leads_outside(key: str) -> bool:
    """Whether transformers takes the value for a class of the checkpoint, or for a file path."""
    return key in ("auto_map", "init_inputs", "from_slow") or key.endswith("_file")


def _environment(home: Path) -> dict[str, str]:
    """Return upstream's environment: without our token, proxy, home and PYTHON* variables."""
    passed = ("PATH", "TMPDIR", "LD_LIBRARY_PATH", "OMP_NUM_THREADS")
    return {
        **{key: os.environ[key] for key in passed if key in os.environ},
        "HOME": str(home),
        "HF_HOME": str(home / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
