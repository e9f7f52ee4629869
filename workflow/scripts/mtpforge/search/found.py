"""The mixture that is found for a size: an ordinary recipe with exact names."""

import re
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar

from gguf.constants import GGMLQuantizationType

from mtpforge.errors import ConfigError
from mtpforge.gguf import quant_types, reader, writer
from mtpforge.gguf.metadata import Value
from mtpforge.gguf.reader import Gguf, aligned, drop_leading_ones
from mtpforge.io.records import UNLESS_NONE, Record
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.quantize.assembly import merged_metadata
from mtpforge.quantize.llama_quantize import default_and_chosen_types, run, without_vocabulary
from mtpforge.quantize.mixture import Types
from mtpforge.quantize.recipe import head_recipe, head_types
from mtpforge.quantize.request import QuantizeRequest
from mtpforge.search import groups
from mtpforge.search.allocate import Option, allocate
from mtpforge.search.compared import HeadCost
from mtpforge.search.errors import Errors

STOCK = (
    "Q2_K",
    "Q3_K_S",
    "Q3_K_M",
    "IQ4_XS",
    "Q4_K_S",
    "Q4_K_M",
    "Q5_K_S",
    "Q5_K_M",
    "Q6_K",
    "Q8_0",
)
"""File types that a size in bytes is compared with. Q3_K_L, as large as IQ4_XS, is worse."""
HEADS = ("BF16", "Q8_0", "Q4_K")
"""Types of a head whose costs are compared."""


@dataclass(frozen=True, kw_only=True)
class Found(Record):
    """What allocate.py writes beside the recipe."""

    written_by: ClassVar[str] = "allocate.py"
    asked: int
    """Bytes that the file may have."""
    bytes: int
    sensitivity: str
    """How it was found: prior, class or tensor."""
    mixture: dict[str, dict[str, int]]
    """Class of tensors: the number of tensors at each type, finest first."""
    stock: Annotated[str | None, UNLESS_NONE] = None
    """The largest file type of llama.cpp that is no larger than asked, to compare with."""
    head: Annotated[HeadCost | None, UNLESS_NONE] = None
    """None without a head."""


@dataclass(frozen=True)
class Sizes:
    """The exact size of each quantized file of a source."""

    source: Gguf
    metadata: Mapping[str, Value]

    def of(self, types: Types) -> int:
        """Bytes of the file with these types."""
        infos = [
            replace(info, shape=drop_leading_ones(info.shape), type=types[name])
            for name, info in self.source.tensors.items()
        ]
        return writer.size(self.metadata, infos)

    @classmethod
    def measure(cls, source: Gguf, request: QuantizeRequest, llama: LlamaCpp) -> "Sizes":
        """With the metadata that llama-quantize writes. Raises ToolchainError."""
        name = min(source.tensors, key=lambda each: source.tensors[each].size)
        part = reader.select_tensors(source, [name])
        types = {name: part.tensors[name].known_type}
        with tempfile.TemporaryDirectory() as scratch:
            path, out = Path(scratch, "part.gguf"), Path(scratch, "made.gguf")
            contents = reader.contents(part)
            metadata = writer.padded(without_vocabulary(source), contents, part)
            part = writer.write_scratch(path, metadata, contents)
            made = run(
                part,
                out,
                types=types,
                file_type=request.file_type,
                matrix=request.imatrix,
                llama=llama,
            )
        return cls(source, merged_metadata(source, made))


def stock_types(source: Gguf, request: QuantizeRequest, llama: LlamaCpp) -> Types:
    """The types of the file of the request's type without a recipe. Raises ForgeError."""
    return default_and_chosen_types(source, replace(request, recipe=()), llama)[1]


def largest_stock(sizes: Sizes, request: QuantizeRequest, most: int, llama: LlamaCpp) -> str | None:
    """The largest stock type of at most these bytes; None if none is so small."""
    fitting: list[tuple[int, str]] = []
    for kind in STOCK:
        types = stock_types(sizes.source, replace(request, file_type=kind), llama)
        if (size := sizes.of(types)) <= most:
            fitting.append((size, kind))
    return max(fitting)[1] if fitting else None


def choose(
    sizes: Sizes,
    start: Types,
    errors: Sequence[Errors],
    sensitivities: Mapping[str, float],
    most: int,
) -> Types:
    """The types of all tensors with the least loss, in a file of at most these bytes.

    `errors` are those of the candidates, whose order decides nothing; other tensors have the types
    of `start`. Raises ConfigError if the file cannot be so small, or if a tensor can have none of
    the candidates.
    """
    source = sizes.source
    units = groups.units(source)
    options = [
        _options(source, names, errors, sensitivities[unit]) for unit, names in units.items()
    ]
    for unit, found in zip(units, options, strict=True):
        if not found:
            raise ConfigError(f"{source.path}: {unit} can have none of the candidates: add one")
    names = [name for members in units.values() for name in members]
    fixed = sizes.of(start) - sum(_bytes(source, name, start[name].name) for name in names)
    least = fixed + sum(min(option.bytes for option in found) for found in options)
    if least > most:
        has_head = bool(source.head.tensors)
        with_head, or_head = ("with this head, ", " or a smaller head") if has_head else ("", "")
        raise ConfigError(
            f"{source.path}: cannot fit into {most:,} bytes: {with_head}the smallest candidates "
            f"make {least:,}: ask for a larger file, or give smaller candidates{or_head}"
        )
    chosen = allocate(options, most - fixed)
    by_type = {each.type: each for each in errors}
    types = dict(start)
    for members, option in zip(units.values(), chosen, strict=True):
        of_tensor = by_type[option.type].tensors
        types |= {name: GGMLQuantizationType[of_tensor[name].type] for name in members}
    return types


def _options(
    source: Gguf, names: Sequence[str], errors: Sequence[Errors], sensitivity: float
) -> list[Option]:
    """The candidates that all tensors of a unit can have."""
    return [
        Option(
            each.type,
            bytes=sum(_bytes(source, name, each.tensors[name].type) for name in names),
            loss=sensitivity * sum(each.tensors[name].error for name in names),
        )
        for each in errors
        if all(name in each.tensors for name in names)
    ]


def _bytes(source: Gguf, name: str, kind: str) -> int:
    return aligned(replace(source.tensors[name], type=GGMLQuantizationType[kind]).size)


def expected_loss(
    source: Gguf, types: Types, errors: Sequence[Errors], sensitivities: Mapping[str, float]
) -> float:
    """The sum of the losses that these types of the trunk cause."""
    known = {
        (name, found.type): found.error for each in errors for name, found in each.tensors.items()
    }
    return sum(
        sensitivities[unit] * known[name, types[name].name]
        for unit, names in groups.units(source).items()
        for name in names
    )


def head_cost(
    sizes: Sizes,
    types: Types,
    errors: Sequence[Errors],
    sensitivities: Mapping[str, float],
    most: int,
) -> HeadCost | None:
    """What the head costs the trunk of the chosen `types`; None without a head."""
    source = sizes.source
    own = {types[name].name for name in head_types(source, head_recipe(HEADS[0]))}
    loss = expected_loss(source, types, errors, sensitivities)
    if not own or not loss:
        return None
    beside = {}
    for kind in HEADS:
        with suppress(ConfigError):  # it does not fit
            other = choose(sizes, _with_head(source, types, kind), errors, sensitivities, most)
            beside[kind] = expected_loss(source, other, errors, sensitivities) / loss
    size = sum(_bytes(source, name, types[name].name) for name in source.head.tensors)
    trunk = {kind: share for kind, share in beside.items() if own != {kind}}
    return HeadCost(types=sorted(own), bytes=size, trunk=trunk)


def _with_head(source: Gguf, types: Types, kind: str) -> Types:
    head = head_types(source, head_recipe(kind))
    changed = {
        name: GGMLQuantizationType[quant_types.effective_type(kind, source.tensors[name].shape[-1])]
        for name in head
    }
    return {**types, **changed}


def recipe(source: Gguf, types: Types) -> dict[str, str]:
    """The types of all matrices of the trunk, by patterns that match exactly one name."""
    return {rf"^{re.escape(name)}$": types[name].name for name in groups.matrices(source)}


def mixture(source: Gguf, types: Types) -> dict[str, dict[str, int]]:
    """For each class of tensors the number of tensors at each type, finest first."""
    counts: dict[str, Counter[str]] = {}
    for name in groups.matrices(source):
        counts.setdefault(groups.class_of(name), Counter())[types[name].name] += 1
    order = quant_types.TENSOR_TYPES
    return {
        name: {kind: found[kind] for kind in order if found[kind]} for name, found in counts.items()
    }
