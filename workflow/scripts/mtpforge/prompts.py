"""Prompts to verify and measure with: `*.txt` files named by kind (code, prose, chat).

To measure with, also the questions of a benchmark: a *.jsonl, such as SPEED-Bench, Spec-Bench and
MT-Bench have it. Each line has a `category` and `turns`, what the user says. The first turn of the
first question of each category goes through the chat template.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from mtpforge.errors import ConfigError
from mtpforge.io.text import ANYWHERE, TEMPLATE_LIMIT, read_json_lines, read_text

PROMPTS = Path(__file__).resolve().parents[2] / "prompts"
MEASURED = PROMPTS / "measured"

N_PREDICT = 200
"""Tokens generated from each prompt to measure acceptance and speed."""
ROUND_TOKENS = 1200
"""Tokens of a round of measuring, unless `N_PREDICT` from each prompt are fewer."""
EQUAL = 100
"""Tokens of each prompt that must be the same without drafting."""


_CATEGORY = re.compile(r"[\w-]{1,40}", re.ASCII)
_PLACEHOLDER = "FULL BENCHMARK DATA SHOULD BE FETCHED"
"""How questions begin in SPEED-Bench that it may not distribute."""


def answer_tokens(prompts: int) -> int:
    """Tokens generated from each of so many prompts to measure speed."""
    return min(N_PREDICT, ROUND_TOKENS // max(1, prompts))


def add_option(parser: argparse.ArgumentParser, default: Path = PROMPTS, more: str = "") -> None:
    """Add --prompts."""
    parser.add_argument(
        "--prompts", type=Path, metavar="PATH", default=default,
        help=f"folder of *.txt prompts, named by kind{more} (default: those of this pipeline)",
    )  # fmt: skip


def read_prompts(folder: Path) -> dict[str, str]:
    """Read the prompts of a folder, by file name. Raises ConfigError.

    Lines end as on Linux, so that a checkout on Windows has the same tokens.
    """
    prompts = {
        path.stem: read_text(path, ConfigError, TEMPLATE_LIMIT, within=ANYWHERE).replace(
            "\r\n", "\n"
        )
        for path in prompt_files(folder)
    }
    if not prompts:
        raise ConfigError(f"{folder}: no *.txt prompts there")
    return prompts


def read_measured(path: Path) -> dict[str, str]:
    """The same for measuring; the questions of a *.jsonl are named CATEGORY.chat."""
    if path.suffix != ".jsonl":
        return read_prompts(path)
    if questions := dict(_questions(path)):
        return questions
    raise ConfigError(f"{path}: no questions there")


def prompt_files(path: Path) -> list[Path]:
    """The prompts of a folder, or the *.jsonl itself."""
    return [path] if path.suffix == ".jsonl" else sorted(path.glob("*.txt"))


def _questions(path: Path) -> Iterator[tuple[str, str]]:
    """Name and first turn of the first question of each category. Raises ConfigError."""
    found: dict[str, str] = {}
    for where, question in read_json_lines(path, ConfigError):
        category, turns = question.get("category"), question.get("turns")
        if not isinstance(category, str) or not _CATEGORY.fullmatch(category):
            raise ConfigError(f"{where}: needs a `category` of letters, digits, - and _")
        said = turns[0] if isinstance(turns, list) and turns else None
        if not isinstance(said, str) or not said.strip():
            raise ConfigError(f"{where}: needs `turns`, a list of what the user says")
        if found.get(category, _PLACEHOLDER).startswith(_PLACEHOLDER):
            found[category] = said
    for category, text in found.items():
        if text.startswith(_PLACEHOLDER):
            raise ConfigError(
                f"{path}: the questions of {category!r} are still to be fetched from their source:"
                " run SPEED-Bench's prepare script, or delete these lines"
            )
        yield f"{category}.chat", text
