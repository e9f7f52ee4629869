"""The report of `make report`, opened in headless Chromium as wide as a desktop and as a phone."""

from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from conftest import MODELS, ROOT, SCRIPTS, Snakemake

FIGURES = ("speed", "acceptance", "distance", "drafting", "tensors of Q4_K_M")
OPTIONS = "--reporter mtpforge --report-mtpforge-path {} --report-mtpforge-stylesheet-path {} plots"
STYLE = "workflow/report/report.css"


@pytest.fixture(scope="module")
def report(built: Path, snakemake: Snakemake, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "report.html"
    snakemake("plots")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(SCRIPTS))
        snakemake(*OPTIONS.format(out, STYLE).split())
    return out


def test_report_is_one_file_that_loads_nothing(report: Path) -> None:
    page = report.read_text()
    loads = ("<script src=", '<link rel="stylesheet" href="http', "@import url(http")
    assert [each for each in loads if each in page] == []
    recipe = " ".join((ROOT / "Makefile").read_text().replace("\\\n", " ").split())
    assert f"snakemake {OPTIONS.format('report.html', STYLE)}" in recipe


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt install chromium)")
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (360, 740)])
def test_all_figures_can_be_opened(report: Path, width: int, height: int) -> None:
    with Browser(width, height) as browser:
        browser.open(report)
        browser.wait("document.body.innerText.includes('measurements of each published file')")
        text = browser.run("document.body.innerText")
        assert [model for model in MODELS if model not in text] == []
        opening = browser.run("[...document.querySelectorAll('.grow img')].length")
        assert opening == 2 * len(MODELS)
        assert browser.run("document.querySelectorAll('.grow td').length") >= 7 * 2 * len(MODELS)
        assert not browser.run("!!document.querySelector('div#rulegraph')")
        browser.click(MODELS[0])
        for figure in FIGURES:
            box = show(browser, figure)
            assert box["left"] >= 0, figure
            assert box["right"] <= width, figure
            assert box["width"] >= min(320, width), figure
            assert box["top"] >= 0, figure  # so the top of a tall figure is not cut off
        assert browser.run("document.documentElement.scrollWidth") <= width
        assert browser.problems == []


def show(browser: Browser, figure: str) -> dict[str, float]:
    """Click on a figure's row, wait until another image is loaded, and return its box."""
    image = "document.querySelector('.p-3 > img')"
    before = browser.run(f"{image} ? {image}.src : ''")
    row = f"[...document.querySelectorAll('tr')].find(each => each.innerText.trim() == {figure!r})"
    browser.wait(f"!!{row}")
    browser.run(f"{row}.querySelector('a').click()")
    loaded = f"{image} && {image}.complete && {image}.naturalWidth == 360"
    browser.wait(f"{loaded} && {image}.src != {before!r}")
    return dict(browser.run(f"{image}.getBoundingClientRect().toJSON()"))
