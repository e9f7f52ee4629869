"""The stamp of a toolchain, as JSON: the same on any path and day for the same programs."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

from pydantic import Field

from mtpforge.errors import ToolchainError
from mtpforge.io.records import UNLESS_NONE, Record


@dataclass(frozen=True, kw_only=True)
class Stamp(Record):
    """Version and sha256 of llama.cpp's programs. The rest is only known for our own builds."""

    written_by: ClassVar[str] = "toolchain.py"
    llama_cpp: Annotated[str, Field(alias="llama.cpp")]
    build: Annotated[str | None, UNLESS_NONE] = None
    commit: str
    archive_sha256: Annotated[str | None, UNLESS_NONE] = None
    compiler: str
    flags: Annotated[tuple[str, ...] | None, UNLESS_NONE] = None
    machine: Annotated[str | None, UNLESS_NONE] = None
    programs: dict[str, str]
    """Name: sha256"""
    libraries: Annotated[dict[str, str] | None, UNLESS_NONE] = None
    """Path from the folder of the programs: sha256; None if they are linked statically."""


def joined(stamps: Iterable[Stamp]) -> Stamp:
    """The stamp of all programs of these. Raises ToolchainError if they are of different builds."""
    found, *others = stamps
    for other in others:
        if replace(other, programs=found.programs, libraries=found.libraries) != found:
            names = ", ".join([*found.programs, *other.programs])
            raise ToolchainError(
                f"programs of different builds: {names}: run "
                "`.venv/bin/snakemake --cores all --forcerun program`"
            )
        libraries = {**(found.libraries or {}), **(other.libraries or {})}
        programs = {**found.programs, **other.programs}
        found = replace(found, programs=programs, libraries=libraries or None)
    return found


@dataclass(frozen=True, kw_only=True)
class ConverterStamp(Record):
    """The commit and archive of llama.cpp's converter, and the sha256 of its environment's lock."""

    written_by: ClassVar[str] = "converter.py"
    commit: str
    archive_sha256: str
    lock_sha256: str
