"""The part of a model's configuration that its card shows."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from mtpforge.errors import ConfigError
from mtpforge.io.text import parse_json
from mtpforge.measure.measurement import Text
from mtpforge.publish.markdown import code, escape, link
from mtpforge.quantize.coverage import Coverage

HUB = "https://huggingface.co"
_COPIED = "Only the head is new; every other tensor was copied byte for byte."


@dataclass(frozen=True)
class Checkpoint:
    """Where a checkpoint or base comes from: a commit of a repository on the Hub, or a path."""

    repo: str | None = None
    revision: str | None = None
    path: str | None = None
    file: str | None = None
    """The base in the repository; None for a checkpoint."""

    @property
    def url(self) -> str | None:
        """The address of its files on the Hub; None for a local path."""
        return f"{HUB}/{self.repo}/blob/{self.revision}/" if self.repo else None

    @property
    def link(self) -> str:
        """Markdown: its repository with a link, or the last part of its path."""
        repo = self.repo
        return f"[{escape(repo)}]({HUB}/{repo})" if repo else escape(str(self.path))

    @property
    def exact(self) -> str:
        """Markdown: the same with the commit."""
        if self.repo:
            file = f"{code(self.file)} of " if self.file else ""
            return f"{file}{self.link}, commit {code(str(self.revision))}"
        kind = "file" if str(self.path).endswith(".gguf") else "folder"
        return f"a local {kind}, {code(str(self.path))}"


@dataclass(frozen=True)
class About:
    """Name of the model, where it comes from, its variants, and the repository to publish it in."""

    name: str
    checkpoint: Checkpoint | None
    """None if all variants are bases from elsewhere with the heads of donors."""
    variants: Mapping[str, Any]
    repo: str | None = None
    bases: tuple[Checkpoint, ...] = ()
    """The bases that have nothing of the checkpoint: their heads are from donors."""
    injected: tuple[Checkpoint, ...] = ()
    """The bases from elsewhere that have the checkpoint's head."""
    donors: tuple[Checkpoint, ...] = ()
    """The checkpoints that heads are from, if not from the model's own."""
    chat_template: str | None = None
    """The name of the file whose chat template stands in place of the checkpoint's."""
    matrices: tuple[str, ...] = ()
    """Markdown: what each importance matrix is, or is from, and what it covers if that is known."""
    published_matrices: tuple[str, ...] = ()
    """Markdown: a sentence on each importance matrix that is a file of the repository."""
    texts: Mapping[str, str] = field(default_factory=dict)
    """Name of an embedded text on which files are measured -> its sha256."""
    own_head: bool = False
    """Whether any file has the head of the model's own checkpoint."""

    @classmethod
    def parse(cls, text: str) -> Self:
        """Read the JSON that the rule `card` passes. Raises ConfigError."""
        entry = parse_json(Path("JSON"), text, ConfigError)
        try:
            return cls._of(entry)
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"JSON: not an entry of the rule `card` ({error})") from None

    @classmethod
    def _of(cls, entry: Mapping[str, Any]) -> Self:
        return cls(
            name=entry["name"],
            checkpoint=Checkpoint(**entry["source"]) if entry["source"] else None,
            variants=entry["variants"],
            repo=entry.get("publish", {}).get("repo"),
            bases=tuple(Checkpoint(**base) for base in entry.get("bases", ())),
            injected=tuple(Checkpoint(**base) for base in entry.get("injected", ())),
            donors=tuple(Checkpoint(**donor) for donor in entry.get("donors", ())),
            chat_template=entry.get("chat_template"),
            matrices=tuple(map(_matrix, entry.get("matrices", ()))),
            published_matrices=tuple(
                _published(each) for each in entry.get("matrices", ()) if "published" in each
            ),
            texts=entry.get("texts", {}),
            own_head=entry.get("own_head", False),
        )

    def text(self, found: Text) -> str:
        """Markdown: the name of a text, and whether it is an embedded one."""
        ours = "mtpforge's " if self.texts.get(found.name) == found.sha256 else ""
        return ours + code(found.name)

    def covered(self, coverages: Iterable[Coverage]) -> Self:
        """With what the importance matrices cover, in the same order."""
        both = zip(self.matrices, coverages, strict=True)
        return replace(self, matrices=tuple(f"{words}; {found.covers}" for words, found in both))

    @property
    def title(self) -> str:
        """The name of the repository, or the one that it should have."""
        name = self.name.removesuffix("-MTP")
        return self.repo.split("/")[1] if self.repo else f"{name}-MTP-GGUF"

    @property
    def trunks(self) -> list[Checkpoint]:
        """The checkpoint and bases that trunks are from."""
        return [*([self.checkpoint] if self.checkpoint else []), *self.bases]

    @property
    def origin(self) -> str:
        """Markdown: the original models, with links if they are on the Hub."""
        names = [trunk.link if trunk.repo else escape(self.name) for trunk in self.trunks]
        return " and ".join(dict.fromkeys(names))

    @property
    def head(self) -> str:
        """Markdown: the models that the heads are from; empty if all are the model's own."""
        own = [self.checkpoint] if self.checkpoint and self.own_head and self.donors else []
        return " and ".join(dict.fromkeys(found.link for found in [*own, *self.donors]))

    @property
    def given_heads(self) -> str:
        """Markdown: the bases from elsewhere that get the checkpoint's head; empty if none."""
        return " and ".join(dict.fromkeys(base.link for base in self.injected))

    @property
    def sources(self) -> list[str]:
        """Markdown: everything that files are made from, one line each."""
        lines = [f"Checkpoint: {self.checkpoint.exact}"] if self.checkpoint else []
        lines += [f"Base: {base.exact}. {_COPIED}" for base in (*self.bases, *self.injected)]
        lines += [f"Head from: {donor.exact}" for donor in self.donors]
        if self.chat_template:
            lines.append(f"Chat template: a local file, {code(self.chat_template)}")
        return lines + [f"Importance matrix: {words}" for words in self.matrices]


def _published(entry: Mapping[str, Any]) -> str:
    """What an importance matrix in the repository is, and what it is for."""
    name = entry["published"]
    return (
        f"{link(name, name)} is the importance matrix that llama-imatrix computed "
        f"{_matrix(entry, digest=False)}, with the unquantized model. "
        "`llama-quantize --imatrix` makes other quantizations with it."
    )


def _matrix(entry: Mapping[str, Any], digest: bool = True) -> str:
    """What an importance matrix of the configuration is, or is computed from."""
    if "text" in entry:
        how = ", put through the chat template" if entry["chat"] else ""
        ours = "mtpforge's " if "sha256" in entry else ""
        exact = f" (sha256 {code(entry['sha256'])})" if ours and digest else ""
        return f"from {ours}{code(entry['text'])}{exact}{how}"
    if "repo" in entry:
        return f"{code(entry['file'])} of {Checkpoint(entry['repo']).link}"
    return code(entry["path"])
