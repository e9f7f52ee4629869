"""Recipes: which tensor gets which type, and how they become overrides of llama-quantize."""

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from mtpforge.errors import ConfigError
from mtpforge.gguf import quant_types
from mtpforge.gguf.head import quantizable
from mtpforge.gguf.reader import Gguf

NO_HEAD = "none"
"""What stands for a head's type where no head is wanted."""

Recipe = Sequence[tuple[str, str]]
"""Ordered (pattern, tensor type); the first pattern that is found in a tensor's name decides."""


def plan_overrides(
    source: Gguf, file_type: str, head: Recipe, recipe: Recipe
) -> list[tuple[str, str]]:
    """The ordered overrides: the head's first, so that no pattern of a recipe reaches into it. Raises ConfigError."""
    quant_types.check_file_type(file_type)
    for pattern, _ in recipe:
        if not any(re.search(pattern, name) for name in source.tensors):
            raise ConfigError(
                f"tensor pattern {pattern!r} matches no tensor of {source.path}: is it misspelt?"
            )
    types = head_types(source, head or head_recipe(default_head(file_type)))
    if file_type in quant_types.UNQUANTIZED:
        if recipe or set(types.values()) - {file_type}:
            raise ConfigError(
                f"{file_type} is not quantized, so llama-quantize ignores recipes and head types: keep the head at {file_type}"
            )
        return []
    return [(rf"^{re.escape(name)}$", kind) for name, kind in types.items()] + list(recipe)


def head_recipe(kind: str, exceptions: Recipe = ()) -> Recipe:
    """The types of a head as a recipe: `kind` for all tensors that no exception matches.

    Raises ConfigError for an unknown type.
    """
    quant_types.check_tensor_type(kind)
    return [*exceptions, ("", kind)]  # an empty pattern is found in every name


def head_types(source: Gguf, recipe: Recipe) -> dict[str, str]:
    """The type that each matrix of the head is to have. Raises ConfigError for a pattern that none of them matches."""
    names = [name for name, info in source.head.tensors.items() if quantizable(info)]
    for pattern, _ in recipe:
        if names and not any(re.search(pattern, name) for name in names):
            raise ConfigError(
                f"tensor pattern {pattern!r} matches no matrix of the head: {', '.join(names)}"
            )
    return {name: kind for name in names if (kind := by_recipe(name, recipe))}


def by_recipe(name: str, recipe: Recipe) -> str | None:
    """The type of the first pattern that is found in a tensor's name; None where there is none."""
    return next((kind for pattern, kind in recipe if re.search(pattern, name)), None)


def default_head(file_type: str) -> str:
    """Q8_0 costs a head next to nothing of its agreement; an unquantized file keeps its head as it is."""
    return file_type if file_type in quant_types.UNQUANTIZED else "Q8_0"


def check_pattern(pattern: str) -> None:
    """llama-quantize lower-cases patterns and splits its file on white space and `=`. Raises ConfigError."""
    if not pattern or re.search(r"[\s=]", pattern) or pattern != pattern.lower():
        raise ConfigError(
            f"tensor pattern {pattern!r}: must be lower case, without white space and '='"
        )
    try:
        re.compile(pattern)
    except re.error as error:
        raise ConfigError(
            f"tensor pattern {pattern!r} is not a regular expression ({error})"
        ) from None


def read_recipe(path: Path | None) -> Recipe:
    """A recipe from a YAML file that maps patterns to types, in order; none for None. Raises ConfigError."""
    if path is None:
        return ()
    try:
        table = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML ({error})") from None
    if not isinstance(table, dict) or any(
        not isinstance(word, str) for entry in table.items() for word in entry
    ):
        raise ConfigError(f"{path}: must map tensor patterns to types, as in `attn_.*: Q6_K`")
    for pattern, kind in table.items():
        check_pattern(pattern)
        quant_types.check_tensor_type(kind)
    return list(table.items())
