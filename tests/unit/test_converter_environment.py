"""PyTorch for llama.cpp's converter: where pip looks, else from PyTorch's own index through uv.

pip is real, with folders of stand-in wheels for indexes. The stand-in for uv says how it was
called, and installs from a folder that pip does not know.
"""

import hashlib
import json
import os
import subprocess
import zipfile
from pathlib import Path

import pytest
from conftest import ROOT
from mtpforge.errors import ToolchainError
from mtpforge.llama_cpp import environment

UV = """\
#!python
import json, os, subprocess, sys
from pathlib import Path
Path(os.environ["ASKED"]).write_text(json.dumps(sys.argv[1:]))
install = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps"]
find = ["--require-hashes", "--find-links", os.environ["OWN_INDEX"], "-r", sys.argv[-1]]
sys.exit(subprocess.run([*install, *find]).returncode)
"""


def wheel(folder: Path, name: str, script: str = "") -> str:
    """Write a wheel with a module or a program, and return its requirement."""
    folder.mkdir(exist_ok=True)
    about = f"{name}-1.0.dist-info"
    files = {
        f"{name}-1.0.data/scripts/{name}" if script else f"{name}.py": script or "X = 1\n",
        f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
        f"{about}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    path = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as file:
        for member, text in files.items():
            about_member = zipfile.ZipInfo(member)
            about_member.external_attr = 0o100755 << 16  # a program that can be run
            file.writestr(about_member, text)
        file.writestr(f"{about}/RECORD", "".join(f"{member},,\n" for member in files))
    return f"{name}==1.0 \\\n    --hash=sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}\n"


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock with torch, which only PyTorch's index has."""
    known, own = tmp_path / "known", tmp_path / "own"
    pins = [wheel(own, "torch"), wheel(known, "torchlike"), wheel(known, "uv", UV)]
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(known))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("OWN_INDEX", str(own))
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    path = tmp_path / "lock.txt"
    path.write_text("".join(pins))
    return path


def modules(target: Path) -> bool:
    command = [target / "bin/python", "-c", "import torch, torchlike"]
    return subprocess.run(command, capture_output=True).returncode == 0


def test_torch_comes_from_where_pip_looks(
    lock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_FIND_LINKS", f"{tmp_path / 'known'} {tmp_path / 'own'}")
    environment.set_up(lock, tmp_path / "made", unchanged=False)
    assert modules(tmp_path / "made") and not (tmp_path / "asked").exists()


def test_torch_comes_from_its_own_index_by_hash_if_pip_does_not_find_it(
    lock: Path, tmp_path: Path
) -> None:
    environment.set_up(lock, tmp_path / "made", unchanged=False)
    assert modules(tmp_path / "made")
    asked = json.loads((tmp_path / "asked").read_text())
    assert asked[asked.index("--torch-backend") + 1] == "cpu"
    assert "--require-hashes" in asked and "--no-deps" in asked
    text = Path(asked[-1]).read_text()
    assert text == lock.read_text()[: len(text)] and text.startswith("torch==1.0")


def test_an_index_that_cannot_be_reached_is_said(
    lock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OWN_INDEX", str(tmp_path / "none"))
    with pytest.raises(ToolchainError) as raised:
        environment.set_up(lock, tmp_path / "made", unchanged=False)
    first = str(raised.value).splitlines()[0]
    assert "set PIP_FIND_LINKS to a folder with its wheel, or PIP_EXTRA_INDEX_URL" in first
    assert not (tmp_path / "made/lock.txt").exists()


def test_another_wheel_than_the_locked_one_is_refused(
    lock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where pip finds it: then nothing else is asked."""
    monkeypatch.setenv("PIP_FIND_LINKS", f"{tmp_path / 'known'} {tmp_path / 'own'}")
    (tmp_path / "own/torch-1.0-py3-none-any.whl").write_bytes(
        (tmp_path / "known/torchlike-1.0-py3-none-any.whl").read_bytes()
    )
    with pytest.raises(ToolchainError, match="cannot set up"):
        environment.set_up(lock, tmp_path / "made", unchanged=False)
    assert not (tmp_path / "asked").exists()


def test_the_lock_has_pytorchs_cpu_build_of_each_python() -> None:
    pins = (ROOT / "envs/converter.txt").read_text()
    torch = environment._of_package("torch", pins)
    linux, others = torch.split("torch==")[1:]
    assert "+cpu ; sys_platform == 'linux'" in linux and linux.count("--hash=sha256:") == 8
    assert "+cpu" not in others and "sys_platform != 'linux'" in others
    assert environment._of_package("uv", pins).count("--hash=sha256:") > 10
