"""A head is appended to a base that lacks one: every other byte stays, every key that counts blocks is right."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import CHECKPOINTS
from gguf.constants import GGUFValueType
from mtpforge import convert, gguf_file
from mtpforge.errors import GgufError
from mtpforge.gguf_file import Gguf, Value
from mtpforge.inject import inject

CHECKPOINT = CHECKPOINTS / "tiny-qwen3.5"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The dense checkpoint's parts, converted."""
    folder = tmp_path_factory.mktemp("parts")
    for part in convert.PARTS:
        convert.convert(CHECKPOINT, folder / f"{part}.gguf", part, "qwen35")
    return {part: folder / f"{part}.gguf" for part in convert.PARTS}


def content(opened: Gguf, name: str) -> bytes:
    piece = opened.ranges[name]
    return piece.path.read_bytes()[piece.offset : piece.offset + piece.size]


def rewrite(source: Path, out: Path, change: Callable[[dict[str, Value]], object], drop: str = "\0") -> Path:
    """A copy with other metadata, without the tensors that begin with `drop`."""
    opened = gguf_file.read(source)
    metadata = dict(opened.metadata)
    change(metadata)
    kept = [(info, [opened.ranges[name]]) for name, info in opened.tensors.items() if not name.startswith(drop)]
    gguf_file.write(out, metadata, kept)
    return out


def set_u32(key: str, value: int) -> Callable[[dict[str, Value]], object]:
    return lambda metadata: metadata.update({key: Value.of(value, GGUFValueType.UINT32)})


@pytest.mark.parametrize("head", ["head", "all", "checkpoint"])
def test_trunk_and_head_make_the_whole(parts: dict[str, Path], head: str, tmp_path: Path) -> None:
    inject(parts["trunk"], CHECKPOINT if head == "checkpoint" else parts[head], tmp_path / "out.gguf")
    whole, injected, base = (gguf_file.read(path) for path in (parts["all"], tmp_path / "out.gguf", parts["trunk"]))
    assert injected.tensors == whole.tensors  # names, shapes and types
    assert all(content(injected, name) == content(whole, name) for name in whole.tensors)
    assert {k: v for k, v in injected.metadata.items() if k != "general.size_label"} == {
        k: v for k, v in whole.metadata.items() if k != "general.size_label"
    }
    assert injected.metadata["general.size_label"] == base.metadata["general.size_label"]  # the base's own word stays


def test_only_keys_that_count_blocks_change(parts: dict[str, Path], tmp_path: Path) -> None:
    """Rope sections have as many entries as this model has blocks, and are no per-layer array."""
    odd = rewrite(
        parts["trunk"],
        tmp_path / "base.gguf",
        lambda m: m.update({"custom.key": Value(GGUFValueType.FLOAT32, b"\1\2\3\4")}),
    )
    inject(odd, parts["head"], tmp_path / "out.gguf")
    base, out = gguf_file.read(odd), gguf_file.read(tmp_path / "out.gguf")
    changed = {key for key, value in out.metadata.items() if base.metadata.get(key) != value}
    assert changed == {"qwen35.block_count", "qwen35.nextn_predict_layers", "qwen35.attention.recurrent_layers"}
    assert [key for key in out.metadata if key != "qwen35.nextn_predict_layers"] == list(base.metadata)
    blocks = base.get("qwen35.block_count")
    assert len(base.get("qwen35.rope.dimension_sections")) == blocks  # the trap
    assert out.get("qwen35.attention.recurrent_layers") == [*base.get("qwen35.attention.recurrent_layers"), False]


def test_a_base_of_an_older_converter_has_no_per_layer_array(parts: dict[str, Path], tmp_path: Path) -> None:
    old = rewrite(parts["trunk"], tmp_path / "old.gguf", lambda m: m.pop("qwen35.attention.recurrent_layers"))
    inject(old, parts["head"], tmp_path / "out.gguf")
    assert "qwen35.attention.recurrent_layers" not in gguf_file.read(tmp_path / "out.gguf").metadata


def refusal(base: Path, head: Path, tmp_path: Path) -> str:
    with pytest.raises(GgufError) as caught:
        inject(base, head, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
    return str(caught.value)


def test_what_does_not_belong_together_is_refused_with_both_sides(parts: dict[str, Path], tmp_path: Path) -> None:
    def base(key: str, value: int) -> Path:
        return rewrite(parts["trunk"], tmp_path / f"{key}.gguf", set_u32(key, value))

    assert "has a head already (block 4)" in refusal(parts["all"], parts["head"], tmp_path)
    assert "has no head" in refusal(parts["trunk"], parts["trunk"], tmp_path)
    assert (
        "is 512 in" in (message := refusal(base("qwen35.embedding_length", 512), parts["head"], tmp_path)) and "256 in" in message
    )
    assert "has 3 blocks, the head" in refusal(base("qwen35.block_count", 3), parts["head"], tmp_path)
    assert "split GGUF" in refusal(base("split.count", 2), parts["head"], tmp_path)
    other = rewrite(
        parts["trunk"],
        tmp_path / "x.gguf",
        lambda m: m.update({"general.architecture": Value.of("llama", GGUFValueType.STRING)}),
    )
    assert "is llama" in refusal(other, parts["head"], tmp_path)
    torn = rewrite(
        parts["all"],
        tmp_path / "torn.gguf",
        lambda m: (set_u32("qwen35.block_count", 4)(m), m.pop("qwen35.nextn_predict_layers")),
    )
    assert "tensors of block 4" in refusal(torn, parts["head"], tmp_path)


def test_a_per_layer_array_that_the_head_does_not_know_is_refused(parts: dict[str, Path], tmp_path: Path) -> None:
    widths = Value.of([1, 2, 3, 4], GGUFValueType.ARRAY, GGUFValueType.UINT32)
    base = rewrite(parts["trunk"], tmp_path / "base.gguf", lambda m: m.update({"qwen35.widths": widths}))
    assert "qwen35.widths has an entry for each of 4 blocks" in refusal(base, parts["head"], tmp_path)
