"""Which conversions free the shards of a fetched checkpoint, and what a forecast says of it."""

from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT
from mtpforge.rules import lean
from mtpforge.rules.build import Build
from mtpforge.rules.local_paths import FileOnDisk

SOURCE = {"repo": "Owner/Name", "revision": "0" * 40}
THEIRS = {"repo": "They/Base", "file": "Base-Q4_K_M.gguf", "revision": "1" * 40}
INJECTED = {"base": {"type": "Q4_K_M"}}
BARE: dict[str, Any] = {"type": "Q4_0", "head": "none"}
TUNED = {"head_from": {"repo": "They/Original", "revision": "1" * 40}}


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(FileOnDisk, "problem", lambda path: None)


def build(model: dict[str, Any], lean: object = True, **others: Any) -> Build:
    usual = {"source": SOURCE, "variants": {"BF16": {"split": "48G"}, "Q4_K_M": {}}}
    return Build({"models": {"m": {**usual, **model}, **others}, "lean": lean})


def options(made: Build) -> dict[str, str]:
    """The option of each conversion that frees shards."""
    parts = {part: SimpleNamespace(model="m", part=part) for part in ("all", "trunk", "head")}
    found: dict[str, str] = {part: made.convert.free(names) for part, names in parts.items()}  # type: ignore[arg-type]
    return {part: option for part, option in found.items() if option}


FREES: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "usual": ({}, {"all": "--free"}),
    "without a head": ({"variants": {"Q4_0": BARE}}, {"trunk": "--free"}),
    "with a sidecar": ({"sidecar": "Q8_0"}, {"all": "--free draft"}),
    "fine-tune": (TUNED, {"all": "--free"}),
    "injected alone": (
        {"variants": {"x": INJECTED}, "max_acceptance_drop": 1},
        {"trunk": "--free head"},
    ),
}


@pytest.mark.parametrize("name", FREES)
def test_the_conversion_that_reads_all_of_a_shard_frees_it(name: str) -> None:
    model, expected = FREES[name]
    assert options(build(model)) == options(build(model, "true")) == expected
    assert options(build(model, lean=False)) == options(build(model, "false")) == {}


STAYS: dict[str, tuple[dict[str, Any], str]] = {
    "local": ({"source": {"path": "tests/checkpoints/tiny-qwen3.5"}}, "no whole checkpoint"),
    "head alone": ({"variants": {"x": {"base": THEIRS}}}, "no whole checkpoint"),
    "vision tower": ({"mmproj": True}, "llama.cpp's converter reads its shards"),
    "upstream": ({"converter": "llama.cpp"}, "llama.cpp's converter reads its shards"),
    "foreign base": (
        {"variants": {"Q4_K_M": {}, "x": {"base": THEIRS}}},
        "a base from elsewhere is compared",
    ),
    "twice": ({"variants": {"Q4_K_M": {}, "x": INJECTED}}, "it is converted twice"),
}


@pytest.mark.parametrize("name", STAYS)
def test_shards_stay_that_something_else_reads(name: str) -> None:
    model, reason = STAYS[name]
    made = build(model)
    assert options(made) == {}
    assert lean.why_not(made.config, made.config.models["m"]).startswith(reason)


def test_shards_of_another_model_stay() -> None:
    other = {"source": SOURCE, "variants": {"Q8_0": {}}}
    assert options(build({}, other=other)) == {}
    elsewhere = {**SOURCE, "revision": "2" * 40}
    assert options(build({}, other={**other, "source": elsewhere})) == {"all": "--free"}
    only_head = {"source": elsewhere, "variants": {"Q8_0": {}}, "head_from": SOURCE}
    assert options(build({}, other=only_head)) == {"all": "--free"}


TEXT = "workflow/texts/mixed.txt"
QUANTS: dict[str, Any] = {"variants": {"Q8_0": {}, "Q4_K_M": {"head": "Q6_K"}}}
NOT_BY_SHARDS: dict[str, tuple[dict[str, Any], str]] = {
    "BF16": ({"variants": {"BF16": {}, "Q8_0": {}}}, "a BF16 file is published"),
    "own base": (
        {"variants": {"x": INJECTED}, "max_acceptance_drop": 1}, "a base is made of its trunk"
    ),
    "search": (
        {"variants": {"x": {"bits": 5}}}, "a search of types reads its BF16 file"
    ),
    "text": (
        {"variants": {"Q4_0": {"imatrix": {"text": TEXT}}}}, "its importance matrix is computed"
    ),
    "divergence": ({**QUANTS, "measure": {"text": TEXT}}, "KL divergence is measured"),
    "sidecar": ({**QUANTS, "sidecar": "Q8_0"}, "its sidecar is verified with"),
    "local": (
        {**QUANTS, "source": {"path": "tests/checkpoints/tiny-qwen3.5"}}, "no whole checkpoint"
    ),
}  # fmt: skip


def test_quants_alone_are_made_shard_by_shard() -> None:
    for model in (QUANTS, {**QUANTS, **TUNED}, {**QUANTS, "measure": {"n_max": [1]}}):
        made = build(model, lean="shards")
        given = made.config.models["m"]
        assert lean.by_shards(made.config, given)
        (note,) = lean.notes(made.config, given)
        assert "acceptance of quants is not compared with that of BF16" in note
        option = options(made)["all"]
        assert (
            option.startswith("--free --reuse results --quantize ") and option.count("folder") == 2
        )
        programs = [
            made.convert.program(SimpleNamespace(model="m", part=part))  # type: ignore[arg-type]
            for part in ("all", "head")
        ]
        assert [path.rpartition("/")[2] for path in programs] == [
            "convert_and_quantize.py", "convert.py"
        ]  # fmt: skip
        assert not lean.by_shards(build(model).config, given)
        names: Any = SimpleNamespace(file="model.safetensors", **SOURCE)
        assert made.fetch.sparse(names) == "--sparse"
        assert made.fetch.sparse(SimpleNamespace(file="config.json", **SOURCE)) == ""  # type: ignore[arg-type]
        assert build(model).fetch.sparse(names) == ""


def test_provenance_names_the_program_of_each_profile() -> None:
    """The same ones with any profile, because changing it reruns nothing."""
    model: Any = SimpleNamespace(model="m")
    found = [build(QUANTS, lean=kind).publish.programs(model) for kind in ("shards", False)]
    assert "workflow/scripts/convert_and_quantize.py" in found[0] and found[0] == found[1]


@pytest.mark.parametrize("name", NOT_BY_SHARDS)
def test_what_needs_bf16_is_not_made_shard_by_shard(name: str) -> None:
    model, reason = NOT_BY_SHARDS[name]
    made = build(model, lean="shards")
    given = made.config.models["m"]
    assert lean.why_not_by_shards(made.config, given).startswith(reason)
    assert not lean.by_shards(made.config, given)
    assert options(made) == options(build(model))  # the first form, if that is possible
    (note,) = lean.notes(made.config, given)
    assert reason in note


def test_a_model_that_shares_its_head_is_not_made_shard_by_shard() -> None:
    only_head = {"source": {**SOURCE, "revision": "2" * 40}, "variants": {"Q8_0": {}}}
    made = build(QUANTS, lean="shards", other={**only_head, "head_from": SOURCE})
    assert not lean.by_shards(made.config, made.config.models["m"])
