"""Reading text, JSON and YAML of others: limits hold before anything is parsed."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hostile_text import special
from mtpforge.errors import CheckpointError, ConfigError, ForgeError, printable
from mtpforge.io import text

MANY = 10_000_000

JSON: dict[str, tuple[Callable[[], bytes], str]] = {
    "deep lists": (lambda: b"[" * 100_000 + b"]" * 100_000, "nested"),
    "deep objects": (lambda: b'{"a":' * 900 + b"1" + b"}" * 900, "nested"),
    "one too deep": (lambda: b'{"a":' + b"[" * 64 + b"]" * 64 + b"}", "nested"),
    "unclosed": (lambda: b"[" * 200_000, "nested"),
    "empty lists": (lambda: b"[" + b"[]," * MANY + b"[]]", "entries"),
    "empty objects": (lambda: b"[" + b"{}," * MANY + b"{}]", "entries"),
    "empty strings": (lambda: b"[" + b'"",' * MANY + b'""]', "entries"),
    "digits": (lambda: b'{"a": ' + b"9" * 5000 + b"}", "number"),
    "a long fraction": (lambda: b'{"a": 1.' + b"9" * 5000 + b"}", "number"),
    "escapes, unfinished": (lambda: b'{"a": "' + b'\\"' * MANY, "escapes"),
    "a duplicate": (lambda: b'{"a": 1, "a": 2}', "duplicate name 'a'"),
    "a duplicate within": (lambda: b'{"a": [{"b": 1, "b": 2}]}', "duplicate name 'b'"),
    "half a character": (lambda: b'{"a": "\\ud800"}', "half"),
    "a mark": (lambda: b"\xef\xbb\xbf{}", "byte order mark"),
    "UTF-16": (lambda: '{"a": 1}'.encode("utf-16"), "UTF-8"),
    "not an object": (lambda: b"[1]", "must be a JSON object"),
    "nothing": (lambda: b"", "not valid JSON"),
}


@pytest.mark.parametrize("kind", JSON)
def test_json_beyond_a_limit_is_refused(kind: str) -> None:
    content, named = JSON[kind]
    with pytest.raises(CheckpointError, match=named):
        text.parse_json(Path("x.json"), content())


def test_json_within_the_limits_is_read() -> None:
    deep = '{"a":' + "[" * 63 + "]" * 63 + "}"
    brackets = '{"a": "' + "[{" * 1000 + '", "b": "\\\\", "c": "\\ud83d\\ude00", "d": 1e400}'
    assert len(text.parse_json(Path("x"), deep)) == 1
    assert text.parse_json(Path("x"), brackets)["c"] == "\U0001f600"


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in pairwise("abcdefghi")
)
MERGES = "a: &a {k: 1}\n" + "".join(
    f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 9)}]}}\n" for old, new in pairwise("abcdefghi")
)
YAML = {
    "aliases": (BOMB, "alias|aliases"),
    "merges": (MERGES, "alias|aliases"),
    "itself": ("a: &a [*a]\n", "alias"),
    "deep flow": ("[" * 100_000, "nested"),
    "deep blocks": ("".join(f"{' ' * i}a:\n" for i in range(900)), "nested"),
    "deep dashes": ("- " * 10_000 + "a", "nested"),
    "deep keys": ("? " * 10_000 + "a", "nested"),
    "digits": ("a: " + "9" * 5000, "number"),
    "sexagesimal": ("a: " + ":".join(["59"] * 50_000), "number"),
    "a tag": ('a: !!int "' + ":".join(["59"] * 10_000) + '"', "tag"),
    "an object": ("a: !!python/object/apply:os.system [true]", "tag"),
    "a duplicate": ("a: 1\na: 2\n", "duplicate name 'a'"),
    "entries": ("- a\n" * 200_000, "entries"),
    "size": ("a: " + "b" * (2 << 20), "1 MB"),
    "a date that is none": ("a: 2024-99-99", "YAML"),
    "a list as key": ("[a]: b", "YAML"),
    "control characters": ("a: \x1b[31m", "YAML"),
}


@pytest.mark.parametrize("own", [False, True], ids=["stranger", "own"])
@pytest.mark.parametrize("kind", YAML)
def test_yaml_beyond_a_limit_is_refused(kind: str, own: bool) -> None:
    content, named = YAML[kind]
    with pytest.raises(ConfigError, match=named):
        text.parse_yaml(Path("x.yaml"), content, ConfigError, aliases=own)


def test_aliases_in_a_file_of_the_user_are_followed() -> None:
    content = "a: &a {k: 1}\nb: {<<: *a, l: 2}\nc: *a\n"
    read = text.parse_yaml(Path("x.yaml"), content, ConfigError, aliases=True)
    assert read == {"a": {"k": 1}, "b": {"k": 1, "l": 2}, "c": {"k": 1}}


FILES = {
    "a pipe": "regular file",
    "a folder": "regular file",
    "a device": "regular file",
    "3 GB": "larger than 64 MB",
    "a link outside": "link out of its folder",
    "missing": "missing",
}


@pytest.mark.parametrize("kind", FILES)
def test_anything_but_a_regular_file_of_its_folder_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "checkpoint" / "x.json"
    if kind != "missing":
        special(path, kind)
    with pytest.raises(CheckpointError, match=FILES[kind]):
        text.read_json(path)


def test_a_name_that_no_file_can_have_is_refused() -> None:
    with pytest.raises(CheckpointError, match="not a file name"):
        text.read_text(Path("a\0b"))


def test_links_within_a_folder_and_into_the_cache_of_the_hub_are_followed(tmp_path: Path) -> None:
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot = tmp_path / "models--a--b" / "snapshots" / ("0" * 40)
    for folder in (blobs, snapshot):
        folder.mkdir(parents=True)
    (blobs / ("f" * 40)).write_text('{"a": 1}')
    (blobs / "other").write_text("{}")
    (snapshot / "x.json").symlink_to(f"../../blobs/{'f' * 40}")
    (snapshot / "y.json").symlink_to("x.json")
    (snapshot / "z.json").symlink_to("../../blobs/other")
    assert text.read_json(snapshot / "x.json") == text.read_json(snapshot / "y.json") == {"a": 1}
    with pytest.raises(CheckpointError, match="link"):
        text.read_json(snapshot / "z.json")
    assert text.read_json(snapshot / "z.json", within=text.ANYWHERE) == {}


def test_control_characters_are_never_printed() -> None:
    name = "a\x1b]0;owned\x07\x9b31m\u202eb\r\n\tc"
    shown = r"a\x1b]0;owned\x07\x9b31m\u202eb\r" + "\n\tc"
    assert printable(name) == str(ForgeError(name)) == shown
    assert printable("Größe 漢字 🚀") == "Größe 漢字 🚀"


# ── front matter ──


@pytest.mark.parametrize(
    ("line", "languages"),
    [
        ("language:\n- en\n- no", ["en", "no"]),
        ("language:\n  - no # Norwegian\n  - nb", ["no", "nb"]),
        ("language: [en, no]", ["en", "no"]),
        ("language: [no,en]", ["no", "en"]),
        ('language: [en, "no"]', ["en", "no"]),
        ("language: no", "no"),
        ("language: no-NO", "no-NO"),
    ],
)
def test_norwegian_is_a_language_on_a_card(tmp_path: Path, line: str, languages: object) -> None:
    """As on the Hub, whose YAML is newer than PyYAML's."""
    card = tmp_path / "README.md"
    card.write_text(f"---\n{line}\nsummary: a, no, b\n---\n")
    found = {"language": languages, "summary": "a, no, b"}
    assert text.read_front_matter(card) == found
