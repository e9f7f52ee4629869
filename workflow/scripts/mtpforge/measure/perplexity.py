"""How far a GGUF's predictions are from those of the BF16 it is made of, by `llama-perplexity` on a text.

The head takes no part: llama-perplexity does not load it. A head is measured by what is accepted of its drafts.
"""

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from mtpforge.errors import ConfigError, ForgeError, ToolchainError
from mtpforge.gguf import reader
from mtpforge.llama_cpp import process, programs

CONTEXT = 512  # tokens of a chunk; the second half of them is scored
ATTEMPTS = 12
_NUMBER = r"(-?[0-9]+\.[0-9]+)"
_PATTERNS = {
    "perplexity": rf"Mean PPL\(Q\) +: +{_NUMBER} ±",
    "mean": rf"Mean +KLD: +{_NUMBER} ±",
    "p99.9": rf"99\.9% +KLD: +{_NUMBER}$",
    "same_top": rf"Same top p: +{_NUMBER} ± .*%$",
}
_PERPLEXITY = {"perplexity": rf"Final estimate: PPL = {_NUMBER} \+/-"}


def reference_logits(
    model: Path, text: Path, out: Path, chunks: int, threads: int, bin_dir: Path = programs.DEFAULT_BIN
) -> None:  # fmt: skip
    """Write what `model` predicts for each token of the first `chunks` chunks of `text`. Raises ForgeError.

    The file is large, and its size is known and said before: see `size`.
    """
    tokens = reader.read(model).need("tokenizer.ggml.tokens", list)
    needed, free = size(chunks, len(tokens)), shutil.disk_usage(out.parent).free
    print(
        f"at most {needed / 1e9:.2f} GB, for {chunks} chunks of {CONTEXT} tokens and {len(tokens):,} logits a token",
        flush=True,
    )
    if needed > free:
        raise ForgeError(
            f"{out}: may need {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: make room, or set fewer chunks"
        )
    _run(model, ["-f", text, "--chunks", chunks, "--kl-divergence-base", out], threads, bin_dir)
    found = out.stat().st_size if out.exists() else 0
    if found < size(1, len(tokens)):  # no more than the beginning of a header
        raise ConfigError(
            f"{text}: too short: perplexity is measured on at least {2 * CONTEXT} tokens"
        )
    if found not in {size(count, len(tokens)) for count in range(1, chunks + 1)}:
        raise ToolchainError(
            f"llama-perplexity wrote {found} bytes to {out}: is the disk full, or is it of another version?"
        )


def size(chunks: int, vocabulary: int) -> int:
    """Bytes of the logits of so many chunks: 16 bits for each token of the vocabulary, for half of a chunk's tokens."""
    row = 2 * (2 * ((vocabulary + 1) // 2) + 4)
    return 20 + chunks * (4 * CONTEXT + (CONTEXT - 1 - CONTEXT // 2) * row)


def against_reference(
    model: Path, logits: Path, threads: int, bin_dir: Path = programs.DEFAULT_BIN
) -> dict[str, Any]:
    """`perplexity`, and `kl_divergence` in nats (mean, 99.9th percentile) with the share of equal first choices.

    Raises ToolchainError, also where a figure is missing.
    """
    found = _figures(
        model, ["--kl-divergence-base", logits, "--kl-divergence"], _PATTERNS, threads, bin_dir
    )
    perplexity, same = found.pop("perplexity"), round(found.pop("same_top") / 100, 5)
    return {"perplexity": perplexity, "kl_divergence": {**found, "same_top": same}}


def of_text(
    model: Path, text: Path, chunks: int, threads: int, bin_dir: Path = programs.DEFAULT_BIN
) -> dict[str, Any]:
    """`perplexity` alone, for a model without a BF16 to compare with; `kl_divergence` is None. Raises ForgeError."""
    return {
        **_figures(model, ["-f", text, "--chunks", chunks], _PERPLEXITY, threads, bin_dir),
        "kl_divergence": None,
    }


def _figures(
    model: Path, options: list[object], patterns: dict[str, str], threads: int, bin_dir: Path
) -> dict[str, float]:
    """What it says at its end. Raises ToolchainError.

    It ends without waiting for its own log (llama.cpp issue 22142): on a busy machine the last lines of a tiny model's can be lost,
    and then it has to say them again.
    """
    for _ in range(ATTEMPTS):
        said = _run(model, options, threads, bin_dir)
        if (
            re.search(list(patterns.values())[-1], said, re.MULTILINE)
            or "perf_context_print" in said
        ):  # said after all figures
            break
    return _numbers(said, patterns)


def _run(model: Path, options: list[object], threads: int, bin_dir: Path) -> str:
    program = programs.find(bin_dir, "llama-perplexity")
    command = [program, "-m", model, "--ctx-size", CONTEXT, "--threads", threads, *options]
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        process.call([str(word) for word in command], log, process.environment())
        return log.read_text(encoding="utf-8", errors="replace")


def _numbers(said: str, patterns: dict[str, str]) -> dict[str, float]:
    """Each pattern's figure. Raises ToolchainError for one that is not there, or is no number."""
    found = {name: re.search(pattern, said, re.MULTILINE) for name, pattern in patterns.items()}
    if missing := [name for name, match in found.items() if match is None]:
        raise ToolchainError(
            f"llama-perplexity does not say {', '.join(missing)}: is it of another version, or the text too short?"
        )
    return {
        name: float(match[1]) + 0.0 for name, match in found.items() if match
    }  # + 0.0: no negative zero
