"""A published file with its report and measurement, as the model card sees it."""

from dataclasses import dataclass

from mtpforge.gguf.reader import Gguf
from mtpforge.llama_cpp import converter_architectures
from mtpforge.measure.measurement import Measurement, Total
from mtpforge.verify.report import Report


@dataclass(frozen=True)
class Result:
    """A published GGUF, or the folder of a split one: its report, measurement and metadata."""

    report: Report
    measured: Measurement | None
    gguf: Gguf
    """The file, or all shards as one."""

    @property
    def name(self) -> str:
        """Its path in the repository."""
        return self.report.file

    @property
    def shards(self) -> list[str]:
        """Paths in the repository: the shards of a split file, or the file."""
        return [path for path, _, _ in self.report.published]

    @property
    def is_model(self) -> bool:
        """Whether it is a complete model, neither a sidecar nor a vision tower."""
        return not self.gguf.is_vision and not self.name.startswith("mtp-")

    @property
    def is_sidecar(self) -> bool:
        """Whether it is a head as a separate draft model."""
        return not self.gguf.is_vision and not self.is_model

    @property
    def has_head(self) -> bool:
        """Whether the file has an MTP head."""
        return bool(self.gguf.head_blocks)

    @property
    def why_not_drafting(self) -> str | None:
        """Why llama-server cannot draft with the head of a model; None if it can or has none."""
        if not (self.is_model and self.has_head):
            return None
        return converter_architectures.why_not_drafting(self.gguf)

    @property
    def drafts(self) -> bool:
        """Whether llama-server drafts with this file alone."""
        return self.is_model and self.has_head and self.why_not_drafting is None

    @property
    def is_steady(self) -> bool:
        """Whether its speed was measured, and was steady."""
        return self.measured is not None and bool(self.measured.by_n_max) and self.measured.steady

    @property
    def n_max(self) -> int | None:
        """The recommended draft length (0: no drafting); None if it is not known.

        That is if speed was not measured, or was not steady.
        """
        found = self.measured
        return found.recommended_n_max if found and found.by_n_max else None

    @property
    def p_min(self) -> float:
        """The probability below which no token should be drafted."""
        return (self.measured.recommended_p_min if self.measured else None) or 0.0

    @property
    def options(self) -> list[str]:
        """Further options of llama-server with which it was measured."""
        return [] if self.measured is None else list(self.measured.options)

    def at(self, n_max: int) -> Total | None:
        """The speed and acceptance at one draft length; None if that was not measured.

        The recommended length is taken with the recommended `p_min`, others with their fastest.
        """
        p_min = self.p_min if n_max == self.n_max else None
        return None if self.measured is None else self.measured.at(n_max, p_min)
