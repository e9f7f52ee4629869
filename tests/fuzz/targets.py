"""The parsers of untrusted files, as functions of a path for a fuzzer.

Each returns whether the parser accepted the file. A refusal must be a typed error; what is accepted
must be whole: values decode, byte ranges tile the file, a copy from the parsed parts reads the
same, and the reference implementation agrees where there is one.
"""

from collections.abc import Callable
from pathlib import Path

from mtpforge.checkpoint import safetensors
from mtpforge.errors import CheckpointError, GgufError
from mtpforge.gguf import reader, split, writer
from mtpforge.quantize import imatrix
from safetensors import safe_open


def gguf(path: Path) -> bool:
    """Read a GGUF, decode all of it, and write it again."""
    try:
        opened = split.read(path)
        values = [opened.get(key) for key in opened.metadata]
    except GgufError:
        return False
    assert len(values) == len(opened.metadata)
    end = 0
    for place in opened.ranges.values():
        assert end <= place.offset
        end = place.offset + place.size
    assert end <= path.stat().st_size
    copy = path.with_suffix(".copy")
    writer.write_scratch(copy, opened.metadata, reader.contents(opened))
    again = reader.read(copy)
    assert (again.metadata, again.tensors) == (opened.metadata, opened.tensors)
    return True


def checkpoint(path: Path) -> bool:
    """Read the header of a safetensors file, and compare it with the safetensors library."""
    try:
        tensors = safetensors.read_shard_header(path)
        safetensors.shard_format(path)
    except CheckpointError:
        return False
    with safe_open(path, "np") as reference:
        assert {*reference.keys()} == {tensor.name for tensor in tensors}
        for tensor in tensors:
            part = reference.get_slice(tensor.name)
            assert (part.get_shape(), part.get_dtype()) == ([*tensor.shape], tensor.dtype)
    return True


def matrix(path: Path) -> bool:
    """Read an importance matrix and its numbers."""
    try:
        rows = imatrix.read(path)
        imatrix.check_values(path)
    except GgufError:
        return False
    assert imatrix.digests(path).keys() == rows.keys()
    return True


TARGETS: dict[str, Callable[[Path], bool]] = {
    "gguf": gguf,
    "safetensors": checkpoint,
    "imatrix": matrix,
}
