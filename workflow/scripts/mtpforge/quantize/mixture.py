"""The mixture of types that a quantization will have, as `llama-quantize --dry-run` prints it.

It is parsed, shown as a table, and checked against the importance matrix before any quantizing.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from math import prod
from pathlib import Path

from gguf.constants import GGMLQuantizationType

from mtpforge import table
from mtpforge.errors import ConfigError, ToolchainError
from mtpforge.gguf import quant_types
from mtpforge.gguf.reader import Gguf, TensorInfo
from mtpforge.quantize.request import QuantizeRequest

Types = Mapping[str, GGMLQuantizationType]
"""The type of each tensor, by its name."""

# A line, here broken in two:
# [   2/  70] token_embd.weight  - [   256,   1280,      1,      1], type =   bf16,
# size =     0.62 MiB ->     0.21 MiB (q5_K)
_ROW = re.compile(
    r"\[ *\d+/ *\d+\] (?P<name>\S+) +- \[[ \d,]+\], type = +(?P<old>\w+), "
    r"size = +[\d.]+ MiB( -> +[\d.]+ MiB \((?P<new>\w+)\))?"
)

_BLOCK = re.compile(r"^blk\.(\d+)\.")


def parse(output: str, source: Gguf) -> Types:
    """The type that each tensor of `source` will have, in the order of the quantized file.

    Raises ToolchainError if the output of the dry run is not as expected.
    """
    types: dict[str, GGMLQuantizationType] = {}
    for line in output.split("\n"):
        if line.startswith("["):
            name, kind = _parse_row(line, source)
            if name in types:
                raise _not_understood(line)
            types[name] = kind
    if missing := [name for name in source.tensors if name not in types]:
        raise ToolchainError(
            f"llama-quantize --dry-run does not list {missing[0]}: is it another version?"
        )
    return types


def show(source: Gguf, default: Types, chosen: Types) -> str:
    """A table of tensor, default type, chosen type and size.

    A tensor has one row for all blocks with the same types; tensors that keep their type share one.
    """
    groups: dict[tuple[str, str, str], list[str]] = {}
    unchanged: list[str] = []
    for name, info in source.tensors.items():
        if default[name] == chosen[name] == info.type:
            unchanged.append(name)
        else:
            key = (_BLOCK.sub("blk.{}.", name), default[name].name, chosen[name].name)
            groups.setdefault(key, []).append(name)
    rows = [("tensor", "default", "chosen", "size")]
    for (pattern, old, new), names in groups.items():
        blocks = _ranges([int(block[1]) for block in map(_BLOCK.match, names) if block])
        label = pattern.replace("{}", blocks, 1)
        rows.append((label, old, new, table.size(_size(source, chosen, names))))
    rest = table.size(_size(source, chosen, unchanged))
    rows.append((f"{len(unchanged)} others, unchanged", "", "", rest))
    return table.markdown([*rows, _totals(source, default, chosen)])


def check_imatrix(
    source: Gguf, chosen: Types, request: QuantizeRequest, rows: Mapping[str, int]
) -> None:
    """Check that the importance matrix covers every tensor that cannot be quantized without it.

    `rows` has the number of values in the importance matrix for each tensor. Raises ConfigError,
    naming the tensors, also if a row has the wrong length.
    """
    changed = {name: info for name, info in source.tensors.items() if chosen[name] != info.type}
    unfit = [name for name, info in changed.items() if rows.get(name) != _row_length(info)]
    # llama-quantize ignores rows of embeddings.
    wrong = [name for name in unfit if name in rows and name not in quant_types.EMBEDDINGS[:2]]
    missing = [
        f"{name} ({chosen[name].name})"
        for name in unfit
        if quant_types.needs_imatrix(name, chosen[name].name, request.file_type)
    ]
    if wrong or (request.imatrix and not rows.keys() & source.tensors.keys()):
        raise _of_another_model(source, request.imatrix, wrong or list(rows))
    if missing:
        lacking = f"{request.imatrix} has no row for" if request.imatrix else "there is none for"
        raise ConfigError(
            f"{source.path} as {request.file_type} needs an importance matrix, and {lacking} "
            f"{_some(missing)}: give these tensors another type (`tensors:`, `head:`), or use an "
            "importance matrix (`imatrix:`) that covers them"
        )


def check_total(source: Gguf, matrix: Path, rows: Mapping[str, int]) -> None:
    """Check that an importance matrix has no more values than the model has weights.

    It takes no more time to check the values then. Raises ConfigError.
    """
    if sum(rows.values()) > sum(info.elements for info in source.tensors.values()):
        raise _of_another_model(source, matrix, list(rows))


def total(source: Gguf, types: Types) -> str:
    """Size and bits per weight of the tensors of `source` in `types`, in words."""
    size = _size(source, types, source.tensors)
    weights = sum(info.elements for info in source.tensors.values())
    return f"{table.size(size)}, {8 * size / weights:.2f} bits per weight"


def _of_another_model(source: Gguf, matrix: Path | None, names: list[str]) -> ConfigError:
    return ConfigError(
        f"{matrix}: importance matrix of another model: {source.path} has no matching "
        f"{_some(names)}"
    )


def _parse_row(line: str, source: Gguf) -> tuple[str, GGMLQuantizationType]:
    row = _ROW.fullmatch(line)
    info = source.tensors.get(row["name"]) if row else None
    if row is None or info is None or info.type.name != row["old"].upper():
        raise _not_understood(line)
    kind = (row["new"] or row["old"]).upper()
    if kind not in GGMLQuantizationType.__members__:
        raise _not_understood(line)
    return info.name, GGMLQuantizationType[kind]


def _not_understood(line: str) -> ToolchainError:
    return ToolchainError(
        "cannot parse the output of llama-quantize --dry-run: is it another version? "
        f"It printed {line!r}"
    )


def _totals(source: Gguf, default: Types, chosen: Types) -> tuple[str, str, str, str]:
    weights = sum(info.elements for info in source.tensors.values())
    sizes = [_size(source, types, source.tensors) for types in (default, chosen)]
    before, after = (f"{8 * size / weights:.2f}" for size in sizes)
    return "total, in bits per weight", before, after, table.size(sizes[1])


def _size(source: Gguf, types: Types, names: Iterable[str]) -> int:
    """Bytes of these tensors at these types."""
    return sum(replace(source.tensors[name], type=types[name]).size for name in names)


def _row_length(info: TensorInfo) -> int:
    """Values of an importance matrix for a tensor: one per column of each expert."""
    return info.shape[-1] * prod(info.shape[:-2])


def _ranges(numbers: list[int]) -> str:
    """0, 1, 2, 3 and 7 as {0-3,7}, a single number as itself."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(f"{first}-{last}" if first < last else str(first) for first, last in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"


def _some(names: list[str]) -> str:
    """The first three names, and the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
