"""Hostile binary files by kind, and a program that measures how each is refused.

Every entry is the content of one file, or a function that makes it, for a file name and a parser.
A number in a content stands for a hole of that many bytes, which takes no disk.

example: python tests/hostile_files.py     # a table: the worst time and memory of each kind
"""

import json
import math
import os
import struct
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from refusals import Parsers, Refusal

Content = bytes | list[bytes | int] | Callable[[Path], object]
GB, MB = 1 << 30, 1 << 20
SECONDS = 1.0
MEGABYTES = 200


class Case(NamedTuple):
    """A file that a parser must refuse: `file` is the name of the one that is opened."""

    kind: str
    name: str
    parser: str
    content: Content
    file: str


def make(case: Case, folder: Path) -> Path:
    """Write the file of a case into a folder, and return its path."""
    path = folder / case.file
    if callable(case.content):
        case.content(path)
        return path
    parts = [case.content] if isinstance(case.content, bytes) else case.content
    with path.open("wb") as file:
        for part in parts:
            if isinstance(part, int):
                file.seek(part, os.SEEK_CUR)
            else:
                file.write(part)
        file.truncate()
    return path


def later(make_bytes: Callable[[], bytes]) -> Content:
    """A large content that is made only when it is needed."""
    return lambda path: path.write_bytes(make_bytes())


# ── GGUF ──

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
WIDTHS = {U8: 1, I8: 1, U16: 2, I16: 2, U32: 4, I32: 4, F32: 4, BOOL: 1, U64: 8, I64: 8, F64: 8}


def string(text: bytes) -> bytes:
    """A string as a GGUF stores it."""
    return struct.pack("<Q", len(text)) + text


def value(key: bytes, kind: int, data: bytes) -> bytes:
    """An entry of the metadata."""
    return string(key) + struct.pack("<I", kind) + data


def array(key: bytes, item: int, count: int, data: bytes = b"") -> bytes:
    """An array of `count` items, whatever `data` has."""
    return value(key, ARRAY, struct.pack("<IQ", item, count) + data)


def tensor(
    name: bytes = b"x", shape: tuple[int, ...] = (8,), kind: int = 0, offset: int = 0
) -> bytes:
    """The entry of a tensor, its shape in ggml's order."""
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def start(tensors: int, values: int, *rest: bytes, version: int = 3) -> bytes:
    """A header with these numbers of tensors and values, whatever follows."""
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values) + b"".join(rest)


def whole(values: list[bytes], tensors: list[bytes], size: int) -> bytes:
    """A file with true counts, aligned, and `size` bytes of data."""
    header = start(len(tensors), len(values), *values, *tensors)
    return header + bytes(-len(header) % 32) + bytes(size)


def text_value(key: bytes, text: bytes) -> bytes:
    """A string in the metadata."""
    return value(key, STRING, string(text))


def u32(key: bytes, number: int) -> bytes:
    """A number in the metadata."""
    return value(key, U32, struct.pack("<I", number))


QWEN = text_value(b"general.architecture", b"qwen35")
GOOD = whole([QWEN, u32(b"qwen35.block_count", 1)], [tensor()], 32)
PADDING = bytes(64)

NAMES = {
    "a null byte": b"a\0b",
    "a line break": b"a\nb",
    "a carriage return": b"a\rb",
    "a terminal escape": b"\x1b[2J\x1b]0;title\x07",
    "a C1 control": "a\x9b31m".encode(),
    "an override of direction": "a\u202eb".encode(),
    "a zero-width character": "a\u200bb".encode(),
    "a private character": "\ue000".encode(),
    "half a character": b"\xed\xa0\x80",
    "an overlong slash": b"\xc0\xaf",
    "invalid UTF-8": b"\xff\xfe",
    "a cut character": b"abc\xe2\x82",
    "nothing": b"",
}

_MOST = (1 << 64) - 1
SHAPES: dict[str, tuple[tuple[int, ...], int]] = {
    "zero": ((0,), 0), "zero rows": ((4, 0), 0), "a zero between": ((4, 0, 4), 0),
    "2^32 x 2^32": ((1 << 32, 1 << 32), 0), "2^63": ((1 << 63,), 0), "2^64 - 1": ((_MOST,), 0),
    "2^63 x 2": ((1 << 63, 2), 0), "(2^16)^4": ((1 << 16,) * 4, 0),
    "(2^64 - 1)^4": ((_MOST,) * 4, 0),
    "wraps to a small number": ((1 << 62, 4, 2), 0), "7 in blocks of 32": ((7,), 8),
    "33 in blocks of 32": ((33,), 2), "32 in blocks of 256": ((32, 8), 12), "no data": ((4096,), 0),
    "a terabyte": ((1 << 38,), 0), "a terabyte of blocks": ((1 << 20, 1 << 20), 14),
}  # fmt: skip

OFFSETS: dict[str, tuple[int, int]] = {
    "the same": (0, 0), "overlapping": (0, 16), "a gap": (0, 64), "unaligned": (0, 33),
    "the first unaligned": (1, 32), "descending": (32, 0), "2^64 - 1": (0, (1 << 64) - 1),
    "2^63": (0, 1 << 63), "the first at 2^64 - 32": ((1 << 64) - 32, 32),
}  # fmt: skip

_BLOCKS, _HEADS = b"qwen35.block_count", b"qwen35.nextn_predict_layers"


def _blocks(number: int) -> bytes:
    return u32(_BLOCKS, number)


def _heads(number: int) -> bytes:
    return u32(_HEADS, number)


BLOCKS: dict[str, list[bytes]] = {
    "a head of 2^32 - 2 blocks": [
        _blocks((1 << 32) - 1), _heads((1 << 32) - 2)
    ],
    "more heads than blocks": [_blocks(1), _heads(2)],
    "as many heads as blocks": [_blocks(1), _heads(1)],
    "no blocks": [_blocks(0)],
    "-1 blocks": [value(_BLOCKS, I32, struct.pack("<i", -1))],
    "-1 heads": [
        _blocks(4), value(_HEADS, I32, struct.pack("<i", -1))
    ],
    "-2^63 blocks": [value(_BLOCKS, I64, struct.pack("<q", -(1 << 63)))],
    "blocks as text": [text_value(_BLOCKS, b"4")],
    "blocks as an array": [array(_BLOCKS, U32, 1, bytes(4))],
    "blocks that are not a number": [value(_BLOCKS, F32, struct.pack("<f", math.nan))],
    "true blocks": [value(_BLOCKS, BOOL, b"\1")],
    "heads as an array": [
        _blocks(4), array(_HEADS, U32, 1, bytes(4))
    ],
    "no block count": [],
}  # fmt: skip


def gguf_cases() -> Iterator[Case]:
    """All hostile GGUFs."""
    for kind, cases in GGUF.items():
        for name, content in cases.items():
            yield Case(kind, name, "gguf", content, "model.gguf")
    for name, content in SPLITS.items():
        yield Case("split files", name, "gguf", content, "m-00001-of-00002.gguf")


GGUF: dict[str, dict[str, Content]] = {
    "counts": {
        "2^64 - 1 values": [start(0, (1 << 64) - 1), MB],
        "2^64 - 1 tensors": [start((1 << 64) - 1, 0), MB],
        "200 million values in 3 GB": [start(0, 200_000_000), 3 * GB],
        "80 million tensors in 3 GB": [start(80_000_000, 0), 3 * GB],
        "20,000 values": later(lambda: start(
            0, 20_000, *(value(b"key.%d" % i, U8, b"\0") for i in range(20_000)), PADDING
        )),
        "40,000 tensors": later(lambda: whole(
            [], [tensor(b"t.%d" % i, offset=32 * i) for i in range(40_000)], 32 * 40_000
        )),
        **{f"2^62 items of type {item}": [start(0, 1, array(b"k", item, 1 << 62)), MB]
           for item in (*WIDTHS, STRING)},
        **{f"100 million items of type {item}": [
            start(0, 1, array(b"k", item, 100_000_000)), 100_000_000 * width + 64]
           for item, width in WIDTHS.items()},
        "100 million empty strings": [start(0, 1, array(b"k", STRING, 100_000_000)), 800_000_064],
        "ten arrays of a million empty strings": [
            part
            for i in range(10)
            for part in (
                (start(0, 10) if i == 0 else b"") + array(b"k%d" % i, STRING, 1_000_000), 8_000_000
            )
        ],
        "a string of 2^64 - 1 bytes": [start(0, 1, string(b"k"), b"\x08\0\0\0", b"\xff" * 8), MB],
        "a string of 2^63 bytes": [
            start(0, 1, string(b"k"), struct.pack("<IQ", STRING, 1 << 63)), MB
        ],
        "a string of 3 GB": [
            start(0, 1, string(b"k"), struct.pack("<IQ", STRING, 3 * GB)), 3 * GB + 64
        ],
        "a string in an array of 2^64 - 8 bytes": [
            start(0, 1, array(b"k", STRING, 2, struct.pack("<Q", (1 << 64) - 8))), MB
        ],
        "strings of 60 MB each": [
            part
            for i in range(4)
            for part in (
                (start(0, 4) if i == 0 else b"") + string(b"k%d" % i)
                + struct.pack("<IQ", STRING, 60 * MB), 60 * MB
            )
        ],
        "no dimension": start(1, 0, tensor(shape=()), PADDING),
        "five dimensions": start(1, 0, tensor(shape=(1,) * 5), PADDING),
        "2^32 - 1 dimensions": start(1, 0, string(b"x"), b"\xff" * 4, PADDING),
        "thousands of dimensions": start(1, 0, tensor(shape=(1,) * 4000), PADDING),
    },
    "names and keys": {
        **{f"key with {name}": start(0, 1, value(text, U8, b"\0"), PADDING)
           for name, text in NAMES.items()},
        **{f"tensor with {name}": whole([], [tensor(text)], 32) for name, text in NAMES.items()},
        "key of a megabyte": later(lambda: start(0, 1, value(b"k" * MB, U8, b"\0"), PADDING)),
        "key of 2^63 bytes": [start(0, 1, struct.pack("<Q", 1 << 63)), MB],
        "key of 3 GB": [start(0, 1, struct.pack("<Q", 3 * GB)), 3 * GB + 64],
        "tensor named as the header": whole([], [tensor(b"header")], 32),
        "tensor named as the file": whole([], [tensor(b"file")], 32),
        "tensor of 64 bytes": whole([], [tensor(b"n" * 64)], 32),
        "tensor of a megabyte": later(lambda: whole([], [tensor(b"n" * MB)], 32)),
        "tensor of 2^64 - 1 bytes": [start(1, 0, b"\xff" * 8), MB],
        "the same key twice": start(0, 2, u32(b"k", 1), u32(b"k", 1), PADDING),
        "the same key with two types": start(0, 2, u32(b"k", 1), text_value(b"k", b""), PADDING),
        "the same tensor twice": whole([], [tensor(), tensor(offset=32)], 64),
        **{f"architecture with {name}": whole(
            [text_value(b"general.architecture", text), u32(b"qwen35.block_count", 1)], [], 0)
           for name, text in NAMES.items()},
        "architecture of a path": whole([text_value(b"general.architecture", b"../../x")], [], 0),
        "architecture of a megabyte": later(lambda: whole(
            [text_value(b"general.architecture", b"a" * MB)], [], 0
        )),
        "architecture as a number": whole([u32(b"general.architecture", 1)], [], 0),
        "architecture as an array": whole(
            [array(b"general.architecture", STRING, 1, string(b"qwen35"))], [], 0
        ),
        "no architecture": whole([u32(b"qwen35.block_count", 1)], [], 0),
    },
    "values": {
        **{f"type {tag}": start(0, 1, value(b"k", tag, bytes(8)), PADDING)
           for tag in (13, 255, 1 << 31, (1 << 32) - 1)},
        **{f"array of type {tag}": start(0, 1, array(b"k", tag, 1, bytes(8)), PADDING)
           for tag in (13, (1 << 32) - 1)},
        "array of arrays": start(0, 1, array(b"k", ARRAY, 1, struct.pack("<IQ", U8, 0)), PADDING),
        "array of arrays of arrays": start(
            0, 1, array(b"k", ARRAY, 1, struct.pack("<IQ", ARRAY, 1) * 1000), PADDING
        ),
        "array of 2^63 arrays": [start(0, 1, array(b"k", ARRAY, 1 << 63)), MB],
        "truth of 2": whole([QWEN, value(b"k", BOOL, b"\2")], [], 0),
        "truths of 255": whole([QWEN, array(b"k", BOOL, 3, b"\0\1\xff")], [], 0),
        "text that is not UTF-8": whole([QWEN, text_value(b"k", b"\xff")], [], 0),
        "texts that are not UTF-8": whole(
            [QWEN, array(b"k", STRING, 2, string(b"a") + string(b"\xe2\x82"))], [], 0
        ),
        **{f"alignment {number}": whole([QWEN, u32(b"general.alignment", number)], [], 0)
           for number in (0, 1, 3, 16, 33, 64, 4096, 1 << 31, (1 << 32) - 1)},
        "alignment of 64 bits": whole(
            [QWEN, value(b"general.alignment", U64, struct.pack("<Q", 32))], [], 0
        ),
        "alignment as text": whole([QWEN, text_value(b"general.alignment", b"32")], [], 0),
        "alignment as an array": whole(
            [QWEN, array(b"general.alignment", U32, 1, bytes(4))], [], 0
        ),
        **{f"version {number}": start(0, 0, PADDING, version=number)
           for number in (0, 1, 4, 0x03000000, (1 << 32) - 1)},
    },
    "shapes": {
        name: whole([QWEN], [tensor(shape=shape, kind=kind)], 32)
        for name, (shape, kind) in SHAPES.items()
    },
    "offsets": {
        **{name: whole([QWEN], [tensor(offset=first), tensor(b"y", offset=second)], 64)
           for name, (first, second) in OFFSETS.items()},
        "an unknown type without bytes": whole([QWEN], [tensor(kind=99)], 0),
        "an unknown type between others": whole(
            [QWEN], [tensor(), tensor(b"y", kind=99, offset=32), tensor(b"z", offset=32)], 64
        ),
        "32 bytes after the last tensor": GOOD + bytes(32),
        "3 GB after the last tensor": [GOOD, 3 * GB],
        "bytes after no tensor": whole([QWEN], [], 64),
    },
    "truncated": {f"at byte {end}": GOOD[:end] for end in range(0, len(GOOD), 7)},
    "as much as is read": {
        "32,768 tensors, the last twice": later(lambda: whole(
            [],
            [tensor(b"t.%d" % min(i, 32_766), offset=32 * i) for i in range(32_768)],
            32 * 32_768,
        )),
        "16,384 values, the last twice": later(lambda: start(
            0,
            16_384,
            *(value(b"key.%d" % min(i, 16_382), U8, b"\0") for i in range(16_384)),
            PADDING,
        )),
        "3 million texts, the last not UTF-8": [
            start(0, 3), array(b"a", STRING, 1_000_000), 8_000_000, array(b"b", STRING, 1_000_000),
            8_000_000, array(b"c", STRING, 1_000_000), 7_999_992, string(b"\xff"), PADDING,
        ],
        "a million texts, the last not UTF-8": later(lambda: start(
            0,
            1,
            array(b"k", STRING, 1 << 20),
            *(string(b"%07d" % i) for i in range((1 << 20) - 1)),
            string(b"\xff"),
            PADDING,
        )),
        "a text of 47 MB that is not UTF-8": [
            start(0, 1, string(b"k"), struct.pack("<IQ", STRING, 47 * MB)),
            47 * MB - 1,
            b"\xff" + PADDING,
        ],
        "3 million numbers, then a truth of 2": [
            start(0, 4), array(b"a", U64, 1_000_000), 8_000_000, array(b"b", U64, 1_000_000),
            8_000_000, array(b"c", U64, 1_000_000), 8_000_000, value(b"d", BOOL, b"\2"), PADDING,
        ],
    },
    "blocks": {name: whole([QWEN, *values], [tensor()], 32) for name, values in BLOCKS.items()},
}  # fmt: skip


def link_to(target: str) -> Content:
    """A link in place of the file."""
    return lambda path: path.symlink_to(target)


def shard(number: int, count: int, name: bytes = b"x", total: int = 2) -> bytes:
    """One file of a split GGUF."""
    keys = [
        value(b"split.no", U16, struct.pack("<H", number)),
        value(b"split.count", U16, struct.pack("<H", count)),
        value(b"split.tensors.count", I32, struct.pack("<i", total)),
    ]
    return whole([QWEN, *keys], [tensor(name)], 32)


def pair(first: bytes, second: bytes | Callable[[Path], object] | None) -> Content:
    """Two files of a split GGUF, the second possibly something else."""

    def write(path: Path) -> None:
        path.write_bytes(first)
        other = path.with_name("m-00002-of-00002.gguf")
        if isinstance(second, bytes):
            other.write_bytes(second)
        elif second:
            second(other)

    return write


def _many_shards(path: Path) -> None:
    """Files that the first one names, each with as large a header as a file may have."""
    names = [path.with_name(f"m-{number:05}-of-00002.gguf") for number in (1, 2)]
    for number, name in enumerate(names):
        keys = [
            value(b"split.no", U16, struct.pack("<H", number)),
            value(b"split.count", U16, struct.pack("<H", 2)),
        ]
        with name.open("wb") as file:
            file.write(start(0, 3, *keys, string(b"k"), struct.pack("<IQ", STRING, 40 * MB)))
            file.truncate(file.tell() + 40 * MB + 64)


SPLITS: dict[str, Content] = {
    "65,535 files": pair(shard(0, 65_535), None),
    "other number of files than the name": pair(shard(0, 3), shard(1, 3)),
    "-1 files": lambda path: path.write_bytes(
        whole([QWEN, value(b"split.count", I32, struct.pack("<i", -1))], [], 0)
    ),
    "number of files as text": lambda path: path.write_bytes(
        whole([QWEN, text_value(b"split.count", b"2")], [], 0)
    ),
    "number of files as an array": lambda path: path.write_bytes(
        whole([QWEN, array(b"split.count", U16, 1, bytes(2))], [], 0)
    ),
    "the second is missing": pair(shard(0, 2), None),
    "the second is a copy of the first": pair(shard(0, 2), shard(0, 2)),
    "the second is a link to the first": pair(
        shard(0, 2), lambda other: other.symlink_to("m-00001-of-00002.gguf")
    ),
    "the second is a link to itself": pair(
        shard(0, 2), lambda other: other.symlink_to("m-00002-of-00002.gguf")
    ),
    "the second is a pipe": pair(shard(0, 2), os.mkfifo),
    "the second is a folder": pair(shard(0, 2), Path.mkdir),
    "the second is a device": pair(shard(0, 2), lambda other: other.symlink_to("/dev/zero")),
    "the second is empty": pair(shard(0, 2), b""),
    "the second has another number": pair(shard(0, 2), shard(7, 2)),
    "the second is of three": pair(shard(0, 2), shard(1, 3)),
    "the second has no numbers": pair(shard(0, 2), GOOD),
    "both have the same tensor": pair(shard(0, 2), shard(1, 2)),
    "fewer tensors than stated": pair(shard(0, 2, total=3), shard(1, 2, b"y")),
    "-1 tensors": pair(shard(0, 2, total=-1), shard(1, 2, b"y")),
    "headers of 40 MB each": _many_shards,
}


# ── safetensors ──


def packed(header: bytes | object, data: bytes = bytes(8), length: int | None = None) -> bytes:
    """A safetensors file."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(**changes: object) -> dict[str, object]:
    """The entry of a tensor of 8 bytes."""
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


def repeated(part: bytes, count: int, last: bytes) -> bytes:
    """A header with a list of equal values in place of a tensor's entry."""
    return b'{"a":[' + part * count + last + b"]}"


SAFETENSORS: dict[str, dict[str, Content]] = {
    "header lengths": {
        **{f"length {length}": [packed(b"{}", length=length), MB]
           for length in (0, 1, 1 << 20, 1 << 31, 1 << 32, 1 << 63, (1 << 64) - 1)},
        "one more than the file": packed(b"{}", b"", length=3),
        "seven bytes": bytes(7),
        "101 MB of zeros": [struct.pack("<Q", 101 * MB), 101 * MB],
        "99 MB of zeros": [struct.pack("<Q", 99 * MB), 99 * MB],
        "3 GB of zeros": [struct.pack("<Q", 3 * GB), 3 * GB],
        "30 MB of zeros": [struct.pack("<Q", 30 * MB), 30 * MB],
        "30 MB of spaces": later(lambda: packed(b" " * (30 * MB))),
        "20 MB of spaces in an object": later(lambda: packed(b"{" + b" " * (20 * MB))),
    },
    "JSON": {
        "empty": packed(b"  "),
        "a list": packed(b"[]"),
        "a number": packed(b"12"),
        "null": packed(b"null"),
        "text": packed(b'"text"'),
        "not JSON": packed(b"{a: 1}"),
        "cut": packed(b'{"a": {"dtype": "F32"'),
        "two objects": packed(b"{} {}"),
        "a byte order mark": packed(b"\xef\xbb\xbf{}"),
        "UTF-16": packed('{"a": 1}'.encode("utf-16")),
        "not UTF-8": packed(b'{"\xff": 1}'),
        "NaN": packed(b'{"a": NaN}'),
        "900 lists in each other": packed(b'{"a":' + b"[" * 900 + b"]" * 900 + b"}"),
        "100,000 lists in each other": packed(b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
        "100,000 objects in each other": later(
            lambda: packed(b'{"a":' * 100_000 + b"1" + b"}" * 100_000)
        ),
        "a million open lists": later(lambda: packed(b'{"a":' + b"[" * 1_000_000)),
        "10 million empty lists": later(lambda: packed(repeated(b"[],", 10_000_000, b"[]"))),
        "10 million zeros": later(lambda: packed(repeated(b"0,", 10_000_000, b"0"))),
        "7 million empty texts": later(lambda: packed(repeated(b'"",', 7_000_000, b'""'))),
        "7 million empty objects": later(lambda: packed(repeated(b"{},", 7_000_000, b"{}"))),
        "a million tensors without an entry": later(lambda: packed(
            b"{" + b",".join(b'"t%d":0' % i for i in range(1_000_000)) + b"}"
        )),
        "a name of 23 MB": later(lambda: packed(b'{"' + b"n" * (23 * MB) + b'": 1}')),
        "a name of 23 MB with a wide character": later(lambda: packed(
            b'{"' + b"n" * (23 * MB) + "\U0001f600".encode() + b'": 1}'
        )),
        "a name of 23 MB with an escape": later(lambda: packed(
            b'{"' + b"n" * (23 * MB) + b'\\ud83d\\ude00": 1}'
        )),
        "10 million escapes": later(lambda: packed(b'{"' + b"\\n" * 10_000_000 + b'": 1}')),
        "a number of 5,000 digits": packed(b'{"a": ' + b"9" * 5000 + b"}"),
        "a number of 20 MB": later(lambda: packed(b'{"a": ' + b"9" * (20 * MB) + b"}")),
        "a thousand numbers of 4,000 digits": later(lambda: packed(
            repeated(b"9" * 4000 + b",", 1000, b"1")
        )),
        "an exponent of 20 digits": packed(b'{"a": 1e' + b"9" * 20 + b"}"),
        "the same tensor twice": packed(
            b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2)
        ),
        "the same key twice": packed(
            b'{"a":{"dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
        ),
        "metadata twice": packed(b'{"__metadata__":{},"__metadata__":{},"a":%b}'
                                 % json.dumps(entry()).encode()),
        "metadata as a list": packed({"__metadata__": [], "a": entry()}),
        "metadata with numbers": packed({"__metadata__": {"a": 1}, "a": entry()}),
        "metadata with an object": packed({"__metadata__": {"a": {}}, "a": entry()}),
    },
    "as much as is read of a shard": {
        "60,000 tensors and a byte too many": later(lambda: packed(
            {f"model.layers.{i}.mlp.experts.gate_proj.weight":
             entry(shape=[2, 1], data_offsets=[8 * i, 8 * i + 8]) for i in range(60_000)},
            bytes(8 * 60_000 + 1),
        )),
        "23 MB of spaces after the object": later(lambda: packed(b"{}" + b" " * (23 * MB))),
        "a metadata text of 23 MB": later(
            lambda: packed(b'{"__metadata__":{"a":"' + b"m" * (23 * MB) + b'"}}')
        ),
        "1.9 MB of wide characters": later(lambda: packed(
            b'{"' + "\U0001f600".encode() * 490_000 + b'":0}'
        )),
    },
    "entries": {
        **{f"type {dtype!r}": packed({"a": entry(dtype=dtype)})
           for dtype in ("F31", "f32", "", "F32 ", "\x1b[2J", "x" * 1000, None, 1, ["F32"], {})},
        **{f"shape {json.dumps(shape)[:30]}": packed({"a": entry(shape=shape)})
           for shape in ([-2], [2.0], [True, 2], ["2"], [[2]], None, 2, {}, [3], [2, 0], [0],
                         [1 << 63, 2], [1 << 64, 1 << 64], [10**18, 10**18],
                         [1] * 5000 + [2], [10**400, 2])},
        **{f"range {json.dumps(offsets)[:40]}": packed({"a": entry(data_offsets=offsets)})
           for offsets in ([0, 4], [8, 0], [0], [0, 8, 8], [], None, 8, "08", {"0": 8}, [4, 12],
                           [-8, 0], [0.0, 8.0], [False, 8], [0, 1 << 64], [1 << 63, (1 << 63) + 8],
                           [10**400, 10**400 + 8])},
        "no type": packed({"a": {"shape": [2], "data_offsets": [0, 8]}}),
        "no shape": packed({"a": {"dtype": "F32", "data_offsets": [0, 8]}}),
        "no range": packed({"a": {"dtype": "F32", "shape": [2]}}),
        "another key": packed({"a": entry(code="import os")}),
        **{f"entry {json.dumps(value)}": packed({"a": value})
           for value in (None, 1, "text", [], [1, 2, 3], {})},
        "half a byte": packed({"a": entry(dtype="F4", shape=[15])}),
    },
    "tiling": {
        "no tensors, but bytes": packed({}),
        "overlapping": packed({"a": entry(), "b": entry(data_offsets=[4, 12])}, bytes(12)),
        "the same range": packed({"a": entry(), "b": entry()}),
        "a gap": packed({"a": entry(), "b": entry(data_offsets=[12, 20])}, bytes(20)),
        "a gap before": packed({"a": entry(data_offsets=[8, 16])}, bytes(16)),
        "past the end": packed({"a": entry()}, bytes(7)),
        "far past the end": packed({"a": entry(shape=[1 << 40], data_offsets=[0, 1 << 42])}),
        "bytes after": packed({"a": entry()}, bytes(9)),
        "3 GB after": [packed({"a": entry()}), 3 * GB],
        "an empty one in another": packed(
            {"a": entry(), "b": entry(shape=[0], data_offsets=[4, 4])}
        ),
    },
    "names of tensors": {
        **{name: packed(b'{"%b": %b}' % (text, json.dumps(entry()).encode()))
           for name, text in NAMES.items()},
        "an escaped null byte": packed({"a\0b": entry()}),
        "an escaped terminal escape": packed({"\x1b[2J": entry()}),
        "an escaped override of direction": packed({"a\u202eb": entry()}),
        "an escaped half character": packed({"\ud800": entry()}),
        "the name of the header": packed({"header": entry()}),
        "the name of the file": packed({"file": entry()}),
        "2,000 bytes": packed({"n" * 2000: entry()}),
        "a megabyte": later(lambda: packed({"n" * MB: entry()})),
    },
    "truncated": {
        f"at byte {end}": packed({"a": entry()})[:end]
        for end in range(0, len(packed({"a": entry()})), 9)
    },
}  # fmt: skip


# ── importance matrices ──


def floats(*numbers: float) -> bytes:
    """Numbers of 32 bits, padded to the alignment of tensors."""
    raw = struct.pack(f"<{len(numbers)}f", *numbers)
    return raw + bytes(-len(raw) % 32)


IMATRIX_KEYS = [
    array(b"imatrix.datasets", STRING, 1, string(b"text")),
    u32(b"imatrix.chunk_count", 1),
    u32(b"imatrix.chunk_size", 512),
]


def matrix(
    sums: list[float],
    counts: list[float],
    keys: list[bytes] = IMATRIX_KEYS,
    name: bytes = b"a.weight",
) -> bytes:
    """An importance matrix with one row, as a GGUF."""
    data = floats(*sums) + floats(*counts)
    second = len(floats(*sums))
    entries = [
        tensor(name + b".in_sum2", (len(sums),)),
        tensor(name + b".counts", (1, len(counts)), offset=second),
    ]
    return whole(keys, entries, 0) + data


def legacy(
    *, name: bytes = b"a.weight", calls: int = 4, values: int = 2, sums: bytes | None = None
) -> bytes:
    """An entry of the legacy format."""
    numbers = struct.pack("<2f", 1, 1) if sums is None else sums
    return struct.pack(f"<i{len(name)}sii", len(name), name, calls, values) + numbers


def dat(*entries: bytes, count: int | None = None) -> bytes:
    """A file of the legacy format, without its tail."""
    return struct.pack("<i", len(entries) if count is None else count) + b"".join(entries)


ODD = {"NaN": math.nan, "infinity": math.inf, "-infinity": -math.inf, "-1": -1.0}
TAIL = struct.pack("<ii4s", 4, 4, b"text")

IMATRIX: dict[str, dict[str, Content]] = {
    "numbers of an importance matrix": {
        **{f"a count of {name}": matrix([1, 1], [odd]) for name, odd in ODD.items()},
        **{f"one of two counts is {name}": matrix([1, 1], [1, odd]) for name, odd in ODD.items()},
        **{f"a sum of {name}": matrix([1, odd], [1]) for name, odd in ODD.items()},
        "a count of 0": matrix([1, 1], [0]),
        "a count of 0 and sums of 0": matrix([0, 0], [0]),
        "counts of 0": matrix([1, 1, 1, 1], [0, 0]),
        "a count of 0 for an expert with sums": matrix([1, 1, 1, 1], [1, 0]),
        **{f"legacy: a sum of {name}": dat(legacy(sums=struct.pack("<2f", 1, odd)))
           for name, odd in ODD.items()},
        "legacy: 0 calls": dat(legacy(calls=0)),
        "legacy: -1 calls": dat(legacy(calls=-1)),
        "legacy: -2^31 calls": dat(legacy(calls=-(1 << 31))),
    },
    "lengths of an importance matrix": {
        "more counts than sums": matrix([1], [1, 1]),
        "three sums for two counts": matrix([1, 1, 1], [1, 1]),
        "100,000 counts": later(lambda: matrix([1.0] * 100_000, [1.0] * 100_000)),
        "no counts": whole(IMATRIX_KEYS, [tensor(b"a.weight.in_sum2")], 32),
        "no sums": whole(IMATRIX_KEYS, [tensor(b"a.weight.counts")], 32),
        "no tensors": whole(IMATRIX_KEYS, [], 0),
        "sums at F16": whole(
            IMATRIX_KEYS,
            [tensor(b"a.weight.in_sum2", kind=1), tensor(b"a.weight.counts", (1,), offset=32)], 64,
        ),
        "no metadata": matrix([1, 1], [1], keys=[]),
        "a model": GOOD,
        "chunk count as text": matrix(
            [1, 1], [1],
            keys=[IMATRIX_KEYS[0], text_value(b"imatrix.chunk_count", b"1"), IMATRIX_KEYS[2]],
        ),
        "datasets as text": matrix(
            [1, 1], [1], keys=[text_value(b"imatrix.datasets", b"a"), *IMATRIX_KEYS[1:]]
        ),
        "truncated": matrix([1, 1], [1])[:-33],
        "legacy: no entries": dat(),
        "legacy: -1 entries": dat(count=-1),
        "legacy: 2^31 - 1 entries": dat(legacy(), count=(1 << 31) - 1),
        "legacy: 40,000 entries": later(
            lambda: dat(*(legacy(name=b"%d" % i) for i in range(40_000)))
        ),
        "legacy: an entry too few": dat(legacy(), count=2),
        "legacy: the same name twice": dat(legacy(), legacy()),
        "legacy: 0 values": dat(legacy(values=0, sums=b"")),
        "legacy: -1 values": dat(legacy(values=-1)),
        "legacy: 2^31 - 1 values": [dat(legacy(values=(1 << 31) - 1)), MB],
        "legacy: values past the end": dat(legacy(values=3)),
        "legacy: name of -1 bytes": struct.pack("<ii", 1, -1) + bytes(99),
        "legacy: name of 2^31 - 1 bytes": [struct.pack("<ii", 1, (1 << 31) - 1), MB],
        "legacy: name of a megabyte": later(lambda: dat(legacy(name=b"n" * MB))),
        **{f"legacy: name with {name}": dat(legacy(name=text)) for name, text in NAMES.items()},
        "legacy: bytes after the end": dat(legacy()) + TAIL + b"\0",
        "legacy: 3 GB after the end": [dat(legacy()) + TAIL, 3 * GB],
        "legacy: half a tail": dat(legacy()) + TAIL[:3],
        "legacy: data set of -1 bytes": dat(legacy()) + struct.pack("<ii", 4, -1),
        "legacy: data set of 2^31 - 1 bytes": dat(legacy()) + struct.pack("<ii", 4, (1 << 31) - 1),
        "legacy: one byte": b"\1",
        "legacy: empty": b"",
    },
}  # fmt: skip


# ── anything in place of a file ──


def _socket(path: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


OTHERS: dict[str, Content] = {
    "a folder": Path.mkdir,
    "a pipe": os.mkfifo,
    "a socket": _socket,
    "a link to /dev/zero": link_to("/dev/zero"),
    "a link to /dev/null": link_to("/dev/null"),
    "a link to a folder": link_to("/"),
    "a link to nothing": link_to("nothing"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "nothing": lambda path: None,
    "an empty file": b"",
    "one byte": b"G",
    "text": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    "a web page": b"<!DOCTYPE html><html><body>Not found</body></html>" * 20,
    "a zip archive": b"PK\x03\x04" + bytes(100),
    "a pickle": b"\x80\x04cos\nsystem\n" + bytes(100),
    "3 GB of zeros": [3 * GB],
}


def cases() -> list[Case]:
    """All hostile files."""
    found = [*gguf_cases()]
    for parser, name in (
        ("gguf", "m.gguf"), ("safetensors", "model.safetensors"), ("imatrix", "imatrix.gguf")
    ):  # fmt: skip
        found += [
            Case("in place of a file", f"{parser}: {label}", parser, content, name)
            for label, content in OTHERS.items()
        ]
    for kind, contents in SAFETENSORS.items():
        label = kind if kind != "truncated" else "truncated shards"
        found += [
            Case(label, name, "safetensors", content, "model.safetensors")
            for name, content in contents.items()
        ]
    for kind, contents in IMATRIX.items():
        found += [
            Case(kind, name, "imatrix", content, "i.dat") for name, content in contents.items()
        ]
    return found


def main() -> None:
    """Print a table of the worst time and memory of each kind, and each case that is accepted."""
    worst: dict[str, list[Refusal]] = {}
    parsers = Parsers()
    for case in cases():
        with tempfile.TemporaryDirectory() as folder:
            found = parsers.parse(case.parser, make(case, Path(folder)))
        worst.setdefault(case.kind, []).append(found)
        if found.error != "typed" or found.seconds > SECONDS or found.megabytes > MEGABYTES:
            print(f"{case.kind}: {case.name}: {found}"[:300], file=sys.stderr)
    parsers.close()
    print("| kind | inputs | refused | seconds | MB |\n| --- | ---: | ---: | ---: | ---: |")
    for kind, outcomes in worst.items():
        refused = sum(found.error == "typed" for found in outcomes)
        seconds = max(found.seconds for found in outcomes)
        megabytes = max(found.megabytes for found in outcomes)
        print(f"| {kind} | {len(outcomes)} | {refused} | {seconds:.2f} | {megabytes:.0f} |")


if __name__ == "__main__":
    main()
