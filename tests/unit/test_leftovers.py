"""What killed jobs leave is found and removed, but nothing that a living one writes."""

import errno
import fcntl
import os
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import SCRIPTS
from mtpforge.io import leftovers
from mtpforge.io.atomic import replacing, replacing_folder, scratch_folder
from mtpforge.rules import snakemake_lock

COMMIT = "resources/hub/Owner/name/0123456789abcdef0123456789abcdef01234567"
LEFT = (
    "results/m/.m-Q8_0.gguf.part",
    "results/m/.m-Q8_0.part",
    "results/m/.m-Q8_0.old.part",
    "results/m/work/convert/.all.gguf.part",
    "results/m/work/quantized/.IQ4_XS.gguf.scratch",
    "results/m/work/recipes/Q8_0.yaml.part",
    "results/m/work/recipes/Q8_0.yaml.123.part",
    "resources/toolchain/bin/.llama-server.123.part",
    f"{COMMIT}/.files.json.part",
    f"{COMMIT}/records/.model.safetensors.json.part",
)
DOWNLOADS = (
    f"{COMMIT}/name/.model.safetensors.part",
    f"{COMMIT}/name/sub/.model.gguf.part",
    f"{COMMIT}/head/name/.model.safetensors.part",
)
PIECES = (
    "results/m/work/manifests/pieces/quantized/IQ3_S/0123.gguf",
    "results/m/work/manifests/quantized/IQ3_S.gguf",
)
KEPT = (
    "results/m/m-Q8_0.gguf",
    "results/m/work/convert/all.json",
    "results/m/.hidden",
    "results/m/work/manifests/quantized/IQ3_S.json",
    "config.yaml.part",
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in (*LEFT, *DOWNLOADS, *PIECES, *KEPT):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith((".scratch", "Q8_0.part", "old.part")):
            (path / "deep").mkdir(parents=True)
            (path / "deep/.x.part").write_bytes(bytes(1_000_000))
        else:
            path.write_bytes(bytes(1_000_000))
    return tmp_path


def left(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_only_what_killed_jobs_left_is_removed(folder: Path) -> None:
    removed = leftovers.remove()
    assert {str(path) for path in removed} == set(LEFT)
    assert left(folder) == {*DOWNLOADS, *PIECES, *KEPT}


def test_what_a_living_job_writes_stays(folder: Path) -> None:
    results = folder / "results/m"
    with (
        replacing(results / "x.gguf") as file,
        replacing_folder(results / "split") as split,
        scratch_folder(results / "x.gguf") as scratch,
    ):
        for path in (file, split / "1.gguf", scratch / "part.gguf"):
            path.write_text("living")
        program = "from mtpforge.io import leftovers; leftovers.remove()"
        subprocess.run(
            [sys.executable, "-c", program], env={"PYTHONPATH": str(SCRIPTS)}, check=True
        )
        assert all(path.exists() for path in (file, split / "1.gguf", scratch / "part.gguf"))


def test_what_is_left_on_nfs_is_removed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It locks only files that are open for writing, and folders on this machine alone."""
    flock = fcntl.flock

    def of_nfs(descriptor: int, operation: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        if not is_folder and not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_RDWR:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", of_nfs)
    assert {str(path) for path in leftovers.remove()} == set(LEFT)


def test_a_pipe_and_a_link_are_removed_without_being_opened(folder: Path) -> None:
    (folder / "results/.pipe.part").unlink(missing_ok=True)
    subprocess.run(["mkfifo", folder / "results/.pipe.part"], check=True)
    (folder / "results/.link.part").symlink_to(folder / "config.yaml.part")
    leftovers.remove()
    assert left(folder) == {*DOWNLOADS, *PIECES, *KEPT}
    assert not (folder / "results/.link.part").is_symlink()


def run_of(target: str, **asked: object) -> SimpleNamespace:
    """As much of Snakemake's workflow as tells which files a run has made."""
    settings = {"until": set(), "omit_from": set(), "batch": None, **asked}
    job = SimpleNamespace(rule=SimpleNamespace(name=target))
    return SimpleNamespace(
        dag_settings=SimpleNamespace(**settings), dag=SimpleNamespace(jobs=[job])
    )


@pytest.mark.parametrize(
    "run", [run_of("summary"), run_of("all", until={"plan_types"}), run_of("all", batch="all=1/2")]
)
def test_pieces_stay_until_all_files_are_finished(folder: Path, run: SimpleNamespace) -> None:
    snakemake_lock.clear_pieces(run, ["results/m"])
    assert {*PIECES} <= left(folder)


def test_pieces_of_other_models_stay(folder: Path) -> None:
    snakemake_lock.clear_pieces(run_of("all"), ["results/other"])
    assert {*PIECES} <= left(folder)
    snakemake_lock.clear_pieces(run_of("all"), ["results/m"])
    assert not {*PIECES} & left(folder)
    assert {*KEPT} <= left(folder)


def clean_work(*arguments: str) -> str:
    command = [sys.executable, SCRIPTS / "clean_work.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_clean_work_lists_with_sizes_and_deletes_if_asked(folder: Path) -> None:
    made = folder / "results/m/work/trunk/Q4_0.gguf"
    shared = folder / "results/m/work/quantized/Q8_0.gguf"
    for path in (made, shared):
        path.parent.mkdir(exist_ok=True)
    made.write_bytes(bytes(2_000_000))
    shared.hardlink_to(folder / "results/m/m-Q8_0.gguf")
    before = left(folder)
    listed = clean_work()
    assert left(folder) == before
    expected = [*LEFT, *DOWNLOADS, *PIECES, "results/m/work/trunk/Q4_0.gguf"]
    expected[expected.index(PIECES[0])] = "results/m/work/manifests/pieces"
    found = [line.split()[-1] for line in listed.splitlines() if line.startswith("  ")]
    assert sorted(found) == sorted(expected)
    assert "     2.00 MB  results/m/work/trunk/Q4_0.gguf\n" in listed
    assert listed.endswith("17.00 MB in all; nothing was deleted: make clean-work YES=1\n")
    assert "nothing was deleted" not in clean_work("--yes")
    assert left(folder) == {
        *KEPT,
        "results/m/work/quantized/Q8_0.gguf",
        ".snakemake/mtpforge-run.lock",
        ".snakemake/mtpforge-jobs.lock",
    }
