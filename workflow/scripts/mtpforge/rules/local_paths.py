"""Paths of `config.yaml` to files and folders on this machine.

A path is a string of a class of its own, so that `find` finds all of them by their kind: a new key
cannot be forgotten.
"""

import os
from collections.abc import Iterator, Mapping
from pathlib import Path

from pydantic import BaseModel

from mtpforge import suggest
from mtpforge.convert import chat_templates
from mtpforge.errors import CheckpointError
from mtpforge.gguf.file_names import gguf_files
from mtpforge.io.text import text_files
from mtpforge.prompts import prompt_files


class LocalPath(str):
    """A path to something that must be on this machine."""

    __slots__ = ()

    def problem(self) -> str | None:
        """Why it cannot be used; None if it can."""
        raise NotImplementedError


class FolderPath(LocalPath):
    """The path of a folder; `~` is the home folder where the key allows it."""

    __slots__ = ()

    def problem(self) -> str | None:
        """Why it cannot be used; None if it can."""
        folder = Path(self).expanduser()
        if folder.is_dir():
            return None
        repo = suggest.repository(self)
        meant = f"; did you mean `repo: {repo}`?" if repo else suggest.beside(folder)
        return f"no such folder: {self}{meant}"


class FileOnDisk(LocalPath):
    """The path of a file; of a split GGUF, that of its first one."""

    __slots__ = ()

    def problem(self) -> str | None:
        """Why it, or another file of a split GGUF, cannot be used; None if all can."""
        path = Path(self)
        problems = (_file_problem(path.parent / name) for name in gguf_files(path.name))
        return next(filter(None, problems), None)


class TemplatePath(FileOnDisk):
    """The path of a chat template."""

    __slots__ = ()

    def problem(self) -> str | None:
        """Why it cannot be used; None if it can."""
        if problem := super().problem():
            return problem
        try:
            chat_templates.given(self)
        except CheckpointError as error:
            return str(error)
        return None


class TextPath(LocalPath):
    """The path of a text, or of a folder of texts."""

    __slots__ = ()

    def names(self) -> list[str]:
        """The names of its files in their folder."""
        return [each.name for each in text_files(Path(self))]

    def problem(self) -> str | None:
        """Why it, or a text in it, cannot be used; None if all can."""
        found = text_files(Path(self))
        problems = (_file_problem(each) for each in found)
        return next(filter(None, problems), None) if found else f"no *.txt files in {self}"


class PromptsPath(LocalPath):
    """The path of a folder of prompts; to measure with, also of a *.jsonl."""

    __slots__ = ()

    def problem(self) -> str | None:
        """Why it, or a prompt in it, cannot be used; None if all can."""
        found = prompt_files(Path(self))
        problems = (_file_problem(each) for each in found)
        return next(filter(None, problems), None) if found else f"no *.txt files in {self}"


def find(value: object, at: str) -> Iterator[tuple[str, LocalPath]]:
    """All local paths in a part of the configuration, each with the path of its key."""
    if isinstance(value, LocalPath):
        yield at, value
    elif isinstance(value, BaseModel):
        for key in type(value).model_fields:
            yield from find(getattr(value, key), f"{at}/{key}")
    elif isinstance(value, Mapping):
        for key, entry in value.items():
            yield from find(entry, f"{at}/{key}")
    elif isinstance(value, list):
        for number, entry in enumerate(value):
            yield from find(entry, f"{at}/{number}")


def _file_problem(path: Path) -> str | None:
    if not path.is_file():
        if path.exists():
            return f"not a regular file: {path}"
        return f"no such file: {path}{suggest.beside(path)}"
    return None if os.access(path, os.R_OK) else f"cannot be read: {path}"
