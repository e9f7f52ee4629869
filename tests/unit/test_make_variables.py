"""Variables of make and options that would be ignored without a word are refused."""

import os
import subprocess

import pytest
from conftest import ROOT
from mtpforge.errors import ConfigError
from mtpforge.rules import profiles


def make(line: str) -> "subprocess.CompletedProcess[str]":
    """Make's own reading of a command line; nothing is run."""
    command = ["make", "-n", "-o", "setup", "-o", "toolchain", *line.split(), "CORES=1"]
    # Without what `make test` tells a make below it, which would print its folder.
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


# ── profiles ──


@pytest.mark.parametrize("line", ["all", "quant REPO=A/B TYPE=Q4_0", "publish", "plan"])
def test_make_refuses_a_profile_that_is_not_there(line: str) -> None:
    done = make(f"{line} PROFILE=leen")
    assert done.returncode == 2
    assert "no profile 'leen': profiles/ has default lean shards slurm" in done.stderr
    for name in ("default", "lean", "slurm"):
        assert make(f"{line} PROFILE={name}").returncode == 0


def test_a_profile_of_add_or_of_snakemake_must_be_there() -> None:
    said = "no profile 'leen': profiles/ has default, lean, shards, slurm; did you mean lean?"
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
        profiles.check("leen")
    with pytest.raises(ConfigError, match=said.replace("?", r"\?")):
        profiles.check_options(["--cores", "1", "--workflow-profile=profiles/leen"])
    profiles.check("lean")
    profiles.check_options(["all", "--cores", "1"])
    for name in ("none", "lean", "profiles/lean", str(ROOT / "profiles/lean")):
        profiles.check_options(["--workflow-profile", name, "all"])


# ── variables that a target does not take ──


@pytest.mark.parametrize(
    ("line", "refused"),
    [
        ("add REPO=A/B TYPE=IQ4_XS", "make add takes no TYPE: it takes REPO PRESET TYPES"),
        ("add REPO=A/B BASE=x.gguf", "make add takes no BASE"),
        ("quant REPO=A/B TYPE=Q4_0 TYPES=Q6_K", "make quant takes no TYPES: it takes REPO TYPE"),
        ("inject BASE=a.gguf REPO=A/B", "make inject takes no REPO: it takes BASE SOURCE"),
        ("publish REPO=A/B", "make publish takes no REPO: it takes DRY_RUN"),
        ("TYPE=Q4_0", "make all takes no TYPE: it takes MODELS"),
        ("toolchain MODELS=m", "make toolchain takes no MODELS"),
    ],
)
def test_a_variable_that_a_target_does_not_take_is_refused(line: str, refused: str) -> None:
    done = make(line)
    assert done.returncode == 2 and refused in done.stderr and not done.stdout


def test_a_variable_of_one_of_the_targets_is_taken() -> None:
    assert make("plan publish MODELS=m DRY_RUN=1").returncode == 0


# ── yes and no ──


@pytest.mark.parametrize(
    ("line", "option"),
    [
        ("quant REPO=A/B TYPE=Q4_0 MEASURE=", "--measure"),
        ("quant REPO=A/B TYPE=Q4_0 YES=", "--yes"),
        ("inject BASE=a.gguf SOURCE=A/B REPLACE=", "--replace-head"),
        ("publish DRY_RUN=", "dry_run=true"),
        ("quant REPO=A/B TYPE=Q4_0 DRY_RUN=", "--dry-run"),
        ("clean-work YES=", "--yes"),
    ],
)
def test_a_yes_is_a_yes_and_all_but_a_no_is_refused(line: str, option: str) -> None:
    for word in ("1", "yes", "YES", "y", "true", "True"):
        assert option in make(line + word).stdout, word
    for word in ("", "0", "no", "No", "false"):
        done = make(line + word)
        assert done.returncode == 0 and option not in done.stdout, word
    done = make(line + "oui")
    assert done.returncode == 2 and "=oui: set it to 1, or leave it out" in done.stderr
