"""Memory: limits are found wherever they are set, and too large a BF16 file is proven unrun."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import CHECKPOINTS, Run
from example_records import measurement, report
from mtpforge import processors
from mtpforge.io.text import read_json
from mtpforge.llama_cpp import memory, process
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.measure.measurement import Measurement
from mtpforge.report import summary
from mtpforge.verify.report import Acceptance, Report

TINY = CHECKPOINTS / "tiny-qwen3.5"


@pytest.fixture
def groups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """The usable memory with these limits of control groups, in a process of this group."""

    def usable(own: str, **limits: str) -> int:
        for name, limit in limits.items():
            path = tmp_path / "groups" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(limit)
        (tmp_path / "own").write_text(own)
        return memory.usable()

    monkeypatch.setattr(processors, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(processors, "OWN_CGROUP", tmp_path / "own")
    for name in ("SLURM_MEM_PER_NODE", "SLURM_MEM_PER_CPU", "SLURM_CPUS_ON_NODE"):
        monkeypatch.delenv(name, raising=False)
    return usable


@pytest.mark.parametrize(
    ("own", "limits"),
    [
        ("0::/", {"memory.max": "1000\n"}),
        ("0::/system/job_1/step", {"system/job_1/memory.max": "1000", "memory.max": "2000"}),
        ("0::/job/step", {"job/step/memory.max": "max", "job/memory.max": "1000"}),
        ("4:memory:/", {"memory/memory.limit_in_bytes": "1000\n"}),
        ("5:cpu:/\n4:memory,hugetlb:/a/b\n0::/", {"memory/a/memory.limit_in_bytes": "1000"}),
        ("not a list of groups", {"memory.max": "1000"}),
    ],
)
def test_limits_of_control_groups_are_found(
    groups: Callable[..., int], own: str, limits: dict[str, str]
) -> None:
    assert groups(own, **limits) == 1000


def test_no_limit_leaves_the_memory_of_the_machine(groups: Callable[..., int]) -> None:
    whole = groups("0::/")
    assert whole > 1 << 28
    assert (
        groups("0::/", **{"memory.max": "max", "memory/memory.limit_in_bytes": "9" * 18}) == whole
    )


@pytest.mark.parametrize(
    ("variables", "mebibytes"),
    [
        ({"SLURM_MEM_PER_NODE": "3"}, 3),
        ({"SLURM_MEM_PER_CPU": "2", "SLURM_CPUS_ON_NODE": "4"}, 8),
        ({"SLURM_MEM_PER_NODE": "0"}, None),
        ({"SLURM_MEM_PER_NODE": "many"}, None),
    ],
)
def test_limits_of_slurm_are_found(
    groups: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    variables: dict[str, str],
    mebibytes: int | None,
) -> None:
    whole = groups("0::/")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert memory.usable() == (mebibytes << 20 if mebibytes else whole)


def test_a_large_file_needs_a_third_more_and_four_gigabytes() -> None:
    assert memory.needed(10**10) == 13 * 10**9 + memory.EXTRA
    assert memory.needed(10**7) < 1 << 30


def test_all_shards_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / f"x-0000{number}-of-00002.gguf").write_bytes(bytes(600_000))
    first = tmp_path / "x-00001-of-00002.gguf"
    llama = LlamaCpp(tmp_path)
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "1")
    assert memory.too_large([first], llama) == "1.20 MB do not fit into 1.05 MB of memory"
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "2")
    assert memory.too_large([first], llama) is None


@pytest.mark.parametrize(
    ("devices", "fits"),
    [
        ("", False),  # built without support of the GPU
        ("  CUDA0: NVIDIA H100 (1 MiB, 1 MiB free)", True),
        ("  CUDA0: A (0 MiB, 0 MiB free)\n  CUDA1: B (0 MiB, 0 MiB free)", False),
    ],
)
def test_memory_of_gpus_that_llama_cpp_uses_counts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, devices: str, fits: bool
) -> None:
    server = tmp_path / "llama-server"
    server.write_text(f"#!/bin/sh\ncat <<'END'\nAvailable devices:\n{devices}\nEND\n")
    server.chmod(0o755)
    file = tmp_path / "x.gguf"
    file.write_bytes(bytes(1_200_000))
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "1")
    monkeypatch.setattr(process, "_GPUS", ("/dev/null",))
    assert (memory.too_large([file], LlamaCpp(tmp_path)) is None) == fits


def test_devices_are_named_without_what_changes_by_the_minute(tmp_path: Path) -> None:
    """They stand in records and on the card."""
    server = tmp_path / "llama-server"
    listed = "Available devices:\n  CUDA0: NVIDIA H200 (143155 MiB, 142629 MiB free)"
    server.write_text(f"#!/bin/sh\necho '{listed}'\n")
    server.chmod(0o755)
    assert LlamaCpp(tmp_path).devices() == ("CUDA0: NVIDIA H200 (143155 MiB)",)


# ── programs ──


@pytest.fixture
def bf16(toolchain: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A BF16 file that is larger than the memory of its job."""
    file = tmp_path / "tiny-BF16.gguf"
    digests = ("--digests", tmp_path / "digests.json", "--tokenizer-pre", "qwen35")
    done = run("convert.py", TINY, "--out", file, *digests)
    assert done.returncode == 0, done.stderr
    monkeypatch.setenv("SLURM_MEM_PER_NODE", "4")
    return file


def test_too_large_a_bf16_file_is_proven_without_being_run(
    bf16: Path, run: Run, tmp_path: Path
) -> None:
    options = ("--checkpoint", TINY, "--tokenizer-pre", "qwen35", "--type", "BF16")
    out = tmp_path / "report.json"
    options += ("--head", "BF16", "--digests", tmp_path / "digests.json")
    done = run("verify.py", bf16, *options, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    found = Report.read(out)
    checks = {check.name: check.detail for check in found.checks}
    assert "do not fit into 4.19 MB of memory" in (found.not_run or "")
    assert checks["running"] == f"not run, so no acceptance is known: {found.not_run}"
    assert "100.0% of all weights compared" in checks["values"]
    assert not {"drafting", "same text"} & checks.keys()
    assert summary.acceptance(found) == "not run"


def test_a_damaged_bf16_file_is_refused_without_being_run(
    bf16: Path, run: Run, tmp_path: Path
) -> None:
    content = bytearray(bf16.read_bytes())
    content[-100] ^= 1
    bf16.write_bytes(content)
    options = (
        "--checkpoint",
        TINY,
        "--tokenizer-pre",
        "qwen35",
        "--type",
        "BF16",
        "--head",
        "BF16",
    )
    done = run("verify.py", bf16, *options, "--out", tmp_path / "report.json")
    assert done.returncode == 1 and "values: " in done.stderr


@pytest.fixture
def sidecar(bf16: Path, run: Run, tmp_path: Path) -> tuple[object, ...]:
    """A draft sidecar with a quant of its model, as arguments of verify.py."""
    for part, kind in (("draft", "Q8_0"), ("all", "IQ4_XS")):
        source = tmp_path / f"{part}.gguf"
        options = ("--part", part, "--tokenizer-pre", "qwen35")
        assert run("convert.py", TINY, "--out", source, *options).returncode == 0
        made, digests = tmp_path / f"{part}-{kind}.gguf", tmp_path / f"{part}-{kind}.json"
        options = ("--type", kind, "--head", "Q8_0", "--digests", digests)
        assert run("quantize.py", source, "--out", made, *options).returncode == 0
    (tmp_path / "all.gguf").unlink()
    targets = ("--target", bf16, "--target-recorded", tmp_path / "digests.json")
    targets += ("--target", made, "--target-recorded", digests)
    asked = ("--checkpoint", TINY, "--tokenizer-pre", "qwen35", "--type", "Q8_0", "--head", "Q8_0")
    return tmp_path / "draft-Q8_0.gguf", *targets, *asked, "--out", tmp_path / "report.json"


def test_a_sidecar_is_run_with_the_first_model_that_fits_into_the_memory(
    sidecar: tuple[object, ...], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the smallest, if none does; the report names any but the first."""
    for mebibytes, runs, slow in (
        (64, "tiny-BF16.gguf", False),
        (4, "all-IQ4_XS.gguf", False),
        (1, "all-IQ4_XS.gguf", True),
    ):
        monkeypatch.setenv("SLURM_MEM_PER_NODE", str(mebibytes))
        done = run("verify.py", *sidecar)
        assert done.returncode == 0, done.stdout + done.stderr
        found = Report.read(tmp_path / "report.json")
        checks = {check.name: check.detail for check in found.checks}
        assert found.acceptance and found.acceptance > 0.8 and "same text" in checks
        said = f"run with {runs} instead of tiny-BF16.gguf: 6.62 MB do not fit into"
        assert checks.get("model", "").startswith(said if runs != "tiny-BF16.gguf" else "")
        assert (f"each token reads {runs} from the disk again" in done.stderr) == slow


def test_the_model_that_is_run_is_checked_against_its_own_digests(
    sidecar: tuple[object, ...], run: Run, tmp_path: Path
) -> None:
    target = tmp_path / "all-IQ4_XS.gguf"
    content = bytearray(target.read_bytes())
    content[-100] ^= 1
    target.write_bytes(content)
    done = run("verify.py", *sidecar)
    assert done.returncode == 1 and "all-IQ4_XS.gguf" in done.stderr, done.stderr


def test_each_model_has_its_digests_or_none_has(run: Run, tmp_path: Path) -> None:
    targets = ("--target", "a.gguf", "--target", "b.gguf", "--target-recorded", "a.json")
    done = run("verify.py", "x.gguf", *targets, "--out", tmp_path / "report.json")
    assert done.returncode == 2 and "give one for each --target" in done.stderr


def test_its_acceptance_and_logits_are_left_out(bf16: Path, run: Run, tmp_path: Path) -> None:
    accepted, logits = tmp_path / "acceptance.json", tmp_path / "logits.bin"
    assert run("acceptance.py", bf16, "--out", accepted).returncode == 0
    assert "BF16 was not run" in (Acceptance.read(accepted).skipped or "")
    text = CHECKPOINTS / "held-out.txt"
    digest = tmp_path / "logits.json"
    done = run("reference_logits.py", bf16, "--text", text, "--out", logits, "--digest", digest)
    assert done.returncode == 0 and "no KL divergence: 5." in done.stdout, done.stderr
    assert logits.read_bytes() == b"" and read_json(digest)


def test_its_speed_is_not_measured(bf16: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "measure.json"
    done = run("measure.py", bf16, "--out", out)
    assert done.returncode == 0, done.stderr
    found = Measurement.read(out)
    assert found.verdict.startswith("not measured: 5.") and not found.runs
    assert summary.row(report("x.gguf"), found)[-2:] == ("not run", "-")


def test_no_importance_matrix_is_computed_with_it(
    bf16: Path, fails: Callable[..., str], tmp_path: Path
) -> None:
    text = CHECKPOINTS / "held-out.txt"
    said = fails("imatrix.py", bf16, "--text", text, out=tmp_path / "imatrix.gguf")
    assert "do not fit into 4.19 MB of memory" in said and "take a published one" in said


def test_a_measurement_without_runs_can_be_shown(tmp_path: Path, run: Run) -> None:
    measurement(by_n_max=(), runs=(), verdict="not measured: too large").write(tmp_path / "m.json")
    done = run("plot.py", "speed", tmp_path / "m.json", "--out", tmp_path / "speed.svg")
    assert done.returncode == 0, done.stderr
    assert "not measured" in (tmp_path / "speed.svg").read_text()
