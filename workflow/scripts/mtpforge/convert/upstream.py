"""Architectures without a family of ours: llama.cpp's own converter makes the GGUF, and we prove that the head is in it.

Upstream's program runs in an environment of its own, on a folder of our making that holds no code. What it writes gets its
name only if every tensor of the checkpoint's head is there, byte for byte as its type stores it.
"""

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import run_upstream  # only for its place: so it is among the code that a rule depends on

from mtpforge.checkpoint.hparams import Hparams
from mtpforge.checkpoint.safetensors import INDEX, Checkpoint
from mtpforge.convert import plan
from mtpforge.convert.proof import check_types, count_blocks, prove, wanted_of_vision
from mtpforge.errors import CheckpointError, ToolchainError
from mtpforge.gguf import reader
from mtpforge.io.atomic import replacing
from mtpforge.io.text import read_json
from mtpforge.llama_cpp import process
from mtpforge.llama_cpp.architectures import ARCHITECTURES, LLAMA_CPP, VISION

PROGRAM = "convert_hf_to_gguf.py"
RUNNER = Path(run_upstream.__file__)

PARTS: dict[str, tuple[str, ...]] = {
    "all": ("--outtype", "bf16"),
    "trunk": ("--outtype", "bf16", "--no-mtp"),
    "draft": ("--outtype", "bf16", "--mtp"),
    "mmproj": ("--outtype", "f16", "--mmproj"),
}
"""Part -> upstream's options: the whole, the trunk alone, the head with the trunk's embeddings, the vision tower."""


def convert_upstream(
    directory: Path, out: Path, converter: Path, part: str = "all", tokenizer_pre: str | None = None, log: Path | None = None
) -> None:  # fmt: skip
    """Have upstream's converter (in `converter`, as the rule of that name makes it) write a part of a checkpoint; prove it.

    Raises CheckpointError where the checkpoint is malformed, not on the list, or lacks the part; ToolchainError where upstream
    fails; GgufError where what it wrote is not what the checkpoint has. `log` receives all that upstream says.
    """
    checkpoint = Checkpoint(directory)
    check(checkpoint, part)
    python, source = converter.absolute() / "environment/bin/python", converter.resolve() / "source"
    for path in (python, source / PROGRAM):
        if not path.is_file():
            raise ToolchainError(
                f"{path}: missing: `make converter` sets it up (delete {converter / 'stamp.json'} first if it is there)"
            )
    options = ["--tokenizer-pre", tokenizer_pre] if tokenizer_pre else []
    with replacing(out) as temporary, tempfile.TemporaryDirectory() as scratch:
        folder = without_code(checkpoint, Path(scratch))
        command: list[str | Path] = [python, "-I", RUNNER, *options, source]
        command += [folder, *PARTS[part], "--outfile", temporary]
        try:
            process.call(command, log, _environment(Path(scratch)), PROGRAM)
        except ToolchainError as error:
            hint = f"the whole log is {log}" if log else "--log FILE keeps all that it says"
            if "pre-tokenizer" in str(error):
                hint = (
                    "name that of its base model (tokenizer_pre in config.yaml, or --tokenizer-pre)"
                )
            raise ToolchainError(f"{directory}: {error}: {hint}") from None
        prove(reader.read(temporary), checkpoint, part)


# ── the checkpoint ──────────────────────────────────────────────────────────────────────────────────────────────────


def check(checkpoint: Checkpoint, part: str) -> None:
    """Whether upstream can make the part of this checkpoint. Raises CheckpointError, if need be with the list."""
    name = checkpoint.architecture
    known = VISION if part == "mmproj" else tuple(ARCHITECTURES)
    if name not in known:
        what = "a vision tower" if part == "mmproj" else "a head"
        raise CheckpointError(
            f"{checkpoint.directory}: converter llama.cpp gives {what} of {', '.join(known)}, not of {name}"
        )
    plan.check_sizes(Hparams(checkpoint.config))
    if part == "mmproj":
        if not list(wanted_of_vision(checkpoint)):
            raise CheckpointError(f"{checkpoint.directory}: has no tensors of a vision tower")
        if not any((checkpoint.directory / file).is_file() for file in _PREPROCESSORS):
            raise CheckpointError(
                f"{checkpoint.directory}: no {' or '.join(_PREPROCESSORS)}, which a vision tower needs"
            )
        return
    architecture = ARCHITECTURES[name]
    if part != "all" and not architecture.splits:
        raise CheckpointError(
            f"{name}: llama.cpp {LLAMA_CPP} cannot write its {part} part, only the whole: convert part all"
        )
    if part != "trunk":
        count_blocks(checkpoint, architecture)
        check_types(checkpoint, architecture)


# ── a folder without code ───────────────────────────────────────────────────────────────────────────────────────────

_PREPROCESSORS = ("preprocessor_config.json", "processor_config.json")
_JSON = (
    "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", *_PREPROCESSORS, "video_preprocessor_config.json", "chat_template.json",
)  # fmt: skip
_COPIED = ("README.md", "chat_template.jinja", "merges.txt", "tokenizer.model")
_COPIED_LIMIT = 100 << 20


def without_code(checkpoint: Checkpoint, parent: Path) -> Path:
    """A folder below `parent`, of the checkpoint's name, that holds what upstream reads and nothing that could be run.

    Weights are links. JSON is parsed and written anew without what leads to code or out of the folder.
    Raises CheckpointError.
    """
    folder = parent / "checkpoint" / checkpoint.directory.name  # upstream makes general.name of it
    folder.mkdir(parents=True)
    shards = {name: tensor.shard for name, tensor in checkpoint.tensors.items()}
    for shard in set(shards.values()):
        (folder / shard).symlink_to((checkpoint.directory / shard).resolve(strict=True))
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": shards}))
    for name in _JSON:
        path = checkpoint.directory / name
        if path.exists():
            try:
                (folder / name).write_text(json.dumps(_harmless(read_json(path))))
            except RecursionError:
                raise CheckpointError(
                    f"{path}: is nested deeper than any real one: not read"
                ) from None
    for name in _COPIED:
        path = checkpoint.directory / name
        if path.exists():
            if not path.is_file() or path.stat().st_size > _COPIED_LIMIT:
                raise CheckpointError(
                    f"{path}: is not a regular file of at most {_COPIED_LIMIT >> 20} MB"
                )
            shutil.copyfile(path, folder / name)
    return folder


def _harmless(value: Any) -> Any:
    """The same without keys, at any depth, that name code or a file: what has a number is a word of a vocabulary, and stays."""
    if isinstance(value, dict):
        return {
            key: _harmless(entry)
            for key, entry in value.items()
            if type(entry) is int or not _leads_outside(key)
        }
    return [_harmless(entry) for entry in value] if isinstance(value, list) else value


def _leads_outside(key: str) -> bool:
    """Whether transformers would take the value for a class of the checkpoint's own, or for a path anywhere on the machine."""
    return key in ("auto_map", "init_inputs", "from_slow") or key.endswith("_file")


def _environment(home: Path) -> dict[str, str]:
    """What upstream may know of ours: no token, no proxy, no home, and nothing that changes Python."""
    passed = ("PATH", "LANG", "LC_ALL", "TMPDIR", "LD_LIBRARY_PATH", "OMP_NUM_THREADS")
    return {
        **{key: os.environ[key] for key in passed if key in os.environ},
        "HOME": str(home),
        "HF_HOME": str(home / "huggingface"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
    }
