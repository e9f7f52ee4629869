"""The environment of llama.cpp's converter, from a lock with hashes.

On Linux the lock has PyTorch's CPU build, which is on PyTorch's own index only. pip would have to
be told of that index; uv knows it.
"""

import re
import subprocess
import sys
from pathlib import Path

from mtpforge import progress
from mtpforge.errors import ToolchainError
from mtpforge.io.atomic import write_text
from mtpforge.io.text import ANYWHERE, YAML_LIMIT, read_text
from mtpforge.llama_cpp.compilation import tail

_INSTALL = ("-m", "pip", "install", "-qq", "--disable-pip-version-check", "--require-hashes", "-r")
_NOT_FOUND = "No matching distribution found"


def set_up(lock: Path, target: Path, unchanged: bool) -> None:
    """Set up an environment, unless the one in `target` was made there from the same lock.

    `unchanged` says whether its packages are as they were installed. Raises ToolchainError.
    """
    pins = read_text(lock, ToolchainError, YAML_LIMIT, within=ANYWHERE)
    stamp, made = target / "lock.txt", f"{target.absolute()}\n{pins}"
    python = target / "bin" / "python"
    if unchanged and python.exists() and stamp.exists() and stamp.read_text("utf-8") == made:
        return
    progress.say(f"setting up {target} from {lock}")
    _require([sys.executable, "-m", "venv", "--clear", str(target)], target)
    if torch := _of_package("torch", pins):
        _install_torch(torch, _of_package("uv", pins), target)
    _require([str(python), *_INSTALL, str(lock)], target)
    write_text(stamp, made)


def _install_torch(torch: str, uv: str, target: Path) -> None:
    """Install PyTorch: from where pip looks, else with uv from PyTorch's own index."""
    python = str(target / "bin" / "python")
    pins = {"torch": torch, "uv": uv}
    for name, text in pins.items():
        (target / f"{name}.txt").write_text(text, encoding="utf-8")
    said = _run([python, *_INSTALL, str(target / "torch.txt"), "--no-deps"])
    if said is None:
        return
    if _NOT_FOUND not in said:
        raise ToolchainError(f"cannot set up {target}:\n{tail(said, 5)}")
    progress.say("pip does not find PyTorch's CPU build: looking on PyTorch's own index")
    _require([python, *_INSTALL, str(target / "uv.txt")], target)
    command = [str(target / "bin" / "uv"), "pip", "install", "--quiet", "--no-cache"]
    command += ["--python", python, "--torch-backend", "cpu", "--no-deps", "--require-hashes"]
    if said := _run([*command, "-r", str(target / "torch.txt")]):
        raise ToolchainError(
            "PyTorch's CPU build is neither where pip looks nor on PyTorch's own index: set "
            "PIP_FIND_LINKS to a folder with its wheel, or PIP_EXTRA_INDEX_URL to an index that "
            f"has it:\n{tail(said, 5)}"
        )


def _of_package(name: str, pins: str) -> str:
    """The requirements of a package in a lock, with their hashes; empty if it has none."""
    return "".join(re.findall(rf"^{name}==(?:.*\\\n)*.*\n", pins, re.MULTILINE))


def _require(command: list[str], target: Path) -> None:
    if (said := _run(command)) is not None:
        raise ToolchainError(f"cannot set up {target}:\n{tail(said, 5)}")


def _run(command: list[str]) -> str | None:
    """What a command says if it fails."""
    ended = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    return ended.stderr if ended.returncode else None
