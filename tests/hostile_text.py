"""Hostile text by kind: what is put in place of a file, and the program that reads it.

A case prepares an empty folder and returns a program of workflow/scripts with its arguments. It
must end with one error line, leave no output, and take hardly any time and memory.
"""

import importlib
import json
import os
import re
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from conftest import CHECKPOINTS
from example_records import STAMP, report

Command = tuple[str, ...]
Prepare = Callable[[Path], Command]


@dataclass(frozen=True)
class Case:
    """`kind` groups cases in the figures; `name` is unique."""

    kind: str
    name: str
    prepare: Prepare


@dataclass(frozen=True)
class Outcome:
    status: int
    errors: str
    seconds: float
    """Of CPU."""
    megabytes: float


def prepared(case: Case, folder: Path) -> Command:
    """Prepare a case in a fork, which takes the memory for it along."""
    reader, writer = os.pipe()
    if not (child := os.fork()):
        os.write(writer, "\0".join(case.prepare(folder)).encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader) as told:
        return tuple(told.read().split("\0"))


def attempt(command: Command) -> Outcome:
    """Run a program in a fork of this process, so that nothing is imported again."""
    program = importlib.import_module(command[0])
    with tempfile.TemporaryFile() as said:
        child = os.fork()
        if not child:
            _run(program, command, said.fileno())
        _, status, used = os.wait4(child, 0)
        seconds = used.ru_utime + used.ru_stime
        said.seek(0)
        errors = said.read().decode(errors="replace")
    return Outcome(os.waitstatus_to_exitcode(status), errors, seconds, used.ru_maxrss / 1024)


def _run(program: Any, command: Command, descriptor: int) -> None:
    from mtpforge import cli

    status = 99
    try:
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (20, 20))
        resource.setrlimit(resource.RLIMIT_DATA, (4 << 30, 4 << 30))
        sys.argv = [f"{command[0]}.py", *command[1:]]
        sys.stdout = os.fdopen(1, "w", closefd=False)
        sys.stderr = os.fdopen(2, "w", closefd=False)
        try:
            cli.run(program.main)
            status = 0
        except SystemExit as exit:
            status = exit.code if isinstance(exit.code, int) else 1
            print(exit.code if isinstance(exit.code, str) else "", end="", file=sys.stderr)
        except BaseException:
            import traceback

            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)


def problem(outcome: Outcome, folder: Path) -> str:
    """What is wrong with how a program ended; empty if it refused its input as it should."""
    lines = outcome.errors.splitlines()
    if outcome.status != 1 or "Traceback" in outcome.errors:
        return f"status {outcome.status}: {outcome.errors[-600:]}"
    if not lines or not lines[-1].startswith("error: ") or len(lines) > 2:
        return f"not one error line: {outcome.errors[-600:]!r}"
    if re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", outcome.errors):
        return f"control characters: {outcome.errors[-600:]!r}"
    left = [path.name for path in folder.glob("*out*")] + [path.name for path in folder.glob(".*")]
    return f"left {left}" if left else ""


PROGRAMS = (
    "convert", "quantize", "summary", "plot", "card", "fetch", "materials", "check_results",
    "measure",
)  # fmt: skip


# ── what is put in place of a JSON file ──

LEAN = 2_000_000


def _member(value: str) -> Callable[[dict[str, Any]], bytes]:
    """The right content with one more member, in JSON."""

    def written(right: dict[str, Any]) -> bytes:
        whole = json.dumps(right)
        comma = ", " if right else ""
        return f'{whole[:-1]}{comma}"more": {value}}}'.encode("utf-8", "surrogatepass")

    return written


def _instead(content: bytes) -> Callable[[dict[str, Any]], bytes]:
    return lambda right: content


JSON: dict[str, dict[str, Callable[[dict[str, Any]], bytes]]] = {
    "nesting": {
        "900 lists": _member("[" * 900 + "]" * 900),
        "980 objects": _member('{"a":' * 980 + "1" + "}" * 980),
        "100,000 lists": _member("[" * 100_000 + "]" * 100_000),
        "100,000 unclosed": _instead(b'{"a":' * 100_000),
    },
    "numbers": {
        "5,000 digits": _member("9" * 5000),
        "a fraction of 100,000 digits": _member("0." + "9" * 100_000),
        "4 MB of digits": _member("1" * (4 << 20)),
    },
    "entries": {
        "empty lists": _member("[" + "[]," * LEAN + "[]]"),
        "empty objects": _member("[" + "{}," * LEAN + "{}]"),
        "empty strings": _member("[" + '"",' * LEAN + '""]'),
        "zeros": _member("[" + "0," * LEAN + "0]"),
        "members": _member("{" + "".join(f'"{i}":0,' for i in range(600_000)) + '"":0}'),
        "escapes": _instead(b'{"a": "' + b'\\"' * 8_000_000),
    },
    "duplicate keys": {
        "at the top": lambda right: _member("1")(right)[:-1] + b', "more": 2}',
        "within": _member('{"a": {"b": 1, "b": 1}}'),
    },
    "syntax": {
        "a list": _instead(b"[1, 2]"),
        "a string": _instead(b'"x"'),
        "null": _instead(b"null"),
        "nothing": _instead(b""),
        "cut": lambda right: _member("1")(right)[:-1],
        "two values": lambda right: _member("1")(right) + b"{}",
        "not UTF-8": _instead(b'{"a": "\xff"}'),
        "UTF-16": lambda right: _member("1")(right).decode().encode("utf-16"),
        "a byte order mark": lambda right: b"\xef\xbb\xbf" + _member("1")(right),
        "half a character": _member('"\\ud800"'),
        "half a character as key": _member('{"\\udc00": 1}'),
        "null bytes": lambda right: _member("1")(right) + bytes(100),
    },
}


def special(path: Path, kind: str) -> None:
    """Put something else than a small regular file at `path`."""
    path.unlink(missing_ok=True)
    path.parent.mkdir(exist_ok=True, parents=True)
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "3 GB":
        with path.open("wb") as file:
            file.truncate(3 << 30)
    elif kind == "a link to itself":
        path.symlink_to(path.name)
    else:
        secret = path.parent.parent / "secret"
        secret.write_text('{"a": "of another file"}')
        path.symlink_to({"a device": "/dev/zero", "a link outside": "../secret"}[kind])


OWN = ("a pipe", "a folder", "3 GB", "a device")
"""Kinds of files that are wrong also for a file that the user names."""
SPECIAL = (*OWN, "a link outside")


# ── files of a checkpoint ──


def checkpoint(folder: Path) -> Path:
    """A private copy of the dense checkpoint; its weights are links, as nothing writes to them."""
    copy = folder / "checkpoint"
    copy.mkdir()
    for path in (CHECKPOINTS / "tiny-qwen3.5").iterdir():
        if path.suffix == ".safetensors":
            os.link(path, copy / path.name)
        elif path.is_file():
            shutil.copyfile(path, copy / path.name)
    return copy


def converted(folder: Path, *more: str) -> Command:
    out = str(folder / "out.gguf")
    given = str(folder / "checkpoint")
    return ("convert", given, "--tokenizer-pre", "qwen35", "--out", out, *more)


IN_CHECKPOINT = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "added_tokens.json",
    "special_tokens_map.json",
    "model.safetensors.index.json",
)


def _older(copy: Path, name: str) -> None:
    """Let the older files of tokens be read, which a newer tokenizer_config.json replaces."""
    if name in ("added_tokens.json", "special_tokens_map.json"):
        change(copy / "tokenizer_config.json", "added_tokens_decoder", value=None)


def change(path: Path, *keys: Any, value: Any) -> None:
    """Set or remove (None) a value, however deep, in a JSON file."""
    settings = json.loads(path.read_text()) if path.exists() else {}
    target = settings
    for key in keys[:-1]:
        target = target[key]
    if value is None:
        del target[keys[-1]]
    elif isinstance(target, list):
        target.append(value)
    else:
        target[keys[-1]] = value
    path.write_text(json.dumps(settings))


def json_cases() -> Iterator[Case]:
    for name in IN_CHECKPOINT:
        few = None if name in ("config.json", "tokenizer.json") else 2  # all use one reader
        for kind, contents in JSON.items():
            for what in list(contents)[:few]:
                yield Case(kind, f"{name}: {what}", _json_case(name, contents[what]))
        for what in SPECIAL:
            yield Case("files", f"{name}: {what}", _special_case(name, what))


def _json_case(name: str, content: Callable[[dict[str, Any]], bytes]) -> Prepare:
    def prepare(folder: Path) -> Command:
        copy = checkpoint(folder)
        _older(copy, name)
        path = copy / name
        path.write_bytes(content(json.loads(path.read_text()) if path.exists() else {}))
        return converted(folder)

    return prepare


def _special_case(name: str, what: str) -> Prepare:
    def prepare(folder: Path) -> Command:
        copy = checkpoint(folder)
        _older(copy, name)
        special(copy / name, what)
        return converted(folder)

    return prepare


# ── YAML ──


def _expanding(first: str, use: str) -> str:
    lines = [f"a: &a {first}"]
    lines += [f"{n}: &{n} {use % ', '.join([f'*{o}'] * 9)}" for o, n in pairwise("abcdefghi")]
    return "\n".join(lines) + "\n"


YAML = {
    "aliases": {
        "alias bomb": _expanding("[x, x]", "[%s]"),
        "merge bomb": _expanding("{k: 1}", "{<<: [%s]}"),
        "one alias": "a: &a 1\nb: *a\n",
        "an alias of itself": "a: &a [*a]\n",
    },
    "nesting": {
        "900 in flow": "a: " + "[" * 900 + "]" * 900,
        "100,000 in flow": "a: " + "[" * 100_000,
        "900 blocks": "".join(f"{' ' * i}a:\n" for i in range(900)),
        "10,000 dashes": "a:\n  " + "- " * 10_000 + "b\n",
        "10,000 question marks": "? " * 10_000 + "b\n",
        "10,000 braces": "a: " + "{a: " * 10_000,
    },
    "numbers": {
        "5,000 digits": "a: " + "9" * 5000,
        "minutes without end": "a: " + ":".join(["59"] * 50_000),
        "a fraction of 10,000 digits": "a: 0." + "9" * 10_000,
    },
    "entries": {
        "200,000 in a list": "a: [" + "b, " * 200_000 + "b]",
        "200,000 keys": "".join(f"k{i}: v\n" for i in range(110_000)),
        "2 MB": "a: " + "b" * (2 << 20),
    },
    "duplicate keys": {"twice": "a: b\na: b\n", "within": "a: {b: c, b: c}\n"},
    "syntax": {
        "a tag": "a: !!python/object/apply:os.system [true]\n",
        "a tag of a number": "a: !!int '" + "9" * 5000 + "'\n",
        "control characters": "a: \x1b[31m\n",
        "no mapping value": "a: b: c: [\n",
        "a list as key": "? [a]\n: b\n",
        "a date that is none": "a: 2024-99-99\n",
    },
}


def yaml_cases() -> Iterator[Case]:
    for kind, contents in YAML.items():
        for what, content in contents.items():
            yield Case(kind, f"README.md: {what}", _front_matter(content))
            yield Case(kind, f"recipe: {what}", _recipe(content))
    for what in SPECIAL:
        yield Case("files", f"README.md: {what}", _special_case("README.md", what))
    for what in OWN:
        yield Case("files", f"recipe: {what}", _special_recipe(what))
    for what, content in RECIPES.items():
        yield Case("patterns", f"recipe: {what}", _recipe(content))


def _front_matter(content: str) -> Prepare:
    def prepare(folder: Path) -> Command:
        (checkpoint(folder) / "README.md").write_text(f"---\n{content}\n---\n# A model\n")
        return converted(folder)

    return prepare


RECIPES = {
    "nested repeats": "'((.+)+)+z{9}': Q4_K\n",
    "overlapping choices": "'(.|[a-z]|[.0-9])*z{9}': Q4_K\n",
    "many stars": f"'{'.*' * 30}x{{9}}': Q4_K\n",
    "a reference": r"'(.*)(.*)(.*)(.*)(.*)(.*)\1\2\3\4\5\6x{9}': Q4_K" + "\n",
    "a long one": f"'{'a' * 5000}': Q4_K\n",
    "a huge count": "'a{99999999999999}': Q4_K\n",
    "a broken one": "'(a': Q4_K\n",
    "a null byte": '"a\\0": Q4_K\n',
    "an escape": '"a\\e[31m": Q4_K\n',
    "an unknown type": '"attn_": "\\e[31mQ4"\n',
    "a list as type": "attn_: [Q4_K]\n",
    "true as type": "attn_: true\n",
    "a number as pattern": "1: Q4_K\n",
    "nothing": "",
    "a word": "Q4_K",
}


def _recipe(content: str) -> Prepare:
    def prepare(folder: Path) -> Command:
        (folder / "recipe.yaml").write_text(content)
        return _quantized(folder)

    return prepare


def _special_recipe(what: str) -> Prepare:
    def prepare(folder: Path) -> Command:
        special(folder / "recipe.yaml", what)
        return _quantized(folder)

    return prepare


def _quantized(folder: Path) -> Command:
    source = str(trunk(folder))
    recipe = str(folder / "recipe.yaml")
    return ("quantize", source, "--type", "Q4_K_M", "--tensors", recipe, "--out", _out(folder))


def _out(folder: Path) -> str:
    return str(folder / "out")


_TRUNK: list[Path] = []


def trunk(folder: Path) -> Path:
    """A BF16 GGUF, converted once."""
    if not _TRUNK:
        made = Path(tempfile.mkdtemp(prefix="hostile-")) / "trunk.gguf"
        given = CHECKPOINTS / "tiny-qwen3.5"
        done = attempt(("convert", str(given), "--tokenizer-pre", "qwen35", "--out", str(made)))
        assert done.status == 0, done.errors
        _TRUNK.append(made)
    return _TRUNK[0]


# ── chat templates ──

TEMPLATE = "chat_template.jinja"
MORE = "additional_chat_templates"


def template_cases() -> Iterator[Case]:
    for what in SPECIAL:
        yield Case("templates", f"{TEMPLATE}: {what}", _special_case(TEMPLATE, what))
        if what != "a folder":
            yield Case("templates", f"{MORE}: {what}", _more_templates(what))
    for what, content in {
        "5 MB": b"a" * (5 << 20),
        "not UTF-8": b"\xff\xfe",
        "UTF-16": "a".encode("utf-16"),
    }.items():
        yield Case("templates", f"{TEMPLATE}: {what}", _template(content))
    yield Case("templates", f"{MORE}: a folder that is a link outside", _linked_folder)
    for what, value in {
        "5 MB": "a" * (5 << 20),
        "a number": 7,
        "true": True,
        "a list of numbers": [1],
        "a name that is a number": [{"name": 1, "template": "a"}],
        "half a character": "\ud800",
        "2,000 templates": [{"name": f"n{i}", "template": "a"} for i in range(2000)],
        "a name of 100,000 characters": [{"name": "n" * 100_000, "template": "a"}],
        "the same name twice": [{"name": "a", "template": "b"}] * 2,
    }.items():
        yield Case(
            "templates",
            f"chat_template: {what}",
            _set("tokenizer_config.json", "chat_template", value=value),
        )


def _template(content: bytes) -> Prepare:
    def prepare(folder: Path) -> Command:
        (checkpoint(folder) / TEMPLATE).write_bytes(content)
        return converted(folder)

    return prepare


def _more_templates(what: str) -> Prepare:
    def prepare(folder: Path) -> Command:
        copy = checkpoint(folder)
        (copy / TEMPLATE).write_text("a")
        (folder / "checkpoint" / "secret").unlink(missing_ok=True)
        special(copy / MORE / "more.jinja", what)
        if what == "a link outside":
            (copy / MORE / "more.jinja").unlink()
            (folder / "secret").write_text("of another file")
            (copy / MORE / "more.jinja").symlink_to("../../secret")
        return converted(folder)

    return prepare


def _linked_folder(folder: Path) -> Command:
    copy = checkpoint(folder)
    (copy / TEMPLATE).write_text("a")
    (folder / "elsewhere").mkdir()
    (folder / "elsewhere" / "secret.jinja").write_text("of another file")
    (copy / MORE).symlink_to("../elsewhere")
    return converted(folder)


# ── values ──


def _set(name: str, *keys: Any, value: Any) -> Prepare:
    def prepare(folder: Path) -> Command:
        change(checkpoint(folder) / name, *keys, value=value)
        return converted(folder)

    return prepare


MANY = list(range(100_000))
TEXT = "text_config"
VALUES: list[tuple[str, str, tuple[Any, ...], Any]] = [
    ("ids", "config.json", (TEXT, "eos_token_id"), 1 << 31),
    ("ids", "config.json", (TEXT, "eos_token_id"), 5000),
    ("ids", "config.json", ("bos_token_id",), -1),
    ("ids", "config.json", ("pad_token_id",), 10**20),
    ("ids", "tokenizer.json", ("model", "vocab", "beyond"), 5000),
    ("ids", "tokenizer.json", ("model", "vocab", "beyond"), -1),
    ("ids", "tokenizer.json", ("model", "vocab", "beyond"), 1.5),
    ("ids", "tokenizer.json", ("model", "vocab", "beyond"), True),
    ("ids", "tokenizer.json", ("model", "vocab", "beyond"), "1"),
    ("ids", "tokenizer_config.json", ("added_tokens_decoder", "x"), {"content": "a"}),
    ("ids", "tokenizer_config.json", ("added_tokens_decoder", "9" * 5000), {"content": "a"}),
    ("ids", "tokenizer_config.json", ("added_tokens_decoder", "5000"), 7),
    ("ids", "tokenizer_config.json", ("added_tokens_decoder",), [1]),
    ("true for a number", "config.json", (TEXT, "hidden_size"), True),
    ("true for a number", "config.json", (TEXT, "num_hidden_layers"), True),
    ("true for a number", "config.json", (TEXT, "rms_norm_eps"), True),
    ("true for a number", "config.json", (TEXT, "rope_parameters", "rope_theta"), True),
    ("true for a number", "config.json", (TEXT, "eos_token_id"), True),
    ("true for a number", "config.json", (TEXT, "vocab_size"), True),
    ("true for a number", "generation_config.json", ("top_k",), True),
    ("true for a number", "generation_config.json", ("temperature",), True),
    ("true for a number", "config.json", (TEXT, "rope_parameters", "mrope_section"), [True] * 3),
    ("not finite", "config.json", (TEXT, "rms_norm_eps"), float("nan")),
    ("not finite", "config.json", (TEXT, "rms_norm_eps"), float("inf")),
    ("not finite", "config.json", (TEXT, "rope_parameters", "rope_theta"), float("nan")),
    ("not finite", "config.json", (TEXT, "rope_parameters", "partial_rotary_factor"), float("nan")),
    ("not finite", "config.json", (TEXT, "rope_parameters", "partial_rotary_factor"), -1.0),
    ("not finite", "generation_config.json", ("temperature",), float("nan")),
    ("not finite", "generation_config.json", ("top_p",), float("-inf")),
    ("numbers", "config.json", (TEXT, "rms_norm_eps"), 10**400),
    ("numbers", "config.json", (TEXT, "max_position_embeddings"), 10**400),
    ("numbers", "config.json", (TEXT, "hidden_size"), 10**400),
    ("numbers", "config.json", (TEXT, "eos_token_id"), 10**400),
    ("numbers", "generation_config.json", ("temperature",), 10**400),
    ("numbers", "generation_config.json", ("top_k",), 10**400),
    ("numbers", "config.json", (TEXT, "num_hidden_layers"), 1 << 30),
    ("numbers", "config.json", (TEXT, "vocab_size"), 1 << 30),
    ("numbers", "config.json", (TEXT, "head_dim"), 1 << 30),
    ("shapes", "config.json", (TEXT, "rope_parameters", "mrope_section"), MANY),
    ("shapes", "config.json", (TEXT, "rope_parameters", "mrope_section"), [[1]]),
    ("shapes", "config.json", (TEXT, "layer_types"), ["linear_attention"] * 100_000),
    ("shapes", "config.json", (TEXT, "layer_types"), "linear_attention"),
    ("shapes", "config.json", (TEXT, "layer_types"), {"0": "full_attention"}),
    ("shapes", "config.json", ("architectures",), []),
    ("shapes", "config.json", ("architectures",), [["a"]]),
    ("shapes", "config.json", ("architectures",), [None]),
    ("shapes", "config.json", (TEXT,), [1]),
    ("shapes", "config.json", (TEXT, "rope_parameters"), 7),
    ("shapes", "generation_config.json", ("top_k",), MANY),
    ("shapes", "generation_config.json", ("temperature",), {"a": 1}),
    ("shapes", "generation_config.json", ("top_k",), "\x1b[31m"),
    ("shapes", "tokenizer.json", ("model",), 7),
    ("shapes", "tokenizer.json", ("model", "vocab"), [1]),
    ("shapes", "tokenizer.json", ("model", "merges"), 7),
    ("shapes", "tokenizer.json", ("model", "merges"), [[["a"]]]),
    ("shapes", "tokenizer.json", ("model", "merges"), {"a": 1}),
    ("shapes", "tokenizer.json", ("model", "type"), "\x1b[31mWordPiece"),
    ("shapes", "tokenizer.json", ("added_tokens",), 7),
    ("shapes", "tokenizer.json", ("post_processor",), 7),
    ("shapes", "tokenizer.json", ("post_processor",), {"type": "\x1b]0;x\x07"}),
    ("shapes", "tokenizer.json", ("normalizer",), {"type": "Lowercase"}),
    ("shapes", "tokenizer_config.json", ("additional_special_tokens",), 7),
    ("shapes", "tokenizer_config.json", ("additional_special_tokens",), [[1]]),
    ("shapes", "tokenizer_config.json", ("eos_token",), [1]),
    ("shapes", "tokenizer_config.json", ("eos_token",), {"content": 7}),
    ("escapes in names", "config.json", ("architectures",), ["\x1b[31mQwen\x07\u202e"]),
    ("escapes in names", "model.safetensors.index.json", ("weight_map", "\x1b[2J"), "\x1b]0;x\x07"),
    (
        "escapes in names",
        "model.safetensors.index.json",
        ("weight_map", "a\x1b[2J"),
        "model-00001-of-00004.safetensors",
    ),
    ("escapes in names", "model.safetensors.index.json", ("weight_map", "a"), "../x.safetensors"),
    ("escapes in names", "model.safetensors.index.json", ("weight_map", "a"), 7),
    ("escapes in names", "model.safetensors.index.json", ("weight_map",), "x"),
]


QUANTIZATION = "quantization_config"
OF_ONE_TYPE: dict[tuple[str, ...], list[Any]] = {
    ("config.json", QUANTIZATION): [[], ["fp8"], "fp8", "", 8, 0, False, True],
    ("config.json", TEXT, QUANTIZATION): [[], "", 0, False],
    ("config.json", "compression_config"): [[{"format": "pack-quantized"}], "x"],
    ("config.json", "quantization"): [4, [4]],
    ("config.json", QUANTIZATION, "config_groups"): [[], 7],
    ("config.json", QUANTIZATION, "config_groups", "group_0"): [["Linear"], ""],
    ("config.json", QUANTIZATION, "config_groups", "group_0", "weights"): [[], 8],
    ("config.json", QUANTIZATION, "quantized_layers"): [["a"], "a"],
    ("config.json", QUANTIZATION, "quantized_layers", "a"): ["NVFP4", 4],
    ("config.json", QUANTIZATION, "quant_method"): [["fp8"], 0, {}],
    ("config.json", QUANTIZATION, "format"): [7, ["pack-quantized"]],
    ("hf_quant_config.json", "quantization"): [[], "NVFP4", 0],
    ("config.json", "architectures"): ["", {}, 0, False],
    ("config.json", TEXT, "layers_block_type"): ["attention", {}],
    ("config.json", TEXT, "num_experts"): [False, "", [], {}],
    ("config.json", TEXT, "intermediate_size"): [False, "", []],
    ("config.json", TEXT, "rope_parameters", "full_attention"): [[], 7, ""],
    ("tokenizer_config.json", "add_bos_token"): ["true", 1, 0, []],
    ("tokenizer_config.json", "add_eos_token"): ["false", {}],
    ("tokenizer_config.json", "tokenizer_class"): [["Qwen2Tokenizer"], 0],
    ("tokenizer_config.json", "additional_special_tokens"): ["", "<a>", {}, 0, False],
    ("tokenizer_config.json", "extra_special_tokens"): ["", "<a>", 0, False],
    ("special_tokens_map.json", "additional_special_tokens"): ["<a>", {}, 0],
}
"""Keys that must not be taken for missing if they have another type."""


def _of_another_type(place: tuple[str, ...], value: Any) -> Prepare:
    name, *keys = place

    def prepare(folder: Path) -> Command:
        copy = checkpoint(folder)
        content = json.loads((copy / name).read_text()) if (copy / name).exists() else {}
        if name == "special_tokens_map.json":  # which is read in place of these
            change(copy / "tokenizer_config.json", "added_tokens_decoder", value=None)
        inner = content
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
        inner[keys[-1]] = value
        (copy / name).write_text(json.dumps(content))
        return converted(folder)

    return prepare


def type_cases() -> Iterator[Case]:
    for place, values in OF_ONE_TYPE.items():
        for value in values:
            name = f"{'/'.join(place)}: {value!r}"
            yield Case("another type", name, _of_another_type(place, value))


def value_cases() -> Iterator[Case]:
    for kind, name, keys, value in VALUES:
        shown = repr(value)[:40]
        place = "/".join(str(key)[:30] for key in keys)
        yield Case(kind, f"{name}: {place}: {shown}", _set(name, *keys, value=value))


def _pre_tokenizer(pattern: str) -> Prepare:
    split = {
        "type": "Split",
        "pattern": {"Regex": pattern},
        "behavior": "Isolated",
        "invert": False,
    }
    return _set("tokenizer.json", "pre_tokenizer", value=split)


def _normalizer(*steps: dict[str, Any]) -> Prepare:
    value = {"type": "Sequence", "normalizers": list(steps)}
    return _set("tokenizer.json", "normalizer", value=value)


def _replace(pattern: dict[str, str], content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def tokenizer_cases() -> Iterator[Case]:
    for what, pattern in {
        "nested repeats": r"((.+)+)+[0-9]{9}",
        "a broken one": "(a",
    }.items():
        yield Case("patterns", f"pre_tokenizer: {what}", _pre_tokenizer(pattern))
    grow = _replace({"String": "a"}, "a" * 50)
    yield Case("explosions", "normalizer: 50^8", _normalizer(*[grow] * 8))
    empty = _replace({"Regex": ""}, "a" * 1000)
    yield Case("explosions", "normalizer: empty pattern", _normalizer(*[empty] * 4))
    prepend = {"type": "Prepend", "prepend": "a" * (8 << 20)}
    yield Case("explosions", "normalizer: prepend", _normalizer(*[prepend] * 60))


# ── records and lists of this pipeline ──


Content = bytes | str | Callable[[], bytes]


def _record(name: str, right: dict[str, Any], *command: str) -> Callable[[Content], Prepare]:
    """A case with other content of the file `name`, or something else in its place."""

    def case(content: Content) -> Prepare:
        def prepare(folder: Path) -> Command:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str):
                special(path, content)
            else:
                path.write_bytes(content if isinstance(content, bytes) else content())
            return tuple(word.replace("FOLDER", str(folder)) for word in command)

        return prepare

    return case


_CHECKPOINT = {"path": str(CHECKPOINTS / "tiny-qwen3.5")}
_LISTING = {"repo": "a/b", "revision": "0" * 40, "files": {}, "tensors": {}}
_ABOUT = json.dumps({"name": "F", "source": {"path": "F"}, "variants": {}})
RECORDS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "report": (
        "reports/x.json",
        report("x.gguf").as_json(),
        ("summary", "FOLDER/reports/x.json", "--out", "FOLDER/out"),
    ),
    "measurement": (
        "m.json",
        {"file": "x"},
        ("plot", "speed", "FOLDER/m.json", "--out", "FOLDER/out"),
    ),
    "stamp": (
        "stamp.json",
        STAMP.as_json(),
        (
            "card",
            "--files",
            "x.gguf",
            "--reports",
            "x.json",
            "--about",
            _ABOUT,
            "--toolchain",
            "FOLDER/stamp.json",
            "--out",
            "FOLDER/out",
        ),
    ),
    "listing": (
        "files.json",
        _LISTING,
        (
            "fetch",
            "FOLDER/files.json",
            "config.json",
            "--folder",
            "FOLDER/to",
            "--out",
            "FOLDER/out",
        ),
    ),
    "fetch record": (
        "r.json",
        {"name": "a", "bytes": 1, "sha256": "0" * 64},
        (
            "materials",
            json.dumps({"repo": "a/b", "revision": "0" * 40}),
            "FOLDER/r.json",
            "--out",
            "FOLDER/out",
        ),
    ),
    "plan": (
        "plan.json",
        {},
        ("quantize", "FOLDER/x.gguf", "--plan", "FOLDER/plan.json", "--out", "FOLDER/out"),
    ),
}
SHAPES: dict[str, dict[str, Any]] = {
    "report": {
        "more": 1,
        "bytes": True,
        "types": [1],
        "file": 7,
        "bits_per_weight": "4",
        "checks": [[1]],
        "errors": {"a": "b"},
    },
    "stamp": {"more": 1, "commit": 7, "programs": [1], "programs ": {"a": 1}},
    "listing": {
        "files": {"a": {"bytes": True, "digest": "0" * 40}},
        "files ": {"a": 1},
        "files  ": [1],
        "tensors": [1],
        "tensors ": {"a": {"dtype": 1, "shape": [1], "shard": "a", "offset": 0, "size": 1}},
        "tensors  ": {
            "a": {"dtype": "BF16", "shape": [*MANY, -1], "shard": "a", "offset": 0, "size": 1}
        },
        "tensors   ": {
            "a": {"dtype": "BF16", "shape": [1], "shard": "../a", "offset": 0, "size": 1}
        },
        "lost": 7,
        "lost ": [],
        "lost  ": "",
    },
    "fetch record": {
        "more": 1,
        "bytes": True,
        "bytes ": "1",
        "sha256": 7,
        "parts": [1],
        "tensors": 7,
        "tensors ": {"a": 1},
    },
    "plan": {
        "tensors": 7,
        "tensors ": {"a": ["Q4_K", "BF16 " + "9" * 5000, "", ""]},
        "tensors  ": {"a": ["Q4_K", "BF16" + " 9" * 100_000, "", ""]},
        "tensors   ": {"a": ["\x1b[31m", "BF16 1", "", ""]},
    },
}


def record_cases() -> Iterator[Case]:
    for what, (name, right, command) in RECORDS.items():
        case = _record(name, right, *command)
        for kind, contents in JSON.items():
            for content_name in list(contents)[:2]:
                content = partial(contents[content_name], right)
                yield Case(kind, f"{what}: {content_name}", case(content))
        for kind in OWN:
            yield Case("files", f"{what}: {kind}", case(kind))
        for key, value in SHAPES.get(what, {}).items():
            changed = partial(_changed, right, key.strip(), value)
            yield Case("shapes", f"{what}: {key}: {str(value)[:30]!r}", case(changed))
    sums = _record("SHA256SUMS", {}, "check_results", "FOLDER")
    for kind in OWN:
        yield Case("files", f"SHA256SUMS: {kind}", sums(kind))
    digest = b"0" * 64
    for name, content in {
        "not UTF-8": digest + b"  \xff\n",
        "no digest": b"x  a\n",
        "a name twice": (digest + b"  a\n") * 2,
        "a name outside": digest + b"  ../a\n",
        "an escape": digest + b"  \x1b[31m\n",
        "200,000 lines": (digest + b"  a\n") * 200_000,
        "a line of 900,000 characters": digest + b"  " + b"a" * 900_000,
        "a null byte": digest + b"  a\0b\n",
    }.items():
        yield Case("syntax", f"SHA256SUMS: {name}", sums(content))
    prompts = _record(
        "prompts/x.txt",
        {},
        "measure",
        "FOLDER/x.gguf",
        "--prompts",
        "FOLDER/prompts",
        "--out",
        "FOLDER/out",
    )
    for kind in OWN:
        yield Case("files", f"prompt: {kind}", prompts(kind))
    yield Case("syntax", "prompt: not UTF-8", prompts(b"\xff"))
    yield Case("entries", "prompt: 5 MB", prompts(b"a" * (5 << 20)))
    text = _record(
        "t.txt", {}, "measure", "FOLDER/x.gguf", "--text", "FOLDER/t.txt", "--out", "FOLDER/out"
    )
    for kind in ("a pipe", "a folder", "a device"):
        yield Case("files", f"text: {kind}", text(kind))


def _changed(right: dict[str, Any], key: str, value: Any) -> bytes:
    return json.dumps({**right, key: value}).encode()


def cases() -> list[Case]:
    found = [
        *json_cases(),
        *yaml_cases(),
        *template_cases(),
        *value_cases(),
        *type_cases(),
        *tokenizer_cases(),
        *record_cases(),
    ]
    names = [case.name for case in found]
    assert len(set(names)) == len(names), [n for n in names if names.count(n) > 1]
    return found


CASES = cases()


def resident() -> float:
    """Megabytes that this process has in memory, which its forks begin with."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / (1 << 20)
