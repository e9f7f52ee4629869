"""Pictures are well-formed, as wide as a phone, and say in words what they show in colours."""

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from mtpforge.report import figures
from mtpforge.report.svg import WIDE, WIDTH, Svg, ticks

TEXT, RECT = "{http://www.w3.org/2000/svg}text", "{http://www.w3.org/2000/svg}rect"


def measured(file: str, recommended: int, divergence: float = 0.01) -> dict[str, Any]:
    def entry(n_max: int, speed: float) -> dict[str, Any]:
        share = 0.9 if n_max else None
        spread = [speed - 1, speed + 1]
        speeds = {
            "tokens_per_second": speed,
            "spread": spread,
            "cold_tokens_per_second": speed / 2,
            "speedup": speed / 50,
        }
        return {"n_max": n_max, **speeds, "acceptance": share, "by_position": [0.9] * n_max}

    kinds = ("code", "prose", "structured")
    runs = [{"n_max": 1, "state": "warm", "kind": kind, "acceptance": 0.9} for kind in kinds]
    return {
        "file": file, "bytes": 2_000_000_000, "threads": 1, "machine": {"processor": "A <fast> one", "devices": []},
        "by_n_max": [entry(0, 50.0), entry(1, 75.0 if recommended else 40.0)], "runs": runs, "recommended_n_max": recommended,
        "verdict": "1.50 times as fast as without drafting: x" if recommended else "slower than without: x",
        "kl_divergence": {"mean": divergence},
    }  # fmt: skip


def words(picture: Svg) -> list[str]:
    root = ElementTree.fromstring(picture.render())
    assert root.get("width") == str(WIDTH)
    for text in root.iter(TEXT):
        width = WIDE / 12 * float(text.get("font-size", "12")) * len(text.text or "") * 0.9
        begin = (
            float(text.get("x", "0"))
            - {"start": 0.0, "middle": 0.5, "end": 1.0}[text.get("text-anchor", "")] * width
        )
        assert begin >= -8 and begin + width <= WIDTH + 12, text.text
    return [text.text or "" for text in root.iter(TEXT)]


def test_speed_says_what_to_serve_with() -> None:
    found = words(figures.speed([measured("M-A.gguf", 1), measured("M-B.gguf", 0)]))
    assert "recommended: n_max 1 (1.50 times as fast as" in " ".join(found) and "1.50×" in found
    assert "recommended: no drafting (slower than without)" in found and "0.80×" in found
    assert "On A <fast> one, 1 thread." in " ".join(found)


def test_acceptance_is_of_each_kind() -> None:
    picture = figures.acceptance([measured("M-A.gguf", 1)])
    assert {"code", "prose", "structured", "90.0%", "by position at n_max 1: 90%"} <= set(
        words(picture)
    )
    assert (
        picture.render().count("<circle") == picture.render().count("<polygon") == 2
    )  # in the legend, and at n_max 1


def test_more_kinds_than_three_keep_apart() -> None:
    kinds = ["code", "prose", "structured", "dialogue", "mathematics", "translation"]
    found = measured("M-A.gguf", 1)
    picture = figures.acceptance(
        [{**found, "runs": [{**found["runs"][0], "kind": kind} for kind in kinds]}]
    )
    assert set(kinds) <= set(words(picture))
    places = [
        float(y) for y in re.findall(r'<circle cx="[0-9.]+" cy="([0-9.]+)"', picture.render())
    ]
    assert (
        len(places) == 6 and len({*places[3:]}) == 3
    )  # three of six are circles: in the legend, and below one another


@pytest.mark.parametrize("divergences", [(0.0,), (0.0, 0.02), (0.0, 1e-9), (0.1, 0.1, 0.1, 1e-5)])
def test_distances_of_all_files_are_named(divergences: tuple[float, ...]) -> None:
    names = [f"M-V{number}" for number in range(len(divergences))]
    found = words(
        figures.distance(
            [
                measured(f"{name}.gguf", 0, value)
                for name, value in zip(names, divergences, strict=True)
            ]
        )
    )
    assert set(names if len(names) == 1 else [name[2:] for name in names]) <= set(found)


def test_tensors_have_their_types_and_errors(built: Path) -> None:
    file = built / "results/tiny-qwen3.5/tiny-qwen3.5-IQ3_S-mix.gguf"
    picture = figures.tensors(
        file, {"blk.0.ffn_up.weight": 0.15, "blk.1.ffn_up.weight": 0.2, "output_norm.weight": 0.0}
    )
    assert {"ffn_up", "IQ3_S ×4", "BF16 ×1", "nextn.eh_proj"} <= set(words(picture))
    assert picture.render().count('stroke-width="3"') == 1  # the one name with errors
    assert "0.0001" not in words(figures.tensors(file, {}))  # no axis where nothing was compared


@pytest.mark.parametrize(
    ("top", "last"),
    [(0.0, 0.0), (0.9, 1.0), (7.0, 8.0), (5.6, 6.0), (100.0, 100.0), (20_000.0, 20_000.0)],
)
def test_ticks_are_round_and_reach_the_top(top: float, last: float) -> None:
    found = ticks(top)
    assert found[0] == 0 and found[-1] == pytest.approx(last) and len(found) <= 7
