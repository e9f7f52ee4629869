"""Kinds of values in `config.yaml` (names, types, sizes, paths), and messages for wrong ones."""

import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, LiteralString, NoReturn, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    Tag,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError, core_schema

from mtpforge.errors import ConfigError
from mtpforge.gguf import quant_types
from mtpforge.hub.listing import REPOSITORY
from mtpforge.llama_cpp import pre_tokenizers
from mtpforge.quantize.recipe import NO_HEAD, check_pattern
from mtpforge.rules.local_paths import FileOnDisk, FolderPath, PromptsPath, TemplatePath, TextPath
from mtpforge.s3.address import PATTERN, Address
from mtpforge.suggest import close, repository


class Entry(BaseModel):
    """A part of `config.yaml` with a fixed set of keys."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _check_keys(cls, value: Any) -> Any:
        known = list(cls.model_fields)
        for key, entry in value.items() if isinstance(value, Mapping) else ():
            if key not in known:
                close = difflib.get_close_matches(str(key), known, n=1)
                hint = f"unknown key, did you mean {close[0]}? K" if close else "unknown key: k"
                refuse(f"{hint}nown keys are {', '.join(known)}", str(key), kind="unknown_key")
            if entry is None:
                refuse("empty: remove the key, or give it a value", str(key))
        return value


@dataclass(frozen=True, eq=False)
class Checked:
    """A string for which `check` raises no ConfigError; `schema` is its part of the JSON schema."""

    check: Callable[[str], object]
    schema: Mapping[str, Any]

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        def validate(value: str) -> str:
            try:
                self.check(value)
            except ConfigError as error:
                refuse(str(error))
            return value

        return core_schema.no_info_after_validator_function(validate, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {**handler(schema), **self.schema}


def _matching(pattern: str, why: str, correct: Callable[[str], str] | None = None) -> Checked:
    """A string that matches `pattern` as a whole; the message is the wrong string and `why`.

    `correct` turns a frequent mistake into a string that may match, which is then proposed.
    """

    def check(value: str) -> None:
        if re.fullmatch(pattern, value):
            return
        right = correct(value) if correct else ""
        hint = f"; did you mean {right}?" if right and re.fullmatch(pattern, right) else ""
        raise ConfigError(f"{value[:100]!r} {why}{hint}")

    return Checked(check, {"pattern": f"^(?:{pattern})$"})


def _check_head(name: str) -> None:
    if name.lower() == NO_HEAD != name:
        raise ConfigError(f"unknown tensor type {name!r}; did you mean {NO_HEAD}?")
    if name != NO_HEAD:
        quant_types.check_tensor_type(name)


def _check_sidecar(name: str) -> None:
    if name not in SIDECAR_TYPES:
        known = ", ".join(SIDECAR_TYPES)
        meant = close(name, SIDECAR_TYPES)
        raise ConfigError(f"a sidecar cannot have type {name!r}: use one of {known}{meant}")


_OWN_OPTIONS = (
    r"-m|-md|-mu|-hf.*|-np|--model.*|--hf-.*|--parallel|--host|--port|--api-key.*"
    r"|--spec-(type|default|synth-.*|ngram-.*|draft-([np]-.*|hf|model))|--draft.*"
    r"|--log-.*|-lv|-v|--verbos.*"
)


def _check_serve(option: str) -> None:
    if not option:
        raise ConfigError("an empty option")
    if not option.isprintable():
        raise ConfigError(f"{option[:100]!r} has control characters")
    if re.fullmatch(_OWN_OPTIONS, option):
        raise ConfigError(f"{option} is set by mtpforge itself: remove it")


def check_target(size: str) -> None:
    """Raise ConfigError for a size to search for that is neither a type nor an amount."""
    if not re.fullmatch(_AMOUNT, size):
        try:
            quant_types.check_published_type(size)
        except ConfigError:
            raise ConfigError(
                f"{size[:100]!r} is not a size: write a whole number of M or G, such as 11G, or a "
                f"type, such as Q4_K_M{_meant(size)}"
            ) from None


def _meant(size: str) -> str:
    amount = _size_in(size)
    is_amount = re.fullmatch(_AMOUNT, amount)
    return f"; did you mean {amount}?" if is_amount else close(size, quant_types.PUBLISHED)


def _plain_name(name: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower())


def _repository_in(address: str) -> str:
    """The repository that a page of the Hub, or OWNER/NAME with a tag or type, belongs to."""
    return repository(address) or re.split("[@:]", address)[0].rstrip("/")


def _size_in(text: str) -> str:
    """The size in a form such as 48GB, 48 GiB or 48g."""
    return re.sub(r"I?B$", "", text.upper().replace(" ", ""))


def _check_path(path: str) -> None:
    longest = max(map(len, path.encode().split(b"/")))
    if not path.isprintable() or longest > 255:
        raise ConfigError(
            f"{path[:100]!r}: control characters, or a part of over 255 bytes: rename it"
        )


def _check_folder(path: str) -> str:
    if path.endswith(".jsonl"):
        raise ValueError("must be a folder: a *.jsonl is for the `prompts` of `measure`")
    return path


def _check_home(path: str) -> None:
    _check_path(path)
    if path.startswith("~"):
        full = Path(path).expanduser()
        raise ConfigError(f"{path!r}: `~` is not expanded: write {full}")


def unique(values: list[Any]) -> list[Any]:
    """The same list. Fails validation if a value occurs twice."""
    if twice := [value for value in values if values.count(value) > 1]:
        refuse(f"{twice[0]!r} is listed twice")
    return values


def refuse(message: str, *path: str, kind: LiteralString = "config") -> NoReturn:
    """Fail validation with a message, at `path` below the value that is being validated."""
    raise PydanticCustomError(kind, "{message}", {"message": message, "path": path})


SIDECAR_TYPES = tuple(
    name
    for name in quant_types.TENSOR_TYPES
    if name in (*quant_types.FILE_TYPES, "MXFP4") and quant_types.bits(name) >= 4
)
"""A sidecar is nearly all head: types that a whole file and a head can have; MXFP4 as converted."""

_AMOUNT = r"[1-9][0-9]{0,8}[MG]"
_TENSOR_TYPES = list(quant_types.TENSOR_TYPES)
_COMMIT = r"[0-9a-f]{40}"
_FILE_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_FILE_PATH = rf"({_FILE_NAME}/)*{_FILE_NAME}"

FileType = Annotated[
    str, Checked(quant_types.check_published_type, {"enum": list(quant_types.PUBLISHED)})
]
TensorType = Annotated[str, Checked(quant_types.check_tensor_type, {"enum": _TENSOR_TYPES})]
HeadType = Annotated[str, Checked(_check_head, {"enum": [*_TENSOR_TYPES, NO_HEAD]})]
SidecarType = Annotated[str, Checked(_check_sidecar, {"enum": list(SIDECAR_TYPES)})]
All = Annotated[
    str, _matching("all", "is not a list of models, such as [qwen3.5-4b], and not `all`")
]
Pattern = Annotated[str, Checked(check_pattern, {})]
Candidates: TypeAlias = Annotated[list[TensorType], AfterValidator(unique)]
Recipe: TypeAlias = Annotated[dict[Pattern, TensorType], Field(min_length=1)]
ServeOption = Annotated[
    str, Checked(_check_serve, {"minLength": 1, "not": {"pattern": f"^({_OWN_OPTIONS})$"}})
]

ModelName = Annotated[
    str,
    _matching(
        r"[a-z0-9][a-z0-9._-]*",
        "is not a model's name: use lower-case letters, digits, '.', '_' and '-'",
        _plain_name,
    ),
]
VariantName = Annotated[
    str,
    _matching(_FILE_NAME, "is not a variant's name: use letters, digits, '.', '_' and '-'"),
]
Repository = Annotated[
    str,
    _matching(
        REPOSITORY.pattern,
        "is not a repository: write OWNER/NAME, with single '-' and '.' inside a name",
        _repository_in,
    ),
]
S3Url = Annotated[
    str,
    Checked(Address.parse, {"pattern": f"^(?:{PATTERN})$"}),
    AfterValidator(lambda url: url.rstrip("/")),
]
Revision = Annotated[
    str,
    _matching(
        _COMMIT,
        # It needs no valid configuration, unlike `make add` and any run of Snakemake.
        "is not a commit hash: `python workflow/scripts/add.py OWNER/NAME` prints the entry with"
        " the current one",
    ),
]
GgufName = Annotated[
    str,
    _matching(
        _FILE_PATH + r"\.gguf(\.part[0-9]+of[0-9]+)?",
        "is not a GGUF of a repository: write NAME.gguf, NAME-00001-of-0000N.gguf or"
        " NAME.gguf.part1ofN, after its folder: FOLDER/NAME.gguf",
        lambda page: re.sub(r"^.*/(blob|resolve|tree)/[^/]+/|[?#].*$", "", page),
    ),
]
FileRevision = Annotated[
    str,
    _matching(
        _COMMIT,
        "is not a commit hash: https://huggingface.co/OWNER/NAME/commits/main lists them",
    ),
]
FileName = Annotated[
    str, _matching(_FILE_PATH, "is not a file of a repository: write NAME or FOLDER/NAME")
]
PreTokenizer = Annotated[
    str, Checked(pre_tokenizers.check, {"pattern": "^(?:[a-z0-9][a-z0-9._-]*)$"})
]
_PATH_FORMAT = {"format": "path"}
_HOME = Checked(_check_home, _PATH_FORMAT)
Folder = Annotated[
    str,
    _HOME,
    _matching(
        r"[^{}]*[^/.{}]/*",
        "must not have braces, nor end in '.', because file names begin with its last part",
    ),
    AfterValidator(lambda path: FolderPath(path.rstrip("/"))),
]
OutputName = Annotated[
    str, _matching(_FILE_NAME, "cannot begin a file name: use letters, digits, '.', '_' and '-'")
]
GgufPath = Annotated[
    str,
    _HOME,
    _matching(r"[^{}]+\.gguf", "is not a GGUF: write a path that ends in .gguf"),
    AfterValidator(FileOnDisk),
]
_PLAIN_PATH = _matching(r"[^{}]+", "is not a path: it is empty or has braces")
FilePath = Annotated[str, _HOME, _PLAIN_PATH, AfterValidator(FileOnDisk)]
ChatTemplate = Annotated[str, _HOME, _PLAIN_PATH, AfterValidator(TemplatePath)]
DEFAULT = "default"
"""Stands for an embedded text."""
CALIBRATION = "workflow/texts/calibration.txt"
HELD_OUT = "workflow/texts/held-out.txt"
CalibrationTexts = Annotated[
    str,
    _HOME,
    _PLAIN_PATH,
    AfterValidator(lambda path: TextPath(CALIBRATION if path == DEFAULT else path)),
]
MeasuredText = Annotated[
    str,
    _HOME,
    _PLAIN_PATH,
    AfterValidator(lambda path: FileOnDisk(HELD_OUT if path == DEFAULT else path)),
]
MeasuredPrompts = Annotated[str, _HOME, _PLAIN_PATH, AfterValidator(PromptsPath)]
Prompts = Annotated[MeasuredPrompts, AfterValidator(_check_folder)]
ProgramsFolder = Annotated[
    str,
    Checked(_check_path, _PATH_FORMAT),
    AfterValidator(lambda path: FolderPath(path) if path else path),
]
Size = Annotated[
    str,
    _matching(
        _AMOUNT,
        "is not a size: write a whole number of M or G, such as 48G",
        _size_in,
    ),
]
Target = Annotated[
    str,
    Checked(
        check_target,
        {
            "anyOf": [
                {"type": "string", "pattern": f"^(?:{_AMOUNT})$"},
                {"enum": list(quant_types.PUBLISHED)},
            ]
        },
    ),
]


FORM = "form:"
"""Prefix of the steps in an error's path that only say which form of an entry was tried."""


def form(name: str) -> Tag:
    """Marks one of the forms that an entry can have."""
    return Tag(FORM + name)


def by_key(*keys: str) -> Discriminator:
    """Tells the forms of a mapping apart by which of `keys` it has."""

    def present(value: Any) -> str | None:
        has = value if isinstance(value, Mapping) else getattr(value, "__dict__", ())
        found = [key for key in keys if key in has]
        return FORM + found[0] if len(found) == 1 else None

    message = f"must have exactly one of the keys {', '.join(keys)}"
    return Discriminator(present, custom_error_type="config", custom_error_message=message)


def by_type(text: str, other: str) -> Discriminator:
    """Tells a string from something else."""
    return Discriminator(lambda value: FORM + (text if isinstance(value, str) else other))
