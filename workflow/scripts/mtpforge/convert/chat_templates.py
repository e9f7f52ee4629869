"""The chat templates of a checkpoint, as the pinned upstream takes them. They are never rendered.

transformers prefers `chat_template.jinja` to `tokenizer_config.json`; upstream does not. Where they
differ, a note says which was taken.
"""

import argparse
from pathlib import Path
from typing import Any

import jinja2
from gguf import GGUFWriter
from gguf.constants import Keys
from jinja2.ext import Extension
from jinja2.nodes import Node
from jinja2.parser import Parser

from mtpforge.errors import CheckpointError
from mtpforge.gguf import template_warnings
from mtpforge.io.text import ANYWHERE, TEMPLATE_LIMIT, is_there, read_json, read_text

FOLDER = "additional_chat_templates"
_CONFIG, _FILE, _JSON = "tokenizer_config.json", "chat_template.jinja", "chat_template.json"

MOST = 100
"""Templates of a checkpoint, and characters of their names. Real ones have up to 5."""

Templates = str | list[dict[str, str]] | None
"""One template, several with their names, or none."""


def templates(directory: Path) -> Templates:
    """Return the templates that upstream writes. Raises CheckpointError if they are malformed."""
    return next(iter(_candidates(directory).values()), None) if _settings(directory) else None


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add --chat-template, whose value is the text of the file."""
    parser.add_argument(
        "--chat-template", type=given, metavar="FILE",
        help="chat template to write in place of the checkpoint's own",
    )  # fmt: skip


def given(path: str) -> str:
    """Return the template in a file of its own. Raises CheckpointError if it cannot be parsed."""
    template = read(Path(path), ANYWHERE)
    if not template.strip():
        raise CheckpointError(f"{path}: is empty, so it is not a chat template")
    try:
        _SYNTAX.parse(template)
    except jinja2.TemplateSyntaxError as error:
        raise CheckpointError(
            f"{path}: is not a valid chat template: line {error.lineno}: {error.message}"
        ) from None
    except RecursionError:
        raise CheckpointError(f"{path}: is not a valid chat template: nested too deeply") from None
    return template


class _Generation(Extension):
    """The marks of what an assistant wrote, for training; like llama.cpp, it ignores them."""

    tags = {"generation", "endgeneration"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> list[Node]:
        """Pass over the mark."""
        next(parser.stream)
        return []


# The statements that transformers and llama.cpp know.
_SYNTAX = jinja2.Environment(extensions=["jinja2.ext.loopcontrols", _Generation])  # noqa: S701


def replace(writer: GGUFWriter, template: str) -> None:
    """Write this template, and no other."""
    metadata = writer.kv_data[0]
    for key in [key for key in metadata if key.startswith(Keys.Tokenizer.CHAT_TEMPLATE)]:
        del metadata[key]
    metadata.pop(Keys.Tokenizer.CHAT_TEMPLATES, None)
    writer.add_chat_template(template)


def notes(directory: Path, instead: str | None = None) -> list[str]:
    """Return a note on each file with another template than the one that is taken.

    `instead` is the template that was given in place of all of them.
    """
    if instead is not None:
        words = template_warnings.warning([instead])
        return [f"warning: the given chat template: {words}"] * bool(words)
    found = _candidates(directory)
    taken = _by_name(templates(directory))
    first = next(iter(found), "")
    rule = f"{first} is preferred" if _settings(directory) else f"there is no {_CONFIG}"
    words = template_warnings.warning(taken.values())
    return [f"warning: {first}: {words}"] * bool(words) + [
        f"{name}: this chat template is not taken, because {rule}, as in llama.cpp's converter: "
        "delete the wrong one"
        for name, other in found.items()
        if _by_name(other) != taken
    ]


def additional(directory: Path) -> list[Path]:
    """Return the files of additional templates, sorted."""
    return sorted((directory / FOLDER).glob("*.jinja"))


def read(path: Path, directory: Path) -> str:
    """Return the template in a file within `directory`, its lines ending in LF as upstream's do.

    Raises CheckpointError.
    """
    template = read_text(path, most=TEMPLATE_LIMIT, within=directory)
    if template.startswith("\ufeff"):
        raise CheckpointError(f"{path}: begins with a byte order mark: save it as UTF-8 without")
    return template.replace("\r\n", "\n").replace("\r", "\n")


def _settings(directory: Path) -> dict[str, Any]:
    path = directory / _CONFIG
    return read_json(path) if is_there(path) else {}


def _candidates(directory: Path) -> dict[str, Templates]:
    """Return the templates of each file that has some, the preferred one first."""
    found: dict[str, Any] = {}
    settings = _settings(directory)
    if "chat_template" in settings:
        found[_CONFIG] = settings["chat_template"]
    if is_there(path := directory / _FILE):
        more = [{"name": p.stem, "template": read(p, directory)} for p in additional(directory)]
        default = read(path, directory)
        found[_FILE] = [{"name": "default", "template": default}, *more] if more else default
    if is_there(path := directory / _JSON):
        found[_JSON] = read_json(path).get("chat_template")
    return {name: _checked(directory / name, value) for name, value in found.items()}


def _checked(path: Path, value: Any) -> Templates:
    if value is None or isinstance(value, str):
        _check_size(path, value or "")
        return value
    entries = value if isinstance(value, list) else [None]
    for entry in entries:
        texts = [entry.get(key) for key in ("name", "template")] if isinstance(entry, dict) else []
        if not texts or any(type(text) is not str for text in texts):
            raise CheckpointError(
                f"{path}: chat_template is neither a text nor a list of objects with name and "
                "template"
            )
        _check_size(path, str(texts[1]))
    names = [str(entry["name"]) for entry in value if entry]
    if len({*names}) < len(names) or len(names) > MOST or max(map(len, names), default=0) > MOST:
        raise CheckpointError(
            f"{path}: chat_template has the same name twice, or more than {MOST} templates, or a "
            f"name of more than {MOST} characters"
        )
    return list(entries)


def _check_size(path: Path, template: str) -> None:
    if len(template) > TEMPLATE_LIMIT:
        raise CheckpointError(f"{path}: a chat template of more than {TEMPLATE_LIMIT >> 20} MB")


def _by_name(value: Templates) -> dict[str, str]:
    if isinstance(value, list):
        return {entry["name"]: entry["template"] for entry in value}
    return {"default": value} if value else {}
