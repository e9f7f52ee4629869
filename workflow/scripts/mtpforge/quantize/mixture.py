"""The mixture of types that a quantization will have, as `llama-quantize --dry-run` says it: read, shown, and held against an
importance matrix before anything is quantized.
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
from mtpforge.gguf.reader import Gguf

Types = Mapping[str, GGMLQuantizationType]
"""A type for each tensor's name."""

# [   2/  70] token_embd.weight  - [   256,   1280,      1,      1], type =   bf16, size =     0.62 MiB ->     0.21 MiB (q5_K)
_ROW = re.compile(
    r"\[ *\d+/ *\d+\] (?P<name>\S+) +- \[[ \d,]+\], type = +(?P<old>\w+), size = +[\d.]+ MiB( -> +[\d.]+ MiB \((?P<new>\w+)\))?"
)

_BLOCK = re.compile(r"^blk\.(\d+)\.")


def parse(output: str, source: Gguf) -> Types:
    """The type that each tensor of `source` will have, in the order in which they will be written.

    Raises ToolchainError for what is not said as expected.
    """
    types = {}
    for line in output.split("\n"):
        if not line.startswith("["):
            continue
        row = _ROW.fullmatch(line)
        name = row["name"] if row else ""
        kind = (row["new"] or row["old"]).upper() if row else ""
        known = (
            row is not None
            and name in source.tensors
            and source.tensors[name].type.name == row["old"].upper()
        )
        if not known or name in types or kind not in GGMLQuantizationType.__members__:
            raise ToolchainError(
                f"llama-quantize --dry-run is not understood: is it of another version? It said {line!r}"
            )
        types[name] = GGMLQuantizationType[kind]
    if missing := [name for name in source.tensors if name not in types]:
        raise ToolchainError(
            f"llama-quantize --dry-run says nothing of {missing[0]}: is it of another version?"
        )
    return types


def show(source: Gguf, default: Types, chosen: Types) -> str:
    """A table of tensor, default type, chosen type and size; a tensor that many blocks have, and all that stay, share a row."""

    def size(types: Types, names: Iterable[str]) -> int:
        return sum(replace(source.tensors[name], type=types[name]).size for name in names)

    groups: dict[tuple[str, str, str], list[str]] = {}
    rest = []
    for name, info in source.tensors.items():
        if default[name] == chosen[name] == info.type:
            rest.append(name)
        else:
            groups.setdefault(
                (_BLOCK.sub("blk.{}.", name), default[name].name, chosen[name].name), []
            ).append(name)
    rows = [("tensor", "default", "chosen", "size")]
    for (name, old, new), names in groups.items():
        blocks = _ranges([int(block[1]) for block in map(_BLOCK.match, names) if block])
        rows.append((name.replace("{}", blocks, 1), old, new, table.size(size(chosen, names))))
    rows.append((f"{len(rest)} others, as they are", "", "", table.size(size(chosen, rest))))
    weights = sum(info.elements for info in source.tensors.values())
    bits = [f"{8 * size(types, source.tensors) / weights:.2f}" for types in (default, chosen)]
    return table.markdown(
        [*rows, ("all, in bits per weight", *bits, table.size(size(chosen, source.tensors)))]
    )


def _ranges(numbers: list[int]) -> str:
    """0, 1, 2, 3 and 7 as {0-3,7}, one number as itself."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    text = ",".join(f"{first}-{last}" if first < last else str(first) for first, last in runs)
    return text if len(numbers) == 1 else f"{{{text}}}"


def check_imatrix(
    source: Gguf, chosen: Types, file_type: str, imatrix: Path | None, rows: Mapping[str, int]
) -> None:
    """Every tensor that cannot be quantized without has a row in the importance matrix, and no row has a wrong length.

    `rows` are the numbers of values that `imatrix` has, by tensor. Raises ConfigError, naming the tensors.
    """
    missing, wrong = [], []
    for name, info in source.tensors.items():
        if chosen[name] == info.type:
            continue
        fits = rows.get(name) == info.shape[-1] * prod(
            info.shape[:-2]
        )  # a value for each column of each expert
        if (
            name in rows and not fits and name not in quant_types.EMBEDDINGS[:2]
        ):  # of embeddings such a row is ignored
            wrong.append(name)
        elif not fits and quant_types.needs_imatrix(name, chosen[name].name, file_type):
            missing.append(f"{name} ({chosen[name].name})")
    if wrong or (imatrix and not rows.keys() & source.tensors.keys()):
        named = _some(wrong or list(rows))
        raise ConfigError(
            f"{imatrix}: is the importance matrix of another model: {source.path} has nothing like its {named}"
        )
    if missing:
        lack = f"{imatrix} has none for" if imatrix else "there is none for"
        raise ConfigError(
            f"{source.path} as {file_type} needs an importance matrix, and {lack} {_some(missing)}: give these tensors another type"
            " (`tensors:`, `head:`), or take an importance matrix (`imatrix:`) that covers them"
        )


def _some(names: list[str]) -> str:
    """The first few of them, and how many there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
