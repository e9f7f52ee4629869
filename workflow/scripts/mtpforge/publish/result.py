"""A published file and its report, as the card and the pages see it; escaping for Markdown."""

import html
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mtpforge.gguf.reader import Gguf
from mtpforge.llama_cpp import architectures

HUB = "https://huggingface.co"

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """A published file, or the folder of a split one: its report, its measurements if there are, and the GGUF (the first)."""

    report: Json
    measured: Json | None
    opened: Gguf

    @property
    def name(self) -> str:
        """As it lies in the repository."""
        return str(self.report["file"])

    @property
    def parts(self) -> list[str]:
        """The files of a split one, as they lie in the repository; else the file."""
        return [f"{self.name}/{file['name']}" for file in self.report.get("files", ())] or [
            self.name
        ]

    @property
    def drafts(self) -> bool:
        """Whether it is a model that llama.cpp drafts with, alone."""
        return (
            self.is_model
            and bool(self.opened.head_blocks)
            and architectures.why_not_drafting(self.opened) is None
        )

    @property
    def is_model(self) -> bool:
        """Not a sidecar, and not a vision tower."""
        return not self.opened.is_vision and not self.name.startswith("mtp-")

    @property
    def n_max(self) -> int | None:
        """How many tokens to draft ahead: what measurement recommends (0: none), None where nothing was measured."""
        return None if self.measured is None else int(self.measured["recommended_n_max"])

    def measured_at(self, n_max: int) -> Json:
        """What was measured with so many tokens drafted ahead; empty where that was not."""
        return next(
            (
                entry
                for entry in (self.measured or {}).get("by_n_max", ())
                if entry["n_max"] == n_max
            ),
            {},
        )


def escape(text: str) -> str:
    """Text as Markdown shows it, also in a table: nothing in it is markup."""
    return re.sub(
        r"([\\`*\[\]|~$]|\b_\B|\B_\b)", r"\\\1", html.escape(" ".join(text.split()), quote=False)
    )


def code(text: str) -> str:
    """Text between backticks, of which it has none itself."""
    return f"`{' '.join(text.split()).replace('`', '')}`"
