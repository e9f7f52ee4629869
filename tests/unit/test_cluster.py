"""The SLURM profile fits the workflow and the default profile, and its lock fits the others."""

import re
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from test_resources import RUNS_LLAMA

RULES = re.findall(
    r"^(?:use rule \w+ as|rule|checkpoint) (\w+)",
    "\n".join(path.read_text() for path in ROOT.glob("workflow/rules/*.smk")),
    re.MULTILINE,
)


def profile(name: str) -> dict[str, object]:
    loaded: dict[str, object] = yaml.safe_load((ROOT / f"profiles/{name}/profile.yaml").read_text())
    return loaded


def test_the_profile_repeats_the_default_one() -> None:
    """Snakemake reads only one profile of a workflow."""
    default, slurm = profile("default"), profile("slurm")
    assert default.pop("resources").items() <= slurm.pop("resources").items()
    assert default.items() <= slurm.items()


def sent_to(partition: str) -> set[str]:
    """The rules that an example in the profile sends to a partition."""
    text = (ROOT / "profiles/slurm/profile.yaml").read_text()
    example = rf"^# (\w+): .*'{partition}'.* # also (.*\n(?:#   .*\n)*)"
    found = re.search(example, text, re.MULTILINE)
    assert found
    return {found[1], *re.findall(r"\w+", found[2])}


def test_the_profile_names_rules_that_exist() -> None:
    resources = profile("slurm")["set-resources"]
    assert isinstance(resources, dict)
    assert {*resources, *sent_to("transfer")} <= set(RULES)


def test_profile_and_page_name_all_rules_that_ask_for_a_gpu() -> None:
    """SLURM refuses the others if the default partition has none."""
    page = " ".join((ROOT / "docs/cluster.md").read_text().split())
    found = re.search(r"CUDA programs \(.+?\), (.+?) ask for a GPU", page)
    assert found and set(re.findall(r"`(\w+)`", found[1])) == RUNS_LLAMA
    assert sent_to("gpu") == RUNS_LLAMA


def packages(lock: str) -> set[str]:
    text = (ROOT / f"envs/{lock}.txt").read_text()
    return {line.removesuffix(" \\") for line in text.splitlines() if re.match(r"\w", line)}


@pytest.mark.parametrize("lock", ["test", "cluster", "s3"])
def test_a_lock_that_is_added_has_the_same_versions(lock: str) -> None:
    assert packages("run") <= packages(lock)


@pytest.mark.parametrize("path", sorted(ROOT.glob("envs/*.txt")), ids=lambda path: path.stem)
def test_a_lock_has_hashes_and_no_addresses(path: Path) -> None:
    text = path.read_text()
    entries = re.findall(r"^\w(?:.*\\\n)*.*$", text, re.MULTILINE)
    assert entries
    assert all("--hash=sha256:" in entry for entry in entries)
    assert "index-url" not in text
