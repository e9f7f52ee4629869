"""A rule's code inputs are its program and all local modules that it imports."""

import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, SCRIPTS
from mtpforge.rules.code import code, digest, files

LIBRARY = "workflow/scripts/mtpforge/"


def test_code_inputs_are_the_imports_and_nothing_else() -> None:
    assert code("convert.py") == ["workflow/scripts/convert.py"]
    found = files("convert.py")
    assert found[0] == "workflow/scripts/convert.py"
    assert (
        LIBRARY + "checkpoint/families/qwen3_5.py" in found and LIBRARY + "gguf/writer.py" in found
    )
    assert (
        LIBRARY + "verify/report.py" not in found and LIBRARY + "llama_cpp/server.py" not in found
    )
    assert LIBRARY + "llama_cpp/server.py" not in files("quantize.py")
    assert "workflow/scripts/run_upstream.py" in files(
        "convert_upstream.py"
    )  # run by another Python


PRINT_FILES = (
    "print(*(m.__file__ or '' for m in sys.modules.values() if "
    "getattr(m, '__file__', '')), sep='\\n')"
)


def test_code_inputs_include_every_module_that_python_loads() -> None:
    for program in SCRIPTS.glob("*.py"):
        loaded = subprocess.run(
            [sys.executable, "-c", f"import sys, {program.stem}; {PRINT_FILES}"],
            cwd=SCRIPTS, capture_output=True, text=True, check=True,
        ).stdout.splitlines()  # fmt: skip
        local = {name for name in loaded if name.startswith(str(SCRIPTS))}
        assert local <= {str(ROOT / name) for name in files(program.name)}, program.name


PROGRAMS = ("convert", "quantize", "inject", "verify", "measure", "card")
SHARES = {"measure": 0.3, "card": 0.3}


def test_a_rule_tracks_only_what_it_uses(capsys: pytest.CaptureFixture[str]) -> None:
    """Editing injection must not redo cards and measurements."""

    def lines(path: Path) -> int:
        return len(path.read_text().splitlines())

    package = sum(map(lines, (SCRIPTS / "mtpforge").rglob("*.py")))
    tracked = {
        name: [ROOT / path for path in files(f"{name}.py") if LIBRARY in path] for name in PROGRAMS
    }
    shares = {name: sum(map(lines, paths)) / package for name, paths in tracked.items()}
    with capsys.disabled():
        print("\nshare of the package that each program tracks:", end=" ")
        print(", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
    assert {name: share for name, share in shares.items() if share >= SHARES.get(name, 1)} == {}


def test_the_digest_changes_with_each_module() -> None:
    assert len({digest(path.name) for path in SCRIPTS.glob("*.py")}) == len(
        list(SCRIPTS.glob("*.py"))
    )
    assert len(digest("convert.py")) == 64
