"""Recipes: which tensors get which types, and how recipes become overrides of llama-quantize."""

import hashlib
import json
import re
import signal
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from mtpforge.errors import ConfigError, DamagedError
from mtpforge.gguf import quant_types
from mtpforge.gguf.head import quantizable
from mtpforge.gguf.reader import Gguf
from mtpforge.io import text

_DIGEST = "# sha256 "

NO_HEAD = "none"
"""Given instead of a head type to leave the head out."""

Recipe = Sequence[tuple[str, str]]
"""Ordered (pattern, tensor type); the first pattern found in a tensor's name decides."""

MATCHING = 0.25
"""CPU seconds for the patterns of a recipe; thousands of names take a hundredth of it."""
_LONGEST = 1000
"""Characters of a pattern."""


def plan_overrides(
    source: Gguf, file_type: str, head: Recipe, recipe: Recipe
) -> list[tuple[str, str]]:
    """The ordered overrides: (regular expression of tensor names, type).

    The head's come first, so that a recipe does not change the head. Raises ConfigError for an
    unknown type, or a pattern without a match.
    """
    quant_types.check_file_type(file_type)
    _check_source(source)
    for pattern, _ in recipe:
        if not _found(pattern, source.tensors):
            raise ConfigError(
                f"tensor pattern {pattern!r} matches no tensor of {source.path}: check its spelling"
            )
    types = head_types(source, head or head_recipe(default_head(file_type)))
    if file_type in quant_types.UNQUANTIZED:
        if recipe or set(types.values()) - {file_type}:
            raise ConfigError(
                f"llama-quantize ignores recipes and head types for the unquantized {file_type}: "
                f"leave them out, or set the head to {file_type}"
            )
        return []
    return [*_exact(types.items()), *_bounded(source, recipe)]


def _exact(types: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(rf"^{re.escape(name)}$", kind) for name, kind in types]


def _bounded(source: Gguf, recipe: Recipe) -> Iterator[tuple[str, str]]:
    """A recipe for llama-quantize, whose search for a pattern that repeats might never end."""
    for pattern, kind in recipe:
        if set("*+?{").isdisjoint(pattern):
            yield pattern, kind
        else:
            yield from _exact((name, kind) for name in _found(pattern, source.tensors))


def _check_source(source: Gguf) -> None:
    """Refuse to quantize twice. Raises ConfigError."""
    for name, info in source.tensors.items():
        if info.type.name in quant_types.PACKED:
            kind = info.type.name
            raise ConfigError(
                f"{source.path}: {name} is {kind} already, and llama-quantize cannot quantize it "
                f"again: use the original checkpoint, or keep the type (a variant `{kind}`)"
            )


def head_recipe(kind: str, exceptions: Recipe = ()) -> Recipe:
    """The recipe of a head: `kind` for every tensor that no exception matches.

    Raises ConfigError for an unknown type.
    """
    quant_types.check_tensor_type(kind)
    return [*exceptions, ("", kind)]  # an empty pattern is found in every name


def head_types(source: Gguf, recipe: Recipe) -> dict[str, str]:
    """The type of each matrix of the head. Raises ConfigError for a pattern without a match."""
    infos = source.head.tensors.values()
    names = [info.name for info in infos if quantizable(info, source.architecture)]
    for pattern, _ in recipe:
        if names and not _found(pattern, names):
            raise ConfigError(
                f"tensor pattern {pattern!r} matches no matrix of the head, which has "
                f"{', '.join(names)}"
            )
    return by_recipe(names, recipe)


def by_recipe(names: Collection[str], recipe: Recipe) -> dict[str, str]:
    """The type of each name in which a pattern is found: that of the first such pattern.

    Raises ConfigError for a pattern that takes too long.
    """
    found: dict[str, str] = {}
    for pattern, kind in reversed(recipe):
        found |= dict.fromkeys(_found(pattern, names), kind)
    return {name: found[name] for name in names if name in found}


def _found(pattern: str, names: Collection[str]) -> list[str]:
    """The names in which a pattern is found. Raises ConfigError if that takes too long."""
    with _limited(pattern):
        return [name for name in names if re.search(pattern, name)]


@contextmanager
def _limited(pattern: str) -> Iterator[None]:
    """End a search after `MATCHING` seconds: `re` looks for signals while it backtracks."""

    def stop(*_: object) -> NoReturn:
        raise ConfigError(f"tensor pattern {pattern!r} takes too long to match: simplify it")

    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, MATCHING)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def default_head(file_type: str) -> str:
    """Q8_0, which costs hardly any acceptance; in an unquantized file, the type of the file.

    BF16 beside a packed trunk.
    """
    if file_type in quant_types.PACKED:
        return "BF16"
    return file_type if file_type in quant_types.UNQUANTIZED else "Q8_0"


def check_pattern(pattern: str) -> None:
    """Raise ConfigError for a pattern that llama-quantize would change or misread.

    It converts patterns to lower case, and splits its file at white space and `=`.
    """
    plain = pattern.isprintable() and pattern == pattern.lower()
    if not pattern or re.search(r"[\s=]", pattern) or not plain:
        raise ConfigError(
            f"tensor pattern {pattern!r}: must be lower case, without white space or '='"
        )
    if len(pattern) > _LONGEST:
        raise ConfigError(f"tensor pattern {pattern[:50]!r}...: more than {_LONGEST} characters")
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ConfigError(
            f"tensor pattern {pattern!r} is not a regular expression ({error})"
        ) from None


def as_text(recipe: Mapping[str, str]) -> str:
    """A recipe as YAML that ends with its sha256, if it has any pattern. See `read_recipe`."""
    content = json.dumps(recipe)
    if not recipe:
        return content
    return f"{content}\n{_DIGEST}{hashlib.sha256(content.encode()).hexdigest()}"


def _check_digest(path: Path, content: str) -> None:
    recipe, has_digest, digest = content.rpartition(f"\n{_DIGEST}")
    if has_digest and digest.strip() != hashlib.sha256(recipe.encode()).hexdigest():
        raise DamagedError(f"{path}: damaged: it has another sha256: delete it and run again")


def read_recipe(path: Path | None) -> Recipe:
    """Read a recipe from a YAML file that maps patterns to types; empty for None.

    Raises ConfigError for invalid YAML, an invalid pattern or an unknown type, DamagedError for a
    recipe that is not what its last line says.
    """
    if path is None:
        return ()
    content = text.read_text(path, ConfigError, most=text.YAML_LIMIT, within=text.ANYWHERE)
    _check_digest(path, content)
    table = text.parse_yaml(path, content, ConfigError)
    is_mapping = isinstance(table, dict)
    if not is_mapping or not all(isinstance(word, str) for word in (*table, *table.values())):
        raise ConfigError(f"{path}: must map tensor patterns to types, as in `attn_.*: Q6_K`")
    for pattern, kind in table.items():
        check_pattern(pattern)
        quant_types.check_tensor_type(kind)
    return list(table.items())
