"""Tables of the model card and of its second page: of the files, and of each by draft length.

A cell is None if its value is unknown. A column without any value is left out, and so is one of
speeds of which none was steady.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from mtpforge.measure.measurement import KindSpeed, KlDivergence, Measurement, Other, Run, Total
from mtpforge.publish import serving_memory
from mtpforge.publish.choice import Choice, by_size, labels
from mtpforge.publish.markdown import code, escape, link
from mtpforge.publish.result import Result
from mtpforge.report import distance_tables, scores
from mtpforge.table import markdown, rounded, rounded_size, size

NOT_STEADY = "No measurement of speed was steady, so none is shown."
_UNSTEADY = "not steady"
Row = TypeVar("Row")
Column = tuple[str, Callable[[Row], str | None]]
"""Heading, and the cell of a row."""


def files(results: Sequence[Result], model_name: str) -> str:
    """The table of the card: files by size, with as many columns and digits as people read."""
    label = labels(results, model_name)
    name: Column[Result] = ("file", lambda result: link(label[result.name], result.shards[0]))
    return _table([name, *FILES], by_size(results))


def details(results: Sequence[Result]) -> str:
    """The table of the second page: files by size, with all that is known."""
    measured = [result.measured for result in results if result.measured]
    kinds = dict.fromkeys(kind for found in measured for kind in found.tasks)
    return _table([*DETAILS, *map(_score, kinds)], by_size(results))


def others(results: Sequence[Result], theirs: Sequence[Other]) -> str:
    """The table of distances from BF16, of our files and of other people's."""
    rows = [
        (link(result.name, result.shards[0]), result.report.bytes, found)
        for result in by_size(results)
        if (found := result.measured.kl_divergence if result.measured else None)
    ]
    rows += [
        (code(other.name), other.bytes, other.kl_divergence)
        for other in theirs
        if other.kl_divergence
    ]
    cells = [(name, size(count), *distance_tables.cells(found)) for name, count, found in rows]
    return markdown([distance_tables.COLUMNS[:-1], *cells])


def any_faster(results: Iterable[Result]) -> bool:
    """Whether any file's speed with drafting is shown beside that without."""
    return any("→" in (_speeds(result) or "") for result in results)


def by_memory(choices: Sequence[Choice], results: Sequence[Result], model_name: str) -> str:
    """The table of the files to take, by the memory that there is."""
    label = labels(results, model_name)
    file: Column[Choice] = (
        "file",
        lambda each: (
            link(label[each.result.name], each.result.shards[0]) if each.result else "none fits"
        ),
    )
    return _table([BY_MEMORY, file, *NEEDED], choices, left=2)


def sweep(measured: Measurement) -> str:
    """The table of one file by draft length: acceptance, and speed if it was steady."""
    by_kind = [_of_kind(measured, kind) for kind in sorted({run.kind for run in measured.runs})]
    shown = _shown([*SWEEP[:3], _rounds(measured), *SWEEP[3:]], measured)
    columns = [*shown, _cold_acceptance(measured), BY_POSITION, *by_kind]
    return _table(columns, measured.by_n_max)


def kinds(measured: Measurement) -> str:
    """The table of one file by kind of prompt: the fastest pair against no drafting.

    Empty if nothing was drafted.
    """
    drafted = [each for each in measured.by_kind if each.n_max]
    return _table(_shown(KINDS, measured), drafted) if drafted else ""


def _shown(columns: Iterable[Column[Row]], measured: Measurement) -> list[Column[Row]]:
    """The columns without speeds that were not steady."""
    return [each for each in columns if measured.steady or each[0] not in _SPEEDS]


def _table(columns: Sequence[Column[Row]], rows: Sequence[Row], left: int = 1) -> str:
    cells = [[heading, *(cell(row) for row in rows)] for heading, cell in columns]
    known = [column for column in cells if {*column[1:]} - {None, "", _UNSTEADY}]
    return markdown([[cell or "-" for cell in line] for line in zip(*known, strict=True)], left)


# ── cells ──


def _number(value: float | None, form: str) -> str | None:
    """A formatted number, without a sign if it rounds to zero."""
    return None if value is None else format(value, f"z{form}")


def _size(count: int | None) -> str | None:
    return None if count is None else size(count)


def _speed(result: Result, n_max: int) -> str | None:
    if result.measured and not result.measured.steady:
        return _UNSTEADY
    total = result.at(n_max)
    return _number(total.tokens_per_second if total else None, ".1f")


def _speeds(result: Result) -> str | None:
    """Tokens per second without drafting and with the recommended draft length."""
    if result.measured and not result.measured.steady:
        return _UNSTEADY
    off = result.at(0)
    best = result.at(result.n_max or 0)
    speeds = [rounded(total.tokens_per_second) for total in (off, best) if total]
    return " → ".join(dict.fromkeys(speeds)) or None


def _small_divergence(result: Result) -> str | None:
    """The mean divergence in two digits; 0 if it has none before the fifth decimal place."""
    found = result.measured.kl_divergence if result.measured else None
    return None if found is None else rounded(found.mean) if found.mean >= 5e-6 else "0"


def _needed(kind: str) -> Callable[[Choice], str | None]:
    def cell(choice: Choice) -> str | None:
        needed = choice.needed(kind)
        return None if needed is None else rounded_size(needed)

    return cell


def _draft_length(n_max: int | None) -> str | None:
    return None if n_max is None else str(n_max or "off")


def _threshold(p_min: float) -> str | None:
    return f"{p_min:g}" if p_min else None


def _perplexity(result: Result) -> str | None:
    return _number(result.measured.perplexity if result.measured else None, ".4f")


def _memory(result: Result) -> str | None:
    return _size(result.measured.memory_bytes if result.measured else None)


def _divergence(
    value: Callable[[KlDivergence], float | None], form: str
) -> Callable[[Result], str | None]:
    def cell(result: Result) -> str | None:
        found = result.measured.kl_divergence if result.measured else None
        return _number(value(found), form) if found else None

    return cell


def _acceptance(runs: Iterable[Run]) -> str | None:
    """The share of all drafts of some runs that was accepted."""
    found = list(runs)
    drafts = sum(run.drafts for run in found)
    return f"{sum(run.accepted for run in found) / drafts:.1%}" if drafts else None


# ── columns ──

FILES: tuple[Column[Result], ...] = (
    ("size", lambda result: rounded_size(result.report.bytes)),
    ("head", lambda result: escape(result.report.head)),
    ("accepted", lambda result: _number(result.report.acceptance, ".0%")),
    ("tokens/s", _speeds),
    ("draft", lambda result: _draft_length(result.n_max) if result.is_steady else None),
    ("p_min", lambda result: _threshold(result.p_min)),
    ("KL", _small_divergence),
)
"""Beside the file's name: narrow enough for the width of a card on the Hub."""

BY_MEMORY: Column[Choice] = ("memory", lambda choice: escape(choice.memory))
NEEDED: tuple[Column[Choice], ...] = tuple(
    (f"needs, {kind} cache", _needed(kind)) for kind in serving_memory.CACHE_TYPES
)

DETAILS: tuple[Column[Result], ...] = (
    ("file", lambda result: link(result.name, result.shards[0])),
    ("size", lambda result: size(result.report.bytes)),
    ("bits/weight", lambda result: _number(result.report.bits_per_weight, ".2f")),
    ("head", lambda result: escape(result.report.head)),
    ("acceptance", lambda result: _number(result.report.acceptance, ".1%")),
    ("tok/s", lambda result: _speed(result, result.n_max or 0)),
    ("draft length", lambda result: _draft_length(result.n_max) if result.is_steady else None),
    ("p_min", lambda result: _threshold(result.p_min)),
    ("tok/s without drafting", lambda result: _speed(result, 0)),
    ("memory", _memory),
    ("perplexity", _perplexity),
    ("KL divergence", _divergence(lambda found: found.mean, ".5f")),
    ("KL 99.9%", _divergence(lambda found: found.p99_9, ".4f")),
    ("KL maximum", _divergence(lambda found: found.maximum, ".3f")),
    ("top-token agreement", _divergence(lambda found: found.same_top, ".1%")),
)

SWEEP: tuple[Column[Total], ...] = (
    ("draft length", lambda total: _draft_length(total.n_max)),
    ("p_min", lambda total: _threshold(total.p_min)),
    ("tok/s", lambda total: f"{total.tokens_per_second:.1f}"),
    ("range", lambda total: "-".join(dict.fromkeys(f"{speed:.1f}" for speed in total.spread))),
    ("cold tok/s", lambda total: _number(total.cold_tokens_per_second, ".1f")),
    ("speedup", lambda total: _number(total.speedup, ".2f")),
    ("acceptance", lambda total: _number(total.acceptance, ".1%")),
)
KINDS: tuple[Column[KindSpeed], ...] = (
    ("prompt", lambda each: escape(each.kind)),
    ("form", lambda each: escape(each.form)),
    ("tok/s without drafting", lambda each: f"{each.without:.1f}"),
    ("tok/s", lambda each: f"{each.tokens_per_second:.1f}"),
    ("speedup", lambda each: _number(each.speedup, ".2f")),
    ("acceptance", lambda each: _number(each.acceptance, ".1%")),
)
_SPEEDS = ("tok/s", "tok/s without drafting", "rounds", "range", "cold tok/s")
BY_POSITION: Column[Total] = (
    "by position",
    lambda total: " ".join(f"{share:.0%}" for share in total.by_position),
)


def _rounds(measured: Measurement) -> Column[Total]:
    def cell(total: Total) -> str:
        kind = "in turns" if measured.took_turns(total) else "search"
        return f"{total.repeats} {kind}" if measured.by_kind else str(total.repeats)

    return "rounds", cell


def _cold_acceptance(measured: Measurement) -> Column[Total]:
    cold = [run for run in measured.runs if run.state == "cold"]
    return (
        "cold acceptance",
        lambda total: _acceptance(run for run in cold if _is_of(run, total)),
    )


def _of_kind(measured: Measurement, kind: str) -> Column[Total]:
    """The acceptance on prompts of one kind."""
    warm = measured.warm(kind)
    return escape(kind), lambda total: _acceptance(run for run in warm if _is_of(run, total))


def _is_of(run: Run, total: Total) -> bool:
    return (run.n_max, run.p_min) == (total.n_max, total.p_min)


def _score(kind: str) -> Column[Result]:
    """The share of right answers to tasks of one kind."""

    def cell(result: Result) -> str | None:
        found = result.measured.tasks.get(kind) if result.measured else None
        return scores.cell(found) if found else None

    return kind.replace("_", " "), cell
