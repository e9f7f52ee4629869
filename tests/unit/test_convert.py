"""Conversion gives the same bytes as llama.cpp's converter, for every supported layout.

Upstream's convert_hf_to_gguf.py made the digests under tests/golden; `make check-golden` compares
them with it again.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CHECKPOINTS, ROOT
from gguf.constants import GGMLQuantizationType
from layouts import (
    ALL,
    eight_bit,
    qwen4_exp,
    read_tensors,
    write_checkpoint,
    write_layout,
    write_shard,
)
from mtpforge.checkpoint.checkpoint import Checkpoint, Outline
from mtpforge.convert import native, tokenizer
from mtpforge.convert.values import decode, encode
from mtpforge.errors import CheckpointError
from mtpforge.gguf import reader

sys.path.append(str(ROOT / "tests" / "golden"))
from digest import differences, digest


@pytest.mark.parametrize("name", ALL)
def test_conversion_equals_upstream(name: str, tmp_path: Path) -> None:
    golden = json.loads((ROOT / "tests" / "golden" / f"{name}.json").read_text())
    checkpoint, parts = write_layout(name, tmp_path), {}
    for part in golden["parts"]:
        native.convert(checkpoint, tmp_path / f"{part}.gguf", part, "qwen35")
        parts[part] = digest(tmp_path / f"{part}.gguf")
    assert parts.keys() == {"all", "trunk", "draft"}
    assert differences(golden, {"upstream": golden["upstream"], "parts": parts}) == []


TABLE = "model.language_model.layers.0.ple.ple_embedding."


@pytest.mark.parametrize(
    "array",
    [
        ("F32", np.ones(3, "<f4")),
        ("I64", np.ones((1, 3), "<i8")),
        ("I64", np.array([1, -1, 1], "<i8")),
        ("I64", np.ones(65, "<i8")),
        ("I64", np.ones(0, "<i8")),
    ],
)
def test_malformed_constants_are_refused(tmp_path: Path, array: tuple[str, np.ndarray]) -> None:
    config, tensors = qwen4_exp()
    tensors[f"{TABLE}layer_multipliers"] = array
    folder = write_checkpoint(tmp_path / "copy", CHECKPOINTS / "tiny-qwen3.5", config, tensors)
    assert "layer_multipliers" in refusal(folder)


def test_fp8_matrices_are_not_joined(tmp_path: Path) -> None:
    """Their scales would be those of other columns."""
    config, tensors = qwen4_exp()
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    for name in ("mtp.fc_embedding.weight", "mtp.fc_hidden.weight"):
        tensors[name] = ("F8_E4M3", np.full((128, 128), 56, np.uint8))
        tensors[f"{name}_scale_inv"] = ("F32", np.ones((1, 1), "<f4"))
    folder = write_checkpoint(tmp_path / "copy", CHECKPOINTS / "tiny-qwen3.5", config, tensors)
    assert "only BF16, F16 and F32 can be joined to blk.2.nextn.eh_proj" in refusal(folder)


@pytest.mark.parametrize("name", ["tiny-qwen3.5", "moe-fused-head"])
def test_the_head_alone_equals_the_head_of_the_whole(name: str, tmp_path: Path) -> None:
    checkpoint = write_layout(name, tmp_path)
    for part in ("all", "head"):
        native.convert(checkpoint, tmp_path / f"{part}.gguf", part, "qwen35")
    whole, head = (digest(tmp_path / f"{part}.gguf") for part in ("all", "head"))
    block = (
        reader.read(tmp_path / "all.gguf").get(
            f"{'qwen35moe' if 'moe' in name else 'qwen35'}.block_count"
        )
        - 1
    )
    assert head["tensors"] == {
        n: t for n, t in whole["tensors"].items() if n.startswith(f"blk.{block}.")
    }
    assert not any(key.startswith("tokenizer.") for key in head["metadata"])


def changed(
    tmp_path: Path, *, drop: str = "", config: dict[str, Any] | None = None, name: str = "copy"
) -> Path:
    """The dense checkpoint with `config` changed, without tensors whose names begin with `drop`."""
    source = CHECKPOINTS / "tiny-qwen3.5"
    settings = json.loads((source / "config.json").read_text())
    settings["text_config"] |= config or {}
    tensors = {n: t for n, t in read_tensors(source).items() if not (drop and n.startswith(drop))}
    return write_checkpoint(tmp_path / name, source, settings, tensors)


def refusal(checkpoint: Path, part: str = "all", pre: str | None = "qwen35") -> str:
    out = checkpoint.parent / "out.gguf"
    with pytest.raises(CheckpointError) as caught:
        native.convert(checkpoint, out, part, pre)
    assert not out.exists()
    return str(caught.value)


@pytest.mark.parametrize("dtype", ["U32", "I32", "U8", "F8_E8M0", "F8_E5M2"])
def test_the_head_converts_beside_a_trunk_of_any_type(tmp_path: Path, dtype: str) -> None:
    """Only the head is needed for an injection, and other quantizers leave it alone."""
    source = CHECKPOINTS / "tiny-qwen3.5"
    tensors = {
        name: (dtype, np.zeros((8, 8), {"U32": "<u4", "I32": "<i4"}.get(dtype, "u1")))
        if name.endswith("_proj.weight") and not name.startswith("mtp.")
        else tensor
        for name, tensor in read_tensors(source).items()
    }
    config = json.loads((source / "config.json").read_text())
    folder = write_checkpoint(tmp_path / source.name, source, config, tensors)
    native.convert(folder, tmp_path / "head.gguf", "head")
    native.convert(source, tmp_path / "expected.gguf", "head")
    found, expected = (
        reader.hashes(reader.read(tmp_path / name).ranges)
        for name in ("head.gguf", "expected.gguf")
    )
    assert found == expected
    with pytest.raises(CheckpointError, match=rf"is {dtype}: only BF16, F16, F32 and FP8"):
        native.convert(folder, tmp_path / "all.gguf", "all", "qwen35")


def test_a_separate_head_file_is_found_beside_an_index_without_it(tmp_path: Path) -> None:
    source = CHECKPOINTS / "tiny-qwen3.5"
    settings, tensors = json.loads((source / "config.json").read_text()), read_tensors(source)
    head = {name: tensor for name, tensor in tensors.items() if name.startswith("mtp.")}
    trunk = {name: tensor for name, tensor in tensors.items() if name not in head}
    checkpoint = write_checkpoint(tmp_path / "tiny-qwen3.5", source, settings, trunk, shards=2)
    write_shard(checkpoint / "mtp.safetensors", head)
    for folder in (source, checkpoint):
        native.convert(folder, tmp_path / f"{folder.parent.name}.gguf", "all", "qwen35")
    one, other = (digest(tmp_path / f"{name}.gguf") for name in (source.parent.name, tmp_path.name))
    assert one["metadata"] == other["metadata"] and one["tensors"] == other["tensors"]


def test_a_head_in_two_files_is_refused(tmp_path: Path) -> None:
    source = CHECKPOINTS / "tiny-qwen3.5"
    tensors = read_tensors(source)
    settings = json.loads((source / "config.json").read_text())
    checkpoint = write_checkpoint(tmp_path / "copy", source, settings, tensors, shards=2)
    write_shard(checkpoint / "mtp.safetensors", {"mtp.fc.weight": tensors["mtp.fc.weight"]})
    assert "mtp.fc.weight is in model-" in refusal(checkpoint)


def test_an_fp8_weight_without_its_scale_is_refused(tmp_path: Path) -> None:
    config, tensors = (
        json.loads((CHECKPOINTS / "tiny-qwen3.5" / "config.json").read_text()),
        read_tensors(CHECKPOINTS / "tiny-qwen3.5"),
    )
    quantized = eight_bit(config, tensors)
    del quantized["mtp.layers.0.mlp.up_proj.weight_scale_inv"]
    checkpoint = write_checkpoint(
        tmp_path / "copy", CHECKPOINTS / "tiny-qwen3.5", config, quantized
    )
    assert "mtp.layers.0.mlp.up_proj.weight is FP8" in refusal(checkpoint)


def test_without_its_head_only_the_trunk_converts(tmp_path: Path) -> None:
    checkpoint = changed(tmp_path, drop="mtp.")
    assert "lost its head" in refusal(checkpoint) and "head: none" in refusal(checkpoint)
    native.convert(checkpoint, tmp_path / "trunk.gguf", "trunk", "qwen35")
    assert reader.read(tmp_path / "trunk.gguf").get("qwen35.nextn_predict_layers") is None


@pytest.mark.parametrize("declared", [0, None])
def test_a_head_that_config_json_does_not_declare_is_converted(
    tmp_path: Path, declared: int | None
) -> None:
    checkpoint = changed(tmp_path, config={"mtp_num_hidden_layers": declared}, name="tiny-qwen3.5")
    for folder, name in ((checkpoint, "silent"), (CHECKPOINTS / "tiny-qwen3.5", "declared")):
        native.convert(folder, tmp_path / f"{name}.gguf", "all", "qwen35")
    assert digest(tmp_path / "silent.gguf") == digest(tmp_path / "declared.gguf")


@pytest.mark.parametrize("declared", [2, -1, "1", float("inf")])
def test_another_number_of_head_layers_is_refused(tmp_path: Path, declared: Any) -> None:
    checkpoint = changed(tmp_path, config={"mtp_num_hidden_layers": declared})
    assert f"mtp_num_hidden_layers is {declared!r}" in refusal(checkpoint)
    native.convert(checkpoint, tmp_path / "trunk.gguf", "trunk", "qwen35")


def test_a_copy_of_tied_embeddings_is_dropped_and_another_matrix_refused(
    tmp_path: Path,
) -> None:
    """Upstream writes both, which wastes space, or gives another model if they differ."""
    source = CHECKPOINTS / "tiny-qwen3.5"
    settings, tensors = json.loads((source / "config.json").read_text()), read_tensors(source)
    assert settings["text_config"]["tie_word_embeddings"]
    dtype, embeddings = tensors["model.language_model.embed_tokens.weight"]
    copied, changed = (
        write_checkpoint(
            tmp_path / name, source, settings, {**tensors, "lm_head.weight": (dtype, matrix)}
        )
        for name, matrix in (("copied", embeddings), ("changed", embeddings[::-1].copy()))
    )
    native.convert(copied, tmp_path / "copied.gguf", "all", "qwen35")
    assert "output.weight" not in reader.read(tmp_path / "copied.gguf").tensors
    assert "tie_word_embeddings" in refusal(changed)


@pytest.mark.parametrize("kind", ["F32", "F16"])
def test_a_copy_of_tied_embeddings_may_have_another_type(tmp_path: Path, kind: str) -> None:
    source = CHECKPOINTS / "tiny-qwen3.5"
    settings, tensors = json.loads((source / "config.json").read_text()), read_tensors(source)
    dtype, stored = tensors["model.language_model.embed_tokens.weight"]
    values = np.clip(np.rint(decode(stored, dtype) * 1024), -128, 128) / 1024  # exact in all types
    bits = np.frombuffer(encode(values, GGMLQuantizationType.BF16), "<u2").reshape(stored.shape)
    tensors["model.language_model.embed_tokens.weight"] = ("BF16", bits)
    copy = values.astype("<f4" if kind == "F32" else "<f2")
    last = copy.copy()
    last[-1, -1] += 1
    paths = [
        write_checkpoint(
            tmp_path / name, source, settings, {**tensors, "lm_head.weight": (kind, matrix)}
        )
        for name, matrix in (("copied", copy), ("changed", last))
    ]
    native.convert(paths[0], tmp_path / "copied.gguf", "all", "qwen35")
    assert "output.weight" not in reader.read(tmp_path / "copied.gguf").tensors
    assert "differs from the embeddings" in refusal(paths[1])
    found = Checkpoint(paths[1])
    outline = Outline(found.directory, found.config, found.tensors)  # as of a repository
    output = found.tensors["lm_head.weight"]
    embeddings = found.tensors["model.language_model.embed_tokens.weight"]
    assert outline.same(output, embeddings) and not found.same(output, embeddings)
    assert not outline.same(replace(output, dtype="F8_E4M3"), embeddings)


def test_words_for_numbers_are_read_in_keys_that_conversion_does_not_use(tmp_path: Path) -> None:
    """NVIDIA writes `"time_step_limit": [0.0, Infinity]`."""
    odd = {"time_step_limit": [0.0, float("inf")], "x": {"y": float("nan")}, "z": -float("inf")}
    checkpoint = changed(tmp_path, config=odd, name="tiny-qwen3.5")
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    settings["model_max_length"] = float("inf")
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(settings))
    for folder, name in ((checkpoint, "odd"), (CHECKPOINTS / "tiny-qwen3.5", "plain")):
        native.convert(folder, tmp_path / f"{name}.gguf", "all", "qwen35")
    assert digest(tmp_path / "odd.gguf") == digest(tmp_path / "plain.gguf")


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("key", ["rms_norm_eps", "vocab_size", "num_hidden_layers", "layer_types"])
def test_words_for_numbers_are_refused_in_keys_that_conversion_uses(
    tmp_path: Path, key: str, value: float
) -> None:
    assert key in refusal(changed(tmp_path, config={key: value}))


def test_an_infinite_sampling_default_is_refused(tmp_path: Path) -> None:
    checkpoint = changed(tmp_path)
    (checkpoint / "generation_config.json").write_text('{"temperature": Infinity}')
    assert "general.sampling.temp: the checkpoint's value does not fit" in refusal(checkpoint)


def test_a_missing_tensor_of_the_head_is_named(tmp_path: Path) -> None:
    assert "mtp.pre_fc_norm_hidden.weight" in refusal(
        changed(tmp_path, drop="mtp.pre_fc_norm_hidden")
    )


def test_a_wrong_shape_is_refused_with_the_right_one(tmp_path: Path) -> None:
    message = refusal(changed(tmp_path, config={"intermediate_size": 512}))
    assert "mlp." in message and "512" in message


def test_an_unknown_vocabulary_needs_a_named_pre_tokenizer(tmp_path: Path) -> None:
    assert "tokenizer_pre" in refusal(changed(tmp_path), pre=None)


def test_an_unused_tensor_is_refused(tmp_path: Path) -> None:
    source = CHECKPOINTS / "tiny-qwen3.5"
    tensors = {
        **read_tensors(source),
        "model.language_model.layers.0.mlp.bias": ("F32", np.zeros(4, np.float32)),
    }
    checkpoint = write_checkpoint(
        tmp_path / "copy", source, json.loads((source / "config.json").read_text()), tensors
    )
    assert "mlp.bias" in refusal(checkpoint)


@pytest.mark.parametrize(
    ("part", "name"),
    [
        ("trunk", "model.language_model.layers.0.mlp.bias"),
        ("head", "mtp.layers.0.mlp.bias"),
        ("draft", "mtp.layers.1.input_layernorm.weight"),
    ],
)
def test_an_unused_tensor_of_a_part_is_refused(tmp_path: Path, part: str, name: str) -> None:
    source = CHECKPOINTS / "tiny-qwen3.5"
    tensors = {**read_tensors(source), name: ("F32", np.zeros(4, np.float32))}
    checkpoint = write_checkpoint(
        tmp_path / "copy", source, json.loads((source / "config.json").read_text()), tensors
    )
    assert name in refusal(checkpoint, part)


BEGINS = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": "<|im_start|>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {
        "<|im_start|>": {"id": "<|im_start|>", "ids": [1258], "tokens": ["<|im_start|>"]}
    },
}


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        (
            "normalizer",
            {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]},
            "normalizer of type Lowercase",
        ),
        ("post_processor", BEGINS, "begins with <|im_start|>"),
    ],
)
def test_an_unsupported_tokenizer_is_refused(
    tmp_path: Path, key: str, value: dict[str, Any], named: str
) -> None:
    checkpoint = changed(tmp_path)
    settings = json.loads((checkpoint / "tokenizer.json").read_text())
    (checkpoint / "tokenizer.json").write_text(json.dumps({**settings, key: value}))
    assert named in refusal(checkpoint)


def test_bf16_rounds_to_nearest_even_and_refuses_nan() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, -3.4e38, np.inf, 1e-40], np.float32)
    kind = GGMLQuantizationType.BF16
    rounded = decode(np.frombuffer(encode(values, kind), np.uint16), "BF16")
    np.testing.assert_array_equal(rounded[:3], np.array([1.0, 1.0, 1.015625], np.float32))
    assert np.isinf(rounded[4]) and abs(rounded[5] - 1e-40) < 1e-41
    with pytest.raises(CheckpointError, match="NaN"):
        encode(np.array([np.nan], np.float32), kind)


def test_contiguous_views_have_a_byte_range() -> None:
    checkpoint = Checkpoint(CHECKPOINTS / "tiny-qwen3.5")
    tensor = checkpoint.tensors["model.language_model.embed_tokens.weight"]
    array = checkpoint.array(tensor)
    piece = checkpoint.locate(array[3:5])
    assert (
        piece is not None
        and piece.offset == tensor.offset + 3 * array.strides[0]
        and piece.size == 2 * array.strides[0]
    )
    assert checkpoint.locate(array[3:5].copy()) is None


def test_the_probe_of_pre_tokenizers_is_upstreams() -> None:
    """A single other character, and no checksum would ever match."""
    from hashlib import sha256

    assert (
        sha256(tokenizer.PROBE.encode()).hexdigest()
        == "a36179c1e2b1cfcfbfad1dc779addad2ffc778201e4cf0d538bddeafa2c526da"
    )


def test_tokens_named_beside_tokenizer_json_keep_names_and_types(tmp_path: Path) -> None:
    """Real Qwen3.5 checkpoints name seven tokens only in tokenizer_config.json."""
    native.convert(
        write_layout("dense-added-tokens", tmp_path), tmp_path / "F.gguf", "all", "qwen35"
    )
    opened = reader.read(tmp_path / "F.gguf")
    tokens, types = opened.get("tokenizer.ggml.tokens"), opened.get("tokenizer.ggml.token_type")
    normal, control, user_defined, unused = 1, 3, 4, 5
    assert dict(zip(tokens[1264:1274], types[1264:1274], strict=True)) == {
        "<tool_call>": control, "</tool_call>": user_defined, "<think>": control,
        "</think>": user_defined,
        "<|audio_start|>": control, "<tts_pad>": user_defined, tokens[1270]: user_defined,
        "<brand new>": control,
        "<|audio_pad|>": control, "[PAD1273]": unused,
    }  # fmt: skip
    assert types[0] == normal


@pytest.mark.parametrize(
    "entry", [{"1268": "text"}, {"x": {"content": "a"}}, {"1268": {"content": 5}}, {"1268": {}}, []]
)
def test_malformed_added_tokens_are_refused(tmp_path: Path, entry: Any) -> None:
    checkpoint = changed(tmp_path)
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    (checkpoint / "tokenizer_config.json").write_text(
        json.dumps({**settings, "added_tokens_decoder": entry})
    )
    assert "tokenizer" in refusal(checkpoint)
