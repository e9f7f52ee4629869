"""The request that a file is verified against."""

from dataclasses import dataclass
from pathlib import Path

from mtpforge.quantize.recipe import NO_HEAD, Recipe

LEAST_ACCEPTANCE = 0.1
"""Share of accepted drafts below which a head is dead or damaged, whatever the user asks for."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """The requested properties of a file. A check is skipped if the field it needs is None."""

    checkpoint: Path | None = None
    reference: Path | None = None
    """The proven BF16 GGUF, instead of the checkpoint, if upstream converts the architecture."""
    digests: Path | None = None
    """sha256 of the file's tensors, recorded by conversion or quantization."""
    base: Path | None = None
    """The file that the head was injected into."""
    trunk: Path | None = None
    """The sha256 of the base's tensors, recorded by injection, instead of the base."""
    head_from: Path | None = None
    """The checkpoint that the head is from, if it is not the trunk's; or a GGUF made of it."""
    recorded: Path | None = None
    """Digests recorded of the checkpoint or reference (see `recorded`)."""
    head_recorded: Path | None = None
    """The same of `head_from`."""
    target_recorded: Path | None = None
    """The same of the target."""
    name: str | None = None
    """The model's name that conversion was given, for the metadata."""
    target: Path | None = None
    """The model that a draft sidecar or a vision tower is for."""
    target_note: str = ""
    """Why that is not the model of choice; empty if it is."""
    file_type: str | None = None
    head: str | None = None
    """Type of the head; "none" for a file without one."""
    head_tensors: Recipe = ()
    """Exceptions to the type of the head, by pattern."""
    recipe: Recipe = ()
    tokenizer_pre: str | None = None
    """Pre-tokenizer that conversion was told to use, for the metadata."""
    chat_template: str | None = None
    """Chat template that conversion was given, in place of the checkpoint's."""
    norm_form: str | None = None
    """Form of norms in doubt that conversion was told."""
    unquantized: Path | None = None
    """Acceptance of the BF16 file of the same model, from acceptance.py."""
    max_acceptance_drop: float = 0.2
    """How far below `unquantized` acceptance may be."""
    prompts: tuple[str, ...] = ()
    min_acceptance: float = LEAST_ACCEPTANCE

    @property
    def headless(self) -> bool:
        """Whether the file should have no head."""
        return self.head == NO_HEAD

    @property
    def part(self) -> str:
        """The part of the checkpoint that the file has, as conversion names it."""
        return "trunk" if self.headless else "draft" if self.target else "all"

    @property
    def ours(self) -> bool:
        """Whether the trunk was quantized here, not elsewhere."""
        return self.file_type is not None and not self.head_only

    @property
    def head_only(self) -> bool:
        """Whether only the head has a source: the trunk is a base's, as its digests prove."""
        return self.head_from is not None and self.checkpoint is None
