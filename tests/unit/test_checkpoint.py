"""A damaged checkpoint is refused, with a message that names the file."""

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import CHECKPOINTS
from mtpforge.checkpoint.checkpoint import Checkpoint
from mtpforge.checkpoint.model_files import INDEX
from mtpforge.checkpoint.safetensors import read_shard_header
from mtpforge.errors import CheckpointError

Fails = Callable[..., str]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A private copy of the dense checkpoint."""
    return Path(shutil.copytree(CHECKPOINTS / "tiny-qwen3.5", tmp_path / "copy"))


def shard(checkpoint: Path, number: int = -1) -> Path:
    return sorted(checkpoint.glob("*.safetensors"))[number]


def edit_index(checkpoint: Path, change: Callable[[dict[str, str]], object]) -> None:
    index = json.loads((checkpoint / INDEX).read_text())
    change(index["weight_map"])
    (checkpoint / INDEX).write_text(json.dumps(index))


def write_header(path: Path, header: object, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def test_shards_read_as_with_the_safetensors_library(checkpoint: Path) -> None:
    from safetensors import safe_open

    opened = Checkpoint(checkpoint)
    names = set()
    for path in checkpoint.glob("*.safetensors"):
        with safe_open(path, "np") as reference:
            for name in reference.keys():  # noqa: SIM118 (not a dict)
                names.add(name)
                assert list(opened.tensors[name].shape) == reference.get_slice(name).get_shape()
                assert opened.tensors[name].dtype == reference.get_slice(name).get_dtype()
    assert names == opened.tensors.keys()


def test_a_missing_shard_is_named(checkpoint: Path, fails: Fails, tmp_path: Path) -> None:
    gone = shard(checkpoint)
    gone.unlink()
    assert gone.name in fails("convert.py", checkpoint, out=tmp_path / "out.gguf")


def test_a_tensor_absent_from_the_index_is_named(
    checkpoint: Path, fails: Fails, tmp_path: Path
) -> None:
    edit_index(checkpoint, lambda names: names.pop("mtp.fc.weight"))
    message = fails("convert.py", checkpoint, out=tmp_path / "out.gguf")
    assert "mtp.fc.weight" in message and INDEX in message


def test_a_tensor_only_in_the_index_is_named(
    checkpoint: Path, fails: Fails, tmp_path: Path
) -> None:
    edit_index(checkpoint, lambda names: names.update({"mtp.extra.weight": shard(checkpoint).name}))
    assert "mtp.extra.weight" in fails("convert.py", checkpoint, out=tmp_path / "out.gguf")


def test_a_truncated_shard_is_named(checkpoint: Path, fails: Fails, tmp_path: Path) -> None:
    path = shard(checkpoint)
    path.write_bytes(path.read_bytes()[:-1000])
    message = fails("convert.py", checkpoint, out=tmp_path / "out.gguf")
    assert path.name in message and "truncated" in message


def test_an_unknown_architecture_is_refused_with_the_known_ones(
    checkpoint: Path, fails: Fails, tmp_path: Path
) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(
        json.dumps({**config, "architectures": ["LlamaForCausalLM"]})
    )
    message = fails("convert.py", checkpoint, out=tmp_path / "out.gguf")
    assert "LlamaForCausalLM" in message and "Qwen3_5MoeForConditionalGeneration" in message


@pytest.mark.parametrize(
    "name",
    ["../model.safetensors", "/etc/passwd", "a/b.safetensors", ".safetensors", "model.bin", 7],
)
def test_a_shard_name_with_a_path_is_refused(checkpoint: Path, name: object) -> None:
    edit_index(checkpoint, lambda names: names.update({"mtp.fc.weight": name}))
    with pytest.raises(CheckpointError, match="plain"):
        Checkpoint(checkpoint)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": Nan}', "\xff", '{"a":' * 5000])
def test_a_malformed_config_is_refused(checkpoint: Path, text: str) -> None:
    (checkpoint / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(CheckpointError, match=r"config\.json"):
        Checkpoint(checkpoint)


def entry(
    dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)
) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b"{" * 100,
        b'{"a": 1, "a": 1}',
        {"a": entry(dtype="F31")},
        {"a": entry(shape=[-2])},
        {"a": entry(shape=[2.0])},
        {"a": entry(shape=[True, 2])},
        {"a": entry(shape=[3])},
        {"a": entry(dtype="F4", shape=[15])},
        {"a": entry(dtype="F4", shape=[8])},
        {"a": entry(dtype="U32", shape=[8])},
        {"a": entry(offsets=[0, 4])},
        {"a": entry(offsets=[8, 0])},
        {"a": entry(offsets=[0])},
        {"a": entry(offsets=[4, 12])},
        {"a": entry(shape=[1 << 40, 1 << 40], offsets=[0, 1 << 82])},
        {"a": entry(), "b": entry()},
        {"a": "text"},
        {},
    ],
    ids=repr,
)
def test_a_malformed_header_is_refused(tmp_path: Path, header: object) -> None:
    with pytest.raises(CheckpointError):
        read_shard_header(write_header(tmp_path / "x.safetensors", header, bytes(8)))


@pytest.mark.parametrize(
    ("dtype", "count"),
    [
        ("U64", 1), ("C64", 1), ("U32", 2), ("I32", 2), ("U16", 4), ("U8", 8), ("BOOL", 8),
        ("F8_E8M0", 8), ("F8_E4M3FNUZ", 8), ("F8_E5M2FNUZ", 8), ("F4", 16),
    ],
)  # fmt: skip
def test_every_type_of_the_format_has_a_size(tmp_path: Path, dtype: str, count: int) -> None:
    header = {"a": entry(dtype=dtype, shape=[count])}
    (tensor,) = read_shard_header(write_header(tmp_path / "x.safetensors", header, bytes(8)))
    assert (tensor.dtype, tensor.size) == (dtype, 8)


@pytest.mark.parametrize("dtype", ["F6_E3M2", "F6_E2M3"])
def test_types_of_six_bits_have_a_size(tmp_path: Path, dtype: str) -> None:
    header = {"a": entry(dtype=dtype, shape=[4, 8], offsets=[0, 24])}
    (tensor,) = read_shard_header(write_header(tmp_path / "x.safetensors", header, bytes(24)))
    assert tensor.size == 24


def test_a_header_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    with pytest.raises(CheckpointError, match="truncated"):
        read_shard_header(path)
