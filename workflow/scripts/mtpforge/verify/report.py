"""The report on a verified file, as JSON: what the file is, and one verdict per check."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, ClassVar

from mtpforge import table
from mtpforge.errors import VerificationError
from mtpforge.io.records import UNLESS_NONE, Record


@dataclass(frozen=True)
class Check:
    """The verdict of one check, and the evidence for it in words."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class TypeErrors:
    """Relative errors of the tensors of one type: how many, their mean, the worst, the limit."""

    tensors: int
    mean: float
    worst: float
    gate: float


@dataclass(frozen=True)
class Trunk:
    """Proof that injection left the trunk alone.

    Both digests are the sha256 of a line for each tensor, sorted by name: sha256, two spaces, name.
    """

    tensors: int
    sha256_before: str
    sha256_after: str


@dataclass(frozen=True)
class Shard:
    """One file of a published split GGUF."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Acceptance(Record):
    """Accepted drafts of an unquantized file, or why they were not measured (`skipped`)."""

    written_by: ClassVar[str] = "acceptance.py"
    drafts: Annotated[int | None, UNLESS_NONE] = None
    accepted: Annotated[int | None, UNLESS_NONE] = None
    acceptance: Annotated[float | None, UNLESS_NONE] = None
    skipped: Annotated[str | None, UNLESS_NONE] = None


@dataclass(frozen=True, kw_only=True)
class Report(Record):
    """The report of verify.py on one file. A field is None if it does not apply to the file."""

    written_by: ClassVar[str] = "verify.py"
    file: str
    bytes: int
    sha256: str
    """Of a file that was verified in several files, the sha256 of these one after the other."""
    bits_per_weight: float
    head: str
    """Types of the head's matrices, joined by slashes; "none" without a head."""
    types: dict[str, int]
    """Number of tensors of each type."""
    errors: Annotated[dict[str, float] | None, UNLESS_NONE] = None
    """Relative error of each tensor that was compared with its source."""
    errors_by_type: Annotated[dict[str, TypeErrors] | None, UNLESS_NONE] = None
    trunk: Annotated[Trunk | None, UNLESS_NONE] = None
    drafts: Annotated[int | None, UNLESS_NONE] = None
    accepted: Annotated[int | None, UNLESS_NONE] = None
    acceptance: Annotated[float | None, UNLESS_NONE] = None
    """accepted / drafts"""
    bf16_acceptance: Annotated[float | None, UNLESS_NONE] = None
    """That of the unquantized file, which it was compared with."""
    not_run: Annotated[str | None, UNLESS_NONE] = None
    """Why llama.cpp did not run the file; None if it did."""
    checks: tuple[Check, ...]
    head_source: Annotated[dict[str, int] | None, UNLESS_NONE] = None
    """Number of tensors of a fetched head that are verified, and that are trusted on first use."""
    files: Annotated[tuple[Shard, ...] | None, UNLESS_NONE] = None
    """The files of a split GGUF; `file` is then the folder."""

    @property
    def published(self) -> list[tuple[str, int, str]]:
        """(path in the folder of results, bytes, sha256) of each file that the report is about."""
        if self.files is None:
            return [(self.file, self.bytes, self.sha256)]
        return [(f"{self.file}/{each.name}", each.bytes, each.sha256) for each in self.files]


def accepted_drafts(found: Report | Acceptance) -> str:
    """Accepted drafts in words; empty if nothing was drafted."""
    if not found.drafts or found.accepted is None:
        return ""
    share = found.accepted / found.drafts
    return f"{found.accepted} of {found.drafts} drafts accepted ({share:.1%})"


def as_table(file: str, checks: Iterable[Check]) -> str:
    """The verdicts on a file as a table for the terminal."""
    rows = [(check.name, "passed" if check.passed else "FAILED", check.detail) for check in checks]
    return table.markdown([(file, "verdict", "evidence"), *rows], left=3)


def some(problems: list[str]) -> str:
    """The first three problems, and the number of the others."""
    rest = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
    return ", ".join(problems[:3]) + rest


def raise_failed(file: str, checks: list[Check]) -> None:
    """Raise VerificationError that names each failed check, if one has failed."""
    failed = [f"{check.name}: {check.detail}" for check in checks if not check.passed]
    if failed:
        error = VerificationError(f"{file} is not published: {'; '.join(failed)}")
        error.table = as_table(file, checks)
        raise error
