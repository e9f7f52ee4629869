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
