"""Figure of the tensors of one file: their types, and their errors."""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

from mtpforge.gguf import split
from mtpforge.gguf.file_names import first_file
from mtpforge.report.svg import AXIS, CHARACTER, GRID, INK, PLAIN, WIDTH, Font, Svg

_CHIPS = 176.0
"""Where the types begin, to the right of the names."""
_LIGHT = (222, 235, 247)
_DARK = (0, 68, 124)
_BLOCK = re.compile(r"^blk\.\d+\.|\.weight$")


def tensors(path: Path, errors: Mapping[str, float]) -> Svg:
    """The types of the tensors of each name, with their number, and the range of their errors.

    `errors` are relative errors by tensor; empty if none was compared.
    """
    svg = Svg(
        "Tensors",
        f"{path.name.removesuffix('.gguf')}: types of the tensors of each name and their number, "
        "darker with more bits.",
    )
    if errors:
        svg.paragraph("Below: relative errors of these tensors, smallest to largest, and the mean.")
    infos = split.read(first_file(path)).tensors
    types = {name: info.type.name for name, info in infos.items()}
    bits = {info.type.name: 8 * info.size / info.elements for info in infos.values()}
    svg.y += 6
    for name, group in _by_name(types).items():
        svg.y += 16
        svg.text(10, svg.y, name)
        _chips(svg, [types[tensor] for tensor in group], bits)
        _errors(svg, [errors[tensor] for tensor in group if tensor in errors])
        svg.y += 6
    if errors:
        _error_axis(svg)
    return svg


def _by_name(names: Mapping[str, str]) -> dict[str, list[str]]:
    """Name within a block -> the tensors of all blocks."""
    groups: dict[str, list[str]] = {}
    for tensor in names:
        groups.setdefault(_BLOCK.sub("", tensor), []).append(tensor)
    return groups


def _chips(svg: Svg, types: Sequence[str], bits: Mapping[str, float]) -> None:
    """Each type with its number of tensors, most first, on as many lines as they need."""
    x = _CHIPS
    for kind, count in Counter(types).most_common():
        words = f"{kind} ×{count}"
        width = CHARACTER * len(words) + 8
        if x + width > WIDTH - 6 and x > _CHIPS:
            x = _CHIPS
            svg.y += 18
        _chip(svg, x, words, depth=min(max((bits[kind] - 2) / 14, 0), 1))
        x += width + 4


def _chip(svg: Svg, x: float, words: str, *, depth: float) -> None:
    """A label on a background; `depth` from 0 to 1 makes it darker."""
    rgb = [round(light + (dark - light) * depth) for light, dark in zip(_LIGHT, _DARK, strict=True)]
    fill = "#{:02x}{:02x}{:02x}".format(*rgb)
    svg.rect(x, svg.y - 12, CHARACTER * len(words) + 8, 16, fill)
    svg.text(x + 4, svg.y, words, Font(fill="white") if depth > 0.6 else PLAIN)


def _errors(svg: Svg, values: Sequence[float]) -> None:
    """A range of errors and their mean; nothing if all are 0."""
    if any(values):
        svg.y += 12
        svg.line((_error_x(1e-4), svg.y), (_error_x(1.0), svg.y), GRID)
        svg.line((_error_x(min(values)), svg.y), (_error_x(max(values)), svg.y), INK, 3)
        svg.mark(_error_x(sum(values) / len(values)), svg.y, 1, 3.5)


def _error_axis(svg: Svg) -> None:
    svg.y += 14
    for power in (-4, -3, -2, -1, 0):
        svg.text(_error_x(10.0**power), svg.y, f"{10.0**power:g}", AXIS, "middle")


def _error_x(value: float) -> float:
    """The x of an error on a logarithmic axis from 0.0001 to 1."""
    share = (math.log10(max(value, 1e-9)) + 4) / 4
    return 24 + (WIDTH - 48) * min(max(share, 0), 1)
