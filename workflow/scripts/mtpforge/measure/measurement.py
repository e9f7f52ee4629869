"""Measurements as JSON: of a file, and of one that was not made here."""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from pydantic import Field

from mtpforge.io.records import UNLESS_NONE, Record

Spread = tuple[float, float]
"""Tokens per second of the slowest and of the fastest round."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The machine: its processor, the number of processors, the devices llama.cpp sees."""

    processor: str
    processors: int | None
    devices: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Run:
    """Requests with one prompt and one pair of n_max and p_min; `state` is cold or warm."""

    n_max: int
    """Tokens drafted ahead; 0: no drafting."""
    p_min: float
    """Probability below which no token is drafted, 0 to 1."""
    kind: str
    """Kind of prompt: code, prose, structured."""
    form: str
    """raw; or by the model's chat template: chat (without thinking), thinking."""
    state: str
    repeats: int
    """Rounds, each with a server of its own."""
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
    """All kinds of prompts at one n_max and p_min: warm, except `cold_tokens_per_second`."""

    n_max: int
    p_min: float
    repeats: int
    """Rounds; a pair that was clearly slower than another has one."""
    tokens_per_second: float
    spread: Spread
    cold_tokens_per_second: float
    drafts: int
    accepted: int
    acceptance: float | None
    by_position: tuple[float, ...]
    speedup: float | None
    """tokens_per_second relative to that without drafting; None if the speeds were not steady"""
    memory_bytes: int | None
    """Peak resident size of llama-server, mapped pages of the file included; None without /proc."""


@dataclass(frozen=True, kw_only=True)
class KindSpeed:
    """One kind of prompt in one form, with the fastest pair and without drafting."""

    kind: str
    form: str
    n_max: int
    """The fastest pair; 0 if nothing was drafted."""
    p_min: float
    tokens_per_second: float
    without: float
    """Tokens per second without drafting."""
    speedup: float | None
    """None if nothing was drafted, the form was measured once, or the speeds were not steady."""
    acceptance: float | None


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
    """Share of tokens with the same most probable token as BF16, 0 to 1."""
    same_top_error: Annotated[float | None, UNLESS_NONE] = None


@dataclass(frozen=True, kw_only=True)
class Text:
    """The text on which perplexity was measured: at most `chunks` chunks of 512 tokens."""

    name: str
    sha256: str
    chunks: int


@dataclass(frozen=True, kw_only=True)
class Score:
    """The score on tasks with known answers."""

    tasks: int
    share: float
    """Of right answers, 0 to 1."""
    error: float
    """Standard error of the share."""


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
    """Kind of prompt: sha256 of its text; without kinds that were left out."""
    repeats: int
    """Rounds of the fastest pair and of no drafting."""
    n_predict: int
    """Tokens generated in each request."""
    runs: tuple[Run, ...]
    by_n_max: tuple[Total, ...]
    """In ascending order of n_max and p_min; the first is without drafting. Empty for a file too
    large to run: `verdict` says so."""
    by_kind: tuple[KindSpeed, ...]
    steady: bool
    """Whether the speeds of the rounds agree, and no other program took processors."""
    waiting: float | None
    """Share of the time in which llama-server's threads waited for a processor; None if unknown."""
    recommended_n_max: int | None
    """0: no drafting. None if speeds were not steady or not measured."""
    recommended_p_min: float | None
    verdict: str
    """The reason for the recommendation, in words."""
    memory_bytes: int | None
    perplexity: float | None
    kl_divergence: KlDivergence | None
    cut_short: Annotated[bool, Field(exclude_if=lambda cut: not cut)] = False
    """Whether `minutes` ended the search for the fastest pair early."""
    text: Annotated[Text | None, UNLESS_NONE] = None
    tasks: Annotated[dict[str, Score], Field(exclude_if=lambda scores: not scores)] = field(
        default_factory=dict
    )
    """Kind of tasks: hellaswag, winogrande, multiple_choice."""

    @property
    def stem(self) -> str:
        """The file's name without .gguf."""
        return self.file.removesuffix(".gguf")

    def warm(self, kind: str) -> list[Run]:
        """The warm runs of a kind of prompt, in the form that all pairs were measured with."""
        runs = [run for run in self.runs if (run.kind, run.state) == (kind, "warm")]
        return [run for run in runs if run.form == runs[0].form]  # that form is the first

    def took_turns(self, total: Total) -> bool:
        """Whether a total is that of no drafting, or of the pair that took turns with it."""
        pairs = {(each.n_max, each.p_min) for each in self.by_kind}
        return not total.n_max or (total.n_max, total.p_min) in pairs

    @property
    def confirmed(self) -> Total | None:
        """The total of the pair that took turns with no drafting; None if nothing drafted.

        Another may have been faster in its only round.
        """
        drafting = [total for total in self.by_n_max if total.n_max]
        own = [total for total in drafting if self.took_turns(total)]
        return max(own or drafting, key=lambda total: total.tokens_per_second, default=None)

    def at(self, n_max: int, p_min: float | None = None) -> Total | None:
        """The total of a pair, None if that was not measured. Without p_min: of the fastest."""
        found = [
            total
            for total in self.by_n_max
            if total.n_max == n_max and p_min in (None, total.p_min)
        ]
        return max(found, key=lambda total: total.tokens_per_second, default=None)


@dataclass(frozen=True, kw_only=True)
class Other(Record):
    """The results of measure_other.py for one file that was not made here."""

    written_by: ClassVar[str] = "measure_other.py"
    name: str
    """OWNER/NAME/FILE.gguf of a file from the Hub, FILE.gguf of a local one."""
    revision: Annotated[str | None, UNLESS_NONE] = None
    """The commit of a file from the Hub."""
    bytes: int
    """With all shards"""
    bits_per_weight: float | None = None
    """None if the file cannot be read."""
    llama_cpp: Annotated[str, Field(alias="llama.cpp")]
    perplexity: float | None = None
    kl_divergence: KlDivergence | None = None
    problem: Annotated[str | None, UNLESS_NONE] = None
    """Why there are no figures, in words."""
