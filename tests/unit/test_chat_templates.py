"""Chat templates: where a checkpoint keeps them, what is written, and what verify compares."""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import CHECKPOINTS, Run
from gguf.constants import GGUFValueType
from mtpforge.checkpoint.checkpoint import Checkpoint
from mtpforge.convert import chat_templates, native, upstream
from mtpforge.errors import CheckpointError
from mtpforge.gguf import reader
from mtpforge.gguf.metadata import Value
from mtpforge.gguf.reader import Gguf
from mtpforge.publish.card_config import About
from mtpforge.rules.local_paths import TemplatePath
from mtpforge.verify import metadata, source
from mtpforge.verify.request import Request
from other_architectures import write_model

KEY = "tokenizer.chat_template"
NAMED = [
    {"name": "tool-use", "template": "tools"},
    {"name": "default", "template": "main"},
    {"name": "rag", "template": "found"},
]
NAMED_KEYS = {
    KEY: "main",
    f"{KEY}.tool_use": "tools",
    f"{KEY}.rag": "found",
    f"{KEY}s": ["rag", "tool_use"],
}

Change = Callable[[Path, dict[str, Any]], object]


def file(name: str, text: str) -> Change:
    def write(folder: Path, settings: dict[str, Any]) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)

    return write


def key(value: Any) -> Change:
    return lambda folder, settings: settings.update(chat_template=value)


JINJA = file("chat_template.jinja", "file")
JSON = file("chat_template.json", '{"chat_template": "json"}')
MORE = [
    file("additional_chat_templates/tool-use.jinja", "tools"),
    file("additional_chat_templates/rag.jinja", "found"),
]
NOT_TAKEN = "chat_template.jinja: this chat template is not taken"

PLACES: dict[str, tuple[list[Change], dict[str, Any], str]] = {
    "none": ([], {}, ""),
    "key": ([key("key")], {KEY: "key"}, ""),
    "list": ([key(NAMED)], NAMED_KEYS, ""),
    "list without default": (
        [key(NAMED[:1])], {f"{KEY}.tool_use": "tools", f"{KEY}s": ["tool_use"]}, ""
    ),
    "empty list": ([key([])], {}, ""),
    "file": ([JINJA], {KEY: "file"}, ""),
    "folder": ([JINJA, *MORE], {**NAMED_KEYS, KEY: "file"}, ""),
    "folder alone": (MORE, {}, ""),
    "json": ([JSON], {KEY: "json"}, ""),
    "key and file": ([key("key"), JINJA], {KEY: "key"}, NOT_TAKEN),
    "key and equal file": ([key("file"), JINJA], {KEY: "file"}, ""),
    "key and folder": ([key("file"), JINJA, *MORE], {KEY: "file"}, NOT_TAKEN),
    "null and file": ([key(None), JINJA], {}, NOT_TAKEN),
    "file and json": ([JINJA, JSON], {KEY: "file"}, "chat_template.json: this chat template"),
}  # fmt: skip


def written(tmp_path: Path, changes: list[Change], tokenizer_config: bool = True) -> Path:
    folder = tmp_path / "tiny-qwen3.5"
    shutil.copytree(CHECKPOINTS / folder.name, folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    del settings["chat_template"]
    for change in changes:
        change(folder, settings)
    path.write_text(json.dumps(settings))
    if not tokenizer_config:
        path.unlink()
    return folder


def templates(opened: Gguf) -> dict[str, Any]:
    return {name: opened.get(name) for name in opened.metadata if name.startswith(KEY)}


@pytest.mark.parametrize("place", PLACES)
def test_templates_are_found_in_each_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    changes, expected, note = PLACES[place]
    folder = written(tmp_path, changes)
    native.convert(folder, tmp_path / "F.gguf", "draft", "qwen35")
    opened = reader.read(tmp_path / "F.gguf")
    assert templates(opened) == expected
    said = capsys.readouterr().err
    assert note in said and bool(said) == bool(note)
    assert metadata.check_template(opened, source.chat_templates(folder)).passed


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/rag.jinja"])
def test_lines_end_as_upstream_reads_them(tmp_path: Path, name: str) -> None:
    """An editor on Windows ends them with CR and LF, and the prompts would have the CR."""
    folder = written(tmp_path, [JINJA, *MORE])
    (folder / name).write_bytes(b"one\r\ntwo\r\n")
    native.convert(folder, tmp_path / "F.gguf", "draft", "qwen35")
    opened = reader.read(tmp_path / "F.gguf")
    assert "one\ntwo\n" in templates(opened).values()
    assert metadata.check_template(opened, source.chat_templates(folder)).passed


def test_a_byte_order_mark_would_begin_every_prompt(tmp_path: Path) -> None:
    folder = written(tmp_path, [JINJA])
    path = folder / "chat_template.jinja"
    path.write_bytes(b"\xef\xbb\xbf{{ messages }}")
    for read in (lambda: chat_templates.templates(folder), lambda: chat_templates.given(str(path))):
        with pytest.raises(
            CheckpointError, match=r"chat_template\.jinja: begins with a byte order"
        ):
            read()


def test_without_tokenizer_config_a_template_is_not_taken(tmp_path: Path) -> None:
    folder = written(tmp_path, [JINJA], tokenizer_config=False)
    assert chat_templates.templates(folder) is None and source.chat_templates(folder) == {}
    assert "there is no tokenizer_config.json" in chat_templates.notes(folder)[0]


@pytest.mark.parametrize("value", [5, [1], [{"name": "a"}], [{"name": 1, "template": "b"}], {}])
def test_malformed_templates_are_refused(tmp_path: Path, value: Any) -> None:
    folder = written(tmp_path, [key(value)])
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json: chat_template is neither"):
        native.convert(folder, tmp_path / "F.gguf", "draft", "qwen35")


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/x.jinja"])
def test_only_regular_files_are_read(tmp_path: Path, name: str) -> None:
    folder = written(tmp_path, [JINJA, *MORE])
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match="regular file"):
        native.convert(folder, tmp_path / "F.gguf", "draft", "qwen35")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({f"{KEY}.rag": "foun"}, f"{KEY}.rag differs from the source's from character 4"),
        ({f"{KEY}.rag": None}, f"{KEY}.rag is missing"),
        ({KEY: None}, "is missing"),
        ({f"{KEY}.other": "x"}, f"{KEY}.other the source has none"),
        ({f"{KEY}s": ["rag"]}, f"{KEY}s is ['rag'], not ['rag', 'tool_use']"),
    ],
)
def test_other_templates_than_the_sources_are_refused(
    tmp_path: Path, change: dict[str, Any], named: str
) -> None:
    folder = written(tmp_path, [key(NAMED)])
    kinds = {str: GGUFValueType.STRING, list: GGUFValueType.ARRAY}
    values = {
        name: Value.of(value, kinds[type(value)], GGUFValueType.STRING)
        for name, value in (NAMED_KEYS | change).items()
        if value is not None
    }
    check = metadata.check_template(Gguf(folder, values, {}, {}), source.chat_templates(folder))
    assert not check.passed and named in check.detail


def test_upstream_sees_additional_templates(tmp_path: Path) -> None:
    folder = write_model("glm", tmp_path / "glm")
    for change in (JINJA, *MORE, file("additional_chat_templates/code.py", "raise SystemExit")):
        change(folder, {})
    seen = upstream.without_code(Checkpoint(folder), tmp_path / "scratch")
    names = {path.name for path in (seen / chat_templates.FOLDER).iterdir()}
    assert names == {"tool-use.jinja", "rag.jinja"}


# ── a template that was given ──


@pytest.fixture
def fixed(tmp_path: Path) -> Path:
    path = tmp_path / "fixed.jinja"
    path.write_text("{{ fixed }}")
    return path


@pytest.mark.parametrize("changes", [[key(NAMED)], [JINJA, *MORE], []])
def test_a_given_template_stands_in_place_of_all_others(
    run: Run, tmp_path: Path, fixed: Path, changes: list[Change]
) -> None:
    folder = written(tmp_path, changes)
    options = ("--tokenizer-pre", "qwen35", "--chat-template", fixed)
    done = run("convert.py", folder, "--part", "draft", *options, "--out", tmp_path / "F.gguf")
    assert done.returncode == 0 and "not taken" not in done.stderr
    opened = reader.read(tmp_path / "F.gguf")
    assert templates(opened) == {KEY: "{{ fixed }}"}
    request = Request(checkpoint=folder, tokenizer_pre="qwen35", chat_template="{{ fixed }}")
    expected = source.open_source(replace(request, target=folder))
    assert expected is not None
    assert metadata.check_template(opened, expected.templates()).passed
    assert metadata.check_metadata(opened, expected.metadata()).passed
    own = source.open_source(replace(request, chat_template=None))
    assert own is not None and not metadata.check_template(opened, own.templates()).passed


def test_upstream_sees_the_given_template_alone(tmp_path: Path) -> None:
    folder = write_model("glm", tmp_path / "glm")
    for change in (JINJA, JSON, *MORE):
        change(folder, {})
    checkpoint = Checkpoint(folder)
    checkpoint.chat_template = "fixed"
    seen = upstream.without_code(checkpoint, tmp_path / "scratch")
    assert chat_templates.templates(seen) == "fixed"
    assert not (seen / chat_templates.FOLDER).exists()
    assert not (seen / "chat_template.json").exists()


@pytest.mark.parametrize(("content", "reason"), [(b" \n", "is empty"), (b"\xff", "UTF-8")])
def test_a_given_file_that_is_no_template_is_refused(
    fails: Callable[..., str], tmp_path: Path, content: bytes, reason: str
) -> None:
    path = tmp_path / "bad.jinja"
    path.write_bytes(content)
    options = ("--tokenizer-pre", "qwen35", "--chat-template", path)
    checkpoint = CHECKPOINTS / "tiny-qwen3.5"
    said = fails("convert.py", checkpoint, *options, out=tmp_path / "F.gguf")
    assert "bad.jinja" in said and reason in said


def test_a_template_with_an_error_is_refused_as_the_configuration_is_read(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    for text, reason in {
        " ": "is empty, so it is not a chat template",
        "a\n{% if x %}{{ y z }}{% endif %}": "line 2: expected token 'end of print statement'",
        "{% for m in messages %}": "line 1: Unexpected end of template",
        "{% endif %}": "line 1: Encountered unknown tag 'endif'",
        "{{" + "(" * 10000: "nested too deeply",
    }.items():
        path.write_text(text)
        problem = str(TemplatePath(path).problem())
        assert problem.startswith(str(path)) and reason in problem
    path.unlink()
    assert "no such file" in str(TemplatePath(path).problem())


@pytest.mark.parametrize(
    "text",
    [
        "{%- for m in messages %}{% if m.x %}{% continue %}{% endif %}{% break %}{% endfor -%}",
        "{% generation %}{{ m.content | trim }}{% endgeneration %}",
        "{% generation %}{{ raise_exception('x') }}",  # llama.cpp takes it
        "{{ x | filter_of_theirs }}{% if x is test_of_theirs %}{% endif %}",
        "{% macro f(a, b=[]) %}{{ strftime_now('%d') }}{% endmacro %}{% set ns = namespace(a=1) %}",
        "{% set x %}a{% endset %}{% call f() %}{% endcall %}{% filter trim %} a {% endfilter %}",
        "no tags at all",
    ],
)
def test_what_transformers_and_llama_cpp_parse_is_no_error(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(text)
    assert chat_templates.given(str(path)) == text and TemplatePath(path).problem() is None


def test_suspicious_words_of_a_given_template_are_said(tmp_path: Path) -> None:
    (warning,) = chat_templates.notes(tmp_path, "{{ x.__class__ }}")
    assert warning.startswith("warning: the given chat template: ")
    assert chat_templates.notes(tmp_path, "plain") == []


def test_the_card_names_the_file_of_a_given_template() -> None:
    about = About(name="x", checkpoint=None, variants={}, chat_template="fixed.jinja")
    assert about.sources == ["Chat template: a local file, `fixed.jinja`"]
