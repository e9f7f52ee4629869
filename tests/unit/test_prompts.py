"""Prompts are the same on any system."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from mtpforge.errors import ConfigError
from mtpforge.prompts import PROMPTS, read_measured, read_prompts
from mtpforge.rules.build import Build


def on_windows(folder: Path) -> Path:
    """The prompts as Git checks them out there."""
    folder.mkdir()
    for path in PROMPTS.glob("*.txt"):
        (folder / path.name).write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    return folder


def decisive(prompts: Path) -> str:
    """What decides the measurements of a model."""
    folder = prompts if prompts.is_dir() else prompts.parent
    model = {"source": {"path": str(folder)}, "measure": {"prompts": str(prompts)}}
    build = Build({"models": {"m": {**model, "variants": {"BF16": {}}}}})
    return build.measure.decisive(SimpleNamespace(model="m"))


PLACEHOLDER = "FULL BENCHMARK DATA SHOULD BE FETCHED FROM THE SOURCE USING SPECDEC_BENCH"


def write_questions(path: Path, *questions: tuple[str, ...]) -> Path:
    """A *.jsonl of questions: category and turns."""
    lines = [
        json.dumps({"question_id": n, "category": category, "turns": turns}, ensure_ascii=False)
        for n, (category, *turns) in enumerate(questions)
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


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


def test_a_benchmark_gives_the_first_question_of_each_category(tmp_path: Path) -> None:
    """Lines as in SPEED-Bench; other categories than the first may come between."""
    path = write_questions(
        tmp_path / "qualitative.jsonl",
        ("coding", "Sort\u2028a list."),
        ("math", PLACEHOLDER),
        ("coding", "Reverse a list."),
        ("math", "Solve x + 1 = 2.", "And x + 2 = 2?"),
    )
    expected = {"coding.chat": "Sort\u2028a list.", "math.chat": "Solve x + 1 = 2."}
    assert read_measured(path) == expected


def test_other_files_beside_prompts_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "poem.txt").write_text("Roses are")
    (tmp_path / "chats.jsonl").write_text('{"messages": []}')
    assert read_prompts(tmp_path) == read_measured(tmp_path) == {"poem": "Roses are"}


def test_files_are_verified_with_a_folder_of_prompts(tmp_path: Path) -> None:
    """Their texts are short, and go to the model as they are."""
    path = write_questions(tmp_path / "questions.jsonl", ("coding", "Sort."))
    model = {"source": {"path": str(tmp_path)}, "prompts": str(path), "variants": {"BF16": {}}}
    with pytest.raises(ConfigError, match=r"prompts: .*must be a folder: a \*\.jsonl is for"):
        Build({"models": {"m": model}})


def test_a_benchmark_is_measured_like_a_folder_of_prompts(tmp_path: Path) -> None:
    path = write_questions(tmp_path / "questions.jsonl", ("coding", "Sort."), ("math", "Add."))
    before = decisive(path)
    write_questions(path, ("coding", "Sort."), ("math", "Add."), ("math", "More."))
    assert decisive(path) == before
    write_questions(path, ("coding", "Sort."), ("math", "Subtract."))
    assert decisive(path) != before


def test_questions_that_are_not_there_are_refused(tmp_path: Path) -> None:
    path = write_questions(tmp_path / "a.jsonl", ("qa", PLACEHOLDER), ("coding", "Sort."))
    with pytest.raises(ConfigError, match=r"a\.jsonl: the questions of 'qa' .*prepare script"):
        read_measured(path)
    for line, message in (
        ({"turns": ["x"]}, "a.jsonl:1: needs a `category`"),
        ({"category": "../x", "turns": ["x"]}, "needs a `category`"),
        ({"category": "qa"}, "needs `turns`"),
        ({"category": "qa", "turns": [{"content": "x"}]}, "needs `turns`"),
        ({"category": "qa", "turns": [" "]}, "needs `turns`"),
    ):
        path.write_text(json.dumps(line))
        with pytest.raises(ConfigError, match=message):
            read_measured(path)
    path.write_text("\n")
    with pytest.raises(ConfigError, match="no questions there"):
        read_measured(path)
