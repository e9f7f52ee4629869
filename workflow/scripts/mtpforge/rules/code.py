"""The source files of a program, as an input and a parameter of the rule that runs it.

The parameter is a digest of all modules: touching or reverting one reruns nothing; editing one
reruns exactly the rules that import it, even indirectly. As inputs, the modules would be most of
the graph.
"""

import ast
import hashlib
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2]
BLOCKS = (ast.stmt, ast.excepthandler, ast.match_case)
"""The parts of a module that can hold an import."""


def code(program: str) -> list[str]:
    """A program as an input: the path of its file."""
    return [files(program)[0]]


@cache
def digest(program: str) -> str:
    """The sha256 of a program and of all local modules that it imports, with their paths."""
    found = hashlib.sha256()
    for path in files(program):
        content = (SCRIPTS.parents[1] / path).read_bytes()
        found.update(f"{hashlib.sha256(content).hexdigest()}  {path}\n".encode())
    return found.hexdigest()


def pins(path: str) -> str:
    """The sha256 of locked requirements without their comments, as pip reads them."""
    text = (SCRIPTS.parents[1] / path).read_text(encoding="utf-8")
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in text.splitlines())
    return hashlib.sha256("\n".join(filter(None, lines)).encode()).hexdigest()


@cache
def files(program: str) -> tuple[str, ...]:
    """A program (a file name in `workflow/scripts`) and, sorted, all local modules that it imports.

    The paths are relative to the repository, where Snakemake runs.
    """
    script = SCRIPTS / program
    seen: set[Path] = set()
    pending = [script]
    while pending:
        path = pending.pop()
        if path not in seen:
            seen.add(path)
            pending += _imports(path)
    root = SCRIPTS.parents[1]
    return tuple(str(path.relative_to(root)) for path in [script, *sorted(seen - {script})])


@cache
def _imports(path: Path) -> list[Path]:
    """The local modules that a file imports, with the `__init__.py` of their packages.

    Cached, because Snakemake asks again for each job whenever its graph changes.
    """
    return list(_imported(path))


def _imported(path: Path) -> Iterator[Path]:
    for node in _statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parent = path.relative_to(SCRIPTS).parts[: -node.level] if node.level else ()
            prefix = ".".join([*parent, *([node.module] if node.module else [])])
            names = [prefix, *(f"{prefix}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            yield from _files(name)


def _statements(tree: ast.Module) -> Iterator[ast.AST]:
    """All statements of a module, at any depth. Expressions are most of it, and import nothing."""
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        yield node
        children = ast.iter_child_nodes(node)
        pending += (child for child in children if isinstance(child, BLOCKS))


@cache
def _files(name: str) -> tuple[Path, ...]:
    """The files that `import name` reads, its packages included; none if it is not local."""
    package, _, _ = name.rpartition(".")
    module = SCRIPTS.joinpath(*name.split("."))
    paths = (module.with_suffix(".py"), module / "__init__.py")
    above = _files(package) if package else ()
    return (*above, *(path for path in paths if path.is_file()))
