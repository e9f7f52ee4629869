"""The reader is strict and agrees with gguf-py; the writer streams, and writes all or nothing."""

import struct
import time
from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader, GGUFWriter
from gguf.constants import GGMLQuantizationType, GGUFValueType
from mtpforge.errors import GgufError
from mtpforge.gguf import reader
from mtpforge.gguf.metadata import Value
from mtpforge.gguf.reader import TensorInfo
from mtpforge.gguf.writer import write, write_scratch

F32 = GGMLQuantizationType.F32


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """A file of every metadata type, written by gguf-py."""
    path = tmp_path / "sample.gguf"
    writer = GGUFWriter(path, "qwen35")
    writer.add_uint32("a.u32", 7)
    writer.add_int64("a.i64", -7)
    writer.add_float64("a.f64", 0.5)
    writer.add_bool("a.bool", True)
    writer.add_string("a.text", "gr\u00fc\u00df dich")
    writer.add_array("a.numbers", [1, -2, 3])
    writer.add_array("a.texts", ["", "x", "\u4f60\u597d"])
    writer.add_tensor("one", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("two", np.arange(4, dtype=np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_reader_agrees_with_gguf_py(sample: Path) -> None:
    ours, theirs = reader.read(sample), GGUFReader(sample)
    fields = {
        name: field.contents()
        for name, field in theirs.fields.items()
        if not name.startswith("GGUF.")
    }
    assert {key: value.decode() for key, value in ours.metadata.items()} == fields
    for tensor in theirs.tensors:
        assert ours.tensors[tensor.name].shape == tuple(int(n) for n in reversed(tensor.shape))
        assert ours.tensors[tensor.name].type == tensor.tensor_type
        assert ours.ranges[tensor.name].offset == tensor.data_offset
        assert ours.ranges[tensor.name].size == tensor.n_bytes


def test_a_copy_from_the_parsed_parts_is_identical(sample: Path, tmp_path: Path) -> None:
    opened, copy = reader.read(sample), tmp_path / "copy.gguf"
    write(
        copy,
        opened.metadata,
        [(info, [opened.ranges[name]]) for name, info in opened.tensors.items()],
    )
    assert copy.read_bytes() == sample.read_bytes()


def test_a_vocabulary_of_real_size_opens_fast(tmp_path: Path) -> None:
    path, words = tmp_path / "large.gguf", [f"token {i}" for i in range(248_320)]
    metadata = {"general.architecture": Value.of("qwen35", GGUFValueType.STRING)}
    metadata["tokens"] = Value.of(words, GGUFValueType.ARRAY, GGUFValueType.STRING)
    write(path, metadata, [])
    start = time.process_time()
    opened = reader.read(path)
    assert time.process_time() - start < 2  # 0.05 s on an idle machine; gguf-py takes seconds
    assert len(opened.metadata["tokens"]) == len(words) and opened.get("tokens") == words


def test_a_similar_vocabulary_is_not_taken_for_the_last_one(tmp_path: Path) -> None:
    """An equal vocabulary is skipped at once; one of equal size or with an equal start is not."""
    words, raw = [f"token {i}" for i in range(12_000)], dict[str, bytes]()
    for name, last in (
        ("first", "token 11999"),
        ("longer", "token eleven thousand nine hundred and ninety-nine"),
        ("shorter", ""),
    ):
        metadata = {
            "tokens": Value.of([*words[:-1], last], GGUFValueType.ARRAY, GGUFValueType.STRING)
        }
        metadata["after"] = Value.of(name, GGUFValueType.STRING)
        write(tmp_path / name, metadata, [])
        raw[name] = (tmp_path / name).read_bytes()
    for name in ("first", "first", "longer", "longer", "shorter", "first"):
        opened = reader.read(tmp_path / name)
        assert opened.get("after") == name and opened.get("tokens")[:-1] == words[:-1]
        for end in (len(raw[name]) // 2, len(raw[name]) - 60):
            (tmp_path / "torn").write_bytes(raw[name][:end])
            with pytest.raises(GgufError, match="truncated"):
                reader.read(tmp_path / "torn")
    assert 12_000 in reader._last_strings


def test_write_scratch_returns_what_read_returns(sample: Path, tmp_path: Path) -> None:
    opened, copy = reader.read(sample), tmp_path / "copy.gguf"
    tensors = list(reversed(reader.contents(opened)))
    assert write_scratch(copy, opened.metadata, tensors) == reader.read(copy)


def test_an_overwritten_file_keeps_no_old_bytes(sample: Path, tmp_path: Path) -> None:
    """Padding and the end included; in place, so that its pages are used again."""
    opened, copy = reader.read(sample), tmp_path / "copy.gguf"
    uneven = TensorInfo("uneven", (3, 5), GGMLQuantizationType.F16)
    tensors = [(uneven, [memoryview(bytes(range(30)))]), *reader.contents(opened)]
    write(tmp_path / "fresh.gguf", opened.metadata, tensors)
    for size in (1, 2 * sample.stat().st_size):
        copy.write_bytes(b"\xff" * size)
        before = copy.stat().st_ino
        write_scratch(copy, opened.metadata, tensors)
        assert (
            copy.read_bytes() == (tmp_path / "fresh.gguf").read_bytes()
            and copy.stat().st_ino == before
        )


def test_a_vision_tower_has_no_head(tmp_path: Path) -> None:
    metadata = {"general.architecture": Value.of("clip", GGUFValueType.STRING)}
    write(
        tmp_path / "mmproj.gguf", metadata, [(TensorInfo("x", (4,), F32), [memoryview(bytes(16))])]
    )
    opened = reader.read(tmp_path / "mmproj.gguf")
    assert not opened.head_blocks and not opened.head.tensors and opened.trunk == opened


def test_a_payload_of_the_wrong_size_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(GgufError, match="tensor x: expected 16 bytes, got 8"):
        write(tmp_path / "out.gguf", {}, [(TensorInfo("x", (4,), F32), [memoryview(bytes(8))])])
    assert list(tmp_path.iterdir()) == []


def string(text: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text


def packed(
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    tensors: int = 0,
    values: int = 0,
    rest: bytes = b"",
) -> bytes:
    return magic + struct.pack("<IQQ", version, tensors, values) + rest


def value(key: bytes, kind: int, data: bytes) -> bytes:
    return string(key) + struct.pack("<I", kind) + data


def tensor(
    name: bytes = b"x", shape: tuple[int, ...] = (4,), kind: int = 0, offset: int = 0
) -> bytes:
    return string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


PADDING = bytes(256)
HOSTILE = {
    "empty": b"",
    "another format": packed(magic=b"GGML"),
    "old version": packed(version=1),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "more values than bytes": packed(values=1 << 60),
    "more tensors than bytes": packed(tensors=1 << 60),
    "key runs past the end": packed(values=1, rest=struct.pack("<Q", 60) + b"k" * 20),
    "huge key": packed(values=1, rest=struct.pack("<Q", 1 << 62) + PADDING),
    "key that is not UTF-8": packed(values=1, rest=value(b"\xff", 4, bytes(4)) + PADDING),
    "unknown type": packed(values=1, rest=value(b"k", 99, bytes(8)) + PADDING),
    "array of 2^62 numbers": packed(
        values=1, rest=value(b"k", 9, struct.pack("<IQ", 4, 1 << 62)) + PADDING
    ),
    "array of 2^62 strings": packed(
        values=1, rest=value(b"k", 9, struct.pack("<IQ", 8, 1 << 62)) + PADDING
    ),
    "array of arrays": packed(values=1, rest=value(b"k", 9, struct.pack("<IQ", 9, 1)) + PADDING),
    "string in an array past the end": packed(
        values=1, rest=value(b"k", 9, struct.pack("<IQQ", 8, 1, 1 << 40)) + PADDING
    ),
    "key twice": packed(values=2, rest=value(b"k", 4, bytes(4)) * 2 + PADDING),
    "other alignment": packed(
        values=1, rest=value(b"general.alignment", 4, struct.pack("<I", 4096)) + PADDING
    ),
    "no dimension": packed(tensors=1, rest=tensor(shape=()) + PADDING),
    "five dimensions": packed(tensors=1, rest=tensor(shape=(1,) * 5) + PADDING),
    "zero rows": packed(tensors=1, rest=tensor(shape=(4, 0)) + PADDING),
    "product overflows": packed(tensors=1, rest=tensor(shape=(1 << 32, 1 << 32)) + PADDING),
    "unknown tensor type": packed(tensors=1, rest=tensor(kind=4) + PADDING),
    "row not a multiple of the block": packed(
        tensors=1, rest=tensor(shape=(100,), kind=8) + PADDING
    ),
    "name too long for ggml": packed(tensors=1, rest=tensor(name=b"n" * 64) + PADDING),
    "name twice": packed(tensors=2, rest=tensor() + tensor(offset=32) + PADDING),
    "gap before the data": packed(tensors=1, rest=tensor(offset=32) + PADDING),
    "overlapping tensors": packed(tensors=2, rest=tensor() + tensor(name=b"y") + PADDING),
    "data past the end": packed(tensors=1, rest=tensor(shape=(4096,)) + PADDING),
}


# ── types that gguf-py does not know ──

IQ4_KS, OTHER = 144, 250


def unknown(sizes: tuple[int, int], *, end: int = 0, second: int | None = None) -> bytes:
    """A file with `first` at IQ4_KS and `second` at another type, of these sizes with padding."""
    offset = sizes[0] if second is None else second
    entries = tensor(b"first", (4, 3), IQ4_KS) + tensor(b"second", (5,), OTHER, offset)
    head = packed(tensors=2, rest=entries)
    return head + bytes(-len(head) % 32) + bytes(range(256))[: sum(sizes) + end]


def test_the_size_of_an_unknown_type_follows_from_the_offsets(tmp_path: Path) -> None:
    (path := tmp_path / "x.gguf").write_bytes(unknown((96, 64)))
    opened = reader.read(path)
    data = path.read_bytes()[-160:]
    for name, begin, size in (("first", 0, 96), ("second", 96, 64)):
        place = opened.ranges[name]
        assert opened.tensors[name].size == place.size == size
        assert path.read_bytes()[place.offset :][:size] == data[begin:][:size]
    assert [info.type.name for info in opened.tensors.values()] == ["IQ4_KS", "type 250"]
    assert reader.unreadable(opened) == {"IQ4_KS": 1, "type 250": 1}
    copy = tmp_path / "copy.gguf"
    write(copy, opened.metadata, reader.contents(opened))
    assert copy.read_bytes() == path.read_bytes()
    known = TensorInfo("third", (4,), F32)
    write(copy, {}, [*reader.contents(opened), (known, [memoryview(bytes(16))])])
    assert reader.read(copy).tensors == {**opened.tensors, "third": known}


@pytest.mark.parametrize(
    "content",
    [
        unknown((96, 64), end=-1), unknown((96, 64), end=-32 * 2), unknown((96, 64), end=-31),
        unknown((96, 64), second=0), unknown((96, 64), second=95), unknown((96, 64), second=192),
        unknown((96, 64), second=1 << 63),
    ],
)  # fmt: skip
def test_an_unknown_type_does_not_hide_damage(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(GgufError, match=r"x\.gguf.*(truncated|lies at offset)"):
        reader.read(tmp_path / "x.gguf")


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "hostile.gguf"
    path.write_bytes(content)
    with pytest.raises(GgufError, match=r"hostile\.gguf"):
        reader.read(path)


def test_every_truncation_of_the_data_is_refused(sample: Path, tmp_path: Path) -> None:
    whole, cut = sample.read_bytes(), tmp_path / "cut.gguf"
    end = max(piece.offset + piece.size for piece in reader.read(sample).ranges.values())
    for length in range(0, end, 7):
        cut.write_bytes(whole[:length])
        with pytest.raises(GgufError):
            reader.read(cut)
