"""Variables of make and options that would be ignored without a word are refused."""

import subprocess

import pytest
from conftest import ROOT
from mtpforge.errors import ConfigError
from mtpforge.rules import profiles


def make(line: str) -> "subprocess.CompletedProcess[str]":
    """Make's own reading of a command line; nothing is run."""
    command = ["make", "-n", "-o", "setup", "-o", "toolchain", *line.split(), "CORES=1"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


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
