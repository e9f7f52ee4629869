"""The speed of llama.cpp's programs here, measured on a checkpoint that comes with mtpforge."""

import re
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from mtpforge.convert import native
from mtpforge.errors import ToolchainError
from mtpforge.forecast import planned_ggufs
from mtpforge.forecast.costs import ProgramSpeed
from mtpforge.gguf import reader
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.llama_cpp.server import serve

_CHECKPOINT = Path(__file__).parents[4] / "tests/checkpoints/tiny-qwen3.5"
_TYPE = "IQ4_XS"
_TOKENS = 100
_ROUNDS = 3
"""Requests, of which the fastest counts: other programs may be running."""


def measured(llama: LlamaCpp) -> ProgramSpeed:
    """The speed of these programs. Raises ForgeError if one is missing, or does not work."""
    llama.find("llama-server")
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "model.gguf"
        native.convert(_CHECKPOINT, source, tokenizer_pre="qwen35")
        server, token = _serving(source, llama)
        return ProgramSpeed(server, token, _quantizing(source, llama))


def _serving(source: Path, llama: LlamaCpp) -> tuple[float, float]:
    """Seconds of a start with its end, and of a token."""
    start = time.perf_counter()
    with serve(llama, source, log=source.with_suffix(".log")) as server:
        ready = time.perf_counter()
        answers = [server.completion("def add(", _TOKENS) for _ in range(_ROUNDS)]
        answered = time.perf_counter()
    took = time.perf_counter() - start - (answered - ready)
    speed = max(answer.tokens_per_second for answer in answers)
    if speed <= 0:
        raise ToolchainError("llama-server generated nothing")
    return took, 1 / speed


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
