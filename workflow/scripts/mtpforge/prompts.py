"""Prompts to verify and measure with: `*.txt` files named by kind (code, prose, chat).

Or the questions of a benchmark, in a *.jsonl such as those of SPEED-Bench, Spec-Bench and MT-Bench.
Each line has a `category` and `turns`, what the user says. The first turn of the first question of
each category goes through the chat template.
"""

import argparse
import re
from collections.abc import Iterator
from pathlib import Path

from mtpforge.errors import ConfigError
from mtpforge.io.text import ANYWHERE, TEMPLATE_LIMIT, read_json_lines, read_text, text_files

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


def add_option(parser: argparse.ArgumentParser, default: Path = PROMPTS) -> None:
    """Add --prompts."""
    parser.add_argument(
        "--prompts", type=Path, metavar="PATH", default=default,
        help="folder of *.txt prompts, named by kind, or a *.jsonl with `category` and `turns`, "
        "such as SPEED-Bench's (default: those of this pipeline)",
    )  # fmt: skip


def read_prompts(path: Path) -> dict[str, str]:
    """Read the prompts of a folder, or of a *.jsonl, by file name; `CATEGORY.chat` from a *.jsonl.

    Lines end as on Linux, so that a checkout on Windows has the same tokens. Raises ConfigError if
    there are none, or one cannot be read.
    """
    prompts: dict[str, str] = {}
    for file in text_files(path):
        if file.suffix == ".jsonl":
            prompts |= {name: text for name, text in _questions(file) if name not in prompts}
        else:
            text = read_text(file, ConfigError, TEMPLATE_LIMIT, within=ANYWHERE)
            prompts[file.stem] = text.replace("\r\n", "\n")
    if not prompts:
        raise ConfigError(f"{path}: no *.txt or *.jsonl prompts there")
    return prompts


def _questions(path: Path) -> Iterator[tuple[str, str]]:
    """Name and first turn of the first question of each category. Raises ConfigError."""
    found: dict[str, str] = {}
    for where, question in read_json_lines(path, ConfigError):
        category, turns = question.get("category"), question.get("turns")
        if not isinstance(category, str) or not _CATEGORY.fullmatch(category):
            raise ConfigError(f"{where}: needs a `category` of letters, digits, - and _")
        if not isinstance(turns, list) or not turns or not isinstance(turns[0], str):
            raise ConfigError(f"{where}: needs `turns`, a list of what the user says")
        if found.get(category, _PLACEHOLDER).startswith(_PLACEHOLDER):
            found[category] = turns[0]
    for category, text in found.items():
        if text.startswith(_PLACEHOLDER):
            raise ConfigError(
                f"{path}: the questions of {category!r} are still to be fetched from their source:"
                " run SPEED-Bench's prepare script, or delete these lines"
            )
        yield f"{category}.chat", text
