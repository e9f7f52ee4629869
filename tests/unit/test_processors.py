"""As many threads as there are processors: a container's quota counts, for make too."""

import os
import re
import subprocess
from pathlib import Path

import pytest
from conftest import ROOT
from mtpforge import processors
from mtpforge.llama_cpp.programs import LlamaCpp


@pytest.fixture(autouse=True)
def _eight(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A machine of eight processors, without control groups."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(processors, "CGROUPS", tmp_path / "groups")
    monkeypatch.setattr(processors, "OWN_CGROUP", tmp_path / "own")


@pytest.mark.parametrize(
    ("own", "limits", "count"),
    [
        ("0::/", {}, 8),
        ("0::/", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/", {"cpu.max": "250000 100000\n"}, 3),
        ("0::/", {"cpu.max": "10000 100000\n"}, 1),
        ("0::/", {"cpu.max": "max 100000\n"}, 8),
        ("0::/", {"cpu.max": "damaged\n"}, 8),
        ("0::/pod/job", {"pod/cpu.max": "300000 100000", "pod/job/cpu.max": "max 100000"}, 3),
        ("3:cpu,cpuacct:/a\n0::/", {"cpu/a/cpu.cfs_quota_us": "400000"}, 4),
        ("3:cpu,cpuacct:/a\n0::/", {"cpu/a/cpu.cfs_quota_us": "-1"}, 8),
        ("4:memory:/a", {"cpu.max": "9900000 100000"}, 8),
    ],
)
def test_the_quota_of_a_container_counts(
    tmp_path: Path, own: str, limits: dict[str, str], count: int
) -> None:
    (tmp_path / "own").write_text(own)
    for name, limit in limits.items():
        path = tmp_path / "groups" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(limit)
        path.with_name("cpu.cfs_period_us").write_text("100000\n")
    assert processors.available() == count
    assert LlamaCpp().processors == count
    assert LlamaCpp(threads=99).processors == count


def test_make_counts_them_with_python_alone() -> None:
    """Before anything is installed."""
    (command,) = re.findall(r"^CORES \?= \$\(shell \$\(PYTHON\) (.+)\)$", MAKEFILE, re.MULTILINE)
    done = subprocess.run(
        ["python3", "-I", "-S", command], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) >= 1


MAKEFILE = (ROOT / "Makefile").read_text()
