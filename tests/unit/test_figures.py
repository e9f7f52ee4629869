"""Figures are well-formed, fit a phone, and say in words what they show in colours."""

import re
from dataclasses import replace
from pathlib import Path
from xml.etree import ElementTree

import pytest
from conftest import Run as RunProgram
from example_records import DIVERGENCE, MACHINE, measurement, run, total
from mtpforge.gguf import writer
from mtpforge.gguf.quant_types import UnknownType
from mtpforge.gguf.reader import TensorInfo
from mtpforge.measure.measurement import Measurement
from mtpforge.report import figures
from mtpforge.report.distance import LEADER, File, frontier
from mtpforge.report.svg import CHARACTER, FAINT, MARKS, WIDTH, Svg, ticks
from mtpforge.report.tensors import tensors
from mtpforge.search.compared import Compared, Stock

TEXT = "{http://www.w3.org/2000/svg}text"
KINDS = ("code", "prose", "structured")
SHARES = {"start": 0.0, "middle": 0.5, "end": 1.0}
"""Text anchor: share of the text that lies to the left of it."""


def measured(
    file: str, recommended: int, divergence: float = 0.01, kinds: tuple[str, ...] = KINDS
) -> Measurement:
    """Drafting with n_max 1 is 1.5 times as fast, or slower."""
    verdict = "1.50 times as fast as without drafting: x" if recommended else "slower than off: x"
    return measurement(
        file,
        bytes=2_000_000_000,
        threads=1,
        machine=MACHINE,
        runs=tuple(run(1, kind, accepted=90) for kind in kinds),
        by_n_max=(total(0, 50.0), total(1, 75.0 if recommended else 40.0, 50.0, acceptance=0.9)),
        recommended_n_max=recommended,
        verdict=verdict,
        kl_divergence=replace(DIVERGENCE, mean=divergence),
    )


def words(picture: Svg) -> list[str]:
    """All texts of a picture; each must lie within it."""
    root = ElementTree.fromstring(picture.render())
    assert root.get("width") == str(WIDTH)
    for text in root.iter(TEXT):
        size = float(text.get("font-size", "12"))
        width = CHARACTER / 12 * size * len(text.text or "") * 0.9
        begin = float(text.get("x", "0")) - SHARES[text.get("text-anchor", "")] * width
        assert begin >= -8, text.text
        assert begin + width <= WIDTH + 12, text.text
    return [text.text or "" for text in root.iter(TEXT)]


def test_speed_figure_recommends_a_draft_length() -> None:
    found = words(figures.speed([measured("M-A.gguf", 1), measured("M-B.gguf", 0)]))
    assert "recommended: n_max 1 (1.50 times as fast as" in " ".join(found)
    assert "1.50×" in found
    assert "recommended: no drafting (slower than off)" in found
    assert "0.80×" in found
    assert "On A <fast> one, 1 thread." in " ".join(found)


def test_acceptance_figure_shows_each_kind_of_prompt() -> None:
    picture = figures.acceptance([measured("M-A.gguf", 1)])
    assert {*KINDS, "90.0%", "by position at n_max 1: 80%"} <= set(words(picture))
    svg = picture.render()
    assert svg.count("<circle") == svg.count("<polygon") == 2  # in the legend, and at n_max 1


def test_many_kinds_of_prompts_do_not_overlap() -> None:
    kinds = ("code", "prose", "structured", "dialogue", "mathematics", "translation")
    picture = figures.acceptance([measured("M-A.gguf", 1, kinds=kinds)])
    assert set(kinds) <= set(words(picture))
    circles = re.findall(r'<circle cx="[0-9.]+" cy="([0-9.]+)"', picture.render())
    assert len(circles) == 6  # three of six marks, in the legend and in the row
    assert len(set(circles[3:])) == 3


@pytest.mark.parametrize("divergences", [(0.0,), (0.0, 0.02), (0.0, 1e-9), (0.1, 0.1, 0.1, 1e-5)])
def test_distance_figure_names_all_files(divergences: tuple[float, ...]) -> None:
    names = [f"M-V{number}" for number in range(len(divergences))]
    files = [
        measured(f"{name}.gguf", 0, value) for name, value in zip(names, divergences, strict=True)
    ]
    short = names if len(names) == 1 else [name.removeprefix("M-") for name in names]
    assert set(short) <= set(words(figures.distance(files)))


def sized(*files: tuple[str, int, float]) -> list[Measurement]:
    """Files of these names, bytes and divergences."""
    return [replace(measured(f"M-{name}.gguf", 0, far), bytes=size) for name, size, far in files]


def numbers(picture: Svg) -> set[float]:
    """The ticks of both axes."""
    return {float(word) for word in words(picture) if re.fullmatch(r"[\d.e-]+", word)}


def test_the_axes_of_the_distance_figure_fit_the_files() -> None:
    small = sized(
        ("IQ4_XS", 1_960_000, 0.0296), ("Q4_K_M", 2_060_000, 0.0252), ("Q6_K", 2_490_000, 0.004)
    )
    assert numbers(figures.distance(small)) == {2.0, 2.1, 2.2, 2.3, 2.4, 2.5, 0.005, 0.01, 0.02}
    with_bf16 = [*small, *sized(("BF16", 5_600_000, 0.0))]
    assert 0.0 in numbers(figures.distance(with_bf16))
    wide = [*small, *sized(("Q8_0", 3_600_000, 0.0001))]
    assert numbers(figures.distance(wide)) == {2.0, 2.5, 3.0, 3.5, 0.0001, 0.001, 0.01}


SCATTERED = {
    "few": [("IQ4_XS", 196, 0.0296), ("Q4_K_M", 206, 0.0252), ("Q6_K", 249, 0.004)],
    "many": [
        ("IQ2_XXS", 120, 0.6), ("Q3_K_M", 180, 0.09), ("IQ4_XS", 196, 0.0296),
        ("Q4_K_M", 206, 0.0252), ("Q4_K_M-auto", 206, 0.018), ("Q5_K_M", 227, 0.009),
        ("Q6_K", 249, 0.004), ("Q8_0", 357, 0.0001), ("BF16", 560, 0.0),
    ],
    "close": [("A-long-name", 200, 0.02), ("B-long-name", 201, 0.0199), ("C", 202, 0.0198)],
}  # fmt: skip


@pytest.mark.parametrize("kind", SCATTERED)
def test_labels_of_the_distance_figure_avoid_marks_lines_and_each_other(kind: str) -> None:
    files = sized(*SCATTERED[kind])
    root = ElementTree.fromstring(figures.distance(files).render())
    names = {name for name, _, _ in SCATTERED[kind]}
    labels = []
    for text in root.iter(TEXT):
        if text.text in names:
            x, y = float(text.get("x", "")), float(text.get("y", ""))
            labels.append((x, y - 9, x + 0.9 * CHARACTER * len(text.text), y))
    marks = [
        (float(mark.get("cx", "")), float(mark.get("cy", "")))
        for mark in root.iter("{http://www.w3.org/2000/svg}circle")
    ]
    assert len(labels) == len(marks) == len(files)
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in marks]
    for line in root.iter("{http://www.w3.org/2000/svg}line"):
        if line.get("stroke") in (FAINT, LEADER):
            ends = [float(line.get(key, "")) for key in ("x1", "y1", "x2", "y2")]
            for step in range(101):
                x = ends[0] + (ends[2] - ends[0]) * step / 100
                y = ends[1] + (ends[3] - ends[1]) * step / 100
                taken.append((x, y, x, y))
    for number, label in enumerate(labels):
        for left, top, right, bottom in [*taken, *labels[:number]]:
            apart = left > label[2] or right < label[0] or top > label[3] or bottom < label[1]
            assert apart, (kind, label, (left, top, right, bottom))


def test_a_label_that_is_far_from_its_mark_has_a_line_to_it() -> None:
    def lines(*files: tuple[str, int, float]) -> int:
        return figures.distance(sized(*files)).render().count(f'stroke="{LEADER}"')

    assert lines(("A", 200_000, 0.02), ("B", 300_000, 0.002)) == 0
    assert lines(*((f"Q{number}_K", 200_000, 0.02) for number in range(12))) > 0


def compared(file: str, stock: Stock | None) -> Compared:
    return Compared(file=file, bytes=1, sensitivity="class", mixture={}, stock=stock)


def mixture(kind: str, size: int, moved: float) -> Stock:
    return Stock(type=kind, bytes=size, kl_divergence=replace(DIVERGENCE, mean=moved))


def test_distance_figure_shows_found_types_beside_llama_cpp_s_own() -> None:
    files = [measured("M-Q4_K_M.gguf", 0, 0.02), measured("M-auto.gguf", 0, 0.01)]
    same = mixture("Q4_K_M", files[0].bytes, 0.02)
    found = [
        compared("M-auto.gguf", mixture("Q5_K_M", 1_900_000_000, 0.015)),
        compared("M-other.gguf", same),  # among the files
        compared("M-third.gguf", None),
    ]
    picture = figures.distance(files, found)
    said = words(picture)
    assert {"file", "types found", "llama.cpp's mixture", "auto", "Q5_K_M"} <= set(said)
    assert said.count("Q4_K_M") == 1
    plain = figures.distance(files).render()
    assert "types found" not in plain
    # One mark each in the legend and the picture.
    kinds = [f'fill="{fill}" stroke="white"' for fill, _ in MARKS[:3]]
    assert [picture.render().count(kind) for kind in kinds] == [2, 2, 2]


def test_the_frontier_has_the_files_that_no_smaller_one_equals() -> None:
    points = [(3, 0.1), (1, 0.5), (2, 0.5), (4, 0.2), (5, 0.05), (1, 0.6)]
    files = [File("", size, moved, series=0) for size, moved in points]
    best = [(file.size, file.divergence) for file in frontier(files)]
    assert best == [(1, 0.5), (3, 0.1), (5, 0.05)]


def test_figures_say_what_was_not_measured() -> None:
    """Files too large to run must not stop a build at its last step."""
    unrun = measurement(by_n_max=())
    assert "KL divergence was not measured." in words(figures.distance([unrun]))
    assert "Speed was not measured." in words(figures.drafting([unrun]))


def test_drafting_figure_has_a_line_per_file_and_marks_what_is_recommended() -> None:
    files = [measured("M-A.gguf", 1), measured("M-B.gguf", 0), measurement(by_n_max=())]
    picture = figures.drafting(files)
    assert {"A", "B", "off", "1", "n_max", "0"} <= set(words(picture))
    root = ElementTree.fromstring(picture.render())
    rings = [
        each for each in root.iter("{http://www.w3.org/2000/svg}circle") if each.get("r") == "8.5"
    ]
    assert len(rings) == 2
    right, left = (float(ring.get("cx", "")) for ring in rings)
    assert left < right  # off lies left of 1


def test_drafting_figure_draws_the_fastest_of_each_length() -> None:
    twice = (total(0, 50.0), total(1, 60.0, 50.0), total(1, 75.0, 50.0))
    files = [replace(measured(f"M-{n}.gguf", 1), by_n_max=twice) for n in range(6)]
    lines = re.findall(r'<line [^>]*stroke="#(?!d9|1a)[^>]*>', figures.drafting(files).render())
    assert len(lines) == 6


def test_drafting_figure_of_many_files_shows_some_of_each_size() -> None:
    sizes = {"I": 97, "A": 10, "B": 20, "C": 30, "D": 40, "E": 50, "F": 90, "G": 95, "H": 96}
    many = [replace(measured(f"M-{name}.gguf", 1), bytes=size) for name, size in sizes.items()]
    found = words(figures.drafting(many))
    assert "Not shown: 3 more." in found
    assert [word for word in found if word in sizes] == ["I", "A", "B", "D", "E", "G"]


def test_tensors_figure_shows_types_and_errors(built: Path) -> None:
    file = built / "results/tiny-qwen3.5/tiny-qwen3.5-IQ4_XS.gguf"
    errors = {"blk.0.ffn_up.weight": 0.15, "blk.1.ffn_up.weight": 0.2, "output_norm.weight": 0.0}
    picture = tensors(file, errors)
    assert {"ffn_up", "IQ4_XS ×4", "Q8_0 ×1", "nextn.eh_proj"} <= set(words(picture))
    assert picture.render().count('stroke-width="3"') == 1  # only ffn_up has errors
    assert "0.0001" not in words(tensors(file, {}))  # no axis if nothing was compared


def test_tensors_figure_shows_a_type_that_gguf_py_does_not_know(tmp_path: Path) -> None:
    info = TensorInfo("blk.0.ffn_up.weight", (4, 4), UnknownType(144), stored=32)
    writer.write(tmp_path / "x.gguf", {}, [(info, [memoryview(bytes(32))])])
    assert "IQ4_KS ×1" in words(tensors(tmp_path / "x.gguf", {}))


def test_tensors_figure_needs_a_file(run: RunProgram, tmp_path: Path) -> None:
    done = run("plot.py", "tensors", tmp_path / "report.json", "--out", tmp_path / "x.svg")
    assert done.returncode == 1
    assert done.stderr == "error: plot.py tensors: add --file with the GGUF to draw\n"


@pytest.mark.parametrize(
    ("top", "last"),
    [(0.0, 0.0), (0.9, 1.0), (7.0, 8.0), (5.6, 6.0), (100.0, 100.0), (20_000.0, 20_000.0)],
)
def test_ticks_are_round_and_reach_the_top(top: float, last: float) -> None:
    found = ticks(top)
    assert found[0] == 0
    assert found[-1] == pytest.approx(last)
    assert len(found) <= 7
