"""Injection of a head into a GGUF that has none, or has a different one.

The base's tensors are copied unchanged and the head's are appended. Only metadata that depends on
the number of blocks changes; every other key keeps its bytes, type and place. A padding key is
added that aligns the trunk with the base's, so that both files can share its blocks on disk (see
`io.ranges`).
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from gguf.constants import GGMLQuantizationType, GGUFValueType

from mtpforge import progress, recorded_digests
from mtpforge.checkpoint.checkpoint import Checkpoint
from mtpforge.convert import native
from mtpforge.errors import GgufError
from mtpforge.gguf import norm_form, quant_types, reader, split, writer
from mtpforge.gguf.head import quantizable, types_of
from mtpforge.gguf.metadata import Value
from mtpforge.gguf.reader import (
    PADDING,
    Gguf,
    TensorInfo,
    contents,
    drop_leading_ones,
    header_range,
    select_tensors,
)
from mtpforge.inject.match import check_match, same_value
from mtpforge.io import atomic, storage
from mtpforge.io.integrity import HEADER
from mtpforge.io.ranges import FileRange, Payload, Sink, sha256
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.quantize.llama_quantize import quantize
from mtpforge.quantize.recipe import Recipe, head_types
from mtpforge.quantize.request import QuantizeRequest

Tensor: TypeAlias = tuple[TensorInfo, Payload]

Check: TypeAlias = Callable[[Path], None]
"""Gets the written file or folder before that gets its name."""


@dataclass(frozen=True)
class Options:
    """How to inject a head; by default it keeps its types."""

    head_types: Recipe = ()
    """As `recipe.head_recipe` makes it."""
    norm_form: str | None = None
    """The form of norms of a checkpoint whose values do not tell it."""
    replace_head: bool = False
    """Whether to replace a different head of the base, which is otherwise an error."""
    digests: Path | None = None
    """JSON to write first: the sha256 of each tensor of the trunk and of the new head, and of the
    header unless the output is split."""
    base_recorded: Path | None = None
    head_recorded: Path | None = None
    """Digests recorded of base and head (see `recorded`)."""


def inject(
    base: Path,
    head: Path,
    out: Path,
    options: Options = Options(),
    llama: LlamaCpp = LlamaCpp(),
) -> None:
    """Write `base` with the head of `head`, a GGUF or a checkpoint folder, after printing its cost.

    `base` is a GGUF or the first file of a split one; `out` is a GGUF or, for a split base, a
    folder. A base that already has this very head is copied. Raises GgufError if base and head do
    not belong together, ConfigError for impossible types, ToolchainError if llama-quantize fails.
    """
    if not base.is_file():  # opening a pipe would block
        problem = "is a folder: name its GGUF" if base.is_dir() else "no such file"
        raise GgufError(f"{base}: {problem}")
    with atomic.scratch_folder(out) as scratch:
        files = recorded_digests.shards(base, options.base_recorded)
        if len(files) == 1 and out.suffix != ".gguf":
            raise GgufError(
                f"{out}: name a file F.gguf: only a split base can be written to a folder"
            )
        whole = split.joined(files)
        given = _open_head(head, scratch, options)
        check_match(whole, _with_vocabulary(given), _trunk_of(given))
        _check_norms(given)
        progress.say(cost(whole, given, options.head_types))
        _check_space(files, whole, head=given, types=options.head_types, out=out)
        with _hashing(files, given, options, llama.processors) as check_inputs:
            new = _quantized(given, options.head_types, scratch=scratch, llama=llama)

            def check(written: Path) -> None:
                digests = check_inputs()
                if options.digests:
                    _write_digests(options.digests, written, digests=digests, base=whole, head=new)

            if _has_head(whole, new, options.replace_head):
                progress.say(f"{base} already has this head, byte for byte")
                _copy_all(files, new, out, check)
            elif out.suffix == ".gguf":
                _write_file(whole, new, out, check)
            else:
                _write_folder(files, new, out, check)


@contextmanager
def _hashing(
    files: list[Gguf], head: Gguf, options: Options, threads: int
) -> Iterator[Callable[[], dict[str, str]]]:
    """Hash base and head while the block reads them.

    Yields a function that returns the digests of the base's tensors. It raises DamagedError if base
    or head is not what was recorded.
    """
    of_base: list[tuple[str, FileRange]] = []
    if options.digests or options.base_recorded:
        of_base += recorded_digests.places(files)
    of_head = head.head.ranges.items() if options.head_recorded and head.path.is_file() else ()
    with (
        recorded_digests.hashing(options.base_recorded, of_base, threads) as check_base,
        recorded_digests.hashing(options.head_recorded, of_head) as check_head,
    ):

        def check() -> dict[str, str]:
            check_head()
            return check_base()

        yield check


# ── the head ──


def _open_head(head: Path, scratch: Path, options: Options) -> Gguf:
    """The GGUF with the head, converted if needed, under the given name.

    Raises GgufError, CheckpointError; DamagedError if it is not what was recorded.
    """
    if head.is_dir():
        place = scratch / "head-BF16.gguf"
        checkpoint = Checkpoint(head, norms=options.norm_form, recorded=options.head_recorded)
        if note := native.convert_checkpoint(checkpoint, place, "head"):
            progress.say(note)
        files = [reader.read(place)]
    else:
        files = recorded_digests.shards(head, options.head_recorded)
    opened = replace(split.joined(files), path=head)
    if not opened.head.tensors:
        raise GgufError(
            f"{head}: has no head: nextn_predict_layers or the tensors of its blocks are missing"
        )
    if unread := reader.unreadable(opened.head):
        raise GgufError(
            f"{head}: its head has tensors at {', '.join(unread)}, which cannot be read: give a "
            "head at a type of llama.cpp"
        )
    return opened


def _trunk_of(head: Gguf) -> Mapping[str, TensorInfo] | None:
    """The tensors of the trunk that a head was trained with, if its file or folder has that."""
    if head.path.is_dir():
        return native.trunk(head.path)
    return head.trunk.tensors if "blk.0.attn_norm.weight" in head.tensors else None


def _with_vocabulary(head: Gguf) -> Gguf:
    """The head with the vocabulary that it was trained with, if that is in its file or folder."""
    if not head.path.is_dir():
        return head
    return replace(head, metadata={**head.metadata, **native.vocabulary(head.path)})


def _check_norms(head: Gguf) -> None:
    """Refuse a head in which 1 is not added to the norms, or twice. Raises GgufError."""
    if wrong := norm_form.describe(norm_form.shifts(head.head)):
        raise GgufError(f"{head.path}: {wrong}: take the head of the original checkpoint")


def cost(base: Gguf, head: Gguf, types: Recipe = ()) -> str:
    """Return how many bytes and bits per weight the head adds. Raises ConfigError."""
    infos = planned_head(head, types)
    size = sum(info.size for info in infos)
    bits = 8 * size / sum(info.elements for info in infos)
    before = sum(info.size for info in base.tensors.values())
    matrices = [info for info in infos if quantizable(info, head.architecture)]
    names = "/".join(dict.fromkeys(info.type.name for info in matrices))
    coarse = "; below 4 bits a head drafts badly" if bits < 4 else ""
    return (
        f"the head at {names}: {len(infos)} tensors, {size:,} bytes, {bits:.2f} bits per weight; "
        f"{100 * size / before:.1f}% on top of {base.path.name}{coarse}"
    )


def planned_head(head: Gguf, types: Recipe) -> list[TensorInfo]:
    """The head's tensors at the types that they will have."""
    asked = head_types(head, types) if types else {}

    def planned(info: TensorInfo) -> TensorInfo:
        name = quant_types.effective_type(asked.get(info.name, info.type.name), info.shape[-1])
        return replace(info, type=GGMLQuantizationType[name])

    return [planned(info) for info in head.head.tensors.values()]


def _quantized(given: Gguf, types: Recipe, scratch: Path, llama: LlamaCpp) -> Gguf:
    """The head alone, at the types asked for. Raises GgufError, ConfigError, ToolchainError."""
    head = given.head
    if not _changes(head, types):
        return head
    if types_of(head) != {"BF16"}:
        own = "/".join(sorted(types_of(head)))
        wanted = "/".join(dict.fromkeys(kind for _, kind in types))
        raise GgufError(
            f"{given.path}: a head at {own} cannot be requantized to {wanted}: give the BF16 head"
        )
    source = scratch / "head.gguf"
    out = scratch / "quantized.gguf"
    writer.write(source, head.metadata, contents(head))
    # Any quantized file type serves: every matrix of the head has an override.
    quantize(source, out, request=QuantizeRequest("Q8_0", head=types), llama=llama)
    source.unlink()  # the result needs its space
    return reader.read(out)


def _changes(head: Gguf, types: Recipe) -> bool:
    """Whether a head has to be quantized to get these types."""
    return bool(types) and planned_head(head, types) != list(head.tensors.values())


def _write_digests(
    path: Path, written: Path, digests: Mapping[str, str], base: Gguf, head: Gguf
) -> None:
    """Record the trunk as it was read, the head, and the header of the output if it is one file."""
    trunk = {name: digests[name] for name in base.trunk.tensors}
    header = {} if written.is_dir() else {HEADER: sha256(header_range(reader.read(written)))}
    atomic.write_json(path, header | trunk | reader.hashes(head.ranges))


def _has_head(base: Gguf, head: Gguf, replace_head: bool) -> bool:
    """Whether the base already has this head. Raises GgufError if it must keep a different one."""
    if not base.head.tensors:
        return False
    differences = _differences(base.head, head)
    if differences and not replace_head:
        raise GgufError(
            f"{base.path}: has another head ({differences[0]}): to replace it, use --replace-head "
            "or set replace_head: true"
        )
    return not differences


def _differences(own: Gguf, head: Gguf) -> list[str]:
    """How the base's own head differs from this one."""
    problems = [f"{name} is missing" for name in head.tensors.keys() - own.tensors.keys()]
    problems += [f"{name} is extra" for name in own.tensors.keys() - head.tensors.keys()]
    for name in head.tensors.keys() & own.tensors.keys():
        ours = own.tensors[name]
        theirs = head.tensors[name]
        if _stored(ours) != _stored(theirs):
            problems.append(f"{name} is {_shown(ours)}, not {_shown(theirs)}")
        elif sha256(own.ranges[name]) != sha256(head.ranges[name]):
            problems.append(f"{name} has other values")
    return sorted(problems)


def _stored(info: TensorInfo) -> tuple[int, tuple[int, ...]]:
    return info.type, drop_leading_ones(info.shape)


def _shown(info: TensorInfo) -> str:
    return f"{info.type.name} {list(info.shape)}"


# ── the output ──


def _check_space(files: list[Gguf], whole: Gguf, head: Gguf, types: Recipe, out: Path) -> None:
    """Raise StorageError if the output does not fit, before the head is quantized.

    If it is, it lies beside the output until that is whole.
    """
    own = [(file.path, file.path.stat().st_size) for file in files]
    replaced = sum(info.size for info in whole.head.tensors.values())
    added = sum(info.size for info in planned_head(head, types))
    copies = 2 if _changes(head.head, types) else 1
    needed = sum(size for _, size in own) - replaced + copies * added
    storage.require(out, needed, storage.shareable(own, out))


def _write_file(base: Gguf, head: Gguf, out: Path, check: Check) -> None:
    """Write base and head as one file. Raises GgufError."""
    tensors = contents(base.trunk) + _appended(head, base.trunk)
    metadata = writer.padded(merged_metadata(base, head), tensors, base.trunk)
    writer.write(out, metadata, tensors, check)


def _write_folder(files: list[Gguf], head: Gguf, folder: Path, check: Check) -> None:
    """Write the base in the same shards, with the head in the last one.

    Raises ConfigError, GgufError.
    """
    base = split.joined(files)
    first = merged_metadata(replace(base, metadata=files[0].metadata), head)
    count = {"split.tensors.count": first["split.tensors.count"]}
    _check_folder(files, folder)
    with atomic.replacing_folder(folder.resolve()) as temporary:
        for file in files:
            trunk = select_tensors(
                file, [name for name in file.tensors if name in base.trunk.tensors]
            )
            tensors = contents(trunk)
            if file is files[-1]:
                tensors += _appended(head, base.trunk)
            metadata = first if file is files[0] else file.metadata | count
            out = temporary / file.path.name
            writer.write(out, writer.padded(metadata, tensors, trunk), tensors)
        check(temporary)


def _copy_all(files: list[Gguf], head: Gguf, out: Path, check: Check) -> None:
    """Copy a base that already has this head; shards are joined if the output is one file."""
    if len(files) == 1:
        _copy(files[0].path, out, check)
    elif out.suffix == ".gguf":
        _write_file(split.joined(files), head, out, check)
    else:
        _check_folder(files, out)
        with atomic.replacing_folder(out.resolve()) as temporary:
            for file in files:
                _copy(file.path, temporary / file.path.name, lambda written: None)
            check(temporary)


def _check_folder(files: list[Gguf], folder: Path) -> None:
    stem = files[0].path.name.removesuffix(f"-00001-of-{len(files):05}.gguf")
    split.check_target(files[0].path, folder, stem)


def _copy(source: Path, out: Path, check: Check) -> None:
    size = source.stat().st_size
    shared = storage.shareable([(source, size)], out)
    with (
        progress.bar(out.name) as show,
        atomic.replacing(out, needed=size, shared=shared) as temporary,
        temporary.open("wb") as file,
    ):
        Sink(file.fileno(), lambda done: show(done, size)).append([FileRange(source, 0, size)])
        check(temporary)


def _appended(head: Gguf, trunk: Gguf) -> list[Tensor]:
    """The head's tensors; a one-row matrix that the trunk stores as a vector becomes one too."""
    trunk_shapes = {_without_block(name): info.shape for name, info in trunk.tensors.items()}

    def appended(info: TensorInfo) -> TensorInfo:
        shape = drop_leading_ones(info.shape)
        same = trunk_shapes.get(_without_block(info.name)) == shape
        return replace(info, shape=shape) if same else info

    return [(appended(info), payload) for info, payload in contents(head)]


def _without_block(name: str) -> str:
    """A tensor's name without its block: `blk.3.attn_q.weight` is `attn_q.weight`."""
    return name.split(".", 2)[-1] if name.startswith("blk.") else name


# ── metadata ──


def merged_metadata(base: Gguf, head: Gguf) -> dict[str, Value]:
    """The base's metadata, corrected wherever it depends on the number of blocks or tensors.

    Raises GgufError.
    """
    prefix = f"{base.architecture}."
    blocks = f"{prefix}block_count"
    heads = f"{prefix}nextn_predict_layers"
    count = base.need(blocks, int)
    added = len(head.head_blocks)
    metadata: dict[str, Value] = {}
    for key, value in base.metadata.items():
        is_array = value.type is GGUFValueType.ARRAY
        if key == blocks:
            metadata[key] = Value.of(base.head_blocks.start + added, value.type)
            # llama.cpp accepts any integer type here, other programs only this one.
            metadata[heads] = Value.of(added, GGUFValueType.UINT32)
        elif key == "split.tensors.count" and not is_array:
            metadata[key] = Value.of(len(base.trunk.tensors) + len(head.tensors), value.type)
        elif key.startswith(prefix) and is_array and len(value) == count:
            metadata[key] = _per_block(base, key, head)
        elif key not in (heads, PADDING):
            metadata[key] = value
    return metadata


def _per_block(base: Gguf, key: str, head: Gguf) -> Value:
    """An array with one entry per base block; the head's entries are added if it is per block.

    Rope sections and the like can have that length by chance. They are equal in the head's file,
    where a per-block array also has the head's entries, or one value stands for all blocks.
    """
    value = base.metadata[key]
    if head.metadata.get(key) == value:
        return value
    if key not in head.metadata or not same_value(base, key, head):
        raise GgufError(
            f"{base.path}: {key} has an entry for each of {len(value)} blocks, "
            f"but {head.path} has none for the head"
        )
    trunk = base.head_blocks.start
    theirs = head.get(key)
    added = theirs[trunk:] if isinstance(theirs, list) else [theirs] * len(head.head_blocks)
    entries = [*value.decode()[:trunk], *added]
    return Value.of(entries, GGUFValueType.ARRAY, value.item_type)
