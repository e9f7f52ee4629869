"""Norms stored as w - 1, as w (as MLX does) or as w + 1, in all or some of the norms."""

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CHECKPOINTS, MODELS
from layouts import Tensors, qwen3_next, read_tensors, write_checkpoint
from mtpforge.checkpoint.checkpoint import Checkpoint
from mtpforge.convert import native, norm_shift
from mtpforge.errors import CheckpointError
from mtpforge.gguf import reader
from mtpforge.gguf.norm_form import Norm, measure
from mtpforge.verify.norms import check_norms
from mtpforge.verify.source import CheckpointSource
from mtpforge.verify.tensors import Comparisons, compare_tensors

INPUTS = ("mtp.pre_fc_norm_embedding.weight", "mtp.pre_fc_norm_hidden.weight")
BLOCK = tuple(
    f"mtp.layers.0.{name}.weight"
    for name in (
        "input_layernorm",
        "post_attention_layernorm",
        "self_attn.q_norm",
        "self_attn.k_norm",
    )
)


def bf16(values: np.ndarray) -> np.ndarray:
    """The nearest BF16 values, as float32."""
    bits = values.astype(np.float32).view(np.uint32)
    return (((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16).astype(np.uint32).view(np.float32)


def is_norm(name: str) -> bool:
    """Whether a checkpoint's tensor is a norm that is stored as w - 1."""
    ends = name.endswith("norm.weight") or "pre_fc_norm" in name
    return ends and "linear_attn" not in name and "visual" not in name


def plus_one(stored: tuple[str, np.ndarray], dtype: str, times: int = 1) -> tuple[str, np.ndarray]:
    """A BF16 norm plus 1, rounded to a type after each addition, as a converter leaves it."""
    values = (stored[1].astype(np.uint32) << 16).view(np.float32)
    for _ in range(times):
        values = values + np.float32(1)
        values = bf16(values) if dtype == "BF16" else values
        values = values.astype("<f2").astype("<f4") if dtype == "F16" else values
    if dtype == "BF16":
        return dtype, (values.view(np.uint32) >> 16).astype("<u2")
    return dtype, values.astype({"F16": "<f2", "F32": "<f4"}[dtype])


def with_norms(
    parent: Path, model: str, names: Iterable[str] | None, dtype: str = "BF16", times: int = 1
) -> Path:
    """A copy of a checkpoint with 1 added to these norms (None: all), under the same name."""
    source = CHECKPOINTS / model
    tensors = read_tensors(source)
    chosen = [name for name in tensors if is_norm(name)] if names is None else names
    for name in chosen:
        tensors[name] = plus_one(tensors[name], dtype, times)
    config = json.loads((source / "config.json").read_text())
    return write_checkpoint(parent / "as-w" / model, source, config, tensors)


def head_norms(model: str) -> list[str]:
    return [name for name in read_tensors(CHECKPOINTS / model) if is_norm(name) and "mtp." in name]


def trunk_norms(model: str) -> list[str]:
    names = read_tensors(CHECKPOINTS / model)
    return [name for name in names if is_norm(name) and "mtp." not in name]


def converted(checkpoint: Path, out: Path, part: str = "all") -> dict[str, np.ndarray]:
    """The F32 tensors of a converted part."""
    native.convert(checkpoint, out, part, "qwen35")
    opened = reader.read(out)
    return {
        name: np.fromfile(out, "<f4", info.elements, offset=opened.ranges[name].offset)
        for name, info in opened.tensors.items()
        if info.type.name == "F32"
    }


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("which", ["all", "head", "trunk"])
def test_norms_stored_as_w_in_f32_give_the_same_file(
    model: str, which: str, tmp_path: Path
) -> None:
    names = {"all": None, "head": head_norms(model), "trunk": trunk_norms(model)}[which]
    copy = with_norms(tmp_path, model, names, "F32")
    note = native.convert(copy, tmp_path / "copy.gguf", "all", "qwen35")
    assert "were stored as w, not w - 1" in note
    assert native.convert(CHECKPOINTS / model, tmp_path / "clean.gguf", "all", "qwen35") == ""
    found, expected = (
        reader.hashes(reader.read(tmp_path / name).ranges) for name in ("copy.gguf", "clean.gguf")
    )
    assert found == expected


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("part", ["all", "head", "trunk", "draft"])
def test_norms_that_mlx_rounded_are_not_shifted_again(
    model: str, dtype: str, part: str, tmp_path: Path
) -> None:
    expected = converted(CHECKPOINTS / model, tmp_path / "clean.gguf", part)
    found = converted(with_norms(tmp_path, model, None, dtype), tmp_path / "copy.gguf", part)
    for name, values in expected.items():
        assert np.abs(found[name] - values).max() <= 2**-8, name


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    "names",
    [INPUTS, INPUTS[:1], INPUTS[1:], BLOCK, (*INPUTS, *BLOCK)],
    ids=["inputs", "embedding", "hidden", "block", "all-but-the-last"],
)
def test_some_norms_of_a_head_stored_as_w_are_recognized(
    model: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    """Converters know only some of the names."""
    copy = with_norms(tmp_path, model, names)
    found = {
        item.tensors[0].name
        for item in norm_shift.plan_by_values(Checkpoint(copy), "head")
        if item.row.change is norm_shift.stored_as_w
    }
    assert found == set(names)


@pytest.mark.parametrize("model", MODELS)
def test_one_norm_stored_as_w_is_recognized_or_refused(model: str, tmp_path: Path) -> None:
    """Large values have the same bits in both forms, and a single norm may be unusual."""
    for i, name in enumerate((*head_norms(model), *trunk_norms(model))):
        copy = with_norms(tmp_path / str(i), model, [name])
        if name in INPUTS:
            (item,) = (
                item
                for item in norm_shift.plan_by_values(Checkpoint(copy), "head")
                if item.row.change is norm_shift.stored_as_w
            )
            assert item.tensors[0].name == name
            continue
        with pytest.raises(CheckpointError, match=r"do not tell if it is") as caught:
            norm_shift.plan_by_values(Checkpoint(copy), "all")
        assert name in str(caught.value) and "--norms" in str(caught.value)


def test_a_final_norm_in_a_mixed_head_is_in_doubt(tmp_path: Path) -> None:
    """Released ones have means of w - 1 up to 2.6, so w of one is w - 1 of another."""
    copy = with_norms(tmp_path, "tiny-qwen3.5", [*BLOCK, "mtp.norm.weight"])
    with pytest.raises(
        CheckpointError, match=r"mtp\.norm\.weight do not .* 2\.34\) or .* \(1\.34\)"
    ):
        norm_shift.plan_by_values(Checkpoint(copy), "all")


def test_the_form_of_a_norm_in_doubt_can_be_given(tmp_path: Path) -> None:
    copy = with_norms(tmp_path, "tiny-qwen3.5", ["mtp.norm.weight"])
    for form, kept in (("w", {"mtp.norm.weight"}), ("w-1", set())):
        planned = norm_shift.plan_by_values(Checkpoint(copy, norms=form), "head")
        plain = (item for item in planned if item.row.change is norm_shift.stored_as_w)
        assert {item.tensors[0].name for item in plain} == kept


def test_norms_stored_as_w_plus_one_are_refused(tmp_path: Path) -> None:
    copy = with_norms(tmp_path, "tiny-qwen3.5", head_norms("tiny-qwen3.5"), "F32", times=2)
    with pytest.raises(CheckpointError, match=r"stored as w \+ 1"):
        norm_shift.plan_by_values(Checkpoint(copy), "head")


@pytest.mark.parametrize("model", MODELS)
def test_some_norms_shifted_twice_are_refused(model: str, tmp_path: Path) -> None:
    """A tool of MLX knows three of the norms of a head, and adds 1 to them once more."""
    shifted = (*BLOCK[2:], "mtp.norm.weight")
    copy = with_norms(tmp_path, model, head_norms(model))
    tensors = read_tensors(copy)
    for name in shifted:
        tensors[name] = plus_one(tensors[name], "BF16")
    config = json.loads((copy / "config.json").read_text())
    again = write_checkpoint(tmp_path / "again" / model, copy, config, tensors)
    with pytest.raises(CheckpointError, match=r"norms are stored as w \+ 1 \(2: mtp\.layers\.0"):
        norm_shift.plan_by_values(Checkpoint(again), "head")


def test_the_way_back_from_w_is_recognized(tmp_path: Path) -> None:
    """Who subtracts 1 from MLX's norms leaves w - 1 with the few bits of w."""
    model = "tiny-qwen3.5"
    source, tensors = CHECKPOINTS / model, read_tensors(CHECKPOINTS / model)
    for name in filter(is_norm, tensors):
        _, stored = plus_one(tensors[name], "BF16")
        back = (stored.astype(np.uint32) << 16).view(np.float32) - np.float32(1)
        tensors[name] = "BF16", (bf16(back).view(np.uint32) >> 16).astype("<u2")
    config = json.loads((source / "config.json").read_text())
    copy = write_checkpoint(tmp_path / model, source, config, tensors)
    assert norm_shift.note(norm_shift.plan_by_values(Checkpoint(copy), "all")) == ""


# Means of w - 1 that were reported of released models.
LEVELS = {
    "27B": (0.04, 0.21, 0.79, 0.78, -0.46, -0.16, 1.25),
    "4B": (0.30, 0.39, 0.75, 0.73, -0.40, -0.30, 2.58),
    "35B-A3B": (-0.10, 0.10, -0.23, -0.20, -0.73, -0.51, 1.93),
}
OUTPUT = {"27B": 0.96, "4B": 1.14, "35B-A3B": 1.63}
NAMES = (
    "attn_norm", "post_attention_norm", "attn_q_norm", "attn_k_norm", "nextn.enorm", "nextn.hnorm",
    "nextn.shared_head_norm",
)  # fmt: skip


def released(size: str, seed: int) -> dict[str, np.ndarray]:
    """Norms of a head and a trunk with the levels of a released model, as w - 1 in BF16."""
    random = np.random.default_rng(seed)
    found = {}
    for name, level in zip(NAMES, LEVELS[size], strict=True):
        width = 256 if name in ("attn_q_norm", "attn_k_norm") else 2560
        found[f"blk.8.{name}.weight"] = bf16(random.normal(level, 0.25, width))
    for block in range(8):
        for name, level in (("attn_norm", 0.0), ("post_attention_norm", 0.2)):
            found[f"blk.{block}.{name}.weight"] = bf16(random.normal(level, 0.1, 2560))
    for name in ("attn_q_norm", "attn_k_norm"):
        found[f"blk.7.{name}.weight"] = bf16(random.normal(0.3, 0.2, 256))
    found["output_norm.weight"] = bf16(random.normal(OUTPUT[size], 0.15, 2560))
    return found


def judged(stored: Mapping[str, np.ndarray]) -> dict[str, int | None]:
    measured: dict[str, Norm] = {
        name: measure(name, values, norm_shift.SLACK) for name, values in stored.items()
    }
    return norm_shift.judge(measured, {name for name in stored if name.startswith("blk.8.")})


@pytest.mark.parametrize("size", LEVELS)
def test_released_models_are_read_as_they_are(size: str) -> None:
    for seed in range(5):
        stored = released(size, seed)
        assert set(judged(stored).values()) == {0}
        head = {name: values for name, values in stored.items() if name.startswith("blk.8.")}
        assert set(judged(head).values()) == {0}  # a head that was fetched without its trunk


@pytest.mark.parametrize("times", [0, 1])
def test_one_odd_norm_among_many_follows_the_others(times: int) -> None:
    """Its level is that of the other form, and its bits fit both."""
    odd = "blk.7.attn_k_norm.weight"
    stored = {name: bf16(values + times) for name, values in released("27B", 0).items()}
    stored[odd] = bf16(np.random.default_rng(0).normal(1, 0.02, 256) + times)
    measured = measure(odd, stored[odd], norm_shift.SLACK)
    assert times in measured.by_bits and measured.offsets != {times}
    assert set(judged(stored).values()) == {times}


@pytest.mark.parametrize("size", LEVELS)
@pytest.mark.parametrize("which", ["head", "all"])
def test_norms_trained_as_w_are_in_doubt_rather_than_wrong(size: str, which: str) -> None:
    """They have finer bits than w = 1 + (w - 1) in BF16, and the level of w."""
    for seed in range(5):
        released_norms = released(size, seed)
        trained = {n for n in released_norms if which == "all" or n.startswith("blk.8.")}
        random = np.random.default_rng(seed)
        stored = {
            name: bf16(values + 1 + random.normal(0, 0.01, len(values)))
            if name in trained
            else values
            for name, values in released_norms.items()
        }
        answers = judged(stored)
        assert {answers[name] for name in trained} <= {1, None}
        assert {answers[name] for name in answers.keys() - trained} <= {0}


@pytest.mark.parametrize("name", ["output_norm.weight", "blk.8.nextn.shared_head_norm.weight"])
def test_a_value_below_zero_tells_a_final_norm(name: str) -> None:
    """Other values are so large that w - 1 of one model is w of another."""
    large = bf16(np.random.default_rng(0).normal(2, 0.2, 2560))
    with_outlier = np.append(large, np.float32(-0.75))
    assert measure(name, large, norm_shift.SLACK).offsets == {0, 1, 2}
    for values, offset in ((with_outlier, 0), (bf16(with_outlier + 1), None)):
        norm = measure(name, values, norm_shift.SLACK)
        assert norm.is_proven == (offset == 0) and (offset is None or norm.offsets == {offset})


@pytest.mark.parametrize("size", LEVELS)
def test_released_models_in_the_form_of_mlx_are_recognized(size: str) -> None:
    for seed in range(5):
        stored = released(size, seed)
        all_as_w = {name: bf16(values + 1) for name, values in stored.items()}
        head = {name for name in stored if name.startswith("blk.8.")}
        assert set(judged(all_as_w).values()) == {1}
        only_head = judged({n: all_as_w[n] if n in head else stored[n] for n in stored})
        assert {name for name, offset in only_head.items() if offset == 1} == head
        only_trunk = judged({n: stored[n] if n in head else all_as_w[n] for n in stored})
        assert {name for name, offset in only_trunk.items() if offset == 0} == head


# ── finished files ──


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The embedded checkpoints, converted."""
    folder = tmp_path_factory.mktemp("clean")
    for model in MODELS:
        native.convert(CHECKPOINTS / model, folder / f"{model}.gguf", "all", "qwen35")
    return {model: folder / f"{model}.gguf" for model in MODELS}


def finished(source: Path, path: Path, changes: Mapping[str, float]) -> list[str]:
    """The verdict of `norms` on a file with changed norms, given by ending, without a source."""
    opened = reader.read(source)
    raw = bytearray(source.read_bytes())
    for name, place in opened.ranges.items():
        for ending, by in changes.items():
            if name.endswith(ending):
                values = np.frombuffer(raw, "<f4", place.size // 4, place.offset) + np.float32(by)
                raw[place.offset : place.offset + place.size] = values.astype("<f4").tobytes()
    path.write_bytes(raw)
    (check,) = check_norms(reader.read(path), Comparisons())
    return [] if check.passed else [check.detail]


NORMS = [f"{name}.weight" for name in (*NAMES, "output_norm")]


@pytest.mark.parametrize("model", MODELS)
def test_a_right_file_passes_without_a_source(
    clean: dict[str, Path], model: str, tmp_path: Path
) -> None:
    assert finished(clean[model], tmp_path / "a.gguf", {}) == []


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", NORMS)
def test_each_norm_without_its_one_or_with_two_is_found_without_a_source(
    clean: dict[str, Path], model: str, name: str, tmp_path: Path
) -> None:
    (sentence,) = finished(clean[model], tmp_path / "a.gguf", {name: -1})
    assert "1 is not added to " in sentence and name in sentence
    (sentence,) = finished(clean[model], tmp_path / "b.gguf", {name: 1})
    assert "1 is added twice to " in sentence and name in sentence


def test_the_report_says_which_norms_were_stored_as_w(tmp_path: Path) -> None:
    copy = with_norms(tmp_path, "tiny-qwen3.5", list(INPUTS), "F32")
    native.convert(copy, tmp_path / "a.gguf", "all", "qwen35")
    source = CheckpointSource(Checkpoint(copy), "all", "qwen35")
    opened = reader.read(tmp_path / "a.gguf")
    compared = compare_tensors(opened, source.rows(), exact=set(opened.tensors))
    (check,) = check_norms(opened, compared, source.norm_note)
    names = "blk.4.nextn.enorm.weight, blk.4.nextn.hnorm.weight"
    assert check.passed
    assert f"; 2 of 18 norms ({names}) were stored as w, not w - 1" in check.detail


@pytest.mark.parametrize("model", MODELS)
def test_the_norms_of_a_sidecar_are_judged_too(model: str, tmp_path: Path) -> None:
    draft = tmp_path / "draft.gguf"
    native.convert(CHECKPOINTS / model, draft, "draft", "qwen35")
    assert finished(draft, tmp_path / "a.gguf", {}) == []
    (sentence,) = finished(draft, tmp_path / "b.gguf", {"norm.weight": -1})
    assert "1 is not added to 8 norms" in sentence


def test_both_faults_are_named(clean: dict[str, Path], tmp_path: Path) -> None:
    source = clean["tiny-qwen3.5"]
    (sentence,) = finished(
        source, tmp_path / "a.gguf", {"nextn.enorm.weight": -1, "nextn.hnorm.weight": 1}
    )
    assert "1 is not added to blk.4.nextn.enorm.weight" in sentence
    assert "1 is added twice to blk.4.nextn.hnorm.weight" in sentence


def test_a_head_trained_in_f32_is_judged_by_its_level(
    clean: dict[str, Path], tmp_path: Path
) -> None:
    """Its values have no bits that tell, so single norms may pass, but not the whole head."""
    head = [f"blk.4.{name}.weight" for name in NAMES]
    source = clean["tiny-qwen3.5"]
    assert finished(source, tmp_path / "a.gguf", dict.fromkeys(head, 1e-4)) == []
    for by in (-1, 1):
        (sentence,) = finished(source, tmp_path / "b.gguf", dict.fromkeys(head, by + 1e-4))
        assert ("is not added to" if by < 0 else "is added twice to") in sentence


# ── checkpoints that MLX wrote ──


def as_mlx(model: str, dtype: str = "F32") -> tuple[dict[str, Any], Tensors]:
    """An embedded checkpoint with MLX's names, layouts and norms, its head included."""
    source = CHECKPOINTS / model
    result: Tensors = {}
    for name, (kind, array) in read_tensors(source).items():
        mlx = name.replace("model.language_model.", "language_model.model.")
        mlx = mlx.replace("mtp.", "language_model.mtp.").replace("model.visual.", "vision_tower.")
        if is_norm(name):
            result[mlx] = plus_one((kind, array), dtype)
        elif "conv1d" in name:
            result[mlx] = kind, np.ascontiguousarray(np.moveaxis(array, 2, 1))
        elif mlx.endswith("experts.gate_up_proj"):
            for which, half in zip(("gate", "up"), np.split(array, 2, axis=1), strict=True):
                result[mlx.replace("experts.gate_up", f"switch_mlp.{which}") + ".weight"] = (
                    kind,
                    half,
                )
        elif mlx.endswith("experts.down_proj"):
            result[mlx.replace("experts", "switch_mlp") + ".weight"] = kind, array
        else:
            result[mlx] = kind, array
    return json.loads((source / "config.json").read_text()), result


def write_mlx(parent: Path, model: str, tensors: Tensors, config: dict[str, Any]) -> Path:
    """Write a checkpoint with MLX's mark in the metadata of its shard."""
    folder = write_checkpoint(parent / "mlx" / model, CHECKPOINTS / model, config, tensors)
    shard = folder / "model.safetensors"
    raw = shard.read_bytes()
    (length,) = struct.unpack_from("<Q", raw)
    header = {"__metadata__": {"format": "mlx"}} | json.loads(raw[8 : 8 + length])
    text = json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    return folder


@pytest.mark.parametrize("model", MODELS)
def test_an_unquantized_checkpoint_of_mlx_converts(
    clean: dict[str, Path], model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config, tensors = as_mlx(model)
    folder = write_mlx(tmp_path, model, tensors, config)
    assert "were stored as w" in native.convert(folder, tmp_path / "mlx.gguf", "all", "qwen35")
    assert "MLX wrote this checkpoint" in capsys.readouterr().err
    found, expected = (
        reader.hashes(reader.read(path).ranges) for path in (tmp_path / "mlx.gguf", clean[model])
    )
    assert found == expected


def test_qwen3_next_in_the_layout_of_mlx_converts(tmp_path: Path) -> None:
    config, tensors = qwen3_next()
    mlx = {
        name: (kind, np.moveaxis(array, 2, 1)) if "conv1d" in name else (kind, array)
        for name, (kind, array) in tensors.items()
    }
    hashes = []
    for label, each in (("clean", tensors), ("mlx", mlx)):
        out = tmp_path / f"{label}.gguf"
        source = CHECKPOINTS / "tiny-qwen3.5"
        native.convert(
            write_checkpoint(tmp_path / label, source, config, each), out, "all", "qwen35"
        )
        hashes.append(reader.hashes(reader.read(out).ranges))
    assert hashes[0] == hashes[1]


def test_weights_that_mlx_quantized_are_refused_by_name(tmp_path: Path) -> None:
    """The head beside them can still be read."""
    config, tensors = as_mlx("tiny-qwen3.5", "BF16")
    settings = {"group_size": 64, "bits": 4, "mode": "affine"}
    quantized: Tensors = {}
    for name, (kind, array) in tensors.items():
        if name.endswith("_proj.weight") and "mtp" not in name and "vision" not in name:
            rows, columns = array.shape
            quantized[name] = "U32", np.zeros((rows, columns // 8), "<u4")
            for part in ("scales", "biases"):
                scales = np.zeros((rows, columns // 64), "<u2")
                quantized[name.replace("weight", part)] = "BF16", scales
        else:
            quantized[name] = kind, array
    config |= {"quantization": settings, "quantization_config": settings}
    folder = write_mlx(tmp_path, "tiny-qwen3.5", quantized, config)
    with pytest.raises(CheckpointError, match=r"quantized \(by MLX, bits 4\)") as caught:
        native.convert(folder, tmp_path / "all.gguf", "all", "qwen35")
    assert "use the original checkpoint" in str(caught.value) and "inject its head" in str(
        caught.value
    )
    assert "7 of 7 norms" in native.convert(folder, tmp_path / "head.gguf", "head")
