"""Prompts to verify and measure with: `*.txt` files named by kind (code, prose, structured)."""

import argparse
from pathlib import Path

from mtpforge.errors import ConfigError

PROMPTS = Path(__file__).resolve().parents[2] / "prompts"


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add --prompts."""
    parser.add_argument(
        "--prompts", type=Path, metavar="DIR", default=PROMPTS,
        help="folder of *.txt prompts, named by kind (default: those of this pipeline)",
    )  # fmt: skip


def read_prompts(folder: Path) -> dict[str, str]:
    """Read the prompts, by kind. Raises ConfigError if there are none, or one is not UTF-8."""
    try:
        prompts = {
            path.stem: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.txt"))
        }
    except UnicodeDecodeError as error:
        raise ConfigError(f"{folder}: a prompt is not UTF-8 ({error})") from None
    if not prompts:
        raise ConfigError(f"{folder}: no *.txt prompts there")
    return prompts
