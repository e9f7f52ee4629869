"""A quantization that was not made here is measured only if it is of the same model."""

import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import CHECKPOINTS, ROOT
from example_records import TEXT, measurement
from gguf.constants import GGUFValueType
from mtpforge.convert import native
from mtpforge.errors import ConfigError, ToolchainError
from mtpforge.gguf import reader
from mtpforge.gguf.metadata import Value
from mtpforge.gguf.reader import Gguf
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.measure import others, perplexity
from mtpforge.measure.measurement import KlDivergence, Other
from mtpforge.report.distance_tables import distances
from mtpforge.rules import layout
from mtpforge.rules.build import Build
from mtpforge.rules.local_paths import FileOnDisk

MODEL = "tiny-qwen3.5"
FAR = KlDivergence(mean=0.02, p99_9=0.5, same_top=0.9)
COMMIT = "1" * 40
THEIRS = {"repo": "Some/Body", "file": "Q4/x-00001-of-00002.gguf", "revision": COMMIT}
TEXTS = {"text": "tests/checkpoints/held-out.txt"}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ours") / "all.gguf"
    native.convert(CHECKPOINTS / MODEL, made, "all", tokenizer_pre="qwen35")
    return made


@pytest.fixture
def logits(tmp_path: Path) -> Path:
    """Two chunks of the model, as their header says."""
    made = tmp_path / "logits"
    header = b"_logits_" + struct.pack("<3i", 512, 1280, 2)
    made.write_bytes(header.ljust(perplexity.size(2, 1280), b"\0"))
    return made


def changed(opened: Gguf, **values: Any) -> Gguf:
    """The same with other values of keys of the architecture."""
    found = {f"qwen35.{key}": value for key, value in values.items()}
    new = {key: Value.of(value, opened.metadata[key].type) for key, value in found.items()}
    return replace(opened, metadata={**opened.metadata, **new})


def test_a_file_with_or_without_the_head_is_of_the_same_model(path: Path) -> None:
    ours = reader.read(path)
    assert others.other_model(ours, ours) is None
    bare = changed(ours.trunk, nextn_predict_layers=0, block_count=4)
    assert others.other_model(bare, ours) is None


def test_a_file_of_another_model_is_told_from_its_metadata_and_tensors(path: Path) -> None:
    ours = reader.read(path)
    tokens = ours.get("tokenizer.ggml.tokens")[:-8]
    fewer = Value.of(tokens, GGUFValueType.ARRAY, GGUFValueType.STRING)
    shorter = replace(ours, metadata={**ours.metadata, "tokenizer.ggml.tokens": fewer})
    others_tokens = Value.of(tokens[::-1] + tokens[:8], GGUFValueType.ARRAY, GGUFValueType.STRING)
    renamed = replace(ours, metadata={**ours.metadata, "tokenizer.ggml.tokens": others_tokens})
    names = [name for name in ours.tensors if name != "blk.0.ffn_up.weight"]
    for theirs, reason in (
        (shorter, "of another model: its number of tokens is 1272, not 1280"),
        (renamed, "of another model: token 0 is "),
        (changed(ours, block_count=7), "of another model: its number of blocks is 6, not 4"),
        (changed(ours, embedding_length=128), "qwen35.embedding_length is 128, not 256"),
        (reader.select_tensors(ours, names), "or incomplete: blk.0.ffn_up.weight is missing"),
    ):
        assert reason in str(others.other_model(theirs, ours))


def measure(path: Path, logits: Path, monkeypatch: pytest.MonkeyPatch, **values: Any) -> Other:
    """Measured by a llama-perplexity that always finds the same, or raises an error."""

    def against_reference(*_: Any) -> tuple[float, KlDivergence]:
        if "error" in values:
            raise values["error"]
        return 4.5, FAR

    monkeypatch.setattr(LlamaCpp, "version", lambda *_: "b11434")
    monkeypatch.setattr(LlamaCpp, "find", lambda *_: Path("llama-perplexity"))
    monkeypatch.setattr(others.perplexity, "against_reference", against_reference)
    return others.measure(path, values.get("like", path), logits, LlamaCpp())


def test_a_file_that_llama_cpp_cannot_load_gets_a_reason(
    path: Path, logits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = measure(path, logits, monkeypatch)
    assert (good.kl_divergence, good.perplexity, good.problem) == (FAR, 4.5, None)
    assert good.bytes == path.stat().st_size and good.bits_per_weight == pytest.approx(16, 0.01)
    refused = measure(path, logits, monkeypatch, error=ToolchainError("unknown type 142"))
    assert (refused.kl_divergence, refused.problem) == (None, "unknown type 142")
    with pytest.raises(ToolchainError, match="does not print"):  # to be tried again
        measure(path, logits, monkeypatch, error=perplexity.NoFiguresError("does not print"))
    logits.write_bytes(b"")
    assert "the BF16 file was not run" in str(measure(path, logits, monkeypatch).problem)


def test_a_file_that_is_no_gguf_gets_a_reason_and_a_bad_reference_is_an_error(
    path: Path, logits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = tmp_path / "bad.gguf"
    bad.write_bytes(path.read_bytes()[:1000])
    found = measure(bad, logits, monkeypatch, like=path)
    assert "bad.gguf: " in str(found.problem) and found.bits_per_weight is None
    logits.write_bytes(b"nothing")
    with pytest.raises(ConfigError, match="not written by reference_logits"):
        measure(path, logits, monkeypatch)


# ── config.yaml ──


def config(*compare: dict[str, str], **values: Any) -> dict[str, Any]:
    model = {
        "source": {"path": "tests/checkpoints/tiny-qwen3.5"},
        "measure": TEXTS,
        "variants": {"Q4_K_M": {}},
        "compare": list(compare),
    }
    return {"models": {"m": {**model, **values}}}


@pytest.fixture
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(FileOnDisk, "problem", lambda path: None)


@pytest.mark.usefixtures("at_root")
def test_all_shards_of_a_file_are_fetched_and_deleted() -> None:
    build = Build(config(THEIRS, {"path": "mine.gguf"}))
    fetched, local = layout.others(build.config.models["m"])
    wildcards = layout_wildcards(fetched)
    folder = f"resources/hub/Some/Body/{COMMIT}"
    names = [f"Q4/x-0000{number}-of-00002.gguf" for number in (1, 2)]
    assert build.measure.other_file(wildcards) == f"{folder}/Body/{names[0]}"
    assert build.measure.other_inputs(wildcards) == [f"{folder}/records/{x}.json" for x in names]
    freed = build.measure.other_options(wildcards).partition(" --free ")[2].split()
    assert freed == [
        *(f"{folder}/records/{name}.json" for name in names),
        *(f"{folder}/Body/{name}" for name in names),
    ]
    assert "--free" not in build.measure.other_options(layout_wildcards(local))
    assert build.measure.other_file(layout_wildcards(local)) == "mine.gguf"


def layout_wildcards(path: str) -> Any:
    return type("Wildcards", (), {"model": "m", "place": Path(path).stem})


@pytest.mark.usefixtures("at_root")
def test_a_comparison_needs_a_text_a_bf16_file_and_a_file_of_its_own() -> None:
    based = {"a": {"base": THEIRS}}
    for wrong, message in (
        (config(THEIRS, measure={}), "models/m/compare: nothing to measure it with: set `measure"),
        (config({"path": "x.gguf"}, variants=based), "compare: every variant has a base from"),
        (config(THEIRS, THEIRS), "compare/1: the same file as models/m/compare/0, with the same"),
        (
            config(THEIRS, variants={**based, "Q8_0": {}}),
            "compare/0: the same file as models/m/variants/a/base",
        ),
        (config({"repo": "a/b"}), "models/m/compare/0"),
        (config({"path": "x.txt"}), "compare/0/path: 'x.txt' is not a GGUF"),
    ):
        with pytest.raises(ConfigError, match=message):
            Build(wrong)


@pytest.mark.usefixtures("at_root")
def test_models_share_a_file_only_if_it_is_not_deleted_in_between() -> None:
    """One from the Hub is, once it is measured."""
    injected = config(variants={"a": {"base": THEIRS}}, measure={})["models"]["m"]
    fetched = config(THEIRS)
    fetched["models"]["injected"] = injected
    said = "m/compare/0: is models/injected/variants/a/base too, and deleted .*: download it, and"
    with pytest.raises(ConfigError, match=said):
        Build(fetched)
    local = config({"path": "config.yaml.gguf"})
    local["models"]["n"] = local["models"]["m"]
    Build({**local, "build": []})


# ── tables ──


def test_other_files_are_below_those_made_here_and_named_so() -> None:
    folder = Path("results/m")
    measured = {folder / "measure/x.json": measurement(kl_divergence=FAR, text=TEXT)}
    other = Other(name="Some/Body/x.gguf", bytes=10**9, llama_cpp="b1", kl_divergence=FAR)
    bad = Other(name="bad.gguf", bytes=1, llama_cpp="b1", problem="of another model")
    paths = [folder / f"work/others/{number}.json" for number in (1, 2)]
    shown = distances(measured, dict(zip(paths, (other, bad), strict=True))).splitlines()
    assert shown[4].startswith("| x ")
    assert shown[5].startswith("| Some/Body/x.gguf (not made here) | 1.00 GB |")
    assert shown[6:] == ["", "- bad.gguf: not compared: of another model"]
