"""A real SLURM of two nodes makes the same bytes as one machine, whatever happens to its jobs.

`make test-slurm` runs all of it; `make test` only a part, if `make test-slurm` has run before.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import slurm
from repository import Repository
from slurm import PYTHON, Slurm

MODEL = "results/tiny-qwen3.5"
QUANTIZED = [f"{MODEL}/work/quantized/{name}.gguf" for name in ("Q8_0", "Q4_0")]
TARGETS = [f"{MODEL}/work/convert/all.gguf", *QUANTIZED]
SLOW = """
    import os
    import time
    from mtpforge.quantize.job import QuantizeJob

    quantize_tensors = QuantizeJob.quantize_tensors

    def slowly(self, names, out, scratch):
        out.write_bytes(b"half")
        Path(f"began-{os.environ.get('SLURMD_NODENAME')}-{os.getpid()}").touch()
        while Path("slow").exists():
            time.sleep(0.1)
        return quantize_tensors(self, names, out, scratch)

    QuantizeJob.quantize_tensors = slowly
"""
OPTIONS = [
    *("--workflow-profile", "profiles/slurm", "--max-threads", "1", "--latency-wait", "10"),
    *("--slurm-no-account", "--slurm-status-command", "squeue"),
    *("--slurm-init-seconds-before-status-checks", "1", "--seconds-between-status-checks", "1"),
    *("--default-resources", "slurm_partition=ci", "mem_mb=500*attempt"),
]
ALL = os.environ.get("MTPFORGE_SLURM") == "all"

pytestmark = [
    pytest.mark.skipif(bool(slurm.missing()), reason=f"SLURM: {slurm.missing()}"),
    pytest.mark.alone,  # two nodes with two processors each
]


class Cluster:
    """A repository whose quantizations wait as long as there is a file `slow`."""

    def __init__(self, repository: Repository, cluster: Slurm) -> None:
        self.path = repository.path
        self.slurm = cluster
        self.log = self.path / "run.log"

    def start(self) -> "subprocess.Popen[str]":
        command = [str(PYTHON), "-m", "snakemake", *TARGETS, *OPTIONS]
        return self.slurm.start(command, self.log, self.path)

    def forget(self) -> None:
        """Remove what was quantized, and all that could be reused."""
        for name in ("quantized", "manifests"):
            shutil.rmtree(self.path / MODEL / "work" / name, ignore_errors=True)
        for began in self.path.glob("began-*"):
            began.unlink()

    def wait_for_jobs(self, run: "subprocess.Popen[str]") -> list[tuple[str, str]]:
        """Node and process number of each program, once all write."""
        deadline = time.monotonic() + 600
        while len(found := list(self.path.glob("began-*"))) < len(QUANTIZED):
            assert run.poll() is None and time.monotonic() < deadline, self.said()
            time.sleep(0.1)
        return [(node, pid) for _, node, pid in (path.name.split("-") for path in found)]

    def finish(self, run: "subprocess.Popen[str]") -> None:
        (self.path / "slow").unlink(missing_ok=True)
        assert run.wait(timeout=600) == 0, self.said()
        assert "another process is writing it" not in self.said()
        assert list(self.path.glob(f"{MODEL}/**/.*")) == []

    def said(self) -> str:
        logs = [self.log, *self.path.glob("logs/**/*.log"), *self.path.glob(".snakemake/**/*.log")]
        return "\n".join(f"{path}:\n{path.read_text('utf-8', 'replace')[-3000:]}" for path in logs)

    def sums(self) -> dict[str, str]:
        return sums(self.path)


def sums(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in TARGETS}


def report(run: str | None, start: float) -> None:
    print(json.dumps({"run": run, "seconds": round(time.monotonic() - start, 1)}))


def make_repository(path: Path, toolchain: Path) -> Repository:
    made = Repository(path, toolchain)
    made.config["models"]["tiny-qwen3.5"]["variants"] = {"Q8_0": {}, "Q4_0": {}}
    made.write_config()
    program = made.path / "workflow/scripts/quantize.py"
    program.write_text(
        program.read_text().replace("    cli.run(main)\n", f"{SLOW}    cli.run(main)\n")
    )
    return made


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, toolchain: Path) -> dict[str, str]:
    """The sums of a local run."""
    local = make_repository(tmp_path_factory.mktemp("local") / "repository", toolchain)
    start = time.monotonic()
    done = local.snakemake(*TARGETS[1:], target=TARGETS[0])
    assert done.returncode == 0, done.stderr
    report("local", start)
    return sums(local.path)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, toolchain: Path) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    running = Slurm(folder)
    try:
        yield Cluster(make_repository(folder / "repository", toolchain), running)
    finally:
        running.close()


def test_the_same_bytes_as_on_one_machine(cluster: Cluster, expected: dict[str, str]) -> None:
    start = time.monotonic()
    cluster.finish(cluster.start())
    report("nothing", start)
    assert cluster.sums() == expected


def cancel(cluster: Cluster, _: list[tuple[str, str]]) -> None:
    """scancel of all jobs."""
    cluster.slurm.run("scancel", "--user=root")


def kill(cluster: Cluster, jobs: list[tuple[str, str]]) -> None:
    """SIGKILL of a program."""
    cluster.slurm.run("kill", "-KILL", jobs[0][1])


def lose(cluster: Cluster, jobs: list[tuple[str, str]]) -> None:
    """A node that is DOWN."""
    node = jobs[0][0]
    cluster.slurm.run("scontrol", "update", f"nodename={node}", "state=down", "reason=test")


@pytest.mark.skipif(not ALL, reason="make test-slurm")
@pytest.mark.parametrize("disturb", [cancel, kill, lose])
def test_a_disturbance_changes_nothing(
    cluster: Cluster,
    expected: dict[str, str],
    disturb: Callable[[Cluster, list[tuple[str, str]]], None],
) -> None:
    cluster.forget()
    (cluster.path / "slow").touch()
    start = time.monotonic()
    run = cluster.start()
    disturb(cluster, cluster.wait_for_jobs(run))
    cluster.finish(run)
    for node in slurm.NODES if disturb is lose else ():
        cluster.slurm.run("scontrol", "update", f"nodename={node}", "state=resume", check=False)
    report(disturb.__doc__, start)
    assert cluster.sums() == expected


def test_a_run_that_is_killed_is_taken_over_with_free_processors(
    cluster: Cluster, expected: dict[str, str]
) -> None:
    """Its jobs go on, on both nodes; the next run makes them end, and runs them again."""
    cluster.forget()
    (cluster.path / "slow").touch()
    start = time.monotonic()
    run = cluster.start()
    first = cluster.wait_for_jobs(run)
    for process in psutil.Process(run.pid).children():
        process.send_signal(signal.SIGKILL)
    run.wait()
    (cluster.path / "run.log").rename(cluster.path / "killed.log")
    for began in cluster.path.glob("began-*"):
        began.unlink()
    run = cluster.start()
    second = cluster.wait_for_jobs(run)
    assert {pid for _, pid in first}.isdisjoint(pid for _, pid in second)
    living = set(cluster.slurm.run("ps", "-e", "-o", "pid=").split())
    assert living.isdisjoint(pid for _, pid in first)
    cluster.finish(run)
    report("kill of Snakemake", start)
    assert {node for node, _ in first} == set(slurm.NODES)
    assert "Taking over from a run that was killed" in (cluster.path / "run.log").read_text()
    assert cluster.sums() == expected
