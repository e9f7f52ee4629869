"""Real Snakemake prints a few lines of ours, or everything with --verbose."""

import re
from collections import Counter
from pathlib import Path

import pytest
from mtpforge.rules.console import UNSEEN
from repository import CONFIG, Repository

FOLDER = "results/tiny-qwen3.5"
FILE = f"{FOLDER}/tiny-qwen3.5-Q8_0.gguf"
LOCATIONS = ("files     ", "reports   ", "serve     ", "next      ")


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, toolchain: Path) -> Repository:
    return Repository(tmp_path_factory.mktemp("output") / "repository", toolchain)


@pytest.fixture(scope="module")
def jobs(repository: Repository) -> int:
    """Number of jobs in the first run that are shown."""
    return sum(count for rule, count in repository.pending().items() if rule not in UNSEEN)


@pytest.fixture(scope="module")
def first(repository: Repository, jobs: int) -> list[str]:
    """All lines of a run that builds everything."""
    return lines(repository, 0, told="")


def lines(
    repository: Repository, status: int, *arguments: str, target: str = "all", told: str = "told"
) -> list[str]:
    done = repository.snakemake("--cores", "1", *arguments, target=target, MTPFORGE_FORECAST=told)
    assert done.returncode == status, done.stdout[-2000:] + done.stderr[-4000:]
    assert done.stdout == ""
    return done.stderr.splitlines()


def labels(shown: list[str], word: str) -> Counter[str]:
    found = (
        re.match(rf"\d\d:\d\d:\d\d {word} +(.*?)(?: \([^()]*, \d+/\d+\).*)?$", line)
        for line in shown
    )
    return Counter(match[1] for match in found if match)


def test_each_job_has_a_start_line_and_an_end_line(first: list[str], jobs: int) -> None:
    assert labels(first, "start") == labels(first, "done")
    assert labels(first, "start").total() == jobs
    assert "tiny-qwen3.5: verify Q8_0" in labels(first, "done")


def test_a_build_is_forecast_before_its_first_job(first: list[str]) -> None:
    """On a busy machine it may take too long, which is said."""
    told = [line for line in first if re.match(r"to do: \d+ of \d+ long jobs|no forecast", line)]
    started = next(number for number, line in enumerate(first) if " start " in line)
    assert len(told) == 1 and told[0] in first[:started]


def test_nothing_else_is_shown(first: list[str], jobs: int) -> None:
    progress = labels(first, r"\.\.\.").total()
    assert len(first) <= 2 * jobs + progress + 14, "\n".join(first)
    assert all(len(line) < 300 for line in first), max(first, key=len)


def test_an_end_line_has_time_count_and_figure(first: list[str]) -> None:
    (line,) = [line for line in first if " done " in line and "verify Q8_0" in line]
    assert re.search(
        r"verify Q8_0 \([\d.]+ (s|min \d+ s), \d+/\d+\): "
        r"\d+ of \d+ drafts accepted \(9\d\.\d%\)$",
        line,
    )


def test_a_run_ends_with_the_summary_and_its_folder(
    repository: Repository, first: list[str]
) -> None:
    ends_with_the_summary(repository, first)
    assert any(re.match(r"\d+ jobs done in ", line) for line in first)
    again = lines(repository, 0, told="")
    assert not any(line.startswith("to do: ") for line in again)
    assert any(line.startswith("Nothing to be done") for line in again)
    ends_with_the_summary(repository, again)


def ends_with_the_summary(repository: Repository, shown: list[str]) -> None:
    summary = (repository.path / "results/summary.md").read_text()
    table = summary.partition("\nDistance from BF16")[0].splitlines()
    assert shown[-5 - len(table) : -5] == table
    assert shown[-5] == ""
    assert all(line.startswith(name) for line, name in zip(shown[-4:], LOCATIONS, strict=True))
    assert FOLDER in shown[-4]
    served = f"llama-server -m {FILE} --spec-type draft-mtp --spec-draft-n-max 1"
    assert shown[-2].endswith(served)


def test_a_dry_run_lists_its_jobs_and_counts_them(repository: Repository, first: list[str]) -> None:
    shown = lines_of_a_dry_run(repository, "--forcerun", "summary")
    assert "summarize all verified and measured files [forced execution]" in shown
    assert "Job stats:" in shown and len(shown) < 20
    assert not any(line.startswith((*LOCATIONS, "to do: ")) for line in shown)


def lines_of_a_dry_run(repository: Repository, *arguments: str) -> list[str]:
    done = repository.snakemake("--dry-run", *arguments, MTPFORGE_FORECAST="")
    assert done.returncode == 0, done.stderr
    return (done.stdout + done.stderr).splitlines()


def test_verbose_shows_the_output_of_snakemake_and_programs(
    repository: Repository, first: list[str]
) -> None:
    shown = lines(repository, 0, "--verbose", "--forcerun", "summary")
    assert any(re.match(r"Job \d+: summarize", line) for line in shown)
    assert any(line.startswith("Finished jobid: ") for line in shown)
    assert "Building DAG of jobs..." in shown and "Job stats:" in shown
    summary = (repository.path / "results/summary.md").read_text()
    table = summary.partition("\nDistance from BF16")[0].splitlines()
    assert shown.count(table[-1]) == 2  # the program's and the run's
    assert labels(shown, "start").total() == 0


def test_a_failure_names_file_check_and_log_once(repository: Repository, first: list[str]) -> None:
    model = {**CONFIG["models"]["tiny-qwen3.5"], "min_acceptance": 1.0}
    repository.config["models"] = {"tiny-qwen3.5": model}
    repository.write_config()
    shown = lines(repository, 1, target=FILE)
    log = "logs/tiny-qwen3.5/verify-tiny-qwen3.5-Q8_0.log"
    assert labels(shown, "FAILED").total() == 1
    start = shown.index("tiny-qwen3.5: verify Q8_0")
    error, file, where, empty, advice = shown[start + 1 :]
    assert re.match(r"  error  Q8_0.gguf is not published: drafting: .* fewer than 100%", error)
    assert file == f"  file   {FILE}"
    assert where == f"  log    {log}"
    assert empty == "" and "1 failed" in advice and "same command again" in advice
    text = "\n".join(shown)
    assert text.count(log) == 1 and text.count("fewer than 100%") == 1
    withdrawn = [line for line in shown if line.startswith("removed ")]
    assert len(withdrawn) == 3  # both pages of the card, and sums
    assert len(shown) - len(withdrawn) <= 8 + 2 * labels(shown, "start").total()
