"""The pages agree with the code, with each other, and with the command lines of the programs."""

import ast
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT, SCRIPTS
from mtpforge.rules.config import Config, Model, parse
from mtpforge.rules.variant import Variant
from pages import DOCS, PAGES, Command, anchors, blocks, commands, links, prose
from snakemake.cli import get_argument_parser

sys.path.insert(0, str(DOCS))
import generate

OTHER_PROGRAMS = (
    *("export", "ls", "curl", "model_signing", "cosign", "sha256sum", ".ci/run"),
    *("buildah", "docker"),
)
"""Programs whose options are not checked here; test_tour runs those of README and tour."""


def test_readme_fits_on_a_page() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


# ── generated parts ──


def test_generated_parts_are_current() -> None:
    stale = [path.name for path, text in generate.pages().items() if path.read_text() != text]
    assert not stale, "run `make docs`"


def test_every_generated_part_is_on_a_page() -> None:
    parts = [
        part
        for page in PAGES
        for part in re.findall(r"<!-- generated: (\S+) -->", page.read_text())
    ]
    assert sorted(parts) == sorted(generate.PARTS)


def test_every_error_class_has_a_cause_and_a_remedy() -> None:
    table = re.findall(
        r"^\| `(\w+)` +\| (.+?) +\| (.+?) +\|$", (DOCS / "troubleshooting.md").read_text(), re.M
    )
    assert {name for name, cause, remedy in table if cause and remedy} == set(generate.classes())


def test_every_typed_error_is_listed() -> None:
    """Counted another way: calls of the classes in the text, minus functions given the message."""
    for path in SCRIPTS.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        made = re.findall(
            rf"(?<!class )\b({'|'.join(generate.classes())})\((?!ForgeError|\w*Error\):)", text
        )
        helpers = len(
            re.findall(rf"^ *def (?:{'|'.join(generate._HELPERS)})\(", text, re.MULTILINE)
        )
        listed = [kind for kind, _ in generate.messages_in(ast.parse(text))]
        assert len(listed) >= len(made) - helpers, path
        assert set(made) <= {*listed, *(kind for kind, _ in generate._HELPERS.values())}, path


def test_messages_are_found_however_they_are_raised() -> None:
    source = """
def check(path, names, kind):
    short = f"{path}: too short"
    if names:
        raise GgufError(f"{path}: lacks {', '.join(names)}: make it again")
    chosen = ConfigError if kind else errors.UploadError
    error = DownloadError("gone " "for good")
    raise chosen(short)
"""
    assert list(generate.messages_in(ast.parse(source))) == [
        ("GgufError", "<path>: lacks <names>: make it again"),
        ("DownloadError", "gone for good"),
        ("ConfigError", "<path>: too short"),
        ("UploadError", "<path>: too short"),
    ]
    with pytest.raises(ValueError, match="not readable"):
        list(generate.messages_in(ast.parse("def f(text):\n    raise GgufError(text)")))


def test_symptoms_are_messages_of_the_programs() -> None:
    """In the table of common problems, except those of Snakemake and llama.cpp."""
    rows = re.findall(
        r"^\| `([a-z].+?)` +\|", (DOCS / "troubleshooting.md").read_text(), re.MULTILINE
    )
    source = " ".join(path.read_text(encoding="utf-8") for path in SCRIPTS.rglob("*.py"))
    for symptom in rows:
        assert all(part in source for part in symptom.split(" ... ")), symptom


# ── the checks ──


def test_every_check_is_explained() -> None:
    """The names of `Check("name", ...)` in the source are those in the tables."""
    calls = [
        node
        for path in (SCRIPTS / "mtpforge/verify").glob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "Check"
    ]
    constants = [node for call in calls for node in ast.walk(call.args[0])]
    made = {node.value for node in constants if isinstance(node, ast.Constant)}
    rows = re.findall(
        r"^\| ([\w ]+?) +\|(?: ([\w ,]+?) +\|)?", (DOCS / "verification.md").read_text(), re.M
    )
    explained = {name for row in rows for cell in row for name in cell.split(", ")}
    assert made and made <= explained


# ── links ──


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    for link in links(page):
        if link.startswith("https://"):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_linked_from_the_readme() -> None:
    assert {DOCS / page.name for page in DOCS.glob("*.md")} == {
        ROOT / link for link in links(ROOT / "README.md") if link.startswith("docs/")
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_of_the_repository_exist(page: Path) -> None:
    paths = re.findall(r"`((?:workflow|tests|envs|bench|profiles|docs)/[\w./*-]+)`", prose(page))
    missing = [path for path in paths if "NAME" not in path and not list(ROOT.glob(path))]
    assert not missing


# ── commands ──


@pytest.mark.parametrize(
    "command", [c for page in PAGES for c in commands(page)], ids=lambda c: c.line
)
def test_commands_are_valid(command: Command) -> None:
    """Programs, options, targets of make and rules exist, and no required option is missing."""
    program, *arguments = command.words
    if program == "python" and arguments[:1] != ["-m"]:
        path = ROOT / arguments[0]
        assert path.parent == SCRIPTS and path.is_file()
        generate.parser_of(path).parse_args(arguments[1:])
    elif program == "make":
        targets = [word for word in arguments if "=" not in word]
        known = re.findall(r"^([a-z0-9-]+):.*##", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert set(targets) <= set(known)
    elif program == "snakemake":
        targets = get_argument_parser().parse_args(arguments).targets
        assert targets and set(targets) <= _rules()
    else:
        assert program in (*OTHER_PROGRAMS, "python") or program.startswith(
            "resources/toolchain/bin/llama-"
        )


def _rules() -> set[str]:
    files = [ROOT / "Snakefile", *(ROOT / "workflow/rules").glob("*.smk")]
    return {
        name
        for file in files
        for name in re.findall(r"^(?:rule|checkpoint) (\w+):", file.read_text(), re.M)
    }


# ── configuration ──

COMPLETE = {"source": {"path": "checkpoint"}, "variants": {"BF16": {}}}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_examples_of_the_configuration_are_valid(page: Path) -> None:
    """Each YAML block is one, or a part of one: models, or keys of a model or of a variant."""
    for text in (text for language, text in blocks(page) if language == "yaml"):
        example = yaml.safe_load(textwrap.dedent(text).replace("COMMIT", "a" * 40))
        parse(_completed(example))


def _completed(example: dict[str, Any]) -> dict[str, Any]:
    if set(example) <= set(Config.model_fields):
        models = {name: {**COMPLETE, **model} for name, model in example.get("models", {}).items()}
        return {**example, "models": models or {"mine": COMPLETE}}
    if all(isinstance(entry, dict) and "variants" in entry for entry in example.values()):
        return {"models": example}
    if set(example) <= set(Model.model_fields):
        return {"models": {"mine": {**COMPLETE, **example}}}
    assert set(example) <= set(Variant.model_fields)
    return {"models": {"mine": {**COMPLETE, "variants": {"Q4_K_M": example}}}}
