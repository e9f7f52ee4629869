"""A malformed command line ends with one short line, without control characters, and code 2."""

import re
from collections.abc import Callable
from pathlib import Path

import hostile_text
import pytest
from conftest import ROOT, SCRIPTS
from mtpforge import cli

PROGRAMS = sorted(
    path.stem
    for path in (ROOT / "workflow" / "scripts").glob("*.py")
    if path.stem != "run_upstream"  # it runs in the environment of llama.cpp's converter
)
LONG = "x" * 100_000
ESCAPES = "\x1b[31m\x07\u202e\r\n\n\udcff"
LONGEST = 2200


def refused(*command: str) -> str:
    """The line with which a program refuses its command line."""
    outcome = hostile_text.attempt(command)
    assert outcome.status == 2, outcome.errors[:1000]
    return checked(outcome.errors)


def checked(errors: str) -> str:
    """An error line."""
    assert errors.startswith("error: ") and errors.count("\n") == 1 and len(errors) < LONGEST
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\ufffd]", errors)
    return errors


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    "argument", [LONG, ESCAPES, "{}%(prog)s%d';"], ids=["long", "escapes", "formats"]
)
def test_options_that_do_not_exist(program: str, argument: str) -> None:
    for given in (f"--no-such-option={argument}", f"--{argument}", f"-{argument[1:]}"):
        assert "--help lists the options" in refused(program, given)


@pytest.mark.parametrize("argument", [LONG, ESCAPES, "", "NaN", "9" * 5000])
@pytest.mark.parametrize(
    "command",
    [
        ("convert", "a", "--out", "b", "--part"),
        ("convert", "a", "--out", "b", "--norms"),
        ("convert_upstream", "a", "--out", "b", "--part"),
        ("measure", "a", "--out", "b", "--repeats"),
        ("measure", "a", "--out", "b", "--n-max"),
        ("quantize", "a", "--out", "b", "--plan", "c", "--piece"),
        ("sensitivity", "a", "--logits", "b", "--keep", "c", "--out", "d", "--piece"),
        ("allocate", "a", "--type", "Q8_0", "--errors", "b", "--out", "c", "--bits"),
        ("plot",),
    ],
    ids=" ".join,
)
def test_values_that_are_not_among_the_choices(command: tuple[str, ...], argument: str) -> None:
    option = command[-1].lstrip("-")
    assert option == "plot" or option in refused(*command, argument)


def test_a_value_that_a_program_refuses_itself_is_cut_as_well(tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    for command in (
        ("quantize", "a.gguf", "--type", "Q8_0", "--out", out, "--bin"),
        ("convert", "--out", out),
        ("card", "--files", "a", "--reports", "b", "--toolchain", "c", "--out", out, "--about"),
    ):
        for argument in (LONG, ESCAPES):
            outcome = hostile_text.attempt((*command, argument))
            assert outcome.status == 1
            checked(outcome.errors)


def test_what_make_installs_is_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.installed("workflow/scripts") == SCRIPTS
    assert cli.installed("nothing/like/it") == Path("nothing/like/it")
    assert cli.installed(str(tmp_path)) == tmp_path
    (tmp_path / "workflow/scripts").mkdir(parents=True)
    assert cli.installed("workflow/scripts") == Path("workflow/scripts")


def test_a_missing_program_is_no_verdict_on_a_file(
    fails: Callable[..., str], tmp_path: Path
) -> None:
    said = fails("verify.py", tmp_path / "x.gguf", "--bin", tmp_path, out=tmp_path / "report.json")
    assert "llama-server: missing or not executable" in said and "FAILED" not in said
