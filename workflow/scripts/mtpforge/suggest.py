"""What was probably meant: close names, and repositories of the Hub written as addresses."""

import difflib
import re
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

_ADDRESS = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([^/]+/[^/?#]+).*")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


def close(name: str, names: Iterable[str]) -> str:
    """A question for the name that was probably meant; empty if there is none."""
    by_lower = {each.lower(): each for each in names}
    found = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=0.7)
    return f"; did you mean {by_lower[found[0]]}?" if found else ""


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
