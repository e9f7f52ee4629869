"""Resources: every rule asks for threads, memory, disk and time that fit what it does."""

import json
import shutil
import subprocess
import sys
from math import prod
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hostile_text
import pytest
from conftest import CHECKPOINTS, ROOT
from mtpforge import processors
from mtpforge.checkpoint.checkpoint import Checkpoint
from mtpforge.checkpoint.safetensors import CheckpointTensor
from mtpforge.forecast.costs import Machine
from mtpforge.forecast.steps import ModelForecast
from mtpforge.hub.listing import File, Listing
from mtpforge.llama_cpp import memory
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.rules import layout, resources
from mtpforge.rules.build import Build
from mtpforge.rules.resources import UNKNOWN, Needs
from mtpforge.rules.variant import HubRepository
from repository import Repository
from sparse import write_35b

REVISION = "0123456789" * 4
RUNS_LLAMA = {
    "imatrix", "acceptance", "verify", "verify_split", "verify_sidecar", "verify_mmproj",
    "reference_logits", "measure", "search_logits", "sensitivities", "sensitivities_share",
    "compare", "measure_other", "conversations",
}  # fmt: skip
PARALLEL = RUNS_LLAMA | {
    "piece", "quantize", "program", "errors", "convert", "convert_split", "inject"
}  # fmt: skip
HASHES = {"card"}
BESIDE = {"resolve", "fetch", "fetch_head", "upload", "program"}
SOURCE = {"repo": "owner/large", "revision": REVISION}
CONFIG = {
    "models": {
        "large": {
            "source": SOURCE,
            "measure": {"n_max": [1], "text": str(ROOT / "tests/checkpoints/held-out.txt")},
            "variants": {"BF16": {}, "Q4_K_M": {}, "IQ3_S": {"tensors": {"attn_": "Q6_K"}}},
        }
    }
}
EXAMPLE = {
    "model": "large", "base": "large", "variant": "Q4_K_M", "name": "Q4_K_M", "kind": "quantized",
    "part": "all", "repo": "owner/large", "revision": REVISION, "file": "large.safetensors",
    "place": "x", "donor": "x", "stem": "large-Q4_K_M", "text": "x", "piece": "1", "pieces": "2",
    "type": "Q8_0", "figure": "speed", "program": "llama-server", "matrix": "plain",
    "method": "class",
}  # fmt: skip
WALK = """\
import json, sys
from pathlib import Path
from snakemake.api import SnakemakeApi
from snakemake.settings.types import OutputSettings, Quietness, ResourceSettings
cores, example = sys.argv[1:]
with SnakemakeApi(OutputSettings(quiet={Quietness.ALL})) as api:
    found = api.workflow(
        resource_settings=ResourceSettings(cores=int(cores)),
        snakefile=Path("Snakefile"),
    )._workflow
    rules = {}
    for rule in found.rules:
        wildcards = {name: json.loads(example)[name] for name in rule.wildcard_names}
        jobs = [rule.expand_resources(wildcards, [], attempt) for attempt in (1, 2)]
        asked = [{key: value for key, value in job.items()} for job in jobs]
        rules[rule.name] = [rule.shellcmd, rule.priority, *asked]
print(json.dumps(rules, default=str))
"""


def wildcards(**values: str) -> Any:
    return SimpleNamespace(**{**EXAMPLE, **values})


def write_listing(
    folder: Path,
    weights: int,
    dtype: str = "BF16",
    name: str = "x",
    experts: dict[str, tuple[int, ...]] | None = None,
) -> None:
    """The listing of a checkpoint with this many weights, or integers of packed ones."""
    shapes = {name: (weights,), **(experts or {})}
    tensors = {
        name: CheckpointTensor(name, dtype, shape, "large.safetensors", 0, 2 * prod(shape))
        for name, shape in shapes.items()
    }
    file = File(2 * weights + 100, "0" * 64)
    path = folder / f"resources/hub/owner/large/{REVISION}/files.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    Listing("owner/large", REVISION, {"large.safetensors": file}, tensors).write(path)


@pytest.fixture
def large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a model with 10^10 weights is listed."""
    write_listing(tmp_path, 10**10)
    (tmp_path / "workflow").symlink_to(ROOT / "workflow")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def walk(folder: Path, cores: int, config: dict[str, Any]) -> dict[str, Any]:
    """Command, priority, and resources in two attempts of each rule, with `threads: 2`."""
    copy = Repository(folder / "copy", folder)
    copy.config = {**config, "threads": 2}
    copy.write_config()
    write_listing(copy.path, 10**10)
    command = [sys.executable, "-c", WALK, str(cores), json.dumps(EXAMPLE)]
    done = subprocess.run(command, cwd=copy.path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rules: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return rules


@pytest.mark.parametrize("cores", [1, 3])
def test_every_rule_asks_for_what_it_needs(large: Path, cores: int) -> None:
    rules = walk(large, cores, CONFIG)
    assert len(rules) > 30
    for name, (shell, priority, first, second) in rules.items():
        if shell is None:
            continue
        assert 100 <= first["mem_mb"] < 50_000, name
        assert second["mem_mb"] >= 2 * first["mem_mb"] - 1, name
        assert 50 <= first["disk_mb"] < 60_000, name
        assert 10 <= first["runtime"] <= second["runtime"] <= 24 * 60, name
        assert ("{threads}" in shell) == (name in PARALLEL), name
        assert first["_cores"] == (min(cores, 2) if name in PARALLEL | HASHES else 1), name
        taken = cores if name == "measure" else 0 if name in BESIDE else first["_cores"]
        assert first.get("processors", 0) == taken, name
        assert ("gpu" in first) == (name in RUNS_LLAMA), name
        assert first.get("gpu", 0) == 0, name
        assert priority == {"resolve": 100, "fetch": 50, "fetch_head": 50}.get(name, 0), name
    assert rules["verify"][2]["mem_mb"] < rules["acceptance"][2]["mem_mb"]
    # It takes seconds, and so no threads: those that it reckons with are no reason to wait.
    assert rules["plan_types"][2]["piece_threads"] == min(cores, 2)


def test_nothing_is_made_while_a_file_that_is_deleted_then_is_uploaded(large: Path) -> None:
    place = {"repo": "owner/made", "when": "verified", "delete_after": True}
    models = {"large": {**CONFIG["models"]["large"], "publish": place}}
    _, _, upload, _ = walk(large, 3, {"models": models})["upload"]
    assert upload["processors"] == 3 and upload["_cores"] == 1


def test_a_file_that_is_run_gets_a_third_more_and_four_gigabytes(large: Path) -> None:
    needs = Build(CONFIG).needs
    for found, least in (
        (needs.acceptance(wildcards()), 20e9),
        (needs.verify(wildcards(variant="BF16")), 20e9),
        (needs.verify(wildcards(variant="Q4_K_M")), 10**10 / 8 * 4.9),
        (needs.measure(wildcards(variant="IQ3_S")), 10**10 / 8 * 6.6),
    ):
        assert memory.needed(int(least)) < found.memory < 1.5 * memory.needed(int(least))
    assert needs.convert(wildcards()).memory < 2e9
    assert 20e9 <= needs.convert(wildcards()).disk < 22e9
    assert needs.fetch(wildcards()).disk == 20e9 + 100


def test_before_it_is_listed_a_checkpoint_has_an_ordinary_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "workflow").symlink_to(ROOT / "workflow")
    needs = Build(CONFIG).needs
    assert needs.convert(wildcards()).disk == UNKNOWN
    write_listing(tmp_path, 10**9)
    assert needs.convert(wildcards()).disk == 2e9


@pytest.mark.parametrize(
    ("names", "size"),
    [
        (["x-00001-of-00002.gguf", "x-00002-of-00002.gguf", "y.gguf"], 2e9),
        (["x-00001-of-00002.gguf.part1of2", "x-00001-of-00002.gguf.part2of2"], 2e9),
        (["y.gguf"], UNKNOWN / 3),
    ],
)
def test_a_base_is_as_large_as_its_shards_or_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str], size: float
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "workflow").symlink_to(ROOT / "workflow")
    path = tmp_path / f"resources/hub/owner/base/{REVISION}/files.json"
    path.parent.mkdir(parents=True)
    files = {name: File(10**9, "0" * 64) for name in names}
    Listing("owner/base", REVISION, files, {}).write(path)
    base = {"repo": "owner/base", "revision": REVISION, "file": "x-00001-of-00002.gguf"}
    models = {"large": {"source": SOURCE, "variants": {"Q4_K_M": {"base": base}}}}
    found = Build({"models": models}).needs.inject(wildcards()).disk
    assert size + 0.05 * UNKNOWN < found < size + 0.1 * UNKNOWN  # a head, also on its own


def test_a_local_checkpoint_is_as_large_as_its_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    tiny = CHECKPOINTS / "tiny-qwen3.5"
    models = {"large": {"source": {"path": str(tiny)}, "variants": {"Q4_K_M": {}}}}
    found = Build({"models": models}).needs.convert(wildcards()).disk
    assert found == sum(file.stat().st_size for file in tiny.glob("*.safetensors"))
    assert found > 1e6


def test_hashing_a_local_checkpoint_takes_as_long_as_its_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    write_35b(tmp_path / "35b")

    def seconds(path: Path) -> float:
        models = {"large": {"source": {"path": str(path)}, "variants": {"Q4_K_M": {}}}}
        job = wildcards(place=layout.place(str(path)))
        return Build({"models": models}).needs.local_files(job).seconds

    assert seconds(tmp_path / "35b") > 70e9 / 12e6 > 1 > seconds(CHECKPOINTS / "tiny-qwen3.5")


def test_jobs_ask_for_more_than_is_forecast(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_35b(tmp_path / "35b")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(CHECKPOINTS / "tiny-qwen3.5" / name, tmp_path / "35b" / name)
    model = {
        "source": {"path": "35b"},
        "tokenizer_pre": "qwen35",
        "prompts": str(ROOT / "workflow/prompts"),
        "measure": {"n_max": [1], "text": str(CHECKPOINTS / "held-out.txt")},
        "variants": {
            "BF16": {},
            "Q4_K_M": {"pieces": 2},
            "own": {"base": {"type": "Q8_0"}},
            "found": {"size": "Q4_K_M", "text": str(ROOT / "workflow/texts/mixed.txt")},
        },
        "sidecar": "Q8_0",
    }
    build = Build({"models": {"large": model}})
    steps = ModelForecast(
        build.config.models["large"],
        Checkpoint(tmp_path / "35b"),
        LlamaCpp(Path("none")),
        machine=Machine(threads=processors.available(), memory=200 << 30, disk=1e9, bandwidth=1e10),
        given_size=lambda _: 0,
    ).steps
    stages = {
        "local_files",
        "convert",
        "quantize",
        "inject",
        "acceptance",
        "verify",
        "logits",
        "measure",
    }
    search = {"errors", "search_logits", "sensitivities", "compare"}
    assert {step.stage for step in steps} == stages | search
    for step in steps:
        variant = step.name.removeprefix("35b-")
        kind = Path(step.path).parent.name
        job = wildcards(place=step.name, part=step.name, name=step.name, kind=kind, variant=variant)
        job.type = Path(step.path).stem
        rule = "verify_beside" if variant.startswith("mtp-") else step.stage
        asked = getattr(build.needs, rule)(job)
        assert asked.memory > step.memory and asked.seconds > step.reckoned - 1, step
        assert 1.01 * asked.disk >= step.kept + step.scratch, step


@pytest.mark.parametrize(("memory", "most"), [("16G", 16_000), ("900M", 900), ("9999G", 9_999_000)])
def test_no_job_asks_for_more_than_the_largest_node_has(
    large: Path, memory: str, most: int
) -> None:
    needs = Build({**CONFIG, "memory": memory}).needs
    for rule in (needs.acceptance, needs.convert, needs.small):
        asked = [needs.asked(rule)["mem_mb"](wildcards(), 1, attempt) for attempt in (1, 60)]
        assert max(asked) == min(most, asked[1]) and asked[1] >= min(most, 30_000)


def test_threads_are_those_of_the_machine_or_the_configuration(large: Path) -> None:
    assert Build(CONFIG).needs.threads(wildcards()) == processors.available()
    assert Build({**CONFIG, "threads": 5}).needs.threads(wildcards()) == 5


def test_no_job_asks_for_more_than_a_day(large: Path) -> None:
    runtime = Build(CONFIG).needs.asked(lambda _: Needs(seconds=50_000))["runtime"]
    assert [runtime(None, 1, attempt) // 60 for attempt in (1, 2, 3)] == [14, 24, 24]


def test_measuring_gets_its_minutes_and_a_round_of_a_slow_machine(large: Path) -> None:
    def seconds(minutes: int, repeats: int = 3) -> float:
        settings = {"n_max": [1, 2, 3, 4], "minutes": minutes, "repeats": repeats}
        models = {"large": {**CONFIG["models"]["large"], "measure": settings}}
        return Build({"models": models}).needs.measure(wildcards(variant="BF16")).seconds

    assert seconds(60) - seconds(1) == pytest.approx(59 * 60)
    assert 3600 < seconds(60) == seconds(60, repeats=9) < 8 * 3600
    assert seconds(60_000) == seconds(90_000) < 60_000 * 60  # all rounds take less


@pytest.mark.parametrize(
    "experts",
    [
        {"model.layers.0.mlp.experts.down_proj": (128, 1000, 70_000)},
        {f"model.layers.0.mlp.experts.{each}.w1": (1000, 70_000) for each in range(128)},
    ],
    ids=["stacked", "one by one"],
)
def test_of_experts_only_those_that_run_take_time(
    large: Path, experts: dict[str, tuple[int, ...]]
) -> None:
    def seconds() -> list[float]:
        needs, job = Build(CONFIG).needs, wildcards()
        rules = (needs.acceptance, needs.verify, needs.measure, needs.logits, needs.measure_other)
        return [rule(job).seconds for rule in rules]

    dense = seconds()
    write_listing(large, 10**9, experts=experts)
    for of_experts, of_all in zip(seconds(), dense, strict=True):
        assert 0.05 * of_all < of_experts < 0.6 * of_all


def test_memory_and_time_follow_the_threads_of_a_job_not_those_of_this_machine(
    large: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processors, "available", lambda: 64)
    needs = Build(CONFIG).needs
    for rule in (needs.toolchain, needs.quantize, needs.compare):
        runtime = needs.asked(rule)["runtime"]
        few, many = (runtime(wildcards(), threads=threads, attempt=1) for threads in (1, 16))
        assert few > many, rule
    mem_mb = needs.asked(needs.toolchain)["mem_mb"]
    assert 16_000 < mem_mb(wildcards(), threads=16, attempt=1) < 20_000
    assert 2_000 < mem_mb(wildcards(), threads=2, attempt=1) < 4_000


@pytest.mark.parametrize(
    ("files", "gpus"),
    [
        ({"llama-server": b"ELF"}, 0),
        ({"llama-server": b"ELF\0libcudart.so.12\0"}, 1),
        ({"llama-server": b"ELF", "libggml-cuda.so": b""}, 1),
        ({"llama-server": b""}, 0),
    ],
)
def test_programs_with_cuda_get_a_gpu(large: Path, files: dict[str, bytes], gpus: int) -> None:
    (large / "bin").mkdir()
    for name, content in files.items():
        (large / "bin" / name).write_bytes(content)
    toolchain = {"llama_cpp": {"bin_dir": str(large / "bin")}}
    assert Build({**CONFIG, "toolchain": toolchain}).needs.gpu(wildcards()) == gpus
    assert Build(CONFIG).needs.gpu(wildcards()) == 0


def test_another_attempt_gets_more_memory_and_time(large: Path) -> None:
    found = Build(CONFIG).needs.asked(lambda _: Needs(memory=1e9, disk=2e9, seconds=1200))
    assert [found["mem_mb"](None, 1, attempt) for attempt in (1, 3)] == [1000, 3000]
    assert [found["runtime"](None, 1, attempt) for attempt in (1, 3)] == [40, 120]
    assert found["disk_mb"](None, 1) == 2000


PACKED = {  # element type and name, and how many weights an element has
    "int4": ("I32", "x.weight_packed", 8),
    "gptq": ("I32", "x.qweight", 8),
    "fp4": ("U8", "x.weight", 2),
    "fp8": ("F8_E4M3", "x.weight", 1),
    "table": ("I32", "x.tid2eid", 1),
}


@pytest.mark.parametrize("kind", PACKED)
def test_packed_weights_count_as_many_in_bf16(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Else a job asks for less memory than its file needs, and leaves it unmeasured there."""
    monkeypatch.chdir(tmp_path)
    dtype, name, weights = PACKED[kind]
    write_listing(tmp_path, 1000, dtype, name)
    assert resources._of_source(HubRepository(**SOURCE)) == 2 * weights * 1000


@pytest.mark.parametrize(
    ("settings", "growth"),
    [
        ({"quant_method": "gptq", "bits": 4}, 4),
        ({"config_groups": {"group_0": {"weights": {"num_bits": 4}}}}, 4),
        ({"quant_algo": "NVFP4"}, 4),
        ({"quant_method": "gptq", "bits": 8}, 2),
        ({"quant_method": "fp8"}, 2),
        (None, 1),
    ],
)
def test_a_local_checkpoint_grows_by_its_bits(
    tmp_path: Path, settings: dict[str, Any] | None, growth: int
) -> None:
    config = {"quantization_config": settings} if settings else {}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(bytes(1000))
    assert resources._of_folder(str(tmp_path)) == growth * 1000


@pytest.mark.parametrize("kind", [*hostile_text.OWN, "deep", "a list"])
def test_a_hostile_configuration_is_left_to_the_job_that_reads_it(
    tmp_path: Path, kind: str
) -> None:
    config = tmp_path / "config.json"
    if kind in hostile_text.OWN:
        hostile_text.special(config, kind)
    else:
        config.write_text("[" * 100_000 if kind == "deep" else "[1]")
    assert resources._of_folder(str(tmp_path)) == UNKNOWN
