"""Prompts to verify and measure with: `*.txt` files named by kind (code, prose, chat)."""

import argparse
from pathlib import Path

from mtpforge.errors import ConfigError
from mtpforge.io.text import ANYWHERE, TEMPLATE_LIMIT, read_text

PROMPTS = Path(__file__).resolve().parents[2] / "prompts"
MEASURED = PROMPTS / "measured"

N_PREDICT = 200
"""Tokens generated from each prompt to measure acceptance and speed."""
ROUND_TOKENS = 1200
"""Tokens of a round of measuring, unless `N_PREDICT` from each prompt are fewer."""
EQUAL = 100
"""Tokens of each prompt that must be the same without drafting."""


def answer_tokens(prompts: int) -> int:
    """Tokens generated from each of so many prompts to measure speed."""
    return min(N_PREDICT, ROUND_TOKENS // max(1, prompts))


def add_option(parser: argparse.ArgumentParser, default: Path = PROMPTS) -> None:
    """Add --prompts."""
    parser.add_argument(
        "--prompts", type=Path, metavar="DIR", default=default,
        help="folder of *.txt prompts, named by kind (default: those of this pipeline)",
    )  # fmt: skip


def read_prompts(folder: Path) -> dict[str, str]:
    """Read the prompts, by kind. Raises ConfigError if there are none, or one is not UTF-8.

    Lines end as on Linux, so that a checkout on Windows has the same tokens.
    """
    prompts = {
        path.stem: read_text(path, ConfigError, TEMPLATE_LIMIT, within=ANYWHERE).replace(
            "\r\n", "\n"
        )
        for path in sorted(folder.glob("*.txt"))
    }
    if not prompts:
        raise ConfigError(f"{folder}: no *.txt prompts there")
    return prompts
