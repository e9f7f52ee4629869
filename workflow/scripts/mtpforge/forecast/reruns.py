"""Which files Snakemake would make anew, and why: its own answer, without a run."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from mtpforge.errors import ConfigError
from mtpforge.llama_cpp import process

_SNAKEFILE = Path(__file__).parents[4] / "Snakefile"
_PENDING = "update pending"
_REASONS = {
    "ok": "after another",
    "missing": "missing",
    "removed temp file": "missing",
    "updated input files": "input changed",
    "set of input files changed": "other inputs",
    "params changed": "settings or code",
    "rule implementation changed": "rule changed",
}
"""Snakemake's state of a file that will be made, in short."""
_ELSEWHERE = "resources"

Reruns = dict[str, str | None]
"""Why each file of the graph will be made; None: it stays as it is."""


@contextmanager
def asking(configs: Sequence[Path], models: Sequence[str]) -> Iterator[Callable[[], Reruns]]:
    """Let Snakemake work out the graph of these models; yields a function that waits for it.

    The function raises ConfigError with Snakemake's reason, if it has no answer.
    """
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(_SNAKEFILE)]
    command += ["--configfile", *map(str, configs), "--config", f"build={json.dumps(list(models))}"]
    command += ["--cores", "1", "--quiet", "--summary", "--", "all"]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with process.running(command, **pipes, text=True) as child:
        yield partial(_answer, child)
        child.kill()


def _answer(child: "subprocess.Popen[str]") -> Reruns:
    printed, said = child.communicate()
    if child.returncode:
        raise ConfigError(f"Snakemake: {reason(said)}")
    return parsed(printed)


def parsed(summary: str) -> Reruns:
    """The table that `snakemake --summary` prints.

    If a repository must be listed anew, Snakemake's answer ends there, and it calls all else up to
    date. Then it says nothing of what is missing, if one of the models is not finished.
    """
    header, *lines = [line.split("\t") for line in summary.splitlines() if "\t" in line]
    rows = [dict(zip(header, line, strict=True)) for line in lines]
    found = {
        row["output_file"]: _REASONS.get(row["status"], row["status"])
        if row["plan"] == _PENDING
        else None
        for row in rows
    }
    if not any(row["rule"] == "resolve" and found[row["output_file"]] for row in rows):
        return found
    missing = [row for row in rows if _REASONS.get(row["status"]) == "missing"]
    unfinished = {_place(row["output_file"]) for row in missing if row["rule"] == "verify"}
    for row in missing:
        path = row["output_file"]
        if not found[path] and unfinished and _place(path) in {*unfinished, _ELSEWHERE}:
            del found[path]
    return found


def _place(path: str) -> str:
    """The folder of a model's results."""
    first, _, rest = path.partition("/")
    return f"{first}/{rest.partition('/')[0]}" if first == "results" else _ELSEWHERE


def reason(said: str) -> str:
    """The last message that Snakemake printed, in one line, without the places in a Snakefile."""
    lines = [line for line in said.splitlines() if line.strip() and not line.startswith("  File ")]
    starts = [number for number, line in enumerate(lines) if not line.startswith(" ")]
    said = " ".join(" ".join(lines[starts[-1] :] if starts else lines).split())
    return said.removeprefix("error: ") or "it says nothing"
