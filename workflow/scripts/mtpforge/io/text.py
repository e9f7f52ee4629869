"""Reading text and JSON that others wrote: limited in size and valid UTF-8.

JSON may have the words NaN and Infinity as numbers, as Python writes them.
"""

import json
from pathlib import Path
from typing import Any

from mtpforge.errors import CheckpointError

TEXT_LIMIT = 200 << 20
"""Bytes; no real tokenizer.json comes near it."""


def read_text(path: Path) -> str:
    """The text of a checkpoint's file.

    Raises CheckpointError if it is missing, not a regular file, too large, or not UTF-8.
    """
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path}: is not a regular file")
        if path.stat().st_size > TEXT_LIMIT:
            raise CheckpointError(f"{path}: larger than {TEXT_LIMIT >> 20} MB, so not read")
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: missing: is the checkpoint complete?") from None
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path}: not UTF-8 ({error})") from None


def parse_json(path: Path, text: str) -> dict[str, Any]:
    """The object in the text of the JSON file `path`. Raises CheckpointError if it is invalid."""
    if text.startswith("\ufeff"):
        raise CheckpointError(f"{path}: begins with a byte order mark: save it as UTF-8 without")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must be a JSON object")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises CheckpointError as `read_text` and `parse_json` do."""
    return parse_json(path, read_text(path))
