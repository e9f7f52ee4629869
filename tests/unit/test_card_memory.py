"""Which file a card recommends: memory reckoned from metadata, and what is said of it."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from example_records import DIVERGENCE
from gguf.constants import GGUFValueType
from mtpforge.gguf.metadata import Value
from mtpforge.gguf.reader import Gguf
from mtpforge.io.ranges import FileRange
from mtpforge.measure.measurement import Measurement
from mtpforge.publish import choice, serving_memory
from mtpforge.publish.result import Result
from test_card import beside, make, measurement, split_result
from test_card import result as report_result

GB = 10**9
HYBRID = {
    "block_count": 5,
    "nextn_predict_layers": 1,
    "embedding_length": 256,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.key_length": 64,
    "attention.value_length": 64,
    "full_attention_interval": 4,
    "ssm.conv_kernel": 4,
    "ssm.state_size": 64,
    "ssm.group_count": 2,
    "ssm.inner_size": 256,
}
"""As tests/checkpoints/tiny-qwen3.5."""
REAL = {
    "block_count": 65,
    "nextn_predict_layers": 1,
    "embedding_length": 5120,
    "attention.head_count": 24,
    "attention.head_count_kv": 4,
    "attention.key_length": 256,
    "attention.value_length": 256,
    "full_attention_interval": 4,
    "ssm.conv_kernel": 4,
    "ssm.state_size": 128,
    "ssm.group_count": 16,
    "ssm.inner_size": 6144,
}
"""As Qwen3.5-27B."""
MLA = {
    "block_count": 3,
    "embedding_length": 64,
    "attention.head_count": 8,
    "attention.head_count_kv": 1,
    "attention.key_length": 576,
    "attention.value_length": 512,
    "attention.key_length_mla": 192,
    "attention.value_length_mla": 128,
}


def gguf(keys: Mapping[str, Any], name: str = "x.gguf") -> Gguf:
    """A file with these numbers, lists and truth values in its metadata, and 1 MB of head."""
    values = {f"qwen35.{key}": _value(value) for key, value in keys.items()}
    values["general.architecture"] = Value.of("qwen35", GGUFValueType.STRING)
    names = [f"blk.{block}.attn_norm.weight" for block in range(65)]
    ranges = dict.fromkeys(names, FileRange(Path(name), 0, 10**6))
    return Gguf(Path(name), values, dict.fromkeys(names), ranges)  # type: ignore[arg-type]


def _value(value: Any) -> Value:
    if isinstance(value, list):
        kind = GGUFValueType.BOOL if type(value[0]) is bool else GGUFValueType.UINT32
        return Value.of(value, GGUFValueType.ARRAY, kind)
    return Value.of(value, GGUFValueType.BOOL if value is True else GGUFValueType.UINT32)


def result(
    variant: str, size: float, measured: Measurement | None = None, keys: Any = None, **values: Any
) -> Result:
    made = report_result(variant, measured, bytes=round(size * GB), **values)
    return replace(made, gguf=gguf(REAL if keys is None else keys, made.name))


def test_reckoned_as_llama_server_b11434_says() -> None:
    """Its log of tiny-qwen3.5 with 512 tokens: 0.25 MiB of cache at f16 and 0.13 at q8_0, 0.25 for
    the head, 2.46 MiB of states with four slots and n_max 2, 0.62 with `--parallel 1`."""
    found = serving_memory.context(gguf(HYBRID))
    assert found is not None
    share = 512 / serving_memory.TOKENS / 2**20
    assert round(share * found.cache("f16"), 2) == 0.25
    assert round(share * found.cache("q8_0"), 2) == 0.13
    assert round(share * found.head_cache, 2) == 0.25
    assert round(found.states(4, 2) / 2**20, 2) == 2.46
    assert round(found.states(1, 2) / 2**20, 2) == 0.62
    listed = {**HYBRID, "attention.recurrent_layers": [True, True, True, False, False]}
    assert serving_memory.context(gguf(listed)) == found


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        (MLA, 3 * 576),  # only keys
        ({**MLA, "attention.indexer.key_length": 128}, 3 * (576 + 128)),
        ({"block_count": 2, "embedding_length": 64, "attention.head_count": 4}, 2 * 2 * 64),
        (
            {
                "block_count": 4,
                "embedding_length": 64,
                "attention.head_count": 4,
                "attention.head_count_kv": [0, 2, 0, 2],
                "feed_forward_length": [0, 0, 9, 0],
                "ssm.state_size": 4,
                "ssm.inner_size": 8,
            },
            2 * 2 * 2 * 16,
        ),
    ],
)
def test_cached_values_of_other_architectures(keys: dict[str, Any], values: int) -> None:
    found = serving_memory.context(gguf(keys))
    assert found is not None and found.values == serving_memory.TOKENS * values
    assert (found.state > 0) == ("ssm.state_size" in keys)


GEMMA = {
    "block_count": 60,
    "embedding_length": 5376,
    "attention.head_count": 32,
    "attention.head_count_kv": ([16] * 5 + [4]) * 10,
    "attention.key_length": 512,
    "attention.value_length": 512,
    "attention.key_length_swa": 256,
    "attention.value_length_swa": 256,
    "attention.sliding_window": 1024,
    "attention.sliding_window_pattern": ([True] * 5 + [False]) * 10,
    "attention.shared_kv_layers": 0,
}
"""As Gemma 4 31B."""


def test_sliding_windows_cache_only_their_window() -> None:
    """llama.cpp b11434 has one window for each request and a batch of 512, in steps of 256."""
    full, slid = serving_memory.TOKENS * 10 * 4 * 2 * 512, 50 * 16 * 2 * 256
    for slots, cells in ((4, 4 * 1024 + 512), (1, 1024 + 512), (64, serving_memory.TOKENS)):
        found = serving_memory.context(gguf(GEMMA), slots)
        assert found is not None and found.values == full + cells * slid
    short = serving_memory.context(gguf(GEMMA), tokens=2048)
    assert short is not None and short.values == full // 4 + 2048 * slid
    odd = serving_memory.context(gguf({**GEMMA, "attention.sliding_window": 1}), 1)
    assert odd is not None and odd.values == full + 768 * slid


def test_without_a_list_of_windows_all_tokens_are_reckoned() -> None:
    for change in ({"attention.sliding_window": 0}, {"attention.sliding_window_pattern": 6}):
        found = serving_memory.context(gguf({**GEMMA, **change}))
        assert found is not None
        assert (
            found.values
            >= serving_memory.TOKENS * 10 * 4 * 2 * 512 + serving_memory.TOKENS * 50 * 16 * 2 * 256
        )


def test_blocks_that_share_a_cache_have_none_of_their_own() -> None:
    some, none = (
        serving_memory.context(gguf({**GEMMA, "attention.shared_kv_layers": count}))
        for count in (18, 60)
    )
    whole = serving_memory.context(gguf(GEMMA))
    assert some and none and whole
    assert some.values == whole.values * 42 // 60
    assert none.values == 0


def test_recurrent_blocks_of_other_kinds_have_a_state() -> None:
    kda = {**MLA, "attention.head_count_kv": [0, 1, 0], "kda.head_dim": 16}
    found = serving_memory.context(gguf(kda))
    assert found is not None
    assert found.values == serving_memory.TOKENS * 576
    assert found.state == 2 * 4 * 8 * 16 * (3 * 3 + 16)
    one = {**HYBRID, "attention.head_count_kv": [0, 0, 0, 2, 2], "feed_forward_length": 9}
    del one["full_attention_interval"]
    assert serving_memory.context(gguf(one)) == serving_memory.context(gguf(HYBRID))


@pytest.mark.parametrize(
    "change",
    [
        {"block_count": 10**9},
        {"block_count": 66},
        {"attention.head_count": [4] * 3},
        {"attention.head_count": None},
        {"embedding_length": None},
        {"attention.recurrent_layers": [True]},
        {"attention.key_length": True},
        {"nextn_predict_layers": 9},
        {"ssm.inner_size": None},
        {"attention.sliding_window": True},
        {"attention.shared_kv_layers": True},
    ],
)
def test_nothing_is_reckoned_from_metadata_that_does_not_tell(change: dict[str, Any]) -> None:
    keys = {key: value for key, value in {**HYBRID, **change}.items() if value is not None}
    assert serving_memory.context(gguf(keys)) is None
    if "block_count" not in change and "nextn_predict_layers" not in change:
        text = make(result("Q4_0", 2.0, keys=keys))
        assert "Which file" not in text and "estimate" not in text


SIZES = {"IQ2_M": 9.5, "Q4_K_M": 16.5, "Q8_0": 28.5}


def quants(**divergences: float) -> list[Result]:
    measured = {
        name: measurement(kl_divergence=replace(DIVERGENCE, mean=value))
        for name, value in divergences.items()
    }
    return [result(name, size, measured.get(name)) for name, size in SIZES.items()]


def test_the_largest_file_that_fits_is_chosen() -> None:
    chosen = {each.memory: each.result for each in choice.by_memory(quants())}
    names = {words: found and found.name for words, found in chosen.items()}
    assert names == {
        "8 to 12 GB": None,
        "16 GB": "Qwen3.5-4B-IQ2_M.gguf",
        "24 GB": "Qwen3.5-4B-Q4_K_M.gguf",
        "48 GB": "Qwen3.5-4B-Q8_0.gguf",
    }


def test_the_closest_file_that_fits_is_chosen_if_all_were_compared() -> None:
    closest = quants(IQ2_M=0.5, Q4_K_M=0.01, Q8_0=0.02)
    chosen = choice.by_memory(closest)
    assert [(each.memory, each.result) for each in chosen[-1:]] == [("24 to 48 GB", closest[1])]
    partly = quants(Q4_K_M=0.01, Q8_0=0.02)
    assert choice.by_memory(partly)[-1].result is partly[2]


def test_bf16_is_chosen_only_if_there_is_nothing_else() -> None:
    bf16, q8 = result("BF16", 8.0), result("Q8_0", 4.0)
    assert [each.result for each in choice.by_memory([bf16, q8])] == [q8]
    assert choice.by_memory([bf16])[-1].result is bf16
    assert choice.by_memory([bf16])[0].result is None


def test_needs_are_said_to_be_estimated() -> None:
    text = make(*quants())
    table = text.split("## Which file to take")[1].split("## Files")[0]
    assert "none fits" in table
    # 16.5 GB, 0.54 GB of cache, 8 states of 0.16 GB, 0.03 GB for the head, 1 GB of buffers
    assert "| 24 GB      | [Q4_K_M](Qwen3.5-4B-Q4_K_M.gguf) |            19 GB |" in table
    assert "- These needs are estimates: the file, 8,192 tokens" in table
    assert "Memory is VRAM if the whole model runs on the GPU, otherwise RAM" in table
    # 6 of the states; 4 states, and the head's cache
    assert "serves 4 requests at a time: `--parallel 1` saves 940 MB." in table
    assert (
        "The head takes 1.0 MB of `Qwen3.5-4B-Q4_K_M.gguf`, and with drafting llama-server "
        "needs 660 MB more than without" in table
    )


def test_a_vision_tower_is_loaded_beside_each_file() -> None:
    tower = beside("mmproj-Qwen3.5-4B-F16.gguf", "clip")
    tower = replace(tower, report=replace(tower.report, bytes=round(0.9 * GB)))
    alone, seeing = choice.by_memory(quants()), choice.by_memory([*quants(), tower])
    for before, after in zip(alone[1:], seeing[1:], strict=True):
        assert (after.needed("f16") or 0) - (before.needed("f16") or 0) == 0.9 * GB
    tight = result("Q4_K_M", 13.0)
    assert choice.by_memory([tight])[-1].memory == "16 to 48 GB"
    assert choice.by_memory([tight, tower])[-1].memory == "24 to 48 GB"
    text = make(*quants(), tower)
    assert "the file, the vision tower of 900 MB (`--no-mmproj` leaves it out), 8,192" in text


def test_commands_have_the_context_that_is_reckoned_with() -> None:
    text = make(*quants())
    assert text.count("--ctx-size 8192 --spec-type draft-mtp") == 3
    assert "commands below set this context with `--ctx-size 8192`" in text
    assert "`--cache-ram 0`" in text
    for given in (("-c", "4096"), ("--ctx-size", "4096")):
        text = make(result("Q4_0", 1.0, measurement(2, options=given)))
        assert f"{' '.join(given)} --spec-type" in text and "--ctx-size 8192" not in text
    for longest, given in ((4096, False), (8192, False), (262144, True)):
        keys = {**REAL, "context_length": longest}
        assert ("--ctx-size" in make(result("Q4_0", 1.0, keys=keys))) == given


@pytest.mark.parametrize(
    ("options", "longest", "tokens"),
    [
        ((), 262144, 8192),
        ((), None, 8192),
        ((), 4096, 4096),  # then the commands do not set it
        (("-c", "32768"), 262144, 32768),
        (("-fa", "on", "--ctx-size", "32768"), None, 32768),
        (("-c", "0"), 262144, 262144),  # the model's own
        (("-c", "0"), None, 0),
        (("-c", "x"), 262144, 8192),
        (("-c",), 262144, 8192),
    ],
)
def test_the_context_is_that_of_the_measured_options(
    options: tuple[str, ...], longest: int | None, tokens: int
) -> None:
    keys = REAL if longest is None else {**REAL, "context_length": longest}
    made = result("Q4_0", 1.0, measurement(2, options=options), keys=keys)
    assert choice.tokens(made) == tokens
    if not tokens:
        assert choice.needed(made) is None and "Which file" not in make(made)
        return
    assert f"the file, {tokens:,} tokens of context with keys" in make(made)
    eight = serving_memory.context(gguf(REAL))
    assert eight is not None
    by_8192 = (choice.needed(made) or 0) - made.report.bytes - 10**9 - eight.states(4, 2)
    assert by_8192 == (eight.cache("f16") + eight.head_cache) * tokens // 8192


def test_states_are_named_if_there_are_some() -> None:
    states = "the states of recurrent layers, and 1 GB"
    assert states in make(result("Q4_0", 1.0))
    assert "recurrent" not in make(result("Q4_0", 1.0, keys=MLA))


def test_what_a_sidecar_needs_is_said_beside_files_without_a_head() -> None:
    keys = {**REAL, "block_count": 64, "nextn_predict_layers": 0}
    drafting, headless = result("Q4_K_M", 16.5), result("Q4_K_M", 16.5, keys=keys)
    sidecar = beside("mtp-Qwen3.5-4B-Q8_0.gguf")
    few = replace(gguf(REAL, sidecar.name), tensors=dict.fromkeys("abc"))  # type: ignore[arg-type]
    sidecar = replace(sidecar, report=replace(sidecar.report, bytes=GB), gguf=few)
    more = choice.needed_with(sidecar, headless)
    assert more == GB + (choice.needed(drafting) or 0) - (choice.needed(headless) or 0)
    words = "Drafting with `mtp-Qwen3.5-4B-Q8_0.gguf` needs 1.7 GB more, which is not in the table."
    assert words in make(headless, sidecar)
    assert "not in the table" not in make(drafting, sidecar)
    odd = replace(sidecar, gguf=beside(sidecar.name).gguf)  # its cache is not known
    assert choice.needed_with(odd, headless) == more - 8192 * 4 * 512 * 2


def test_slots_are_those_of_the_measured_options() -> None:
    one = result("Q4_K_M", 16.5, measurement(2, options=("--parallel", "1")))
    assert choice.slots(one) == 1
    assert "requests at a time" not in make(one)
    for odd in ("0", "-1", "x", "²"):
        assert choice.slots(result("Q4_0", 1, measurement(2, options=("-np", odd)))) == 4
    assert choice.slots(result("Q4_0", 1, measurement(2, options=("-np",)))) == 4


def test_without_drafting_there_are_no_states_to_take_back() -> None:
    drafting, off = result("Q4_0", 1.0), result("Q4_0", 1.0, measurement(0, (9.0, 8.0)))
    kept = serving_memory.context(drafting.gguf)
    assert kept is not None
    saved = (choice.needed(drafting) or 0) - (choice.needed(off) or 0)
    assert saved == kept.head_cache + 4 * kept.state


def test_split_files_are_chosen_by_their_sum() -> None:
    made = replace(split_result("Q8_0"), gguf=gguf(REAL))
    made = replace(made, report=replace(made.report, bytes=20 * GB))
    assert [each.memory for each in choice.by_memory([made]) if each.result] == ["24 to 48 GB"]
    assert "Q8_0-00001-of-00002.gguf)" in make(made)


def test_labels_stay_short_and_apart() -> None:
    long = [result(f"{'x' * 40}{number}{'y' * 40}", 1.0) for number in range(3)]
    found = choice.labels(long, "Qwen3.5-4B")
    assert len(set(found.values())) == 3
    assert max(map(len, found.values())) <= 28
