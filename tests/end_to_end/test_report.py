"""The report that `make report` writes, looked at in a real headless Chromium, as wide as a desk and as narrow as a phone."""

import subprocess
import sys
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from conftest import MODELS, ROOT

FIGURES = ("speed", "acceptance", "distance", "tensors of Q4_K_M")
STYLE = "workflow/report/report.css"


@pytest.fixture(scope="module")
def report(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "report.html"
    for arguments in (["--cores", "all"], ["--report", str(out), "--report-stylesheet", STYLE]):
        done = subprocess.run(
            [sys.executable, "-m", "snakemake", *arguments, "plots"],
            cwd=built,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return out


def test_it_is_one_file_that_loads_nothing(report: Path) -> None:
    page = report.read_text()
    assert all(
        each not in page
        for each in ("<script src=", '<link rel="stylesheet" href="http', "@import url(http")
    )
    assert f"--report-stylesheet {STYLE} plots" in (ROOT / "Makefile").read_text()


@pytest.mark.skipif(
    CHROMIUM is None,
    reason="no Chromium is installed (apt install chromium): nobody looks at the report",
)
@pytest.mark.parametrize(("width", "height"), [(1280, 800), (360, 740)])
def test_people_can_look_at_it(report: Path, width: int, height: int) -> None:
    with Browser(width, height) as browser:
        browser.open(report)
        browser.wait("document.body.innerText.includes('what was measured of each file')")
        assert all(model in browser.run("document.body.innerText") for model in MODELS)
        browser.click(MODELS[0])
        image, shown = "document.querySelector('.p-3 > img')", ""
        for figure in FIGURES:
            row = f"[...document.querySelectorAll('tr')].find(each => each.innerText.trim() == {figure!r})"
            browser.wait(f"!!{row}")
            browser.run(f"{row}.querySelector('a').click()")
            browser.wait(
                f"{image} && {image}.complete && {image}.naturalWidth == 360 && {image}.src != {shown!r}"
            )
            shown = browser.run(f"{image}.src")
            box = browser.run(f"{image}.getBoundingClientRect().toJSON()")
            assert box["left"] >= 0 and box["right"] <= width and box["width"] >= min(320, width), (
                figure,
                box,
            )
            assert box["top"] >= 0, (figure, box)  # where it is tall, its beginning can be seen
        assert browser.run("document.documentElement.scrollWidth") <= width
        assert browser.problems == []
