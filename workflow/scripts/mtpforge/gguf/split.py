"""Split GGUFs, for hosts that limit the size of a file: reading, writing and checking them.

Splitting produces the bytes of `llama-gguf-split --split-max-size`, with three differences:
- A tensor larger than the limit is refused. llama-gguf-split writes a file above the limit, or
  fails if that tensor is the first one.
- A GGUF that fits into one file keeps a name without a number, because Ollama cannot pull shards.
- The files appear together or not at all.

As in llama-gguf-split, the limit counts tensors with their padding. The header comes on top: a few
megabytes in the shard with the vocabulary.
"""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from gguf.constants import GGUFValueType

from mtpforge import processors
from mtpforge.errors import ConfigError, GgufError
from mtpforge.gguf import reader, writer
from mtpforge.gguf.file_names import shard_names
from mtpforge.gguf.metadata import Value
from mtpforge.gguf.reader import Gguf, TensorInfo, aligned, drop_leading_ones
from mtpforge.gguf.writer import Check, Tensors
from mtpforge.io import leftovers, storage, temporary
from mtpforge.io.atomic import check_room, link_or_copy, replacing_folder
from mtpforge.io.journal import Journal
from mtpforge.io.ranges import FileRange, sha256

_UNITS = {"M": 10**6, "G": 10**9}
_SIZE = re.compile(r"[1-9][0-9]{0,8}[MG]")
_HEADER = "header"


def parse_size(text: str) -> int:
    """The bytes of a size such as 500M or 48G, in powers of ten. Raises ConfigError.

    Stricter than llama-gguf-split, which reads 1.5G as 1G.
    """
    if not _SIZE.fullmatch(text):
        plain = re.sub(r"I?B$", "", text[:40].upper().replace(" ", ""))
        meant = f"; did you mean {plain}?" if _SIZE.fullmatch(plain) else ""
        raise ConfigError(
            f"invalid size {text[:40]!r}: give whole megabytes (10^6 bytes) or gigabytes, "
            f"such as 500M or 48G{meant}"
        )
    return int(text[:-1]) * _UNITS[text[-1]]


# ── reading ──


def read(path: Path) -> Gguf:
    """Open a GGUF as a whole, given its file or, if split, its first file. Raises GgufError."""
    return joined(shards(path))


def shards(path: Path) -> list[Gguf]:
    """Open all files of a GGUF, given the first one. Raises GgufError."""
    path = Path(path)
    first = reader.read(path)
    count = first.get("split.count", 0)
    if type(count) is not int:
        raise GgufError(f"{path}: split.count is not a number")
    if count in (0, 1):  # merging leaves a 0 behind
        return [first]
    match = re.fullmatch(r"(.+)-00001-of-([0-9]{5})\.gguf", path.name)
    if match is None or int(match[2]) != count:
        raise GgufError(
            f"{path}: is one of {count} files: give the first, named NAME-00001-of-{count:05}.gguf"
        )
    files = [first]
    for name in shard_names(match[1], count)[1:]:
        files.append(reader.read(path.parent / name))
        _check_headers(files)
    _check_shards(files)
    return files


def files_of(opened: Gguf) -> list[Path]:
    """The files of a GGUF that `read` opened, in order."""
    return sorted({opened.path, *(place.path for place in opened.ranges.values())})


def header_name(path: Path) -> str:
    """The name of a file's header among the digests of a GGUF; only the first one's is `header`."""
    number = re.search(r"-([0-9]{5})-of-[0-9]{5}\.gguf$", path.name)
    return f"{_HEADER} {int(number[1])}" if number and int(number[1]) > 1 else _HEADER


def is_other_header(name: str) -> bool:
    """Whether this is the name of the header of a second file, or of one after that."""
    return name.startswith(f"{_HEADER} ")


def digests_of(opened: Gguf, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """The sha256 of the header of each file, and of each tensor, unless it is known."""
    known = known or {}
    headers = (reader.header_range(replace(opened, path=path)) for path in files_of(opened))
    places = {header_name(place.path): place for place in headers}
    places |= opened.ranges
    unknown = {name: place for name, place in places.items() if name not in known}
    found = {**known, **reader.hashes(unknown)}
    return {name: found[name] for name in places}


def _check_headers(files: Sequence[Gguf]) -> None:
    """Limit what all headers take together as that of a single file is limited."""
    size = sum(reader.header_range(file).size for file in files)
    if size > reader.HEADER_LIMIT or sum(len(file.tensors) for file in files) > reader.MOST_TENSORS:
        raise GgufError(f"{files[0].path}: its shards have larger headers than any real model")


def _check_shards(files: Sequence[Gguf]) -> None:
    for number, file in enumerate(files):
        stated = (file.get("split.no"), file.get("split.count"))
        if stated != (number, len(files)):
            raise GgufError(
                f"{file.path}: its metadata says that it is shard {str(stated[0])[:40]} of "
                f"{str(stated[1])[:40]}, expected shard {number} of {len(files)} (counted from 0)"
            )
    tensors = sum(len(file.tensors) for file in files)
    if (total := files[0].get("split.tensors.count")) != tensors:
        raise GgufError(
            f"{files[0].path}: split.tensors.count is {str(total)[:40]}, "
            f"but the {len(files)} files have {tensors} tensors"
        )


def joined(files: Sequence[Gguf]) -> Gguf:
    """All files of a GGUF as one, without the `split.*` keys. Raises GgufError."""
    if len(files) == 1:
        return files[0]
    tensors: dict[str, TensorInfo] = {}
    ranges: dict[str, FileRange] = {}
    for file in files:
        if twice := tensors.keys() & file.tensors.keys():
            raise GgufError(f"{file.path}: tensor {min(twice)} is also in another shard")
        tensors |= file.tensors
        ranges |= file.ranges
    first = files[0]
    metadata = {key: value for key, value in first.metadata.items() if not key.startswith("split.")}
    return Gguf(first.path, metadata, tensors=tensors, ranges=ranges)


# ── writing ──


@contextmanager
def splitting(source: Gguf, folder: Path, stem: str, limit: int) -> Iterator[list[Path]]:
    """Write `source` in files of at most `limit` bytes; yield them in a temporary folder.

    If it is in such files already, they are linked. When the block ends without an error, the
    folder becomes `folder`; an older split there is replaced. Raises ConfigError and GgufError as
    `plan` and `check_target` do, and ForgeError if another process is writing the same folder.
    """
    planned = plan(source, limit)
    check_target(source.path, folder, stem)
    with replacing_folder(folder.resolve(), *_space(source, planned, folder)) as temporary:
        files = [temporary / name for name in shard_names(stem, len(planned))]
        parts = files_of(source)
        if len(parts) == len(files):
            for part, file in zip(parts, files, strict=True):
                link_or_copy(part, file)
        else:
            _write(source, planned, files)
        yield files


@dataclass(frozen=True)
class Writing:
    """How a GGUF is written: in files of at most `limit` bytes, and from a `journal` on."""

    limit: int | None = None
    journal: Journal | None = None


SINGLE = Writing()
"""In one file, from its beginning."""


def write_any(
    out: Path,
    metadata: Mapping[str, Value],
    tensors: Tensors,
    check: Check,
    writing: Writing,
) -> None:
    """Write a GGUF as one file, or with a limit as a folder of files (see `write`)."""
    limit, journal = writing.limit, writing.journal
    if journal:
        start = writer.header(metadata, [info for info, _ in tensors])
        journal.depends_on(header=hashlib.sha256(start).hexdigest(), limit=limit)
    if limit is None:
        writer.write(out, metadata, tensors, check, journal)
    else:
        write(out, metadata, tensors, limit=limit, check=check, journal=journal)
    if journal:
        journal.remove()


def write(
    folder: Path,
    metadata: Mapping[str, Value],
    tensors: Tensors,
    limit: int,
    check: Check = lambda written: None,
    journal: Journal | None = None,
) -> None:
    """Write a GGUF in files of at most `limit` bytes, named after the folder.

    They are what `splitting` makes of the whole file. `check` and `journal` are those of
    `writer.write`. Raises as `splitting` and that do.
    """
    infos = {info.name: info for info, _ in tensors}
    whole = Gguf(folder, dict(metadata), tensors=infos, ranges={})
    planned = plan(whole, limit)
    check_target(folder.parent, folder, folder.name)
    payloads = {info.name: payload for info, payload in tensors}
    needed = writer.size(metadata, list(infos.values()))
    spare = journal.spare if journal else 0
    keep = journal.keeps if journal else False
    with replacing_folder(folder.resolve(), needed - spare, keep=keep) as written:
        if journal and not writer.start(journal, written, needed):
            for left in written.iterdir():
                leftovers.delete(left)
        files = [written / name for name in shard_names(folder.name, len(planned))]
        for number, group in enumerate(planned):
            if files[number].exists():  # finished before a kill
                files[number].rename(temporary.usual_name(files[number], "part"))
            own, entries = one_shard(whole, group, number, len(planned))
            shard = [(info, payloads[info.name]) for info in entries]
            writer.write(files[number], own, shard, check, journal)


def check_space(source: Gguf, folder: Path, limit: int) -> None:
    """Raise StorageError if `source` in files of at most `limit` bytes does not fit."""
    needed, shared = _space(source, plan(source, limit), folder)
    if needed is None:
        check_room(source.path, folder / source.path.name)
    else:
        storage.require(folder, needed, shared)


def _space(source: Gguf, planned: list[list[TensorInfo]], folder: Path) -> tuple[int | None, int]:
    """Bytes of the files, and how many can share blocks with the source; None for links."""
    if len(files_of(source)) == len(planned):
        return None, 0
    size = source.path.stat().st_size
    return size, storage.shareable([(source.path, size)], folder)


def plan(source: Gguf, limit: int) -> list[list[TensorInfo]]:
    """The tensors of each file, in order, for files of at most `limit` bytes.

    Raises ConfigError if a tensor is larger than that, GgufError if `source` is itself a shard, or
    is split in another way.
    """
    if source.get("split.count", 0) not in (0, 1):  # merging leaves a 0 behind
        raise GgufError(
            f"{source.path}: is one shard of a split GGUF: merge it with llama-gguf-split --merge"
        )
    files: list[list[TensorInfo]] = [[]]
    filled = 0
    for info in source.tensors.values():
        size = aligned(info.size)
        if size > limit:
            raise ConfigError(
                f"files of {limit:,} bytes are too small: tensor {info.name} of {source.path} "
                f"takes {size:,}"
            )
        if filled + size > limit:
            files.append([])
            filled = 0
        files[-1].append(info)
        filled += size
    _check_same_split(source, files)
    return files


def _check_same_split(source: Gguf, planned: list[list[TensorInfo]]) -> None:
    """Raise GgufError for a source in several files that are not the planned ones."""
    parts = files_of(source)
    held = [{name for name, at in source.ranges.items() if at.path == part} for part in parts]
    if len(parts) > 1 and held != [{info.name for info in group} for group in planned]:
        raise GgufError(
            f"{source.path}: is split at another size: merge it with llama-gguf-split --merge"
        )


def check_target(source: Path, folder: Path, stem: str) -> None:
    """Raise ConfigError if `stem` cannot begin a file name, or if `folder` has other files."""
    if not re.fullmatch(r"[^./\0][^/\0]*", stem):
        raise ConfigError(f"{stem!r} cannot begin a file name")
    folder = folder.resolve()
    if source.resolve().is_relative_to(folder):
        raise ConfigError(f"{folder}: contains the input {source.name}: give another folder")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise ConfigError(f"{folder}: is a file: give a folder")
    # Snakemake leaves its timestamp in a folder that is an output.
    ours = re.compile(rf"{re.escape(stem)}(-[0-9]{{5}}-of-[0-9]{{5}})?\.gguf|\.snakemake_timestamp")
    for entry in folder.iterdir():
        if entry.is_dir() or not ours.fullmatch(entry.name):
            raise ConfigError(
                f"{folder}: contains {entry.name}, which is not a shard of {stem}: "
                "give another folder"
            )


def _write(source: Gguf, planned: list[list[TensorInfo]], files: list[Path]) -> None:
    for number, infos in enumerate(planned):
        metadata, entries = one_shard(source, infos, number, len(files))
        tensors = [(info, [source.ranges[info.name]]) for info in entries]
        writer.write(files[number], metadata, tensors)


def one_shard(
    source: Gguf, infos: list[TensorInfo], number: int, count: int
) -> tuple[dict[str, Value], list[TensorInfo]]:
    """The metadata of shard `number`, counted from 0, and its tensors; a single file keeps both."""
    if count == 1:
        return source.metadata, infos
    # As llama-gguf-split does: ggml does not distinguish a one-row matrix from a vector.
    entries = [replace(info, shape=drop_leading_ones(info.shape)) for info in infos]
    return _metadata(source, number, count), entries


def _metadata(source: Gguf, number: int, count: int) -> dict[str, Value]:
    """The metadata of shard `number`, counted from 0; the first one also has the source's keys."""
    own = {
        "split.no": Value.of(number, GGUFValueType.UINT16),
        "split.tensors.count": Value.of(len(source.tensors), GGUFValueType.INT32),
        # Last, because llama-gguf-split sets it when it knows the number of shards.
        "split.count": Value.of(count, GGUFValueType.UINT16),
    }
    if number:
        return own
    return {key: value for key, value in source.metadata.items() if key not in own} | own


# ── checking ──


def check(source: Gguf, files: Sequence[Path]) -> list[str]:
    """The faults of `files` as shards of `source`; empty if llama.cpp finds everything in them.

    File names and `split.*` keys must be as llama.cpp needs them, the metadata must equal the
    source's, and each of its tensors must be in exactly one file, byte for byte. Raises OSError.
    """
    if not files:
        return ["there are no files"]
    if len(files) == 1 and files[0].samefile(source.path):
        return []
    problems = _check_names(files)
    holders: dict[str, Gguf] = {}
    for number, path in enumerate(files):
        try:
            shard = reader.read(path)
        except GgufError as error:
            problems.append(str(error))
            continue
        expected = source.metadata if len(files) == 1 else _metadata(source, number, len(files))
        problems += _check_metadata(shard, expected)
        for name in shard.tensors:
            if name in holders:
                problems.append(f"{name} is in {holders[name].path.name} and in {path.name}")
            holders[name] = shard
    problems += [f"{name} is not in the source" for name in holders if name not in source.tensors]
    return problems + _compare(source, holders)


def _check_names(files: Sequence[Path]) -> list[str]:
    stem = files[0].name.removesuffix(shard_names("", len(files))[0])
    if list(files) == [files[0].with_name(name) for name in shard_names(stem, len(files))]:
        return []
    names = ", ".join(file.name for file in files)
    return [f"llama.cpp cannot find all of {names}, given the first"]


def _check_metadata(shard: Gguf, expected: Mapping[str, Value]) -> list[str]:
    return [
        f"{shard.path.name} has a wrong {key}"
        for key in {**expected, **shard.metadata}
        if shard.metadata.get(key) != expected.get(key)
    ]


def _compare(source: Gguf, holders: Mapping[str, Gguf]) -> list[str]:
    """The faults of each of the source's tensors in the file that holds it."""

    def compare(info: TensorInfo) -> str | None:
        shard = holders.get(info.name)
        if shard is None:
            return f"{info.name} is missing"
        found = shard.tensors[info.name]
        if found.type != info.type:
            return f"{info.name} has another type"
        if drop_leading_ones(found.shape) != drop_leading_ones(info.shape):
            return f"{info.name} has another shape"
        one, other = shard.ranges[info.name], source.ranges[info.name]
        same = one.path.samefile(other.path) or sha256(one) == sha256(other)
        return None if same else f"{info.name} differs from the source"

    with ThreadPoolExecutor(processors.allotted()) as pool:
        return [problem for problem in pool.map(compare, source.tensors.values()) if problem]
