"""The forecast of a build beside real Snakemake: its disk, what reruns and why."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, Run
from repository import CONFIG, Repository

MODEL = "tiny-qwen3.5"
NEAR = 0.05


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, toolchain: Path) -> Repository:
    copy = Repository(tmp_path_factory.mktemp("plan") / "repository", toolchain)
    configure(copy, {"BF16": {}, "Q8_0": {"pieces": 4}})
    return copy


def configure(repository: Repository, variants: dict[str, Any]) -> None:
    model = CONFIG["models"][MODEL]
    repository.config["models"] = {MODEL: {**model, "variants": variants}}
    repository.write_config()


def plan(repository: Repository, *options: str) -> "subprocess.CompletedProcess[str]":
    done = subprocess.run(
        [sys.executable, "workflow/scripts/plan.py", *options],
        cwd=repository.path, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done


def planned(repository: Repository) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(plan(repository, "--json").stdout)
    return found


def reasons(repository: Repository) -> dict[str, str]:
    """Why each step will run."""
    steps = planned(repository)["models"][MODEL]["steps"]
    return {f"{each['stage']} {each['name']}": each["why"] for each in steps if each["why"]}


def disk(folder: Path) -> int:
    """Bytes of the files, those with several names once."""
    sizes: dict[int, int] = {}
    for path in folder.rglob("*"):
        try:
            about = path.lstat()
        except OSError:  # it has just been renamed
            continue
        sizes[about.st_ino] = about.st_size if path.is_file() else 0
    return sum(sizes.values())


def peak_during(folder: Path, work: Callable[[], None]) -> int:
    """The most bytes that a folder has while `work` runs."""
    peak = 0
    ended = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not ended.wait(0.02):
            peak = max(peak, disk(folder))

    sampling = threading.Thread(target=sample)
    sampling.start()
    try:
        work()
    finally:
        ended.set()
        sampling.join()
    return peak


@pytest.mark.alone  # the disk is looked at every 20 ms
def test_disk_and_reruns_are_as_forecast(repository: Repository) -> None:
    """Up to verification, which takes no disk."""
    before = planned(repository)
    assert before["to_run"] == before["steps"] > 0
    results = repository.path / "results"

    def build() -> None:
        done = repository.snakemake(target=f"results/{MODEL}/work/quantized/Q8_0.gguf")
        assert done.returncode == 0, done.stderr[-4000:]

    assert peak_during(results, build) == pytest.approx(before["peak"], rel=NEAR)
    assert disk(results) == pytest.approx(before["disk"], rel=NEAR)
    after = planned(repository)
    assert (after["disk"], after["peak"], after["notes"]) == (0, 0, [])
    running = {"acceptance BF16", *(f"verify {MODEL}-{name}" for name in ("BF16", "Q8_0"))}
    assert reasons(repository) == dict.fromkeys(running, "missing")

    configure(repository, {"BF16": {}, "Q8_0": {"pieces": 4, "head": "BF16"}, "Q6_K": {}})
    found = reasons(repository)
    assert found.keys() == {*running, f"verify {MODEL}-Q6_K", "quantize Q8_0", "quantize Q6_K"}
    assert found["quantize Q6_K"] == "missing" != found["quantize Q8_0"]


def test_the_rule_prints_what_the_program_prints(repository: Repository) -> None:
    done = repository.snakemake("--cores", "1", target="plan")
    assert done.returncode == 0, done.stderr[-4000:]
    assert timeless(done.stdout) == timeless(plan(repository).stdout)


def planned_by(repository: Repository, *options: str) -> str:
    """The command of the rule, as a dry run shows it."""
    done = repository.snakemake("--dry-run", "--printshellcmds", *options, target="plan")
    assert done.returncode == 0, done.stderr[-4000:]
    (command,) = re.findall(r"python \S*plan\.py.*", done.stdout + done.stderr)
    return str(command)


@pytest.mark.parametrize("profile", ["lean", "shards"])
@pytest.mark.parametrize("more", [(), ("--config", "dry_run=true")])
def test_the_rule_forecasts_the_build_of_the_profile(
    repository: Repository, profile: str, more: tuple[str, ...]
) -> None:
    """`--config` replaces that of a profile, so a profile does not set `lean` with it."""
    lean = planned_by(repository, "--workflow-profile", f"profiles/{profile}", *more)
    assert f" --lean {profile} " in lean and "--lean" not in planned_by(repository, *more)


def test_the_machines_of_a_profile_share_what_is_forecast(repository: Repository) -> None:
    machines = ("--set-resources", "plan_types:machines=8")
    assert "--machines 8" in planned_by(repository, *machines)
    assert "--machines" not in planned_by(repository)
    done = subprocess.run(
        ["make", "-n", "plan", "PROFILE=slurm"], cwd=ROOT, capture_output=True, text=True
    )
    assert "plan.py --machines 8" in " ".join(done.stdout.split())


def test_the_command_line_can_turn_off_what_a_profile_sets(repository: Repository) -> None:
    lean = ("--workflow-profile", "profiles/lean")
    assert "--lean" not in planned_by(repository, *lean, "--config", "lean=false")


def test_the_rule_forecasts_the_files_of_configuration_in_use(repository: Repository) -> None:
    more = repository.path / "more.yaml"
    more.write_text(f"models: {{{MODEL}: {{variants: {{Q4_0: {{}}}}}}}}")
    try:
        done = repository.snakemake("--configfile", "more.yaml", target="plan")
    finally:
        more.unlink()
    assert done.returncode == 0, done.stderr[-4000:]
    assert f"{MODEL}-Q4_0 " in done.stdout and f"{MODEL}-Q8_0 " in done.stdout
    assert "results that are there count as current" not in done.stdout


def test_the_page_says_how_to_run_on_a_larger_machine_what_was_left_out(
    repository: Repository,
) -> None:
    """A verdict on the memory is a result like others, and stays."""
    page = (ROOT / "docs/sizing.md").read_text()
    (command,) = re.findall(r"^snakemake .*--forcerun .*$", page, re.MULTILINE)
    options = command.removeprefix("snakemake --cores 8 all ").split()
    done = repository.snakemake("--dry-run", *options)
    assert done.returncode == 0, done.stderr[-4000:]
    assert {"acceptance", "reference_logits", "verify", "measure"} < set(options)


def timeless(text: str) -> str:
    """Without times and free space, and the widths of columns that follow from them."""
    text = re.sub(r"[\d.]+ min \d+ s|[\d.]+ s\b|[\d.]+ GB are free", "", text)
    return re.sub("[ :-]+", " ", text)


def test_before_an_upload_only_what_is_uploaded_is_forecast(tmp_path: Path, run: Run) -> None:
    model = {**CONFIG["models"][MODEL], "variants": {"Q8_0": {}}}
    path = tmp_path / "config.yaml"
    published = {**model, "publish": {"repo": "Owner/Name"}}
    found = {}
    for name, models in (("both", {"a": published, "b": model}), ("one", {"a": published})):
        path.write_text(json.dumps({"models": models}))
        options = ("--published",) if name == "both" else ()
        done = run("plan.py", "--config", path, "--json", *options)
        assert done.returncode == 0, done.stderr
        found[name] = json.loads(done.stdout)["models"].keys()
    assert found["both"] == found["one"] == {"a"}
