"""No job is tied to a thing that decides its result by a file whose time and content are ignored.

Snakemake does not look at jobs below one that reruns, and leaves out those that are tied to it by
`ancient` files alone. So there must also be a way from the one to the other by compared files.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import BIN, ROOT
from mtpforge.llama_cpp.compilation import PROGRAMS
from mtpforge.rules import layout
from repository import CONFIG, Repository

GRAPH = """
import contextlib, io, json, pathlib, sys
from snakemake.api import SnakemakeApi
from snakemake.settings.types import DAGSettings, OutputSettings, ResourceSettings
with SnakemakeApi(OutputSettings()) as api:
    workflow = api.workflow(ResourceSettings(cores=1), snakefile=pathlib.Path("Snakefile"))
    shown = workflow.dag(DAGSettings(targets={"all", "plots"}))
    with contextlib.redirect_stdout(io.StringIO()):
        shown.printfilegraph()
    dag = workflow._workflow.dag
    jobs = [{
        "id": id(job),
        "rule": job.rule.name,
        "params": [str(value) for value in job.params],
        "code": job.params.get("code"),
        "program": str(job.input[0]) if job.input else "",
        "checkpoint": job.is_checkpoint,
        "inputs": {str(file): file.is_ancient for file in job.input},
        "twice": [str(file) for file in job.input if file.is_ancient
                  and any(other == file and not other.is_ancient for other in job.input)],
        "needs": [[id(need), [str(file) for file in files]]
                  for need, files in dag.dependencies[job].items()],
    } for job in dag.jobs]
pathlib.Path(sys.argv[1]).write_text(json.dumps(jobs))
"""
PINNED = {"program", "toolchain", "converter"}
"""Their requirements are parameters, without comments."""
TRIED = {"verify_sidecar", "verify_mmproj"}
"""Their file is tried with a quant of its model if BF16 is too large: any will do."""


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    """All jobs of a configuration that uses nearly every key, before anything is made."""
    folder = tmp_path_factory.mktemp("ties")
    copy = Repository(folder / "repository", BIN)
    shutil.copy(ROOT / "tests/checkpoints/held-out.txt", copy.path / "text.txt")
    given = ("base-00001-of-00002.gguf", "base-00002-of-00002.gguf", "given.gguf", "others.gguf")
    for name in (*given, "texts/a.txt"):
        (copy.path / name).parent.mkdir(exist_ok=True)
        (copy.path / name).touch()
    checkpoint = {"path": "tests/checkpoints/tiny-qwen3.5"}
    variants = {
        "BF16": {},
        "Q8_0": {"split": "500M"},
        "IQ2_S": {"imatrix": {"text": "text.txt"}},
        "chat": {"type": "IQ2_S", "imatrix": {"text": "texts", "chat": True}},
        "IQ2_M": {"imatrix": {"path": "given.gguf"}, "pieces": 2},
        "mine": {"base": {"type": "Q4_0"}},
        "theirs": {"base": {"path": "base-00001-of-00002.gguf"}, "head_from": checkpoint},
    }
    measure = {"text": "text.txt", "n_max": [1]}
    measure |= {"tasks": {"winogrande": "text.txt"}}
    model = {**CONFIG["models"]["tiny-qwen3.5"], "measure": measure, "variants": variants}
    upstream = {**model, "converter": "llama.cpp", "mmproj": True, "variants": {"BF16": {}}}
    target = {"publish": {"repo": "Owner/Name"}}
    native = {**model, **target, "compare": [{"path": "others.gguf"}]}
    models = {"native": {**native, "sidecar": "Q8_0"}, "upstream": {**upstream, "sidecar": "Q8_0"}}
    copy.config["models"] = models
    copy.write_config()
    done = subprocess.run(
        [sys.executable, "-c", GRAPH, str(folder / "jobs.json")],
        cwd=copy.path, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return {job["id"]: job for job in json.loads((folder / "jobs.json").read_text())}


def test_each_job_follows_what_it_reads(jobs: dict[int, dict[str, Any]]) -> None:
    ties = 0
    for job in jobs.values():
        for need, files in job["needs"]:
            if all(job["inputs"].get(file, True) for file in files):
                ties += 1
                of_checkpoint = jobs[need]["checkpoint"]  # then the graph is looked at again
                is_quant = job["rule"] in TRIED and jobs[need]["rule"] in ("verify", "quantize")
                right = of_checkpoint or is_quant or follows(jobs, job, need) or told(jobs, job)
                assert right, (job["rule"], files)
    assert ties > 5


def test_no_input_is_both_compared_and_not(jobs: dict[int, dict[str, Any]]) -> None:
    """Snakemake would take one of the two."""
    assert [job["rule"] for job in jobs.values() if job["twice"]] == []


def test_each_given_file_is_compared_by_its_record(jobs: dict[int, dict[str, Any]]) -> None:
    given = 0
    for job in jobs.values():
        made = {file for _, files in job["needs"] for file in files}
        for file, ancient in job["inputs"].items():
            if ancient and file not in made and job["rule"] not in PINNED | {"local_files"}:
                given += 1
                places = (file, str(Path(file).parent))  # or all texts of a folder
                records = set(map(layout.local_record, places))
                assert records & job["inputs"].keys(), (job["rule"], file)
    assert given > 4


def test_large_files_are_not_compared_by_time(jobs: dict[int, dict[str, Any]]) -> None:
    """Snakemake compares those above 1 MB by time: models, matrices, logits and weights."""
    large = (".gguf", ".bin", ".safetensors")
    for job in jobs.values():
        compared = [file for file, ancient in job["inputs"].items() if not ancient]
        if job["rule"] not in ("all", "plots"):  # these only name what to make
            assert [file for file in compared if file.endswith(large)] == [], job["rule"]


def test_quantization_does_not_wait_for_llama_server(jobs: dict[int, dict[str, Any]]) -> None:
    plans = [stamps(jobs, key) for key, job in jobs.items() if job["rule"] == "plan_types"]
    assert set(map(frozenset, plans)) == {
        frozenset({"llama-quantize"}),
        frozenset({"llama-quantize", "llama-server", "llama-imatrix"}),  # with a matrix
    }
    assert plans.count({"llama-quantize"}) > 2
    verified = [stamps(jobs, key) for key, job in jobs.items() if job["rule"] == "verify"]
    assert {"llama-quantize", "llama-server", "llama-gguf-split"} in verified


def test_a_program_has_a_job_and_a_stamp_of_its_own(jobs: dict[int, dict[str, Any]]) -> None:
    own = [key for key, job in jobs.items() if job["rule"] == "program"]
    assert len(own) == len(PROGRAMS)
    (total,) = (key for key, job in jobs.items() if job["rule"] == "toolchain")
    assert stamps(jobs, total) == set(PROGRAMS)


def stamps(jobs: dict[int, dict[str, Any]], key: int) -> set[str]:
    """The programs whose stamps a job waits for."""
    found: set[str] = set()
    for need, files in jobs[key]["needs"]:
        found |= {Path(file).stem for file in files if Path(file).stem in PROGRAMS}
        found |= stamps(jobs, need)
    return found


def follows(jobs: dict[int, dict[str, Any]], job: dict[str, Any], need: int) -> bool:
    """Whether a job reruns if `need` does, by files that are compared."""
    return any(
        each == need or follows(jobs, jobs[each], need)
        for each, files in job["needs"]
        if not all(job["inputs"].get(file, True) for file in files)
    )


def told(jobs: dict[int, dict[str, Any]], job: dict[str, Any]) -> bool:
    """Whether a job that is not below others notes all that a job has of its own: code and files.

    Then this job reruns because of that one, wherever else Snakemake does not look at it.
    """
    made = {file for _, files in job["needs"] for file in files}
    own = {Path(file).name for file, ancient in job["inputs"].items() if not ancient} - {
        Path(file).name for file in [*made, job["program"]]
    }
    return any(
        job["code"] in noted and all(name in noted for name in own)
        for need, files in job["needs"]
        if not all(job["inputs"][file] for file in files)
        and all(jobs[each]["rule"] == "local_files" for each, _ in jobs[need]["needs"])
        for noted in [" ".join(jobs[need]["params"])]
    )
