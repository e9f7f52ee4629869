"""A GGUF in several files, for hosts that limit the size of one, cut and named as `llama-gguf-split --split-max-size` does.

The shards' bytes are that program's. Three things differ. A tensor that is larger than the limit is refused, where
llama-gguf-split writes a file above the limit, or fails if that tensor is the first. A file that fits stays one file
without a number, because Ollama cannot pull sharded tags. And the files appear together or not at all. As there, the limit
counts tensors with their padding, so a header, megabytes where it holds a vocabulary, comes on top of it.
"""

import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from gguf.constants import GGUFValueType

from mtpforge.errors import ConfigError, GgufError
from mtpforge.gguf import reader, writer
from mtpforge.gguf.names import shard_names
from mtpforge.gguf.reader import Gguf, TensorInfo, Value, aligned, drop_leading_ones
from mtpforge.io.atomic import link_or_copy, replacing_folder
from mtpforge.io.ranges import FileRange, sha256

_UNITS = {"M": 10**6, "G": 10**9}


def parse_size(text: str) -> int:
    """Bytes of a size such as 500M or 48G, in powers of ten as llama-gguf-split takes it. Raises ConfigError.

    Stricter than that program, which reads 1.5G as 1G.
    """
    if not re.fullmatch(r"[1-9][0-9]{0,8}[MG]", text):
        raise ConfigError(
            f"{text[:40]!r} is no size: give whole megabytes (10^6 bytes) or gigabytes, as in 500M or 48G"
        )
    return int(text[:-1]) * _UNITS[text[-1]]


def shards(path: Path) -> list[Gguf]:
    """All files of a GGUF, given the first; of one in a single file, that. Raises GgufError."""
    path = Path(path)
    first = reader.read(path)
    count = first.get("split.count", 0)
    if type(count) is not int:
        raise GgufError(f"{path}: split.count is no number")
    if count in (0, 1):  # merging leaves a 0 behind
        return [first]
    match = re.fullmatch(r"(.+)-00001-of-([0-9]{5})\.gguf", path.name)
    if match is None or int(match[2]) != count:
        raise GgufError(
            f"{path}: is one of {count} files: give the first, by the name that tells the others', NAME-00001-of-0000N.gguf"
        )
    files = [
        first,
        *(reader.read(path.with_name(name)) for name in shard_names(match[1], count)[1:]),
    ]
    for number, file in enumerate(files):
        if (file.get("split.no"), file.get("split.count")) != (number, count):
            said = [str(file.get(key))[:40] for key in ("split.no", "split.count")]
            raise GgufError(f"{file.path}: says that it is file {said[0]} of {said[1]} (from 0 on)")
    tensors = sum(len(file.tensors) for file in files)
    if (stated := first.get("split.tensors.count")) != tensors:
        raise GgufError(
            f"{path}: {str(stated)[:40]} tensors are in these files, it says, and {tensors} are there"
        )
    return files


def read(path: Path) -> Gguf:
    """A GGUF as a whole, in a single file or, given the first, in several. Raises GgufError."""
    return joined(shards(path))


def joined(files: Sequence[Gguf]) -> Gguf:
    """What all files of a GGUF have, without the keys that say that there are several. Raises GgufError."""
    if len(files) == 1:
        return files[0]
    tensors: dict[str, TensorInfo] = {}
    ranges: dict[str, FileRange] = {}
    for file in files:
        if twice := tensors.keys() & file.tensors.keys():
            raise GgufError(f"{file.path}: tensor {min(twice)} stands in another file too")
        tensors |= file.tensors
        ranges |= file.ranges
    metadata = {
        key: value for key, value in files[0].metadata.items() if not key.startswith("split.")
    }
    return Gguf(files[0].path, metadata, tensors, ranges)


def plan(source: Gguf, limit: int) -> list[list[TensorInfo]]:
    """The tensors of each file, in order; `limit` is in bytes. Raises ConfigError, GgufError for what is a shard already."""
    if source.get("split.count", 0) not in (0, 1):  # merging leaves a 0 behind
        raise GgufError(
            f"{source.path}: is one shard of a split GGUF: merge it first with llama-gguf-split --merge"
        )
    shards: list[list[TensorInfo]] = [[]]
    filled = 0
    for info in source.tensors.values():
        size = aligned(info.size)
        if size > limit:
            raise ConfigError(
                f"files of {limit:,} bytes are too small: tensor {info.name} of {source.path} takes {size:,}"
            )
        if filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(info)
        filled += size
    return shards


def check_target(source: Path, folder: Path, stem: str) -> None:
    """Raise ConfigError for a stem that is no file name, or where replacing `folder` would destroy something else."""
    if not re.fullmatch(r"[^./\0][^/\0]*", stem):
        raise ConfigError(f"{stem!r} cannot begin the names of files")
    folder = folder.resolve()
    if source.resolve().is_relative_to(folder):
        raise ConfigError(f"{folder}: holds the input {source.name}: name a folder of its own")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder}: is a file: name a folder")
    # Snakemake marks folders that it has made.
    ours = re.compile(rf"{re.escape(stem)}(-[0-9]{{5}}-of-[0-9]{{5}})?\.gguf|\.snakemake_timestamp")
    for entry in folder.iterdir() if folder.exists() else ():
        if entry.is_dir() or not ours.fullmatch(entry.name):
            raise ConfigError(
                f"{folder}: holds {entry.name}, which is no part of {stem}: name a folder of its own"
            )


@contextmanager
def splitting(source: Gguf, folder: Path, stem: str, limit: int) -> Iterator[list[Path]]:
    """Yield the finished files in a temporary place; `folder` gets them once the caller is done with them without an error.

    `limit` is in bytes. An existing `folder` of this split is replaced.
    Raises ConfigError and GgufError as `plan` and `check_target` do, ForgeError where another process is at it.
    """
    shards = plan(source, limit)
    check_target(source.path, folder, stem)
    with replacing_folder(folder.resolve()) as temporary:
        files = [temporary / name for name in shard_names(stem, len(shards))]
        if len(files) == 1:
            link_or_copy(source.path, files[0])
        else:
            _write(source, shards, files)
        yield files


def _write(source: Gguf, shards: list[list[TensorInfo]], files: list[Path]) -> None:
    for number, infos in enumerate(shards):
        # ggml does not tell a matrix of one row from a vector, so llama-gguf-split writes a vector.
        tensors = [
            (replace(info, shape=drop_leading_ones(info.shape)), [source.ranges[info.name]])
            for info in infos
        ]
        writer.write(files[number], _metadata(source, number, len(files)), tensors)


def _metadata(source: Gguf, number: int, count: int) -> dict[str, Value]:
    """Of one shard, counted from 0: the first has all that the source has."""
    own = {
        "split.no": Value.of(number, GGUFValueType.UINT16),
        "split.tensors.count": Value.of(len(source.tensors), GGUFValueType.INT32),
        "split.count": Value.of(
            count, GGUFValueType.UINT16
        ),  # last, as where it is set once the count is known
    }
    return (
        own
        if number
        else {key: value for key, value in source.metadata.items() if key not in own} | own
    )


def split(source: Path, folder: Path, stem: str, limit: int) -> list[Path]:
    """Write the GGUF `source` into `folder` in files of at most `limit` bytes of tensors; the files. Raises as `splitting`."""
    with splitting(reader.read(source), folder, stem, limit) as files:
        pass
    return [folder / file.name for file in files]


def check(source: Gguf, files: Sequence[Path]) -> list[str]:
    """What is wrong with `files` as the shards of `source`, in words; nothing where llama.cpp finds all of it in them.

    Names and `split.*` keys are as llama.cpp needs them, the metadata is the source's, and each of its tensors stands in
    exactly one file, byte for byte. Raises OSError.
    """
    if not files:
        return ["there are no files"]
    if len(files) == 1 and files[0].samefile(source.path):
        return []  # the same bytes under two names
    problems = []
    stem = files[0].name.removesuffix(shard_names("", len(files))[0])
    if list(files) != [files[0].with_name(name) for name in shard_names(stem, len(files))]:
        problems.append(
            f"llama.cpp does not find {', '.join(file.name for file in files)} by the first one's name"
        )
    holders: dict[str, Gguf] = {}
    for number, path in enumerate(files):
        try:
            shard = reader.read(path)
        except GgufError as error:
            problems.append(str(error))
            continue
        expected = source.metadata if len(files) == 1 else _metadata(source, number, len(files))
        wrong = [
            key
            for key in {**expected, **shard.metadata}
            if shard.metadata.get(key) != expected.get(key)
        ]
        problems += [f"{path.name} has a wrong {key}" for key in wrong]
        problems += [
            f"{name} stands in {holders[name].path.name} and {path.name}"
            for name in shard.tensors
            if name in holders
        ]
        holders |= dict.fromkeys(shard.tensors, shard)
    problems += [f"{name} does not belong there" for name in holders if name not in source.tensors]
    return problems + _compare(source, holders)


def _compare(source: Gguf, holders: dict[str, Gguf]) -> list[str]:
    """What is wrong with each tensor of the source in the file that holds it."""

    def compare(info: TensorInfo) -> str | None:
        if (shard := holders.get(info.name)) is None:
            return f"{info.name} is missing"
        found = shard.tensors[info.name]
        if (found.type, drop_leading_ones(found.shape)) != (
            info.type,
            drop_leading_ones(info.shape),
        ):
            return f"{info.name} has another type or shape"
        same = sha256(shard.ranges[info.name]) == sha256(source.ranges[info.name])
        return None if same else f"{info.name} differs from the source"

    with ThreadPoolExecutor() as pool:
        return [problem for problem in pool.map(compare, source.tensors.values()) if problem]
