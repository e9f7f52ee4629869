"""Perplexity of a GGUF on a text, and KL divergence of its predictions from those of BF16.

`llama-perplexity` does not load the head: a head is judged by its acceptance.
"""

import re
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from mtpforge.errors import ConfigError, ToolchainError
from mtpforge.gguf import split
from mtpforge.io import storage
from mtpforge.io.text import ANYWHERE, open_regular, open_text
from mtpforge.llama_cpp.programs import Argument, LlamaCpp
from mtpforge.measure.measurement import KlDivergence

CONTEXT = 512
"""Tokens of a chunk; its second half is scored."""
ATTEMPTS = 30
_LEAST_ATTEMPTS = 3
_PATIENCE = 60.0
"""Seconds after which only the least attempts are made: long runs seldom lose their log."""
_HEADER = struct.Struct("<8s3i")
"""Of logits: magic, tokens of a chunk, tokens of the vocabulary, chunks."""
_NUMBER = r"(-?[0-9]{1,30}\.[0-9]{1,30})"
_DIVERGENCE = {
    "perplexity": rf"Mean PPL\(Q\) +: +{_NUMBER} ±",
    "mean": rf"Mean +KLD: +{_NUMBER} ±",
    "mean_error": rf"Mean +KLD: .*± +{_NUMBER}$",
    "maximum": rf"Maximum +KLD: +{_NUMBER}$",
    "p99.9": rf"99\.9% +KLD: +{_NUMBER}$",
    "same_top": rf"Same top p: +{_NUMBER} ± .*%$",
    "same_top_error": rf"Same top p: .*± +{_NUMBER} %$",
}
_PERPLEXITY = {"perplexity": rf"Final estimate: PPL = {_NUMBER} \+/-"}
_NOT_NUMBERS = re.compile(r"^(Mean PPL\(Q\) +:|Final estimate: PPL =) +-?(nan|inf)", re.MULTILINE)


class NoFiguresError(ToolchainError):
    """llama-perplexity ended well, and did not print all figures."""


def reference_logits(model: Path, text: Path, out: Path, chunks: int, llama: LlamaCpp) -> None:
    """Write the logits of `model` for at most `chunks` chunks of `text`. Raises ForgeError.

    The file is large: its size is printed, and checked against the free disk, before it is written.
    """
    open_text(text, ConfigError, within=ANYWHERE).close()
    tokens = split.read(model).need("tokenizer.ggml.tokens", list)
    # A token has at least one byte.
    most = max(min(chunks, text.stat().st_size // CONTEXT), 1)
    needed = size(most, len(tokens))
    of = f"{most} chunks of {CONTEXT} tokens and {len(tokens):,} logits a token"
    print(f"at most {needed / 1e9:.2f} GB, for {of}", flush=True)
    storage.require(out, needed)
    with storage.by_program(out, needed):
        _run(model, ["-f", text, "--chunks", chunks, "--kl-divergence-base", out], llama)
        _check_size(out, text, chunks=chunks, vocabulary=len(tokens))


def _check_size(out: Path, text: Path, chunks: int, vocabulary: int) -> None:
    """Raise ConfigError if the text was too short, ToolchainError if the logits are not whole."""
    found = out.stat().st_size if out.exists() else 0
    if 0 < found < _HEADER.size:  # only the start of a header: nothing of the text was used
        raise ConfigError(f"{text}: too short: perplexity needs at least {2 * CONTEXT} tokens")
    if found not in {size(count, vocabulary) for count in range(1, chunks + 1)}:
        raise ToolchainError(
            f"llama-perplexity wrote {found:,} bytes to {out}, not a whole number of chunks"
        )


def size(chunks: int, vocabulary: int) -> int:
    """Bytes of the logits: 16 bits for each token of the vocabulary, for half of the text."""
    row = 2 * (2 * ((vocabulary + 1) // 2) + 4)
    return 20 + chunks * (4 * CONTEXT + (CONTEXT - 1 - CONTEXT // 2) * row)


def vocabularies(model: Path, logits: Path) -> tuple[int, int]:
    """The number of tokens of a model, and of the model of `reference_logits`.

    llama-perplexity compares them without a word if they differ. Raises ConfigError, GgufError.
    """
    with open_regular(logits, ConfigError, within=ANYWHERE) as file:
        start = file.read(_HEADER.size)
    if len(start) < _HEADER.size or not start.startswith(b"_logits_"):
        raise ConfigError(f"{logits}: not written by reference_logits.py")
    _, context, others, chunks = _HEADER.unpack(start)
    if (
        context != CONTEXT
        or min(others, chunks) < 1
        or logits.stat().st_size != size(chunks, others)
    ):
        raise ConfigError(
            f"{logits}: its header and its size do not agree: run reference_logits.py again"
        )
    return len(split.read(model).need("tokenizer.ggml.tokens", list)), others


def against_reference(model: Path, logits: Path, llama: LlamaCpp) -> tuple[float, KlDivergence]:
    """Perplexity and KL divergence from `reference_logits`. Raises ToolchainError."""
    options: list[Argument] = ["--kl-divergence-base", logits, "--kl-divergence"]
    found = _figures(model, options, patterns=_DIVERGENCE, llama=llama)
    divergence = KlDivergence(
        mean=found["mean"],
        mean_error=found["mean_error"],
        p99_9=found["p99.9"],
        maximum=found["maximum"],
        same_top=round(found["same_top"] / 100, 5),
        same_top_error=round(found["same_top_error"] / 100, 5),
    )
    return found["perplexity"], divergence


def mean_divergence(model: Path, logits: Path, llama: LlamaCpp) -> float:
    """The mean KL divergence alone: no run is repeated because later lines were lost.

    Raises ToolchainError.
    """
    options: list[Argument] = ["--kl-divergence-base", logits, "--kl-divergence"]
    patterns = {name: _DIVERGENCE[name] for name in ("perplexity", "mean")}
    return _figures(model, options, patterns=patterns, llama=llama)["mean"]


def of_text(model: Path, text: Path, chunks: int, llama: LlamaCpp) -> float:
    """Perplexity alone, for a model without BF16 to compare with.

    Raises ToolchainError; ConfigError if it is no text.
    """
    open_text(text, ConfigError, within=ANYWHERE).close()
    return _figures(model, ["-f", text, "--chunks", chunks], patterns=_PERPLEXITY, llama=llama)[
        "perplexity"
    ]


def figures(printed: str, patterns: dict[str, str]) -> dict[str, float]:
    """The number that each pattern finds.

    Raises NoFiguresError if one is missing, ToolchainError if predictions are not numbers.
    """
    if _NOT_NUMBERS.search(printed):  # its KL divergence is printed as zero then
        raise ToolchainError(
            "llama-perplexity does not print a perplexity, because predictions are not numbers: "
            "is the BF16 file whole, and was its model trained in BF16?"
        )
    found = {name: re.search(pattern, printed, re.MULTILINE) for name, pattern in patterns.items()}
    if missing := [name for name, match in found.items() if match is None]:
        raise NoFiguresError(
            f"llama-perplexity does not print {', '.join(missing)}: is it another version, is "
            "the text too short, or is the machine too busy?"
        )
    # Adding 0.0 turns a negative zero into zero.
    return {name: float(match[1]) + 0.0 for name, match in found.items() if match}


def attempts() -> Iterator[int]:
    """Attempts to get the whole output of llama-perplexity.

    It ends without waiting for its own log (llama.cpp issue 22142): on a busy machine the last
    lines for a tiny model can be lost.
    """
    start = time.monotonic()
    for attempt in range(ATTEMPTS):
        if attempt >= _LEAST_ATTEMPTS and time.monotonic() - start > _PATIENCE:
            return
        yield attempt


def _figures(
    model: Path, options: list[Argument], patterns: dict[str, str], llama: LlamaCpp
) -> dict[str, float]:
    """Run llama-perplexity until its last lines are complete.

    See `attempts`.
    """
    last = list(patterns.values())[-1]
    # "perf_context_print" comes after all figures.
    enough = re.compile(rf"{last}|perf_context_print|{_NOT_NUMBERS.pattern}", re.MULTILINE)
    for _ in attempts():
        printed = _run(model, options, llama)
        if enough.search(printed):
            break
    return figures(printed, patterns)


def _run(model: Path, options: list[Argument], llama: LlamaCpp) -> str:
    return llama.perplexity(["-m", model, "--ctx-size", CONTEXT, *options])
