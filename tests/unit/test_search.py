"""The search for a recipe: groups of tensors, their errors and sensitivities, and what follows."""

import json
import shlex
import time
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any
from zlib import crc32

import numpy as np
import pytest
import yaml
from conftest import BIN, CHECKPOINTS, ROOT
from gguf.constants import GGMLQuantizationType as Kind
from gguf.constants import GGUFValueType
from mtpforge.convert import native
from mtpforge.errors import ConfigError, RecordError, ToolchainError
from mtpforge.gguf import reader, split, writer
from mtpforge.gguf.metadata import Value
from mtpforge.gguf.reader import Gguf, TensorInfo
from mtpforge.io.ranges import FileRange
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.measure.measurement import KlDivergence
from mtpforge.quantize.llama_quantize import quantize, run
from mtpforge.quantize.recipe import as_text, by_recipe, head_recipe, read_recipe
from mtpforge.quantize.request import QuantizeRequest
from mtpforge.rules import layout
from mtpforge.rules.build import Build
from mtpforge.search import errors, found, groups, probes, sensitivity, unit_files
from mtpforge.search.compared import Compared, Stock, mixture_table
from mtpforge.search.errors import Errors, TensorError
from mtpforge.search.unit_files import UnitFiles

SHAPES = {
    "token_embd.weight": (512, 256),
    "output.weight": (512, 256),
    "output_norm.weight": (256,),
    **{
        f"blk.{block}.{name}.weight": shape
        for block in range(3)
        for name, shape in {
            "attn_norm": (256,),
            "attn_q": (128, 256),
            "ffn_gate": (256, 256),
            "ffn_up": (256, 256),
            "ffn_down": (256, 256),
            "ffn_gate_exps": (4, 32, 256),
            "ffn_up_exps": (4, 32, 256),
        }.items()
    },
    "blk.2.nextn.eh_proj.weight": (256, 512),
}
"""A model of two blocks, whose head is the third."""
METADATA = {
    "general.architecture": Value.of("qwen35moe", GGUFValueType.STRING),
    "qwen35moe.block_count": Value.of(3, GGUFValueType.UINT32),
    "qwen35moe.nextn_predict_layers": Value.of(1, GGUFValueType.UINT32),
}
UNITS = [
    "token_embd.weight",
    "output.weight",
    *(
        f"blk.{block}.{name}.weight"
        for block in range(2)
        for name in ("attn_q", "ffn_gate_up", "ffn_down", "ffn_gate_up_exps")
    ),
]


def model() -> Gguf:
    infos = {
        name: TensorInfo(name, shape, Kind.F32 if len(shape) == 1 else Kind.BF16)
        for name, shape in SHAPES.items()
    }
    ranges = {name: FileRange(Path("in.gguf"), 0, info.size) for name, info in infos.items()}
    return Gguf(Path("in.gguf"), METADATA, infos, ranges)


# ── groups ──


def test_gate_and_up_are_one_unit_and_the_head_is_in_none() -> None:
    units = groups.units(model())
    assert list(units) == UNITS
    assert units["blk.1.ffn_gate_up.weight"] == ["blk.1.ffn_gate.weight", "blk.1.ffn_up.weight"]
    assert not any("blk.2" in name or "norm" in name for names in units.values() for name in names)


def test_classes_and_layers() -> None:
    classes = groups.classes(model())
    assert classes["attn_q.weight"] == ["blk.0.attn_q.weight", "blk.1.attn_q.weight"]
    assert len(classes["ffn_gate_up_exps.weight"]) == 4
    assert classes["output.weight"] == ["output.weight"]
    layers = groups.layers(model())
    assert list(layers) == ["blk.0", "blk.1"]
    assert len(layers["blk.0"]) == 6


LEFT_ALONE = (
    "ffn_gate_inp", "ffn_gate_tid2eid", "altup_proj", "laurel_l", "ssm_conv1d", "shortconv.conv",
    "indexer.k_proj", "time_mix_w1", "time_mix_v2", "time_mix_lerp_fused", "attn_rel_b",
)  # fmt: skip
QUANTIZED = (
    "attn_q_a", "attn_kv_a_mqa", "attn_k_b", "ffn_gate_up_exps", "time_mix_key", "attn_qkv",
    "indexer.attn_q_b", "inp_gate", "shortconv.in_proj", "cross_attn_q",
)  # fmt: skip


def test_the_matrices_that_llama_quantize_leaves_alone_are_in_no_group() -> None:
    """Also those of architectures without a head, which a search meets."""
    names = [f"blk.0.{name}.weight" for name in (*LEFT_ALONE, *QUANTIZED)]
    names += ["token_embd.weight", "position_embd.weight", "token_types.weight"]
    names += ["per_layer_model_proj.weight", "per_layer_token_embd.weight"]
    infos = {name: TensorInfo(name, (64, 256), Kind.BF16) for name in names}
    numbers = {"block_count": 1, "context_length": 64, "embedding_length": 256}
    numbers |= {"feed_forward_length": 64, "attention.head_count": 1, "vocab_size": 64}
    metadata = {"general.architecture": Value.of("llama", GGUFValueType.STRING)}
    for key, number in numbers.items():
        metadata[f"llama.{key}"] = Value.of(number, GGUFValueType.UINT32)
    epsilon = Value.of(1e-5, GGUFValueType.FLOAT32)
    metadata["llama.attention.layer_norm_rms_epsilon"] = epsilon
    ranges = {name: FileRange(Path("in.gguf"), 0, info.size) for name, info in infos.items()}
    source = Gguf(Path("in.gguf"), metadata, infos, ranges)
    types = found.stock_types(source, QuantizeRequest("Q8_0"), LlamaCpp(BIN, threads=1))
    assert groups.matrices(source) == [name for name in names if types[name] is not Kind.BF16]
    assert all(f"blk.0.{name}.weight" in groups.matrices(source) for name in QUANTIZED)


# ── errors ──


def bf16(values: np.ndarray) -> bytes:
    return (values.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()


def test_evenly_spaced_rows_of_each_expert(tmp_path: Path) -> None:
    shapes = {"a.weight": (640, 64), "b.weight": (3, 48, 64), "c.weight": (4, 64)}
    tensors: list[Any] = []
    for name, shape in shapes.items():
        count = int(np.prod(shape[:-1]))
        values = np.repeat(np.arange(count) % 256, shape[-1])
        tensors.append((TensorInfo(name, shape, Kind.BF16), [memoryview(bf16(values))]))
    source = writer.write_scratch(tmp_path / "in.gguf", METADATA, tensors)
    part = errors.sampled(source, list(shapes), tmp_path / "part.gguf")
    assert {name: info.shape for name, info in reader.read(part.path).tensors.items()} == {
        "a.weight": (40, 64),
        "b.weight": (3, 16, 64),
        "c.weight": (4, 64),
    }

    def first(name: str) -> list[float]:
        count = part.tensors[name].elements // 64
        return [float(row[0]) for row in errors.stored_rows(part, name, np.arange(count))]

    assert first("a.weight") == [row % 256 for row in range(0, 640, 16)]
    assert first("b.weight") == [float(row) for row in range(0, 144, 3)]
    assert first("c.weight") == [0, 1, 2, 3]


def test_the_relative_error_is_the_squared_difference_over_squared_weights(tmp_path: Path) -> None:
    right, wrong = np.full((2, 32), 2.0), np.full((2, 32), 2.5)
    opened = [
        writer.write_scratch(
            tmp_path / f"{number}.gguf",
            METADATA,
            [(TensorInfo("a.weight", (2, 32), Kind.BF16), [memoryview(bf16(values))])],
        )
        for number, values in enumerate((right, wrong))
    ]
    assert errors.relative_error(*opened, "a.weight") == pytest.approx(1 / 16)
    assert errors.relative_error(opened[0], opened[0], "a.weight") == 0


@pytest.mark.parametrize(
    ("shape", "kind", "covered", "expected"),
    [
        ((64, 256), "Q4_K", False, "Q4_K"),
        ((64, 96), "Q4_K", False, "Q5_0"),  # rows that do not divide into blocks
        ((64, 33), "Q4_K", False, "F16"),
        ((64, 256), "IQ2_S", False, None),  # needs an importance matrix
        ((64, 256), "IQ2_S", True, "IQ2_S"),
    ],
)
def test_the_type_that_a_tensor_really_gets(
    shape: tuple[int, ...], kind: str, covered: bool, expected: str | None
) -> None:
    info = TensorInfo("blk.0.attn_q.weight", shape, Kind.BF16)
    rows = {info.name: shape[-1]} if covered else {}
    assert errors.possible_type(info, kind, rows) == expected


# ── sensitivities ──


def moved(**changed: float) -> dict[str, float]:
    result = {"attn_q": 0.002, "ffn_gate_up": 0.008, "ffn_down": 0.004, "ffn_gate_up_exps": 0.004}
    values = {f"{name}.weight": value for name, value in result.items()}
    values |= {"token_embd.weight": 0.01, "output.weight": 0.02, "blk.0": 0.009, "blk.1": 0.009}
    return values | {
        name.replace("_0", ".0").replace("_1", ".1"): kl for name, kl in changed.items()
    }


ERRORS = dict.fromkeys(groups.matrices(model()), 0.02)


def test_a_tensor_that_moves_the_predictions_more_is_more_sensitive() -> None:
    units = groups.units(model())
    results = dict.fromkeys(UNITS, 0.001) | {"blk.1.attn_q.weight": 0.005}
    sensitivities = sensitivity.by_tensor(units, ERRORS, results)
    assert sensitivities["blk.1.attn_q.weight"] == pytest.approx(0.25)
    assert sensitivities["blk.0.attn_q.weight"] == pytest.approx(0.05)
    # Two tensors: each error counts, and both together caused the divergence.
    assert sensitivities["blk.0.ffn_gate_up.weight"] == pytest.approx(0.025)


def test_noise_counts_as_the_smallest_divergence() -> None:
    units = groups.units(model())
    results = dict.fromkeys(UNITS, -0.00001)
    sensitivities = sensitivity.by_tensor(units, ERRORS, results)
    assert set(sensitivities.values()) == {1e-6 / 0.02, 1e-6 / 0.04}


def test_classes_alone_if_all_layers_are_alike() -> None:
    sensitivities = sensitivity.by_class_and_layer(groups.units(model()), ERRORS, moved())
    assert sensitivities["output.weight"] == pytest.approx(1.0)
    for block in range(2):
        assert sensitivities[f"blk.{block}.attn_q.weight"] == pytest.approx(0.05)
        assert sensitivities[f"blk.{block}.ffn_gate_up.weight"] == pytest.approx(0.1)


def test_a_sensitive_layer_raises_all_of_its_tensors() -> None:
    results = moved(blk_0=0.012, blk_1=0.006)
    sensitivities = sensitivity.by_class_and_layer(groups.units(model()), ERRORS, results)
    for name in ("attn_q", "ffn_down"):
        first, second = (sensitivities[f"blk.{block}.{name}.weight"] for block in range(2))
        assert first == pytest.approx(2 * second)
    assert sensitivities["output.weight"] == pytest.approx(1.0)


def test_results_of_another_model_are_refused() -> None:
    units = groups.units(model())
    with pytest.raises(ConfigError, match=r"no sensitivity of token_embd\.weight"):
        sensitivity.by_tensor(units, ERRORS, {})
    with pytest.raises(ConfigError, match=r"no error of token_embd\.weight"):
        sensitivity.by_tensor(units, {}, dict.fromkeys(UNITS, 0.1))


def test_the_prior_knows_embeddings_that_are_the_output_too() -> None:
    prior = sensitivity.by_prior(groups.units(model()))
    assert prior["output.weight"] > 10 * prior["blk.0.ffn_down.weight"]
    tied = {unit: [unit] for unit in UNITS if unit != "output.weight"}
    assert sensitivity.by_prior(tied)["token_embd.weight"] > 4 * prior["token_embd.weight"]


class Runs:
    """Stands in for the programs: the divergence of each run, some of which fail."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, fail_at: int = 0, depends_on_group: bool = False
    ) -> None:
        self.count = 0
        self.fail_at = fail_at
        self.depends_on_group = depends_on_group
        self.types: list[set[str]] = []
        monkeypatch.setattr(probes, "_check", lambda search: None)
        monkeypatch.setattr(UnitFiles, "write", lambda *_: UnitFiles(Path("shards"), {}))
        monkeypatch.setattr(UnitFiles, "link", self.link)
        monkeypatch.setattr(probes.perplexity, "mean_divergence", self.perplexity)

    def link(self, names: list[str], folder: Path) -> Path:
        self.types.append(set(names))
        return folder / "model.gguf"

    def perplexity(self, *_: Any) -> float:
        self.count += 1
        if self.count == self.fail_at:
            raise ToolchainError("killed")
        text = " ".join(sorted(self.types[-1]))
        result = crc32(text.encode()) if self.depends_on_group else self.count
        return result / 1000


def search(folder: Path, threads: int = 1, identity: str = "this model") -> probes.Search:
    return probes.Search(
        model(),
        logits=folder / "logits",
        matrix=None,
        llama=LlamaCpp(BIN, threads=threads),
        keep=folder / "kept",
        identity=identity,
    )


def test_a_search_that_was_killed_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first = Runs(monkeypatch, fail_at=4)
    with pytest.raises(ToolchainError, match="killed"):
        probes.measure(search(tmp_path), "tensor")
    assert first.count == 4
    second = Runs(monkeypatch)
    found_now = probes.measure(search(tmp_path), "tensor").kl_divergence
    assert second.count == len(UNITS) - 3
    assert list(found_now.items())[:4] == [
        ("token_embd.weight", 0.001),
        ("output.weight", 0.002),
        ("blk.0.attn_q.weight", 0.003),
        ("blk.0.ffn_gate_up.weight", 0.001),
    ]
    assert not [path for path in (tmp_path / "kept").iterdir() if path.suffix != ".json"]
    third = Runs(monkeypatch)
    assert probes.measure(search(tmp_path), "tensor").kl_divergence == found_now
    assert third.count == 0


@pytest.mark.parametrize("by", ["class", "tensor"])
@pytest.mark.parametrize("pieces", [2, 3, 50])
def test_jobs_that_share_the_runs_find_what_one_job_finds(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, by: groups.By, pieces: int
) -> None:
    total = len(groups.tried(model(), by))
    runs = Runs(monkeypatch, depends_on_group=True)
    shared = search(tmp_path)
    found_by: dict[str, float] = {}
    for piece in range(pieces, 0, -1):
        own = probes.measure(shared, by, piece, pieces).kl_divergence
        assert len(own) <= total // pieces + 1 and not own.keys() & found_by.keys()
        found_by |= own
    assert runs.count == total
    together = probes.measure(shared, by)
    assert runs.count == total
    assert together.kl_divergence == found_by
    alone = probes.measure(replace(shared, keep=tmp_path / "alone"), by)
    assert alone == together and list(alone.kl_divergence) == list(together.kl_divergence)


def test_a_class_that_is_a_whole_layer_is_tried_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tiny = model()
    kept = ("token_embd.weight", "blk.0.ffn_down.weight", "blk.2.nextn.eh_proj.weight")
    tiny = replace(tiny, tensors={name: tiny.tensors[name] for name in kept})
    runs = Runs(monkeypatch)
    one = replace(search(tmp_path, threads=2), source=tiny)
    results = [probes.measure(one, "class", piece, 2).kl_divergence for piece in (1, 2)]
    assert runs.count == 2
    assert [set(each) for each in results] == [
        {"token_embd.weight"}, {"ffn_down.weight", "blk.0"}
    ]  # fmt: skip


def test_linked_units_are_the_model_with_some_tensors_quantized(tmp_path: Path) -> None:
    native.convert(CHECKPOINTS / "tiny-qwen3.5", tmp_path / "in.gguf", "all", "qwen35")
    source = reader.read(tmp_path / "in.gguf")
    llama = LlamaCpp(BIN, threads=1)
    names = ["blk.1.ffn_gate.weight", "blk.1.ffn_up.weight", "token_embd.weight"]
    types = dict.fromkeys(groups.matrices(source), Kind.Q3_K)
    for folder in ("shards", "one", "none"):
        (tmp_path / folder).mkdir()
    shards = UnitFiles.write(source, tmp_path / "shards", types, None, llama)
    written = sum(path.stat().st_size for path in (tmp_path / "shards").iterdir())
    assert written < unit_files.disk(source, types)
    asked = {name: info.known_type for name, info in source.tensors.items()}
    asked |= dict.fromkeys(names, Kind.Q3_K)
    run(source, tmp_path / "right.gguf", asked, "Q4_K_M", None, llama)
    right = reader.read(tmp_path / "right.gguf")
    made = split.read(shards.link(names, tmp_path / "one"))
    assert {name: info.type for name, info in made.tensors.items()} == asked
    assert reader.hashes(made.ranges) == reader.hashes(right.ranges)
    plain = split.read(shards.link([], tmp_path / "none"))
    assert reader.hashes(plain.ranges) == reader.hashes(source.ranges)
    assert plain.metadata == source.metadata


def test_results_of_another_model_or_text_are_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for identity in ("this model", "another model"):
        runs = Runs(monkeypatch)
        probes.measure(search(tmp_path, identity=identity), "tensor")
        assert runs.count == len(UNITS)


def test_only_the_group_is_quantized_and_classes_come_before_layers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs = Runs(monkeypatch)
    found_now = probes.measure(search(tmp_path), "class").kl_divergence
    assert list(found_now) == [*groups.classes(model()), "blk.0", "blk.1"]
    assert runs.types[0] == {"token_embd.weight"}
    assert runs.types[2] == {"blk.0.attn_q.weight", "blk.1.attn_q.weight"}
    assert runs.types[-1] == set(groups.layers(model())["blk.1"])


class RunsOfSomeLength(Runs):
    """Runs whose result depends on the group alone, and that end in another order each time."""

    def link(self, names: list[str], folder: Path) -> Path:
        made = folder / "model.gguf"
        made.with_suffix(".txt").write_text(json.dumps(sorted(names)))
        time.sleep(Random().uniform(0, 0.01))
        return made

    def perplexity(self, *given: Any) -> float:
        tried = json.loads(given[0].with_suffix(".txt").read_text())
        return sum(map(hash_of, tried)) / 1e6


def test_the_recipe_is_the_same_for_any_path_order_and_number_of_cores(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("mtpforge.processors.available", lambda: 4)
    RunsOfSomeLength(monkeypatch)
    units = groups.units(model())
    most = sizes().of(all_at("Q6_K"))
    recipes = set()
    for number, threads in enumerate((1, 2, 4, 4)):
        folder = tmp_path / f"another path {number}"
        results = probes.measure(search(folder, threads), "class").kl_divergence
        sensitive = sensitivity.by_class_and_layer(units, ERRORS, results)
        types = found.choose(sizes(), all_at("Q4_K"), measured_errors(), sensitive, most)
        recipes.add(json.dumps(found.recipe(model(), types)))
    assert len(recipes) == 1


def test_a_failure_ends_runs_that_have_not_begun(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("mtpforge.processors.available", lambda: 2)
    runs = Runs(monkeypatch, fail_at=1)
    with pytest.raises(ToolchainError, match="killed"):
        probes.measure(search(tmp_path, threads=2), "tensor")
    assert runs.count < len(UNITS)


def test_time_left_is_said_once_as_many_runs_have_ended_as_begin_at_a_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """When the first of two ends, the other is nearly done."""
    monkeypatch.setattr("mtpforge.processors.available", lambda: 2)
    monkeypatch.setattr(probes.progress.Left, "due", lambda self: True)
    Runs(monkeypatch, depends_on_group=True)
    probes.measure(search(tmp_path, threads=2), "class")
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("8 runs of 4 chunks, 2 at a time: ")
    assert said[1] == "2 of 8 runs" and said[-1] == "8 of 8 runs"


@pytest.mark.parametrize(
    ("quiet", "said"), [(False, "llama-perplexity: about 2 min 0 s in all\n"), (True, "")]
)
def test_the_progress_of_one_run_does_not_hide_that_of_all(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    quiet: bool,
    said: str,
) -> None:
    monkeypatch.setattr("mtpforge.progress._INTERVAL", 0.0)
    program = tmp_path / "llama-perplexity"
    program.write_text("#!/bin/sh\necho ETA 2 minutes")
    program.chmod(0o755)
    assert LlamaCpp(tmp_path, quiet=quiet).perplexity([]) == "ETA 2 minutes\n"
    assert capsys.readouterr().err == said


def test_no_more_runs_at_a_time_than_fit_into_the_memory(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("mtpforge.processors.available", lambda: 64)
    monkeypatch.setattr(probes.memory, "usable", lambda: 2 << 30)
    Runs(monkeypatch, depends_on_group=True)
    probes.measure(search(tmp_path, threads=64), "class")
    assert capsys.readouterr().err.startswith("8 runs of 4 chunks, 3 at a time: ")


# ── the recipe ──

BITS = {"Q4_K": 0.005, "Q6_K": 0.0004, "Q8_0": 0.00003}


def measured_errors() -> list[Errors]:
    names = groups.matrices(model())
    return [
        Errors(type=kind, tensors={name: TensorError(kind, error) for name in names})
        for kind, error in BITS.items()
    ]


def all_at(kind: str) -> dict[str, Kind]:
    """A head at Q8_0, and the matrices of the trunk at one type."""
    types = {n: Kind.F32 if i.type is Kind.F32 else Kind.Q8_0 for n, i in model().tensors.items()}
    return types | dict.fromkeys(groups.matrices(model()), Kind[kind])


def sizes() -> found.Sizes:
    return found.Sizes(model(), METADATA)


def test_the_file_is_never_larger_than_asked_and_nearly_as_large() -> None:
    smallest, largest = sizes().of(all_at("Q4_K")), sizes().of(all_at("Q8_0"))
    sensitive = dict.fromkeys(UNITS, 1.0) | {"output.weight": 40.0}
    for most in range(smallest, largest, 20_011):
        types = found.choose(sizes(), all_at("Q4_K"), measured_errors(), sensitive, most)
        assert 0.97 * most < sizes().of(types) <= most
        assert types["blk.2.nextn.eh_proj.weight"] is Kind.Q8_0
        assert types["blk.0.ffn_gate.weight"] is types["blk.0.ffn_up.weight"]


def test_the_head_takes_bytes_from_the_trunk() -> None:
    most = sizes().of(all_at("Q6_K"))
    larger = all_at("Q6_K") | {"blk.2.nextn.eh_proj.weight": Kind.BF16}
    sensitive = dict.fromkeys(UNITS, 1.0)
    types = found.choose(sizes(), larger, measured_errors(), sensitive, most)
    assert sizes().of(types) <= most
    assert types["blk.2.nextn.eh_proj.weight"] is Kind.BF16
    assert Kind.Q4_K in types.values()


def test_the_card_says_what_the_head_costs_the_trunk() -> None:
    most = sizes().of(all_at("Q8_0")) - 1
    sensitive = dict.fromkeys(UNITS, 1.0)
    types = found.choose(sizes(), all_at("Q8_0"), measured_errors(), sensitive, most)
    cost = found.head_cost(sizes(), types, measured_errors(), sensitive, most)
    head = [name for name in SHAPES if name.startswith("blk.2.")]
    weights = sum(int(np.prod(SHAPES[name])) for name in head if len(SHAPES[name]) > 1)
    assert cost and cost.types == ["Q8_0"] and cost.bytes == weights * 34 // 32 + 256 * 4
    assert list(cost.trunk) == ["BF16", "Q4_K"]
    assert cost.trunk["BF16"] > 1 > cost.trunk["Q4_K"]
    matrices = {name: Kind.BF16 for name in head if len(SHAPES[name]) > 1}
    larger = all_at("Q8_0") | matrices
    beside = found.choose(sizes(), larger, measured_errors(), sensitive, most)
    losses = [
        found.expected_loss(model(), each, measured_errors(), sensitive) for each in (beside, types)
    ]
    assert cost.trunk["BF16"] == pytest.approx(losses[0] / losses[1])
    assert replace(cost, trunk={"BF16": 1.491, "Q4_K": 0.8612, "Q6_K": 2.71}).words == (
        "The head (Q8_0) takes 0.45 MB of the file. Expected KL divergence with another head: "
        "+49% with BF16, -14% with Q4_K, 2.7 times as much with Q6_K."
    )


def test_a_head_that_does_not_fit_is_left_out() -> None:
    most = sizes().of(all_at("Q4_K"))
    sensitive = dict.fromkeys(UNITS, 1.0)
    cost = found.head_cost(sizes(), all_at("Q4_K"), measured_errors(), sensitive, most)
    assert cost and list(cost.trunk) == ["Q4_K"]


def test_a_candidate_that_one_tensor_of_a_unit_cannot_have_is_left_out() -> None:
    candidates = measured_errors()
    for each in candidates[1:]:
        del each.tensors["blk.0.ffn_up.weight"]
    types = found.choose(
        sizes(), all_at("Q4_K"), candidates, dict.fromkeys(UNITS, 1.0), sizes().of(all_at("Q8_0"))
    )
    assert types["blk.0.ffn_gate.weight"] is Kind.Q4_K
    assert types["blk.1.ffn_gate.weight"] is Kind.Q8_0
    del candidates[0].tensors["blk.0.ffn_up.weight"]
    with pytest.raises(ConfigError, match=r"blk\.0\.ffn_gate_up\.weight can have none"):
        found.choose(sizes(), all_at("Q4_K"), candidates, dict.fromkeys(UNITS, 1.0), 10**9)


def test_the_order_of_the_candidates_and_of_the_results_decides_nothing() -> None:
    random = Random(1)
    names = groups.matrices(model())
    errors = [
        Errors(
            type=kind,
            tensors={n: TensorError(kind, error * (1 + hash_of(n) % 3)) for n in names},
        )
        for kind, error in BITS.items()
    ]
    sensitive = {unit: 1.0 + hash_of(unit) % 4 for unit in UNITS}
    smallest, largest = sizes().of(all_at("Q4_K")), sizes().of(all_at("Q8_0"))
    for most in range(smallest, largest, 50_021):
        recipes = set()
        for _ in range(5):
            shuffled = dict(random.sample(list(sensitive.items()), len(sensitive)))
            types = found.choose(
                sizes(), all_at("Q4_K"), random.sample(errors, len(errors)), shuffled, most
            )
            recipes.add(json.dumps(found.recipe(model(), types)))
        assert len(recipes) == 1


def hash_of(name: str) -> int:
    return sum(name.encode())


def test_a_file_that_cannot_be_so_small_is_refused() -> None:
    most = sizes().of(all_at("Q4_K")) - 1
    said = f"in.gguf: cannot fit into {most:,} bytes: .* make {most + 1:,}: ask for a larger file"
    with pytest.raises(ConfigError, match=said):
        found.choose(sizes(), all_at("Q4_K"), measured_errors(), dict.fromkeys(UNITS, 1.0), most)


def test_a_smaller_head_is_advised_only_if_there_is_a_head() -> None:
    def refusal(source: Gguf) -> str:
        of_source, start = found.Sizes(source, METADATA), all_at("Q4_K")
        with pytest.raises(ConfigError) as error:
            found.choose(of_source, start, measured_errors(), dict.fromkeys(UNITS, 1.0), most=1)
        return str(error.value)

    assert refusal(model()).endswith("or give smaller candidates or a smaller head")
    trunk = replace(model(), tensors=model().trunk.tensors)
    assert refusal(trunk).endswith("or give smaller candidates") and "head" not in refusal(trunk)


def test_more_bytes_than_the_finest_candidate_takes_give_that_one() -> None:
    flat = dict.fromkeys(UNITS, 1.0)
    types = found.choose(sizes(), all_at("Q4_K"), measured_errors(), flat, most=10**15)
    assert types == all_at("Q8_0")


def test_sizes_are_those_of_the_files_that_llama_quantize_makes(tmp_path: Path) -> None:
    native.convert(CHECKPOINTS / "tiny-qwen3.5", tmp_path / "in.gguf", "all", "qwen35")
    source = reader.read(tmp_path / "in.gguf")
    llama = LlamaCpp(BIN, threads=1)
    for kind in ("Q4_0", "Q8_0"):
        asked = QuantizeRequest(kind, head=head_recipe("BF16"))
        out = tmp_path / f"{kind}.gguf"
        quantize(source.path, out, asked, llama)
        exact = found.Sizes.measure(source, asked, llama)
        assert exact.of(found.stock_types(source, asked, llama)) == out.stat().st_size


def test_the_recipe_names_each_matrix_exactly(tmp_path: Path) -> None:
    types = all_at("Q6_K") | {"output.weight": Kind.Q8_0}
    recipe = found.recipe(model(), types)
    path = tmp_path / "found.yaml"
    path.write_text(json.dumps(recipe))
    names = [*model().tensors, "blk.0.attn_output.weight"]
    chosen = by_recipe(names, read_recipe(path))
    assert chosen == {name: types[name].name for name in groups.matrices(model())}


def test_the_mixture_by_class() -> None:
    types = all_at("Q4_K") | {"blk.1.attn_q.weight": Kind.Q8_0}
    mixture = found.mixture(model(), types)
    assert mixture["attn_q.weight"] == {"Q8_0": 1, "Q4_K": 1}
    assert mixture["ffn_gate_up_exps.weight"] == {"Q4_K": 4}


def test_records_are_read_strictly(tmp_path: Path) -> None:
    path = tmp_path / "errors.json"
    measured_errors()[0].write(path)
    assert Errors.read(path) == measured_errors()[0]
    probes.Sensitivities(by="class", kl_divergence={"attn_q.weight": 0.1}).write(tmp_path / "s")
    for kind in (Errors, found.Found):
        with pytest.raises(RecordError):
            kind.read(tmp_path / "s")


# ── config.yaml ──


def build(
    measured: str | None = None, others: dict[str, Any] | None = None, **variant: Any
) -> Build:
    entry: dict[str, Any] = {
        "source": {"path": "tests/checkpoints/tiny-qwen3.5"},
        "variants": {**(others or {}), "found": variant},
    }
    if measured:
        entry["measure"] = {"text": measured}
    return Build({"models": {"m": entry}})


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def wildcards(**names: str) -> Any:
    return SimpleNamespace(model="m", variant="found", kind="quantized", name="found", **names)


def test_a_size_makes_the_recipe() -> None:
    made = build(size="Q5_K_M")
    assert made.quantize.recipe_inputs(wildcards())[0] == "results/m/work/found/found.yaml"
    assert "--tensors results/m/work/found/found.yaml" in made.quantize.options(wildcards())
    assert made.quantize.options(wildcards()).startswith("--type Q5_K_M --head Q8_0")
    options = made.search.options(wildcards())
    assert options.startswith("--type Q5_K_M --size Q5_K_M --sensitivities")
    assert options.endswith("--head Q8_0 --head-tensors results/m/work/head-recipes/found.yaml")
    assert "--sensitivities" in options and "Q3_K.json" in options
    assert len(made.search.errors(wildcards())) == 6


def test_a_recipe_that_is_pasted_is_the_one_that_was_found() -> None:
    """Also one of a model with a thousand matrices."""
    recipe = found.recipe(model(), all_at("Q6_K"))
    recipe |= {rf"^blk\.{number}\.attn_q\.weight$": "Q4_K" for number in range(1000)}
    written = as_text(recipe)
    pasted = build(type="Q4_K_M", tensors=yaml.safe_load(written))
    assert pasted.quantize.recipe(wildcards()) == written
    options = build(size="Q4_K_M").quantize.options(wildcards())
    given = options.replace("work/found/found.yaml", "work/recipes/found.yaml")
    assert pasted.quantize.options(wildcards()) == given


def test_another_size_has_the_same_errors_and_sensitivities() -> None:
    first, second = build(size="Q4_K_M"), build(size="3G")
    assert first.search.errors(wildcards()) == second.search.errors(wildcards())
    assert first.search.measured(wildcards()) == second.search.measured(wildcards())


def test_a_search_with_an_importance_matrix_uses_its_text() -> None:
    made = build(bits=4.5, sensitivity="tensor", imatrix={"text": "README.md"})
    name = layout.imatrix_name("README.md")
    assert made.search.measured(wildcards())[0] == (
        f"results/m/work/sensitivities/{name}/{name}-tensor.json"
    )
    assert made.search.text(wildcards(text=name)) == "README.md"
    assert made.search.imatrix_option(wildcards(matrix=name)) == (
        f"--imatrix results/m/work/imatrix/{name}.gguf"
    )
    assert made.search.imatrix_option(wildcards()) == made.search.imatrix_option(
        wildcards(matrix=name)
    )


def test_jobs_share_the_runs() -> None:
    made = build(size="Q4_K_M", text="README.md")
    text = layout.imatrix_name("README.md")
    of = wildcards(text=text, method="class", matrix="plain")
    assert made.search.shares(of, 1) == []
    beginning = f"results/m/work/sensitivities/plain/{text}-class"
    assert made.search.shares(of, 2) == [f"{beginning}/1-of-2.json", f"{beginning}/2-of-2.json"]
    shared = wildcards(method="class", piece="1", pieces="4")
    assert made.needs.sensitivities(of).seconds > made.needs.sensitivities(shared).seconds


def test_the_prior_runs_nothing() -> None:
    made = build(size="900M", sensitivity="prior")
    assert made.search.measured(wildcards()) == []
    assert "--sensitivities" not in made.search.options(wildcards())


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"size": "11"}, "size: '11' is not a size: write a whole number of M or G, such as 11G"),
        ({"size": "BF16"}, "size: BF16 is not quantized"),
        ({"size": "3G", "bits": 4.5}, "bits: the same as `size`: give one of them"),
        ({"size": "3G", "tensors": {"attn": "Q6_K"}}, "tensors: `size` finds the types"),
        ({"bits": 4.5, "base": {"type": "Q4_K_M"}}, "bits: a base is already quantized"),
        ({"size": "3G", "type": "BF16"}, "size: BF16 is not quantized: give another `type`"),
        ({"type": "Q4_K_M", "text": "README.md"}, "text: only for a `size` or `bits`"),
        ({"type": "Q4_K_M", "candidates": ["Q4_K"]}, "candidates: only for a `size` or `bits`"),
        ({"size": "3G", "candidates": []}, "candidates: must not be empty"),
        ({"size": "3G", "candidates": ["Q4_K", "Q4_K"]}, "candidates: 'Q4_K' is listed twice"),
        ({"size": "3G", "candidates": ["Q4_K", "IQ2_S"]}, "imatrix: missing, and IQ2_S cannot"),
        ({"size": "3G", "sensitivity": "prior", "text": "README.md"}, "text: `sensitivity: prior`"),
        ({"size": "3G", "sensitivity": "layer"}, "sensitivity: "),
        ({"size": "3G", "text": "./LICENSE"}, "text: ./LICENSE is the text that the file is"),
    ],
)
def test_mistakes_are_refused(variant: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as refused:
        build("LICENSE", **variant)
    assert f"config.yaml: models/m/variants/found/{message}" in str(refused.value)


# ── the verdict ──


def compared(own: float, others: float | None, stock_bytes: int = 995) -> Compared:
    stock = None
    if others is not None:
        moved = KlDivergence(mean=others, p99_9=0.1, same_top=0.97)
        stock = Stock(type="Q4_K_M", bytes=stock_bytes, kl_divergence=moved)
    return Compared(
        file="Name-auto",
        bytes=1000,
        sensitivity="class",
        mixture={"attn_q.weight": {"Q8_0": 1, "Q4_K": 2}, "output.weight": {"Q6_K": 1}},
        kl_divergence=KlDivergence(mean=own, p99_9=0.1, same_top=0.965),
        stock=stock,
    )


@pytest.mark.parametrize(
    ("result", "verdict"),
    [
        (
            compared(0.00151, 0.0026),
            "-42% KL divergence at the size of Q4_K_M (0.0015 vs 0.0026), "
            "top-token agreement 96.5% vs 97.0%",
        ),
        (compared(0.0028, 0.0026), "no better than Q4_K_M: take that (0.0028 vs 0.0026)"),
        (compared(0.00259, 0.0026), "no better than Q4_K_M: take that (0.0026 vs 0.0026)"),
        (compared(0.0, -0.00001), "no better than Q4_K_M: take that (0 vs -1e-05)"),
        (
            compared(0.001, 0.002, stock_bytes=900),
            "-50% KL divergence vs the next smaller Q4_K_M of 0.9 kB (0.001 vs 0.002), "
            "top-token agreement 96.5% vs 97.0%",
        ),
        (
            compared(0.001, None),
            "smaller than all of llama.cpp's own mixtures, so there is nothing to compare",
        ),
        (
            replace(compared(0.001, 0.002), kl_divergence=None),
            "not compared with llama.cpp's own mixtures: its KL divergence was not measured",
        ),
    ],
)
def test_the_verdict(result: Compared, verdict: str) -> None:
    assert result.verdict == verdict


def test_a_comparison_survives_its_file(tmp_path: Path) -> None:
    for result in (compared(0.001, 0.002), compared(0.001, None)):
        result.write(tmp_path / "compared.json")
        assert Compared.read(tmp_path / "compared.json") == result


def test_the_table_of_a_mixture() -> None:
    assert mixture_table(compared(0.1, 0.2).mixture) == (
        "| tensors       | Q8_0 | Q6_K | Q4_K |\n"
        "| ------------- | ---: | ---: | ---: |\n"
        "| attn_q.weight |    1 |      |    2 |\n"
        "| output.weight |      |    1 |      |\n"
    )


MEASURED = "results/m/measure/tiny-qwen3.5-{}.json"


def test_only_measured_files_are_compared_but_all_have_a_verdict() -> None:
    for made in (build(size="Q4_K_M"), build("LICENSE", size="Q4_K_M")):
        assert made.search.all_compared() == ["results/m/work/compared/found.json"]
        assert made.search.head_option(wildcards()) == (
            "--head Q8_0 --head-tensors results/m/work/head-recipes/found.yaml"
        )
    search = build(size="Q4_K_M").search
    inputs = (search.measurement, search.stock, search.reference, search.reference_digest)
    assert [each(wildcards()) for each in inputs] == [[]] * 4
    assert search.measured_options(wildcards()) == ""
    options = made.search.measured_options(wildcards())
    assert options.startswith(f"--measurement {MEASURED.format('found')} --reference-logits")


@pytest.mark.parametrize(
    ("variant", "others", "stock"),
    [
        ({"size": "Q4_K_M"}, {"Q4_K_M": {}}, "Q4_K_M"),
        ({"size": "Q4_K_M", "head": "BF16"}, {"Q4_K_M": {}}, None),
        ({"size": "Q4_K_M", "head": "BF16"}, {"x": {"type": "Q4_K_M", "head": "BF16"}}, "x"),
        ({"size": "Q4_K_M"}, {"Q4_K_M": {"imatrix": {"text": "README.md"}}}, None),
        ({"size": "Q4_K_M"}, {"Q4_K_M": {"tensors": {"attn": "Q6_K"}}}, None),
        ({"size": "Q4_K_M"}, {"x": {"base": {"type": "Q4_K_M"}}}, None),
        ({"size": "Q4_K_M"}, {"x": {"size": "Q4_K_M", "sensitivity": "prior"}}, None),
        ({"size": "3G"}, {"Q4_K_M": {}}, None),
    ],
)
def test_a_mixture_that_is_a_variant_too_is_not_made_again(
    variant: dict[str, Any], others: dict[str, Any], stock: str | None
) -> None:
    made = build("LICENSE", others, **variant)
    files = [MEASURED.format(stock)] if stock else []
    assert made.search.stock(wildcards()) == files
    assert ("--stock" in made.search.measured_options(wildcards())) == bool(files)


def test_the_text_is_a_material_of_the_file() -> None:
    def roles(**variant: Any) -> list[str]:
        publish = build(size="Q4_K_M", **variant).publish
        options = shlex.split(publish.material_options(wildcards(stem="tiny-qwen3.5-found")))
        given = [json.loads(word) for word in options if word.startswith("{")]
        assert len(publish.material_inputs(wildcards(stem="tiny-qwen3.5-found"))) == len(given)
        return [f"{each['path']}: {each.get('role')}" for each in given]

    assert roles() == ["mixed.txt: text of the sensitivities"]
    assert roles(sensitivity="prior") == []
    assert roles(imatrix={"text": "README.md"}, text="LICENSE") == [
        "README.md: None",
        "LICENSE: text of the sensitivities",
    ]
