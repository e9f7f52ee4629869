"""Environments with only the packages of one lock, linked from that of the tests."""

import re
import subprocess
import sys
from importlib.metadata import Distribution, distributions
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name


def packages(lock: Path) -> set[str]:
    """The packages of a lock that this Python and machine take."""
    lines = lock.read_text().replace("\\\n", " ").splitlines()
    found = [Requirement(line.partition("--hash")[0]) for line in lines if re.match(r"\w", line)]
    return {
        canonicalize_name(each.name) for each in found if not each.marker or each.marker.evaluate()
    }


def make_environment(folder: Path, lock: Path) -> Path:
    """Make an environment with the packages of a lock; returns its `bin`."""
    command = [sys.executable, "-m", "venv", "--without-pip", str(folder)]
    subprocess.run(command, check=True)
    (target,) = folder.glob("lib/python*/site-packages")
    wanted = packages(lock)
    for each in distributions():
        if canonicalize_name(each.metadata["Name"]) in wanted:
            link(each, target, folder / "bin")
    return folder / "bin"


def link(package: Distribution, target: Path, programs: Path) -> None:
    """Link the files of a package, and write its programs."""
    for file in package.files or ():
        if ".." in file.parts:
            continue
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        if not (target / file).exists():
            (target / file).symlink_to(Path(str(file.locate())))
    for entry in package.entry_points.select(group="console_scripts"):
        module, _, function = entry.value.partition(":")
        program = programs / entry.name
        program.write_text(
            f"#!{programs / 'python'}\nimport sys\nfrom {module} import {function}\n"
            f"sys.exit({function}())\n"
        )
        program.chmod(0o755)
