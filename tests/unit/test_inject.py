"""An injected head is appended: every other byte stays, every key that counts blocks is right."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CHECKPOINTS, Run
from gguf.constants import GGMLQuantizationType, GGUFValueType
from mtpforge.convert import native
from mtpforge.errors import ConfigError, GgufError, StorageError
from mtpforge.gguf import reader, writer
from mtpforge.gguf.head import quantizable, trunk_digests
from mtpforge.gguf.metadata import Value
from mtpforge.gguf.reader import PADDING, Gguf
from mtpforge.gguf.split import read as read_split
from mtpforge.inject.inject import Options, cost, inject, planned_head
from mtpforge.inject.match import vocabulary_difference
from mtpforge.io import storage
from mtpforge.io.ranges import BLOCK
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.quantize.recipe import head_recipe
from splits import relabel, split

CHECKPOINT = CHECKPOINTS / "tiny-qwen3.5"


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The dense checkpoint's parts, converted."""
    folder = tmp_path_factory.mktemp("parts")
    for part in native.PARTS:
        native.convert(CHECKPOINT, folder / f"{part}.gguf", part, "qwen35")
    return {part: folder / f"{part}.gguf" for part in native.PARTS}


def content(opened: Gguf, name: str) -> bytes:
    piece = opened.ranges[name]
    return piece.path.read_bytes()[piece.offset : piece.offset + piece.size]


def contents(opened: Gguf) -> dict[str, bytes]:
    return {name: content(opened, name) for name in opened.tensors}


def rewrite(
    source: Path, out: Path, change: Callable[[dict[str, Value]], object], drop: str = "\0"
) -> Path:
    """A copy with other metadata, without the tensors whose names begin with `drop`."""
    opened = reader.read(source)
    metadata = dict(opened.metadata)
    change(metadata)
    kept = [
        (info, [opened.ranges[name]])
        for name, info in opened.tensors.items()
        if not name.startswith(drop)
    ]
    writer.write(out, metadata, kept)
    return out


def set_u32(key: str, value: int) -> Callable[[dict[str, Value]], object]:
    return lambda metadata: metadata.update({key: Value.of(value, GGUFValueType.UINT32)})


def start_of_data(opened: Gguf) -> int:
    return min(piece.offset for piece in opened.ranges.values())


# ── the result ──


@pytest.mark.parametrize("head", ["head", "all", "checkpoint"])
def test_trunk_plus_head_equal_the_whole(parts: dict[str, Path], head: str, tmp_path: Path) -> None:
    inject(
        parts["trunk"], CHECKPOINT if head == "checkpoint" else parts[head], tmp_path / "out.gguf"
    )
    whole, injected, base = (
        reader.read(path) for path in (parts["all"], tmp_path / "out.gguf", parts["trunk"])
    )
    assert injected.tensors == whole.tensors  # names, shapes and types
    assert all(content(injected, name) == content(whole, name) for name in whole.tensors)
    assert {
        k: v for k, v in injected.metadata.items() if k not in ("general.size_label", PADDING)
    } == {k: v for k, v in whole.metadata.items() if k != "general.size_label"}
    assert (
        injected.metadata["general.size_label"] == base.metadata["general.size_label"]
    )  # the base's own label stays


def test_only_keys_that_count_blocks_change(parts: dict[str, Path], tmp_path: Path) -> None:
    """Rope sections have as many entries as this model has blocks, but are not per layer."""
    odd = rewrite(
        parts["trunk"],
        tmp_path / "base.gguf",
        lambda m: m.update({"custom.key": Value(GGUFValueType.FLOAT32, b"\1\2\3\4")}),
    )
    inject(odd, parts["head"], tmp_path / "out.gguf")
    base, out = reader.read(odd), reader.read(tmp_path / "out.gguf")
    changed = {key for key, value in out.metadata.items() if base.metadata.get(key) != value}
    assert changed == {
        "qwen35.block_count",
        "qwen35.nextn_predict_layers",
        "qwen35.attention.recurrent_layers",
        PADDING,
    }
    assert [key for key in out.metadata if key != "qwen35.nextn_predict_layers"] == [
        *base.metadata,
        PADDING,
    ]
    blocks = base.get("qwen35.block_count")
    assert len(base.get("qwen35.rope.dimension_sections")) == blocks  # as many as blocks
    assert out.get("qwen35.attention.recurrent_layers") == [
        *base.get("qwen35.attention.recurrent_layers"),
        False,
    ]


def test_a_base_from_an_older_converter_gets_no_per_layer_array(
    parts: dict[str, Path], tmp_path: Path
) -> None:
    old = rewrite(
        parts["trunk"], tmp_path / "old.gguf", lambda m: m.pop("qwen35.attention.recurrent_layers")
    )
    inject(old, parts["head"], tmp_path / "out.gguf")
    assert "qwen35.attention.recurrent_layers" not in reader.read(tmp_path / "out.gguf").metadata


def refusal(base: Path, head: Path, tmp_path: Path) -> str:
    with pytest.raises(GgufError) as caught:
        inject(base, head, tmp_path / "out.gguf")
    assert not (tmp_path / "out.gguf").exists()
    return str(caught.value)


def test_a_head_of_another_model_is_refused_with_both_values(
    parts: dict[str, Path], tmp_path: Path
) -> None:
    def base(key: str, value: int) -> Path:
        return rewrite(parts["trunk"], tmp_path / f"{key}.gguf", set_u32(key, value))

    assert "has no head" in refusal(parts["trunk"], parts["trunk"], tmp_path)
    assert (
        "is 512 in"
        in (message := refusal(base("qwen35.embedding_length", 512), parts["head"], tmp_path))
        and "256 in" in message
    )
    assert "has 3 blocks, the head" in refusal(
        base("qwen35.block_count", 3), parts["head"], tmp_path
    )
    sections = Value.of([3, 3, 1, 1], GGUFValueType.ARRAY, GGUFValueType.INT32)
    turned = rewrite(
        parts["trunk"],
        tmp_path / "r.gguf",
        lambda m: m.update({"qwen35.rope.dimension_sections": sections}),
    )
    assert (
        "is [3, 3, 1, 1] in" in (message := refusal(turned, parts["head"], tmp_path))
        and "[3, 3, 2, 0] in" in message
    )
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
    assert "has blk.4.nextn.eh_proj.weight, but its metadata declares no such block" in refusal(
        torn, parts["head"], tmp_path
    )


def test_an_incomplete_base_is_refused(parts: dict[str, Path], tmp_path: Path) -> None:
    def base(
        change: Callable[[dict[str, Value]], object], drop: str = "\0", head: str = "head"
    ) -> str:
        return refusal(
            rewrite(parts["trunk"], tmp_path / "base.gguf", change, drop), parts[head], tmp_path
        )

    assert "it declares 4 blocks, but has no tensor of block 2" in base(lambda m: None, "blk.2.")
    assert "token_embd.weight is missing" in base(lambda m: None, "token_embd")
    assert "qwen35.rope.freq_base is None in" in base(lambda m: m.pop("qwen35.rope.freq_base"))
    tokens = Value.of(
        reader.read(parts["trunk"]).get("tokenizer.ggml.tokens")[::-1],
        GGUFValueType.ARRAY,
        GGUFValueType.STRING,
    )
    assert "token 0 is" in base(lambda m: m.update({"tokenizer.ggml.tokens": tokens}), head="all")
    for count in (5, 0xFFFFFFFF):
        more = set_u32("qwen35.block_count", count)
        assert f"it declares {count} blocks, but has no tensor of block 4" in base(more)
    undeclared = rewrite(
        parts["all"], tmp_path / "u.gguf", lambda m: m.pop("qwen35.nextn_predict_layers")
    )
    message = refusal(undeclared, parts["head"], tmp_path)
    assert "has blk.4.nextn." in message and "nextn_predict_layers does not declare" in message
    assert "is a folder: name its GGUF" in refusal(tmp_path, parts["head"], tmp_path)
    many = Value.of([1] * 100_000, GGUFValueType.ARRAY, GGUFValueType.UINT32)
    for key in (
        "qwen35.block_count",
        "qwen35.nextn_predict_layers",
        "qwen35.embedding_length",
        "split.count",
    ):
        assert len(base(lambda m, key=key: m.update({key: many}))) < 1000
    odd = rewrite(
        parts["trunk"], tmp_path / "odd.gguf", lambda m: m.update({"split.tensors.count": many})
    )
    inject(odd, parts["head"], tmp_path / "out.gguf")  # ignored in a single file


def test_a_vocabulary_may_rename_reserved_tokens_but_not_change_merges(
    parts: dict[str, Path],
) -> None:
    """Some publishers rename a pad token; injection and verification share this rule."""
    right = reader.read(parts["all"]).metadata
    tokens, merges = "tokenizer.ggml.tokens", "tokenizer.ggml.merges"

    def found(key: str, change: Callable[[list[str]], object]) -> tuple[str, Any, Any] | None:
        values = right[key].decode()
        change(values)
        return vocabulary_difference(
            {**right, key: Value.of(values, GGUFValueType.ARRAY, GGUFValueType.STRING)}, right
        )

    assert vocabulary_difference(right, right) is None
    assert found(tokens, lambda values: values.__setitem__(1279, "<|PAD_TOKEN|>")) is None
    assert (
        found(tokens, lambda values: values.__setitem__(slice(1268, 1280), ["x"] * 12)) is None
    )  # 12 of 1,280
    assert found(tokens, lambda values: values.__setitem__(slice(1267, 1280), ["x"] * 13)) == (
        "token 1267",
        "x",
        "</think>",
    )
    assert found(tokens, lambda values: values.pop()) is None
    assert found(tokens, lambda values: values.extend(["<|tool|>"] * 128)) is None
    assert found(tokens, lambda values: values.insert(0, "x")) == ("token 0", "x", "!")
    assert (found(merges, lambda values: values.reverse()) or ("",))[0] == merges
    assert (found(merges, lambda values: values.pop(0)) or ("",))[0] == merges
    assert found(merges, lambda values: values.pop()) is None  # with the last tokens cut off


def test_a_checkpoint_without_a_tokenizer_gives_its_head(
    parts: dict[str, Path], tmp_path: Path
) -> None:
    """As the pipeline downloads it: there is no vocabulary to compare."""
    folder = tmp_path / "head"
    shutil.copytree(CHECKPOINT, folder)
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / name).unlink()
    inject(parts["trunk"], folder, tmp_path / "out.gguf")
    assert reader.read(tmp_path / "out.gguf").head.tensors


def test_a_per_layer_array_that_the_head_lacks_is_refused(
    parts: dict[str, Path], tmp_path: Path
) -> None:
    widths = Value.of([1, 2, 3, 4], GGUFValueType.ARRAY, GGUFValueType.UINT32)
    base = rewrite(
        parts["trunk"], tmp_path / "base.gguf", lambda m: m.update({"qwen35.widths": widths})
    )
    assert "qwen35.widths has an entry for each of 4 blocks" in refusal(
        base, parts["head"], tmp_path
    )


def test_the_data_keeps_its_alignment_to_blocks_of_the_file_system(
    parts: dict[str, Path], tmp_path: Path
) -> None:
    for extra in (0, 100, 5000):
        note = Value.of("x" * extra, GGUFValueType.STRING)
        base = rewrite(
            parts["trunk"], tmp_path / "base.gguf", lambda m, note=note: m.update({"a.note": note})
        )
        inject(base, parts["head"], tmp_path / "out.gguf")
        assert (
            start_of_data(reader.read(tmp_path / "out.gguf")) - start_of_data(reader.read(base))
        ) % BLOCK == 0


def test_a_declared_but_missing_head_is_restored(parts: dict[str, Path], tmp_path: Path) -> None:
    """Upstream makes such a file, which does not load, of a checkpoint that lost its head."""
    base = rewrite(parts["all"], tmp_path / "base.gguf", lambda m: None, drop="blk.4.")
    inject(base, parts["head"], tmp_path / "out.gguf")
    whole, made = reader.read(parts["all"]), reader.read(tmp_path / "out.gguf")
    assert contents(made) == contents(whole)
    assert {key: value for key, value in made.metadata.items() if key != PADDING} == whole.metadata


def test_digests_are_of_the_base_trunk_and_of_the_new_head(
    parts: dict[str, Path], tmp_path: Path
) -> None:
    inject(
        parts["trunk"],
        parts["head"],
        tmp_path / "out.gguf",
        Options(digests=tmp_path / "trunk.json"),
    )
    before = trunk_digests(reader.read(parts["trunk"]))
    assert len(before) == 55 and before == trunk_digests(reader.read(tmp_path / "out.gguf"))
    head = reader.digests(parts["head"])
    header = {"header": reader.digests(tmp_path / "out.gguf")["header"]}
    assert json.loads((tmp_path / "trunk.json").read_text()) == header | before | {
        name: head[name] for name in head if name != "header"
    }


def test_other_runtimes_find_the_head(parts: dict[str, Path], tmp_path: Path) -> None:
    """ik_llama.cpp uses the same names but not recurrent_layers; Lemonade reads only a UINT32.

    Source: their code in 2026.
    """
    inject(parts["trunk"], parts["head"], tmp_path / "out.gguf")
    made = reader.read(tmp_path / "out.gguf")
    for name in ("eh_proj", "enorm", "hnorm", "shared_head_norm"):
        assert f"blk.4.nextn.{name}.weight" in made.tensors
    assert made.metadata["qwen35.nextn_predict_layers"] == Value.of(1, GGUFValueType.UINT32)
    assert made.get("qwen35.block_count") == 5 and made.get("qwen35.full_attention_interval") == 4


def test_the_cost_is_shown_first(
    parts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError, match="'eh_porj' matches no matrix of the head, which has blk"):
        inject(
            parts["trunk"],
            parts["draft"],
            tmp_path / "out.gguf",
            Options(head_types=head_recipe("Q8_0", [("eh_porj", "Q4_K")])),
        )
    assert capsys.readouterr().err == ""
    inject(parts["trunk"], parts["head"], tmp_path / "out.gguf")
    assert capsys.readouterr().err.splitlines() == [
        "the head at BF16: 15 tensors, 1,185,280 bytes, 16.04 bits per weight; "
        "27.1% on top of trunk.gguf"
    ]
    head = reader.read(parts["head"])
    trunk = reader.read(parts["trunk"])
    assert "at Q4_K/Q8_0" in cost(trunk, head, [("attn|ffn", "Q8_0"), ("", "Q4_K")])
    assert cost(trunk, head, [("", "IQ3_S")]).endswith("; below 4 bits a head drafts badly")


def test_the_space_is_that_of_the_result_and_the_quantized_head(
    parts: dict[str, Path], tmp_path: Path, toolchain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is asked for before the head is quantized, and that is all that it takes."""
    out, types = tmp_path / "out.gguf", head_recipe("Q8_0")
    head = sum(each.size for each in planned_head(reader.read(parts["head"]), types))
    needed = parts["trunk"].stat().st_size + 2 * head
    free = needed + 100_000  # for metadata and folders

    def room(_: Path) -> int:
        return free - storage._taken(tmp_path)

    monkeypatch.setattr(storage, "file_system", lambda _: "ext4")
    monkeypatch.setattr(storage, "room", room)
    inject(parts["trunk"], parts["head"], out, Options(types), LlamaCpp(toolchain))
    out.unlink()
    free = needed - 1
    with pytest.raises(
        StorageError, match=f"out.gguf: not enough space .* {storage.amount(needed)}"
    ):
        inject(parts["trunk"], parts["head"], out, Options(types), LlamaCpp(tmp_path / "none"))
    whole = parts["trunk"].stat().st_size + parts["head"].stat().st_size
    free = whole + 100_000  # with its own types, the head is only copied
    inject(parts["trunk"], parts["head"], out, Options(), LlamaCpp(tmp_path / "none"))


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_1", "Q4_K", "IQ4_XS", "Q2_K", "IQ2_S", "TQ2_0"])
def test_the_head_of_a_sidecar_is_taken_at_any_type(
    parts: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    """Whoever published it chose the type; its bytes stay as they are."""
    draft = reader.read(parts["draft"])
    tensors = []
    for info, payload in reader.contents(draft):
        if quantizable(info, "qwen35"):
            info = replace(info, type=GGMLQuantizationType[kind])
            payload = [memoryview(np.random.default_rng(info.size).bytes(info.size))]
        tensors.append((info, payload))
    sidecar = tmp_path / "mtp-tiny.gguf"
    writer.write(sidecar, draft.metadata, tensors)
    inject(parts["trunk"], sidecar, tmp_path / "out.gguf")
    made, given = reader.read(tmp_path / "out.gguf"), reader.read(sidecar)
    assert contents(made.head) == contents(given.head)
    assert contents(made.trunk) == contents(reader.read(parts["trunk"]))


@pytest.mark.parametrize(
    ("by", "problem"), [(-1, "1 is not added to 7 norms"), (1, "1 is added twice to 7 norms")]
)
def test_a_head_with_shifted_norms_is_refused(
    parts: dict[str, Path], tmp_path: Path, by: float, problem: str
) -> None:
    """It would load without a warning."""
    opened, raw = reader.read(parts["head"]), bytearray(parts["head"].read_bytes())
    for name, place in opened.ranges.items():
        if name.endswith("norm.weight"):
            values = np.frombuffer(raw, "<f4", place.size // 4, place.offset) + np.float32(by)
            raw[place.offset : place.offset + place.size] = values.astype("<f4").tobytes()
    (tmp_path / "head.gguf").write_bytes(raw)
    with pytest.raises(GgufError, match=f"{problem} .*the original checkpoint"):
        inject(parts["trunk"], tmp_path / "head.gguf", tmp_path / "out.gguf")


# ── a base that has a head ──


def test_injecting_the_same_head_again_changes_nothing(
    parts: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inject(parts["all"], parts["head"], tmp_path / "out.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == parts["all"].read_bytes()
    assert "already has this head" in capsys.readouterr().err


def test_another_head_is_refused_or_replaced(parts: dict[str, Path], tmp_path: Path) -> None:
    opened = reader.read(parts["head"])
    dead = tmp_path / "dead.gguf"
    zeros = [
        (info, [memoryview(bytes(info.size))] if quantizable(info, "qwen35") else payload)
        for info, payload in reader.contents(opened)
    ]
    writer.write(dead, opened.metadata, zeros)
    inject(parts["trunk"], dead, tmp_path / "base.gguf")
    message = refusal(tmp_path / "base.gguf", parts["head"], tmp_path)
    assert (
        "has another head (blk.4.attn_k.weight has other values)" in message
        and "--replace-head" in message
    )
    inject(tmp_path / "base.gguf", parts["head"], tmp_path / "out.gguf", Options(replace_head=True))
    inject(parts["trunk"], parts["head"], tmp_path / "expected.gguf")
    assert (tmp_path / "out.gguf").read_bytes() == (tmp_path / "expected.gguf").read_bytes()


def test_a_head_between_other_tensors_is_replaced(parts: dict[str, Path], tmp_path: Path) -> None:
    opened = reader.read(parts["all"])
    order = sorted(opened.tensors, key=lambda name: (not name.startswith("blk.4."), name))
    writer.write(
        tmp_path / "base.gguf",
        opened.metadata,
        [(opened.tensors[name], [opened.ranges[name]]) for name in order],
    )
    inject(
        tmp_path / "base.gguf", parts["head"], tmp_path / "same.gguf", Options(replace_head=True)
    )
    assert (tmp_path / "same.gguf").read_bytes() == (tmp_path / "base.gguf").read_bytes()
    short = rewrite(
        tmp_path / "base.gguf", tmp_path / "short.gguf", lambda m: None, drop="blk.4.attn_k."
    )
    inject(short, parts["head"], tmp_path / "out.gguf", Options(replace_head=True))
    assert contents(reader.read(tmp_path / "out.gguf")) == contents(opened)


# ── a split base ──


@pytest.fixture(scope="module")
def shards(parts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return split(parts["trunk"], tmp_path_factory.mktemp("split") / "trunk", "trunk", 2_000_000)


def test_a_split_base_becomes_one_file(
    parts: dict[str, Path], shards: list[Path], tmp_path: Path
) -> None:
    assert len(shards) == 3
    inject(
        shards[0], parts["head"], tmp_path / "out.gguf", Options(digests=tmp_path / "trunk.json")
    )
    inject(
        parts["trunk"],
        parts["head"],
        tmp_path / "expected.gguf",
        Options(digests=tmp_path / "expected.json"),
    )
    made, expected = reader.read(tmp_path / "out.gguf"), reader.read(tmp_path / "expected.gguf")
    assert contents(made) == contents(expected)
    assert {**made.metadata, PADDING: None} == {
        **expected.metadata,
        PADDING: None,
    }  # without split.*
    found, wanted = (
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("trunk", "expected")
    )
    assert found.pop("header") == reader.digests(tmp_path / "out.gguf")["header"]
    assert wanted.pop("header") == reader.digests(tmp_path / "expected.gguf")["header"]
    assert found == wanted


def test_shards_may_be_links_into_a_cache(
    parts: dict[str, Path], shards: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "snapshot").mkdir()
    for i, shard in enumerate(shards):
        (tmp_path / f"blob-{i}").write_bytes(shard.read_bytes())
        (tmp_path / "snapshot" / shard.name).symlink_to(f"../blob-{i}")
    links = tmp_path / "snapshot" / shards[0].name
    inject(links, parts["head"], tmp_path / "linked")
    inject(shards[0], parts["head"], tmp_path / "plain")
    for shard in shards:
        linked, plain = (tmp_path / name / shard.name for name in ("linked", "plain"))
        assert not linked.is_symlink() and linked.read_bytes() == plain.read_bytes()


def test_a_split_base_stays_split(
    parts: dict[str, Path], shards: list[Path], tmp_path: Path
) -> None:
    inject(shards[0], parts["head"], tmp_path / "out")
    made = [reader.read(tmp_path / "out" / path.name) for path in shards]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        path.name for path in shards
    ]
    assert contents(read_split(made[0].path)) == contents(reader.read(parts["all"]))
    assert [file.get("split.tensors.count") for file in made] == [70, 70, 70] and made[0].get(
        "qwen35.block_count"
    ) == 5
    for before, after in zip(map(reader.read, shards), made, strict=True):
        assert (
            set(before.tensors) <= set(after.tensors)
            and (start_of_data(after) - start_of_data(before)) % BLOCK == 0
        )
        assert all(
            before.metadata[key] == after.metadata[key] or "count" in key or "layers" in key
            for key in before.metadata
        )


def test_shards_of_different_models_are_refused(
    parts: dict[str, Path], shards: list[Path], tmp_path: Path
) -> None:
    def copied(name: str) -> list[Path]:
        folder = tmp_path / name
        folder.mkdir()
        for path in shards:
            (folder / path.name).write_bytes(path.read_bytes())
        return [folder / path.name for path in shards]

    assert "give the first" in refusal(shards[1], parts["head"], tmp_path)
    missing = copied("missing")
    missing[1].unlink()
    assert f"{missing[1]}: no such file" in refusal(missing[0], parts["head"], tmp_path)
    swapped = copied("swapped")
    swapped[1].write_bytes(shards[2].read_bytes())
    assert "says that it is shard 2 of 3, expected shard 1 of 3" in refusal(
        swapped[0], parts["head"], tmp_path
    )
    fewer = copied("fewer")
    rewrite(shards[2], fewer[2], lambda m: None, drop=list(reader.read(shards[2]).tensors)[-1])
    assert "split.tensors.count is 55, but the 3 files have 54 tensors" in refusal(
        fewer[0], parts["head"], tmp_path
    )
    renamed = shards[0].rename(shards[0].with_name("renamed.gguf"))
    try:
        assert "give the first, named NAME-00001-of-00003.gguf" in refusal(
            renamed, parts["head"], tmp_path
        )
    finally:
        renamed.rename(shards[0])


def test_shards_that_have_this_head_stay_as_they_are(
    parts: dict[str, Path], tmp_path: Path
) -> None:
    whole = split(parts["all"], tmp_path / "whole", "whole", 2_000_000)
    inject(whole[0], parts["head"], tmp_path / "out")
    assert [(tmp_path / "out" / path.name).read_bytes() for path in whole] == [
        path.read_bytes() for path in whole
    ]


def test_a_shard_of_the_base_is_not_overwritten(
    parts: dict[str, Path], shards: list[Path], run: Run
) -> None:
    before = [path.read_bytes() for path in shards]
    for options in (
        ("--out", shards[1]),
        ("--out", shards[0].with_name("x.gguf"), "--digests", shards[2]),
    ):
        done = run("inject.py", shards[0], "--head", parts["head"], *options)
        assert done.returncode == 1 and "is an input" in done.stderr
    assert [path.read_bytes() for path in shards] == before


def test_a_single_base_is_not_written_to_a_folder(
    parts: dict[str, Path], shards: list[Path], tmp_path: Path
) -> None:
    with pytest.raises(GgufError, match=r"folder: name a file F\.gguf: only a split base"):
        inject(parts["trunk"], parts["head"], tmp_path / "folder")


# ── a base with types that gguf-py does not know ──

UNKNOWN = r"blk\.1\.ffn_(up|down|gate)\.weight|token_embd\.weight"


def test_tensors_of_an_unknown_type_are_copied_unseen(
    parts: dict[str, Path], tmp_path: Path
) -> None:
    base = relabel(parts["trunk"], tmp_path / "base.gguf", UNKNOWN, 144)
    inject(base, CHECKPOINT, tmp_path / "out.gguf")
    before, after = reader.read(base), reader.read(tmp_path / "out.gguf")
    assert reader.unreadable(before) == reader.unreadable(after) == {"IQ4_KS": 4}
    assert after.trunk.tensors == before.tensors
    assert all(content(after, name) == content(before, name) for name in before.tensors)
    shards = split(base, tmp_path / "shards", "base", 2_000_000)
    assert len(shards) > 1
    inject(shards[0], CHECKPOINT, tmp_path / "joined.gguf")
    assert trunk_digests(reader.read(tmp_path / "joined.gguf")) == trunk_digests(after)
    inject(shards[0], CHECKPOINT, tmp_path / "folder")
    found = read_split(next(iter(sorted((tmp_path / "folder").iterdir()))))
    assert trunk_digests(found) == trunk_digests(after)


def test_a_head_of_an_unknown_type_is_refused(parts: dict[str, Path], tmp_path: Path) -> None:
    head = relabel(parts["head"], tmp_path / "head.gguf", r".*eh_proj\.weight", 144)
    assert "tensors at IQ4_KS" in refusal(parts["trunk"], head, tmp_path)


def test_a_file_with_unknown_types_is_not_quantized(
    parts: dict[str, Path], run: Run, tmp_path: Path
) -> None:
    source = relabel(parts["trunk"], tmp_path / "source.gguf", UNKNOWN, 144)
    done = run("quantize.py", source, "--type", "Q8_0", "--out", tmp_path / "out.gguf")
    assert done.returncode == 1 and "has tensors at IQ4_KS" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out.gguf").exists()
