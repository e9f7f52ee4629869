"""Injection and verification judge a base's vocabulary by the same rule."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import CHECKPOINTS, Run
from gguf.constants import GGUFValueType
from layouts import write_layout
from mtpforge.gguf import reader, writer
from mtpforge.gguf.metadata import Value

TOKENS = "tokenizer.ggml.tokens"


def base_with(tokens: Callable[[list[str]], object], trunk: Path, out: Path) -> Path:
    """A copy of a trunk with its list of tokens changed, as a publisher would."""
    opened = reader.read(trunk)
    values = opened.get(TOKENS)
    tokens(values)
    metadata = {
        **opened.metadata,
        TOKENS: Value.of(values, GGUFValueType.ARRAY, GGUFValueType.STRING),
    }
    writer.write(out, metadata, reader.contents(opened))
    return out


@pytest.fixture
def verify(run: Run, toolchain: Path) -> Callable[..., str]:
    """Inject the checkpoint's head into the base and verify the result: what verify.py prints.

    `head`: the same head as a GGUF, which has no vocabulary.
    """

    def call(base: Path, checkpoint: Path, folder: Path, head: Path | None = None) -> str:
        out = folder / "out.gguf"
        given = head or checkpoint
        injected = run("inject.py", base, "--head", given, "--head-type", "Q8_0", "--out", out)
        assert injected.returncode == 0, injected.stderr
        prompts = (
            "--prompts",
            CHECKPOINTS / "tiny-qwen3.5/prompts",
            "--tokenizer-pre",
            "qwen35",
            "--threads",
            1,
        )
        done = run(
            "verify.py",
            out,
            "--checkpoint",
            checkpoint,
            "--base",
            base,
            *prompts,
            "--out",
            folder / "report.json",
        )
        return done.stdout + done.stderr

    return call


def test_a_renamed_reserved_token_passes_but_another_vocabulary_does_not(
    run: Run, verify: Callable[..., str], tmp_path: Path
) -> None:
    checkpoint, trunk = CHECKPOINTS / "tiny-qwen3.5", tmp_path / "trunk.gguf"
    run("convert.py", checkpoint, "--part", "trunk", "--tokenizer-pre", "qwen35", "--out", trunk)
    renamed = base_with(
        lambda tokens: tokens.__setitem__(1279, "<|PAD_TOKEN|>"), trunk, tmp_path / "renamed.gguf"
    )
    output = verify(renamed, checkpoint, tmp_path)
    assert "FAILED" not in output and "drafts accepted" in output
    other = base_with(lambda tokens: tokens.reverse(), trunk, tmp_path / "other.gguf")
    refused = run("inject.py", other, "--head", checkpoint, "--out", tmp_path / "refused.gguf")
    assert refused.returncode == 1 and not (tmp_path / "refused.gguf").exists()
    assert "token 0 is" in refused.stderr
    assert "the head belongs to another model" in refused.stderr
    head = tmp_path / "head.gguf"
    run("convert.py", checkpoint, "--part", "head", "--tokenizer-pre", "qwen35", "--out", head)
    assert "metadata: token 0 is" in verify(other, checkpoint, tmp_path, head)


def test_a_base_with_added_tokens_is_injected_and_verified_and_drafts(
    run: Run, verify: Callable[..., str], tmp_path: Path
) -> None:
    """As in every real Qwen3.5, where seven tokens are only in tokenizer_config.json."""
    checkpoint = write_layout("dense-added-tokens", tmp_path)
    run(
        "convert.py",
        checkpoint,
        "--part",
        "trunk",
        "--tokenizer-pre",
        "qwen35",
        "--out",
        tmp_path / "trunk.gguf",
    )
    run("quantize.py", tmp_path / "trunk.gguf", "--type", "Q4_K_M", "--out", tmp_path / "base.gguf")
    output = verify(tmp_path / "base.gguf", checkpoint, tmp_path)
    assert "FAILED" not in output and "drafts accepted" in output
