"""Writing GGUF files: tensors are streamed from other files or from memory, and never held as a whole."""

import itertools
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from gguf.constants import GGUFValueType

from mtpforge import progress
from mtpforge.errors import GgufError
from mtpforge.gguf.reader import (
    MAGIC,
    NAME_LIMIT,
    PADDING,
    U32,
    U64,
    Gguf,
    TensorInfo,
    Value,
    aligned,
    encode,
    header_range,
)
from mtpforge.io.atomic import replacing
from mtpforge.io.ranges import BLOCK, FileRange, Payload, Sink
from mtpforge.progress import Show


def write(
    path: Path, metadata: Mapping[str, Value], tensors: Sequence[tuple[TensorInfo, Payload]]
) -> None:
    """Write a GGUF, whole or not at all, and show progress. Payloads are streamed one after the other.

    Raises GgufError if a payload does not have the size of its tensor.
    """
    with replacing(path) as temporary, progress.bar(path.name) as show:
        _write(temporary, metadata, tensors, show)


def fill(
    path: Path, metadata: Mapping[str, Value], tensors: Sequence[tuple[TensorInfo, Payload]]
) -> Gguf:
    """Write a scratch GGUF in place, without starting to write it to the disk. Raises GgufError."""
    return _write(path, metadata, tensors)


def _write(
    path: Path,
    metadata: Mapping[str, Value],
    tensors: Sequence[tuple[TensorInfo, Payload]],
    show: Show | None = None,
) -> Gguf:
    """Write header and tensors in place; without `show` quietly, and nothing is flushed."""
    total = sum(aligned(info.size) for info, _ in tensors)
    whole = lay_out(path, metadata, [info for info, _ in tensors])
    start = header_range(whole).size

    def grown(size: int) -> None:
        if show:
            show(size - start, total)

    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.lseek(descriptor, start, os.SEEK_SET)
        sink = Sink(descriptor, grown, start, flush=show is not None)
        for infos, payload in _runs(tensors):
            append_run(sink, infos, payload)
    finally:
        os.close(descriptor)
    return whole


def lay_out(path: Path, metadata: Mapping[str, Value], infos: Sequence[TensorInfo]) -> Gguf:
    """Write the header, in place, and give the file its size; `put` and others fill the rest in any order.

    What a file has there already stays till then, and so does its memory: to get another can take longer than to copy.
    """
    first = header(metadata, infos)
    offsets = list(itertools.accumulate((aligned(info.size) for info in infos), initial=len(first)))
    path.touch()
    with path.open("r+b") as file:
        file.write(first)
        file.truncate(offsets[-1])
    ranges = {
        info.name: FileRange(path, offset, info.size)
        for info, offset in zip(infos, offsets, strict=False)
    }
    return Gguf(path, dict(metadata), {info.name: info for info in infos}, ranges)


def put(whole: Gguf, name: str, payload: Payload) -> None:
    """Write the bytes of a tensor to its place in a file that `lay_out` made. Raises GgufError where they are another number."""
    place = whole.ranges[name]
    descriptor = os.open(whole.path, os.O_WRONLY)
    try:
        sink = Sink(descriptor, size=os.lseek(descriptor, place.offset, os.SEEK_SET))
        append_run(sink, [whole.tensors[name]], payload)
        sink.flush()
    finally:
        os.close(descriptor)


def padded(
    metadata: Mapping[str, Value], tensors: Sequence[tuple[TensorInfo, Payload]], source: Gguf
) -> dict[str, Value]:
    """The same with a key at the end that makes the data begin at the place in a block of the file system that it has in `source`.

    Both files can then share it (see `ranges`).
    """

    def with_padding(count: int) -> dict[str, Value]:
        return {**metadata, PADDING: Value.of(" " * count, GGUFValueType.STRING)}

    if not source.ranges:
        return dict(metadata)
    size = len(header(with_padding(0), [info for info, _ in tensors]))
    return with_padding((min(piece.offset for piece in source.ranges.values()) - size) % BLOCK)


def append_run(sink: Sink, infos: Sequence[TensorInfo], payload: Payload) -> None:
    """Write neighbouring tensors and their padding. Raises GgufError where the payload has another size."""
    expected = sum(aligned(info.size) for info in infos[:-1]) + infos[-1].size
    size = sink.append(payload)
    if size != expected:
        names = " to ".join(dict.fromkeys((infos[0].name, infos[-1].name)))
        raise GgufError(
            f"tensor {names}: {expected:,} bytes are to be written, the source gave {size:,}"
        )
    sink.append([memoryview(bytes(aligned(size) - size))])


def _runs(
    tensors: Iterable[tuple[TensorInfo, Payload]],
) -> Iterator[tuple[list[TensorInfo], Payload]]:
    """Tensors that lie one after the other in a file as one range of it: the kernel can share its blocks.

    Behind a padding a new one begins, because what a file has there need not be zeros, and no digest of a tensor knows it.
    """
    infos: list[TensorInfo] = []
    run: Payload = ()
    for info, payload in tensors:
        if infos and (joined := _joined(run, payload)):
            infos.append(info)
            run = joined
        else:
            if infos:
                yield infos, run
            infos, run = [info], payload
    if infos:
        yield infos, run


def _joined(run: Payload, payload: Payload) -> Payload | None:
    """Both as one range of a file, where the second lies behind the first as it will in the GGUF."""
    match run, payload:
        case [FileRange() as a], [FileRange() as b] if (a.path, a.offset + a.size, a.size) == (
            b.path,
            b.offset,
            aligned(a.size),
        ):
            return [FileRange(a.path, a.offset, a.size + b.size)]
    return None


def header(metadata: Mapping[str, Value], tensors: Iterable[TensorInfo]) -> bytes:
    """Everything before the tensor data, padded to the alignment, for tensors stored in the order given."""
    infos = list(tensors)
    parts = [MAGIC, U32.pack(3), U64.pack(len(infos)), U64.pack(len(metadata))]
    for key, value in metadata.items():
        parts += [encode(key, GGUFValueType.STRING), U32.pack(value.type), value.raw]
    offset = 0
    for info in infos:
        if len(info.name.encode("utf-8")) > NAME_LIMIT:
            raise GgufError(
                f"tensor name {info.name} is longer than the {NAME_LIMIT} bytes that ggml can hold"
            )
        dimensions = struct.pack(f"<I{len(info.shape)}Q", len(info.shape), *reversed(info.shape))
        parts += [
            encode(info.name, GGUFValueType.STRING),
            dimensions,
            U32.pack(info.type),
            U64.pack(offset),
        ]
        offset += aligned(info.size)
    block = b"".join(parts)
    return block + bytes(aligned(len(block)) - len(block))
