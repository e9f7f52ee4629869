"""The measurement of a file, as JSON: speed and acceptance, memory, perplexity."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field

from mtpforge.io.records import UNLESS_NONE, Record

Spread = tuple[float, float]
"""Tokens per second of the slowest and of the fastest repeat."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine: its processor, the number of processors, the devices llama.cpp sees."""

    processor: str
    processors: int | None
    devices: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Repeated requests with one prompt and one n_max; `state` is cold or warm."""

    n_max: int
    """Tokens drafted ahead; 0: no drafting."""
    kind: str
    """Kind of prompt: code, prose, structured."""
    state: str
    repeats: int
    tokens_per_second: tuple[float, ...]
    """One for each repeat, of decoding alone."""
    median: float
    spread: Spread
    drafts: int
    accepted: int
    acceptance: float | None
    """accepted / drafts; None if nothing was drafted."""
    by_position: tuple[float, ...]
    """Share of the drafts accepted at each position; empty if llama-server did not log it."""


@dataclass(frozen=True, kw_only=True)
class Total:
    """All kinds of prompts at one n_max: warm, except for `cold_tokens_per_second`."""

    n_max: int
    tokens_per_second: float
    spread: Spread
    cold_tokens_per_second: float
    drafts: int
    accepted: int
    acceptance: float | None
    by_position: tuple[float, ...]
    speedup: float
    """tokens_per_second relative to that without drafting"""
    memory_bytes: int | None
    """Peak resident size of llama-server, mapped pages of the file included; None without /proc."""


@dataclass(frozen=True, kw_only=True)
class KlDivergence:
    """Distance of the predictions from those of the BF16 file, in nats.

    Errors are standard errors over the tokens. Measurements of older versions have no errors and no
    maximum.
    """

    mean: float
    mean_error: Annotated[float | None, UNLESS_NONE] = None
    p99_9: Annotated[float, Field(alias="p99.9")]
    """99.9th percentile over the tokens"""
    maximum: Annotated[float | None, UNLESS_NONE] = None
    """That of the worst token"""
    same_top: float
    """Share of tokens with the same first choice, 0 to 1."""
    same_top_error: Annotated[float | None, UNLESS_NONE] = None


@dataclass(frozen=True, kw_only=True)
class Text:
    """The text on which perplexity was measured: at most `chunks` chunks of 512 tokens."""

    name: str
    sha256: str
    chunks: int


@dataclass(frozen=True, kw_only=True)
class Measurement(Record):
    """The results of measure.py for one file."""

    written_by: ClassVar[str] = "measure.py"
    file: str
    bytes: int
    threads: int
    options: tuple[str, ...]
    """Additional options passed to llama-server."""
    llama_cpp: Annotated[str, Field(alias="llama.cpp")]
    """Version and commit"""
    machine: Machine
    prompts: dict[str, str]
    """Kind of prompt: sha256 of its text."""
    repeats: int
    """Warm requests for each prompt and n_max."""
    n_predict: int
    """Tokens generated in each request."""
    runs: tuple[Run, ...]
    by_n_max: tuple[Total, ...]
    """In ascending order of n_max; the first is without drafting. Empty for a file too large to
    run: `verdict` says so."""
    recommended_n_max: int
    verdict: str
    """The reason for the recommended n_max, in words."""
    memory_bytes: int | None
    perplexity: float | None
    kl_divergence: KlDivergence | None
    text: Annotated[Text | None, UNLESS_NONE] = None

    @property
    def stem(self) -> str:
        """The file's name without .gguf."""
        return self.file.removesuffix(".gguf")

    def at(self, n_max: int) -> Total | None:
        """The total at one n_max, None if that was not measured."""
        return next((total for total in self.by_n_max if total.n_max == n_max), None)
