"""The source that a file is compared with: a checkpoint, or the BF16 GGUF that upstream made."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from mtpforge import recorded_digests
from mtpforge.checkpoint.checkpoint import Checkpoint
from mtpforge.checkpoint.families.registry import family_of
from mtpforge.convert import donor_head, native, norm_shift, plan
from mtpforge.convert.plan import ConvertedTensor
from mtpforge.convert.tensor_names import EMBEDDINGS, canonical_names
from mtpforge.errors import GgufError
from mtpforge.gguf import split
from mtpforge.gguf.metadata import Value
from mtpforge.gguf.reader import TensorInfo
from mtpforge.io.text import TEMPLATE_LIMIT, read_json, read_text
from mtpforge.verify import tensors
from mtpforge.verify.metadata import TEMPLATE, templates_in
from mtpforge.verify.request import Request
from mtpforge.verify.tensors import SourceRows


class Source(Protocol):
    """The expected content of a file."""

    @property
    def architecture(self) -> str:
        """The value of general.architecture."""

    @property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Names, shapes and unquantized types of all tensors."""

    @property
    def head_blocks(self) -> range | None:
        """The blocks of the head; None if only the metadata tells."""

    @property
    def note(self) -> str:
        """Why not all values can be compared; empty if they can."""

    @property
    def norm_note(self) -> str:
        """The norms that the source stores as w, once `rows` has read them; empty if none."""

    def metadata(self) -> Mapping[str, Value]:
        """The metadata that conversion writes. Raises ForgeError."""

    def templates(self) -> Mapping[str, str]:
        """The chat templates, by their keys in a GGUF."""

    def rows(self) -> Mapping[str, SourceRows]:
        """The expected values of each tensor. Raises ForgeError."""

    def check(self, names: Iterable[str]) -> None:
        """Check tensors of `rows` against their recorded digests. Raises DamagedError."""


def open_source(request: Request) -> Source | None:
    """The source that a request names, if it names one. Raises ForgeError."""
    if request.head_from and request.head_from.is_file():
        return GgufSource(request.head_from, request.head_recorded, head_only=True)
    donor = None
    if request.head_from:
        donor = Checkpoint(
            request.head_from, norms=request.norm_form, recorded=request.head_recorded
        )
    if request.checkpoint:
        checkpoint = Checkpoint(
            request.checkpoint, request.name, request.norm_form, request.recorded
        )
        checkpoint.chat_template = request.chat_template
        return CheckpointSource(
            checkpoint,
            request.part,
            request.tokenizer_pre,
            donor=donor,
        )
    if donor:
        return CheckpointSource(donor, request.part, head_only=True)
    return GgufSource(request.reference, request.recorded) if request.reference else None


class CheckpointSource:
    """A checkpoint of a family that we convert ourselves.

    With a donor, the head is the donor's. With `head_only`, the trunk has no source, as if the
    checkpoint had none.
    """

    head_blocks: range | None = None
    norm_note = ""

    def __init__(
        self,
        checkpoint: Checkpoint,
        part: str,
        tokenizer_pre: str | None = None,
        *,
        donor: Checkpoint | None = None,
        head_only: bool = False,
    ) -> None:
        self._checkpoint = checkpoint
        self._donor = donor
        self._planned: dict[str, tuple[Checkpoint, ConvertedTensor]] = {}
        self._family = family_of(self._checkpoint.architecture)
        self._hparams = plan.settled_hparams(self._checkpoint, self._family)
        self._tokenizer_pre = tokenizer_pre
        plan.check_sizes(self._hparams)
        self.architecture = self._family.gguf_architecture
        self.tensors = {
            row.name: TensorInfo(row.name, row.shape, row.type)
            for row in self._family.rows(self._hparams, part)
        }
        names = canonical_names(self._checkpoint, self._family)
        head_alone = part == "all" and EMBEDDINGS not in names  # and without a tokenizer
        self._part = "head" if head_alone or head_only else part
        self.note = "; the checkpoint here has only the head" if head_alone else ""
        if head_only:
            self.note = "; only the head is this checkpoint's"

    def metadata(self) -> Mapping[str, Value]:
        rows = list(self.tensors.values())
        return native.describe(
            self._checkpoint,
            self._family,
            hparams=self._hparams,
            part=self._part,
            infos=rows,
            tokenizer_pre=self._tokenizer_pre,
        )

    def templates(self) -> Mapping[str, str]:
        given = self._checkpoint.chat_template
        return chat_templates(self._checkpoint.directory) if given is None else {TEMPLATE: given}

    def rows(self) -> Mapping[str, SourceRows]:
        if self._donor is None:
            planned = norm_shift.plan_by_values(self._checkpoint, self._part)
            halves = [(self._checkpoint, item) for item in planned]
        else:
            halves = donor_head.plan_halves(self._checkpoint, self._donor, self._part)
        self.norm_note = norm_shift.note(item for _, item in halves)
        self._planned = {item.row.name: (half, item) for half, item in halves}
        rows: dict[str, SourceRows] = {}
        for half, item in halves:
            rows |= tensors.rows_of_checkpoint(half, [item])
        return rows

    def check(self, names: Iterable[str]) -> None:
        """Also check what is left of freed tensors: nothing else can tell if it has changed."""
        named = set(names)
        for name, (half, item) in self._planned.items():
            if name in named or any(map(half.integrity.kept, item.tensors)):
                half.integrity.add([*item.tensors, *item.scales])
        self._checkpoint.integrity.check()
        if self._donor:
            self._donor.integrity.check()


class GgufSource:
    """The BF16 GGUF of an architecture that upstream converts.

    With `head_only`, only the head is compared with it.
    """

    norm_note = ""

    def __init__(self, path: Path, recorded_at: Path | None, head_only: bool = False) -> None:
        self._recorded = recorded_at
        self._reference = split.joined(recorded_digests.shards(path, recorded_at))
        self._compared = self._reference.head if head_only else self._reference
        self.note = "; only the head is this file's" if head_only else ""
        if head_only and not (self._compared.tensors and self._reference.trunk.tensors):
            raise GgufError(f"{path}: has no head, or nothing else: name a GGUF of the whole model")
        self.architecture = self._reference.architecture
        self.tensors = self._reference.tensors
        self.head_blocks: range | None = self._reference.head_blocks

    def metadata(self) -> Mapping[str, Value]:
        return self._reference.metadata

    def templates(self) -> Mapping[str, str]:
        return templates_in(self._reference)

    def rows(self) -> Mapping[str, SourceRows]:
        return tensors.rows_of_gguf(self._compared)

    def check(self, names: Iterable[str]) -> None:
        ranges = self._compared.ranges
        places = [(name, ranges[name]) for name in names] if self._recorded else []
        with recorded_digests.hashing(self._recorded, places):
            pass


def chat_templates(directory: Path) -> dict[str, str]:
    """A checkpoint's chat templates by their keys in a GGUF, never rendered.

    The key in tokenizer_config.json is preferred to other files, even if it is null; without that
    file there are none.
    """
    path = directory / "tokenizer_config.json"
    settings = read_json(path) if path.exists() else {}
    if not settings:
        return {}
    given = settings["chat_template"] if "chat_template" in settings else _template_file(directory)
    named = given if isinstance(given, list) else [{"name": "default", "template": given}]
    found = {str(entry.get("name")): entry.get("template") for entry in named if entry}
    return {
        _template_key(name): text for name, text in found.items() if text and isinstance(text, str)
    }


def _template_file(directory: Path) -> object:
    """The content of a file with templates: a text, or a list of objects with name and template."""
    if (path := directory / "chat_template.jinja").exists():
        more = (directory / "additional_chat_templates").glob("*.jinja")
        named = {"default": path} | {other.stem: other for other in more}
        return [
            {"name": name, "template": text.replace("\r\n", "\n").replace("\r", "\n")}
            for name, file in named.items()
            for text in [read_text(file, most=TEMPLATE_LIMIT, within=directory)]
        ]
    path = directory / "chat_template.json"
    return read_json(path).get("chat_template") if path.exists() else None


def _template_key(name: str) -> str:
    plain = re.sub("[^A-Za-z0-9]", "_", name)
    return TEMPLATE if name == "default" else f"{TEMPLATE}.{plain}"
