"""Markdown of the model card: escaped text from others, and code blocks of commands."""

import html
import re
import shlex
from collections.abc import Sequence
from urllib.parse import quote

from mtpforge.errors import printable

_MARKUP = re.compile(
    r"([\\`*\[\]|~$@]"
    r"|(?<![^\W_])_|_(?![^\W_])"  # not within a word, where it marks nothing
    r"|:(?=//)|(?<=www)\.)",  # or the Hub makes links of addresses
    re.IGNORECASE,
)


def escape(text: str) -> str:
    """Escape text so that Markdown shows it literally, even in a table."""
    return _MARKUP.sub(r"\\\1", html.escape(_line(text), quote=False))


def code(text: str) -> str:
    """Text as inline code. Backticks are dropped from it."""
    return f"`{_line(text).replace('`', '')}`"


def link(text: str, path: str) -> str:
    """A link to a file of the same repository."""
    return f"[{escape(text)}]({quote(path)})"


def _line(text: str) -> str:
    return printable(" ".join(text.split()))


def shell(*commands: Sequence[str]) -> list[str]:
    """The lines of a code block with commands, and an empty line."""
    return ["```", *map(shlex.join, commands), "```", ""]
