"""Prompts are the same on any system."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from mtpforge.errors import ConfigError
from mtpforge.prompts import PROMPTS, read_prompts
from mtpforge.rules.build import Build


def on_windows(folder: Path) -> Path:
    """The prompts as Git checks them out there."""
    folder.mkdir()
    for path in PROMPTS.glob("*.txt"):
        (folder / path.name).write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    return folder


def decisive(folder: Path) -> str:
    """What decides the measurements of a model."""
    model = {"source": {"path": str(folder)}, "prompts": str(folder), "measure": {}}
    build = Build({"models": {"m": {**model, "variants": {"BF16": {}}}}})
    return build.measure.decisive(SimpleNamespace(model="m"))


def test_prompts_of_a_checkout_on_windows_are_the_same(tmp_path: Path) -> None:
    here, there = shutil.copytree(PROMPTS, tmp_path / "here"), on_windows(tmp_path / "there")
    assert b"\r\n" in next(there.iterdir()).read_bytes()
    assert read_prompts(here) == read_prompts(there) == read_prompts(PROMPTS)
    assert decisive(here) == decisive(there)
    next(there.iterdir()).write_bytes(b"other\r\n")
    assert decisive(here) != decisive(there)


def test_other_line_breaks_are_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("a\rb\u2028c\n".encode())
    assert read_prompts(tmp_path) == {"a": "a\rb\u2028c\n"}


def test_a_prompt_that_is_too_large_is_refused_before_jobs_run(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a" * (5 << 20))
    with pytest.raises(ConfigError, match=r"a\.txt: larger than 4 MB"):
        decisive(tmp_path)
