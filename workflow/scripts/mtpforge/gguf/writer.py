"""Writing GGUF files. Tensors are streamed from other files or from memory, one after the other."""

import itertools
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from gguf.constants import GGUFValueType

from mtpforge import progress
from mtpforge.errors import GgufError
from mtpforge.gguf.metadata import U32, U64, Value, encode
from mtpforge.gguf.reader import (
    MAGIC,
    NAME_LIMIT,
    PADDING,
    Gguf,
    TensorInfo,
    aligned,
    hashes,
    header_range,
)
from mtpforge.io import storage
from mtpforge.io.atomic import replacing
from mtpforge.io.journal import Journal
from mtpforge.io.ranges import BLOCK, FileRange, Payload, Sink
from mtpforge.progress import Show

Tensors = Sequence[tuple[TensorInfo, Payload]]
Check = Callable[[Path], None]
"""Raises an error if a written file must not get its name."""


def write(
    path: Path,
    metadata: Mapping[str, Value],
    tensors: Tensors,
    check: Check = lambda written: None,
    journal: Journal | None = None,
) -> None:
    """Write a GGUF, whole or not at all, and show progress.

    `check` gets the written file before that gets its name. With a `journal`, the tensors that it
    lists are kept, and others are added to it after `check`. Raises GgufError if a payload does not
    have the size of its tensor, StorageError if the file does not fit on the disk.
    """
    needed = size(metadata, [info for info, _ in tensors])
    spare = journal.spare if journal else 0
    shared = _shareable(tensors, path)
    with (
        replacing(path, journal.keeps if journal else False, needed - spare, shared) as temporary,
        progress.bar(path.name) as show,
    ):
        keeper = _Keeper(journal, check) if journal else None
        if journal:
            start(journal, temporary, needed, shared)
        _write(temporary, metadata, tensors=tensors, show=show, keeper=keeper)
        if not keeper:
            check(temporary)


def start(journal: Journal, temporary: Path, needed: int, shared: int = 0) -> bool:
    """Start a journal of a file of `needed` bytes, as its `start` does.

    Raises StorageError if there will be none, and the disk cannot hold what it would free.
    """
    found = journal.start(temporary)
    if journal.spare and not journal.is_kept:
        progress.say("nothing is freed before the end: file locks do not work on this file system")
        journal.spare = 0
        storage.require(temporary, needed, shared)
    return found


def write_scratch(path: Path, metadata: Mapping[str, Value], tensors: Tensors) -> Gguf:
    """Write a scratch GGUF in place, without starting to flush it to the disk.

    Raises GgufError, StorageError.
    """
    needed = size(metadata, [info for info, _ in tensors])
    with storage.naming(path, needed):
        storage.require(path, needed, _shareable(tensors, path))
        return _write(path, metadata, tensors)


def size(metadata: Mapping[str, Value], infos: Sequence[TensorInfo]) -> int:
    """Bytes of the file with these tensors."""
    return len(header(metadata, infos)) + sum(aligned(info.size) for info in infos)


def lay_out(path: Path, metadata: Mapping[str, Value], infos: Sequence[TensorInfo]) -> Gguf:
    """Write a header in place and give the file its size; `put` fills in the tensors, in any order.

    An existing file is not truncated first, so its pages stay in memory: allocating new ones can
    take longer than copying.
    """
    start = header(metadata, infos)
    sizes = (aligned(info.size) for info in infos)
    offsets = list(itertools.accumulate(sizes, initial=len(start)))
    path.touch()
    with path.open("r+b") as file:
        file.write(start)
        file.truncate(offsets[-1])
    ranges = {
        info.name: FileRange(path, offset, info.size)
        for info, offset in zip(infos, offsets, strict=False)
    }
    return Gguf(path, dict(metadata), tensors={info.name: info for info in infos}, ranges=ranges)


def put(whole: Gguf, name: str, payload: Payload) -> None:
    """Write a tensor's bytes to its place in a file that `lay_out` made.

    Raises GgufError if the payload does not have the size of the tensor.
    """
    descriptor = os.open(whole.path, os.O_WRONLY)
    try:
        start = os.lseek(descriptor, whole.ranges[name].offset, os.SEEK_SET)
        sink = Sink(descriptor, size=start)
        append_run(sink, [whole.tensors[name]], payload)
        sink.flush()
    finally:
        os.close(descriptor)


def padded(metadata: Mapping[str, Value], tensors: Tensors, source: Gguf) -> dict[str, Value]:
    """The metadata with an extra last key that aligns the tensor data with the source's.

    The data then has the same offset within a file system block in both files, so they can share
    the blocks (see `io.ranges`).
    """

    def with_padding(count: int) -> dict[str, Value]:
        return {**metadata, PADDING: Value.of(" " * count, GGUFValueType.STRING)}

    if not source.ranges:
        return dict(metadata)
    size = len(header(with_padding(0), [info for info, _ in tensors]))
    start = min(place.offset for place in source.ranges.values())
    return with_padding((start - size) % BLOCK)


def append_run(sink: Sink, infos: Sequence[TensorInfo], payload: Payload) -> None:
    """Write neighbouring tensors and their padding.

    Raises GgufError if the payload does not have the size of the tensors.
    """
    expected = sum(aligned(info.size) for info in infos[:-1]) + infos[-1].size
    size = sink.append(payload)
    if size != expected:
        names = " to ".join(dict.fromkeys((infos[0].name, infos[-1].name)))
        raise GgufError(f"tensor {names}: expected {expected:,} bytes, got {size:,}")
    sink.append([memoryview(bytes(aligned(size) - size))])


def header(metadata: Mapping[str, Value], tensors: Iterable[TensorInfo]) -> bytes:
    """Everything before the data of these tensors, padded to the alignment.

    Raises GgufError if a tensor's name is too long.
    """
    infos = list(tensors)
    parts = [MAGIC, U32.pack(3), U64.pack(len(infos)), U64.pack(len(metadata))]
    for key, value in metadata.items():
        parts += [encode(key, GGUFValueType.STRING), U32.pack(value.type), value.raw]
    offset = 0
    for info in infos:
        parts.append(_entry(info, offset))
        offset += aligned(info.size)
    block = b"".join(parts)
    return block + bytes(aligned(len(block)) - len(block))


def _entry(info: TensorInfo, offset: int) -> bytes:
    """The header's entry of a tensor whose data is at `offset`."""
    name = encode(info.name, GGUFValueType.STRING)
    if len(name) - U64.size > NAME_LIMIT:
        raise GgufError(f"tensor name {info.name} is longer than ggml's {NAME_LIMIT} bytes")
    shape = struct.pack(f"<I{len(info.shape)}Q", len(info.shape), *reversed(info.shape))
    return name + shape + U32.pack(info.type) + U64.pack(offset)


class _Keeper:
    """Keeps the tensors that a journal lists, and adds those that are written."""

    def __init__(self, journal: Journal, check: Check) -> None:
        self._journal = journal
        self._check = check
        self._new: list[str] = []
        self._size = 0

    def intact(self, whole: Gguf) -> set[str]:
        """The tensors whose bytes still have the journal's digests; it forgets the others."""
        known = {name: whole.ranges[name] for name in self._journal.digests if name in whole.ranges}
        settled = known.keys() & set(self._journal.settled())
        found = hashes({name: known[name] for name in known if name not in settled})
        changed = [name for name in found if found[name] != self._journal.digests[name]]
        self._journal.forget(changed)
        kept = known.keys() - set(changed)
        self._journal.tell(kept)
        return kept

    def wrote(self, infos: Sequence[TensorInfo]) -> bool:
        """Count tensors; whether enough has been written to add it to the journal."""
        self._new += [info.name for info in infos]
        self._size += sum(info.size for info in infos)
        return self._size >= self._journal.step

    def add(self, whole: Gguf, descriptor: int, are_last: bool = False) -> None:
        """Flush and check what has been written, and add it to the journal."""
        os.fsync(descriptor)
        self._check(whole.path)
        written = hashes({name: whole.ranges[name] for name in self._new})
        self._journal.add(written, self._size, are_last)
        self._new, self._size = [], 0


def _write(
    path: Path,
    metadata: Mapping[str, Value],
    tensors: Tensors,
    show: Show | None = None,
    keeper: _Keeper | None = None,
) -> Gguf:
    """Write header and tensors in place; without `show` there is no progress and no flushing."""
    whole = lay_out(path, metadata, [info for info, _ in tensors])
    start = header_range(whole).size
    total = sum(aligned(info.size) for info, _ in tensors)

    def grown(size: int) -> None:
        if show:
            show(size - start, total)

    kept = keeper.intact(whole) if keeper else set()
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.lseek(descriptor, start, os.SEEK_SET)
        sink = Sink(descriptor, grown, start, flush=show is not None)
        for infos, payload in _runs(tensors):
            if kept.issuperset(info.name for info in infos):
                sink.skip(sum(aligned(info.size) for info in infos))
                continue
            append_run(sink, infos, payload)
            if keeper and keeper.wrote(infos):
                keeper.add(whole, descriptor)
        if keeper:
            keeper.add(whole, descriptor, are_last=True)
    finally:
        os.close(descriptor)
    return whole


def _shareable(tensors: Tensors, path: Path) -> int:
    """How many bytes of the tensors could share blocks with the files they come from."""
    payloads = [payload for _, payload in tensors if isinstance(payload, Sequence)]
    ranges = [piece for payload in payloads for piece in payload if isinstance(piece, FileRange)]
    return storage.shareable([(piece.path, piece.size) for piece in ranges], path)


def _runs(tensors: Tensors) -> Iterator[tuple[list[TensorInfo], Payload]]:
    """Join tensors that are neighbours in a source file to one range, whose blocks can be shared.

    A tensor that follows padding starts a new run: the source's padding need not be zeros, and no
    digest of a tensor covers it.
    """
    infos: list[TensorInfo] = []
    run: Payload = ()
    for info, payload in tensors:
        if infos and (joined := _joined(run, payload)):
            infos.append(info)
            run = joined
            continue
        if infos:
            yield infos, run
        infos = [info]
        run = payload
    if infos:
        yield infos, run


def _joined(run: Payload, payload: Payload) -> Payload | None:
    """Both as one range, if the second directly follows the first, without padding."""
    match run, payload:
        case [FileRange() as first], [FileRange() as second]:
            end = first.offset + first.size
            same_file = (second.path, second.offset) == (first.path, end)
            if same_file and first.size == aligned(first.size):
                return [FileRange(first.path, first.offset, first.size + second.size)]
    return None
