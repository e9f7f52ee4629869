"""Reading text, JSON and YAML that others wrote: one set of limits for all files.

A file must be regular and inside its checkpoint's folder (or a blob of the Hub's cache), and no
larger than its kind may be. Nesting, number of entries and length of numbers are counted by a
linear scan before anything is parsed, because parsed objects take a hundred times the memory of
their text. Keys must not repeat.

JSON may have the words NaN and Infinity as numbers, as Python writes them.
"""

import io
import json
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import yaml

from mtpforge.errors import CheckpointError, ForgeError
from mtpforge.io import storage

JSON_LIMIT = 64 << 20
"""Bytes of a JSON file, and of any other text without a limit of its own.

The largest real ones, a tokenizer.json or an index, have 35 MB."""
YAML_LIMIT = 1 << 20
"""Bytes of YAML, a recipe or the front matter of a model card, and of a list of checksums."""
TEMPLATE_LIMIT = 4 << 20
"""Bytes of a chat template."""
_START = 1 << 20
DEPTH = 64
"""Brackets within brackets. Real files have up to 10."""
ENTRIES = 500_000
"""Commas and opening brackets of a JSON file, braces counted four times, as they take memory.

The largest real indexes have 200,000."""
MANY_ENTRIES = 3_000_000
"""The same for a tokenizer, of which the largest have 1.9 million, and for a listing."""
NUMBER = 1000
"""Characters of a number."""
YAML_ENTRIES = 100_000
"""Keys, values and ends of lists and mappings of a YAML file, aliases followed."""

ANYWHERE = Path("/")
"""Given as `within` for a file that the user has named, which can be a link to anywhere."""

Failure = type[ForgeError]
"""The kind of error to raise."""

T = TypeVar("T", dict[str, Any], list[Any], str, bool)


# ── files ──


def open_regular(
    path: Path,
    error: Failure = CheckpointError,
    most: int | None = None,
    within: Path | None = None,
) -> BinaryIO:
    """Open a regular file for reading, without ever waiting for a pipe or device.

    Raises `error` if it is missing, anything else than a file, larger than `most` bytes, or a link
    that leaves the folder `within` (default: its own) for anything else than the Hub's cache.
    """
    try:
        _check(path, path.stat(), error, most)
        _check_inside(path, within or path.parent, error)
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except FileNotFoundError:
        hint = ": is the checkpoint complete?" if error is CheckpointError else ""
        raise error(f"{path}: missing{hint}") from None
    except ValueError:  # a name with a null byte
        raise error(f"{path}: not a file name") from None
    except OSError as reason:  # a link to itself
        if storage.is_failing(reason):
            raise
        raise error(str(storage.explain(reason, path))) from None
    file = io.BufferedReader(_Named(descriptor, path))
    try:
        _check(path, os.fstat(descriptor), error, most)  # it may have been replaced meanwhile
    except BaseException:
        file.close()
        raise
    return file


def open_text(path: Path, error: Failure, within: Path | None = None) -> BinaryIO:
    """Open a text that llama.cpp is to read. Raises as `open_regular` does, and if it is no text.

    llama.cpp takes the bytes of anything for words. Invalid UTF-8 passes: well-known texts have it.
    """
    file = open_regular(path, error, within=within)
    start = file.read(_START)
    file.seek(0)
    if b"\0" in start:
        file.close()
        kind = "a GGUF" if start.startswith(b"GGUF") else "a binary file"
        raise error(f"{path}: is {kind}, not a text")
    return file


class _Named(io.FileIO):
    """A file whose errors name it: those of reading do not."""

    def __init__(self, descriptor: int, path: Path) -> None:
        super().__init__(descriptor)
        self._path = path

    def readinto(self, buffer: Any) -> int:
        with storage.reading(self._path):
            return super().readinto(buffer)

    def readall(self) -> bytes:
        with storage.reading(self._path):
            return super().readall()


def text_files(path: Path) -> list[Path]:
    """The texts of a folder (*.txt and *.jsonl) in the order of their names, or the text itself."""
    if not path.is_dir():
        return [path]
    return sorted(each for each in path.iterdir() if each.suffix in (".txt", ".jsonl"))


def is_there(path: Path) -> bool:
    """Whether a file that need not exist does. So does a broken link: reading it says so."""
    return os.path.lexists(path)


def read_bytes(
    path: Path,
    error: Failure = CheckpointError,
    most: int = JSON_LIMIT,
    within: Path | None = None,
) -> bytes:
    """The content of a file. Raises as `open_regular` does."""
    with open_regular(path, error, most, within) as file:
        content = file.read(min(os.fstat(file.fileno()).st_size, most) + 1)
    if len(content) > most:
        raise _too_large(path, error, most)
    return content


def read_text(
    path: Path,
    error: Failure = CheckpointError,
    most: int = JSON_LIMIT,
    within: Path | None = None,
) -> str:
    """The text of a file. Raises as `open_regular` does, and if it is not UTF-8."""
    return decode(path, read_bytes(path, error, most, within), error)


def decode(path: Path, content: bytes, error: Failure = CheckpointError) -> str:
    """The content of the file `path` as text. Raises `error` if it is not UTF-8."""
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as reason:
        raise error(f"{path}: not UTF-8 ({reason})") from None


# ── JSON ──


def read_json(
    path: Path,
    error: Failure = CheckpointError,
    within: Path | None = None,
    entries: int = ENTRIES,
) -> dict[str, Any]:
    """The object in a JSON file. Raises as `open_regular` and `parse_json` do."""
    return parse_json(path, read_bytes(path, error, within=within), error, entries=entries)


def parse_json(
    path: Path, content: bytes | str, error: Failure = CheckpointError, entries: int = ENTRIES
) -> dict[str, Any]:
    """The object in the content of the JSON file `path`. Raises `error` if it is invalid."""
    check_json(path, content, error, entries=entries)
    text = content if isinstance(content, str) else decode(path, content, error)
    try:
        value = json.loads(text, object_pairs_hook=unique)
        if _SURROGATE.search(text):  # half a character, which nothing can write
            json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise error(f"{path}: not valid JSON (it has half of a character)") from None
    except (ValueError, RecursionError) as reason:
        raise error(f"{path}: not valid JSON ({reason})") from None
    if not isinstance(value, dict):
        raise error(f"{path}: must be a JSON object")
    return value


def read_json_lines(path: Path, error: Failure) -> Iterator[tuple[Path, dict[str, Any]]]:
    """The objects in a *.jsonl that the user has named, each with its FILE:LINE for messages.

    Raises as `read_text` and `parse_json` do.
    """
    # Not splitlines: text in JSON may have other line breaks, such as U+2028, as they are.
    lines = read_text(path, error, within=ANYWHERE).split("\n")
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = Path(f"{path}:{number}")
            yield where, parse_json(where, line, error)


def member(values: Mapping[str, Any], key: str, kind: type[T], place: str) -> T | None:
    """The value of a key that has one type in JSON; None if it is missing or null.

    `place` is the file, or the object in it, for the message. Raises CheckpointError for another
    type, which must not be taken for a missing key.
    """
    value = values.get(key)
    if value is None or type(value) is kind:
        return value
    raise CheckpointError(f"{place}: {key} must be {_TYPES[kind]}, not {str(value)[:50]!r}")


_TYPES: dict[type, str] = {
    dict: "an object",
    list: "a list",
    str: "a text",
    bool: "true or false",
}


def check_json(
    path: Path, content: bytes | str, error: Failure = CheckpointError, entries: int = ENTRIES
) -> None:
    """Raise `error` if JSON exceeds a limit, without parsing it."""
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    if data.startswith(b"\xef\xbb\xbf"):
        raise error(f"{path}: begins with a byte order mark: save it as UTF-8 without")
    if data.count(b",") + data.count(b"[") + 4 * data.count(b"{") > entries:
        raise error(f"{path}: more than {entries:,} entries, so not read")
    if data.count(b"\\") > 4 * entries:
        raise error(f"{path}: more than {4 * entries:,} escapes, so not read")
    digits = b""
    brackets = []
    for piece in _outside_strings(data):
        digits = digits[-NUMBER:] + piece.translate(_AS_DIGITS)
        if b"0" * (NUMBER + 1) in digits:
            raise error(f"{path}: has a number of more than {NUMBER} characters, so not read")
        brackets.append(piece.translate(_AS_LIST, _NO_BRACKET))
    if _deeper_than(DEPTH, b"".join(brackets)):
        raise error(f"{path}: is nested more than {DEPTH} deep, so not read")


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The members of a JSON object. Raises ValueError if a key repeats."""
    members = dict(pairs)
    if len(members) != len(pairs):
        _refuse_twice([key for key, _ in pairs])
    return members


def _refuse_twice(keys: list[str]) -> None:
    """Raise ValueError if a key repeats."""
    for key, count in Counter(keys).items():
        if count > 1:
            raise ValueError(f"duplicate name {key[:100]!r}")


def _outside_strings(data: bytes) -> Iterator[bytes]:
    """Yield what JSON has outside its strings, in pieces, in linear time and little memory."""
    plain = data.replace(b"\\\\", b"").replace(b'\\"', b"")
    inside = 0
    for start in range(0, len(plain), _PIECE):
        parts = plain[start : start + _PIECE].split(b'"')
        yield b"".join(parts[inside::2])
        inside ^= (len(parts) - 1) & 1


_PIECE = 1 << 18
_AS_DIGITS = bytes(ord("0") if byte in b"0123456789.eE+-" else 0 for byte in range(256))
_SURROGATE = re.compile(r"\\u[dD][89abAB]|\\u[dD][c-fC-F]")
_AS_LIST = bytes.maketrans(b"{}", b"[]")
_NO_BRACKET = bytes(set(range(256)) - set(b"[]{}"))


def _deeper_than(limit: int, brackets: bytes) -> bool:
    """Whether square brackets nest deeper than `limit`, closed or not."""
    for _ in range(limit):
        inner = brackets.replace(b"[]", b"")
        if len(inner) == len(brackets):
            break
        brackets = inner
    return b"[]" in brackets or brackets.count(b"[") > limit


# ── YAML ──


def parse_yaml(path: Path, text: str, error: Failure, aliases: bool = False) -> Any:
    """The value in the YAML text of the file `path`, of plain types.

    Raises `error` if it is invalid, too large, has a tag, or an alias unless `aliases`: then they
    are counted as what they stand for.
    """
    if len(text) > YAML_LIMIT:
        raise error(f"{path}: more than {YAML_LIMIT >> 20} MB of YAML, so not read")
    try:
        _check_events(yaml.parse(text, Loader=_LOADER), aliases)
        root = yaml.compose(text, Loader=_LOADER)
        _check_nodes(root)
        return root and _LOADER("").construct_document(root)
    except (ValueError, OverflowError, TypeError, RecursionError, yaml.YAMLError) as reason:
        raise error(f"{path}: cannot be read as YAML ({reason})") from None


_NORWEGIAN = re.compile(r"(?m)^( *- +|language: *(?:\[(?:[^]\n]*,)? *)?)no(?= *(?:$|[],#]))")
"""The language `no`, in a list or alone, which PyYAML takes for a false."""


def read_front_matter(path: Path, error: Failure = CheckpointError) -> dict[str, Any]:
    """The front matter of a model card; empty if it has none. Raises `error`.

    Tabs are read as gguf-py reads them, and the language `no` wherever it stands.
    """
    lines = read_text(path, error).splitlines()
    if not lines or lines[0] != "---":
        return {}
    end = lines.index("---", 1) if "---" in lines[1:] else len(lines)
    text = "\n".join(lines[1:end]) + "\n"
    text = text.replace("- no\n", '- "no"\n').replace("\t", "  ")
    value = parse_yaml(path, _NORWEGIAN.sub(r'\1"no"', text), error)
    return value if isinstance(value, dict) else {}


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_LONG_PLAIN_NUMBER = re.compile(r"[0-9_.:eE+-]+")


def _check_events(events: Iterable[yaml.Event], aliases: bool) -> None:
    """Raise ValueError if a document is too deep or long, or has what no file needs."""
    depth = 0
    for count, event in enumerate(events):
        if isinstance(event, yaml.AliasEvent) and not aliases:
            raise ValueError(f"it has an alias, *{str(event.anchor)[:100]}")
        if tag := getattr(event, "tag", None):
            raise ValueError(f"it has a tag, {tag[:100]}")
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > DEPTH:
            raise ValueError(f"nested more than {DEPTH} deep")
        if count > YAML_ENTRIES:
            raise ValueError(f"more than {YAML_ENTRIES:,} entries")
        if isinstance(event, yaml.ScalarEvent) and _is_long_number(event):
            raise ValueError(f"a number of more than {NUMBER} characters")


def _is_long_number(event: yaml.ScalarEvent) -> bool:
    plain = event.implicit[0] and len(event.value) > NUMBER
    return plain and _LONG_PLAIN_NUMBER.fullmatch(event.value) is not None


def _check_nodes(root: yaml.Node | None) -> None:
    """Raise ValueError if a document repeats a key, or is too long once aliases are followed."""
    counts: dict[int, int] = {}

    def count(node: yaml.Node) -> int:
        if id(node) not in counts:
            counts[id(node)] = YAML_ENTRIES  # if it contains itself
            inner = [] if isinstance(node, yaml.ScalarNode) else node.value
            if isinstance(node, yaml.MappingNode):
                _refuse_twice([key.value for key, _ in inner if isinstance(key, yaml.ScalarNode)])
                inner = [each for pair in inner for each in pair]
            counts[id(node)] = 1 + sum(map(count, inner))
        return counts[id(node)]

    if root and count(root) > YAML_ENTRIES:
        raise ValueError(f"more than {YAML_ENTRIES:,} entries, aliases followed")


# ── checks of files ──


def _check(path: Path, found: os.stat_result, error: Failure, most: int | None) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise error(f"{path}: is not a regular file")
    if most is not None and found.st_size > most:
        raise _too_large(path, error, most)


def _too_large(path: Path, error: Failure, most: int) -> ForgeError:
    return error(f"{path}: larger than {most >> 20} MB, so not read")


_BLOB = re.compile(r"[0-9a-f]{40}(?:[0-9a-f]{24})?")


def _check_inside(path: Path, folder: Path, error: Failure) -> None:
    target = path.resolve()
    repository = target.parent.parent.name
    if target.is_relative_to(folder.resolve()):
        return
    is_cached = target.parent.name == "blobs" and repository.startswith("models--")
    if not (is_cached and _BLOB.fullmatch(target.name)):
        raise error(f"{path}: is a link out of its folder, so not read: copy the file there")
