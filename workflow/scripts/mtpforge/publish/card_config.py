"""The part of a model's configuration that its card shows."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from mtpforge.publish.markdown import code, escape

HUB = "https://huggingface.co"


@dataclass(frozen=True)
class Checkpoint:
    """Where the checkpoint comes from: a commit of a repository on the Hub, or a local folder."""

    repo: str | None = None
    revision: str | None = None
    path: str | None = None

    @property
    def url(self) -> str | None:
        """The address of its files on the Hub; None for a local folder."""
        return f"{HUB}/{self.repo}/blob/{self.revision}/" if self.repo else None


@dataclass(frozen=True)
class About:
    """Name of the model, its checkpoint, its variants, and the repository to publish it in."""

    name: str
    checkpoint: Checkpoint
    variants: Mapping[str, Any]
    repo: str | None = None

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the JSON that the rule `card` passes."""
        entry = json.loads(text)
        return cls(
            name=entry["name"],
            checkpoint=Checkpoint(**entry["source"]),
            variants=entry["variants"],
            repo=entry.get("publish", {}).get("repo"),
        )

    @property
    def title(self) -> str:
        """The name of the repository, or the one that it should have."""
        return self.repo.split("/")[1] if self.repo else f"{self.name}-MTP-GGUF"

    @property
    def origin(self) -> str:
        """Markdown: the original model, with a link if it is on the Hub."""
        repo = self.checkpoint.repo
        return f"[{escape(repo)}]({HUB}/{repo})" if repo else escape(self.name)

    @property
    def source(self) -> str:
        """Markdown: the exact checkpoint."""
        if self.checkpoint.repo:
            return f"{self.origin}, commit {code(str(self.checkpoint.revision))}"
        return f"a local folder, {code(str(self.checkpoint.path))}"
