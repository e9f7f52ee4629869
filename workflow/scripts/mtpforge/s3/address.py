"""Addresses of folders in object storage: s3://BUCKET/FOLDER."""

import re
from dataclasses import dataclass
from typing import Self

from mtpforge.errors import ConfigError

_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
PATTERN = rf"s3://[a-z0-9][a-z0-9.-]{{1,61}}[a-z0-9](/{_NAME})*/?"


@dataclass(frozen=True)
class Address:
    """A folder of a bucket; `prefix` ends with a slash, and is empty for the whole bucket."""

    bucket: str
    prefix: str

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parse s3://BUCKET/FOLDER. Raises ConfigError."""
        if not re.fullmatch(PATTERN, text):
            raise ConfigError("not an address in object storage: write s3://BUCKET/FOLDER")
        bucket, _, folder = text.removeprefix("s3://").rstrip("/").partition("/")
        return cls(bucket, f"{folder}/" if folder else "")

    def key(self, name: str) -> str:
        """The key of the object that is file `name` of the folder."""
        return self.prefix + name

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.prefix}".rstrip("/")
