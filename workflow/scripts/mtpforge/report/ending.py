"""The last lines of a run: which files there are, where, how to serve one, and what to do next."""

import shlex
from collections.abc import Sequence
from pathlib import Path

from mtpforge.errors import ForgeError
from mtpforge.gguf import reader
from mtpforge.llama_cpp.programs import DEFAULT_FOLDER
from mtpforge.measure.measurement import Measurement
from mtpforge.publish import choice, serving
from mtpforge.publish.result import Result
from mtpforge.report import distance_tables, scores
from mtpforge.report import summary as summary_page
from mtpforge.rules.publish import UploadedModel
from mtpforge.verify.report import Report

_ROWS = 10
"""Rows of the table of files and verdicts below it, so that a run's end is at most 20 lines."""
_VERDICTS = 3
"""The most verdicts on files whose types were found."""
_PLACES = 3
"""The most lines with addresses of uploads."""


def after_build(
    summary: Path,
    reports: Sequence[Path],
    since: float = 0.0,
    publish: bool = False,
    repo: str = "",
    models: Sequence[str] = (),
) -> str:
    """The summary, cut if it is long, then places, a command that serves a file, and advice.

    Its tables of distances and scores, and what importance matrices cover, are left out.

    `reports` are those of the files, in the order of the configuration. The file to serve is one
    that was made after the time `since`, if there is one. `publish` is whether a model has a place
    to upload it to; `repo` is the Hub repository of one that has none, if it is known.
    `models` are those that the run was for; empty: all.
    """
    upload = "`make publish DRY_RUN=1` lists an upload"
    if not publish:
        add = f"`make add REPO={repo} PUBLISH=YOU/NAME`"  # makes quants, which not all want
        entry = "`publish: {repo: YOU/NAME}` in a model's entry"
        upload = f"{add if repo else entry} prepares an upload"
    named = shlex.quote(" ".join(models)) if models else ""
    report = f"make report MODELS={named}" if models else "make report"
    advice = f"`{report}` draws speed and errors; {upload}"
    text = summary.read_text(encoding="utf-8")
    return _ending(text, summary, reports, [f"next      {advice}"], since)


def after_upload(
    uploads: Sequence[UploadedModel], dry_run: bool = False, since: float = 0.0
) -> str:
    """The same for models that were uploaded, or would be, with the address of each."""
    reports = [path for each in uploads for path in map(Path, each.reports) if path.exists()]
    measured = [path for each in uploads for path in map(Path, each.measurements) if path.exists()]
    places = _first([each.address for each in uploads], _PLACES, "more")
    advice = [f"uploaded  {place}" for place in places]
    for repo in [each.private for each in uploads if each.private][:1]:
        command = f"`.venv/bin/hf repos settings {repo} --public`"
        advice.append(f"next      read the card there; if it is private, publish it: {command}")
    if dry_run:
        advice = ["next      `make publish` uploads these files, with their card"]
    text = summary_page.summary(reports, measured)
    return _ending(text, Path(uploads[0].card), reports, advice, since)


def _ending(
    text: str, page: Path, reports: Sequence[Path], advice: Sequence[str], since: float
) -> str:
    """The table in `text`, which `page` has too, and what follows it."""
    folders = sorted({str(report.parent.parent) for report in reports})
    for heading in (distance_tables.HEADING, scores.HEADING, summary_page.IMPORTANCE):
        text = text.partition(f"\n{heading}")[0]
    lines = [
        *_shortened(text.splitlines(), page),
        "",
        f"files     {', '.join(folders[:5])}{' ...' * (len(folders) > 5)}",
        f"reports   {page} (this table), reports/*.json in each folder (each check)",
        *_serve([report for report in reports if _made(report) >= since] or reports),
        *advice,
    ]
    return "\n".join(lines)


def _shortened(lines: Sequence[str], page: Path) -> list[str]:
    """The rows and verdicts that there is room for, and how many are left out."""
    table = [line for line in lines if line.startswith("|")]
    verdicts = [line for line in lines if line.startswith("- ")]
    verdicts = _first(verdicts, _VERDICTS, f"more verdicts: see {page}")
    rows = _first(table[2:], _ROWS - len(verdicts), f"more: see {page}")
    return [*table[:2], *rows, *verdicts]


def _first(lines: list[str], most: int, end: str) -> list[str]:
    """At most this many lines: all, or one fewer and how many are left out."""
    if len(lines) <= most:
        return lines
    return [*lines[: most - 1], f"and {len(lines) - most + 1} {end}"]


def _serve(reports: Sequence[Path]) -> list[str]:
    """The command for the file to start with; none if no file is a whole model."""
    try:
        results = [_read(report) for report in reports]
        best = choice.recommended(results)
        options = serving.server_options(best) if best else []
    except (ForgeError, OSError):  # deleted or changed since
        return []
    if best is None:
        return []
    file = reports[results.index(best)].parent.parent / best.shards[0]
    command = [str(DEFAULT_FOLDER / "llama-server"), "-m", str(file), *options]
    return [f"serve     {shlex.join(command)}"]


def _made(report: Path) -> float:
    return report.stat().st_mtime if report.exists() else 0.0


def _read(report: Path) -> Result:
    folder = report.parent.parent
    read = Report.read(report)
    measured = folder / "measure" / report.name.replace(".split.json", ".json")
    return Result(
        read,
        Measurement.read(measured) if measured.exists() else None,
        reader.read(folder / read.published[0][0]),
    )
