"""Architectures without a family of ours: llama.cpp's own converter makes the GGUF, and we prove that the head is in it.

Upstream's program runs in an environment of its own, on a folder of our making that holds no code. What it writes gets its
name only if every tensor of the checkpoint's head is there, byte for byte as its type stores it. The table below was read from
`conversion/*.py` and `src/models/*.cpp` of llama.cpp 0c1e57098.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import run_upstream  # only for its place: so it is among the code that a rule depends on
from gguf.constants import GGMLQuantizationType

from . import convert, fp8, gguf_file, inject, programs
from .atomic import replacing
from .checkpoint import INDEX, Checkpoint, CheckpointTensor, read_json
from .errors import CheckpointError, GgufError, ToolchainError
from .families import Hparams
from .families.qwen3_5 import VISION as VISION_PREFIXES
from .families.table import BF16, F32
from .gguf_file import Gguf
from .quantize import head_blocks
from .ranges import FileRange, sha256

LLAMA_CPP = "0c1e57098"
F16 = GGMLQuantizationType.F16
PROGRAM = "convert_hf_to_gguf.py"
RUNNER = Path(run_upstream.__file__)

PARTS: dict[str, tuple[str, ...]] = {
    "all": ("--outtype", "bf16"),
    "trunk": ("--outtype", "bf16", "--no-mtp"),
    "draft": ("--outtype", "bf16", "--mtp"),
    "mmproj": ("--outtype", "f16", "--mmproj"),
}
"""Part -> upstream's options: the whole, the trunk alone, the head with the trunk's embeddings, the vision tower."""

Change = Callable[[np.ndarray, Hparams], list[np.ndarray]]
"""A checkpoint's float32 values to those of the tensors that upstream makes of them."""


def plus_one(values: np.ndarray, hparams: Hparams) -> list[np.ndarray]:
    """A norm that is stored as w-1."""
    return [values + np.float32(1)]


def split_kv_b(values: np.ndarray, hparams: Hparams) -> list[np.ndarray]:
    """Latent attention's `kv_b_proj`, [heads * (nope + v), rank], as `k_b` [heads, rank, nope] and `v_b` [heads, v, rank]."""
    heads, nope, v = (hparams.count(key) for key in ("num_attention_heads", "qk_nope_head_dim", "v_head_dim"))
    if values.shape[0] != heads * (nope + v):
        raise CheckpointError(f"kv_b_proj has {values.shape[0]} rows, config.json says {heads} * ({nope} + {v})")
    by_head = values.reshape(heads, nope + v, -1)
    return [by_head[:, :nope].transpose(0, 2, 1), by_head[:, nope:]]


def interleaved(heads: str) -> Change:
    """Rotary halves of each head's rows interleaved, as Llama's queries and keys; `heads` is the key that counts the heads."""

    def change(values: np.ndarray, hparams: Hparams) -> list[np.ndarray]:
        count = hparams.count(heads)
        if values.shape[0] % (2 * count):
            raise CheckpointError(f"a projection of {values.shape[0]} rows does not divide into {count} heads ({heads})")
        return [values.reshape(count, 2, -1, values.shape[-1]).swapaxes(1, 2).reshape(values.shape)]

    return change


@dataclass(frozen=True)
class Architecture:
    """What the pinned llama.cpp does with the head of a Hugging Face architecture."""

    gguf: str
    prefix: str = ""
    """With which the names of the head's tensors begin; empty where it is the layers from `num_hidden_layers` on."""
    layers: int = 1
    """How many numbered layers of the checkpoint make one block of the GGUF."""
    blocks: int | None = None
    """What upstream takes for granted; None where `num_nextn_predict_layers` says it."""
    splits: bool = True
    """Whether upstream can leave the head out (--no-mtp) or write it alone (--mtp)."""
    drafts: bool = True
    """Whether llama-server can draft with it."""
    needs: str = ""
    """A tensor without which, in each block of the head, it cannot."""
    ranked: str = ""
    """Ending of a fused projection of which, in FP8, each rank of a cluster quantized its own rows."""
    changes: Mapping[str, Change] = field(default_factory=dict)
    """Ending of a tensor's name -> what upstream does to its values."""


_LATENT = {"kv_b_proj.weight": split_kv_b}
_MIMO = Architecture("mimo2", prefix="model.mtp.", blocks=3, needs="attn_qkv.weight", ranked="qkv_proj.weight")
_LLAMA = {"q_proj.weight": interleaved("num_attention_heads"), "k_proj.weight": interleaved("num_key_value_heads")}

ARCHITECTURES: dict[str, Architecture] = {
    "Glm4MoeForCausalLM": Architecture("glm4moe"),
    "Glm4MoeLiteForCausalLM": Architecture("deepseek2", changes=_LATENT),
    "GlmMoeDsaForCausalLM": Architecture("glm-dsa", changes=_LATENT),
    "DeepseekV32ForCausalLM": Architecture("deepseek32", changes=_LATENT),
    "Step3p5ForCausalLM": Architecture("step35", changes={"norm.weight": plus_one}),
    "Step3p7ForConditionalGeneration": Architecture("step35", changes={"norm.weight": plus_one}),
    "NemotronHForCausalLM": Architecture("nemotron_h_moe", prefix="mtp.", layers=2, changes=_LLAMA),
    "MiMoV2FlashForCausalLM": _MIMO,
    "MiMoV2ForCausalLM": _MIMO,
    "HYV3ForCausalLM": Architecture("hy_v3"),
    "Cohere2MoeForCausalLM": Architecture("cohere2moe", splits=False),
    "BailingMoeV2ForCausalLM": Architecture("bailingmoe2", splits=False, drafts=False),
    "BailingMoeV3ForCausalLM": Architecture("bailingmoe3", changes=_LATENT),
    "ExaoneMoEForCausalLM": Architecture("exaone-moe", prefix="mtp.", splits=False, drafts=False),
    "ExaoneMoeForCausalLM": Architecture("exaone-moe", prefix="mtp.", splits=False, drafts=False),
}
"""Name in config.json -> what is known of it. Not here: heads that upstream drops (DeepSeek V3, ERNIE), tokenizers that need code
of the checkpoint (Kimi) or a newer transformers (GLM-5 Next), GLM-4.5V, with whose head and multimodal rotation llama-server
aborts, and architectures that we convert ourselves."""

VISION = ("Qwen3_5ForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration")
"""The architectures, our own, whose vision tower upstream can write and we can prove."""


def undrafted(made: Gguf) -> str | None:
    """Why the pinned llama-server cannot draft with the head of a file; None where it can."""
    for entry in ARCHITECTURES.values():
        if entry.gguf == made.architecture:
            if not entry.drafts:
                return f"llama.cpp {LLAMA_CPP} loads {entry.gguf} but cannot draft with it"
            if entry.needs and any(f"blk.{block}.{entry.needs}" not in made.tensors for block in head_blocks(made)):
                return f"llama.cpp {LLAMA_CPP} loads {entry.gguf} but cannot draft with a head that has no {entry.needs}"
    return None


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
            programs.call(command, log, _environment(Path(scratch)), PROGRAM)
        except ToolchainError as error:
            hint = f"the whole log is {log}" if log else "--log FILE keeps all that it says"
            if "pre-tokenizer" in str(error):
                hint = "name that of its base model (tokenizer_pre in config.yaml, or --tokenizer-pre)"
            raise ToolchainError(f"{directory}: {error}: {hint}") from None
        prove(gguf_file.read(temporary), checkpoint, part)


# ── the checkpoint ──────────────────────────────────────────────────────────────────────────────────────────────────


def check(checkpoint: Checkpoint, part: str) -> None:
    """Whether upstream can make the part of this checkpoint. Raises CheckpointError, if need be with the list."""
    name = checkpoint.architecture
    known = VISION if part == "mmproj" else tuple(ARCHITECTURES)
    if name not in known:
        what = "a vision tower" if part == "mmproj" else "a head"
        raise CheckpointError(f"{checkpoint.directory}: converter llama.cpp gives {what} of {', '.join(known)}, not of {name}")
    convert.check_sizes(Hparams(checkpoint.config))
    if part == "mmproj":
        if not list(_wanted_of_vision(checkpoint)):
            raise CheckpointError(f"{checkpoint.directory}: has no tensors of a vision tower")
        if not any((checkpoint.directory / file).is_file() for file in _PREPROCESSORS):
            raise CheckpointError(f"{checkpoint.directory}: no {' or '.join(_PREPROCESSORS)}, which a vision tower needs")
        return
    architecture = ARCHITECTURES[name]
    if part != "all" and not architecture.splits:
        raise CheckpointError(f"{name}: llama.cpp {LLAMA_CPP} cannot write its {part} part, only the whole: convert part all")
    if part != "trunk":
        count_blocks(checkpoint, architecture)
        check_types(checkpoint, architecture)


def count_blocks(checkpoint: Checkpoint, architecture: Architecture) -> int:
    """The number of the head's blocks, on which configuration and tensors must agree. Raises CheckpointError."""
    declared = architecture.blocks
    if declared is None:
        declared = Hparams(checkpoint.config).get("num_nextn_predict_layers", 0)
    numbers = {_layer(tensor.name, architecture) for tensor in head_tensors(checkpoint, architecture)} - {None}
    found, rest = divmod(len(numbers), architecture.layers)
    if not found and not rest:
        raise CheckpointError(
            f"{checkpoint.directory}: no tensors of a head ({declared!r} blocks are declared): "
            "take the original checkpoint, or convert with --part trunk"
        )
    if found != declared or rest:
        raise CheckpointError(
            f"{checkpoint.directory}: has tensors of {len(numbers)} head layers, {architecture.layers} to a block, "
            f"but {declared!r} blocks are declared (num_nextn_predict_layers in config.json)"
        )
    return found


def head_tensors(checkpoint: Checkpoint, architecture: Architecture) -> list[CheckpointTensor]:
    """The checkpoint's tensors that belong to its head."""
    first = 0 if architecture.prefix else Hparams(checkpoint.config).count("num_hidden_layers")
    found = []
    for tensor in checkpoint.tensors.values():
        layer = _layer(tensor.name, architecture)
        if _plain(tensor.name).startswith(architecture.prefix) if architecture.prefix else layer is not None and layer >= first:
            found.append(tensor)
    return found


def _layer(name: str, architecture: Architecture) -> int | None:
    match = re.match(rf"{re.escape(architecture.prefix or 'model.')}layers\.(\d{{1,5}})\.", _plain(name))
    return int(match[1]) if match else None


def _plain(name: str) -> str:
    """The name without the wrapper of a vision model."""
    return name.replace("language_model.", "")


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
                raise CheckpointError(f"{path}: is nested deeper than any real one: not read") from None
    for name in _COPIED:
        path = checkpoint.directory / name
        if path.exists():
            if not path.is_file() or path.stat().st_size > _COPIED_LIMIT:
                raise CheckpointError(f"{path}: is not a regular file of at most {_COPIED_LIMIT >> 20} MB")
            shutil.copyfile(path, folder / name)
    return folder


def _harmless(value: Any) -> Any:
    """The same without keys, at any depth, that name code or a file: what has a number is a word of a vocabulary, and stays."""
    if isinstance(value, dict):
        return {key: _harmless(entry) for key, entry in value.items() if type(entry) is int or not _leads_outside(key)}
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


# ── the proof ───────────────────────────────────────────────────────────────────────────────────────────────────────


def prove(made: Gguf, checkpoint: Checkpoint, part: str) -> None:
    """That the file is the part asked for, its head that of the checkpoint to the byte. Raises GgufError, CheckpointError."""
    if part == "mmproj":
        if made.architecture != "clip" or not made.get("clip.has_vision_encoder") or not made.tensors:
            raise GgufError(f"{checkpoint.directory}: upstream wrote no vision tower, but a file of {made.architecture}")
        pair(_stored(made), _wanted_of_vision(checkpoint), (F16, F32), checkpoint.directory)
        return
    architecture = ARCHITECTURES[checkpoint.architecture]
    if made.architecture != architecture.gguf:
        raise GgufError(f"{checkpoint.directory}: upstream wrote {made.architecture}, not {architecture.gguf}")
    blocks = head_blocks(made)
    if part == "trunk":
        if blocks or any(".nextn." in name for name in made.tensors):
            raise GgufError(f"{checkpoint.directory}: upstream left the head, or a part of it, in the trunk")
        return
    expected = count_blocks(checkpoint, architecture)
    if len(blocks) != expected:
        raise GgufError(f"{checkpoint.directory}: its head has {expected} blocks, upstream declares {len(blocks)}")
    pair(_stored(inject.head_only(made)), _wanted(checkpoint, architecture), (BF16, F32), checkpoint.directory)


Where = tuple[int, int, GGMLQuantizationType]
"""Number of the expert (0 for what is none), number of elements, type."""


Stored = dict[Where, dict[str, list[str]]]
"""Of a file: where -> sha256 -> names of the tensors that have it."""

Wanted = Iterator[tuple[str, int, np.ndarray, str]]
"""Name in the checkpoint, number of the expert, values and their type."""


def pair(stored: Stored, wanted: Wanted, kinds: tuple[GGMLQuantizationType, ...], directory: Path) -> None:
    """Pair each tensor of the checkpoint with one of the file's by its bytes as one of `kinds`; both sides must be used up.

    Names are upstream's affair. A tensor that head blocks share may be there once for each. Raises GgufError with the names of
    what has no counterpart.
    """
    paired, lost = Counter[tuple[Where, str]](), list[str]()
    for name, expert, values, dtype in wanted:
        for kind in kinds:
            where = (expert, values.size, kind)
            if where not in stored:
                continue
            digest = _digest(values, dtype, kind)
            if paired[where, digest] < len(stored[where].get(digest, ())):
                paired[where, digest] += 1
                break
        else:
            lost.append(name)
    foreign = [
        name for where, found in stored.items() for digest, names in found.items() if not paired[where, digest] for name in names
    ]
    if lost or foreign:
        raise GgufError(
            f"{directory}: upstream did not keep the tensors as they are: without a counterpart are "
            f"{_some(lost)} of the checkpoint and {_some(foreign)} of what it wrote"
        )


def _wanted_of_vision(checkpoint: Checkpoint) -> Wanted:
    """What a vision tower's file must hold: of the patch embedding, a tensor for each of the two frames of a patch."""
    for tensor in checkpoint.tensors.values():
        if tensor.name.startswith(VISION_PREFIXES):
            array = checkpoint.array(tensor)
            frames = [array[:, :, i] for i in range(array.shape[2])] if array.ndim == 5 else [array]
            yield from ((tensor.name, 0, frame, tensor.dtype) for frame in frames)


def _some(names: list[str]) -> str:
    """Up to three names, and how many there are in all."""
    named = ", ".join(dict.fromkeys(names[:3]))
    return f"{named} ({len(names)} in all)" if names else "none"


def _stored(made: Gguf) -> Stored:
    """The tensors of a file, stacked experts one by one."""
    stored: Stored = {}
    for name, info in made.tensors.items():
        count = info.shape[0] if name.endswith("_exps.weight") else 1
        size = info.size // count
        for expert in range(count):
            digest = sha256(FileRange(made.path, made.ranges[name].offset + expert * size, size))
            stored.setdefault((expert, info.elements // count, info.type), {}).setdefault(digest, []).append(name)
    return stored


def _wanted(checkpoint: Checkpoint, architecture: Architecture) -> Wanted:
    """What the head of the file must hold."""
    hparams = Hparams(checkpoint.config)
    for tensor in head_tensors(checkpoint, architecture):
        if tensor.name.endswith(_CONSUMED):
            continue
        array, dtype = checkpoint.array(tensor), tensor.dtype
        if dtype == fp8.DTYPE:
            array, dtype = _dequantized(checkpoint, tensor, architecture), "F32"
        change = next((change for ending, change in architecture.changes.items() if tensor.name.endswith(ending)), None)
        if change is not None:
            yield from ((tensor.name, 0, values, "F32") for values in change(convert.decode(array, dtype), hparams))
        elif array.ndim == 3:  # experts, already stacked
            yield from ((tensor.name, expert, values, dtype) for expert, values in enumerate(array))
        else:
            expert = re.search(r"\.experts\.(\d{1,5})\.", tensor.name)
            yield tensor.name, int(expert[1]) if expert else 0, array, dtype


_CONSUMED = (fp8.SUFFIX, ".rotary_emb.inv_freq")  # endings of what becomes no tensor: scales, and what is computed anew


def _dequantized(checkpoint: Checkpoint, tensor: CheckpointTensor, architecture: Architecture) -> np.ndarray:
    """An FP8 tensor's float32 values, as upstream computes them."""
    scale, block = checkpoint.tensors[tensor.name + fp8.SUFFIX], fp8.block_size(checkpoint.config)
    codes, scales = checkpoint.array(tensor), convert.decode(checkpoint.array(scale), scale.dtype)
    if not _is_ranked(tensor, architecture):
        return fp8.dequantize(codes, scales, block)
    count, hparams = _ranks(tensor, scale, block), Hparams(checkpoint.config)
    heads, keys = hparams.count("num_attention_heads"), hparams.count("swa_num_key_value_heads")
    size, value = hparams.count("head_dim"), hparams.count("v_head_dim")
    if tensor.shape[0] != (heads + keys) * size + keys * value:
        raise CheckpointError(f"{tensor.shard}: {tensor.name} has {tensor.shape[0]} rows, which config.json contradicts")
    cuts = [heads * size // count, (heads + keys) * size // count]
    ranks = [fp8.dequantize(*pair, block) for pair in zip(np.split(codes, count), np.split(scales, count), strict=True)]
    parts = [np.split(rank, cuts) for rank in ranks]
    return np.concatenate([part[which] for which in range(3) for part in parts])


def _is_ranked(tensor: CheckpointTensor, architecture: Architecture) -> bool:
    return bool(architecture.ranked) and tensor.name.endswith(architecture.ranked)


def _ranks(tensor: CheckpointTensor, scale: CheckpointTensor, block: tuple[int, int]) -> int:
    """How many ranks a fused projection was quantized by; 0 where the scales' shape tells no such number."""
    for count in (8, 4):  # as upstream tries them
        each = (tensor.shape[0] // count, *tensor.shape[1:])
        rows, *columns = fp8.scale_shape(each, block)
        if tensor.shape[0] % count == 0 and scale.shape == (count * rows, *columns):
            return count
    return 0


def check_types(checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Whether the values of the head can be told from its tensors. Raises CheckpointError."""
    for tensor in head_tensors(checkpoint, architecture):
        if tensor.name.endswith(_CONSUMED):
            continue
        if tensor.dtype == fp8.DTYPE:
            _check_scale(checkpoint, tensor, architecture)
        elif tensor.dtype not in ("BF16", "F16", "F32"):
            raise CheckpointError(f"{tensor.shard}: {tensor.name} is {tensor.dtype}: a head in BF16, F16, F32 or FP8 can be proven")
        if not tensor.size:
            raise CheckpointError(f"{tensor.shard}: {tensor.name} is empty")


def _check_scale(checkpoint: Checkpoint, tensor: CheckpointTensor, architecture: Architecture) -> None:
    scale, block = checkpoint.tensors.get(tensor.name + fp8.SUFFIX), fp8.block_size(checkpoint.config)
    if scale is not None and scale.dtype in ("BF16", "F32") and len(tensor.shape) > 1:
        ranked = _is_ranked(tensor, architecture)
        if _ranks(tensor, scale, block) if ranked else scale.shape == fp8.scale_shape(tensor.shape, block):
            return
    raise CheckpointError(f"{tensor.shard}: {tensor.name} is FP8 and {tensor.name}{fp8.SUFFIX} is missing or of another shape")


def _digest(values: np.ndarray, dtype: str, kind: GGMLQuantizationType) -> str:
    """The sha256 of the values as the type stores them; a slice of them in memory at a time."""
    values = np.ascontiguousarray(values)
    if dtype == kind.name:
        return hashlib.sha256(values.data).hexdigest()
    digest = hashlib.sha256()
    for (piece,) in convert.cut([values]):
        floats = convert.decode(piece, dtype)
        digest.update(floats.astype("<f2").data if kind is F16 else convert.encode(floats, kind))
    return digest.hexdigest()
