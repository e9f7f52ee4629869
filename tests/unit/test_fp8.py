"""FP8 checkpoints: every form of scale gives upstream's bytes, and none is ever dropped."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import CHECKPOINTS
from gguf.constants import GGMLQuantizationType
from layouts import LAYOUTS, Tensors, read_tensors, write_checkpoint, write_layout
from mtpforge.checkpoint import fp8
from mtpforge.checkpoint.checkpoint import Checkpoint
from mtpforge.checkpoint.families.registry import family_of
from mtpforge.checkpoint.hparams import Hparams
from mtpforge.convert import native, values
from mtpforge.convert.plan import plan_conversion
from mtpforge.errors import CheckpointError
from mtpforge.gguf import reader
from mtpforge.io.ranges import sha256

SOURCE = CHECKPOINTS / "tiny-qwen3.5"
UP = "mtp.layers.0.mlp.up_proj.weight"
GATE = "model.language_model.layers.0.mlp.gate_proj.weight"


def changed(layout: str, folder: Path, change: Callable[[Tensors], object]) -> Path:
    """The dense checkpoint in an FP8 layout, with its tensors changed."""
    config = json.loads((SOURCE / "config.json").read_text())
    tensors = LAYOUTS[layout][1](config, read_tensors(SOURCE))
    change(tensors)
    return write_checkpoint(folder / "copy", SOURCE, config, tensors)


def refusal(checkpoint: Path) -> str:
    out = checkpoint.parent / "out.gguf"
    with pytest.raises(CheckpointError) as caught:
        native.convert(checkpoint, out, tokenizer_pre="qwen35")
    assert not out.exists()
    return str(caught.value)


def float32(*numbers: float) -> tuple[str, np.ndarray]:
    return "F32", np.array(numbers, "<f4")


SCALARS, BLOCKS, ROWS = "dense-fp8-whole", "dense-fp8", "dense-fp8-rows"


@pytest.mark.parametrize(
    ("layout", "change", "named"),
    [
        (SCALARS, lambda t: t.pop(f"{UP}_scale"), f"{UP} is FP8 and {UP}_scale_inv is missing"),
        (ROWS, lambda t: t.pop(f"{GATE}_scale"), f"{GATE} is FP8 and {GATE}_scale_inv is missing"),
        (SCALARS, lambda t: t.update({f"{UP}_scale_inv": float32(2.0)}), "has two scales"),
        (SCALARS, lambda t: t.update({f"{UP}_scale": float32(1, 2)}), "for the whole or each row"),
        (SCALARS, lambda t: t.update({f"{UP}_scale": float32(np.nan)}), "not finite"),
        (SCALARS, lambda t: t.update({f"{UP}_scale": ("I8", np.ones(1, "i1"))}), "is I8"),
        (BLOCKS, lambda t: t.update({f"{UP}_scale_inv": float32(1)}), "each block of 128 x 128"),
        (BLOCKS, lambda t: t.update({UP: t[f"{UP}_scale_inv"]}), "has shape"),
        (
            SCALARS,
            lambda t: t.update({"mtp.fc.weight_scale": float32(1)}),
            "mtp.fc.weight_scale is the scale of an FP8 weight, but mtp.fc.weight is BF16",
        ),
        (
            SCALARS,
            lambda t: t.update({"mtp.extra.weight_scale": float32(1)}),
            "mtp.extra.weight_scale is the scale of an FP8 weight, but its weight is missing",
        ),
        (
            SCALARS,
            lambda t: t.update({"mtp.fc.pre_quant_scale": float32(1)}),
            "does not use 1 tensors of the checkpoint (mtp.fc.pre_quant_scale)",
        ),
    ],
)
def test_a_scale_that_is_missing_wrong_or_left_over_is_refused(
    tmp_path: Path, layout: str, change: Callable[[Tensors], object], named: str
) -> None:
    assert named in refusal(changed(layout, tmp_path, change))


def test_scales_of_activations_are_skipped_with_a_word(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = write_layout("dense-fp8-static", tmp_path)
    native.convert(checkpoint, tmp_path / "out.gguf", tokenizer_pre="qwen35")
    said = capsys.readouterr().err
    assert "buffers, which are not weights" in said and "_proj.activation_scale" in said


@pytest.mark.parametrize(
    "name", ["q_scale", "kv_scale", "k_proj.output_scale", "k_proj.k_scale", "v_proj.v_scale"]
)
def test_scales_of_the_cache_are_skipped_under_each_of_their_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    scale = f"mtp.layers.0.self_attn.{name}"
    checkpoint = changed(ROWS, tmp_path, lambda t: t.update({scale: float32(1)}))
    native.convert(checkpoint, tmp_path / "out.gguf", tokenizer_pre="qwen35")
    assert scale in capsys.readouterr().err


def test_blocks_without_their_size_are_named_as_such(tmp_path: Path) -> None:
    """A fine-tune's config.json can lack the settings of the quantization."""
    checkpoint = changed(BLOCKS, tmp_path, lambda t: None)
    config = json.loads((checkpoint / "config.json").read_text())
    del config["quantization_config"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert "config.json names no block size" in refusal(checkpoint)


def test_a_weight_that_is_nan_is_refused(tmp_path: Path) -> None:
    def damage(tensors: Tensors) -> None:
        codes = tensors[GATE][1].copy()
        codes[3, 5] = 0xFF
        tensors[GATE] = ("F8_E4M3", codes)

    for layout in (SCALARS, BLOCKS):
        assert "NaN" in refusal(changed(layout, tmp_path / layout, damage))


@pytest.mark.parametrize(
    ("groups", "named"),
    [
        ([[128, 128], [64, 64]], "several block sizes"),
        ([[128, 0]], "two positive integers"),
        (["128x128"], "two positive integers"),
    ],
)
def test_a_malformed_block_size_is_refused(groups: list[object], named: str) -> None:
    weights = [{"weights": {"strategy": "block", "block_structure": size}} for size in groups]
    config = {"quantization_config": {"config_groups": dict(enumerate(weights))}}
    with pytest.raises(CheckpointError, match=named):
        fp8.block_size(config)


def test_the_scale_of_a_channel_group_is_no_block_size() -> None:
    group = {"weights": {"strategy": "channel", "block_structure": None}}
    assert fp8.block_size({"quantization_config": {"config_groups": {"group_0": group}}}) is None
    blocks = {"weights": {"strategy": "block", "block_structure": [128, 64]}}
    config = {"quantization_config": {"config_groups": {"group_0": blocks}}}
    assert fp8.block_size(config) == (128, 64)


@pytest.mark.parametrize(
    ("shape", "scales", "block"),
    [
        ((5, 7), (), None),
        ((5, 7), (1,), None),
        ((5, 7), (5,), None),
        ((5, 7), (5, 1), None),
        ((3, 5, 7), (3,), None),
        ((3, 5, 7), (3, 5, 1), None),
        ((3, 5, 7), (3, 1, 1), None),
        ((5, 7), (3, 2), (2, 4)),
        ((3, 5, 7), (3, 3, 2), (2, 4)),
    ],
)
def test_every_value_meets_the_scale_of_its_place(
    shape: tuple[int, ...], scales: tuple[int, ...], block: fp8.Block
) -> None:
    numbers = np.arange(1, np.prod(scales, dtype=int) + 1, dtype=np.float32).reshape(scales)
    codes = np.full(shape, 0x38, np.uint8)  # 1.0
    found = fp8.dequantize(codes, numbers, block)
    for place in np.ndindex(*shape):
        sizes = (1,) * (len(shape) - 2) + (block or (1, 1))
        at = [i // size for i, size in zip(place, sizes, strict=True)][: len(scales)]
        at = [i if count > 1 else 0 for i, count in zip(at, scales, strict=True)]
        assert found[place] == numbers[tuple(at)]


def test_powers_of_two_as_scales_are_exact() -> None:
    codes = np.array([0, 1, 127, 254], np.uint8)
    powers = values.decode(codes, "F8_E8M0")
    assert powers.dtype == np.float32
    assert powers.tolist() == [2.0**-127, 2.0**-126, 1.0, 2.0**127]
    assert np.isnan(values.decode(np.array([255], np.uint8), "F8_E8M0")).all()


@pytest.mark.parametrize("layout", ["dense-fp8", "dense-fp8-rows", "moe-fp8-experts"])
def test_any_number_of_threads_and_any_slices_give_the_rounded_products(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint(write_layout(layout, tmp_path))
    family, hparams = family_of(checkpoint.architecture), Hparams(checkpoint.config)
    planned = plan_conversion(checkpoint, family, hparams=hparams, part="all")
    for item in [item for item in planned if item.scales]:
        plain = [
            values.encode(part, GGMLQuantizationType.BF16)
            for part in values.values(checkpoint, item)
        ]
        for threads, most, job in ((1, 1 << 17, 1 << 20), (3, 1 << 10, 1 << 12), (2, 300, 400)):
            monkeypatch.setattr(values, "SLICE", most)
            monkeypatch.setattr(values, "JOB", job)
            made = values.payload(checkpoint, item, threads)
            assert b"".join(map(bytes, made)) == b"".join(plain), item.row.name  # type: ignore[arg-type]


def test_an_expert_may_have_another_type_than_the_others(tmp_path: Path) -> None:
    """Values that FP8 and F32 store alike give the same bytes."""
    embedded, layout, _ = LAYOUTS["moe-fp8"]
    config = json.loads((CHECKPOINTS / embedded / "config.json").read_text())
    tensors = layout(config, read_tensors(CHECKPOINTS / embedded))
    folder = write_checkpoint(tmp_path / "fp8", CHECKPOINTS / embedded, config, tensors)
    name = next(name for name in tensors if name.endswith("layers.1.mlp.experts.1.up_proj.weight"))
    _, scale = tensors.pop(f"{name}_scale_inv")
    numbers = fp8.dequantize(tensors[name][1], scale.astype("<f4"), (128, 128))
    tensors[name] = ("F32", numbers.astype("<f4"))
    mixed = write_checkpoint(tmp_path / "mixed", CHECKPOINTS / embedded, config, tensors)
    made = []
    for source, out in ((folder, tmp_path / "fp8.gguf"), (mixed, tmp_path / "mixed.gguf")):
        native.convert(source, out, "all", "qwen35")
        opened = reader.read(out)
        made.append({name: sha256(piece) for name, piece in opened.ranges.items()})
    assert made[0] == made[1]
