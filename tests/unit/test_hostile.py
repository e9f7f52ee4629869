"""Odd and hostile input: one line says what is wrong, exit code 1, nothing left or destroyed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import CHECKPOINTS, ROOT, SCRIPTS
from mtpforge.errors import GgufError, ToolchainError
from mtpforge.gguf import reader
from mtpforge.llama_cpp.process import outputs

Fails = Callable[..., str]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A private copy of the dense checkpoint."""
    return Path(shutil.copytree(CHECKPOINTS / "tiny-qwen3.5", tmp_path / "copy"))


def edit(path: Path, *keys: str, value: Any) -> None:
    """Set one value, however deep, in a JSON file."""
    settings = json.loads(path.read_text())
    target = settings
    for key in keys[:-1]:
        target = target[key]
    target[keys[-1]] = value
    path.write_text(json.dumps(settings))


CONFIG = [
    (("text_config", "layer_types"), [[], [], [], []], "layer_types"),
    (("text_config", "num_hidden_layers"), 2_000_000_000, "more than any real model"),
    (
        ("text_config", "rope_parameters"),
        {"rope_theta": 1e4, "partial_rotary_factor": 1e30},
        "partial_rotary_factor",
    ),
    (("text_config", "rope_parameters"), {"rope_theta": 10**400}, "rope_theta"),
    (
        ("text_config", "rope_parameters"),
        {"rope_theta": 1e4, "mrope_section": [1 << 40, 1, 1]},
        "rope.dimension_sections",
    ),
    (("text_config", "rope_parameters"), {"rope_type": "yarn", "factor": 1e300}, "factor"),
    (("text_config", "rms_norm_eps"), "1e-6", "rms_norm_eps"),
    (("text_config", "rms_norm_eps"), 0, "rms_norm_eps must be between 0 and 1"),
    (("text_config", "rms_norm_eps"), -1e-6, "rms_norm_eps must be between 0 and 1"),
    (("text_config", "rms_norm_eps"), 1 << 40, "rms_norm_eps must be between 0 and 1"),
    (("text_config", "mtp_num_hidden_layers"), True, "mtp_num_hidden_layers is True"),
    (("text_config", "tie_word_embeddings"), "yes", "tie_word_embeddings"),
    (("text_config", "num_experts"), 8, "dense architecture"),
    (("text_config", "max_position_embeddings"), 1 << 40, "max_position_embeddings"),
    (("text_config",), [1], "text_config"),
    (("architectures",), "Qwen3_5ForCausalLM", "architectures"),
    (("_name_or_path",), 7, "config.json"),
]


def test_a_tokenizer_that_explodes_is_stopped(
    checkpoint: Path, fails: Fails, tmp_path: Path
) -> None:
    bomb = [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 50}] * 8
    edit(
        checkpoint / "tokenizer.json", "normalizer", value={"type": "Sequence", "normalizers": bomb}
    )
    assert "too much memory or time" in fails(
        "convert.py", checkpoint, "--tokenizer-pre", "qwen35", out=tmp_path / "out.gguf"
    )


@pytest.mark.parametrize(
    ("keys", "value", "named"), CONFIG, ids=lambda x: "/".join(x) if isinstance(x, tuple) else None
)
def test_an_odd_config_is_refused(
    checkpoint: Path, fails: Fails, tmp_path: Path, keys: tuple[str, ...], value: Any, named: str
) -> None:
    edit(checkpoint / "config.json", *keys, value=value)
    assert named in fails(
        "convert.py", checkpoint, "--tokenizer-pre", "qwen35", out=tmp_path / "out.gguf"
    )


OTHERS = {
    "generation_config.json": '{"top_k": [1]}',
    "README.md": "---\nlicense: 2024-01-01\n---\n",
    "README.md ": "---\na: b: c: [\n  - d\n---\n",
    "README.md  ": "---\ntags: [[a], {b: c}]\n---\n",
    "tokenizer.json": '{"model": {"type": "BPE"}}',
    "tokenizer.json ": "[1, 2]",
    "tokenizer_config.json": '{"chat_template": [1]}',
    "tokenizer_config.json ": '{"chat_template": "\\ud800"}',
    "tokenizer_config.json  ": "7",
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_odd_files_are_refused(
    checkpoint: Path, fails: Fails, tmp_path: Path, name: str
) -> None:
    (checkpoint / name.strip()).write_text(OTHERS[name])
    fails("convert.py", checkpoint, "--tokenizer-pre", "qwen35", out=tmp_path / "out.gguf")


@pytest.mark.parametrize("key", ["padding", "normalizer", "post_processor"])
def test_odd_parts_of_a_tokenizer_give_no_traceback(
    checkpoint: Path, fails: Fails, tmp_path: Path, key: str
) -> None:
    odd = {
        "strategy": {"Fixed": 1 << 40},
        "type": "Precompiled",
        "precompiled_charsmap": "AAAA",
        "processors": 3,
    }
    edit(checkpoint / "tokenizer.json", key, value=odd)
    command = [sys.executable, SCRIPTS / "convert.py", checkpoint, "--tokenizer-pre", "qwen35"]
    done = subprocess.run(
        [*command, "--out", tmp_path / "out.gguf"], capture_output=True, text=True
    )
    assert done.returncode == (
        0 if key == "padding" else 1
    )  # padding changes no token, so it is ignored
    assert "Traceback" not in done.stderr or "panicked" in done.stderr


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer.json",
        "model.safetensors.index.json",
        "model-00001-of-00004.safetensors",
    ],
)
def test_a_folder_instead_of_a_file_is_refused(
    checkpoint: Path, fails: Fails, tmp_path: Path, name: str
) -> None:
    (checkpoint / name).unlink()
    (checkpoint / name).mkdir()
    assert name in fails("convert.py", checkpoint, out=tmp_path / "out.gguf")


def test_a_pipe_instead_of_a_file_does_not_hang(
    checkpoint: Path, fails: Fails, tmp_path: Path
) -> None:
    (checkpoint / "tokenizer.json").unlink()
    os.mkfifo(checkpoint / "tokenizer.json")
    assert "regular file" in fails("convert.py", checkpoint, out=tmp_path / "out.gguf")


def test_a_folder_is_not_a_gguf(tmp_path: Path) -> None:
    with pytest.raises(GgufError, match="is a directory"):
        reader.read(tmp_path)


def test_an_impossible_output_path_is_an_error(
    checkpoint: Path, run: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path, tmp_path / "file" / "out.gguf"):
        done = run("convert.py", checkpoint, "--tokenizer-pre", "qwen35", "--out", out)
        assert (
            done.returncode == 1
            and len(done.stderr.splitlines()) == 1
            and done.stderr.startswith("error: ")
        )


def test_an_input_is_never_overwritten(
    checkpoint: Path, run: Callable[..., Any], tmp_path: Path
) -> None:
    shard = next(checkpoint.glob("*.safetensors"))
    whole, file = shard.read_bytes(), tmp_path / "trunk.gguf"
    assert (
        run(
            "convert.py", checkpoint, "--tokenizer-pre", "qwen35", "--part", "trunk", "--out", file
        ).returncode
        == 0
    )
    before = file.read_bytes()
    for command in (
        ("convert.py", checkpoint, "--out", shard),
        ("quantize.py", file, "--type", "Q8_0", "--out", file),
        ("inject.py", file, "--head", checkpoint, "--out", file),
        ("verify.py", file, "--out", file),
    ):
        done = run(*command)
        assert done.returncode == 1 and "is an input" in done.stderr, command
    assert shard.read_bytes() == whole and file.read_bytes() == before


def test_a_termination_ends_children_and_leaves_nothing(tmp_path: Path) -> None:
    """With a llama-quantize that never ends: the real one is too fast on a tiny model."""
    program = tmp_path / "bin" / "llama-quantize"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 600\n")
    program.chmod(0o755)
    base = tmp_path / "base.gguf"
    checkpoint = CHECKPOINTS / "tiny-qwen3.5"
    convert = [
        sys.executable,
        SCRIPTS / "convert.py",
        checkpoint,
        "--tokenizer-pre",
        "qwen35",
        "--part",
        "trunk",
        "--out",
        base,
    ]
    subprocess.run(convert, check=True, capture_output=True)
    inject = [
        sys.executable,
        SCRIPTS / "inject.py",
        base,
        "--head",
        checkpoint,
        "--head-type",
        "Q8_0",
    ]
    process = subprocess.Popen([*inject, "--out", tmp_path / "out.gguf", "--bin", program.parent])
    deadline = time.monotonic() + 30
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text().strip():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 128 + signal.SIGTERM
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base.gguf", "bin", "pid"]
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.mark.parametrize(
    "call, children", [("call(sleep)", 1), ("outputs([sleep, sleep], pathlib.Path())", 2)]
)
def test_a_termination_while_a_child_starts_ends_all_children(
    tmp_path: Path, call: str, children: int
) -> None:
    """Within Popen's constructor the child already runs, but no variable has it. Seen once."""
    program = f"""
import os, pathlib, signal, subprocess
from mtpforge import cli
from mtpforge.llama_cpp import process
execute = subprocess.Popen._execute_child
pids = pathlib.Path({str(tmp_path / "pids")!r})
sleep = ["sleep", "600"]
def started(child, *arguments):
    execute(child, *arguments)
    with pids.open("a") as file:
        print(child.pid, file=file)
    if len(pids.read_text().split()) == {children}:
        os.kill(os.getpid(), signal.SIGTERM)
subprocess.Popen._execute_child = started
cli.run(lambda: process.{call})
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=SCRIPTS, timeout=60)
    assert ended.returncode == 128 + signal.SIGTERM
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == children
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_parallel_programs_return_their_output_and_one_failure_is_an_error(
    tmp_path: Path,
) -> None:
    much = ["sh", "-c", "seq 100000; echo; sleep 0.1"]  # more than fits into a pipe
    assert [len(said.split()) for said in outputs([much, ["echo", "a", "b"], much], tmp_path)] == [
        100_000,
        2,
        100_000,
    ]
    start = time.monotonic()
    with pytest.raises(ToolchainError, match="sh failed with exit code 3: error: no such type"):
        outputs(
            [
                ["sleep", "0"],
                ["sh", "-c", "echo error: no such type >&2; exit 3"],
                ["sleep", "600"],
            ],
            tmp_path,
        )
    assert time.monotonic() - start < 60  # without waiting for the last one


def test_the_environment_has_no_torch_and_no_transformers() -> None:
    locked = (ROOT / "envs" / "run.txt").read_text() + (ROOT / "envs" / "test.txt").read_text()
    assert "snakemake==" in locked and not any(
        line.startswith(("torch==", "transformers==")) for line in locked.splitlines()
    )


def test_the_embedded_checkpoints_are_small_and_quantize_without_fallback_types() -> None:
    assert (
        sum(path.stat().st_size for path in CHECKPOINTS.rglob("*") if path.is_file()) <= 20_000_000
    )
    for name in ("tiny-qwen3.5", "tiny-qwen3.5-moe"):
        from layouts import read_tensors

        matrices = {
            n: a
            for n, (_, a) in read_tensors(CHECKPOINTS / name).items()
            if a.ndim > 1 and "visual" not in n and "conv1d" not in n
        }
        assert matrices and all(array.shape[-1] % 256 == 0 for array in matrices.values())
