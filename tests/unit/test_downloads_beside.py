"""Downloads run while all processors are busy; measuring has the machine to itself."""

import subprocess
import sys
from pathlib import Path

from conftest import SCRIPTS

SNAKEFILE = f"""\
import sys
sys.path.insert(0, {str(SCRIPTS)!r})
from mtpforge.rules.config import parse
from mtpforge.rules.resources import Needs, ResourceRules, free_downloads

free_downloads(workflow)
needs = lambda _: Needs()
asked = ResourceRules(parse(dict(models=dict()))).asked
note = 'echo {{rule}} {{threads}} start >> events; sleep 1.5;' \
    ' echo {{rule}} {{threads}} end >> events'

rule all:
    input: "quantize", "fetch", "recipe", "measure",

rule quantize:
    output: touch("quantize")
    threads: 64
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
    threads: 64
    resources: **asked(needs), download=lambda _: 1000,
    shell: note
"""


def test_a_download_runs_beside_a_job_with_all_threads(tmp_path: Path) -> None:
    (tmp_path / "Snakefile").write_text(SNAKEFILE)
    command = [sys.executable, "-m", "snakemake", "--cores", "3", "all"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    events = (tmp_path / "events").read_text().splitlines()
    at = {event: number for number, event in enumerate(events)}
    assert at["fetch 1 start"] < at["quantize 3 end"]
    for alone in ("quantize 3", "measure 3"):
        others = ["recipe 1", *(["fetch 1"] if alone == "measure 3" else [])]
        others += [each for each in ("quantize 3", "measure 3") if each != alone]
        for other in others:
            before = at[f"{other} end"] < at[f"{alone} start"]
            assert before or at[f"{alone} end"] < at[f"{other} start"], (alone, other)
