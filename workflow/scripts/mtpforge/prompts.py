"""Prompts to verify and measure with: `*.txt` files named by kind (code, prose, structured)."""

import argparse
from pathlib import Path

from mtpforge.errors import ConfigError
from mtpforge.io.text import ANYWHERE, TEMPLATE_LIMIT, read_text

PROMPTS = Path(__file__).resolve().parents[2] / "prompts"

N_PREDICT = 200
"""Tokens generated from each prompt to measure acceptance and speed."""
EQUAL = 100
"""Tokens of each prompt that must be the same without drafting."""


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add --prompts."""
    parser.add_argument(
        "--prompts", type=Path, metavar="DIR", default=PROMPTS,
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
