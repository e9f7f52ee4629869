"""A variant in `config.yaml`: its types, its head, its base and its importance matrix."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, model_validator

from mtpforge.gguf import quant_types
from mtpforge.quantize.recipe import NO_HEAD, default_head
from mtpforge.rules.fields import (
    CalibrationTexts,
    Candidates,
    Entry,
    FileName,
    FilePath,
    FileRevision,
    FileType,
    Folder,
    GgufName,
    GgufPath,
    HeadType,
    Recipe,
    Repository,
    Revision,
    Size,
    Target,
    TensorType,
    by_key,
    by_type,
    form,
)
from mtpforge.rules.local_paths import FileOnDisk


class HubRepository(Entry):
    """A repository of the Hub at a pinned commit."""

    repo: Repository = Field(description="The repository on the Hub.", examples=["Qwen/Qwen3.5-4B"])
    revision: Revision = Field(
        description="The commit hash (40 hex digits), for reproducible builds.",
        examples=["851bf6e806efd8d0a36b00ddf55e13ccb7b8cd0a"],
    )


class LocalFolder(Entry):
    """A folder on this machine."""

    path: Folder = Field(
        description="A folder with config.json, the tokenizer and the safetensors shards."
    )


class OwnBase(Entry):
    """A base that is quantized here."""

    type: FileType = Field(
        description="Quantize the checkpoint without its head to this type, and inject into that."
    )


class LocalGguf(Entry):
    """A GGUF on this machine."""

    path: GgufPath = Field(description="A GGUF on this machine; if split, its first file.")


class ImatrixText(Entry):
    """An importance matrix that is computed here."""

    text: CalibrationTexts = Field(
        description=(
            "Compute it with llama-imatrix from this text of at least 1,024 tokens, or from the"
            " *.txt files of a folder, in the order of their names; `default`: the embedded text."
        ),
        examples=["calibration.txt", "default"],
    )
    chat: bool = Field(
        default=False,
        description=(
            "Put the text through the model's chat template: paragraphs become by turns what the"
            " user says and the model answers, and each line of a *.jsonl is a conversation."
        ),
    )

    @property
    def is_plain(self) -> bool:
        """Whether it is one text, which llama.cpp reads as it is."""
        return not (self.chat or Path(self.text).is_dir())


class LocalFile(Entry):
    """An importance matrix on this machine."""

    path: FilePath = Field(description="A file that llama-imatrix wrote.")


class HubFile(HubRepository):
    """An importance matrix in a repository of the Hub."""

    file: FileName = Field(
        description="A file in the repository, with its folder, that llama-imatrix wrote."
    )
    revision: FileRevision = Field(description="The commit hash (40 hex digits).")


class HubGguf(HubFile):
    """A GGUF in a repository of the Hub."""

    file: GgufName = Field(
        description="A GGUF in the repository, with its folder; if split, its first file."
    )


class HeadTypes(Entry):
    """Types of a head's tensors, with exceptions by pattern."""

    type: TensorType = Field(description="Tensor type of the head.", examples=["Q4_K"])
    tensors: Recipe | None = Field(
        default=None,
        description="Exceptions by pattern; the first pattern found in a tensor's name wins.",
        examples=[{"eh_proj": "Q8_0"}],
    )


Source = Annotated[
    Annotated[LocalFolder, form("path")] | Annotated[HubRepository, form("repo")],
    by_key("path", "repo"),
]
Base = Annotated[
    Annotated[OwnBase, form("type")]
    | Annotated[LocalGguf, form("path")]
    | Annotated[HubGguf, form("repo")],
    by_key("type", "path", "repo"),
]
OtherGguf = Annotated[
    Annotated[LocalGguf, form("path")] | Annotated[HubGguf, form("repo")], by_key("path", "repo")
]
Imatrix = Annotated[
    Annotated[ImatrixText, form("text")]
    | Annotated[LocalFile, form("path")]
    | Annotated[HubFile, form("repo")],
    by_key("text", "path", "repo"),
]
Head = Annotated[
    Annotated[HeadType, form("type")] | Annotated[HeadTypes, form("types")],
    by_type("type", "types"),
]
Tensors = Annotated[
    Annotated[str, form("name")] | Annotated[Recipe, form("recipe")],
    by_type("name", "recipe"),
]
CANDIDATES = ("IQ3_S", "IQ4_XS", "Q4_K", "Q5_K", "Q6_K", "Q8_0")
"""Tensor types that a search chooses from, unless it is told otherwise."""
LABEL = "Q4_K_M"
"""Type in the metadata of a file that is made for an amount of bytes; llama.cpp only shows it."""
TEXT = "workflow/texts/mixed.txt"
SPLIT = "Publish shards of at most this size, in a folder; llama.cpp finds all from the first one."
PIECES = (
    "Number of parallel quantization jobs; finished jobs survive a restart. By default, a job takes"
    " about two hours on this machine's cores, and work below three hours is one job."
)


class Variant(Entry):
    """One published file: its type, its head, and how it is made."""

    type: FileType | None = Field(
        default=None,
        description="Quantization type, as llama-quantize names it. Default: the variant's name.",
        examples=["Q4_K_M", "IQ4_XS"],
    )
    head: Head | None = Field(
        default=None,
        description=(
            "Tensor type of the head, optionally with exceptions by pattern; `none` leaves the"
            " head out. Default: Q8_0, or the file's own type if it is F32, F16 or BF16."
        ),
        examples=["BF16", {"type": "Q4_K", "tensors": {"eh_proj": "Q8_0"}}, "none"],
    )
    tensors: Tensors | None = Field(
        default=None,
        description=(
            "Tensor types by pattern, or the name of a recipe under `recipes`; the first pattern"
            " found in a tensor's name wins."
        ),
        examples=["mine", {"attn_": "Q6_K", "ssm_": "Q8_0"}],
    )
    size: Target | None = Field(
        default=None,
        description=(
            "Find the best tensor types for a file of at most this size: an amount, or a type"
            " whose file would be as large. The head counts."
        ),
        examples=["Q4_K_M", "11G"],
    )
    bits: float | None = Field(
        default=None,
        ge=1,
        le=16,
        description="The same size in bits per weight of the whole file.",
        examples=[3.5],
    )
    sensitivity: Literal["prior", "class", "tensor"] | None = Field(
        default=None,
        description=(
            "How to tell which tensors matter, for `size` and `bits`: by running the BF16 file with"
            " each class of tensors and each layer quantized, with each tensor quantized, or by a"
            " table, without a run. Default: class."
        ),
    )
    candidates: Candidates | None = Field(
        default=None,
        min_length=1,
        description=(
            f"Tensor types to choose from, for `size` and `bits`. Default: {', '.join(CANDIDATES)}."
        ),
        examples=[["IQ4_XS", "Q5_K", "Q6_K", "Q8_0"]],
    )
    text: FilePath | None = Field(
        default=None,
        description=(
            "A text of at least 2,048 tokens to run the model on for `sensitivity`; not the one"
            " that is measured. Default: the importance matrix's, or workflow/texts/mixed.txt."
        ),
        examples=["calibration.txt"],
    )
    base: Base | None = Field(
        default=None,
        description=(
            "Inject the head into this GGUF instead of quantizing the checkpoint: one that is"
            " quantized here, any GGUF on disk, or any GGUF on the Hub."
        ),
        examples=[{"type": "Q4_K_M"}, {"path": "downloads/model-Q4_K_M.gguf"}],
    )
    head_from: Source | None = Field(
        default=None,
        description=(
            "The checkpoint that has the head to inject into the base. Default: the model's"
            " `head_from`, or its source."
        ),
        examples=[{"path": "checkpoints/original"}],
    )
    imatrix: Imatrix | None = Field(
        default=None,
        description=(
            "Importance matrix to quantize with: computed from a text, or a file on disk or on the"
            f" Hub. Required by {', '.join(quant_types.NEED_IMATRIX)}."
        ),
        examples=[{"text": "calibration.txt"}],
    )
    replace_head: bool = Field(
        default=False, description="Replace the head of a base that already has a different one."
    )
    split: Size | None = Field(
        default=None, description=f"{SPLIT} Default: the model's.", examples=["500M", "48G"]
    )
    pieces: int | None = Field(
        default=None, ge=1, le=999, description=f"{PIECES} Default: the model's."
    )

    _name: str = PrivateAttr("")

    @model_validator(mode="before")
    @classmethod
    def _use_defaults(cls, value: Any) -> Any:
        """`Q4_K_M:` with nothing behind it is a variant with the defaults."""
        return {} if value is None else value

    @property
    def name(self) -> str:
        """Its key under `variants`."""
        return self._name

    @property
    def file_type(self) -> str:
        """The type of the file; only a label if it is searched, or its base is from elsewhere."""
        if self.type:
            return self.type
        if isinstance(self.base, OwnBase):
            return self.base.type
        if self.searched and self.name not in quant_types.FILE_TYPES:
            return self.size if self.size in quant_types.FILE_TYPES else LABEL
        return self.name

    @property
    def searched(self) -> bool:
        """Whether its tensor types are found for a size."""
        return self.size is not None or self.bits is not None

    @property
    def method(self) -> str:
        """How the sensitivities are found."""
        return self.sensitivity or "class"

    @property
    def searched_types(self) -> list[str]:
        """The tensor types to choose from."""
        return list(self.candidates or CANDIDATES)

    @property
    def searched_text(self) -> str | None:
        """The text to run the model on, if it is run."""
        if not self.searched or self.method == "prior":
            return None
        matrix = self.imatrix
        if self.text is None and isinstance(matrix, ImatrixText) and matrix.is_plain:
            return matrix.text
        return self.text or FileOnDisk(TEXT)

    @property
    def foreign(self) -> bool:
        """Whether the base was quantized elsewhere, so its types are given."""
        return self.base is not None and not isinstance(self.base, OwnBase)

    @property
    def head_types(self) -> HeadTypes | None:
        """The types of the head; None for a file without one."""
        if isinstance(self.head, HeadTypes):
            return self.head
        name = self.head or default_head(self.file_type)
        return None if name == NO_HEAD else HeadTypes(type=name)

    @property
    def head_type(self) -> str:
        """The type of the head without its exceptions, or `none`."""
        return self.head_types.type if self.head_types else NO_HEAD

    @property
    def unquantized(self) -> bool:
        """Whether it is only a conversion of the checkpoint."""
        kept = (*quant_types.UNQUANTIZED, *quant_types.PACKED)
        return self.base is None and self.file_type in kept

    @property
    def converted(self) -> bool:
        """Whether its file is what conversion writes; one of F16 or F32 is quantized from that."""
        return self.base is None and self.file_type in ("BF16", *quant_types.PACKED)

    @property
    def part(self) -> str:
        """The part of the checkpoint that it is made from."""
        return "all" if self.head_types else "trunk"

    @property
    def recipe(self) -> dict[str, str]:
        """Tensor types by pattern; empty without a recipe."""
        return self.tensors if isinstance(self.tensors, dict) else {}
