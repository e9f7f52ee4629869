"""Bases with tensor types that gguf-py does not know: the programs decide whether they run.

Q2_0 is such a type, which the pinned llama.cpp knows. IQ4_KS is one of ik_llama.cpp, which it does
not know.
"""

import json
import subprocess
from pathlib import Path

import pytest
from conftest import CHECKPOINTS, Run
from mtpforge.convert import native
from mtpforge.inject.inject import inject
from splits import relabel

CHECKPOINT = CHECKPOINTS / "tiny-qwen3.5"
COMMON = ("--checkpoint", CHECKPOINT, "--tokenizer-pre", "qwen35", "--threads", 1)
COMMON += ("--prompts", CHECKPOINT / "prompts")


@pytest.fixture(scope="module")
def base(toolchain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with three tensors at Q2_0."""
    folder = tmp_path_factory.mktemp("base")
    native.convert(CHECKPOINT, folder / "trunk.gguf", "trunk", "qwen35")
    types = ("--tensor-type", r"blk\.1\.ffn_=q2_0")
    files = (folder / "trunk.gguf", folder / "base.gguf")
    command = [toolchain / "llama-quantize", *types, *files, "Q8_0", "1"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    return folder / "base.gguf"


def test_a_type_that_the_programs_know_is_verified_and_drafts(
    base: Path, run: Run, tmp_path: Path
) -> None:
    inject(base, CHECKPOINT, tmp_path / "out.gguf")
    arguments = ("--base", base, "--out", tmp_path / "report.json")
    done = run("verify.py", tmp_path / "out.gguf", *COMMON, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["types"]["Q2_0"] == 3
    assert report["acceptance"] > 0.8
    details = {check["name"]: check["detail"] for check in report["checks"]}
    assert (
        "no NaN or infinity in 67 tensors; not read: 3 at Q2_0, unknown here" in details["finite"]
    )
    assert details["trunk"] == "55 tensors equal the base's"


def test_a_type_that_they_do_not_know_is_named_and_nothing_is_published(
    base: Path, run: Run, tmp_path: Path
) -> None:
    theirs = relabel(base, tmp_path / "base.gguf", r"blk\.1\.ffn_.*", 144)
    inject(theirs, CHECKPOINT, tmp_path / "out.gguf")
    published = ("--publish", tmp_path / "final.gguf", "--out", tmp_path / "report.json")
    done = run("verify.py", tmp_path / "out.gguf", *COMMON, "--base", theirs, *published)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "IQ4_KS (3 tensors)" in done.stderr
    assert "set `toolchain.llama_cpp.bin_dir`" in done.stderr
    assert not (tmp_path / "final.gguf").exists() and not (tmp_path / "report.json").exists()
