"""Which safetensors files in a folder are the model, by its index or their names, and its tensors.

Names must be plain file names, and index and shards must agree.
"""

import re
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from mtpforge.checkpoint.safetensors import CheckpointTensor, read_shard_header
from mtpforge.errors import CheckpointError
from mtpforge.io.text import is_there, parse_json, read_text

INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_HEAD_FILE = re.compile(r"(.+[._-])?(?i:mtp|nextn)([._-].+)?\.safetensors")
_NUMBERED = re.compile(r"(.+-)(\d{3,6})-of-(\d{3,6})\.safetensors")
_SHARD_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}\.safetensors")


@dataclass(frozen=True)
class Weights:
    """The tensors of a checkpoint by name."""

    tensors: dict[str, CheckpointTensor]
    lost: dict[str, str]
    """Tensors of a head or vision tower that the index lists and no shard has, with the shard.

    Other parts of the model can do without them.
    """

    @property
    def files(self) -> set[str]:
        """The files that have the tensors."""
        return {tensor.shard for tensor in self.tensors.values()}


def model_files(names: Collection[str], indexed: Collection[str] = ()) -> list[str]:
    """Return the safetensors files that make up a model, of the `names` in its folder, sorted.

    These are the `indexed` ones, or without an index `model.safetensors`, or else `model*`; and
    beside them files that are named after a head. Adapters, optimizer states and other sets of
    shards are not among them.
    """
    weights = [name for name in names if name.endswith(".safetensors")]
    models = [name for name in weights if name.startswith("model")]
    model = indexed or ([_SINGLE] if _SINGLE in models else models)
    heads = [name for name in weights if _HEAD_FILE.fullmatch(name)]
    return sorted({*model, *heads})


def files_beside(directory: Path) -> list[str]:
    """Return the safetensors files in a folder that are no part of its model.

    Only names and index tell; none if the index is malformed, which conversion reports.
    """
    present = weight_files(directory)
    index = directory / INDEX
    try:
        expected = _parse_index(index, read_text(index)) if is_there(index) else {}
    except CheckpointError:
        return []
    return sorted({*present} - {*model_files(present, {*expected.values()})})


def head_names(names: Collection[str]) -> set[str]:
    """Return the names of a head's tensors: `mtp.*`, or layers that have a head's projections."""
    outside = r"(?:(?:model|language_model)\.)*"
    marked = rf"({outside}layers\.\d+\.)(?:eh_proj|enorm|hnorm|shared_head)\."
    layers = {found[1] for name in names if (found := re.match(marked, name))}
    own = re.compile(rf"{outside}mtp(?:_\w+)?\.")
    return {name for name in names if own.match(name) or name.startswith(tuple(layers))}


def gather_tensors(
    path: Path,
    index: str | None,
    present: Collection[str],
    read: Callable[[str], list[CheckpointTensor]],
) -> Weights:
    """Collect the tensors of all shards, whose headers `read` returns, from disk or the Hub.

    `path` is the checkpoint in messages, `index` the text of its index if it has one, `present` the
    names of its safetensors files. Raises CheckpointError if index and shards disagree.
    """
    expected = _parse_index(path / INDEX, index) if index is not None else {}
    indexed = set(expected.values())
    if _SINGLE in {*present} - indexed and indexed & {*present}:
        raise CheckpointError(
            f"{path}: {_SINGLE} and the shards of {INDEX} are two models: keep the right one alone "
            "in a folder, the shards with their index, and give its path"
        )
    files = model_files(present, indexed)
    heads = [name for name in files if _HEAD_FILE.fullmatch(name) and name not in indexed]
    shards = [name for name in files if name not in heads]
    if index is None:
        _check_numbers(path, shards)
    else:
        shards = _needed_shards(path, expected, present)
    tensors: dict[str, CheckpointTensor] = {}
    for name in shards:
        _add(path, tensors, read(name))
    if index is not None:
        _check_index(path / INDEX, expected, tensors)
    for name in heads:
        head = read(name)
        if head_names([tensor.name for tensor in head]):
            _add(path, tensors, head)
    return Weights(tensors, {name: expected[name] for name in expected.keys() - tensors.keys()})


def read_weights(directory: Path) -> Weights:
    """Return the tensors of the model in a folder, in the order of its shards and their headers.

    Raises CheckpointError.
    """
    index = directory / INDEX
    present = weight_files(directory)
    if not is_there(index) and not model_files(present):
        hint = "convert the weights to safetensors, or download them"
        if present:
            hint = f"rename {min(present)} if it is the model, merge it if it is an adapter"
        raise CheckpointError(f"{directory}: no {INDEX} and no model*.safetensors file: {hint}")
    text = read_text(index) if is_there(index) else None
    return gather_tensors(
        directory, text, present=present, read=lambda shard: read_shard_header(directory / shard)
    )


def weight_files(directory: Path) -> list[str]:
    """Return the names of all safetensors files in a folder."""
    return [path.name for path in directory.glob("*.safetensors")]


def _add(
    path: Path, tensors: dict[str, CheckpointTensor], shard: Collection[CheckpointTensor]
) -> None:
    for tensor in shard:
        if tensor.name in tensors:
            first = tensors[tensor.name].shard
            raise CheckpointError(
                f"{path}: tensor {tensor.name} is in {first} and in {tensor.shard}: "
                "delete the wrong one"
            )
        tensors[tensor.name] = tensor


def _spare_names(names: Collection[str]) -> set[str]:
    """Return the names of tensors without which the trunk can be converted."""
    vision = re.compile(r"(?:(?:model|language_model)\.)*(?:visual|vision_tower)\.")
    return head_names(names) | {name for name in names if vision.match(name)}


def _parse_index(path: Path, text: str) -> dict[str, str]:
    weight_map = parse_json(path, text).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path}: 'weight_map' must map tensor names to shards")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or not _SHARD_NAME.fullmatch(shard):
            raise CheckpointError(
                f"{path}: tensor {name}: {shard!r} is not a plain *.safetensors file name"
            )
    return {sys.intern(name): sys.intern(shard) for name, shard in weight_map.items()}


def _needed_shards(path: Path, expected: Mapping[str, str], present: Collection[str]) -> list[str]:
    """Return the shards of an index, without absent ones that the trunk does not need.

    Raises CheckpointError if the index is that of other shards.
    """
    indexed = {*expected.values()}
    others = [name for name in model_files(present) if not _HEAD_FILE.fullmatch(name)]
    if others and not indexed & {*present}:
        raise CheckpointError(
            f"{path / INDEX}: none of its {len(indexed)} shards is there, but {others[0]} is: if "
            f"that is the model, delete {INDEX}"
        )
    if indexed <= {*present}:
        return sorted(indexed)
    spare = _spare_names(expected)
    needed = {shard for name, shard in expected.items() if name not in spare}
    return sorted(needed | indexed & {*present})


def _check_numbers(path: Path, files: Collection[str]) -> None:
    """Check that numbered files without an index are one set, and complete."""
    found = [match for name in files if (match := _NUMBERED.fullmatch(name))]
    sets = sorted({f"{match[1]}*-of-{match[3]}" for match in found})
    if len(sets) > 1:
        raise CheckpointError(
            f"{path}: several sets of shards ({', '.join(sets)}) and no {INDEX}: "
            "delete the wrong ones"
        )
    if not found:
        return
    start, width, total = found[0][1], len(found[0][2]), found[0][3]
    numbers = {int(match[2]) for match in found}
    for number in range(1, int(total) + 1):
        if number not in numbers and not (number == int(total) and 0 in numbers):
            name = f"{start}{number:0{width}}-of-{total}.safetensors"
            raise CheckpointError(f"{path / name}: shard is missing: download it again")


def _check_index(
    path: Path, expected: Mapping[str, str], found: Mapping[str, CheckpointTensor]
) -> None:
    """Check that shards and index have the same tensors; in which shard does not matter."""
    absent = expected.keys() - found.keys()
    if absent and (absent := absent - _spare_names(expected)):
        name = min(absent)
        raise CheckpointError(
            f"{path}: tensor {name} is not in {expected[name]} ({len(absent)} such tensors): "
            "download both again, or delete the index if the shards are right"
        )
    if surplus := sorted(found.keys() - expected.keys()):
        raise CheckpointError(
            f"{found[surplus[0]].shard}: tensor {surplus[0]} is absent from {path.name} "
            f"({len(surplus)} such tensors): index and shards are from different versions: "
            "download both again, or delete the index if the shards are right"
        )
