"""The first page of the report: the table, and pictures that load nothing."""

from base64 import b64decode
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
from mtpforge.errors import ForgeError
from mtpforge.report import page
from snakemake.report.html_reporter.data import render_runtimes
from snakemake_interface_report_plugins.registry import ReportPluginRegistry

SUMMARY = """\
| file     |  size |
| -------- | ----: |
| a.gguf   | 1 MB  |
| <b>.gguf | 2 MB  |

- a.gguf: better & smaller

Distance from BF16: m
| file | KL |
| ---- | -: |
| a    | 1  |
"""


@pytest.fixture
def rendered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A reporter after its work, without Snakemake's own part of it."""
    monkeypatch.chdir(tmp_path)
    plots = Path("results/m/plots")
    plots.mkdir(parents=True)
    for name in ("distance", "drafting", "speed"):
        (plots / f"{name}.svg").write_text(f"<svg><title>{name}</title></svg>")
    Path("results/summary.md").write_text(SUMMARY)
    monkeypatch.setattr(page.HtmlReporter, "render", lambda _: None)
    records = [SimpleNamespace(path=str(path)) for path in sorted(plots.iterdir())]
    jobs = [SimpleNamespace(rule="a", starttime=5.0, endtime=end) for end in (5.0, 4.0, 9.0)]
    made = page.Reporter(
        rules={},
        results={"m": {"Other": records}},
        configfiles=[],
        jobs=jobs,
        settings=page.ReportSettings(path=Path("report.html")),
        workflow_description="",
        dag=None,
        metadata={},
    )
    made.render()
    return made


def test_the_report_opens_with_the_table_and_two_pictures_of_each_model(rendered: Any) -> None:
    assert list(rendered.metadata) == ["files", "m"]
    tree = ElementTree.fromstring(f"<x>{rendered.metadata['m']}</x>")
    sources = [each.get("src", "") for each in tree.iter("img")]
    titles = [b64decode(each.partition(",")[2]).decode() for each in sources]
    assert titles == [f"<svg><title>{name}</title></svg>" for name in page.OPENING]
    assert all(each.startswith("data:image/svg+xml;base64,") for each in sources)


def test_the_summary_is_shown_as_html(rendered: Any) -> None:
    tree = ElementTree.fromstring(f"<x>{rendered.metadata['files']}</x>")
    assert [each.tag for each in tree] == ["table", "p", "p", "table"]
    cells = [[cell.text for cell in row] for row in tree.iter("tr")]
    assert cells[:3] == [["file", "size"], ["a.gguf", "1 MB"], ["<b>.gguf", "2 MB"]]
    assert cells[3:] == [["file", "KL"], ["a", "1"]]
    assert [each.text for each in tree.iter("p")] == [
        "- a.gguf: better & smaller", "Distance from BF16: m",
    ]  # fmt: skip
    with pytest.raises(ForgeError, match="missing"):
        page.table(Path("results/nothing.md"))


def test_no_job_takes_no_time_because_statistics_are_logarithmic(rendered: Any) -> None:
    times = [job.endtime - job.starttime for job in rendered.jobs]
    assert times == [pytest.approx(0.01), pytest.approx(0.01), 4.0]
    assert '"log"' in render_runtimes([])  # or this is not needed any more


def test_snakemake_finds_the_reporter() -> None:
    assert "mtpforge" in ReportPluginRegistry().get_registered_plugins()
