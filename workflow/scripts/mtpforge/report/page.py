"""The report of `make report`: Snakemake's own, which opens with the table and the pictures.

Snakemake's opens with the graph of the rules, and its statistics stay empty if any job took no
time, because their axis is logarithmic.
"""

from base64 import b64encode
from html import escape
from itertools import groupby
from pathlib import Path

from snakemake.report.html_reporter import Reporter as HtmlReporter
from snakemake.report.html_reporter import ReportSettings

from mtpforge.errors import ForgeError
from mtpforge.io.text import read_text

__all__ = ["ReportSettings", "Reporter"]

SUMMARY = Path("results/summary.md")
OPENING = ("distance", "drafting")
"""The figures of each model that the report opens with."""
_LEAST = 0.01
"""Seconds that a job takes at least in the statistics: Snakemake may record none."""


class Reporter(HtmlReporter):  # type: ignore[misc]  # it has no types
    """Snakemake's report with another first page, and with all run times."""

    def render(self) -> None:
        """Write the report. With metadata, its first page shows these instead of the graph."""
        for job in self.jobs:
            job.endtime = max(job.endtime, job.starttime + _LEAST)
        self.metadata = {"files": table(SUMMARY)} | self._pictures()
        super().render()

    def _pictures(self) -> dict[str, str]:
        """Model -> its pictures, as HTML."""
        found: dict[str, list[str]] = {}
        records = [each for parts in self.results.values() for each in parts.values()]
        for record in (each for part in records for each in part):
            path = Path(record.path)
            if path.stem in OPENING and path.parent.name == "plots":
                found.setdefault(path.parts[-3], []).append(picture(path))
        return {model: "".join(sorted(images)) for model, images in sorted(found.items())}


def table(summary: Path) -> str:
    """The tables of the summary and the lines between them, as HTML. Raises ForgeError."""
    lines = filter(str.strip, read_text(summary, ForgeError).splitlines())
    parts: list[str] = []
    for is_table, group in groupby(lines, key=lambda line: line.startswith("|")):
        found = list(group)
        parts += [_table(found)] if is_table else [f"<p>{escape(line)}</p>" for line in found]
    return "".join(parts)


def picture(path: Path) -> str:
    """An SVG file as HTML that loads nothing."""
    data = b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(path.stem)}" src="data:image/svg+xml;base64,{data}" />'


def _table(rows: list[str]) -> str:
    heading, _, *others = rows
    return f"<table>{_row(heading, 'th')}{''.join(_row(row, 'td') for row in others)}</table>"


def _row(line: str, kind: str) -> str:
    cells = (escape(cell.strip().replace(r"\|", "|")) for cell in line.strip("| ").split(" | "))
    return f"<tr>{''.join(f'<{kind}>{cell}</{kind}>' for cell in cells)}</tr>"
