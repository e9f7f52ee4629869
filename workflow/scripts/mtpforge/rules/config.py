"""`config.yaml` as typed objects: each key with its type, its default and its description.

Start at `parse`. Checks that involve several keys, or files on disk, are in `config_checks`; the
JSON schema for editors comes from `schema`.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, PrivateAttr, ValidationError, model_validator
from pydantic_core import ErrorDetails

from mtpforge import suggest
from mtpforge.checkpoint.checkpoint import folder_name
from mtpforge.errors import ConfigError
from mtpforge.gguf.file_names import file_model, repository_model
from mtpforge.io import text
from mtpforge.measure.prompt_forms import FORMS, Form
from mtpforge.quantize.recipe import NO_HEAD
from mtpforge.rules.fields import (
    FORM,
    All,
    ChatTemplate,
    Entry,
    FilePath,
    MeasuredPrompts,
    MeasuredText,
    ModelName,
    OutputName,
    PreTokenizer,
    ProgramsFolder,
    Prompts,
    Recipe,
    Repository,
    S3Url,
    ServeOption,
    SidecarType,
    Size,
    VariantName,
    by_key,
    by_type,
    form,
    refuse,
    unique,
)
from mtpforge.rules.variant import (
    PIECES,
    SPLIT,
    HubGguf,
    HubRepository,
    LocalGguf,
    OtherGguf,
    OwnBase,
    Source,
    Variant,
)


def check_files(given: Iterable[Path | str]) -> None:
    """Check config.yaml, if it is there, before Snakemake reads it, and files `given` to Snakemake.

    Raises ConfigError. Snakemake has read the latter already, and merged them.
    """
    own = Path("config.yaml")
    for path in [own] * own.exists() + [Path(path) for path in given]:
        read_file(path)


def read_file(path: Path) -> dict[str, Any]:
    """The content of a configuration file; empty if it is not a mapping. Aliases may be used.

    Raises ConfigError for a file that Snakemake cannot read safely.
    """
    content = text.read_text(path, ConfigError, most=text.YAML_LIMIT, within=text.ANYWHERE)
    if content.lstrip().startswith("{"):  # JSON, which may have tabs, or YAML
        with suppress(ConfigError):
            return text.parse_json(path, content, ConfigError)
    value = text.parse_yaml(path, content, ConfigError, aliases=True)
    if isinstance(value, dict) and "__use_yte__" in value:
        raise ConfigError(f"{path}: __use_yte__: templates run code: not allowed here")
    return value if isinstance(value, dict) else {}


def parse(config: Mapping[str, Any]) -> "Config":
    """The configuration with its defaults. Raises ConfigError for the first key that is wrong."""
    try:
        return Config.model_validate(dict(config))
    except ValidationError as error:
        raise ConfigError(f"config.yaml: {_explain(error.errors())}") from None


SHARDS: Literal["shards"] = "shards"
"""The value of `lean` that builds shard by shard."""
Chosen = Annotated[
    Annotated[All, form("all")] | Annotated[list[str], AfterValidator(unique), form("list")],
    by_type("all", "list"),
]


_VERIFIED = "workflow/prompts"
_MEASURED = "workflow/prompts/measured"


class TaskFiles(Entry):
    """Files of tasks with known answers, in the forms that llama-perplexity reads."""

    hellaswag: FilePath | None = Field(
        default=None, description="HellaSwag: six lines a task; 400 random tasks of the file."
    )
    winogrande: FilePath | None = Field(default=None, description="Winogrande, as CSV.")
    multiple_choice: FilePath | None = Field(
        default=None, description="Multiple choice, in llama-perplexity's binary form."
    )

    @property
    def files(self) -> dict[str, str]:
        """The files that are given, by kind."""
        return {kind: path for kind, path in self if path}


class MeasureSettings(Entry):
    """Measurements of each file of a model."""

    n_max: Annotated[list[Annotated[int, Field(ge=1, le=64)]], AfterValidator(unique)] = Field(
        default=[1, 2, 3, 4, 6],
        min_length=1,
        description=(
            "Draft lengths to try (llama-server's --spec-draft-n-max). Speed without drafting is"
            " always measured too."
        ),
    )
    p_min: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], AfterValidator(unique)] = Field(
        default=[0, 0.75],
        min_length=1,
        description=(
            "Probabilities to try, below which no token is drafted (--spec-draft-p-min). With a"
            " high one, longer drafts pay off."
        ),
    )
    repeats: int = Field(
        default=3,
        ge=1,
        le=1000,
        description=(
            "Rounds in which the fastest pair of `n_max` and `p_min` and no drafting take turns;"
            " their median speed is reported."
        ),
    )
    minutes: int = Field(
        default=60,
        ge=1,
        description="Budget for each file: no further pair is tried if the rounds would exceed it.",
    )
    forms: Annotated[list[Form], AfterValidator(unique)] = Field(
        default=list(FORMS),
        min_length=1,
        description=(
            "Forms of prompts: as they are, and by the model's chat template without and with"
            " thinking, if it has them."
        ),
    )
    prompts: MeasuredPrompts | None = Field(
        default=None,
        description=(
            "Folder of prompts, one KIND.txt each; KIND.chat.txt and KIND.thinking.txt go through"
            " the chat template first. Or a *.jsonl with `category` and `turns`, such as"
            " SPEED-Bench's. Default: the model's, or nine kinds that come with mtpforge."
        ),
        examples=["my-prompts", "speed-bench/qualitative.jsonl"],
    )
    text: MeasuredText | None = Field(
        default=None,
        description=(
            "A text of at least 1,024 tokens to measure perplexity and KL divergence from BF16"
            " on; `default`: the embedded one. Without it, neither is measured."
        ),
    )
    chunks: int = Field(
        default=16,
        ge=1,
        le=100_000,
        description=(
            "Use at most this many chunks of 512 tokens of the text. BF16 logits take 0.13 GB of"
            " disk per chunk with a vocabulary of 248,320 tokens."
        ),
    )
    tasks: TaskFiles | None = Field(
        default=None,
        description="Tasks with known answers; the share of right ones is measured.",
        examples=[{"hellaswag": "hellaswag_val_full.txt"}],
    )
    serve: list[ServeOption] = Field(
        default_factory=list,
        description=(
            "More llama-server options to measure with; the card's commands show them too."
        ),
        examples=[["-ngl", "999", "-fa", "on"]],
    )

    @property
    def task_files(self) -> list[str]:
        """The files of tasks."""
        return list(self.tasks.files.values()) if self.tasks else []


class Upload(Entry):
    """When a model's files are uploaded, and whether they stay."""

    when: Literal["built", "verified"] = Field(
        default="built",
        description=(
            "Upload the model once all of its files are there (`built`), or each file as soon as it"
            " has passed, and card, sums and provenance at the end (`verified`)."
        ),
    )
    delete_after: bool = Field(
        default=False,
        description=(
            "For small disks, with `when: verified`: delete each file here once its repository or"
            " bucket reports its sha256."
        ),
    )

    @model_validator(mode="after")
    def _check_when(self) -> Self:
        if self.delete_after and self.when != "verified":
            refuse("needs `when: verified`, or all files are on the disk first", "delete_after")
        return self


class HubTarget(Upload):
    """The repository of the Hub that a model is uploaded to."""

    repo: Repository = Field(
        description="The repository that `snakemake --cores 1 publish` uploads the model to.",
        examples=["YOU/Qwen3.5-4B-MTP-GGUF"],
    )
    private: bool = Field(
        default=True,
        description="Create the repository as private. An existing one is left unchanged.",
    )


class S3Folder(Upload):
    """The folder in object storage that a model is uploaded to."""

    url: S3Url = Field(
        description=(
            "The folder in S3, or a service like it, that `snakemake --cores 1 publish` uploads the"
            " model to. It needs `make s3`."
        ),
        examples=["s3://my-bucket/Qwen3.5-4B"],
    )


PublishTarget = Annotated[
    Annotated[HubTarget, form("repo")] | Annotated[S3Folder, form("url")], by_key("repo", "url")
]


class Model(Entry):
    """A checkpoint, and the files to make from it."""

    source: Source | None = Field(
        default=None,
        description=(
            "The checkpoint: a local folder, or a repository of the Hub at a pinned commit. Needed"
            " unless every variant has a `base` from elsewhere and a `head_from`."
        ),
        examples=[{"path": "checkpoints/my-finetune"}],
    )
    head_from: Source | None = Field(
        default=None,
        description=(
            "Another checkpoint to take the head from, for a fine-tune that has lost its own, or"
            " the drafter of a Gemma 4. Only the head is downloaded, or all of a drafter."
        ),
        examples=[
            {"repo": "Qwen/Qwen3.5-4B", "revision": "851bf6e806efd8d0a36b00ddf55e13ccb7b8cd0a"}
        ],
    )
    name: OutputName | None = Field(
        default=None,
        description=(
            "The start of file names, and the model's name in files converted here. Default: the"
            " name of the source's folder or repository (also of a snapshot in the Hub's cache),"
            " or of the base if its head is from `head_from`."
        ),
        examples=["My-Finetune"],
    )
    converter: Literal["mtpforge", "llama.cpp"] = Field(
        default="mtpforge",
        description=(
            "Converter of the checkpoint: mtpforge's, or llama.cpp's for architectures that"
            " mtpforge does not know."
        ),
    )
    mmproj: bool = Field(
        default=False,
        description=(
            "Also make mmproj-NAME-F16.gguf, the vision tower of Qwen3.5 or Qwen4Exp, with"
            " llama.cpp's own converter."
        ),
    )
    tokenizer_pre: PreTokenizer | None = Field(
        default=None,
        description=(
            "Name of the pre-tokenizer in llama.cpp, needed if the vocabulary was changed and"
            " llama.cpp does not recognize it."
        ),
        examples=["qwen35"],
    )
    chat_template: ChatTemplate | None = Field(
        default=None,
        description=(
            "Chat template (Jinja) to write in place of the checkpoint's own ones, in files that"
            " are converted here. A base from elsewhere keeps its own."
        ),
        examples=["fixed-template.jinja"],
    )
    norms: Literal["w", "w-1"] | None = Field(
        default=None,
        description=(
            "How the checkpoint stores norms whose values do not tell it: as w, as MLX does, or as"
            " w - 1. By default a norm in doubt is an error."
        ),
    )
    prompts: Prompts = Field(
        default=_VERIFIED,
        validate_default=True,
        description="Folder of *.txt prompts that every file must draft on.",
    )
    min_acceptance: float = Field(
        default=0.1,
        ge=0.01,
        le=1,
        description=(
            "A file is refused if a smaller share of its drafted tokens is accepted. A BF16 file"
            " that exceeds the memory drafts none, and report, card and summary say so."
        ),
    )
    max_acceptance_drop: float = Field(
        default=0.2,
        gt=0,
        le=1,
        description=(
            "How far a quantized file's acceptance may fall below the BF16 file's; 1 turns the"
            " comparison off, so the BF16 file is not run."
        ),
    )
    split: Size | None = Field(default=None, description=SPLIT, examples=["500M", "48G"])
    pieces: int | None = Field(default=None, ge=1, le=999, description=PIECES)
    sidecar: SidecarType | None = Field(
        default=None,
        description=(
            "Also make mtp-NAME-TYPE.gguf of this type, the head as a separate draft model"
            " (llama-server -md). MXFP4: as llama.cpp's converter writes it, for DeepSeek-V4."
        ),
        examples=["Q8_0"],
    )
    measure: MeasureSettings | None = Field(
        default=None,
        description=(
            "Measure speed and acceptance of each file, and optionally its KL divergence from BF16."
            " Without it, nothing is measured."
        ),
        examples=[{"n_max": [1, 2, 3], "text": "held-out.txt"}],
    )
    compare: list[OtherGguf] = Field(
        default_factory=list,
        description=(
            "Other people's quantizations of the same model, to measure like the model's own on the"
            " `text` of `measure`, without speed. A file from the Hub is deleted once it is"
            " measured."
        ),
        examples=[[{"path": "downloads/model-Q4_K_M.gguf"}]],
    )
    publish: PublishTarget | None = Field(
        default=None, description="Where to upload the model. Without it, it is not uploaded."
    )
    variants: Annotated[dict[VariantName, Variant], Field(min_length=1)] = Field(
        description="The files to make, by name; each file's name ends with its variant's.",
        examples=[{"BF16": {}, "Q4_K_M": {"head": "Q8_0"}}],
    )

    _key: str = PrivateAttr("")

    @property
    def key(self) -> str:
        """Its key under `models`."""
        return self._key

    @property
    def measured_prompts(self) -> str:
        """The folder of prompts to measure with."""
        own = self.measure.prompts if self.measure else None
        return own or (_MEASURED if self.prompts == _VERIFIED else self.prompts)

    @property
    def base_name(self) -> str:
        """The start of its file names, except for adopted variants: see `name_of`."""
        if self.name or self.source is None or not self.uses_source:
            return self.name or next(map(self.name_of, self.variants.values()))
        if isinstance(self.source, HubRepository):
            return Path(self.source.repo).name
        return folder_name(Path(self.source.path))

    def name_of(self, variant: Variant) -> str:
        """The start of a variant's file name: an adopted one is named after its base."""
        if self.name or not self.adopts(variant):
            return self.base_name
        base = variant.base
        if isinstance(base, HubGguf):
            return repository_model(base.repo)
        return file_model(base.path) if isinstance(base, LocalGguf) else self.base_name

    def donor(self, variant: Variant) -> Source | None:
        """The checkpoint that a variant's head is from, if that is not the source."""
        return (variant.head_from or self.head_from) if variant.head_types else None

    def adopts(self, variant: Variant) -> bool:
        """Whether a variant has nothing of the source: a base from elsewhere, a donor's head."""
        return variant.foreign and self.donor(variant) is not None

    @property
    def uses_source(self) -> bool:
        """Whether anything is made from the source."""
        adopted = all(map(self.adopts, self.variants.values()))
        return not adopted or self.mmproj or self.sidecar is not None

    @property
    def native(self) -> bool:
        """Whether mtpforge's own converter is used."""
        return self.converter == "mtpforge"

    @property
    def drafter(self) -> Source | None:
        """The checkpoint that llama.cpp's converter makes the sidecar from, if not the source."""
        return self.head_from if self.sidecar and not self.native else None

    @property
    def needs_upstream(self) -> bool:
        """Whether llama.cpp's converter makes any of its files."""
        return self.mmproj or not self.native

    @property
    def head_only(self) -> bool:
        """Whether all bases were quantized elsewhere, so only the checkpoint's head is needed."""
        return (
            all(variant.foreign for variant in self.variants.values())
            and not self.needs_upstream
            and self.sidecar is None
        )

    def conversions(self) -> Iterator[tuple[Source, str]]:
        """The checkpoints that are read, each with what is converted of it: CONVERTER:PART."""
        if self.source and self.uses_source:
            for part in self._source_parts():
                yield self.source, f"{self.converter}:{part}"
            if self.mmproj:
                yield self.source, "llama.cpp:mmproj"
        if self.sidecar and self.head_from:
            yield self.head_from, f"{self.converter}:{'head' if self.native else 'draft'}"
        for variant in self.variants.values():
            if donor := self.donor(variant):
                yield donor, f"{self.converter}:{'head' if self.native else 'all'}"

    def _source_parts(self) -> set[str]:
        """The parts that are converted of the source; all includes the others for mtpforge."""
        if self.head_only:
            return {"head"}
        parts = {"trunk" if self.head_from else self.part}
        if self.native:
            return parts
        for variant in self.variants.values():
            if isinstance(variant.base, OwnBase) or variant.part == "trunk":
                parts.add("trunk")
        return parts | {"draft"} if self.sidecar and not self.head_from else parts

    def has_unquantized(self, variant: Variant) -> bool:
        """Whether a BF16 file of a variant's trunk is made, to measure its distance from."""
        return not (self.head_only or self.adopts(variant))

    def conversion_split(self, part: str) -> str | None:
        """The size of the files that conversion writes this part in; None for one file.

        Variants that are only a conversion are then published without a second copy.
        """
        sizes = {
            each.split or self.split
            for each in self.variants.values()
            if each.converted and each.part == part
        }
        return sizes.pop() if len(sizes) == 1 and self.native else None

    @property
    def early(self) -> bool:
        """Whether each file is uploaded as soon as it has passed."""
        return self.publish is not None and self.publish.when == "verified"

    @property
    def passing(self) -> bool:
        """Whether it is deleted then."""
        return self.publish is not None and self.publish.delete_after

    @property
    def part(self) -> str:
        """The part of the checkpoint that its BF16 file has: all, unless no variant needs a head.

        One that injects the head of its own `head_from` does not.
        """
        heads = [each for each in self.variants.values() if each.head != NO_HEAD]
        return "all" if any(each.head_from is None for each in heads) else "trunk"


class LlamaCppPrograms(Entry):
    """llama.cpp's programs."""

    bin_dir: ProgramsFolder = Field(
        default="",
        description=(
            "Folder with llama.cpp programs that are already built, for example with CUDA."
            " Empty: build the pinned source."
        ),
    )
    cuda: bool = Field(
        default=False,
        description=(
            "Build the pinned source for NVIDIA's GPUs, those of this machine if it has any. It"
            " needs nvcc."
        ),
    )

    @model_validator(mode="after")
    def _check_cuda(self) -> Self:
        if self.cuda and self.bin_dir:
            refuse("the programs in bin_dir are built already: remove one of the two", "cuda")
        return self


class Toolchain(Entry):
    """The sources of external programs."""

    llama_cpp: LlamaCppPrograms = Field(
        default=LlamaCppPrograms(), description="The programs of llama.cpp."
    )


class Config(Entry):
    """The whole of `config.yaml`."""

    build: Chosen = Field(
        default="all",
        description="The models that the target `all` makes: a list of names, or `all`.",
    )
    repo: str = Field(
        default="",
        description="Repository to print an entry for; only for the rule `add`'s command line.",
        examples=["Qwen/Qwen3.5-4B"],
    )
    dry_run: Literal[False, True, "false", "true"] = Field(
        default=False,
        description=(
            "Only list what would be uploaded; only for the rule `publish`'s command line."
        ),
    )
    threads: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description=(
            "Threads of a job that can use many. Default: all processors of this machine."
            " `--cores` and `--max-threads` lower it. Another number reruns nothing."
        ),
    )
    lean: Literal[False, True, "false", "true", "shards"] = Field(
        default=False,
        description=(
            "Free the shards of fetched checkpoints as they are converted, for small disks; see"
            " docs/sizing.md. `shards`: also fetch them one by one, quantize them on the way, and"
            " keep no BF16 file. Changing it reruns nothing."
        ),
    )
    memory: Size | None = Field(
        default=None,
        description=(
            "The most memory that a job asks a cluster for, such as that of its largest node. A"
            " BF16 file that does not fit is not run."
        ),
        examples=["240G"],
    )
    toolchain: Toolchain = Field(
        default=Toolchain(), description="Where the programs of llama.cpp come from."
    )
    recipes: dict[str, Recipe] = Field(
        default_factory=dict,
        description=(
            "Recipes by name, which a variant's `tensors` can refer to. A recipe maps patterns to"
            " tensor types; the first pattern found in a tensor's name wins."
        ),
        examples=[{"mine": {"attn_": "Q6_K", "token_embd|output": "Q6_K"}}],
    )
    models: dict[ModelName, Model] = Field(
        description="The models, by names of your choice; a model's files go to results/NAME."
    )

    @model_validator(mode="after")
    def _resolve(self) -> "Config":
        """Set the names of models and variants, and replace recipe names by the recipes."""
        for name, model in self.models.items():
            model._key = name
            for key, variant in model.variants.items():
                variant._name = key
                variant.text = variant.searched_text or variant.text
                if isinstance(variant.tensors, str):
                    path = ("models", name, "variants", key, "tensors")
                    variant.tensors = self._recipe(variant.tensors, path)
        return self

    def _recipe(self, name: str, path: tuple[str, ...]) -> dict[str, str]:
        if name not in self.recipes:
            known = ", ".join(self.recipes) or "none"
            refuse(f"there is no recipe {name!r}: recipes has {known}", *path)
        return self.recipes[name]

    @property
    def is_lean(self) -> bool:
        """Whether shards are freed; on a command line, every value is a text."""
        return self.lean in (True, "true", SHARDS)

    @property
    def chosen(self) -> list[Model]:
        """The models that `all` makes."""
        names = self.models if self.build == "all" else self.build
        return [self.models[name] for name in names]


# ── messages ──

_MESSAGES = {
    "missing": "missing",
    "model_type": "{input}: must be a mapping, `{{}}` for the defaults",
    "model_attributes_type": "{input}: must be a mapping, `{{}}` for the defaults",
    "dict_type": "{input}: must be a mapping",
    "too_short": "must not be empty",
    "bool_type": "{input}: must be true or false",
}


def _explain(errors: list[ErrorDetails]) -> str:
    """Path and message of an error: a misspelt key before the missing one that it was meant for."""
    error = min(errors, key=lambda error: error["type"] != "unknown_key")
    context = error.get("ctx", {})
    steps = [str(step) for step in (*error["loc"], *context.get("path", ()))]
    path = "/".join(step for step in steps if step != "[key]" and not step.startswith(FORM))
    return f"{path or '(top)'}: {_message(error)}"


def _message(error: ErrorDetails) -> str:
    given = error["input"]
    value = repr(given)[:100]
    if error["type"] in _MESSAGES:
        return _MESSAGES[error["type"]].format(input=value) + _advice(error)
    return error["msg"].replace("Input should be", f"{value}: must be") + _advice(error)


def _as_entry(given: str, message: str) -> str:
    """The key and value that a text was probably meant for."""
    keys = re.findall(r"\w+", message.partition("keys ")[2])
    if "url" in keys and given.startswith("s3://"):
        return f"url: {given}"
    repo = suggest.repository(given)
    key = "repo" if repo and "repo" in keys else "path" if "path" in keys else keys[0]
    return f"{key}: {repo if key == 'repo' and repo else given}"


def _advice(error: ErrorDetails) -> str:
    """The right form, for mistakes that are made often."""
    given = error["input"]
    if error["type"] == "missing" and error["loc"][-1] == "revision":
        repo = given.get("repo", "OWNER/NAME")
        return f": `python workflow/scripts/add.py {repo}` prints the entry with it"
    if error["type"] == "dict_type" and isinstance(given, list) and given:
        first = given[0]
        if isinstance(first, dict):
            return f": leave out the dash before `{next(iter(first), '')}`"
        return f", such as `{first}: {{}}`"
    if error["type"] == "string_type" and type(given) in (int, float):
        is_size = error["loc"][-1] in ("split", "size", "memory")
        return f", such as {_as_size(given)}" if is_size else ": put it in quotes"
    if given is False and "head" in error["loc"]:
        return "; `none` leaves the head out"
    if isinstance(given, str) and "exactly one of the keys" in error["msg"]:
        return f", such as `{{{_as_entry(given, error['msg'])}}}`"
    return ""


def _as_size(given: float) -> str:
    """A number of gigabytes, or if it is large of bytes, as a size is written."""
    if not 0 < given < 1e15:
        return "48G"
    megabytes = max(1, round(given / 1e6 if given >= 1e6 else given * 1000))
    return f"{megabytes}M" if megabytes % 1000 else f"{megabytes // 1000}G"
