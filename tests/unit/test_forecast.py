"""A build is forecast before any weights are fetched: sizes to 64 bytes, disk, memory, time."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import CHECKPOINTS, MODELS, SCRIPTS
from gemma4 import write_gemma4
from hub import COMMIT, Hub, serve
from huggingface_hub import constants
from layouts import write_layout
from mtpforge.checkpoint.checkpoint import Checkpoint
from mtpforge.convert import native
from mtpforge.forecast import costs, planned_ggufs, reruns, upstream_ggufs
from mtpforge.forecast.calibration import calibrated, network_rate
from mtpforge.forecast.costs import Machine, ProgramSpeed
from mtpforge.forecast.downloads import Download, Downloads
from mtpforge.forecast.steps import ModelForecast, Step
from mtpforge.gguf import reader
from mtpforge.hub import freed
from mtpforge.hub.listing import File, Listing
from mtpforge.inject.inject import Options, inject
from mtpforge.io import holes, storage
from mtpforge.llama_cpp import memory
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.measure import perplexity
from mtpforge.quantize import piece_count
from mtpforge.quantize.llama_quantize import quantize
from mtpforge.quantize.recipe import head_recipe
from mtpforge.quantize.request import QuantizeRequest
from mtpforge.rules import layout
from mtpforge.rules.build import Build
from mtpforge.rules.config import Model
from mtpforge.rules.variant import HubGguf, HubRepository
from other_architectures import EXPERTS, write_model
from plan import Fetch, Plan, as_table, in_words

MODEL = "tiny-qwen3.5"
MACHINE = Machine(threads=2, memory=8 << 30, disk=1e9, bandwidth=1e10)
HEAD = head_recipe("Q8_0")
SMALL = ("config", "tokenizer")
NEAR = 64  # bytes: llama-quantize pads its header differently


def bf16(name: str, folder: Path, part: str = "all") -> Path:
    out = folder / f"{name}-{part}.gguf"
    native.convert(CHECKPOINTS / name, out, part, tokenizer_pre="qwen35")
    return out


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("part", ["all", "trunk", "head", "draft"])
def test_a_conversion_has_the_forecast_size(tmp_path: Path, name: str, part: str) -> None:
    planned = planned_ggufs.converted(Checkpoint(CHECKPOINTS / name), part, "qwen35")
    assert planned_ggufs.size(planned) == bf16(name, tmp_path, part).stat().st_size


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("file_type", ["Q8_0", "Q4_K_M", "IQ4_XS", "Q3_K_M"])
def test_a_quant_has_the_forecast_size_and_types(
    tmp_path: Path, toolchain: Path, name: str, file_type: str
) -> None:
    llama = LlamaCpp(toolchain)
    request = QuantizeRequest(file_type, head=HEAD, recipe=(("ffn_down", "Q6_K"),))
    made = tmp_path / "made.gguf"
    quantize(bf16(name, tmp_path), made, request, llama)
    source = planned_ggufs.converted(Checkpoint(CHECKPOINTS / name), "all", "qwen35")
    planned = planned_ggufs.quantized(source, request, llama)
    assert abs(planned_ggufs.size(planned) - made.stat().st_size) <= NEAR
    right = {name: info.type for name, info in reader.read(made).tensors.items()}
    assert {name: info.type for name, info in planned.tensors.items()} == right


def test_an_injected_file_has_the_forecast_size(tmp_path: Path, toolchain: Path) -> None:
    llama = LlamaCpp(toolchain)
    base, made = tmp_path / "base.gguf", tmp_path / "made.gguf"
    quantize(bf16(MODEL, tmp_path, "trunk"), base, QuantizeRequest("Q4_K_M"), llama)
    inject(base, bf16(MODEL, tmp_path, "head"), made, Options(head_types=HEAD), llama)
    checkpoint = Checkpoint(CHECKPOINTS / MODEL)
    trunk = planned_ggufs.converted(checkpoint, "trunk", "qwen35")
    planned_base = planned_ggufs.quantized(trunk, QuantizeRequest("Q4_K_M"), llama)
    head = planned_ggufs.converted(checkpoint, "head")
    planned = planned_ggufs.injected(planned_base, head, HEAD)
    assert abs(planned_ggufs.size(planned) - made.stat().st_size) <= NEAR


@pytest.mark.parametrize("file_type", ["Q8_0", "Q4_K_M", "IQ4_XS", "Q3_K_M", "IQ3_M", "Q2_K"])
def test_without_llama_quantize_the_size_is_about_right(toolchain: Path, file_type: str) -> None:
    source = planned_ggufs.converted(Checkpoint(CHECKPOINTS / MODEL), "all", "qwen35")
    request = QuantizeRequest(file_type, head=HEAD)
    about, right = (
        planned_ggufs.size(planned_ggufs.quantized(source, request, LlamaCpp(folder)))
        for folder in (Path("none"), toolchain)
    )
    assert about == pytest.approx(right, rel=0.15)


def test_an_importance_matrix_changes_the_types(toolchain: Path) -> None:
    source = planned_ggufs.converted(Checkpoint(CHECKPOINTS / MODEL), "all", "qwen35")
    llama = LlamaCpp(toolchain)
    sizes = [
        planned_ggufs.size(
            planned_ggufs.quantized(source, QuantizeRequest("IQ3_XXS"), llama, covered)
        )
        for covered in (False, True)
    ]
    assert sizes[0] > sizes[1]


# ── steps ──


def model(**entries: Any) -> Model:
    source = {"path": str(CHECKPOINTS / MODEL)}
    prompts = str(CHECKPOINTS / MODEL / "prompts")
    shared = {"source": source, "tokenizer_pre": "qwen35", "prompts": prompts}
    config = {"models": {"m": {**shared, "variants": {"BF16": {}}, **entries}}}
    return Build(config).config.models["m"]


def forecast(
    toolchain: Path,
    machine: Machine = MACHINE,
    given_size: Callable[[layout.GivenFile], int] = lambda _: 0,
    **entries: Any,
) -> ModelForecast:
    checkpoint = Checkpoint(CHECKPOINTS / MODEL)
    llama = LlamaCpp(toolchain)
    return ModelForecast(
        model(**entries), checkpoint, llama, machine=machine, given_size=given_size
    )


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of the repository are not there."""
    monkeypatch.chdir(tmp_path)


def test_the_disk_holds_each_file_once(toolchain: Path) -> None:
    """The published BF16 file is the converted one, also in shards; a split quant is a copy."""
    found = forecast(toolchain, variants={"BF16": {}, "Q8_0": {}})
    sizes = {file.name: file.bytes for file in found.files}
    assert found.kept == found.peak == sum(sizes.values())
    split = forecast(toolchain, variants={"BF16": {"split": "2M"}})
    assert split.kept == split.files[0].bytes
    halves = forecast(toolchain, split="2M", variants={"BF16": {}, "F16": {}})
    assert halves.kept == sum(file.bytes for file in halves.files) + halves.files[1].bytes
    both = forecast(toolchain, split="2M", variants={"BF16": {}, "Q8_0": {}})
    assert both.kept == sizes["tiny-qwen3.5-BF16"] + 2 * sizes["tiny-qwen3.5-Q8_0"]


def test_of_files_that_pass_through_the_disk_holds_one(toolchain: Path) -> None:
    publish = {"repo": "O/N", "when": "verified", "delete_after": True}
    variants: dict[str, Any] = {
        "BF16": {},
        "Q8_0": {},
        "Q4_0": {},
        "own": {"base": {"type": "Q8_0"}},
    }
    stay = forecast(toolchain, variants=variants)
    sizes = {file.name: file.bytes for file in stay.files}
    passing = forecast(toolchain, variants=variants, publish=publish)
    others = sizes["tiny-qwen3.5-Q8_0"] + sizes["tiny-qwen3.5-Q4_0"]
    assert sizes["tiny-qwen3.5-own"] > sizes["tiny-qwen3.5-Q8_0"]
    assert stay.passing == 0 and passing.passing == others
    assert passing.kept == stay.kept - others and passing.peak == stay.peak - others
    split = forecast(toolchain, split="2M", variants={"Q8_0": {}, "Q4_0": {}}, publish=publish)
    assert split.passing == 2 * sizes["tiny-qwen3.5-Q4_0"]  # each is copied into its shards


def test_pieces_take_scratch_space(toolchain: Path) -> None:
    found = forecast(toolchain, variants={"Q4_K_M": {"pieces": 3}})
    assert found.files[0].pieces == 3 and found.peak > found.kept


def test_a_quantization_has_the_pieces_that_its_job_will_have(
    toolchain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share for each machine, unless it is short, and at most 999."""

    def pieces(machines: int) -> int:
        nodes = replace(MACHINE, nodes=machines)
        (file,) = forecast(toolchain, nodes, variants={"IQ4_XS": {}}).files
        return file.pieces

    assert pieces(8) == 1
    monkeypatch.setattr(piece_count, "SHARED_SECONDS", 1e-6)
    assert (pieces(1), pieces(8)) == (1, 8)
    monkeypatch.setattr(piece_count, "PIECE_SECONDS", 1e-6)
    assert pieces(1) == piece_count.MAX_PIECES


def test_a_file_that_is_found_takes_the_bytes_that_are_asked_for(toolchain: Path) -> None:
    found = forecast(toolchain, variants={"1M": {"size": "1M", "sensitivity": "prior"}})
    (step,) = [step for step in found.steps if step.stage == "quantize"]
    assert step.kept == found.files[0].bytes == 10**6


def test_a_file_to_compare_with_takes_the_logits_and_a_run(toolchain: Path, tmp_path: Path) -> None:
    (tmp_path / "theirs.gguf").touch()
    (tmp_path / "text").write_bytes(b"x" * 4000)
    compare = [{"path": "theirs.gguf"}]
    found = forecast(toolchain, measure={"text": "text"}, compare=compare)
    steps = {step.stage: step for step in found.steps}
    assert steps["logits"].kept == costs.logits_size(1024, 1280) > 0 == steps["measure_other"].kept
    assert steps["measure_other"].name == Path(layout.others(found.model)[0]).stem


def test_a_mixture_to_compare_with_is_made_and_run_unless_it_is_a_variant(
    toolchain: Path, tmp_path: Path
) -> None:
    (tmp_path / "text").write_bytes(b"x" * 4000)
    auto: dict[str, Any] = {"auto": {"size": "Q4_0", "sensitivity": "prior"}}

    def compare(**entries: Any) -> tuple[float, int, int, bool]:
        found = forecast(toolchain, **entries)
        (step,) = [step for step in found.steps if step.stage == "compare"]
        return step.reckoned, step.scratch, step.kept, step.path.endswith("compared/auto.json")

    made = compare(variants=auto, measure={"text": "text"})
    for entries in (
        {"variants": auto},
        {"variants": {**auto, "Q4_0": {}}, "measure": {"text": "text"}},
    ):
        assert compare(**entries) == (MACHINE.start, 0, 0, True)
    assert made[0] > MACHINE.start and made[1] > 1e6 and made[2:] == (0, True)


def test_a_local_checkpoint_is_read_whole_for_its_record(toolchain: Path, tmp_path: Path) -> None:
    """So is a local GGUF, but not a checkpoint that nothing is made from."""
    (tmp_path / "base.gguf").write_bytes(bytes(1000))
    text = str(CHECKPOINTS / "held-out.txt")

    def records(**entries: Any) -> dict[str, Step]:
        steps = forecast(toolchain, **entries).steps
        return {step.path: step for step in steps if step.stage == "local_files"}

    checkpoint = layout.local_record(str(CHECKPOINTS / MODEL))
    found = records(measure={"text": text})
    size = sum(path.stat().st_size for path in (CHECKPOINTS / MODEL).glob("*.safetensors"))
    assert found.keys() == {checkpoint} and found[checkpoint].kept == 0
    assert found[checkpoint].reckoned - MACHINE.start >= size / MACHINE.disk
    found = records(variants={"theirs": {"base": {"path": "base.gguf"}}})
    assert found.keys() == {checkpoint, layout.local_record("base.gguf")}


def test_a_quantized_head_lies_beside_the_file_that_it_is_injected_into(toolchain: Path) -> None:
    def injection(head: str) -> Step:
        found = forecast(toolchain, variants={"own": {"base": {"type": "Q8_0"}, "head": head}})
        (step,) = [step for step in found.steps if step.stage == "inject"]
        (file,) = found.files
        assert step.scratch >= file.head * (head != "BF16")
        return step

    copied, quantized = injection("BF16"), injection("Q4_K")
    assert copied.scratch == copied.memory == 0
    assert 100_000 < quantized.scratch < copied.kept / 4
    assert quantized.memory > 256 << 20
    assert quantized.reckoned - MACHINE.start > quantized.kept / MACHINE.disk


def test_a_chat_template_is_applied_by_a_server_with_the_bf16_file(toolchain: Path) -> None:
    matrix = {"text": str(CHECKPOINTS / "held-out.txt"), "chat": True}
    chat = forecast(toolchain, variants={"IQ4_XS": {"imatrix": matrix}})
    plain = forecast(toolchain, variants={"IQ4_XS": {"imatrix": {**matrix, "chat": False}}})
    steps = {step.stage: step for step in chat.steps}
    server = steps["conversations"]
    assert chat.servers == plain.servers + 1 and server.servers == 1
    assert server.path == f"results/m/work/conversations/{server.name}.txt"
    assert server.memory == memory.needed(steps["convert"].kept)
    assert 0 < server.kept < 1e6
    assert MACHINE.programs.server < server.reckoned < steps["imatrix"].reckoned


def list_files(folder: Path, sizes: dict[str, int]) -> None:
    """The listing of Some/Body, as `resolve` leaves it."""
    at = HubRepository(repo="Some/Body", revision=COMMIT)
    listing = folder / layout.commit(at) / "files.json"
    listing.parent.mkdir(parents=True)
    files = {name: File(size, "0" * 64) for name, size in sizes.items()}
    Listing("Some/Body", COMMIT, files, {}).write(listing)


def test_an_importance_matrix_of_the_hub_is_fetched_once(toolchain: Path, tmp_path: Path) -> None:
    matrix = {"repo": "Some/Body", "file": "imatrix.dat", "revision": COMMIT}
    list_files(tmp_path, {"imatrix.dat": 3000, "other": 5})
    downloads = Downloads()
    variants = {name: {"imatrix": matrix} for name in ("IQ4_XS", "Q4_K_M")}
    forecast(toolchain, given_size=downloads.file_size, variants=variants)
    assert downloads.fetch({}) == 3000


def test_a_fetched_file_to_compare_with_is_not_kept(tmp_path: Path) -> None:
    file = HubGguf(repo="Some/Body", file="a.gguf", revision=COMMIT)
    list_files(tmp_path, {"a.gguf": 3000})
    downloads = Downloads()
    assert downloads.file_size(file) == 3000
    assert (downloads.fetch({}), downloads.freed({})) == (3000, 0)
    downloads.free([file])
    assert (downloads.fetch({}), downloads.freed({})) == (3000, 3000)
    measured = {layout.record(file, "a.gguf"): None}
    assert (downloads.fetch(measured), downloads.freed(measured)) == (0, 0)


def test_a_checkpoint_of_two_models_is_fetched_once(tmp_path: Path) -> None:
    source = HubRepository(repo="Some/Body", revision=COMMIT)
    listing = Listing("Some/Body", COMMIT, {"model.safetensors": File(3000, "0" * 64)}, {})
    downloads = Downloads()
    for made in ("results/a/all.gguf", "results/b/all.gguf"):
        downloads._add_checkpoint(source, listing, made)
    assert downloads.total == downloads.fetch({}) == 3000
    shard = Path(layout.fetched(source), "model.safetensors")
    shard.parent.mkdir(parents=True)
    shard.touch()
    freed.record(shard.parent, shard.name).parent.mkdir(parents=True, exist_ok=True)
    freed.record(shard.parent, shard.name).touch()
    done = {"results/a/all.gguf": None}
    assert downloads.fetch({**done, "results/b/all.gguf": "missing"}) == 3000
    assert downloads.fetch({**done, "results/b/all.gguf": None}) == 0


def test_a_result_that_is_there_costs_nothing(toolchain: Path, tmp_path: Path) -> None:
    before = forecast(toolchain).seconds
    converted = tmp_path / "results/m/work/convert/all.gguf"
    converted.parent.mkdir(parents=True)
    converted.touch()
    after = forecast(toolchain)
    assert after.kept == 0 and after.seconds < before


def test_a_job_takes_as_long_as_the_last_time(toolchain: Path, tmp_path: Path) -> None:
    recorded = tmp_path / "benchmarks/m/convert-all.jsonl"
    recorded.parent.mkdir(parents=True)
    recorded.write_text('{"s": 1234.5}\n')
    steps = {(step.stage, step.name): step for step in forecast(toolchain).steps}
    assert steps["convert", "all"].seconds == 1234.5 > steps["convert", "all"].reckoned > 0


@pytest.mark.parametrize(
    ("record", "likely"),
    [
        ({"s": 1000, "cpu_time": 10}, 10),  # it waited for processors
        ({"s": 1000, "cpu_time": 1900}, 1000),  # two were at work
        ({"s": 1000, "cpu_time": None}, 1000),
        ({"s": 0.2, "cpu_time": 0}, 0.2),
    ],
)
def test_a_job_on_a_busy_machine_is_not_believed(
    toolchain: Path, tmp_path: Path, record: dict[str, float | None], likely: float
) -> None:
    recorded = tmp_path / "benchmarks/m/convert-all.jsonl"
    recorded.parent.mkdir(parents=True)
    recorded.write_text(json.dumps(record))
    (step,) = [step for step in forecast(toolchain).steps if step.stage == "convert"]
    assert likely <= step.seconds <= likely + step.reckoned
    assert step.seconds <= (record["s"] or 0)


def test_pieces_count_with_the_job_that_joins_them(toolchain: Path, tmp_path: Path) -> None:
    recorded = tmp_path / "benchmarks/m"
    recorded.mkdir(parents=True)
    names = ["quantized-Q8_0", "piece-quantized-Q8_0-1-of-2", "piece-quantized-Q8_0-2-of-2"]

    def seconds() -> float:
        steps = forecast(toolchain, variants={"Q8_0": {"pieces": 2}}).steps
        (step,) = [step for step in steps if step.stage == "quantize"]
        return step.seconds

    for name in names[:2]:
        (recorded / f"{name}.jsonl").write_text('{"s": 1000}\n')
    assert seconds() < 100  # one is not known
    (recorded / f"{names[2]}.jsonl").write_text('{"s": 1000}\n')
    assert seconds() == 3000


def test_a_head_of_another_checkpoint_is_converted_by_its_own_job(toolchain: Path) -> None:
    donor = {"path": str(CHECKPOINTS / MODEL)}
    found = forecast(toolchain, head_from=donor, variants={"own": {"base": {"type": "Q4_0"}}})
    given = found.model.donor(found.model.variants["own"])
    assert given is not None
    converted = {step.path for step in found.steps if step.stage == "convert"}
    assert layout.donated("m", given).file in converted
    assert layout.converted("m", "head").file not in converted


def test_less_memory_bandwidth_makes_measuring_slower(toolchain: Path) -> None:
    slow = replace(MACHINE, bandwidth=7e7)
    measured = {"variants": {"BF16": {}}, "measure": {"n_max": [1, 2]}}
    quick, late = (forecast(toolchain, machine, **measured) for machine in (MACHINE, slow))
    assert late.seconds > 5 * quick.seconds
    # Verified twice; four pairs are tried, then the fastest and no drafting have three rounds.
    assert quick.servers == 2 + 4 + 2 * 3 - 1


def test_a_server_starts_for_each_proof(toolchain: Path, tmp_path: Path) -> None:
    """Drafting and not; once without a head or for a vision tower; once more in several files."""
    variants = {"Q8_0": {}, "Q4_0": {"head": "none"}, "Q4_K_M": {"split": "1M"}}
    found = forecast(toolchain, variants=variants)
    proofs = {step.name: step for step in found.steps if step.stage == "verify"}
    servers = {name.removeprefix(f"{MODEL}-"): step.servers for name, step in proofs.items()}
    assert servers == {"Q8_0": 2, "Q4_0": 1, "Q4_K_M": 3}
    assert proofs[f"{MODEL}-Q4_0"].reckoned < proofs[f"{MODEL}-Q8_0"].reckoned


def test_measuring_without_a_head_has_no_search(toolchain: Path) -> None:
    measured = {"variants": {"Q8_0": {}, "Q4_0": {"head": "none"}}, "measure": {"repeats": 3}}
    steps = forecast(toolchain, **measured).steps
    servers = [step.servers for step in steps if step.stage == "measure"]
    assert servers[0] > 10 and servers[1] == 3


def test_measuring_is_bounded_by_its_minutes(toolchain: Path) -> None:
    slow = replace(MACHINE, bandwidth=7e7)
    grid = {"n_max": [1, 2, 3, 4, 5, 6, 8], "p_min": [0, 0.25, 0.5, 0.75]}

    def reckoned(minutes: int) -> float:
        measured = {"measure": {**grid, "minutes": minutes}}
        steps = forecast(toolchain, slow, **measured).steps
        return max(step.reckoned for step in steps if step.stage == "measure")

    assert reckoned(60) > 15 * 60 > 11 * 60 > reckoned(10) > 5 * 60


@pytest.fixture
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (0.0, 0.0, 0.0))


@pytest.mark.usefixtures("idle")
def test_the_machine_is_measured_once(tmp_path: Path, toolchain: Path) -> None:
    cache = tmp_path / "cache" / "calibration.json"
    llama = LlamaCpp(toolchain, threads=1)
    first = calibrated(tmp_path, cache, llama)
    assert first.disk > 0 and first.bandwidth > 0 and first.start > 0
    assert min(vars(first.programs).values()) > 0 and first.programs != ProgramSpeed()
    assert calibrated(tmp_path, cache, llama) == first
    for damaged in ("{", "[]", json.dumps(dict.fromkeys(json.loads(cache.read_text()), 1))):
        cache.write_text(damaged)
        assert calibrated(tmp_path, cache, llama).threads == 1


def test_a_busy_machine_is_not_remembered(
    tmp_path: Path, toolchain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (2.0, 0.0, 0.0))
    cache = tmp_path / "calibration.json"
    found = calibrated(tmp_path, cache, LlamaCpp(toolchain, threads=1))
    assert found.programs == ProgramSpeed() and not cache.exists()


@pytest.mark.usefixtures("idle")
def test_before_llama_cpp_is_built_its_speed_is_assumed(tmp_path: Path) -> None:
    cache = tmp_path / "calibration.json"
    found = calibrated(tmp_path, cache, LlamaCpp(tmp_path / "none", threads=1))
    assert found.programs == ProgramSpeed() and not cache.exists()


def test_the_speed_of_the_network_is_remembered(tmp_path: Path) -> None:
    cache = tmp_path / "cache" / "calibration.json"
    assert network_rate(cache, "https://hub", seen=0.0) == 0
    assert network_rate(cache, "https://hub", seen=5e6) == 5e6
    assert network_rate(cache, "https://hub", seen=0.0) == 5e6
    assert network_rate(cache, "https://mirror", seen=0.0) == 0


def test_slower_programs_take_longer(toolchain: Path) -> None:
    slow = ProgramSpeed(server=2.0, token=5e-3, quantize=3.0)
    measured = {"variants": {"IQ4_XS": {}}, "measure": {"n_max": [1]}}
    machines = MACHINE, replace(MACHINE, programs=slow)
    quick, late = (forecast(toolchain, machine, **measured).steps for machine in machines)
    slower = {a.stage for a, b in zip(quick, late, strict=True) if b.seconds > a.seconds}
    assert slower == {"convert", "quantize", "acceptance", "verify", "measure"}


def test_conversion_takes_the_disk_or_the_processor_whichever_is_slower() -> None:
    """Measured on two cores (docs/benchmarks.md): 9.8 CPU s for 7.1 GB, 17.8 for them from FP8."""
    size = 7.1e9
    idle = replace(MACHINE, memory=64 << 30)

    def seconds(machine: Machine = idle, source: float = size, computed: float = 0) -> float:
        return costs.convert(size, machine, source, computed).seconds

    assert seconds() == pytest.approx(9.8, rel=0.1)
    assert seconds(source=4.6e9, computed=0.71) == pytest.approx(17.8, rel=0.1)
    slow = replace(idle, disk=1e8)
    assert seconds(slow) == size / 1e8
    small = replace(slow, memory=4 << 30)  # which keeps neither checkpoint nor result
    assert seconds(small, source=4.6e9) == (2 * size + 4.6e9) / 1e8


def test_a_source_that_exceeds_the_memory_is_read_to_hash_and_to_quantize_it() -> None:
    def seconds(machine: Machine) -> float:
        made = costs.quantize(6e9, 2e9, machine, cpu_seconds=20, largest=0, scratch=0)
        return made.seconds

    assert seconds(replace(MACHINE, memory=16 << 30)) == 20 / 2 + 2
    assert seconds(MACHINE) == 20 / 2 + 2 + 2 * 6


def test_pieces_take_the_time_to_join_them(toolchain: Path) -> None:
    def quantization(pieces: int) -> Step:
        steps = forecast(toolchain, variants={"Q8_0": {"pieces": pieces}}).steps
        (step,) = [step for step in steps if step.stage == "quantize"]
        return step

    whole, joined = quantization(1), quantization(2)
    more = joined.reckoned - whole.reckoned
    assert more == pytest.approx(whole.kept / MACHINE.disk)
    assert joined.kept == whole.kept


def test_a_quant_is_verified_without_reading_all_of_its_checkpoint(toolchain: Path) -> None:
    """BF16 is compared with it byte for byte."""
    variants: dict[str, Any] = {"BF16": {}, "Q8_0": {}}
    sizes = [file.bytes for file in forecast(toolchain, variants=variants).files]
    slow = replace(MACHINE, disk=1e4, memory=12 << 20)  # which holds either, but not twice BF16

    def seconds(machine: Machine) -> list[float]:
        steps = forecast(toolchain, machine, variants=variants).steps
        return [step.reckoned for step in steps if step.stage == "verify"]

    of_bf16, of_quant = (
        late - quick for late, quick in zip(seconds(slow), seconds(MACHINE), strict=True)
    )
    assert of_quant == 0
    assert of_bf16 > 1.9 * sizes[0] / slow.disk


def test_only_quantized_weights_are_computed(tmp_path: Path) -> None:
    def share(name: str) -> float:
        return planned_ggufs.computed_share(Checkpoint(write_layout(name, tmp_path)))

    assert share("dense-text-only") == 0
    assert 0.5 < share("dense-fp8") < 1
    assert 0.5 < share("moe-fp8") < 1


# ── what reruns ──

SUMMARY = """\
output_file\tdate\trule\tlog-file(s)\tstatus\tplan
a\tnow\tr\t-\tok\tno update
b\tnow\tr\t-\tparams changed\tupdate pending
c\t-\tr\t-\tremoved temp file\tno update
d\tnow\tr\t-\tok\tupdate pending
"""


def test_snakemake_says_what_reruns() -> None:
    found = reruns.parsed(SUMMARY)
    assert found == {
        "a": None, "b": "settings or code", "c": None, "d": "after another"
    }  # fmt: skip


def test_a_repository_that_is_listed_anew_hides_no_step() -> None:
    """A second model of a repository: Snakemake stops at its list, and calls the rest current."""
    rows = [
        "resources/hub/o/n/files.json\tnow\tresolve\t-\tparams changed\tupdate pending",
        "resources/hub/o/n/records/a.json\t-\tfetch\t-\tmissing\tno update",
        "results/new/M-Q4_K_M.gguf\t-\tverify\t-\tmissing\tno update",
        "results/new/work/convert/head.gguf\t-\tconvert\t-\tremoved temp file\tno update",
        "results/new/work/recipes/a.yaml\t-\trecipe\t-\tok\tno update",
        "results/old/M-Q4_K_M.gguf\tnow\tverify\t-\tok\tno update",
        "results/old/work/convert/all.gguf\t-\tconvert\t-\tremoved temp file\tno update",
    ]
    header = SUMMARY.splitlines()[0]
    assert reruns.parsed("\n".join([header, *rows])) == {
        "resources/hub/o/n/files.json": "settings or code",
        "results/new/work/recipes/a.yaml": None,
        "results/old/M-Q4_K_M.gguf": None,
        "results/old/work/convert/all.gguf": None,
    }
    finished = reruns.parsed("\n".join([header, *rows[:2], *rows[5:]]))
    assert finished["resources/hub/o/n/records/a.json"] is None


def test_why_snakemake_has_no_answer_is_said() -> None:
    said = "Using profile.\nMissing input files for rule x:\n    output: y\n    envs/z\n"
    assert reruns.reason(said) == "Missing input files for rule x: output: y envs/z"
    said = 'Error in file "S", line 4:\nconfig.yaml: unknown key\n  File "S", line 4, in <module>\n'
    assert reruns.reason(said) == "config.yaml: unknown key"
    assert reruns.reason("") == "it says nothing"


def test_only_what_reruns_counts(toolchain: Path, tmp_path: Path) -> None:
    converted = "results/m/work/convert/all.gguf"
    found = forecast(toolchain)
    assert found.kept > 0
    found.settle({converted: None})  # deleted, and not needed any more
    assert found.kept == 0
    found.settle({converted: "settings or code"})
    (step,) = [step for step in found.steps if step.path == converted]
    assert step.why == "settings or code" and found.kept == step.kept


def test_only_what_a_step_reads_is_fetched(tmp_path: Path) -> None:
    missing = Download(5, tmp_path / "shard", "record")
    assert missing.needed({})  # Snakemake does not know it yet
    assert missing.needed({"record": "missing"})
    assert not missing.needed({"record": None})
    (tmp_path / "shard").touch()
    assert not missing.needed({"record": "missing"})


def test_a_shard_that_is_not_whole_is_fetched_once_it_is_converted(tmp_path: Path) -> None:
    """Shard by shard, it is sparse before its conversion, and freed after it."""
    made = "results/m/work/convert/all.gguf"
    shard = Download(5, tmp_path / "shard", "record", tmp_path / "freed.json", frozenset({made}))
    shard.path.touch()
    assert not shard.needed({made: "missing"})  # it is whole
    (tmp_path / "freed.json").touch()
    assert shard.needed({"record": None, made: "missing"})
    assert shard.needed({})  # Snakemake has no answer
    assert not shard.needed({"record": None, made: None})  # deleted, and not needed any more
    Path(made).parent.mkdir(parents=True)
    Path(made).touch()
    assert not shard.needed({}) and shard.needed({made: "settings or code"})


# ── the program ──


def plan(folder: Path, toolchain: Path, hub: Hub | None = None, *options: str) -> Any:
    environment = {"HF_HOME": str(folder / "home"), "XDG_CACHE_HOME": str(folder / "cache")}
    environment |= {"HF_ENDPOINT": hub.endpoint} if hub else {}
    command = [sys.executable, str(SCRIPTS / "plan.py"), "--bin", str(toolchain), *options]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=folder, env={**os.environ, **environment}
    )


def write_config(folder: Path, source: dict[str, str], **entries: Any) -> None:
    prompts = str(CHECKPOINTS / MODEL / "prompts")
    shared = {"source": source, "tokenizer_pre": "qwen35", "prompts": prompts}
    config = {"models": {"m": {**shared, "variants": {"Q4_K_M": {}}, **entries}}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def test_a_hub_model_is_planned_without_its_weights(tmp_path: Path, toolchain: Path) -> None:
    write_config(tmp_path, {"repo": f"Owner/{MODEL}", "revision": COMMIT})
    with serve({f"Owner/{MODEL}": CHECKPOINTS / MODEL}) as hub:
        done = plan(tmp_path, toolchain, hub, "--json")
        again = plan(tmp_path, toolchain, hub, "--json")
        sent = sum(count for name, count in hub.sent.items() if name.endswith(".safetensors"))
    assert done.returncode == 0, done.stderr
    shards = sum(path.stat().st_size for path in (CHECKPOINTS / MODEL).glob("*.safetensors"))
    assert sent <= 4 * 65536 < shards / 20  # their headers
    found = json.loads(done.stdout)
    assert shards < found["fetch"] + found["fetched"] < shards + 1_000_000
    small = sum((CHECKPOINTS / MODEL / f"{name}.json").stat().st_size for name in SMALL)
    assert found["fetched"] >= small > 0  # the forecast has needed and fetched them
    assert json.loads(again.stdout)["fetch"] == found["fetch"]
    local = tmp_path / "local"
    local.mkdir()
    write_config(local, {"path": str(CHECKPOINTS / MODEL)})
    same = json.loads(plan(local, toolchain, None, "--json").stdout)
    assert found["models"]["m"]["files"] == same["models"]["m"]["files"]


def test_a_forecast_elsewhere_says_where_it_looked(toolchain: Path, tmp_path: Path) -> None:
    done = plan(tmp_path, toolchain, None)
    said = f"error: {tmp_path} has no config.yaml: run it in mtpforge's folder, or give --config"
    assert done.returncode == 1 and said in done.stderr


def test_logits_of_a_short_text_are_forecast(toolchain: Path, tmp_path: Path) -> None:
    text = CHECKPOINTS / "held-out.txt"  # half of the 16 chunks that a measurement may use
    measured = {"variants": {"Q8_0": {}}, "measure": {"text": str(text)}}
    steps = {step.stage: step for step in forecast(toolchain, **measured).steps}
    out = tmp_path / "logits"
    perplexity.reference_logits(
        bf16(MODEL, tmp_path), text, out=out, chunks=16, llama=LlamaCpp(toolchain, 1)
    )
    assert steps["logits"].kept == pytest.approx(out.stat().st_size, rel=0.01)


def test_a_bf16_file_larger_than_the_memory_is_not_run(toolchain: Path) -> None:
    text = str(CHECKPOINTS / "held-out.txt")
    built = {"variants": {"BF16": {}, "Q8_0": {}}, "measure": {"text": text}}
    small = replace(MACHINE, memory=5_000_000)  # room for Q8_0 only
    steps = {(step.stage, step.name): step for step in forecast(toolchain, small, **built).steps}
    assert ("acceptance", "BF16") not in steps
    unrun = [
        steps["logits", "BF16"],
        *(steps[job, f"{MODEL}-BF16"] for job in ("verify", "measure")),
    ]
    assert [(step.memory, step.servers) for step in unrun] == [(0, 0)] * 3
    run = [steps[job, f"{MODEL}-Q8_0"] for job in ("verify", "measure")]
    assert all(step.memory > 100 << 20 and step.servers > 1 for step in run)
    whole = forecast(toolchain, **built)
    assert min(step.servers for step in whole.steps if step.stage in ("verify", "measure")) > 1


def test_too_little_memory_is_said(tmp_path: Path, toolchain: Path) -> None:
    """A job of SLURM with 400 MiB; 3 GB of address space (`ulimit -v`) are enough to forecast."""
    write_config(tmp_path, {"path": str(CHECKPOINTS / MODEL)})
    command = [sys.executable, str(SCRIPTS / "plan.py"), "--bin", str(toolchain)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment["SLURM_MEM_PER_NODE"] = "400"
    done = subprocess.run(
        ["bash", "-c", 'ulimit -v 3000000 && exec "$@"', "bash", *command],
        capture_output=True, text=True, cwd=tmp_path, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "tiny-qwen3.5-Q4_K_M" in done.stdout
    size = 2_060_000  # of the quantized file, which has to be run
    (needed,) = re.findall(
        r"warning: a step needs ([\d.]+) MB of memory and there are 419.43 MB \((.*?)\)",
        done.stdout,
    )
    assert float(needed[0]) * 1e6 == pytest.approx(memory.needed(size), rel=0.1)
    assert needed[1].startswith("results/m/")


def test_a_model_of_another_converter_is_forecast_about(tmp_path: Path, toolchain: Path) -> None:
    source = {"repo": "Owner/glm", "revision": COMMIT}
    write_config(tmp_path, source, converter="llama.cpp", variants={"BF16": {}, "Q4_K_M": {}})
    weights = write_model("glm", tmp_path / "glm").glob("*.safetensors")
    size = sum(path.stat().st_size for path in weights)
    with serve({"Owner/glm": tmp_path / "glm"}) as hub:
        done = plan(tmp_path, toolchain, hub, "--json")
        table = plan(tmp_path, toolchain, hub).stdout
        sent = sum(count for name, count in hub.sent.items() if name.endswith(".safetensors"))
    assert done.returncode == 0, done.stderr
    assert sent < 4 * 65536 < size  # headers
    found = json.loads(done.stdout)
    assert found["fetch"] > size
    whole, quant = found["models"]["m"]["files"]
    assert whole["about"] and 0 < quant["head"] < quant["bytes"] < whole["bytes"]
    assert f"about {whole['bytes'] / 1e6:.2f} MB" in table and "0.00 MB" not in table


# Bytes that llama.cpp's converter wrote (convert_hf_to_gguf.py --outtype bf16).
UPSTREAM = {
    "glm": 963_072, "glm-lite": 802_912, "glm-next": 943_968, "deepseek": 882_304,
    "step-wrapped": 1_058_336, "nemotron": 582_144, "mimo-fp8": 792_928, "exaone": 622_368,
    "ling": 777_504,
}  # fmt: skip


@pytest.mark.parametrize("name", UPSTREAM)
def test_what_another_converter_makes_is_about_as_large(tmp_path: Path, name: str) -> None:
    checkpoint = Checkpoint(write_model(name, tmp_path / name))
    planned = upstream_ggufs.converted(checkpoint, "all")
    assert planned_ggufs.size(planned) == pytest.approx(UPSTREAM[name], rel=0.025)
    assert min(len(planned.trunk.tensors), len(planned.head.tensors)) > 5
    experts = [info.shape[0] for key, info in planned.tensors.items() if "_exps." in key]
    assert set(experts) == {EXPERTS}
    trunk = upstream_ggufs.converted(checkpoint, "trunk") if name != "exaone" else planned.trunk
    assert trunk.tensors.keys() == planned.trunk.tensors.keys()


def test_the_drafter_of_another_checkpoint_is_forecast(tmp_path: Path) -> None:
    target, drafter = write_gemma4(tmp_path)
    entries = {
        "source": {"path": str(target)},
        "head_from": {"path": str(drafter)},
        "converter": "llama.cpp",
        "sidecar": "Q8_0",
        "variants": {"Q4_0": {"head": "none"}},
    }
    found = ModelForecast(
        model(**entries),
        Checkpoint(target),
        LlamaCpp(tmp_path),
        machine=MACHINE,
        given_size=lambda _: 0,
        drafter=Checkpoint(drafter),
    )
    converted = {step.name: step.kept for step in found.steps if step.stage == "convert"}
    assert converted.keys() == {"trunk", "draft"}
    weights = sum(each.size for each in Checkpoint(drafter).tensors.values())
    assert weights <= converted["draft"] < 1.2 * weights
    quant, sidecar = found.files
    assert quant.head == 0 < sidecar.head == sidecar.bytes < converted["draft"]


def test_once_another_converter_has_run_sizes_are_exact(tmp_path: Path, toolchain: Path) -> None:
    """A file of mtpforge's stands for one that it has made."""
    folder = write_model("glm", tmp_path / "glm")
    out = tmp_path / "results/m/work/convert/all.gguf"
    out.parent.mkdir(parents=True)
    shutil.copy(bf16(MODEL, tmp_path), out)
    found = ModelForecast(
        model(source={"path": str(folder)}, converter="llama.cpp"),
        Checkpoint(folder),
        LlamaCpp(toolchain),
        machine=MACHINE,
        given_size=lambda _: 0,
    )
    assert found.files[0].bytes == out.stat().st_size and not found.files[0].about


def test_a_vision_tower_is_forecast(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(CHECKPOINTS / MODEL, tmp_path / "seeing"))
    (folder / "preprocessor_config.json").write_text("{}")
    found = ModelForecast(
        model(source={"path": str(folder)}, mmproj=True),
        Checkpoint(folder),
        LlamaCpp(tmp_path),
        machine=MACHINE,
        given_size=lambda _: 0,
    )
    whole, tower = found.files
    assert not whole.about and tower.about and tower.name == "mmproj-seeing-F16"
    weights = [each for name, each in Checkpoint(folder).tensors.items() if "visual" in name]
    assert tower.bytes == pytest.approx(sum(each.size for each in weights), rel=0.05)


def test_a_sidecar_is_run_with_a_quant_if_bf16_is_too_large(toolchain: Path) -> None:
    variants = {"BF16": {}, "IQ4_XS": {}, "Q8_0": {}}

    def forecast_memory(machine: Machine, **entries: Any) -> tuple[int, int]:
        """Bytes that the sidecar's verification needs, and the files of BF16 and IQ4_XS."""
        found = forecast(toolchain, machine, sidecar="Q8_0", **entries)
        [step] = [step for step in found.steps if step.name == "mtp-tiny-qwen3.5-Q8_0"]
        return step.memory, [file.bytes for file in found.files]

    needed, sizes = forecast_memory(MACHINE, variants=variants)
    assert needed == memory.needed(sizes[0])
    for small in (4 << 20, 1 << 20):
        needed, _ = forecast_memory(replace(MACHINE, memory=small), variants=variants)
        assert needed == memory.needed(sizes[1]) < memory.needed(sizes[2])
    needed, _ = forecast_memory(replace(MACHINE, memory=4 << 20), variants={"BF16": {}})
    assert needed == memory.needed(sizes[0])


def test_too_little_disk_is_said() -> None:
    about = {
        "to_run": 1,
        "steps": 1,
        "fetch": 2,
        "fetch_seconds": None,
        "disk": 3,
        "peak": 9_000_000,
        "smaller": {},
        "frees_nothing": "",
    }
    about |= {
        "free": 9_000_000,
        "needs_memory": 1,
        "memory": 1,
        "largest_step": "x.json",
        "seconds": 1,
        "compile_seconds": 0,
        "servers": 0,
    }
    assert "warning" not in in_words(about)
    assert "\nwarning: too little disk: " in in_words({**about, "peak": 9_000_001})
    full = {**about, "peak": 9_000_001}
    lean = in_words({**full, "smaller": {"lean": 9_000_000}})
    assert "`--workflow-profile profiles/lean`, takes 9.00 MB at its peak: " in lean
    shards = in_words({**full, "smaller": {"lean": 9_000_001, "shards": 8_000_000}})
    assert "`make PROFILE=shards`, or " in shards and "takes 8.00 MB at its peak: " in shards
    none = in_words({**full, "free": 7, "smaller": {"lean": 9_000_000, "shards": 8_000_000}})
    assert "even `make PROFILE=shards` takes 8.00 MB at its peak: free the checkpoints" in none
    lacking = in_words({**about, "needs_memory": 2})
    assert "\nwarning: a step needs " in lacking and "(x.json): take smaller types, " in lacking
    timed = in_words({**about, "fetch": 3_000_000, "fetch_seconds": 130})
    assert "fetch 3.00 MB (about 2 min 10 s), " in timed


def test_the_build_of_llama_cpp_counts_until_it_is_there(
    tmp_path: Path, toolchain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(tmp_path, {"path": str(CHECKPOINTS / MODEL)})
    built = totals(tmp_path, monkeypatch, LlamaCpp(toolchain))
    assert built["compile_seconds"] == 0 and "llama.cpp" not in in_words(built)
    missing = LlamaCpp(tmp_path / "none")
    about = totals(tmp_path, monkeypatch, missing)
    assert about["compile_seconds"] == round(460 / MACHINE.threads)
    assert "; building llama.cpp takes about " in in_words(about)
    given = {"toolchain": {"llama_cpp": {"bin_dir": str(toolchain)}}}
    assert totals(tmp_path, monkeypatch, missing, **given)["compile_seconds"] == 0
    cuda = {"toolchain": {"llama_cpp": {"cuda": True}}}
    slower = totals(tmp_path, monkeypatch, missing, **cuda)
    assert slower["compile_seconds"] > 5 * about["compile_seconds"]


def test_a_forecast_that_takes_too_long_says_so(tmp_path: Path) -> None:
    """`make` goes on without it, and the disk may be too small."""
    write_config(tmp_path, {"repo": "Owner/Name", "revision": COMMIT})
    program = "import sys, plan; plan._PATIENCE = 2; sys.argv[1:] = ['--totals']; plan.main()"
    with socket.create_server(("127.0.0.1", 0)) as silent:
        hub = f"http://127.0.0.1:{silent.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path,
            env={**os.environ, "HF_ENDPOINT": hub, "PYTHONPATH": str(SCRIPTS)},
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "no forecast within 2 s: `make plan` says if the disk is too small\n"


# ── the totals ──


def planned(
    folder: Path, monkeypatch: pytest.MonkeyPatch, llama: LlamaCpp, free: int = 10**12, **lean: Any
) -> Plan:
    """Of config.yaml, on a machine of 1 GiB, as if Snakemake had no answer."""
    monkeypatch.setattr("plan.asking", lambda *_: nullcontext(dict))
    monkeypatch.setattr("plan.calibrated", lambda *_: replace(MACHINE, memory=1 << 30))
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    build = Build({**yaml.safe_load((folder / "config.yaml").read_text()), **lean})
    return Plan([folder / "config.yaml"], build.config, build.config.chosen, llama)


def totals(*arguments: Any, **lean: Any) -> dict[str, Any]:
    return planned(*arguments, **lean).totals()


@contextmanager
def serving(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The checkpoint on a Hub, for this process."""
    with serve({f"Owner/{MODEL}": CHECKPOINTS / MODEL}) as hub:
        template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield


@pytest.mark.parametrize("lean", [False, True, "shards"])
def test_the_disk_is_followed_from_model_to_model(
    tmp_path: Path, toolchain: Path, monkeypatch: pytest.MonkeyPatch, lean: object
) -> None:
    """From the fetched shards on, with all that the models before have left."""
    write_config(tmp_path, {"repo": f"Owner/{MODEL}", "revision": COMMIT})
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    own = {**config["models"]["m"], "source": {"path": str(CHECKPOINTS / MODEL)}}
    config["models"]["own"] = {**own, "variants": {"Q8_0": {"split": "1M"}}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with serving(tmp_path, monkeypatch):
        plan = planned(tmp_path, monkeypatch, LlamaCpp(toolchain), lean=lean)
    first, second = plan.forecasts
    fetch, there = plan.fetches["m"], plan.downloads.there
    shards = sum(path.stat().st_size for path in (CHECKPOINTS / MODEL).glob("*.safetensors"))
    assert fetch.left == pytest.approx(shards, rel=0.02) and 0 < fetch.there == there < shards / 2
    by_shards = lean == "shards"
    assert fetch.kept < 0.1 * shards if by_shards else fetch.kept == fetch.left
    assert fetch.disk == there + fetch.kept
    converted = next(step for step in first.steps if step.stage == "convert")
    if not lean:
        assert converted.disk == fetch.disk + converted.kept
    elif not by_shards:
        assert fetch.disk < converted.disk < fetch.disk + 0.5 * converted.kept
    disks = [step.disk for step in (*first.steps, *second.steps)]
    assert disks == sorted(disks)  # nothing else is deleted
    assert plan.fetches["own"] == (0, 0, 0, first.steps[-1].disk)
    assert disks[-1] == there + plan.totals()["disk"]
    table = as_table(first, fetch)
    assert f"m: fetch {fetch.left / 1e6:.2f} MB, {there / 1e6:.2f} MB are there; " in table
    assert f"; llama-server starts {2 if by_shards else 3} times\n" in table
    assert "own: nothing to fetch; " in as_table(second, plan.fetches["own"])
    assert max(map(len, table.splitlines())) <= 100


def test_a_table_has_100_columns(toolchain: Path) -> None:
    """With the sizes and hours of a large model, the longest names and the longest reason."""
    text = CHECKPOINTS / "held-out.txt"
    found = forecast(toolchain, variants={"1M": {"size": "1M", "text": str(text)}})
    reason = max(reruns._REASONS.values(), key=len)
    large = {"kept": 806 * 10**9, "disk": 29 * 10**11, "memory": 10**12, "seconds": 4e5}
    found.steps = [replace(step, **large, why=reason) for step in found.steps]
    lines = as_table(found, Fetch(1, 0, 1, 1)).splitlines()
    assert any(re.match(r"\| sensitiv\S*…\S+-class \|", line) for line in lines)
    assert max(map(len, lines)) <= 100


def test_only_steps_that_will_run_are_listed(toolchain: Path) -> None:
    found = forecast(toolchain, variants={"BF16": {}, "Q8_0": {}})
    count = len(found.steps)
    found.settle({"results/m/work/convert/all.gguf": None})
    listed = as_table(found, Fetch(0, 0, 0, 0))
    assert "| convert all" not in listed and "| verify Q8_0" in listed
    assert listed.endswith(f"1 of {count} steps are done\n")
    found.steps = [replace(step, why=None) for step in found.steps]
    listed = as_table(found, Fetch(0, 0, 0, 0))
    assert "| step" not in listed and listed.endswith(f"{count} of {count} steps are done\n")


def test_the_disk_follows_what_is_there(toolchain: Path, tmp_path: Path) -> None:
    found = forecast(toolchain, variants={"BF16": {}, "Q8_0": {}})
    converted, quantized = (
        next(step for step in found.steps if step.stage == stage)
        for stage in ("convert", "quantize")
    )
    found.settle({converted.path: None})
    assert found.there == 0  # deleted, and not needed
    path = tmp_path / converted.path
    path.parent.mkdir(parents=True)
    path.touch()
    assert found.there == converted.kept
    found.follow(found.there)
    disks = {step.path: step.disk for step in found.steps}
    assert disks[quantized.path] == converted.kept + quantized.kept
    assert disks[converted.path] == 0  # it does not run


def test_the_disk_holds_one_file_that_passes_through(toolchain: Path) -> None:
    publish = {"repo": "O/N", "when": "verified", "delete_after": True}
    variants: dict[str, Any] = {"Q8_0": {}, "Q4_0": {}}
    found = forecast(toolchain, split="1M", variants=variants, publish=publish)
    assert found.follow(1000) < 1000 + found.kept
    last = {step.name: step for step in found.steps}
    whole = next(step.kept for step in found.steps if step.stage == "convert")
    for name in variants:
        copy = last[f"{MODEL}-{name}"]
        assert copy.disk == 1000 + whole + last[name].kept + copy.kept


def test_the_profile_that_fits_is_found(
    tmp_path: Path, toolchain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its peak is that of a forecast with the profile; shards is not needed if lean fits."""
    write_config(tmp_path, {"repo": f"Owner/{MODEL}", "revision": COMMIT})
    with serving(tmp_path, monkeypatch):

        def found(free: int = 10**12, **lean: Any) -> dict[str, Any]:
            return totals(tmp_path, monkeypatch, LlamaCpp(toolchain), free, **lean)

        usual, lean, shards = (found(lean=kind)["peak"] for kind in (False, True, "shards"))
        assert shards < lean < usual and found()["smaller"] == {}
        assert found(lean)["smaller"] == {"lean": lean}
        assert found(shards)["smaller"] == found(1)["smaller"] == {"lean": lean, "shards": shards}
        assert found(shards, lean=True)["smaller"] == {"shards": shards}
        assert found(1, lean="shards")["smaller"] == {}


@pytest.mark.parametrize(
    ("broken", "reason"),
    [
        (holes, "this file system cannot free a part of a file"),
        (storage, "file locks do not work on this file system"),
    ],
)
def test_where_nothing_can_be_freed_no_profile_is_advised(
    tmp_path: Path,
    toolchain: Path,
    monkeypatch: pytest.MonkeyPatch,
    broken: ModuleType,
    reason: str,
) -> None:
    """A lean build needs as much there, and says so."""
    write_config(tmp_path, {"repo": f"Owner/{MODEL}", "revision": COMMIT})
    with serving(tmp_path, monkeypatch):
        usual = totals(tmp_path, monkeypatch, LlamaCpp(toolchain))["peak"]
        name = "are_supported" if broken is holes else "locks_work"
        monkeypatch.setattr(broken, name, lambda _: False)
        for kind in (False, True, "shards"):
            found = planned(tmp_path, monkeypatch, LlamaCpp(toolchain), 1, lean=kind)
            about = found.totals()
            assert (about["peak"], about["smaller"]) == (usual, {})
            said = [f"note: nothing is freed on the way: {reason}"] if kind else []
            assert found.notes == said
            assert f"profiles/shards need as much, because {reason}: " in in_words(about)


def test_the_memory_of_gpus_counts(
    tmp_path: Path, toolchain: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As for the jobs."""
    write_config(tmp_path, {"path": str(CHECKPOINTS / MODEL)})
    monkeypatch.setattr(memory, "needed", lambda size: 2 << 30)
    llama = LlamaCpp(toolchain)
    assert totals(tmp_path, monkeypatch, llama)["memory"] == 1 << 30
    monkeypatch.setattr(memory.process, "has_gpu", lambda: True)
    monkeypatch.setattr(LlamaCpp, "gpu_memory", lambda _: 4 << 30)
    assert totals(tmp_path, monkeypatch, llama)["memory"] == 5 << 30


def test_an_unknown_model_is_named(tmp_path: Path, toolchain: Path) -> None:
    write_config(tmp_path, {"path": str(CHECKPOINTS / MODEL)})
    done = plan(tmp_path, toolchain, None, "n")
    assert done.returncode == 1
    assert done.stderr == "error: config.yaml: there is no model 'n': models has m\n"
