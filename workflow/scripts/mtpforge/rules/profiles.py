"""Refuses a profile that is not in profiles/: Snakemake ignores it without a word."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from mtpforge.errors import ConfigError
from mtpforge.suggest import close

FOLDER = Path(__file__).resolve().parents[4] / "profiles"


def check(name: str) -> None:
    """Raise ConfigError if there is no profile of this name."""
    names = sorted(each.name for each in FOLDER.iterdir() if each.is_dir())
    if name not in names:
        has = ", ".join(names)
        raise ConfigError(f"no profile {name[:100]!r}: profiles/ has {has}{close(name, names)}")


def check_options(options: Sequence[str]) -> None:
    """Raise ConfigError if the `--workflow-profile` of a run of Snakemake is not there."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--workflow-profile", default="none")
    given = Path(parser.parse_known_args(options)[0].workflow_profile)
    places = (given, "profiles" / given, FOLDER / given)
    if given != Path("none") and not any(place.exists() for place in places):
        check(given.name)
