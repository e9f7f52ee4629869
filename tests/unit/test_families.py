"""The tensors of a GGUF follow from the configuration alone, and match real models."""

import pytest
from layouts import QWEN4_EXP
from mtpforge.checkpoint.families.registry import family_of
from mtpforge.checkpoint.hparams import Hparams
from mtpforge.errors import CheckpointError

DENSE = {
    "num_hidden_layers": 32, "hidden_size": 2560, "intermediate_size": 9216, "vocab_size": 248320,
    "head_dim": 256,
    "num_attention_heads": 16, "num_key_value_heads": 4, "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4,
    "full_attention_interval": 4,
    "tie_word_embeddings": True,
}  # fmt: skip
EXPERTS = {
    "num_hidden_layers": 40, "hidden_size": 2048, "num_key_value_heads": 2, "num_experts": 256,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
}  # fmt: skip

# Real models: trunk tensors, all tensors, weights of the head (from published configurations).
REAL = {
    "Qwen3.5-0.8B": ({"num_hidden_layers": 24, "hidden_size": 1024, "intermediate_size": 3584,
    "num_attention_heads": 8,
                      "num_key_value_heads": 2, "linear_num_value_heads": 16}, 320, 335,
                      20_452_864),
    "Qwen3.5-2B": ({"num_hidden_layers": 24, "hidden_size": 2048, "intermediate_size": 6144,
    "num_attention_heads": 8,
                    "num_key_value_heads": 2, "linear_num_value_heads": 16}, 320, 335, 60_828_160),
    "Qwen3.5-4B": ({}, 426, 441, 120_599_552),
    "Qwen3.5-9B": ({"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False},
    427, 442, 243_290_624),
    "Qwen3.5-27B": ({"num_hidden_layers": 64, "hidden_size": 5120, "intermediate_size": 17408,
    "num_attention_heads": 24,
                     "linear_num_value_heads": 48, "tie_word_embeddings": False}, 851, 866,
                     424_699_392),
    "Qwen3.5-35B-A3B": (EXPERTS, 733, 753, 844_640_768),
    "Qwen3.5-122B-A10B": ({**EXPERTS, "num_hidden_layers": 48, "hidden_size": 3072,
    "num_attention_heads": 32,
                           "linear_num_value_heads": 64, "moe_intermediate_size": 1024,
                           "shared_expert_intermediate_size": 1024}, 879, 899, 2_523_679_232),
    "Qwen3.5-397B-A17B": ({**EXPERTS, "num_hidden_layers": 60, "hidden_size": 4096,
    "num_attention_heads": 32,
                           "linear_num_value_heads": 64, "num_experts": 512,
                           "moe_intermediate_size": 1024,
                           "shared_expert_intermediate_size": 1024}, 1098, 1118, 6_595_568_128),
}  # fmt: skip


@pytest.mark.parametrize("name", REAL)
def test_real_models_have_the_known_tensors(name: str) -> None:
    changes, trunk, total, head_weights = REAL[name]
    hparams = Hparams({**DENSE, **changes})
    family = family_of(
        "Qwen3_5MoeForConditionalGeneration"
        if "num_experts" in changes
        else "Qwen3_5ForConditionalGeneration"
    )
    assert len(family.rows(hparams, "trunk")) == trunk
    assert len({row.name for row in family.rows(hparams, "all")}) == total
    head = family.rows(hparams, "head")
    assert sum(_elements(row.shape) for row in head) == head_weights
    assert all(row.name.startswith(f"blk.{hparams.count('num_hidden_layers')}.") for row in head)


def test_the_head_of_qwen3_next_has_the_known_size() -> None:
    """Its config.json does not declare it."""
    changes = {**EXPERTS, "num_hidden_layers": 48, "num_experts": 512}
    head = family_of("Qwen3NextForCausalLM").rows(Hparams({**DENSE, **changes}), "head")
    assert len(head) == 20 and sum(_elements(row.shape) for row in head) == 1_650_471_424


def test_the_head_of_qwen_flash_next_has_the_known_tensors() -> None:
    """31 in the checkpoint; the table of n-grams is stored in 128 parts of 2,500,012 rows."""
    changes = {
        **EXPERTS, "num_hidden_layers": 48, "num_experts": 512, "hidden_size": 2560,
        "num_attention_heads": 24, "linear_num_value_heads": 48, "moe_intermediate_size": 640,
        "shared_expert_intermediate_size": 640, "hc_count": 4, "hc_lowrank": 320,
        "indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 128,
        "ple_layer_ids": [2], "ple_embed_dim": 2560, "ple_conv_kernel_size": 4, "ngram_size": 3,
        "heads_per_ngram": 8, "ngram_vocab_size_base": 20_000_000,
        "make_ngram_vocab_size_divisible_by": 128, "split_ngram_parts": 128,
    }  # fmt: skip
    family, hparams = family_of("Qwen4ExpForCausalLM"), Hparams({**DENSE, **changes})
    head = family.rows(hparams, "head")
    assert len({name for row in head for name in row.sources[0].names}) == 31
    (table,) = [row for row in family.rows(hparams, "trunk") if row.name.startswith("per_layer")]
    assert table.shape == (320_001_536, 160) and table.sources[0].shape == (2_500_012, 160)
    assert len(table.sources[0].names) == 128


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"ple_layer_ids": [1, 2]}, "supports one"),
        ({"ple_layer_ids": [0]}, "layers from 1 to 2"),
        ({"ple_layer_ids": 1}, "layers from 1 to 2"),
        ({"split_ngram_parts": 7}, "split_ngram_parts"),
        ({"hc_count": "2"}, "hc_count"),
    ],
)
def test_an_impossible_flash_next_is_refused_by_key(change: dict[str, object], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        family_of("Qwen4ExpForCausalLM").rows(Hparams({**QWEN4_EXP, **change}), "all")


def _elements(shape: tuple[int, ...]) -> int:
    product = 1
    for n in shape:
        product *= n
    return product


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"hidden_size": "2560"}, "hidden_size"),
        ({"hidden_size": -1}, "hidden_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"layer_types": ["full_attention"]}, "layer_types"),
        ({"linear_num_value_heads": 17}, "linear_num_value_heads"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mtp_use_dedicated_embeddings": True}, "mtp_use_dedicated_embeddings"),
    ],
)
def test_an_impossible_configuration_is_refused_by_key(
    change: dict[str, object], named: str
) -> None:
    with pytest.raises(CheckpointError, match=named):
        family_of("Qwen3_5ForCausalLM").rows(Hparams({**DENSE, **change}), "all")
