"""Tables of scores on tasks with known answers, one for each model."""

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

from mtpforge.measure.measurement import Measurement, Score
from mtpforge.table import markdown

HEADING = "Right answers"


def scores(measured: Mapping[Path, Measurement]) -> str:
    """A Markdown table for each model with tasks; empty without one.

    `measured` are measurements by their paths, `<folder of a model>/measure/...`.
    """
    files = [(path.parents[1], found) for path, found in measured.items() if found.tasks]
    by_model = groupby(files, key=lambda each: each[0])
    return "\n".join(
        f"{HEADING}: {folder.name}\n\n{_table([found for _, found in group])}"
        for folder, group in by_model
    )


def cell(score: Score | None) -> str:
    """A score with its standard error, and the number of tasks."""
    if score is None:
        return "-"
    return f"{score.share:.1%} ± {score.error:.1%} of {score.tasks:,}"


def _table(files: list[Measurement]) -> str:
    kinds = list(dict.fromkeys(kind for found in files for kind in found.tasks))
    rows = [("file", *(kind.replace("_", " ") for kind in kinds))]
    rows += [(found.stem, *(cell(found.tasks.get(kind)) for kind in kinds)) for found in files]
    return markdown(rows)
