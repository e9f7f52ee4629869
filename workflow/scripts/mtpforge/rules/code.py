"""The source files of a program, as inputs of the rule that runs it.

Snakemake compares small inputs by checksum: touching or reverting a module reruns nothing; editing
one reruns exactly the rules that import it, even indirectly.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2]


def code(program: str) -> list[str]:
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
    return [str(path.relative_to(root)) for path in [script, *sorted(seen - {script})]]


@cache
def _imports(path: Path) -> list[Path]:
    """The local modules that a file imports, with the `__init__.py` of their packages.

    Cached, because Snakemake asks again for each job whenever its graph changes.
    """
    return list(_imported(path))


def _imported(path: Path) -> Iterator[Path]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parent = path.relative_to(SCRIPTS).parts[: -node.level] if node.level else ()
            prefix = ".".join([*parent, *([node.module] if node.module else [])])
            names = [prefix, *(f"{prefix}.{alias.name}" for alias in node.names)]
        else:
            continue
        for name in names:
            yield from _files(name.split("."))


def _files(parts: list[str]) -> Iterator[Path]:
    for depth in range(1, len(parts) + 1):
        module = SCRIPTS.joinpath(*parts[:depth])
        for path in (module.with_suffix(".py"), module / "__init__.py"):
            if path.is_file():
                yield path
