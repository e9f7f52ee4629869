"""Records: dataclasses that one program writes as JSON and others read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from mtpforge.errors import RecordError
from mtpforge.io import atomic, storage

UNLESS_NONE = Field(exclude_if=lambda value: value is None)
"""Annotates a field that is written only if it has a value."""


@dataclass(frozen=True)
class Record:
    """Base of the records. JSON keys are the fields' names or aliases, in their order."""

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)
    written_by: ClassVar[str] = ""
    """The program that writes these files, for error messages."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file. Raises RecordError if it is malformed, OSError if it cannot be read."""
        with storage.reading(path):
            content = path.read_bytes()
        return cls.parse(content, path)

    @classmethod
    def parse(cls, text: bytes | str, path: Path) -> Self:
        """Parse JSON text; `path` is its file, for messages. Raises RecordError."""
        try:
            record: Self = _adapter(cls).validate_json(text, by_alias=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise RecordError(
                f"{path}{':' * bool(where)}{where}: {first['msg']}: not a file of "
                f"{cls.written_by}: delete it and run again"
            ) from None
        return record

    def as_json(self) -> dict[str, Any]:
        """The JSON object that `write` stores."""
        return dict(_adapter(type(self)).dump_python(self, by_alias=True, mode="json"))

    def write(self, path: Path) -> None:
        """Write the record as JSON, whole or not at all."""
        atomic.write_json(path, self.as_json())


_ADAPTERS: dict[type, TypeAdapter[Any]] = {}


def _adapter(kind: type) -> TypeAdapter[Any]:
    if kind not in _ADAPTERS:
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]
