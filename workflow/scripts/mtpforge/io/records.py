"""Records: dataclasses that one program writes as JSON and others read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from mtpforge.errors import RecordError
from mtpforge.io import atomic, storage, text

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
        path.stat()
        with storage.reading(path):
            content = text.read_bytes(path, RecordError, within=text.ANYWHERE)
        return cls.parse(content, path)

    @classmethod
    def parse(cls, content: bytes | str, path: Path) -> Self:
        """Parse JSON text; `path` is its file, for messages. Raises RecordError."""
        advice = f"not a file of {cls.written_by}: delete it and run again"
        try:
            text.check_json(path, content, RecordError)
            record: Self = _adapter(cls).validate_json(content, by_alias=True)
            text.parse_json(path, content, RecordError)  # pydantic takes keys that repeat
        except RecordError as error:
            raise RecordError(f"{error}: {advice}") from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(str(part) for part in first["loc"])
            raise RecordError(
                f"{path}{':' * bool(where)}{where}: {first['msg']}: {advice}"
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
