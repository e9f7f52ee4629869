"""Models in files of their own: `config.d/NAME.yaml` has the entry of the model NAME.

`make add`, `make quant` and `make inject` write them, so that `config.yaml` stays the user's. Each
is built beside those that `build` lists; a deleted file is a model less.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtpforge.errors import ConfigError, ForgeError
from mtpforge.rules.config import read_file

FOLDER = Path("config.d")


def add_entries(config: dict[str, Any], given: Mapping[str, Any], folder: Path = FOLDER) -> None:
    """Add the models of a folder to `config`, and their names to its list `build`.

    `given` is what files and options on the command line have set, which `config` has too: it wins
    over the folder. Raises ConfigError.
    """
    found = read_entries(folder)
    models = config.setdefault("models", {}) if found else None
    if not isinstance(models, dict):
        return
    ours = given.get("models") or {}
    for name, entry in found.items():
        if name in models and name not in ours:
            raise ConfigError(
                f"{folder / name}.yaml: config.yaml has a model {name} too: delete or rename one"
            )
        models[name] = merged(entry, models.get(name, {}))
    build = config.get("build")
    if isinstance(build, list) and "build" not in given:
        config["build"] = [*build, *(name for name in found if name not in build)]


def read_entries(folder: Path = FOLDER) -> dict[str, Any]:
    """The entries of all files of a folder, by model. Raises ConfigError."""
    for path in folder.glob("*.yml"):
        raise ConfigError(f"{path}: only *.yaml is read: rename it to {path.stem}.yaml")
    return {path.stem: read_entry(path) for path in sorted(folder.glob("*.yaml"))}


def read_entry(path: Path) -> Any:
    """The entry of the model that a file is named after. Raises ConfigError."""
    content = read_file(path)
    models = content.get("models")
    if set(content) != {"models"} or not isinstance(models, dict) or set(models) != {path.stem}:
        raise ConfigError(
            f"{path}: must have only `models:`, and in it only {path.stem}, as the file is called"
        )
    return models[path.stem]


def located(error: ForgeError, folder: Path = FOLDER) -> ForgeError:
    """The error, which names the file of the model that it is about, if that has one."""
    file, about = _in_file(str(error), folder)
    return ConfigError(f"{file}: {about}") if file else error


def named(warning: str, folder: Path = FOLDER) -> str:
    """A warning about the configuration, which names the file of its model in the same way."""
    file, about = _in_file(warning, folder)
    return f"{file}: {about}" if file else warning


def _in_file(message: str, folder: Path) -> tuple[Path | None, str]:
    """The file of the model that a message is about, if it has one, and the rest of the message."""
    about = re.match(r"config\.yaml: (models/([^/:]+).*)", message, re.DOTALL)
    file = folder / f"{about[2] if about else ''}.yaml"
    return (file, about[1]) if about and file.exists() else (None, message)


def merged(entry: Any, over: Any) -> Any:
    """A configuration with what `over` sets, mapping by mapping, as Snakemake merges files."""
    if not isinstance(entry, Mapping) or not isinstance(over, Mapping):
        return over
    both = {key: merged(entry[key], over[key]) for key in entry.keys() & over.keys()}
    return {**entry, **over, **both}
