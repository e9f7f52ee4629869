"""Checks before upstream's converter starts, and the files that it sees."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CHECKPOINTS, ROOT
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from layouts import (
    Layout,
    eight_bit,
    eight_bit_rows,
    eight_bit_whole,
    read_tensors,
    write_checkpoint,
)
from mtpforge.checkpoint import fp8
from mtpforge.checkpoint.checkpoint import Checkpoint
from mtpforge.checkpoint.families.registry import FAMILIES
from mtpforge.checkpoint.hparams import Hparams
from mtpforge.checkpoint.model_files import INDEX
from mtpforge.convert import convertible, upstream
from mtpforge.errors import CheckpointError, GgufError
from mtpforge.gguf import quant_types, reader, writer
from mtpforge.gguf.head import quantizable
from mtpforge.gguf.metadata import Value
from mtpforge.gguf.reader import Gguf, TensorInfo
from mtpforge.inject import inject
from mtpforge.io.ranges import Payload
from mtpforge.llama_cpp import converter_architectures, pre_tokenizers
from mtpforge.quantize import recipe
from other_architectures import MODELS, write_model

Fails = Callable[..., str]


def refusal(checkpoint: Path, part: str = "all") -> str:
    with pytest.raises(CheckpointError) as caught:
        upstream.check(Checkpoint(checkpoint), part)
    return str(caught.value)


def test_upstreams_architectures_are_none_of_ours() -> None:
    ours = {name for family in FAMILIES for name in family.huggingface_architectures}
    assert not ours & converter_architectures.ARCHITECTURES.keys()


def test_an_unsupported_architecture_is_refused_with_the_supported_ones(
    fails: Fails, tmp_path: Path
) -> None:
    checkpoint = write_model("glm", tmp_path / "glm", architectures=["KimiLinearForCausalLM"])
    message = fails(
        "convert_upstream.py", checkpoint, "--converter", "/nonexistent", out=tmp_path / "out.gguf"
    )
    assert "KimiLinearForCausalLM" in message and all(
        name in message for name in converter_architectures.ARCHITECTURES
    )


def test_a_missing_converter_error_names_make_converter(fails: Fails, tmp_path: Path) -> None:
    checkpoint = write_model("glm", tmp_path / "glm")
    assert "make converter" in fails(
        "convert_upstream.py", checkpoint, "--converter", "/nonexistent", out=tmp_path / "out.gguf"
    )


@pytest.mark.parametrize("name", MODELS)
def test_a_head_as_declared_is_accepted(tmp_path: Path, name: str) -> None:
    upstream.check(Checkpoint(write_model(name, tmp_path / name)), "all")


def test_the_layers_of_nemotron_may_be_given_by_their_kinds(tmp_path: Path) -> None:
    """As in Nemotron-3 Ultra, which has `layers_block_type` instead of `num_hidden_layers`."""
    kinds = ["mamba", "attention", "moe"]
    change = {"num_hidden_layers": None, "hybrid_override_pattern": None}
    checkpoint = Checkpoint(
        write_model("nemotron", tmp_path / "nemotron", **change, layers_block_type=kinds)
    )
    upstream.check(checkpoint, "all")
    assert Hparams(checkpoint.config).count("num_hidden_layers") == 3
    assert (
        Hparams({"layers_block_type": kinds, "num_hidden_layers": 5}).count("num_hidden_layers")
        == 5
    )
    with pytest.raises(CheckpointError, match="num_hidden_layers"):
        Hparams({"layers_block_type": []}).count("num_hidden_layers")


CONTRADICTIONS: list[tuple[str, dict[str, Any], str]] = [
    (
        "glm",
        {"num_nextn_predict_layers": 0},
        "(num_nextn_predict_layers in config.json): set it to 1",
    ),
    ("glm", {"num_nextn_predict_layers": None}, "but 0 blocks are declared"),
    ("glm", {"num_nextn_predict_layers": "1"}, "but '1' blocks are declared"),
    ("glm", {"drop": "layers.2."}, "no tensors of a head (1 blocks are declared)"),
    (
        "step",
        {"drop": "layers.3."},
        "has tensors of 1 head layers, 1 to a block, but 2 blocks are declared",
    ),
    ("nemotron", {"drop": "mtp.layers.1."}, "has tensors of 1 head layers, 2 to a block"),
    ("mimo", {"drop": "mtp.layers.2."}, "but 3 blocks are declared"),
    ("step", {"drop": "layers.3."}, "correct the wrong one, or convert with --part trunk"),
    ("mimo", {"drop": "mtp."}, "no tensors of a head (3 blocks are declared)"),
]


@pytest.mark.parametrize(("name", "change", "named"), CONTRADICTIONS)
def test_tensors_must_match_the_configuration(
    tmp_path: Path, name: str, change: dict[str, Any], named: str
) -> None:
    checkpoint = write_model(name, tmp_path / name, **change)
    assert named in refusal(checkpoint)
    upstream.check(Checkpoint(checkpoint), "trunk")  # needs no head


@pytest.mark.parametrize(
    ("name", "drop"), [("glm", "layers.2."), ("nemotron", "mtp."), ("mimo", "mtp.")]
)
def test_a_stale_index_that_lists_a_lost_head_leaves_the_trunk(
    tmp_path: Path, name: str, drop: str
) -> None:
    whole = read_tensors(write_model(name, tmp_path / "whole"))
    checkpoint = write_model(name, tmp_path / name, drop=drop)
    index = json.loads((checkpoint / INDEX).read_text())
    last = max(index["weight_map"].values())
    index["weight_map"] = dict.fromkeys(whole, last) | index["weight_map"]
    (checkpoint / INDEX).write_text(json.dumps(index))
    assert "the head is lost, the index is stale" in refusal(checkpoint)
    upstream.check(Checkpoint(checkpoint), "trunk")


def test_wrapped_and_empty_tensors_are_refused(tmp_path: Path) -> None:
    checkpoint = write_model("glm", tmp_path / "glm")
    config, tensors = json.loads((checkpoint / "config.json").read_text()), read_tensors(checkpoint)
    wrapped = {f"module.{name}": tensor for name, tensor in tensors.items()}
    doubled = {name.replace("model.", "model.model."): tensor for name, tensor in tensors.items()}
    empty = {**tensors, "model.norm.weight": ("BF16", np.zeros(0, "<u2"))}
    for label, named, changed in (
        ("a", "`module.`", wrapped),
        ("b", "ZeRO-3", empty),
        ("c", "`model.`", doubled),
    ):
        source = CHECKPOINTS / "tiny-qwen3.5"
        assert named in refusal(write_checkpoint(tmp_path / label, source, config, changed))


def test_parts_that_upstream_cannot_write_are_refused(tmp_path: Path) -> None:
    bailing = write_model("bailing", tmp_path / "bailing")
    assert "only the whole" in refusal(bailing, "trunk") and "only the whole" in refusal(
        bailing, "draft"
    )
    assert "a vision tower" in refusal(bailing, "mmproj")
    assert "no preprocessor_config.json" in refusal(CHECKPOINTS / "tiny-qwen3.5", "mmproj")


def test_a_head_with_unsupported_types_is_refused(tmp_path: Path) -> None:
    tensors, config = (
        read_tensors(write_model("glm", tmp_path / "glm")),
        json.loads((tmp_path / "glm/config.json").read_text()),
    )
    key = "model.layers.2.eh_proj.weight"
    tensors[key] = ("U8", tensors[key][1].astype("u1"))
    packed = write_checkpoint(tmp_path / "packed", CHECKPOINTS / "tiny-qwen3.5", config, tensors)
    assert f"{key} is U8" in refusal(packed)
    tensors[key] = ("F8_E4M3", tensors[key][1])
    config["quantization_config"] = {"weight_block_size": [128, 128]}
    unscaled = write_checkpoint(
        tmp_path / "unscaled", CHECKPOINTS / "tiny-qwen3.5", config, tensors
    )
    assert f"{key} is FP8 and {key}_scale_inv is missing" in refusal(unscaled)


def test_a_file_that_upstream_has_not_written_whole_is_no_damaged_one(tmp_path: Path) -> None:
    """Python ignores an error of the last write, which happens when it closes the file."""
    for name in ("environment/bin/python", f"source/{upstream.PROGRAM}"):
        (tmp_path / name).parent.mkdir(parents=True)
    python = tmp_path / "environment/bin/python"
    python.write_text('#!/bin/sh\nwhile [ $# -gt 1 ]; do shift; done\nprintf GGUF > "$1"\n')
    python.chmod(0o755)
    (tmp_path / "source" / upstream.PROGRAM).touch()
    checkpoint = Checkpoint(write_model("glm", tmp_path / "glm"))
    with pytest.raises(GgufError, match=r"x\.gguf: not written whole: needs .* are free"):
        upstream.convert_upstream(checkpoint, tmp_path / "x.gguf", tmp_path)
    assert [*tmp_path.glob("*x.gguf*")] == []


def test_upstream_sees_weights_but_no_code(tmp_path: Path) -> None:
    checkpoint = write_model("glm", tmp_path / "glm")
    for name in (
        "modeling_glm.py",
        "pytorch_model.bin",
        "state.pt",
        "data.pkl",
        "model.safetensors.index.json.py",
    ):
        (checkpoint / name).write_text("raise SystemExit")
    config = json.loads((checkpoint / "config.json").read_text())
    added = {
        "auto_map": {"a": "b.c"},
        "x": [{"auto_map": ["b.c", None], "kept": 2}],
        "vocabulary": {"auto_map": 7},
    }
    added |= {
        "tokenizer_file": "/elsewhere/tokenizer.json",
        "vocab_file": "../vocab.json",
        "from_slow": True,
    }
    (checkpoint / "config.json").write_text(json.dumps({**config, **added}))
    folder = upstream.without_code(Checkpoint(checkpoint), tmp_path / "scratch")
    assert folder.name == "glm"
    allowed = (".json", ".safetensors", ".md", ".txt", ".jinja", ".model")
    assert all(path.suffix in allowed for path in folder.iterdir())
    seen = json.loads((folder / "config.json").read_text())
    assert seen == {**config, "x": [{"kept": 2}], "vocabulary": {"auto_map": 7}}
    for shard in folder.glob("*.safetensors"):
        assert shard.is_symlink() and shard.samefile(checkpoint / shard.name)


@pytest.mark.parametrize("name", ["README.md", "tokenizer_config.json"])
def test_only_regular_files_are_copied(tmp_path: Path, name: str) -> None:
    checkpoint = write_model("glm", tmp_path / "glm")
    (checkpoint / name).unlink()
    os.mkfifo(checkpoint / name)
    with pytest.raises(CheckpointError, match="regular file"):
        upstream.without_code(Checkpoint(checkpoint), tmp_path / "scratch")


@pytest.mark.parametrize("depth", [950, 100_000])
def test_deep_nesting_is_refused(tmp_path: Path, depth: int) -> None:
    checkpoint = write_model("glm", tmp_path / "glm")
    (checkpoint / "added_tokens.json").write_text('{"a": ' + "[" * depth + "]" * depth + "}")
    with pytest.raises(CheckpointError, match=r"added_tokens\.json: (is nested|not valid JSON)"):
        upstream.without_code(Checkpoint(checkpoint), tmp_path / "scratch")


def test_no_secret_reaches_upstream(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "PYTHONPATH", "PYTHONSTARTUP", "https_proxy"):
        monkeypatch.setenv(name, "secret")
    environment = upstream._environment(tmp_path)
    assert "secret" not in environment.values() and environment["HF_HUB_OFFLINE"] == "1"
    assert environment["HOME"] == str(tmp_path)


def head_of(path: Path, architecture: str, blocks: int, heads: int, *names: str) -> Gguf:
    """A GGUF with `blocks` blocks; the last `heads` of them have tensors with these names."""
    metadata = {
        "general.architecture": Value.of(architecture, GGUFValueType.STRING),
        f"{architecture}.block_count": Value.of(blocks, GGUFValueType.UINT32),
        f"{architecture}.nextn_predict_layers": Value.of(heads, GGUFValueType.UINT32),
    }
    infos = [
        TensorInfo(f"blk.{i}.{name}", (2, 2), GGMLQuantizationType.F32)
        for i in range(blocks - heads, blocks)
        for name in names
    ]
    writer.write(path, metadata, [(info, [memoryview(bytes(16))]) for info in infos])
    return reader.read(path)


def test_why_not_drafting_names_the_reason(tmp_path: Path) -> None:
    def reason(architecture: str, *names: str) -> str | None:
        return converter_architectures.why_not_drafting(
            head_of(tmp_path / "head.gguf", architecture, 5, 3, *names)
        )

    assert reason("qwen35", "attn_q.weight") is None and reason("glm4moe", "attn_q.weight") is None
    assert (
        reason("exaone-moe", "attn_q.weight")
        == "llama.cpp b11434 loads exaone-moe but cannot draft with it"
    )
    assert reason("mimo2", "attn_qkv.weight") is None
    assert "a head that has no attn_qkv.weight" in str(reason("mimo2", "attn_q.weight"))


def test_type_overrides_cover_every_block_of_a_head(tmp_path: Path) -> None:
    several = head_of(tmp_path / "several.gguf", "mimo2", 12, 3, "attn_q.weight")
    assert recipe.plan_overrides(several, "Q4_0", (), ()) == [
        (rf"^blk\.{block}\.attn_q\.weight$", "Q8_0") for block in (9, 10, 11)
    ]
    assert several.head.tensors.keys() == {f"blk.{i}.attn_q.weight" for i in (9, 10, 11)}


def test_injection_extends_lists_for_every_block_of_a_head(tmp_path: Path) -> None:
    def with_windows(path: Path, blocks: int, heads: int, more: tuple[str, ...] = ()) -> Path:
        opened = head_of(path, "mimo2", blocks, heads, "attn_q.weight")
        windows = Value.of(list(range(blocks)), GGUFValueType.ARRAY, GGUFValueType.UINT32)
        tensors: list[tuple[TensorInfo, Payload]] = [
            (info, [opened.ranges[name]]) for name, info in opened.tensors.items()
        ]
        tensors += [
            (TensorInfo(name, (1,), GGMLQuantizationType.F32), [memoryview(bytes(4))])
            for name in more
        ]
        writer.write(
            path.with_suffix(".gguf"), {**opened.metadata, "mimo2.windows": windows}, tensors
        )
        return path.with_suffix(".gguf")

    base, head = (
        with_windows(tmp_path / "base", 2, 0, ("token_embd.weight", "blk.0.x", "blk.1.x")),
        with_windows(tmp_path / "head", 4, 2),
    )
    inject.inject(base, head, tmp_path / "out.gguf")
    made = reader.read(tmp_path / "out.gguf")
    assert (made.get("mimo2.block_count"), made.get("mimo2.nextn_predict_layers")) == (4, 2)
    assert made.get("mimo2.windows") == [0, 1, 2, 3] and list(made.tensors)[3:] == [
        "blk.2.attn_q.weight",
        "blk.3.attn_q.weight",
    ]


@pytest.mark.parametrize("heads", [12, 4_000_000_000])
def test_too_many_head_blocks_are_refused(tmp_path: Path, heads: int) -> None:
    opened = _declaring(tmp_path / "odd.gguf", heads)
    with pytest.raises(GgufError, match=rf"nextn_predict_layers is {heads} in a file of 12 blocks"):
        _ = opened.head_blocks


def _declaring(path: Path, heads: int) -> Gguf:
    opened = head_of(path, "mimo2", 12, 1, "attn_q.weight")
    metadata = {
        **opened.metadata,
        "mimo2.nextn_predict_layers": Value.of(heads, GGUFValueType.UINT32),
    }
    return Gguf(opened.path, metadata, opened.tensors, opened.ranges)


def test_latent_attention_is_split_by_head() -> None:
    hparams = Hparams({"num_attention_heads": 2, "qk_nope_head_dim": 3, "v_head_dim": 1})
    values = np.arange(2 * 4 * 5, dtype=np.float32).reshape(8, 5)
    k, v = converter_architectures.split_kv_b(values, hparams)
    assert k.shape == (2, 5, 3) and v.shape == (2, 1, 5)
    assert k[1, 4].tolist() == values[4:7, 4].tolist() and v[1].tolist() == values[7:8].tolist()
    with pytest.raises(CheckpointError, match="kv_b_proj has 7 rows"):
        converter_architectures.split_kv_b(values[:7], hparams)


# ── the tables of the pinned llama.cpp ──

TABLES = json.loads((ROOT / "tests" / "golden" / "upstream.json").read_text())

NOT_CONVERTED = {
    "BailingMoeV3VLForConditionalGeneration": "no checkpoint with a head is known",
    "Dots3NoteForCausalLM": "no checkpoint with a head is known",
    "Dots3NoteForConditionalGeneration": "no checkpoint with a head is known",
    "Dots3NoteTextForCausalLM": "no checkpoint with a head is known",
    "Glm4vMoeForConditionalGeneration": "llama-server aborts: multimodal rotation in the head",
    "MiniCPMV4_6ForConditionalGeneration": "no checkpoint with a head is known",
}
"""Architectures whose head upstream exports and we do not convert, with the reason."""


def test_every_head_that_upstream_exports_is_known() -> None:
    exported = {
        name: gguf
        for name, (gguf, exports) in TABLES["converters"].items()
        if exports == "exports a head"
    }
    ours = {
        name: family.gguf_architecture
        for family in FAMILIES
        for name in family.huggingface_architectures
    }
    ours |= {name: entry.gguf for name, entry in converter_architectures.ARCHITECTURES.items()}
    missing = exported.keys() - ours.keys() - NOT_CONVERTED.keys()
    assert not missing and not ours.keys() & NOT_CONVERTED.keys()
    assert {name: ours[name] for name in exported.keys() & ours.keys()} == {
        name: exported[name] for name in exported.keys() & ours.keys()
    }


def test_the_pre_tokenizers_are_those_of_upstream() -> None:
    """Its converter names most of those that llama.cpp loads, and some of other vocabularies."""
    of_other_vocabularies = {"bert-bge", "bert-bge-large", "jina-v2-en"}
    named = set(TABLES["pre_tokenizers"]["converter"]) - of_other_vocabularies
    unnamed = {
        "default", "glm5", "jina-de", "jina-es", "llada-moe", "llama-v3", "llama3", "whitespace",
    }  # fmt: skip
    assert named | unnamed == pre_tokenizers.NAMES and len(named) > 80


def test_an_unknown_pre_tokenizer_is_refused_before_any_conversion(
    fails: Fails, tmp_path: Path
) -> None:
    """llama.cpp cannot load a file that names one."""
    for program, checkpoint, more in (
        ("convert.py", CHECKPOINTS / "tiny-qwen3.5", ()),
        ("convert_upstream.py", write_model("glm", tmp_path / "glm"), ("--converter", tmp_path)),
    ):
        out = tmp_path / "out.gguf"
        message = fails(program, checkpoint, "--tokenizer-pre", "Qwen3.5", *more, out=out)
        assert "'Qwen3.5' is not one of llama.cpp's names" in message
        assert "did you mean qwen35?" in message


def test_the_parts_that_upstream_can_write_are_those_of_its_tables() -> None:
    """Nemotron's class is that of its dense models; it takes another architecture with experts."""
    for name, entry in converter_architectures.ARCHITECTURES.items():
        if name == "NemotronHForCausalLM" or entry.only == "trunk":  # the tables have heads only
            continue
        exports = "exports a head" if entry.splits else "exports no head alone"
        assert TABLES["converters"][name] == [entry.gguf, exports]


def test_a_sidecar_that_cannot_draft_is_refused(tmp_path: Path) -> None:
    checkpoint = write_model("glm-next", tmp_path / "glm-next")
    for part in ("all", "trunk"):
        upstream.check(Checkpoint(checkpoint), part)
    said = refusal(checkpoint, "draft")
    assert "b11434 cannot draft with its head" in said and "remove `sidecar`" in said
    about = convertible.undrafted(Checkpoint(checkpoint))
    assert about == ", with which llama.cpp b11434 cannot draft yet"
    assert convertible.undrafted(Checkpoint(write_model("glm", tmp_path / "glm"))) == ""


def test_small_matrices_stay_as_converted() -> None:
    """llama-quantize knows GLM-5 Next's by architecture, and convolutions by part of a name."""

    def changes(name: str, architecture: str = "glm5-next") -> bool:
        info = TensorInfo(f"blk.0.{name}.weight", (64, 64), GGMLQuantizationType.BF16)
        return quantizable(info, architecture)

    for name in ("attn_k_b", "ssm_f_a", "hc_attn_fn", "indexer.attn_q_b", "ssm_beta"):
        assert not changes(name) and changes(name, "deepseek2")
    assert changes("attn_q_b") and changes("ffn_down")
    assert not changes("ssm_conv1d_q") and not changes("ssm_conv1d", "qwen35")


def test_our_types_are_upstreams() -> None:
    """Numbers, blocks and sizes; ours come from the gguf package."""
    ours = {t.name: [t.value, *GGML_QUANT_SIZES[t]] for t in GGMLQuantizationType}
    assert set(quant_types.TENSOR_TYPES) <= TABLES["tensor_types"].keys()
    for name in quant_types.TENSOR_TYPES:
        assert ours[name] == TABLES["tensor_types"][name]
    known = {name.partition("_")[2]: number for name, number in TABLES["file_types"].items()}
    for name, number in quant_types.FILE_TYPES.items():
        assert known[name] == number


@pytest.mark.parametrize("layout", [eight_bit, eight_bit_rows, eight_bit_whole])
def test_an_fp8_weight_of_the_trunk_without_its_scale_is_refused(
    tmp_path: Path, layout: Layout
) -> None:
    """Upstream would take the codes for values."""
    plain = write_model("glm", tmp_path / "glm")
    config = json.loads((plain / "config.json").read_text())
    tensors = layout(config, read_tensors(plain))
    upstream.check(Checkpoint(write_checkpoint(tmp_path / "whole", plain, config, tensors)), "all")
    key = next(name for name in tensors if name.endswith(fp8.SUFFIXES))
    assert key.startswith("model.layers.0.")
    del tensors[key]
    for part in ("all", "trunk"):
        unscaled = write_checkpoint(tmp_path / part, plain, config, tensors)
        assert "is FP8 and" in refusal(unscaled, part)
