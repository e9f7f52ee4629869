"""What was probably meant: close names, and repositories of the Hub written as addresses."""

import difflib
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_ADDRESS = re.compile(
    r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/|hf://)([^/]+/[^/?#@:]+).*"
)
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


def closest(name: str, names: Iterable[str]) -> str:
    """The most similar name: of several the one with the longest common start, then the first.

    Empty if none is similar.
    """
    similar = difflib.SequenceMatcher(b=name)
    best, found = (0.7, 0), ""
    for each in names:
        similar.set_seq1(each)
        rank = (similar.ratio(), _common_start(each, name))
        if rank > best:
            best, found = rank, each
    return found


def _common_start(first: str, second: str) -> int:
    """How many characters they have in common at the start."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(first), len(second)))


def close(name: str, names: Iterable[str]) -> str:
    """A question for the name that was probably meant; empty if there is none."""
    by_lower = {each.lower(): each for each in names}
    found = closest(name.lower(), by_lower)
    return f"; did you mean {by_lower[found]}?" if found else ""


def repository(text: str) -> str:
    """The repository that a text names, as a Hub URL or OWNER/NAME; empty for a path."""
    if page := _ADDRESS.fullmatch(text):
        return page[1]
    return text if _NAME.fullmatch(text) and not Path(text).parent.exists() else ""


def beside(missing: Path) -> str:
    """A question for the file or folder that a missing one was meant for."""
    with suppress(OSError):
        return close(missing.name, (each.name for each in missing.parent.iterdir()))
    return ""
