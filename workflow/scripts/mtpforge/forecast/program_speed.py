"""The speed of llama.cpp's programs here, measured on a checkpoint that comes with mtpforge."""

import re
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mtpforge.convert import native
from mtpforge.errors import ToolchainError
from mtpforge.forecast import planned_ggufs
from mtpforge.forecast.costs import ProgramSpeed
from mtpforge.gguf import reader
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.llama_cpp.server import Server, serve

_CHECKPOINT = Path(__file__).parents[4] / "tests/checkpoints/tiny-qwen3.5"
_TYPE = "IQ4_XS"
_TOKENS = 100
_AHEAD = 4
"""Tokens that it drafts: of the lengths that are usually tried, the middle."""
_ROUNDS = 4
"""Requests, of which the fastest counts: other programs may be running."""


def measured(llama: LlamaCpp) -> ProgramSpeed:
    """The speed of these programs. Raises ForgeError if one is missing, or does not work."""
    llama.find("llama-server")
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "model.gguf"
        native.convert(_CHECKPOINT, source, tokenizer_pre="qwen35")
        server, token = _serving(source, llama)
        options = ["--spec-type", "draft-mtp", "--spec-draft-n-max", str(_AHEAD)]
        _, drafted = _serving(source, llama, options)
        return ProgramSpeed(server, token, drafted, _quantizing(source, llama))


def _serving(source: Path, llama: LlamaCpp, options: Sequence[str] = ()) -> tuple[float, float]:
    """Seconds of a start, with its end and what the first request takes longer, and of a token."""
    start = time.perf_counter()
    with serve(llama, source, log=source.with_suffix(".log"), options=options) as server:
        ready = time.perf_counter()
        times = [_answering(server) for _ in range(_ROUNDS)]
        answered = time.perf_counter()
    took = time.perf_counter() - start - (answered - ready)
    least = min(times)
    return took + _TOKENS * (times[0] - least), least


def _answering(server: Server) -> float:
    """Seconds of a token of a request, with all that belongs to it."""
    start = time.perf_counter()
    tokens = len(server.completion("def add(", _TOKENS).tokens)
    if not tokens:
        raise ToolchainError("llama-server generated nothing")
    return (time.perf_counter() - start) / tokens


def _quantizing(source: Path, llama: LlamaCpp) -> float:
    """The time that llama-quantize says it took, beside the known cost."""
    made = source.with_name("quantized.gguf")
    log = source.with_name("quantize.log")
    replace(llama, log=log).quantize([source, made, _TYPE], source.parent)
    said = re.search(r"quantize time = +([\d.]+) ms", log.read_text(encoding="utf-8"))
    if not said:
        raise ToolchainError("llama-quantize does not say how long it took")
    known = planned_ggufs.quantize_seconds(reader.read(source), reader.read(made))
    return float(said[1]) / 1000 / (known / llama.processors)
