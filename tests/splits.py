"""Split a GGUF as verify.py does when it publishes one; GGUFs with types that gguf-py lacks."""

import re
import struct
from pathlib import Path

from mtpforge.gguf import reader
from mtpforge.gguf.split import splitting


def split(source: Path, folder: Path, stem: str, limit: int) -> list[Path]:
    """Write `source` into `folder` in files of at most `limit` bytes of tensors; the files."""
    with splitting(reader.read(source), folder, stem, limit) as files:
        pass
    return [folder / file.name for file in files]


def relabel(source: Path, out: Path, names: str, number: int) -> Path:
    """A copy of a GGUF in which the tensors with these names have a type of this number."""
    opened, raw = reader.read(source), bytearray(source.read_bytes())
    for name, info in opened.tensors.items():
        if re.fullmatch(names, name):
            text = struct.pack("<Q", len(name)) + name.encode()
            entry = text + struct.pack("<I", len(info.shape))
            assert raw.count(entry) == 1
            place = raw.index(entry) + len(entry) + 8 * len(info.shape)
            assert struct.unpack_from("<I", raw, place) == (int(info.type),)
            struct.pack_into("<I", raw, place, number)
    out.write_bytes(raw)
    return out
