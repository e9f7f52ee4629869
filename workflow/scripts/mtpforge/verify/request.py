"""What a verification is asked for, and what each check says."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mtpforge import table
from mtpforge.errors import VerificationError
from mtpforge.quantize.recipe import NO_HEAD, Recipe


@dataclass(frozen=True)
class Check:
    """One verdict, and in words what it rests on."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Request:
    """What the file should be: None where nothing was said, and then the check that needs it is left out."""

    checkpoint: Path | None = None
    reference: Path | None = None
    """In place of a checkpoint whose architecture has no family: the BF16 GGUF that upstream made and that is proven."""
    digests: Path | None = None
    """The sha256 of the file's tensors, as conversion or quantization recorded them when it made it."""
    base: Path | None = None
    """What the head was injected into."""
    trunk: Path | None = None
    """In place of it, the sha256 of its tensors, recorded before."""
    target: Path | None = None
    """Of a draft sidecar, the model that it drafts for."""
    file_type: str | None = None
    head: str | None = None
    head_tensors: Recipe = ()
    """Exceptions from the head's type, by pattern."""
    recipe: Recipe = ()
    tokenizer_pre: str | None = None
    """As conversion was told, for metadata."""
    unquantized: Path | None = None
    """What `acceptance.py` measured of the BF16 file of the same model."""
    max_acceptance_drop: float = 0.2
    """How much less than that may be accepted."""
    perplexity: bool = False
    """Whether llama-perplexity, which is going to measure it, must load the file too."""
    prompts: tuple[str, ...] = ()
    min_acceptance: float = 0.1
    threads: int = 1

    @property
    def headless(self) -> bool:
        """Whether the file should have no head."""
        return self.head == NO_HEAD

    @property
    def part(self) -> str:
        """What the file is of the checkpoint, as conversion names it."""
        return "trunk" if self.headless else "draft" if self.target else "all"

    @property
    def ours(self) -> bool:
        """Whether the trunk was quantized here, and not by somebody else."""
        return self.file_type is not None


def as_table(report: Mapping[str, Any]) -> str:
    """A report's verdicts as a table for the terminal."""
    rows = [
        (check["name"], "passed" if check["passed"] else "FAILED", check["detail"])
        for check in report["checks"]
    ]
    return table.markdown([(report["file"], "verdict", "what it rests on"), *rows], left=3)


def some(problems: list[str]) -> str:
    """The first three problems, and the number of the others."""
    return ", ".join(problems[:3]) + (f" and {len(problems) - 3} more" if len(problems) > 3 else "")


def raise_failed(name: str, checks: list[Check]) -> None:
    """Raise VerificationError, naming each failed check, where there is one."""
    if failed := [check for check in checks if not check.passed]:
        error = VerificationError(
            f"{name} is not published: " + "; ".join(f"{c.name}: {c.detail}" for c in failed)
        )
        error.table = as_table({"file": name, "checks": [asdict(check) for check in checks]})
        raise error
