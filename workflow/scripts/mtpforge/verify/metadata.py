"""Checks of metadata and chat template."""

from collections.abc import Mapping
from dataclasses import replace

from gguf.constants import Keys

from mtpforge import progress
from mtpforge.gguf import reader, template_warnings
from mtpforge.gguf.metadata import Value
from mtpforge.gguf.reader import Gguf
from mtpforge.inject import match
from mtpforge.verify.report import Check, some

TEMPLATE = Keys.Tokenizer.CHAT_TEMPLATE
_OF_THE_FILE = (
    "general.file_type",
    "general.quantization_version",
    "general.size_label",
    reader.PADDING,
)
"""Keys that describe the file, not the model."""
_ADDED = ("quantize.", "split.", reader.PADDING)
"""Prefixes of keys that quantizing, splitting and writing add."""
_VOCABULARY = (Keys.Tokenizer.LIST, Keys.Tokenizer.MERGES)


def check_metadata(opened: Gguf, expected: Mapping[str, Value]) -> Check:
    """Every key has the value that conversion writes, except those that describe the file."""
    problems = []
    compared = 0
    for key in expected.keys() | opened.metadata.keys():
        found = opened.metadata.get(key)
        right = expected.get(key)
        if key in (*_OF_THE_FILE, TEMPLATE) or (right is None and key.startswith(_ADDED)):
            continue
        compared += 1
        if found is None:
            problems.append(f"{key} is missing")
        elif right is None:
            problems.append(f"{key} does not belong there")
        elif found != right:
            problems.append(_difference(key, found, right))
    return _verdict(problems, compared)


def check_metadata_of_base(opened: Gguf, expected: Mapping[str, Value]) -> Check:
    """Keys of the architecture that both have are equal, and the vocabularies match.

    Other keys of a base are its publisher's choice: see `inject.match`.
    """
    source = replace(opened, metadata=dict(expected))
    differences = match.key_differences(opened, source)
    if difference := match.vocabulary_difference(opened.metadata, expected):
        differences.append(difference)
    prefix = f"{opened.architecture}."
    for key in (prefix + name for name in match.BLOCKS):
        if opened.get(key) != source.get(key):
            differences.append(match.Difference(key, opened.get(key), source.get(key)))
    problems = ["{} is {}, not {}".format(*map(_short, each)) for each in differences]
    shared = expected.keys() & opened.metadata.keys() - {prefix + name for name in match.FREE}
    compared = sum(key.startswith((prefix, *_VOCABULARY)) for key in shared)
    return _verdict(problems, compared)


def templates_in(opened: Gguf) -> dict[str, str]:
    """A file's chat templates by their keys."""
    found = {key: opened.get(key) for key in opened.metadata if key.startswith(TEMPLATE)}
    return {key: value for key, value in found.items() if isinstance(value, str)}


def check_template(opened: Gguf, expected: Mapping[str, str]) -> Check:
    """The chat templates are the source's, byte for byte, and those with a name are listed."""
    stored = templates_in(opened)
    problems = []
    for key in sorted(stored.keys() | expected.keys()):
        found, right = stored.get(key), expected.get(key)
        if found != right:
            where = "" if key == TEMPLATE else f"{key} "
            problems.append(where + _first_difference(found, right))
    names = sorted(key.removeprefix(f"{TEMPLATE}.") for key in expected if key != TEMPLATE)
    listed = sorted(opened.get(Keys.Tokenizer.CHAT_TEMPLATES) or [])
    if listed != names:
        problems.append(f"{Keys.Tokenizer.CHAT_TEMPLATES} is {listed}, not {names}")
    size = sum(len(text.encode()) for text in expected.values())
    detail = f"{size:,} bytes, same as the source's" if expected else "the source has none"
    return Check("chat template", not problems, some(problems) or detail)


def check_template_names(opened: Gguf) -> list[Check]:
    """A warning if a chat template has names that only an attack needs; it does not fail."""
    words = template_warnings.warning(templates_in(opened).values())
    if words:
        progress.say(f"warning: {opened.path.name}: {words}")
    return [Check("template names", True, words)] if words else []


def _verdict(problems: list[str], compared: int) -> Check:
    detail = some(sorted(problems)) or f"{compared} keys match the source"
    return Check("metadata", not problems, detail)


def _difference(key: str, found: Value, right: Value) -> str:
    return f"{key} is {_shown(found)}, not {_shown(right)}"


def _shown(value: Value) -> str:
    return _short(value.decode())


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def _first_difference(stored: object, right: str | None) -> str:
    if right is None:
        return "the source has none, the file has one"
    if not isinstance(stored, str):
        return "is missing"
    pairs = enumerate(zip(stored, right, strict=False))
    place = next((i for i, (a, b) in pairs if a != b), min(len(stored), len(right)))
    return f"differs from the source's from character {place:,} on"
