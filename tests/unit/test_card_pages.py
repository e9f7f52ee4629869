"""Both pages of a card as readers and the Hub see them: widths, links, pictures, metadata."""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote
from xml.etree import ElementTree

import hub_page
import pytest
import yaml
from browser import CHROMIUM, Browser
from example_records import DIVERGENCE, TEXT
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from mtpforge.measure.measurement import Other, Score
from mtpforge.publish import details
from mtpforge.publish.card_config import About
from mtpforge.publish.markdown import escape
from mtpforge.publish.result import Result
from mtpforge.report import figures
from mtpforge.report.distance import distance
from mtpforge.table import markdown
from pages import anchors
from test_card import (
    ABOUT,
    BASE,
    DETAILS,
    DONORS,
    SIDECAR,
    beside,
    front,
    make,
    measurement,
    result,
    second,
    split_result,
)

NAMES = (
    "BF16", "Q8_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "IQ3_XXS-mix-injected", "UD-Q2_K_XL-mine",
)  # fmt: skip
HOSTILE = "a|b `x` <img src=x onerror=alert(1)> [c](d) ](e) --- $m$ ~~s~~ é\u202e \\"
HOSTILE += "__u__ _v_ *w* https://evil.example www.evil.example a@evil.example"


def many() -> list[Result]:
    """Files with the widest cells that a real repository has."""
    swept = measurement(2, (1234.5, 2345.6, 2500.4))
    off, *drafting = swept.by_n_max
    pairs = (off, *(replace(each, p_min=0.75) for each in drafting))
    swept = replace(swept, by_n_max=pairs, recommended_p_min=0.75)
    return [
        result(
            name,
            measured=replace(swept, file=f"Qwen3.5-4B-{name}.gguf"),
            head="BF16/Q8_0",
            bytes=123_456_789_012,
        )
        for name in NAMES
    ]


def html(text: str) -> str:
    return str(MarkdownIt("commonmark", {"html": True}).enable("table").render(text))


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt install chromium)")
def test_the_card_fits_the_hub(tmp_path: Path) -> None:
    """Measured with DejaVu Sans, which is wider than the Hub's font."""
    measured = [found for each in many() if (found := each.measured)]
    (tmp_path / "plots").mkdir()
    for name in ("distance", "drafting"):
        (tmp_path / "plots" / f"{name}.svg").write_text(figures.FIGURES[name](measured).render())
    (tmp_path / "README.md").write_text(make(*many()))
    hub_page.write(tmp_path / "README.md", tmp_path / "README.html")
    with Browser(1280, 900) as browser:
        browser.open(tmp_path / "README.html")
        widths = browser.run(
            "[...document.querySelectorAll('table, img')].map("
            "each => each.getBoundingClientRect().right)"
        )
        loaded = browser.run("[...document.images].map(each => each.complete && each.naturalWidth)")
        tops = browser.run("[...document.images].map(each => each.getBoundingClientRect().bottom)")
        assert browser.problems == []
    assert loaded == [360, 360]
    assert len(widths) == 3
    assert max(widths) <= hub_page.WIDTH
    assert abs(tops[0] - tops[1]) < 1  # side by side


def test_the_table_of_files_has_at_most_eight_columns_and_two_digits() -> None:
    table = make(*many()).split("## Files")[1].split("## ")[0]
    assert "1200 → 2500" in table
    headings, _, *lines = [
        line.strip("| ").split("|") for line in table.splitlines() if "|" in line
    ]
    assert len(headings) <= 8
    cells = [cell.strip() for line in lines for cell in line[1:]]
    for number in re.findall(r"\d[\d.]*", " ".join(cells).replace("BF16/Q8_0", "")):
        assert len(number.replace(".", "").strip("0")) <= 2, number


def test_the_sections_come_in_the_order_in_which_people_read() -> None:
    text = make(*many())
    order = ["<img", "## Files", "## Run it", "## How it was made"]
    assert sorted(order, key=text.index) == order
    assert "by draft length" not in text.split("## How it was made")[0]
    assert second(*many()).count("by draft length") == len(NAMES)


def test_links_name_published_files_and_sections_of_the_other_page(tmp_path: Path) -> None:
    results = [*many(), split_result("Q3_K_M"), SIDECAR]
    published = {shard for each in results for shard in each.shards}
    published |= {"README.md", "DETAILS.md", "plots/distance.svg", "plots/drafting.svg"}
    linked, sections = set(), set()
    for page in (make(*results), second(*results)):
        targets = re.findall(r'(?:href|src)="([^"]+)"', html(page))
        own = [unquote(each) for each in targets if not each.startswith("http")]
        linked |= {each.partition("#")[0] for each in own}
        sections |= {each for each in own if "#" in each}
    assert linked == published - {"Qwen3.5-4B-Q3_K_M/Qwen3.5-4B-Q3_K_M-00002-of-00002.gguf"}
    assert sections == {
        "DETAILS.md#all-files", "DETAILS.md#drafting", "DETAILS.md#recipe",
        "README.md#how-it-was-made",
    }  # fmt: skip
    for name, page in (("DETAILS.md", second(*results)), ("README.md", make(*results))):
        (tmp_path / name).write_text(page)
        there = {f"{name}#{anchor}" for anchor in anchors(tmp_path / name)}
        assert {each for each in sections if each.startswith(name)} <= there
    assert "#drafting" not in make() and "## Drafting" not in second()


def test_evaluations_are_in_the_hubs_form() -> None:
    text = make(*many(), result("none", measured=measurement(text=TEXT, perplexity=float("inf"))))
    data = ModelCard(text).data
    assert data.model_name == "Qwen3.5-4B-MTP-GGUF"
    assert [(each.metric_type, each.metric_value) for each in data.eval_results] == [
        ("kl_divergence", 0.01234)
    ]  # without its text, a figure has no meaning, and JSON has no infinity
    both = make(result(measured=measurement(text=TEXT)))
    (model,) = front(both)["model-index"]
    (found,) = model["results"]
    assert found["task"] == {"type": "text-generation"}
    assert found["dataset"]["name"] == TEXT.name
    assert found["dataset"]["args"] == {"sha256": TEXT.sha256, "chunks": TEXT.chunks}
    assert [each["name"] for each in found["metrics"]] == [
        "Perplexity (Qwen3.5-4B-IQ4_XS.gguf)",
        "KL divergence (Qwen3.5-4B-IQ4_XS.gguf)",
    ]
    again = ModelCard(both)
    assert yaml.safe_load(again.data.to_yaml()) == front(both)


@pytest.mark.parametrize("heads", [0, 1])
@pytest.mark.parametrize("measured", [None, measurement(text=TEXT)])
def test_hostile_names_break_neither_page(measured: Any, heads: int) -> None:
    name = f"{HOSTILE}.gguf"
    hostile = result(file=name, measured=measured, heads=heads, head="<b>|")
    about: dict[str, Any] = {"name": HOSTILE, "source": {"path": HOSTILE}, "publish": {}}
    for page in (make(hostile, **about), second(hostile, **about)):
        body = page.split("\n---\n", 1)[-1]
        shown = html(body)
        tags = re.findall(r"<[^>]*>", shown)
        assert [each for each in tags if " onerror" in each or " src=x" in each] == []
        assert not {"<b>", "<s>", "<hr />", "<em>", "<strong>"} & set(tags)
        assert re.search(r"https?://evil|www\.evil|\w@evil", _outside_code(body)) is None
        links = {unquote(each) for each in re.findall('href="([^"]*)"', shown)}
        assert {each.partition("#")[0] for each in links if not each.startswith("https://")} <= {
            name, "README.md", "DETAILS.md",
        }  # fmt: skip
        for table in re.findall(r"<table>.*?</table>", shown, re.DOTALL):
            lines = [len(re.findall("<t[hd]", row)) for row in table.split("<tr>")[1:]]
            assert len(set(lines)) == 1
    if measured:
        assert ModelCard(make(hostile, **about)).data.eval_results


def _outside_code(text: str) -> str:
    """What GitHub's Markdown, and so the Hub's, looks for addresses in."""
    prose = re.sub(r"^```.*?^```|`[^`]*`", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"\]\([^)]*\)", "]", prose)


@pytest.mark.parametrize(
    "name", ["Q4_K_M", "UD-Q2_K_XL", "snake_case_name", "b11434", "12:30", "file.gguf", "a.b@c"]
)
def test_names_of_files_are_shown_as_they_are(name: str) -> None:
    assert html(escape(name)) == f"<p>{name}</p>\n"
    if "@" not in name:
        assert escape(name) == name


@pytest.mark.parametrize(
    ("cell", "shown"),
    [("a|b", r"a\|b"), (r"a\|b", r"a\|b"), (r"a\\|b", r"a\\\|b"), (r"\\\|b|", r"\\\|b\|")],
)
def test_bars_never_split_a_cell(cell: str, shown: str) -> None:
    """Two backslashes escape each other, and not the bar after them."""
    assert markdown([["x"], [cell]]).splitlines()[-1] == f"| {shown} |"


def test_hostile_names_break_no_picture() -> None:
    for name in (HOSTILE, "x" * 300, "\x00\x1b]0;x\x07", "]]>", "&amp;"):
        found = replace(measurement(2, (9.0, 12.0, 18.0)), file=f"{name}.gguf")
        for figure in figures.FIGURES.values():
            ElementTree.fromstring(figure([found]).render())


def test_other_peoples_files_are_shown_beside_ours() -> None:
    moved = replace(DIVERGENCE, mean=0.02, mean_error=0.001, maximum=3.5)
    others = [
        Other(name="Some|one/X-GGUF/M-`b`.gguf", bytes=10**9, llama_cpp="b1", kl_divergence=moved),
        Other(name="bad.gguf", bytes=1, llama_cpp="b1", problem="of <another> model"),
    ]
    measured = replace(measurement(2), file="M-a.gguf", bytes=2 * 10**9)
    about = About.parse(json.dumps(ABOUT))
    page = details.make(about, [result(measured=measured)], DETAILS, others=others)
    shown = page.split("## Compared with other quants")[1]
    assert r"| `Some\|one/X-GGUF/M-b.gguf`" in shown
    assert "0.02000 ± 0.00100 | 0.5678 |   3.500" in shown
    assert "- `bad.gguf`: not compared: of &lt;another&gt; model" in shown
    assert "Compared with other" not in second()
    second_file = replace(measured, file="M-c.gguf", bytes=3 * 10**9)
    picture = distance([measured, second_file], others=others).render()
    assert ">`b` (Some|one)<" in picture and ">not made here<" in picture
    assert "not made here" not in distance([measured, second_file]).render()


def test_scores_on_tasks_are_on_the_second_page_and_in_the_metadata() -> None:
    tasks = {"multiple_choice": Score(tasks=1000, share=0.4567891, error=0.016)}
    made = result(measured=measurement(2, tasks=tasks))
    assert " multiple choice |" in second(made)
    assert "45.7% ± 1.6% of 1,000" in second(made)
    (found,) = ModelCard(make(made)).data.eval_results
    assert (found.metric_type, found.metric_value) == ("accuracy", 0.456789)
    assert found.dataset_name == "multiple choice" and found.dataset_args == {"tasks": 1000}


def test_p_min_is_given_to_those_that_know_it() -> None:
    text = make(result(measured=measurement(3, recommended_p_min=0.75)))
    words = "--spec-draft-n-max 3 --spec-draft-p-min 0.75"
    assert text.count(words) == 3  # llama-server, llama-swap, Lemonade
    assert "--speculative-draft-min-continue-probability 0.75\n" in text


def test_ollama_drafts_as_far_as_is_faster_without_p_min() -> None:
    without = measurement(3, (100.0, 90.0, 120.0, 110.0)).by_n_max
    surer = replace(without[3], p_min=0.75, tokens_per_second=150.0, speedup=1.5)
    measured = measurement(3, recommended_p_min=0.75, by_n_max=(*without, surer))
    assert "PARAMETER draft_num_predict 2\n" in make(result(measured=measured))
    slower = tuple(replace(total, speedup=min(total.speedup or 1, 0.9)) for total in without)
    text = make(result(measured=replace(measured, by_n_max=(*slower, surer))))
    assert "draft_num_predict" not in text and "\nollama run hf.co/" in text


def test_speed_that_was_not_steady_has_no_picture() -> None:
    text = make(result(measured=measurement(2, steady=False, recommended_n_max=None)))
    assert "plots/distance.svg" in text and "plots/drafting.svg" not in text


TOWER = beside("mmproj-Qwen3.5-4B-F16.gguf", "clip")
MIXED = {
    "one": [result()],
    "BF16 alone": [result("BF16")],
    "no heads": [result(heads=0, head="none"), result("Q8_0", heads=0, head="none")],
    "a sidecar alone": [SIDECAR],
    "a sidecar for a file without a head": [result(heads=0, head="none"), SIDECAR],
    "a sidecar and a vision tower": [result(measured=measurement(2)), SIDECAR, TOWER],
    "split": [split_result("Q4_K_M"), split_result("BF16")],
    "some measured": [result("BF16"), result(measured=measurement(0, (9.0, 8.0)))],
}


@pytest.mark.parametrize("kind", MIXED)
@pytest.mark.parametrize("about", [{}, {"source": None, "bases": [BASE], "donors": DONORS}])
def test_every_kind_of_repository_has_both_pages(kind: str, about: dict[str, Any]) -> None:
    results = MIXED[kind]
    text, more = make(*results, **about), second(*results, **about)
    assert ModelCard(text).data.base_model_relation == "quantized"
    published = {shard for each in results for shard in each.shards}
    for page in (text, more):
        assert "None" not in page and "\n\n\n" not in page and "{{" not in page
        linked = {unquote(each) for each in re.findall(r'href="([^"]+)"', html(page))}
        own = {each.partition("#")[0] for each in linked if not each.startswith("https://")}
        assert own - {"README.md", "DETAILS.md"} <= published
        assert len(own & published) == len(results)
    blocks = [each.content for each in MarkdownIt().parse(text) if each.type == "fence"]
    for line in "".join(each for each in blocks if "cmd:" not in each).splitlines():
        assert shlex.split(line)[0] in {
            "llama-server", "hf", "lemonade", "lms", "ollama", "FROM", "PARAMETER",
        }  # fmt: skip
