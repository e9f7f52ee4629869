"""Downloads run while all processors are busy; measuring has the machine to itself."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import SCRIPTS

SNAKEFILE = f"""\
import sys
sys.path.insert(0, {str(SCRIPTS)!r})
from mtpforge.rules.config import parse
from mtpforge.rules.resources import Needs, ResourceRules, free_downloads

free_downloads(workflow)
needs = lambda _: Needs()
asked = ResourceRules(parse(dict(models=dict()))).asked
many = int(config["threads"])
note = 'echo {{rule}} {{threads}} start >> events; sleep 1.5;' \
    ' echo {{rule}} {{threads}} end >> events'

rule all:
    input: "quantize", "fetch", "recipe", "measure",

rule quantize:
    output: touch("quantize")
    threads: many
    resources: **asked(needs),
    shell: note

rule fetch:
    output: touch("fetch")
    resources: **asked(needs, beside=True), download=1,
    shell: note

rule recipe:
    output: touch("recipe")
    resources: **asked(needs),
    shell: note

rule measure:
    output: touch("measure")
    threads: many
    resources: **asked(needs, alone=True), download=lambda _: 1000,
    shell: note
"""


@pytest.mark.parametrize(("threads", "used"), [(64, 3), (2, 2)])
def test_downloads_run_beside_any_job_but_nothing_beside_a_measurement(
    tmp_path: Path, threads: int, used: int
) -> None:
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    command = [sys.executable, "-m", "snakemake", "--cores", "3", "all"]
    command += ["--config", f"threads={threads}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    events = (tmp_path / "events").read_text().splitlines()
    at = {event: number for number, event in enumerate(events)}
    quantize, measure = f"quantize {used}", f"measure {used}"
    assert at["fetch 1 start"] < at[f"{quantize} end"]
    apart = [(measure, other) for other in (quantize, "recipe 1", "fetch 1")]
    apart += [(quantize, "recipe 1")] if used == 3 else []
    for one, other in apart:
        before = at[f"{other} end"] < at[f"{one} start"]
        assert before or at[f"{one} end"] < at[f"{other} start"], (one, other)
