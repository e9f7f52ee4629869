"""Scores on tasks with known answers, which llama-perplexity runs: each has its form of file.

HellaSwag: six lines a task, the context, the number of the right ending, and four endings. Of more
than 400 tasks, llama-perplexity takes 400 at random, always the same. Winogrande: a CSV without a
header. Multiple choice: the binary form that llama-perplexity reads (ARC, MMLU, TruthfulQA).
"""

import re
import struct
from pathlib import Path

from mtpforge.errors import ConfigError, ToolchainError
from mtpforge.io.text import ANYWHERE, open_regular
from mtpforge.llama_cpp.programs import Argument, LlamaCpp
from mtpforge.measure.measurement import Score
from mtpforge.measure.perplexity import CONTEXT, NoFiguresError, attempts

KINDS: dict[str, tuple[tuple[str, ...], str]] = {
    "hellaswag": (("--hellaswag", "-f"), r"selecting ([0-9]{1,9}) (?:randomized )?tasks"),
    "winogrande": (("--winogrande", "-f"), r"loaded ([0-9]{1,9}) tasks"),
    "multiple_choice": (("--multiple-choice", "-bf"), r"there are ([0-9]{1,9}) tasks"),
}
"""Options of llama-perplexity, and how it says how many tasks it takes."""
_ROW = re.compile(r"^([0-9]{1,9})\t([0-9]{1,3}\.[0-9]{1,12})(?:%?\t.*)?$", re.M)
"""A task's number, and the share of right answers up to it in percent."""


def score(kind: str, model: Path, tasks: Path, llama: LlamaCpp) -> Score:
    """The share of right answers of a model.

    Raises ConfigError if there is no task in the file, NoFiguresError if llama-perplexity does not
    print the score of all of them, ToolchainError if it fails.
    """
    options, said = KINDS[kind]
    check(kind, tasks)
    arguments: list[Argument] = ["-m", model, "--ctx-size", CONTEXT, *options, tasks]
    for _ in attempts():
        printed = llama.perplexity(arguments)
        if found := parse(printed, said):
            return found
    if not re.search(said, printed):
        raise ConfigError(f"{tasks}: llama-perplexity finds no {kind} task in it")
    raise NoFiguresError(
        f"llama-perplexity does not print the score of all tasks in {tasks}: is one longer than "
        f"{CONTEXT} tokens, or is the machine too busy?"
    )


def check(kind: str, tasks: Path) -> None:
    """Raise ConfigError for an unknown kind, or a file that cannot be of this kind."""
    if kind not in KINDS:
        raise ConfigError(f"{kind!r} is not a kind of tasks: use one of {', '.join(KINDS)}")
    with open_regular(tasks, ConfigError, within=ANYWHERE) as file:
        start = file.read(4)
    if kind == "multiple_choice" and not _may_be_binary(start, tasks.stat().st_size):
        raise ConfigError(f"{tasks}: not a file of llama-perplexity's --multiple-choice")


def parse(printed: str, said: str) -> Score | None:
    """The score after the last task; None if that is not printed."""
    count = re.search(said, printed)
    rows = {int(number): float(share) for number, share in _ROW.findall(printed)}
    tasks = int(count[1]) if count else 0
    if not tasks or tasks not in rows:
        return None
    share = rows[tasks] / 100
    if share > 1:
        raise ToolchainError(f"llama-perplexity prints a score of {rows[tasks]}%")
    error = (share * (1 - share) / max(tasks - 1, 1)) ** 0.5
    return Score(tasks=tasks, share=round(share, 6), error=round(error, 6))


def _may_be_binary(start: bytes, size: int) -> bool:
    """Whether there is room for the positions of as many tasks as a file says."""
    return len(start) == 4 and 0 < struct.unpack("<I", start)[0] <= (size - 4) // 4
