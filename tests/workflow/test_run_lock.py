"""One run at a time, which goes on after a kill, and leaves nothing behind after a signal."""

import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from mtpforge.run_owner import RUN_LOCK, Owner
from repository import Repository

pytestmark = pytest.mark.usefixtures("terminal_signals")

TARGET = "results/tiny-qwen3.5/work/convert/all.gguf"
JOB = """
import sys
from pathlib import Path
from mtpforge import cli
from mtpforge.io import atomic
from mtpforge.llama_cpp import process

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]

def main():
    out, digests = (Path(sys.argv[sys.argv.index(name) + 1]) for name in ("--out", "--digests"))
    with atomic.scratch_folder(out), atomic.replacing(out) as temporary:
        temporary.write_text("content")
        if Path("slow").exists():
            with process.running(SLEEP) as child:
                Path("began").touch()
                child.wait()
    atomic.write_text(digests, "{}")

cli.run(main)
"""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Repository:
    """A repository whose conversion takes as long as there is a file `slow`."""
    folder = tmp_path_factory.mktemp("lock")
    made = Repository(folder / "repository", programs=folder)  # no job runs one
    (made.path / "workflow/scripts/convert.py").write_text(JOB)
    return made


@pytest.fixture
def repository(shared: Repository) -> Iterator[Repository]:
    (shared.path / "slow").touch()
    shutil.rmtree(shared.path / "results", ignore_errors=True)
    yield shared
    for run in started:
        with suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()
    started.clear()


started: list["subprocess.Popen[bytes]"] = []


class Running:
    """A run in its own process group, as a shell would start it."""

    def __init__(self, repository: Repository, *command: str) -> None:
        self.path = repository.path
        (self.path / "began").unlink(missing_ok=True)
        snakemake = (sys.executable, "-m", "snakemake", "--cores", "1", TARGET)
        with (self.path / "run.log").open("w") as log:
            self.process = subprocess.Popen(
                command or snakemake, cwd=self.path, stdout=log, stderr=log, start_new_session=True
            )
        started.append(self.process)

    @property
    def log(self) -> str:
        return (self.path / "run.log").read_text()

    def wait_for_job(self) -> list[psutil.Process]:
        """Everything that runs, once the job does."""
        while not (self.path / "began").exists():
            assert self.process.poll() is None, self.log
            time.sleep(0.05)
        return psutil.Process(self.process.pid).children(recursive=True)


def gone(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=10)
    return all(each.status() == psutil.STATUS_ZOMBIE for each in alive)


def left_by_jobs(repository: Repository) -> list[str]:
    found = [*repository.path.glob("results/**/.*"), *repository.path.glob(".snakemake/locks/*")]
    return [path.name for path in found]


def goes_on(repository: Repository) -> str:
    """Run the same command, which must finish, and leave its output and nothing else."""
    (repository.path / "slow").unlink()
    done = repository.snakemake(target=TARGET)
    assert done.returncode == 0, done.stderr
    assert (repository.path / TARGET).read_text() == "content"
    assert left_by_jobs(repository) == []
    return done.stderr


def scratch(repository: Repository) -> Path:
    """The folder of a run's temporary files."""
    owner = Owner.parse((repository.path / ".snakemake" / RUN_LOCK).read_text())
    assert owner
    assert Path(owner.scratch).is_dir()
    return Path(owner.scratch)


def test_a_second_run_says_who_has_the_folder(repository: Repository) -> None:
    first = Running(repository)
    jobs = first.wait_for_job()
    second = repository.snakemake(target=TARGET)
    assert second.returncode == 1
    assert f"this folder is in use by process {first.process.pid} on " in second.stderr
    assert f"{TARGET}: wait for it, or end it" in second.stderr
    dry = repository.snakemake("--dry-run", target=TARGET)
    assert dry.returncode == 0
    assert (
        f"Another run is building here: process {first.process.pid} on " in dry.stdout + dry.stderr
    )
    assert first.process.poll() is None
    first.process.terminate()
    first.process.wait()
    assert gone(jobs)


def test_two_runs_of_one_moment_are_one_run(repository: Repository) -> None:
    (repository.path / "slow").unlink()
    command = [sys.executable, "-m", "snakemake", "--cores", "1", TARGET]
    both = [
        subprocess.Popen(command, cwd=repository.path, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate()[1] for process in both]
    codes = [process.returncode for process in both]
    assert sum("start  tiny-qwen3.5: convert" in text for text in said) == 1, said
    assert codes.count(1) == sum("this folder is in use by" in text for text in said)
    assert (repository.path / TARGET).read_text() == "content"


def test_a_killed_run_is_taken_over(repository: Repository) -> None:
    """By a profile without rerun-incomplete, too."""
    run = Running(repository)
    run.wait_for_job()
    temporary = scratch(repository)
    os.killpg(run.process.pid, signal.SIGKILL)
    run.process.wait()
    assert left_by_jobs(repository) != []
    said = goes_on(repository)
    assert f"Taking over from a run that was killed: process {run.process.pid} on " in said
    assert not temporary.exists()


def test_what_a_kill_left_is_made_again_without_the_profile(repository: Repository) -> None:
    run = Running(repository)
    run.wait_for_job()
    os.killpg(run.process.pid, signal.SIGKILL)
    run.process.wait()
    (repository.path / TARGET).write_text("not whole")  # as a program that writes in place
    (repository.path / "slow").unlink()
    done = repository.snakemake("--workflow-profile", "none", target=TARGET)
    assert done.returncode == 0, done.stderr
    assert (repository.path / TARGET).read_text() == "content"


def test_jobs_end_with_a_run_that_is_killed(repository: Repository) -> None:
    run = Running(repository)
    jobs = run.wait_for_job()
    run.process.kill()
    run.process.wait()
    goes_on(repository)  # although the jobs still ran when it started
    assert gone(jobs)


@pytest.mark.parametrize(
    ("whom", "number"),
    [
        ("run", signal.SIGINT),
        ("run", signal.SIGTERM),
        ("run", signal.SIGHUP),
        ("group", signal.SIGINT),  # Ctrl-C; below, a terminal sends SIGHUP to its group
    ],
)
def test_a_signal_ends_all_and_leaves_nothing(
    repository: Repository, whom: str, number: signal.Signals
) -> None:
    run = Running(repository)
    jobs = run.wait_for_job()
    temporary = scratch(repository)
    send = os.killpg if whom == "group" else os.kill
    send(run.process.pid, number)
    assert run.process.wait(timeout=30) != 0
    assert not any(each.is_running() and each.status() != "zombie" for each in jobs)
    assert left_by_jobs(repository) == []
    assert (repository.path / ".snakemake" / RUN_LOCK).read_text() == ""
    assert not temporary.exists()
    assert "interrupted" in run.log
    assert "Taking over" not in goes_on(repository)


def test_a_closed_terminal_ends_all_and_leaves_nothing(repository: Repository) -> None:
    (repository.path / "began").unlink(missing_ok=True)
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(repository.path)
        os.execv(sys.executable, [sys.executable, "-m", "snakemake", "--cores", "1", TARGET])
    while not (repository.path / "began").exists():
        time.sleep(0.05)
    jobs = psutil.Process(pid).children(recursive=True)
    os.close(terminal)
    os.waitpid(pid, 0)
    assert gone(jobs)
    assert left_by_jobs(repository) == []
    assert "Taking over" not in goes_on(repository)


def test_a_restarted_machine_has_no_run(repository: Repository) -> None:
    """Although another process has the number of that run."""
    leave(repository, replace(Owner.this_process("snakemake", ""), boot="other"))
    assert "Taking over from a run that was killed" in goes_on(repository)


def test_an_owner_on_another_machine_is_left_alone(repository: Repository) -> None:
    here = Owner.this_process("snakemake all", "")
    leave(repository, replace(here, host="elsewhere", boot="other"))
    done = repository.snakemake(target=TARGET)
    assert done.returncode == 1
    assert f"in use by process {here.pid} on elsewhere, since " in done.stderr
    assert "`.venv/bin/snakemake --unlock`" in done.stderr
    assert repository.snakemake("--unlock").returncode == 0
    goes_on(repository)


def leave(repository: Repository, owner: Owner) -> None:
    """Put an owner, and Snakemake's locks, where a killed run leaves them."""
    folder = repository.path / ".snakemake"
    (folder / "locks").mkdir(parents=True, exist_ok=True)
    (folder / "locks/0.output.lock").write_text(f"{TARGET}\n")
    (folder / RUN_LOCK).write_text(owner.as_text())


def test_a_folder_of_its_own_has_its_own_lock(repository: Repository, tmp_path: Path) -> None:
    run = Running(repository)
    jobs = run.wait_for_job()
    link = tmp_path / "tests"
    link.symlink_to(repository.path / "tests")
    for name in ("workflow", "envs"):
        (tmp_path / name).symlink_to(repository.path / name)
    (tmp_path / "config.yaml").write_bytes((repository.path / "config.yaml").read_bytes())
    other = ("--snakefile", str(repository.path / "Snakefile"), "--directory", str(tmp_path))
    done = repository.snakemake(*other, target=TARGET)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / TARGET).read_text() == "content"
    run.process.terminate()
    run.process.wait()
    assert gone(jobs)
