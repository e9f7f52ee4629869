"""Is a finished GGUF what was asked for, and does its head draft? One verdict per check, and no result without all of them.

A file with a head that is there but wrong loads without a message. So its inventory, types and values are compared with the
checkpoint, and a real llama-server must draft with it and have drafts accepted.
"""

import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from . import convert, gguf_file, inject, programs, quant_types, server
from .checkpoint import Checkpoint
from .errors import ForgeError, GgufError, VerificationError
from .families import Hparams, family_of
from .gguf_file import Gguf, squeezed
from .quantize import Recipe, head_blocks, quantizable
from .ranges import CHUNK, FileRange, sha256

N_PREDICT = 200
GATE = 1.5  # times the error that a type has on heavy-tailed weights
ROW_GATE = 0.9  # a row in the wrong place differs from the right one by 1.41 of its size, a coarse quantization by half


@dataclass(frozen=True)
class Check:
    """One verdict, and in words what it rests on."""

    name: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Request:
    """What the file should be: None where nothing was said, and then the check that needs it is left out."""

    checkpoint: Path | None = None
    base: Path | None = None
    file_type: str | None = None
    head: str | None = None
    recipe: Recipe = ()
    prompts: tuple[str, ...] = ()
    min_acceptance: float = 0.1
    threads: int = 1
    reference: Path | None = None
    """In place of a checkpoint whose architecture has no family: the BF16 GGUF that upstream made and that is proven."""
    undrafted: str | None = None
    """Why the runtime cannot draft with this architecture, where it cannot: then loading has to do."""


def verify(path: Path, request: Request, bin_dir: Path = programs.DEFAULT_BIN) -> dict[str, Any]:
    """The report on `path`. Raises VerificationError, naming each failed check, where it must not be published."""
    opened = gguf_file.read(path)
    if not head_blocks(opened):
        raise VerificationError(f"{path}: has no head: nextn_predict_layers is missing")
    checks = [check_types(opened, request)]
    if request.checkpoint:
        checks += check_against_checkpoint(opened, Checkpoint(request.checkpoint))
    if request.reference:
        checks += check_against_reference(opened, gguf_file.read(request.reference))
    if request.base:
        checks.append(check_base(opened, gguf_file.read(request.base)))
    drafting, measured = check_drafting(opened, request, bin_dir)
    checks.append(drafting)
    if failed := [check for check in checks if not check.passed]:
        raise VerificationError(f"{path.name} is not published: " + "; ".join(f"{c.name}: {c.detail}" for c in failed))
    return {**summary(opened), **measured, "checks": [asdict(check) for check in checks]}


def summary(opened: Gguf) -> dict[str, Any]:
    """Name, size in bytes, bits per weight, sha256, types of the head and of all tensors, counted."""
    infos = opened.tensors.values()
    types = [info.type.name for info in infos]
    size = opened.path.stat().st_size
    return {
        "file": opened.path.name,
        "bytes": size,
        "sha256": sha256(FileRange(opened.path, 0, size)),
        "bits_per_weight": round(8 * sum(info.size for info in infos) / sum(info.elements for info in infos), 3),
        "head": "/".join(sorted(inject.types_of(inject.head_only(opened)))),
        "types": {name: types.count(name) for name in sorted(set(types))},
    }


def check_types(opened: Gguf, request: Request) -> Check:
    """File type, head type and recipe are what was asked for."""
    wrong: list[str] = []
    wanted = quant_types.FILE_TYPES[quant_types.check_file_type(request.file_type)] if request.file_type else None
    if request.file_type and opened.get("general.file_type") != wanted:
        wrong.append(f"general.file_type is {opened.get('general.file_type')}, not that of {request.file_type}")
    head = inject.head_only(opened).tensors
    for name, info in opened.tensors.items():
        if not quantizable(info):
            continue
        asked = request.head if name in head else _by_recipe(name, request.recipe)
        if asked and info.type.name != asked:
            wrong.append(f"{name} is {info.type.name}, not {asked}")
    return Check("types", not wrong, _some(wrong) or f"{len(opened.tensors)} tensors, head {request.head or 'at any type'}")


def _by_recipe(name: str, recipe: Recipe) -> str | None:
    return next((kind for pattern, kind in recipe if re.search(pattern, name)), None)


def _some(problems: list[str]) -> str:
    return ", ".join(problems[:3]) + (f" and {len(problems) - 3} more" if len(problems) > 3 else "")


def check_against_checkpoint(opened: Gguf, checkpoint: Checkpoint) -> list[Check]:
    """Inventory and head against the checkpoint that the file is made of."""
    family, hparams = family_of(checkpoint.architecture), Hparams(checkpoint.config)
    expected = {row.name: row.shape for row in family.rows(hparams, "all")}
    inventory = check_inventory(opened, expected, family.gguf_architecture)
    if not inventory.passed:
        return [inventory]
    problems = []
    for item in convert.plan(checkpoint, family, hparams, "head"):
        problems += compare(opened, item.row.name, convert.values(checkpoint, item))
    return [inventory, Check("head values", not problems, _some(problems) or "those of the checkpoint")]


def check_against_reference(opened: Gguf, reference: Gguf) -> list[Check]:
    """Inventory and head against the unquantized GGUF that the file is made of."""
    inventory = check_inventory(opened, {name: info.shape for name, info in reference.tensors.items()}, reference.architecture)
    if head_blocks(opened) != head_blocks(reference):
        what = f"its head is blocks {list(head_blocks(opened))}, not {list(head_blocks(reference))}"
        inventory = Check("inventory", False, what if inventory.passed else f"{inventory.detail}, {what}")
    if not inventory.passed:
        return [inventory]
    problems = []
    for name in inject.head_only(reference).tensors:
        problems += compare(opened, name, _slices(reference, name))
    return [inventory, Check("head values", not problems, _some(problems) or f"those of {reference.path.name}")]


def _slices(reference: Gguf, name: str) -> Iterator[np.ndarray]:
    """A tensor's values as flat float32 slices of whole rows."""
    info, piece = reference.tensors[name], reference.ranges[name]
    row = info.shape[-1]
    step = max(CHUNK // 4 // row, 1) * row
    with reference.path.open("rb") as file:
        file.seek(piece.offset)
        for start in range(0, info.elements, step):
            yield _read_values(file.read, info.type, min(step, info.elements - start))


def check_inventory(opened: Gguf, expected: Mapping[str, tuple[int, ...]], architecture: str) -> Check:
    """Names and shapes are exactly those that the architecture has."""
    found = {name: info.shape for name, info in opened.tensors.items()}
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} does not belong there" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} has shape {list(found[name])}, not {list(expected[name])}"
        for name in expected.keys() & found.keys()
        if squeezed(found[name]) != squeezed(expected[name])
    ]
    if opened.architecture != architecture:
        problems.append(f"architecture is {opened.architecture}, not {architecture}")
    detail = _some(sorted(problems)) or f"{len(expected)} tensors as {architecture} has them"
    return Check("inventory", not problems, detail)


def compare(opened: Gguf, name: str, slices: Iterator[np.ndarray]) -> list[str]:
    """What is wrong with a tensor's values, given the right ones as slices of whole rows; nothing if they are right."""
    info = opened.tensors[name]
    allowed, worst_row, noise, signal = GATE * quant_types.RELATIVE_ERROR.get(info.type.name, 0.343), 0.0, 0.0, 0.0
    position = 0
    with opened.path.open("rb") as file:
        file.seek(opened.ranges[name].offset)
        for expected in slices:
            stored = _read_values(file.read, info.type, expected.size)
            if info.type.name in ("BF16", "F32"):
                if not np.array_equal(stored, _as_stored(expected, info.type)):
                    return [f"{name} differs from its source near element {position:,}"]
            else:
                difference = (stored - expected).reshape(-1, info.shape[-1]).astype(np.float64)
                rows = expected.reshape(-1, info.shape[-1]).astype(np.float64)
                row_noise, row_signal = (difference**2).sum(1), (rows**2).sum(1)
                worst_row = max(worst_row, float(np.sqrt(row_noise / np.maximum(row_signal, 1e-30)).max()))
                noise, signal = noise + float(row_noise.sum()), signal + float(row_signal.sum())
            position += expected.size
    error = (noise / max(signal, 1e-30)) ** 0.5
    if not error <= allowed:
        return [f"{name} ({info.type.name}) has a relative error of {error:.3f}, allowed are {allowed:.3f}"]
    if not worst_row <= max(ROW_GATE, allowed):
        return [f"{name} ({info.type.name}) has a row with an error of {worst_row:.2f}: rows or experts are out of place"]
    return []


def _read_values(read: Callable[[int], bytes], kind: GGMLQuantizationType, count: int) -> np.ndarray:
    if kind.name not in quant_types.TENSOR_TYPES:
        raise GgufError(f"a head has a tensor of type {kind.name}, which no quantization makes")
    block, size = GGML_QUANT_SIZES[kind]
    raw = np.frombuffer(read(count // block * size), np.uint8)
    return dequantize(raw.view(np.float32) if kind.name == "F32" else raw, kind).reshape(-1)


def _as_stored(expected: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    """Values rounded to the type, so that equal means equal bytes."""
    if kind.name == "F32":
        return expected
    return convert.decode(np.frombuffer(convert.encode(expected, kind), np.uint16), "BF16")


def check_base(opened: Gguf, base: Gguf) -> Check:
    """Every tensor of the base is in the file, byte for byte."""
    wrong = [
        name
        for name, info in base.tensors.items()
        if opened.tensors.get(name) != info or sha256(base.ranges[name]) != sha256(opened.ranges[name])
    ]
    detail = _some([f"{name} differs from the base" for name in wrong]) or f"{len(base.tensors)} tensors equal the base's"
    return Check("trunk", not wrong, detail)


def check_drafting(opened: Gguf, request: Request, bin_dir: Path) -> tuple[Check, dict[str, Any]]:
    """A real llama-server loads the file, drafts with each block of the head, greedily, and a share of the drafts is accepted."""
    options = ["--ctx-size", "4096", "--threads", str(request.threads)]
    if request.undrafted is None:
        options += ["--spec-type", "draft-mtp", "--spec-draft-n-max", str(len(head_blocks(opened)))]
    drafts = accepted = 0
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with server.serve(opened.path, Path(scratch) / "server.log", options, bin_dir) as running:
                for prompt in request.prompts:
                    answer = running.completion(prompt, N_PREDICT)
                    drafts, accepted = drafts + answer.drafts, accepted + answer.accepted
        except ForgeError as error:
            return Check("drafting", False, str(error)), {}
    if request.undrafted is not None:
        return Check("drafting", True, f"not possible: {request.undrafted}"), {"drafts": 0, "accepted": 0, "acceptance": None}
    share = accepted / drafts if drafts else 0.0
    detail = f"{accepted} of {drafts} drafts accepted"
    if share < request.min_acceptance:
        detail += f", at least {request.min_acceptance:.0%} must be: the head is dead or damaged"
    measured = {"drafts": drafts, "accepted": accepted, "acceptance": round(share, 4)}
    return Check("drafting", drafts > 0 and share >= request.min_acceptance, detail), measured
