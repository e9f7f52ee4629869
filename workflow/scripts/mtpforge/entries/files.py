"""Writes an entry to its file in `config.d`, or adds it to what the file has, comments kept."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from mtpforge.entries.proposal import Entry
from mtpforge.errors import ConfigError
from mtpforge.io import atomic, text
from mtpforge.rules.entry_files import FOLDER, read_entry

_START = (
    "# yaml-language-server: $schema=../docs/config.schema.json\n"
    "# `make` builds this model. Edit it as any entry of config.yaml, or delete the file.\n"
    "models:\n"
)
_VARIANTS = "    variants:\n"


def path_of(key: str) -> Path:
    """The file of a model."""
    return FOLDER / f"{key}.yaml"


def commit(path: Path) -> str | None:
    """The commit that the model of a file is pinned to. Raises ConfigError."""
    has = read_entry(path)
    source = has.get("source") if isinstance(has, Mapping) else None
    return source.get("revision") if isinstance(source, Mapping) else None


@contextmanager
def written(entry: Entry) -> Iterator[Path]:
    """Write an entry; on any exception of the block the file is as it was. Raises ConfigError."""
    path = path_of(entry.key)
    before = _read(path) if path.exists() else None
    atomic.write_text(path, extended(path, before, entry) if before else new(entry))
    try:
        yield path
    except BaseException:
        path.unlink() if before is None else atomic.write_text(path, before)
        raise


def new(entry: Entry) -> str:
    """The text of a new file."""
    return _START + as_text(entry)


def as_text(entry: Entry) -> str:
    """The entry as a part of `models:`."""
    settings = "".join(f"    {key}: {flow(value)}\n" for key, value in entry.settings.items())
    variants = "".join(map(_variant, entry.variants, entry.variants.values()))
    return f"  # {entry.about}.\n  {entry.key}:\n{settings}{_VARIANTS}{variants}"


def extended(path: Path, before: str, entry: Entry) -> str:
    """The text of a file with the variants, and the settings, that it lacks. Raises ConfigError.

    Its model stays at the commit that it is pinned to.
    """
    has = read_entry(path)
    wanted = _combined(path, has, entry)
    new_settings = {key: wanted[key] for key in wanted if key not in has}
    new_variants = {k: v for k, v in wanted["variants"].items() if k not in has["variants"]}
    settings = "".join(f"    {key}: {flow(value)}\n" for key, value in new_settings.items())
    variants = "".join(map(_variant, new_variants, new_variants.values()))
    made = before.rstrip("\n") + "\n" + variants
    made = made.replace(_VARIANTS, settings + _VARIANTS, 1)
    if _parsed(path, made) != {"models": {entry.key: wanted}}:
        lines = f"{settings}{variants}".rstrip()
        raise ConfigError(f"{path}: is written in another way: add by hand: {lines}")
    return made


def flow(value: Any) -> str:
    """A value in one line of YAML."""
    dumped = yaml.safe_dump(value, default_flow_style=True, width=1 << 20, sort_keys=False)
    return dumped.removesuffix("\n").removesuffix("\n...")


def _combined(path: Path, has: Any, entry: Entry) -> dict[str, Any]:
    """The model that a file has, with what an entry adds. Raises ConfigError if they disagree."""
    if not isinstance(has, dict) or not isinstance(has.get("variants"), dict):
        raise ConfigError(f"{path}: has no variants: correct or delete it")
    settings = {**entry.settings, "source": _unpinned(entry.settings["source"])}
    if "measure" in has:  # measured already, as the file says
        settings.pop("measure", None)
    there = {**has, "source": _unpinned(has.get("source"))}
    for at, ours, theirs in (("", settings, there), ("variants/", entry.variants, has["variants"])):
        for key in ours.keys() & theirs.keys():
            if (theirs[key] or {}) != ours[key]:
                raise ConfigError(
                    f"{path}: {at}{key} is {flow(theirs[key])} there, not {flow(ours[key])}: "
                    "change it, or keep both, this one under another name: MODEL=NAME"
                )
    return {**entry.settings, **has, "variants": {**entry.variants, **has["variants"]}}


def _unpinned(source: Any) -> Any:
    if not isinstance(source, Mapping):
        return source
    return {key: value for key, value in source.items() if key != "revision"}


def _variant(name: str, settings: Mapping[str, Any]) -> str:
    return f"      {name}: {flow(settings)}\n"


def _read(path: Path) -> str:
    return text.read_text(path, ConfigError, most=text.YAML_LIMIT)


def _parsed(path: Path, made: str) -> Any:
    try:
        return text.parse_yaml(path, made, ConfigError, aliases=True)
    except ConfigError:
        return None
