"""Figures of the report: speed, acceptance, distance from BF16, and the types of the tensors."""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mtpforge.gguf import split
from mtpforge.gguf.names import first_of
from mtpforge.gguf.quant_types import bits
from mtpforge.report.svg import BLUE, FAINT, GREY, GRID, INK, WIDE, WIDTH, Svg, ticks

LEFT, RIGHT = 40, 262  # where bars begin and end; their values stand to the right

Measurement = dict[str, Any]


def stem(found: Measurement) -> str:
    """What a file is called in a picture."""
    return str(found["file"]).removesuffix(".gguf")


def speed(measured: Sequence[Measurement]) -> Svg:
    """Tokens a second without drafting and for each n_max: a bar, through its end the spread, as a ring the cold start."""
    machine = measured[0]["machine"]
    threads = f"{measured[0]['threads']} thread" + ("s" if measured[0]["threads"] > 1 else "")
    where = ", ".join([machine["processor"], threads, *machine["devices"]])
    svg = Svg(
        "Decoding speed",
        f"Tokens a second over n_max, warm, and as a ring cold; the thin line is the spread. On {where}.",
    )
    entries = [entry for found in measured for entry in found["by_n_max"]]
    top = max(max(entry["spread"][1], entry["cold_tokens_per_second"]) for entry in entries)
    for found in measured:
        _heading(svg, stem(found))
        for entry in found["by_n_max"]:
            n_max, value = entry["n_max"], entry["tokens_per_second"]
            recommended = n_max == found["recommended_n_max"]
            y, end = svg.y, LEFT + (RIGHT - LEFT) * value / top
            weight = "bold" if recommended else "normal"
            svg.text(LEFT - 6, y + 12, str(n_max or "off"), anchor="end", weight=weight)
            svg.rect(LEFT, y + 1, end - LEFT, 14, GREY if n_max == 0 else BLUE)
            low, high = (LEFT + (RIGHT - LEFT) * bound / top for bound in entry["spread"])
            svg.line(low, y + 8, high, y + 8, INK, 2)
            svg.ring(LEFT + (RIGHT - LEFT) * entry["cold_tokens_per_second"] / top, y + 8)
            svg.text(
                RIGHT + 45,
                y + 12,
                f"{value:,.0f}" if value >= 100 else f"{value:.1f}",
                anchor="end",
                weight=weight,
            )
            svg.text(
                WIDTH - 6,
                y + 12,
                f"{entry['speedup']:.2f}×" if n_max else "",
                anchor="end",
                weight=weight,
            )
            svg.y += 19
        advice = (
            f"recommended: n_max {found['recommended_n_max']}"
            if found["recommended_n_max"]
            else "recommended: no drafting"
        )
        why = str(found["verdict"]).split(":")[0]
        svg.paragraph(f"{advice} ({why})", fill=INK)
    return svg


def acceptance(measured: Sequence[Measurement]) -> Svg:
    """The share of drafted tokens that is accepted, for each n_max and kind of prompt."""
    kinds = sorted({run["kind"] for found in measured for run in found["runs"]})
    svg = Svg(
        "Acceptance",
        "Share of the drafted tokens that were accepted, over n_max; to the right, of all kinds of prompts.",
    )
    svg.legend(kinds)
    for found in measured:
        drafting = [entry for entry in found["by_n_max"] if entry["acceptance"] is not None]
        if not drafting:
            continue
        _heading(svg, stem(found))
        height = max(28, 8 * len(kinds) + 4)
        bottom = svg.y + height * len(drafting)
        for percent in (0, 25, 50, 75, 100):
            x = _across(percent / 100)
            svg.line(x, svg.y, x, bottom, GRID)
            svg.text(x, bottom + 13, f"{percent}%", 11, FAINT, "middle")
        for entry in drafting:
            y = svg.y + height / 2
            svg.text(LEFT - 6, y + 4, str(entry["n_max"]), anchor="end")
            for run in found["runs"]:
                if (run["n_max"], run["state"]) == (entry["n_max"], "warm") and run[
                    "acceptance"
                ] is not None:
                    number = kinds.index(
                        run["kind"]
                    )  # below one another, for they are often nearly equal
                    svg.mark(
                        _across(run["acceptance"]),
                        y + (number - (len(kinds) - 1) / 2) * 8,
                        number,
                        3.5,
                    )
            svg.text(RIGHT + 18, y + 4, f"{entry['acceptance']:.1%}")
            svg.y += height
        svg.y += 18
        if positions := drafting[-1]["by_position"]:
            shares = ", ".join(f"{share:.0%}" for share in positions)
            svg.paragraph(f"by position at n_max {drafting[-1]['n_max']}: {shares}", fill=INK)
    return svg


def distance(measured: Sequence[Measurement]) -> Svg:
    """Size against KL divergence from BF16; a logarithmic axis, with what is nearer than a millionth at its foot."""
    svg = Svg(
        "Size and distance from BF16",
        "KL divergence of the predictions (mean, nats; lower is better) over the file's size.",
    )
    points = [
        (found["bytes"], max(found["kl_divergence"]["mean"], 0.0), stem(found))
        for found in measured
    ]
    far = [value for _, value, _ in points if value >= 1e-6]
    low, high = (
        (math.floor(math.log10(min(far))), math.ceil(math.log10(max(far)) + 1e-9))
        if far
        else (-4, -1)
    )
    unit, name = (1e9, "GB") if max(size for size, _, _ in points) >= 1e9 else (1e6, "MB")
    sizes = ticks(max(size for size, _, _ in points) / unit)
    left, right, top, bottom = 52.0, WIDTH - 16.0, svg.y + 8, svg.y + 248

    def across(size: float) -> float:
        return left + (right - left) * size / unit / sizes[-1]

    def down(value: float) -> float:
        return (
            bottom
            if value < 1e-6
            else bottom - 24 - (math.log10(value) - low) / (high - low) * (bottom - 24 - top)
        )

    for power in range(low, high + 1):
        y = down(10.0**power)
        svg.line(left, y, right, y, GRID)
        svg.text(left - 6, y + 4, f"{10.0**power:g}", 11, FAINT, "end")
    svg.line(left, bottom, right, bottom, INK)
    svg.text(left - 6, bottom + 4, "0", 11, FAINT, "end")
    for size in sizes:
        svg.text(across(size * unit), bottom + 16, f"{size:g}", 11, FAINT, "middle")
    svg.text(right, bottom + 32, name, 11, FAINT, "end")
    taken: list[tuple[float, float, float]] = []
    prefix = len(_common([name for _, _, name in points]))
    for size, value, name in sorted(points, key=lambda point: -point[1]):
        x, y = across(size), down(value)
        _label(svg, x, y, name[prefix:], taken, top, bottom)
        svg.mark(x, y, 0, 5)
    svg.y = bottom + 34
    return svg


def _label(
    svg: Svg,
    x: float,
    y: float,
    words: str,
    taken: list[tuple[float, float, float]],
    top: float,
    bottom: float,
) -> None:
    """Words beside a point, where no others are yet: to its right if they fit, else to its left, or as near as can be."""
    width = WIDE * len(words)
    begins = [x + 9, x - 9 - width] if x + 9 + width < WIDTH - 4 else [x - 9 - width]
    y = min(y, bottom - 8)  # above the axis
    places = [
        (begin, y + 4 + shift) for shift in (0, -14, 14, -28, 28, -42, 42) for begin in begins
    ]
    free = [
        (begin, line)
        for begin, line in places
        if top <= line <= bottom + 4
        and begin > 52
        and all(begin > b or begin + width < a or abs(line - h) > 13 for a, b, h in taken)
    ]
    begin, line = (free or places)[0]
    taken += [(begin, begin + width, line), (x - 6, x + 6, y + 4)]
    svg.text(begin, line, words)


def tensors(path: Path, known: dict[str, float]) -> Svg:
    """Of each kind of tensor its types, with how many blocks have them, and the range of its relative errors."""
    opened = split.read(first_of(path))
    name = path.name.removesuffix(".gguf")
    svg = Svg(
        "Tensors",
        f"{name}: types of the tensors of each name, darker with more bits, and how many there are of each.",
    )
    if known:
        svg.paragraph(
            "Below them the relative error, from the least to the largest of these tensors, and their mean."
        )
    roles: dict[str, list[str]] = {}
    for tensor in opened.tensors:
        roles.setdefault(re.sub(r"^blk\.\d+\.|\.weight$", "", tensor), []).append(tensor)
    svg.y += 6
    for role, names in roles.items():
        svg.y += 16
        svg.text(10, svg.y, role)
        x = 176.0
        for kind, count in Counter(opened.tensors[each].type.name for each in names).most_common():
            x = _chip(svg, x, kind, count)
        _errors(svg, [known[each] for each in names if each in known])
        svg.y += 6
    if known:
        svg.y += 14
        for power in (-4, -3, -2, -1, 0):
            svg.text(_error_across(10.0**power), svg.y, f"{10.0**power:g}", 11, FAINT, "middle")
    return svg


def _chip(svg: Svg, x: float, kind: str, count: int) -> float:
    """A type with how many tensors have it, at the right of those before it; where it ends."""
    words = f"{kind} ×{count}"
    width = WIDE * len(words) + 8
    if x + width > WIDTH - 6 and x > 176:
        svg.y, x = svg.y + 18, 176.0
    depth = min(max((bits(kind) - 2) / 14, 0), 1)
    fill = "#{:02x}{:02x}{:02x}".format(
        *(
            round(light + (dark - light) * depth)
            for light, dark in ((222, 0), (235, 68), (247, 124))
        )
    )
    svg.rect(x, svg.y - 12, width, 16, fill)
    svg.text(x + 4, svg.y, words, fill="white" if depth > 0.6 else INK)
    return x + width + 4


def _error_across(value: float) -> float:
    return 24 + (WIDTH - 48) * min(max((math.log10(max(value, 1e-9)) + 4) / 4, 0), 1)


def _errors(svg: Svg, values: Sequence[float]) -> None:
    """A range of relative errors on a logarithmic axis from 0.0001 to 1; nothing where all are 0."""
    if any(values):
        svg.y += 12
        svg.line(_error_across(1e-4), svg.y, _error_across(1.0), svg.y, GRID)
        svg.line(_error_across(min(values)), svg.y, _error_across(max(values)), svg.y, INK, 3)
        svg.mark(_error_across(sum(values) / len(values)), svg.y, 1, 3.5)


def _heading(svg: Svg, words: str) -> None:
    svg.y += 24
    svg.text(10, svg.y, words, 13, weight="bold")
    svg.y += 6


def _across(share: float) -> float:
    return LEFT + (RIGHT - LEFT) * share


def _common(names: Sequence[str]) -> str:
    """What all names begin with, up to a hyphen; nothing where there is one name only."""
    first, last = min(names), max(names)
    length = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), 0)
    return first[: first[:length].rfind("-") + 1]


FIGURES: dict[str, Callable[[Sequence[Measurement]], Svg]] = {
    "speed": speed,
    "acceptance": acceptance,
    "distance": distance,
}
