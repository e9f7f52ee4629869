"""Is a finished GGUF what was asked for, and does its head draft? One verdict per check, and no result without all of them.

A file with a head that is there but wrong loads without a message. So its inventory, types and values are compared with the
checkpoint, and a real llama-server must draft with it and have drafts accepted.
"""

import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from . import convert, gguf_file, inject, programs, quant_types, server, split, upstream
from .checkpoint import Checkpoint, read_json
from .errors import ConfigError, ForgeError, GgufError, VerificationError
from .families import Hparams, family_of
from .gguf_file import Gguf, TensorInfo, squeezed
from .quantize import NO_HEAD, Recipe, by_recipe, head_blocks, quantizable, read_head
from .ranges import FileRange, sha256

VISION = "clip"  # general.architecture of every vision tower
# 64 x 64 pixels in one colour, as PNG.
PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAEAAAABAAQMAAACQp+OdAAAAA1BMVEXIHlpnOX0XAAAAD0lEQVR42mNgGAWjgHwAAA"
    "JAAAHgTR1EAAAAAElFTkSuQmCC"
)
N_PREDICT = 200
SAMPLE = 8  # of a large tensor that is not the head's, one slice in so many is compared
LARGE = 1 << 22  # weights
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
    reference: Path | None = None
    """In place of a checkpoint whose architecture has no family: the BF16 GGUF that upstream made and that is proven."""
    digests: Path | None = None
    """Of a file that is what conversion made, the sha256 of its tensors, which it recorded."""
    base: Path | None = None
    """What the head was injected into."""
    trunk: Path | None = None
    """In place of it, the sha256 of its tensors, recorded before."""
    target: Path | None = None
    """Of a draft sidecar, the model that it drafts for."""
    file_type: str | None = None
    head: str | None = None
    recipe: Recipe = ()
    prompts: tuple[str, ...] = ()
    min_acceptance: float = 0.1
    threads: int = 1

    @property
    def headless(self) -> bool:
        """Whether the file should have no head."""
        return self.head == NO_HEAD

    @property
    def part(self) -> str:
        """What the file is of the checkpoint, as conversion names it."""
        return "trunk" if self.headless else "draft" if self.target else "all"

    @property
    def values(self) -> str:
        """What of a file is compared by value: the head whole, and of what has no other proof a sample."""
        return "values" if self.headless else "head values"


def verify(path: Path, request: Request, bin_dir: Path = programs.DEFAULT_BIN) -> dict[str, Any]:
    """The report on `path`. Raises VerificationError, naming each failed check, where it must not be published."""
    opened = gguf_file.read(path)
    checks = [check_digests(opened, request.digests)] if request.digests else []
    if opened.architecture == VISION:
        checks.append(check_seeing(opened, request, bin_dir))
        _raise_failed(path.name, checks)
        return {**summary(opened), "checks": [asdict(check) for check in checks]}
    blocks = head_blocks(opened)
    if not blocks and not request.headless:
        raise VerificationError(f"{path}: has no head: nextn_predict_layers is missing")
    if blocks and request.headless:
        raise VerificationError(f"{path}: has a head (block {blocks[0]}), and none was asked for")
    checks.append(check_types(opened, request))
    if request.checkpoint:
        checks += check_against_checkpoint(opened, Checkpoint(request.checkpoint), request)
    if request.reference:
        checks += check_against_reference(opened, gguf_file.read(request.reference), request)
    proof: dict[str, Any] = {}
    if request.base or request.trunk:
        before = read_json(request.trunk) if request.trunk else inject.trunk_digests(split.read(request.base or path))
        check, proof = check_trunk(opened, before)
        checks.append(check)
    running, measured = check_running(opened, request, bin_dir)
    checks.append(running)
    _raise_failed(path.name, checks)
    return {**summary(opened), **proof, **measured, "checks": [asdict(check) for check in checks]}


def summary(opened: Gguf) -> dict[str, Any]:
    """Name, size in bytes, bits per weight, sha256, types of the head and of all tensors, counted."""
    infos = opened.tensors.values()
    types = [info.type.name for info in infos]
    size = opened.path.stat().st_size
    head = opened.architecture != VISION and head_blocks(opened)
    return {
        "file": opened.path.name,
        "bytes": size,
        "sha256": sha256(FileRange(opened.path, 0, size)),
        "bits_per_weight": round(8 * sum(info.size for info in infos) / sum(info.elements for info in infos), 3),
        "head": "/".join(sorted(inject.types_of(inject.head_only(opened)))) if head else NO_HEAD,
        "types": {name: types.count(name) for name in sorted(set(types))},
    }


def check_types(opened: Gguf, request: Request) -> Check:
    """File type, head type and recipe are what was asked for."""
    wrong: list[str] = []
    wanted = quant_types.FILE_TYPES[quant_types.check_file_type(request.file_type)] if request.file_type else None
    if request.file_type and opened.get("general.file_type") != wanted:
        wrong.append(f"general.file_type is {opened.get('general.file_type')}, not that of {request.file_type}")
    head = {} if request.headless else inject.head_only(opened).tensors
    head_recipe = read_head(request.head) if request.head and not request.headless else ()
    for name, info in opened.tensors.items():
        if not quantizable(info):
            continue
        asked = by_recipe(name, head_recipe if name in head else request.recipe)
        if asked and info.type.name != quant_types.fitting(asked, info.shape[-1]):
            wrong.append(f"{name} is {info.type.name}, not {asked}")
    return Check("types", not wrong, _some(wrong) or f"{len(opened.tensors)} tensors, head {request.head or 'at any type'}")


def _some(problems: list[str]) -> str:
    return ", ".join(problems[:3]) + (f" and {len(problems) - 3} more" if len(problems) > 3 else "")


def check_against_checkpoint(opened: Gguf, checkpoint: Checkpoint, request: Request) -> list[Check]:
    """Inventory and values against the checkpoint that the file is made of."""
    family, hparams = family_of(checkpoint.architecture), Hparams(checkpoint.config)
    convert.check_sizes(hparams)
    expected = {row.name: TensorInfo(row.name, row.shape, row.type) for row in family.rows(hparams, request.part)}
    inventory = check_inventory(opened, expected, family.gguf_architecture, request)
    if not inventory.passed:
        return [inventory]
    problems = []
    head = {row.name for row in family.rows(hparams, "head")}
    for item in convert.plan(checkpoint, family, hparams, request.part if request.part != "all" else "head"):
        problems += compare(opened, item.row.name, convert.values(checkpoint, item), _every(item.info, item.row.name in head))
    return [inventory, Check(request.values, not problems, _some(problems) or "those of the checkpoint")]


def check_against_reference(opened: Gguf, reference: Gguf, request: Request) -> list[Check]:
    """Inventory and values against the unquantized GGUF that the file is made of."""
    inventory = check_inventory(opened, reference.tensors, reference.architecture, request)
    if head_blocks(opened) != head_blocks(reference):
        what = f"its head is blocks {list(head_blocks(opened))}, not {list(head_blocks(reference))}"
        inventory = Check("inventory", False, what if inventory.passed else f"{inventory.detail}, {what}")
    if not inventory.passed:
        return [inventory]
    problems = []
    head = {} if request.headless else inject.head_only(reference).tensors
    for name in head if request.part == "all" else reference.tensors:
        problems += compare(opened, name, _slices(reference, name), _every(reference.tensors[name], name in head))
    return [inventory, Check(request.values, not problems, _some(problems) or f"those of {reference.path.name}")]


def _slices(reference: Gguf, name: str) -> Iterator[np.ndarray]:
    """A tensor's values as flat float32 slices of whole rows."""
    info, piece = reference.tensors[name], reference.ranges[name]
    row = info.shape[-1]
    step = max(convert.SLICE // row, 1) * row
    with reference.path.open("rb") as file:
        file.seek(piece.offset)
        for start in range(0, info.elements, step):
            yield _read_values(file.read, info.type, min(step, info.elements - start))


def check_inventory(opened: Gguf, expected: Mapping[str, TensorInfo], architecture: str, request: Request) -> Check:
    """Names, shapes, and the types of what no quantization changes, are exactly those that the architecture has."""
    found = {name: info.shape for name, info in opened.tensors.items()}
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} does not belong there" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} has shape {list(found[name])}, not {list(expected[name].shape)}"
        for name in expected.keys() & found.keys()
        if squeezed(found[name]) != squeezed(expected[name].shape)
    ]
    if request.file_type:  # a base of somebody else's has what it has
        unquantized = request.file_type if request.file_type in quant_types.UNQUANTIZED else None
        for name in expected.keys() & found.keys():
            asked = unquantized if quantizable(expected[name]) else expected[name].type.name
            if asked and opened.tensors[name].type.name != asked:
                problems.append(f"{name} is {opened.tensors[name].type.name}, not {asked}")
    if opened.architecture != architecture:
        problems.append(f"architecture is {opened.architecture}, not {architecture}")
    detail = _some(sorted(problems)) or f"{len(expected)} tensors as {architecture} has them"
    return Check("inventory", not problems, detail)


def compare(opened: Gguf, name: str, slices: Iterator[np.ndarray], every: int = 1) -> list[str]:
    """What is wrong with a tensor's values, given the right ones as slices of whole rows; nothing if they are right.

    Of the slices, one in `every` is looked at, the first among them.
    """
    info = opened.tensors[name]
    allowed, worst_row, noise, signal = GATE * quant_types.RELATIVE_ERROR.get(info.type.name, 0.343), 0.0, 0.0, 0.0
    position = 0
    with opened.path.open("rb") as file:
        file.seek(opened.ranges[name].offset)
        for number, expected in enumerate(slices):
            if number % every:
                _skip(file, info.type, expected.size)
                position += expected.size
                continue
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


def _every(info: TensorInfo, of_head: bool) -> int:
    return SAMPLE if info.elements > LARGE and not of_head else 1


def _skip(file: BinaryIO, kind: GGMLQuantizationType, count: int) -> None:
    block, size = GGML_QUANT_SIZES[kind]
    file.seek(count // block * size, os.SEEK_CUR)


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


def check_digests(opened: Gguf, recorded: Path) -> Check:
    """Every tensor has the bytes that conversion recorded, which proved them then."""
    expected = {name: digest for name, digest in read_json(recorded).items() if name != "header"}
    wrong = [f"{name} differs" for name in expected.keys() | opened.ranges.keys() if _digest(opened, name) != expected.get(name)]
    return Check("bytes", not wrong, _some(sorted(wrong)) or f"{len(expected)} tensors as they were converted, and proven then")


def _digest(opened: Gguf, name: str) -> str | None:
    return sha256(opened.ranges[name]) if name in opened.ranges else None


def check_trunk(opened: Gguf, before: Mapping[str, str]) -> tuple[Check, dict[str, Any]]:
    """The trunk is the base's, byte for byte; for the report, the sha256 of all tensors' sha256, before and after."""
    after = inject.trunk_digests(opened)
    wrong = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    detail = _some([f"{name} differs from the base" for name in wrong]) or f"{len(before)} tensors equal the base's"
    proof = {"tensors": len(before), "sha256_before": _digest_of(before), "sha256_after": _digest_of(after)}
    return Check("trunk", not wrong, detail), {"trunk": proof}


def _digest_of(digests: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())).encode()).hexdigest()


def check_running(opened: Gguf, request: Request, bin_dir: Path) -> tuple[Check, dict[str, Any]]:
    """A real llama-server loads the file and continues every prompt; with a head it drafts, and a share is accepted.

    One token ahead for each block of the head, greedily: what is accepted then depends on the head alone.
    """
    undrafted = upstream.undrafted(opened)
    drafting = not request.headless and undrafted is None
    model, options = opened.path, ["--ctx-size", "4096", "--threads", str(request.threads)]
    if drafting:
        options += ["--spec-type", "draft-mtp", "--spec-draft-n-max", str(len(head_blocks(opened)))]
    if request.target:
        model = request.target
        options += ["--model-draft", str(opened.path)]
    answers = []
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with server.serve(model, Path(scratch) / "server.log", options, bin_dir) as running:
                answers = [running.completion(prompt, N_PREDICT) for prompt in request.prompts]
        except ForgeError as error:
            return Check("drafting" if drafting else "loading", False, str(error)), {}
    if not drafting:
        tokens = [len(answer.tokens) for answer in answers]
        detail = f"{sum(tokens)} tokens generated from {len(tokens)} prompts" + (f"; {undrafted}" if undrafted else "")
        return Check("loading", all(tokens), detail), {}
    drafts, accepted = sum(answer.drafts for answer in answers), sum(answer.accepted for answer in answers)
    share = accepted / drafts if drafts else 0.0
    detail = f"{accepted} of {drafts} drafts accepted"
    if share < request.min_acceptance:
        detail += f", at least {request.min_acceptance:.0%} must be: the head is dead or damaged"
    measured = {"drafts": drafts, "accepted": accepted, "acceptance": round(share, 4)}
    return Check("drafting", drafts > 0 and share >= request.min_acceptance, detail), measured


def check_seeing(opened: Gguf, request: Request, bin_dir: Path) -> Check:
    """Of a vision tower: a real llama-server loads the model with it, and a picture becomes tokens of the prompt."""
    if request.target is None:
        raise ConfigError(f"{opened.path}: a vision tower is verified with its model: name it with --target")
    options = ["--ctx-size", "4096", "--threads", str(request.threads), "--mmproj", str(opened.path)]
    text, picture = {"type": "text", "text": "What is this?"}, {"type": "image_url", "image_url": {"url": PICTURE}}

    def length(running: server.Server, *content: object) -> int:
        answer = running.ask("/v1/chat/completions", {"messages": [{"role": "user", "content": content}], "max_tokens": 1})
        return int(answer["usage"]["prompt_tokens"])

    with tempfile.TemporaryDirectory() as scratch:
        try:
            with server.serve(request.target, Path(scratch) / "server.log", options, bin_dir) as running:
                seen = length(running, text, picture) - length(running, text)
        except ForgeError as error:
            return Check("seeing", False, str(error))
    return Check("seeing", seen > 1, f"a picture is {seen} tokens of the prompt")


def head_source(record: Path) -> dict[str, int]:
    """How many tensors of a head that was fetched by itself are verified, and how many trusted on first use, to this day.

    A whole shard has a record beside this one only if it has confirmed them.
    """
    tensors = read_json(record)["tensors"].values()
    confirmed = {tensor["shard"] for tensor in tensors if (record.parent / "records" / f"{tensor['shard']}.json").exists()}
    return dict(Counter("verified" if tensor["shard"] in confirmed else tensor["standing"] for tensor in tensors))


def publish_split(
    path: Path, folder: Path, limit: int, request: Request, bin_dir: Path = programs.DEFAULT_BIN,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:  # fmt: skip
    """Give a verified file its final place as `folder`, in files of at most `limit` bytes that are verified in their turn.

    The report's `files` (name, bytes, sha256) and `checks` on them. Raises VerificationError, and then `folder` is as it was.
    """
    opened = gguf_file.read(path)
    with split.splitting(opened, folder, folder.name, limit, progress) as files:
        problems = split.check(opened, files)
        checks = [Check("files", not problems, _some(problems) or f"all {len(opened.tensors)} tensors, in {len(files)}")]
        if len(files) > 1 and not problems:
            # The head was measured in the whole file, and these are its bytes: what is left to see is that llama.cpp finds them.
            shards = replace(opened, path=files[0])
            found, _ = check_running(shards, replace(request, prompts=request.prompts[:1], min_acceptance=0), bin_dir)
            checks.append(replace(found, name="files load"))
        _raise_failed(folder.name, checks)
        sizes = [(file, file.stat().st_size) for file in files]
        listed = [{"name": file.name, "bytes": size, "sha256": sha256(FileRange(file, 0, size))} for file, size in sizes]
    return {"files": listed, "checks": [asdict(check) for check in checks]}


def _raise_failed(name: str, checks: list[Check]) -> None:
    """Raise VerificationError, naming each failed check, where there is one."""
    if failed := [check for check in checks if not check.passed]:
        raise VerificationError(f"{name} is not published: " + "; ".join(f"{c.name}: {c.detail}" for c in failed))
