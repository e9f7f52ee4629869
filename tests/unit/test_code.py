"""A rule's code inputs are its program and each local module that it imports, directly or not."""

import subprocess
import sys

from conftest import ROOT, SCRIPTS
from mtpforge.code import code

LIBRARY = "workflow/scripts/mtpforge/"


def test_a_program_has_what_it_imports_and_nothing_else() -> None:
    files = code("convert.py")
    assert files[0] == "workflow/scripts/convert.py"
    assert (
        LIBRARY + "checkpoint/families/qwen3_5.py" in files and LIBRARY + "gguf/writer.py" in files
    )
    assert (
        LIBRARY + "verify/report.py" not in files and LIBRARY + "llama_cpp/server.py" not in files
    )
    assert "workflow/scripts/run_upstream.py" in code(
        "convert_upstream.py"
    )  # which another Python runs


def test_it_finds_all_that_python_really_loads() -> None:
    for program in SCRIPTS.glob("*.py"):
        loaded = subprocess.run(
            [sys.executable, "-c", f"import sys, {program.stem}; print(*(m.__file__ or '' for m in sys.modules.values() if "
             "getattr(m, '__file__', '')), sep='\\n')"],
            cwd=SCRIPTS, capture_output=True, text=True, check=True,
        ).stdout.splitlines()  # fmt: skip
        local = {name for name in loaded if name.startswith(str(SCRIPTS))}
        assert local <= {str(ROOT / name) for name in code(program.name)}, program.name
