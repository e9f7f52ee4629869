"""Inputs that a fuzzer found, tried again; and the fuzzer itself, for a bounded time."""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from targets import TARGETS

HERE = Path(__file__).resolve().parent
CORPUS = {target: sorted((HERE / "corpus" / target).iterdir()) for target in TARGETS}
SECONDS = 20


@pytest.mark.parametrize("target", TARGETS)
def test_known_inputs_end_in_a_result_or_a_typed_error(target: str, tmp_path: Path) -> None:
    accepted = [
        path.name
        for path in CORPUS[target]
        if TARGETS[target](Path(shutil.copy(path, tmp_path / "input.gguf")))
    ]
    assert 3 <= len(accepted) < len(CORPUS[target])


def test_the_corpus_is_small() -> None:
    files = [path for paths in CORPUS.values() for path in paths]
    assert sum(path.stat().st_size for path in files) < 20_000


@pytest.mark.skipif(not importlib.util.find_spec("atheris"), reason="atheris has no wheel here")
@pytest.mark.parametrize("target", TARGETS)
def test_new_inputs_end_in_a_result_or_a_typed_error(target: str, tmp_path: Path) -> None:
    command = [sys.executable, HERE / "fuzz.py", target, "--seconds", str(SECONDS)]
    # Started by a shell: a child's peak memory, which has a limit, begins with its parent's.
    shell = ["sh", "-c", '"$@"; exit $?', "sh"]
    done = subprocess.run([*shell, *command, "--scratch", tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    runs = int(done.stderr.rpartition("Done ")[2].split()[0])
    assert runs > 10 * SECONDS  # 1,300 a second on an idle machine
