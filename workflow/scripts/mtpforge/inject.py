"""A head for a GGUF that lacks one: the base's tensors copied unseen, the head's appended, the metadata made to agree.

A GGUF is assembled from pieces under metadata that is made once. Only keys that depend on the number of blocks change;
all others keep their bytes, their types and their order.
"""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from gguf.constants import GGUFValueType

from . import convert, gguf_file, programs, quant_types
from .errors import GgufError
from .gguf_file import Gguf, TensorInfo, Value, squeezed
from .quantize import head_blocks, quantizable, quantize
from .ranges import Payload

Progress = Callable[[int, int], None]


def inject(
    base: Path, head: Path, out: Path, head_type: str | None = None, bin_dir: Path = programs.DEFAULT_BIN,
    progress: Progress = lambda done, total: None,
) -> None:  # fmt: skip
    """Give `base` the head of `head`, a GGUF or a checkpoint folder, at `head_type` (default: as it is there).

    Raises GgufError where base and head do not belong together or the base has a head already.
    """
    opened = gguf_file.read(base)
    scratch = out.with_name(f".{out.name}.head")
    shutil.rmtree(scratch, ignore_errors=True)  # what a killed run left behind
    scratch.mkdir(parents=True)
    try:
        assemble(opened, _prepare(head, head_type, scratch, bin_dir), out, progress)
    finally:
        shutil.rmtree(scratch)


def _prepare(head: Path, head_type: str | None, scratch: Path, bin_dir: Path) -> Gguf:
    """The head as a GGUF at the type asked for."""
    if head.is_dir():
        convert.convert(head, scratch / "head-BF16.gguf", "head")
        head = scratch / "head-BF16.gguf"
    opened = head_only(gguf_file.read(head))
    if head_type is None or types_of(opened) <= {head_type}:
        return opened
    quant_types.check_tensor_type(head_type)
    if types_of(opened) != {"BF16"}:
        raise GgufError(f"{head}: a head of {', '.join(sorted(types_of(opened)))} cannot become {head_type}: give the BF16 head")
    alone = scratch / "head.gguf"
    gguf_file.write(alone, opened.metadata, [(info, [opened.ranges[name]]) for name, info in opened.tensors.items()])
    # Any quantized type of file serves: the override decides for every tensor of a head.
    quantize(alone, scratch / "quantized.gguf", "F16" if head_type == "F16" else "Q8_0", head_type, bin_dir=bin_dir)
    return gguf_file.read(scratch / "quantized.gguf")


def head_only(source: Gguf) -> Gguf:
    """The same file with only its head's tensors in view. Raises GgufError where it has none."""
    prefixes = tuple(f"blk.{block}." for block in head_blocks(source))
    names = [name for name in source.tensors if name.startswith(prefixes)]
    if not names:
        raise GgufError(f"{source.path}: has no head (no nextn_predict_layers, or no tensors of its block)")
    return Gguf(source.path, source.metadata, {n: source.tensors[n] for n in names}, {n: source.ranges[n] for n in names})


def types_of(head: Gguf) -> set[str]:
    """The types of the head's matrices; norms and routers are F32 in every file."""
    return {info.type.name for name, info in head.tensors.items() if quantizable(info)}


def assemble(base: Gguf, head: Gguf, out: Path, progress: Progress = lambda done, total: None) -> None:
    """Write base and head as one file. Raises GgufError."""
    metadata = merged_metadata(base, head)
    pieces: list[tuple[TensorInfo, Payload]] = [(info, [base.ranges[name]]) for name, info in base.tensors.items()]
    written = {_in_block(name): info.shape for name, info in base.tensors.items()}
    for name, info in head.tensors.items():
        # A matrix of one row is written as a vector by some programs: the head's go as the base has them.
        if written.get(_in_block(name)) == squeezed(info.shape):
            info = replace(info, shape=squeezed(info.shape))
        pieces.append((info, [head.ranges[name]]))
    gguf_file.write(out, metadata, pieces, progress)


def _in_block(name: str) -> str:
    """A tensor's name without its block: `blk.3.attn_q.weight` is `attn_q.weight`."""
    return name.split(".", 2)[-1] if name.startswith("blk.") else name


def merged_metadata(base: Gguf, head: Gguf) -> dict[str, Value]:
    """The base's metadata with every key that depends on the number of blocks corrected. Raises GgufError."""
    architecture = check_match(base, head)
    blocks, heads = f"{architecture}.block_count", f"{architecture}.nextn_predict_layers"
    count = base.need(blocks, int)
    metadata: dict[str, Value] = {}
    for key, value in base.metadata.items():
        if key == blocks:
            metadata[key] = Value.of(count + 1, GGUFValueType.UINT32)
            metadata[heads] = Value.of(1, GGUFValueType.UINT32)
        elif key.startswith(f"{architecture}.") and value.type is GGUFValueType.ARRAY and len(value) == count:
            metadata[key] = _per_layer(base, key, value, head)
        elif key != heads:
            metadata[key] = value
    return metadata


def _per_layer(base: Gguf, key: str, value: Value, head: Gguf) -> Value:
    """An array that has as many entries as the base has blocks, with the head's appended if it is one entry a block.

    The head's file tells: there a per-layer array has one entry more, and another (rope sections, say) is the same.
    """
    theirs = head.metadata.get(key)
    if theirs == value:
        return value
    if theirs is None or theirs.item_type != value.item_type or len(theirs) != len(value) + 1:
        raise GgufError(f"{base.path}: {key} has an entry for each of {len(value)} blocks, and {head.path} does not say the head's")
    assert value.item_type is not None
    return Value.of([*value.decode(), theirs.decode()[-1]], GGUFValueType.ARRAY, value.item_type)


# Keys that may differ between a base and the head's file without telling two models apart.
_FREE = ("block_count", "nextn_predict_layers", "context_length")


def check_match(base: Gguf, head: Gguf) -> str:
    """The architecture of both. Raises GgufError with both sides where a size, a rotation or a block count differs."""
    architecture = base.architecture
    if base.get("split.count", 0) not in (0, 1):  # merging leaves a 0 behind
        raise GgufError(f"{base.path}: is one shard of a split GGUF: merge it first with llama-gguf-split --merge")
    if head.architecture != architecture:
        raise GgufError(f"{base.path} is {architecture}, {head.path} is {head.architecture}: the head belongs to another model")
    if head_blocks(base):
        raise GgufError(f"{base.path}: has a head already (block {head_blocks(base)[0]})")
    if len(head_blocks(head)) != 1:
        raise GgufError(f"{head.path}: a head of {len(head_blocks(head))} blocks: only a head of one block can be injected")
    blocks, block = base.need(f"{architecture}.block_count", int), head_blocks(head)[0]
    if blocks != block:
        raise GgufError(f"{base.path} has {blocks} blocks, the head in {head.path} is block {block}: it belongs to another model")
    if surplus := [name for name in base.tensors if name.startswith(f"blk.{block}.")]:
        raise GgufError(f"{base.path}: has tensors of block {block} ({surplus[0]}, ...) that its metadata does not declare")
    for key, value in head.metadata.items():
        field = key.removeprefix(f"{architecture}.")
        if field == key or field in _FREE or value.type is GGUFValueType.ARRAY or key not in base.metadata:
            continue
        if base.metadata[key].decode() != value.decode():
            raise GgufError(
                f"{key} is {base.metadata[key].decode()} in {base.path} and {value.decode()} in {head.path}: "
                "the head belongs to another model"
            )
    return architecture
