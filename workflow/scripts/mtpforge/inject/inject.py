"""A head for a GGUF that lacks one: the base's tensors copied unseen, the head's appended, the metadata made to agree.

A GGUF is assembled from pieces under metadata that is made once. Only keys that depend on the number of blocks change;
all others keep their bytes, their types and their order. One is added, whose length puts the trunk at the same place in a block of
the file system as it has in the base, so that both files can share it (see `ranges`).
"""

from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

from gguf.constants import GGMLQuantizationType, GGUFValueType

from mtpforge import progress
from mtpforge.convert import native
from mtpforge.errors import GgufError
from mtpforge.gguf import quant_types, reader, split, writer
from mtpforge.gguf.head import quantizable, trunk_digests, types_of
from mtpforge.gguf.reader import (
    PADDING,
    Gguf,
    TensorInfo,
    Value,
    contents,
    drop_leading_ones,
    select_tensors,
)
from mtpforge.inject.match import belong, check_match
from mtpforge.io import atomic
from mtpforge.io.ranges import FileRange, Payload, Sink, sha256
from mtpforge.llama_cpp import programs
from mtpforge.quantize.llama_quantize import quantize
from mtpforge.quantize.recipe import Recipe, head_types

Piece: TypeAlias = tuple[TensorInfo, Payload]


def inject(
    base: Path, head: Path, out: Path, head_type: Recipe = (), bin_dir: Path = programs.DEFAULT_BIN,
    replace_head: bool = False, digests: Path | None = None,
) -> None:  # fmt: skip
    """Give `base` the head of `head`, a GGUF or a checkpoint folder, at `head_type` (default: as it is there).

    `base` is a GGUF, or the first file of a split one; `out` is a GGUF or, for a split base, a folder that gets its files.
    `head_type` is as `recipe.head_recipe` makes it. A base that has this very head is copied as it is;
    another head is replaced if `replace_head` says so. What the head costs is shown before the work; `digests` is written with
    the sha256 of each tensor of the trunk as it is, and of the head as it will be. Raises GgufError where base and head do
    not belong together.
    """
    if not base.is_file():  # a pipe would wait for ever
        raise GgufError(f"{base}: no such file")
    with atomic.scratch_folder(out) as scratch:
        files = split.shards(base)
        opened, single = split.joined(files), len(files) == 1
        if single and out.suffix != ".gguf":
            raise GgufError(
                f"{out}: the output is a file, F.gguf; only a split base can be written to a folder"
            )
        given = _open_head(head, scratch)
        check_match(opened, given)
        progress.say(cost(opened, given, head_type))
        before = trunk_digests(opened) if digests else {}
        new = _at_types(given, head_type, scratch, bin_dir)
        if digests:
            atomic.write_json(
                digests, {**before, **{name: sha256(piece) for name, piece in new.ranges.items()}}
            )
        differences = _differences(opened, new) if opened.head.tensors else []
        if differences and not replace_head:
            raise GgufError(
                f"{base}: has another head ({differences[0]}): --replace-head, replace_head: true, puts this in its place"
            )
        same = bool(opened.head.tensors) and not differences
        if same:
            progress.say(f"{base} has this head already, byte for byte")
        if same and single:
            _copy(opened.path, out)
        elif out.suffix == ".gguf":
            assemble(opened, new, out)
        else:
            _assemble_files(files, opened, new, out, same)


# ── the head ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _open_head(head: Path, scratch: Path) -> Gguf:
    """What has the head, as a GGUF that goes by the name that was given. Raises GgufError, CheckpointError."""
    place = scratch / "head-BF16.gguf" if head.is_dir() else head
    if head.is_dir():
        native.convert(head, place, "head")
    opened = replace(split.read(place), path=head)
    if not opened.head.tensors:
        raise GgufError(
            f"{head}: has no head (no nextn_predict_layers, or no tensors of its block)"
        )
    return opened


def _planned(head: Gguf, recipe: Recipe) -> list[TensorInfo]:
    """The head's tensors at the types that they will have."""
    types = head_types(head, recipe) if recipe else {}
    return [
        replace(
            info,
            type=GGMLQuantizationType[
                quant_types.fitting(types.get(name, info.type.name), info.shape[-1])
            ],
        )
        for name, info in head.head.tensors.items()
    ]


def cost(base: Gguf, head: Gguf, recipe: Recipe = ()) -> str:
    """What the head adds to the base, in bytes and bits. Raises ConfigError."""
    infos = _planned(head, recipe)
    size, weights = sum(info.size for info in infos), sum(info.elements for info in infos)
    before = sum(info.size for info in base.tensors.values())
    types = "/".join(dict.fromkeys(info.type.name for info in infos if quantizable(info)))
    return (
        f"the head at {types}: {len(infos)} tensors, {size:,} bytes, {8 * size / weights:.2f} bits per weight; "
        f"{100 * size / before:.1f}% on top of {base.path.name}"
    )


def _at_types(head: Gguf, head_type: Recipe, scratch: Path, bin_dir: Path) -> Gguf:
    """The head alone, at the types asked for. Raises GgufError, ConfigError, ToolchainError."""
    alone = head.head
    if not head_type or _planned(head, head_type) == list(alone.tensors.values()):
        return alone
    if types_of(alone) != {"BF16"}:
        own = "/".join(sorted(types_of(alone)))
        wanted = "/".join(dict.fromkeys(kind for _, kind in head_type))
        raise GgufError(
            f"{head.path}: a head at {own} cannot be requantized to {wanted}: give the BF16 head"
        )
    writer.write(scratch / "head.gguf", head.metadata, contents(alone))
    # Any quantized type of file serves: for every matrix of a head there is an override.
    quantize(scratch / "head.gguf", scratch / "quantized.gguf", "Q8_0", head_type, bin_dir=bin_dir)
    return reader.read(scratch / "quantized.gguf")


def _differences(base: Gguf, head: Gguf) -> list[str]:
    """In what the base's own head differs from this one."""
    own = base.head
    problems = [f"{name} is not there" for name in head.tensors.keys() - own.tensors.keys()]
    problems += [f"{name} is more" for name in own.tensors.keys() - head.tensors.keys()]
    for name in head.tensors.keys() & own.tensors.keys():
        ours, theirs = own.tensors[name], head.tensors[name]
        if (ours.type, drop_leading_ones(ours.shape)) != (
            theirs.type,
            drop_leading_ones(theirs.shape),
        ):
            problems.append(
                f"{name} is {ours.type.name} {list(ours.shape)}, not {theirs.type.name} {list(theirs.shape)}"
            )
        elif sha256(own.ranges[name]) != sha256(head.ranges[name]):
            problems.append(f"{name} has other values")
    return sorted(problems)


# ── the whole ───────────────────────────────────────────────────────────────────────────────────────────────────────


def assemble(base: Gguf, head: Gguf, out: Path) -> None:
    """Write base and head as one file. Raises GgufError."""
    trunk = base.trunk
    tensors = contents(trunk) + _fitted(head, trunk)
    writer.write(out, writer.padded(merged_metadata(base, head), tensors, trunk), tensors)


def _assemble_files(files: list[Gguf], base: Gguf, head: Gguf, folder: Path, same: bool) -> None:
    """Write base and head in files as the base has them, the head in the last; as they are if they have this head already.

    Raises ConfigError, GgufError.
    """
    split.check_target(
        base.path, folder, files[0].path.name.removesuffix(f"-00001-of-{len(files):05}.gguf")
    )
    trunk = base.trunk
    first = merged_metadata(replace(base, metadata=files[0].metadata), head)
    with atomic.replacing_folder(folder.resolve()) as temporary:
        for file in files:
            if same:
                _copy(file.path, temporary / file.path.name)
                continue
            kept = select_tensors(file, [name for name in file.tensors if name in trunk.tensors])
            tensors = contents(kept) + (_fitted(head, trunk) if file is files[-1] else [])
            metadata = (
                first
                if file is files[0]
                else {**file.metadata, "split.tensors.count": first["split.tensors.count"]}
            )

            writer.write(
                temporary / file.path.name, writer.padded(metadata, tensors, kept), tensors
            )


def _copy(source: Path, out: Path) -> None:
    size = source.stat().st_size
    with (
        progress.bar(out.name) as show,
        atomic.replacing(out) as temporary,
        temporary.open("wb") as file,
    ):
        Sink(file.fileno(), lambda done: show(done, size)).append([FileRange(source, 0, size)])


def _fitted(head: Gguf, trunk: Gguf) -> list[Piece]:
    """The head's tensors; a matrix of one row, which some programs write as a vector, as the trunk has it."""
    written = {_in_block(name): info.shape for name, info in trunk.tensors.items()}
    return [
        (
            replace(info, shape=drop_leading_ones(info.shape))
            if written.get(_in_block(info.name)) == drop_leading_ones(info.shape)
            else info,
            payload,
        )
        for info, payload in contents(head)
    ]


def _in_block(name: str) -> str:
    """A tensor's name without its block: `blk.3.attn_q.weight` is `attn_q.weight`."""
    return name.split(".", 2)[-1] if name.startswith("blk.") else name


# ── metadata ────────────────────────────────────────────────────────────────────────────────────────────────────────


def merged_metadata(base: Gguf, head: Gguf) -> dict[str, Value]:
    """The base's metadata with every key that depends on the number of blocks or tensors corrected. Raises GgufError."""
    architecture = base.architecture
    blocks, heads = f"{architecture}.block_count", f"{architecture}.nextn_predict_layers"
    count, added = base.need(blocks, int), len(head.head_blocks)
    metadata: dict[str, Value] = {}
    for key, value in base.metadata.items():
        if key == blocks:
            metadata[key] = Value.of(base.head_blocks.start + added, value.type)
            # llama.cpp takes any number there, other programs only this type.
            metadata[heads] = Value.of(added, GGUFValueType.UINT32)
        elif key == "split.tensors.count" and value.type is not GGUFValueType.ARRAY:
            metadata[key] = Value.of(len(base.trunk.tensors) + len(head.tensors), value.type)
        elif (
            key.startswith(f"{architecture}.")
            and value.type is GGUFValueType.ARRAY
            and len(value) == count
        ):
            metadata[key] = _per_layer(base, key, head)
        elif key not in (heads, PADDING):
            metadata[key] = value
    return metadata


def _per_layer(base: Gguf, key: str, head: Gguf) -> Value:
    """An array that has as many entries as the base has blocks, with the head's if it is one entry a block.

    The head's file tells: there a per-layer array has the head's entries too, and another (rope sections, say) is the same.
    """
    value, theirs = base.metadata[key], head.metadata.get(key)
    if theirs == value:
        return value
    if theirs is None or theirs.item_type != value.item_type or not belong(base, key, head):
        raise GgufError(
            f"{base.path}: {key} has an entry for each of {len(value)} blocks, and {head.path} does not say the head's"
        )
    trunk = base.head_blocks.start
    assert value.item_type is not None
    return Value.of(
        [*value.decode()[:trunk], *theirs.decode()[trunk:]], GGUFValueType.ARRAY, value.item_type
    )
