"""Write the JSON schema, and the generated parts of the pages: tables, options, messages.

Such a part stands between `<!-- generated: NAME -->` and `<!-- end -->`.

example: generate.py --check
"""

import argparse
import ast
import importlib
import json
import pkgutil
import re
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NoReturn
from unittest import mock

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
SCRIPTS = ROOT / "workflow" / "scripts"
sys.path.insert(0, str(SCRIPTS))

import mtpforge  # noqa: E402
from mtpforge import errors  # noqa: E402
from mtpforge.checkpoint.families.registry import FAMILIES  # noqa: E402
from mtpforge.gguf import quant_types  # noqa: E402
from mtpforge.llama_cpp import runtimes as known  # noqa: E402
from mtpforge.llama_cpp.converter_architectures import ARCHITECTURES, Architecture  # noqa: E402
from mtpforge.rules.schema import json_schema  # noqa: E402
from mtpforge.table import markdown  # noqa: E402

PART = re.compile(r"(<!-- generated: (\S+) -->\n).*?(<!-- end -->)", re.DOTALL)
Rows = list[tuple[str, ...]]


def main() -> None:
    """Write the pages; with --check, exit with 1 and the names of those that are not current."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="compare, and write nothing")
    checking = parser.parse_args().check
    stale = {path: text for path, text in pages().items() if path.read_text("utf-8") != text}
    if checking and stale:
        names = ", ".join(str(path.relative_to(ROOT)) for path in stale)
        sys.exit(f"error: not current: {names}: run `make docs`")
    for path, text in stale.items():
        path.write_text(text, encoding="utf-8")


def pages() -> dict[Path, str]:
    """The schema and each page with generated parts, and the text that it should have."""
    made = {name: make() for name, make in PARTS.items()}
    found = {path: path.read_text("utf-8") for path in sorted(DOCS.glob("*.md"))}
    written = {
        path: PART.sub(lambda part: f"{part[1]}\n{made[part[2]]}\n{part[3]}", text)
        for path, text in found.items()
        if PART.search(text)
    }
    return written | {DOCS / "config.schema.json": json_schema()}


# ── models.md ──


def families() -> str:
    """The architectures that mtpforge converts itself."""
    rows: Rows = [("architecture in config.json", "in the GGUF")]
    rows += [
        (", ".join(each.huggingface_architectures), each.gguf_architecture) for each in FAMILIES
    ]
    return markdown(rows, left=2)


def upstream() -> str:
    """The architectures that llama.cpp's converter converts."""
    rows: Rows = [
        ("architecture in config.json", "models", "in the GGUF", "drafts", "not possible")
    ]
    for name, entry in ARCHITECTURES.items():
        rows.append((name, entry.models, entry.gguf, _drafts(entry), _not_possible(entry)))
    return markdown(rows, left=5)


def _not_possible(entry: Architecture) -> str:
    if entry.only:
        return {"trunk": "all but `head: none`", "draft": "all but `sidecar`"}[entry.only]
    if not entry.whole:
        return "all but `sidecar: MXFP4` and variants of type `MXFP4` with `head: none`"
    if not entry.splits:
        return "`sidecar`, `head: none`"
    return "" if entry.drafts else "`sidecar`"


def _drafts(entry: Architecture) -> str:
    if entry.only == "trunk":
        return "with its drafter"
    if not entry.drafts:
        return "no"
    return f"if the head has `{entry.needs}`" if entry.needs else "yes"


def runtimes() -> str:
    """First versions of the runtimes that draft with each architecture."""
    rows: Rows = [("in the GGUF", "from llama.cpp", "pull requests", "ik_llama.cpp")]
    for name, entry in known.RUNTIMES.items():
        rows.append((name, _since(entry), _numbers(entry.pull_requests) or "-", _ik(entry)))
    notes = [
        "`*` counted from the commit history: the release that has it may be the next one.",
        f"The pinned llama.cpp is {known.PINNED}. Builds {known.BROKEN} fail when drafting.",
        "ik_llama.cpp drafts with `--spec-type mtp` and the same tensors and keys. Its README"
        " advises against F16 tensors.",
        f"LM Studio drafts with an embedded head from {known.LM_STUDIO} on.",
        f"Ollama drafts with an embedded head from {known.OLLAMA_DRAFTS} on, if the Modelfile has"
        f" `PARAMETER draft_num_predict N`. {known.OLLAMA} cannot load"
        f" {' and '.join(known.OLLAMA_WITHOUT)} files that have a head"
        f" (ollama issue {known.OLLAMA_ISSUE}).",
    ]
    return markdown(rows, left=4) + "".join(f"\n- {note}" for note in notes) + "\n"


def _since(entry: known.Runtime) -> str:
    note = f"; {entry.note}" if entry.note else ""
    return f"{entry.llama_cpp}{'*' * entry.counted}{note}" if entry.llama_cpp else "none"


def _ik(entry: known.Runtime) -> str:
    if entry.ik_llama_cpp is None:
        return "unknown"
    return f"yes ({_numbers(entry.ik_llama_cpp)})" if entry.ik_llama_cpp else "no"


def _numbers(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


# ── configuration.md ──

Schema = Mapping[str, Any]
_KINDS = {"string": "text", "boolean": "true or false"}
_NAMED = {
    tuple(quant_types.PUBLISHED): "[file type](#types)",
    tuple(quant_types.TENSOR_TYPES): "[tensor type](#types)",
}


def configuration() -> str:
    """All keys of config.yaml, in a table for each mapping, and the types."""
    schema = json.loads(json_schema())
    types = [("of a file", *quant_types.PUBLISHED), ("of a tensor", *quant_types.TENSOR_TYPES)]
    lists = [f"- {of}: {', '.join(names)}\n" for of, *names in types]
    return "\n".join([*_tables("", schema, schema), "## Types\n", "".join(lists)])


def _tables(path: str, value: Schema, schema: Schema) -> Iterator[str]:
    """The table of a mapping, or one for each of its forms, then the tables of nested mappings."""
    forms = [form for form in _forms(value, schema) if "properties" in form]
    keys = {key: (form, entry) for form in forms for key, entry in form["properties"].items()}
    if keys:
        rows: Rows = [("key", "value", "default", "meaning")]
        for key, (form, entry) in keys.items():
            needed = "required" if key in form.get("required", ()) else _default(entry)
            rows.append(
                (f"`{key}`", _form(entry, schema, key), needed, _cell(entry["description"]))
            )
        forms_of = f"One of {_form(value, schema)}.\n\n" if len(forms) > 1 else ""
        yield f"## {f'`{path}`' if path else 'Top level'}\n\n{forms_of}{markdown(rows, left=4)}"
    for key, (_, entry) in keys.items():
        inner = f"{path}.{key}" if path else key
        yield from _tables(inner, entry, schema)
        for entries in _entries(entry, schema):
            yield from _tables(f"{inner}.NAME", entries, schema)


def _forms(value: Schema, schema: Schema) -> list[Schema]:
    """The kinds that a value can have: its own, or its alternatives."""
    if "$ref" in value:
        value = schema["$defs"][value["$ref"].rpartition("/")[2]]
    alternatives = value.get("oneOf") or value.get("anyOf")
    if not alternatives:
        return [value]
    return [form for each in alternatives for form in _forms(each, schema)]


def _entries(value: Schema, schema: Schema) -> Iterator[Schema]:
    """The kind of the values of a mapping with free keys."""
    for form in _forms(value, schema):
        yield from form.get("patternProperties", {}).values()
        if isinstance(form.get("additionalProperties"), dict):
            yield form["additionalProperties"]


def _form(value: Schema, schema: Schema, key: str = "") -> str:
    return " or ".join(dict.fromkeys(_shape(form, schema, key) for form in _forms(value, schema)))


def _shape(form: Schema, schema: Schema, key: str) -> str:
    """One form of the value of a key, in a few words."""
    if "properties" in form:
        needed = form.get("required", ())
        return f"`{{{', '.join(needed)}}}`" if needed else "mapping"
    if inner := list(_entries(form, schema)):
        types = f"{{PATTERN: {_form(inner[0], schema)}}}"
        return types if "enum" in inner[0] else f"mapping of names to {key}"
    if "items" in form:
        return f"list of {_form(form['items'], schema)}".replace("integer", "integers")
    if "const" in form:
        return f"`{form['const']}`"
    if "enum" in form:
        return _enum(form["enum"])
    return form.get("format") or _KINDS.get(form["type"], form["type"]) + _limits(form)


def _limits(form: Schema) -> str:
    least = f" from {form['minimum']}" if "minimum" in form else ""
    above = f" above {form['exclusiveMinimum']}" if "exclusiveMinimum" in form else ""
    most = f" up to {form['maximum']}" if "maximum" in form else ""
    return least + above + most


def _enum(values: Sequence[Any]) -> str:
    for names, text in _NAMED.items():
        if set(names) <= set(values):
            return " or ".join([text, *(f"`{each}`" for each in values if each not in names)])
    return "true or false" if True in values else ", ".join(f"`{each}`" for each in values)


def _default(value: Schema) -> str:
    default = value.get("default")
    if default in (None, "", []) or isinstance(default, dict):
        return ""
    return f"`{json.dumps(default)}`".replace('"', "")


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*.txt", "`*.txt`")


# ── cli.md ──


class Parsed(Exception):
    """Carries the parser of a program out of it."""


def parser_of(program: Path) -> argparse.ArgumentParser:
    """The parser of a program that parses its command line with argparse."""

    def stop(parser: argparse.ArgumentParser, *_: Any) -> NoReturn:
        raise Parsed(parser)

    namespace = runpy.run_path(str(program), run_name="documented")
    with mock.patch.object(argparse.ArgumentParser, "parse_args", stop):
        try:
            namespace["main"]()
        except Parsed as parsed:
            parser: argparse.ArgumentParser = parsed.args[0]
            parser.prog = program.name
            return parser
    raise ValueError(f"{program}: parses no command line")


def programs() -> str:
    """Every program with its arguments."""
    paths = [path for path in sorted(SCRIPTS.glob("*.py")) if path.name != "run_upstream.py"]
    return "\n".join(_program(path) for path in paths)  # that one is for convert_upstream.py alone


def _program(path: Path) -> str:
    parser = parser_of(path)
    about, _, examples = (parser.description or "").partition("example:")
    examples, _, more = examples.partition("\n\n")
    rows: Rows = [("argument", "meaning")]
    rows += [(_argument(action), _cell(_help(action, parser))) for action in _actions(parser)]
    shown = "".join(f"python workflow/scripts/{line}\n" for line in _lines(examples, path.name))
    block = f"```sh\n{shown}```\n\n" if shown else ""
    return f"## {path.name}\n\n{_paragraphs(f'{about}{more}')}\n\n{block}{markdown(rows, left=2)}"


def _lines(examples: str, program: str) -> list[str]:
    """The command lines of a program, with continued lines joined."""
    lines: list[str] = []
    for line in map(str.strip, examples.strip().splitlines()):
        if line.startswith(program):
            lines.append(line)
        else:
            lines[-1] = f"{lines[-1].removesuffix(chr(92)).strip()} {line}"
    return lines


def _paragraphs(text: str) -> str:
    return "\n\n".join(" ".join(part.split()) for part in text.strip().split("\n\n"))


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    return [action for action in parser._actions if action.dest != "help"]


def _argument(action: argparse.Action) -> str:
    given = action.metavar
    name = given if isinstance(given, str) else " ".join(given or ()) or None
    if action.choices:
        name = "{" + ",".join(map(str, action.choices)) + "}"
    name = name or action.dest.replace("-", "_").upper()
    many = "..." if action.nargs in ("*", "+", "...") else ""
    if not action.option_strings:
        return f"`{name}{many}`"
    value = "" if action.nargs == 0 else f" {name}{many}"
    return f"`{action.option_strings[-1]}{value}`" + (" (required)" if action.required else "")


def _help(action: argparse.Action, parser: argparse.ArgumentParser) -> str:
    given = dict(vars(action).items())
    text = (action.help or "") % {**given, "prog": parser.prog}
    return text.replace(f"{ROOT}/", "")


# ── troubleshooting.md ──

_HELPERS = {"refuse": ("ConfigError", 0), "_matching": ("ConfigError", 1), "fail": ("GgufError", 0)}
"""Functions that raise an error: its class, and which argument is the message."""

Names = Mapping[str, ast.expr]
"""The expression that a name was last assigned in a function or module."""


def messages() -> str:
    """Every message of a typed error in the source, by class and module."""
    found: dict[str, dict[str, list[str]]] = {}
    for path in sorted(SCRIPTS.rglob("*.py")):
        for kind, text in messages_in(ast.parse(path.read_text(encoding="utf-8"))):
            modules = found.setdefault(kind, {})
            modules.setdefault(path.relative_to(SCRIPTS).as_posix(), []).append(text)
    return "\n".join(f"### {kind}\n\n{_listed(found[kind])}" for kind in sorted(found))


def _listed(modules: Mapping[str, Sequence[str]]) -> str:
    lines = []
    for module, texts in modules.items():
        lines += [f"`{module}`\n", *(f"- `` {text} ``" for text in dict.fromkeys(texts)), ""]
    return "\n".join(lines)


@cache
def classes() -> dict[str, type[errors.ForgeError]]:
    """All typed errors of the library, by name; a module's private one counts as its base."""
    for module in pkgutil.walk_packages(mtpforge.__path__, "mtpforge."):
        importlib.import_module(module.name)
    pending: list[type[errors.ForgeError]] = [errors.ForgeError]
    for each in pending:
        pending += each.__subclasses__()
    return {each.__name__: each for each in pending if not each.__name__.startswith("_")}


@cache
def _private() -> dict[str, str]:
    """The public base of each private error."""
    return {
        each.__name__: base
        for base, known in classes().items()
        for each in known.__subclasses__()
        if each.__name__.startswith("_")
    }


def messages_in(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """(class, message) of each typed error of a module. Raises ValueError if one is unreadable."""
    yield from _made(tree, _assigned(tree.body))


def _made(scope: ast.AST, names: Names) -> Iterator[tuple[str, str]]:
    for node in ast.iter_child_nodes(scope):
        if isinstance(node, ast.FunctionDef):
            if node.name not in _HELPERS:
                yield from _made(node, {**names, **_assigned(node.body)})
            continue
        if isinstance(node, ast.Call):
            yield from _of_call(node, names)
        yield from _made(node, names)


def _assigned(body: Sequence[ast.stmt]) -> dict[str, ast.expr]:
    found = {}
    for statement in body:
        for node in ast.walk(statement):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found[node.targets[0].id] = node.value
    return found


def _of_call(call: ast.Call, names: Names) -> Iterator[tuple[str, str]]:
    name = _private().get(_name(call.func), _name(call.func))
    helper, place = _HELPERS.get(name, ("", 0))
    made = [helper] if helper else [name] if name in classes() else []
    if not made and name in names:  # a class that was chosen before
        chosen = names[name]
        choices = [chosen.body, chosen.orelse] if isinstance(chosen, ast.IfExp) else []
        made = [_name(each) for each in choices if _name(each) in classes()]
    for kind in made:
        text = " ".join(_text(call.args[place], names).split())
        if re.fullmatch(r"<\w+>", text) and not helper:
            raise ValueError(f"line {call.lineno}: the message of {kind} is not readable: {text}")
        yield kind, text


def _text(message: ast.expr, names: Names) -> str:
    """A message, with the names of values in angle brackets."""
    if isinstance(message, ast.Constant):
        return str(message.value)
    if isinstance(message, ast.JoinedStr):
        return "".join(_text(part, names) for part in message.values)
    if isinstance(message, ast.BinOp):
        return _text(message.left, names) + _text(message.right, names)
    if isinstance(message, ast.Name) and isinstance(
        names.get(message.id), ast.JoinedStr | ast.Constant
    ):
        return _text(names[message.id], {})
    value = message.value if isinstance(message, ast.FormattedValue) else message
    return f"<{_name(value).strip('_') or 'value'}>"


def _name(node: ast.AST) -> str:
    """The last name in an expression: `path` for `self.path`, `names` for `", ".join(names)`."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return node.attr
    if isinstance(node, ast.Subscript):
        return str(node.slice.value) if _is_key(node.slice) else _name(node.value)
    if isinstance(node, ast.Call):
        return _name(node.args[0]) if node.args else _name(node.func)
    if isinstance(node, ast.BinOp):
        return _name(node.left)
    return ""


def _is_key(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


# ── workflow.md ──


def rule_graph() -> str:
    """The rules of the default configuration as Mermaid, without edges that follow from others."""
    command = [sys.executable, "-m", "snakemake", "--rulegraph", "mermaid-js"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    names = dict(re.findall(r"(id\d+)\[(\w+)\]", said))
    arrows = [(names[a], names[b]) for a, b in re.findall(r"(id\d+) --> (id\d+)", said)]
    edges = {(a, b) for a, b in arrows if a != b}
    kept = sorted(edge for edge in edges if not _follows(edge, edges))
    return "```mermaid\nflowchart TB\n" + "".join(f"  {a} --> {b}\n" for a, b in kept) + "```\n"


def _follows(edge: tuple[str, str], edges: set[tuple[str, str]]) -> bool:
    """Whether a longer way leads from the start of an edge to its end."""
    start, end = edge
    pending = [b for a, b in edges if a == start and b != end]
    for each in pending:
        pending += [b for a, b in edges if a == each and b not in pending]
    return end in pending


PARTS: Mapping[str, Callable[[], str]] = {
    "families": families,
    "upstream": upstream,
    "runtimes": runtimes,
    "configuration": configuration,
    "programs": programs,
    "messages": messages,
    "rule-graph": rule_graph,
}


if __name__ == "__main__":
    main()
