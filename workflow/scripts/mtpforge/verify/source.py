"""Checks of a file against its source: types, metadata, inventory, values, digests."""

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from gguf.constants import Keys

from mtpforge.checkpoint.families.registry import family_of
from mtpforge.checkpoint.hparams import Hparams
from mtpforge.checkpoint.safetensors import Checkpoint
from mtpforge.convert import native, plan
from mtpforge.gguf import quant_types, reader
from mtpforge.gguf.head import quantizable, trunk_digests
from mtpforge.gguf.reader import Gguf, TensorInfo, Value, drop_leading_ones
from mtpforge.inject import match
from mtpforge.io.ranges import sha256
from mtpforge.io.text import read_json, read_text
from mtpforge.quantize.recipe import by_recipe, head_recipe
from mtpforge.verify import values
from mtpforge.verify.request import Check, Request, some

# Metadata that says what was done to a file, not which model it is.
FREE = ("general.file_type", "general.quantization_version", "general.size_label", reader.PADDING)
ADDED = ("quantize.", "split.", reader.PADDING)
# Of somebody else's base: publishers correct the rest of the tokenizer, and the context length.
VOCABULARY = (Keys.Tokenizer.LIST, Keys.Tokenizer.MERGES)


def check_types(opened: Gguf, request: Request) -> Check:
    """File type, head type and recipe are what was asked for."""
    wrong: list[str] = []
    wanted = (
        quant_types.FILE_TYPES[quant_types.check_file_type(request.file_type)]
        if request.file_type
        else None
    )
    if request.file_type and opened.get("general.file_type") != wanted:
        wrong.append(
            f"general.file_type is {opened.get('general.file_type')}, not that of {request.file_type}"
        )
    head = {} if request.headless else opened.head.tensors
    types = head_recipe(request.head, request.head_tensors) if request.head and head else ()
    for name, info in opened.tensors.items():
        if not quantizable(info):
            continue
        asked = by_recipe(name, types if name in head else request.recipe)
        if asked and info.type.name != quant_types.fitting(asked, info.shape[-1]):
            wrong.append(f"{name} is {info.type.name}, not {asked}")
    return Check(
        "types",
        not wrong,
        some(wrong) or f"{len(opened.tensors)} tensors, head {request.head or 'at any type'}",
    )


def check_against_source(
    opened: Gguf, request: Request, progress: Callable[[int, int], None] = lambda done, total: None
) -> tuple[list[Check], dict[str, Any]]:
    """Inventory, metadata and values against what the file is made of; for the report, the error of each tensor.

    Without a source only whether all values are numbers. A wrong inventory ends it: there is nothing to compare then.
    """
    expected: dict[str, values.Take] = {}
    checks: list[Check] = []
    left_out = ""
    if request.checkpoint:
        checkpoint = Checkpoint(request.checkpoint)
        family, hparams = family_of(checkpoint.architecture), Hparams(checkpoint.config)
        plan.check_sizes(hparams)
        rows = {
            row.name: TensorInfo(row.name, row.shape, row.type)
            for row in family.rows(hparams, request.part)
        }
        checks = [check_inventory(opened, rows, family.gguf_architecture, request)]
        part = request.part
        if part == "all" and plan.EMBEDDINGS not in plan.canonical_names(checkpoint, family):
            part, left_out = "head", "; of the checkpoint only the head is here"  # and no tokenizer
        if checks[0].passed:
            metadata = native.describe(
                checkpoint, family, hparams, part, list(rows.values()), request.tokenizer_pre
            )
            checks += check_metadata(opened, metadata, chat_template(checkpoint.directory), request)
            expected = values.of_checkpoint(
                checkpoint, plan.plan(checkpoint, family, hparams, part)
            )
    elif request.reference:
        reference = reader.read(request.reference)
        checks = [check_inventory(opened, reference.tensors, reference.architecture, request)]
        if opened.head_blocks != reference.head_blocks:
            what = (
                f"its head is blocks {list(opened.head_blocks)}, not {list(reference.head_blocks)}"
            )
            checks = [
                Check(
                    "inventory", False, what if checks[0].passed else f"{checks[0].detail}, {what}"
                )
            ]
        if checks[0].passed:
            template = reference.get(Keys.Tokenizer.CHAT_TEMPLATE)
            checks += check_metadata(opened, reference.metadata, template, request)
            expected = values.of_gguf(reference)
    if not all(check.passed for check in checks[:1]):
        return checks, {}
    head = set() if request.headless else set(opened.head.tensors)
    exact = (
        set(opened.tensors) if request.ours else head
    )  # what is rounded elsewhere can differ in its last bit
    found = values.look(opened, expected, head, exact, request.threads, progress)
    infinite = [
        f"{each.name} has values that are no numbers" for each in found.found if not each.finite
    ]
    checks.append(
        Check(
            "finite",
            not infinite,
            some(infinite) or f"no NaN or infinity in {len(found.found)} tensors",
        )
    )
    if expected:
        norms = [each for each in found.compared if each.name.endswith("norm.weight")]
        checks.append(
            Check(
                "norms",
                not found.shifted,
                "; ".join(found.shifted) or f"{len(norms)} norms, none with a wrong shift",
            )
        )
        checks.append(
            Check(
                "values",
                not found.problems,
                some(found.problems) or _compared(opened, found, left_out),
            )
        )
    return checks, found.report()


def _compared(opened: Gguf, found: values.Findings, left_out: str) -> str:
    """In words, how much of a file was compared, and where its errors are nearest to what is allowed."""
    weights = sum(each.rows * opened.tensors[each.name].shape[-1] for each in found.compared)
    total = sum(info.elements for info in opened.tensors.values())
    worst = max(found.compared, key=lambda each: (each.error or 0.0) / values.allowed(each.type))
    detail = (
        f"{len(found.compared)} tensors, {weights / total:.1%} of all weights compared{left_out}; "
    )
    if not worst.error:
        return detail + "all as the source has them"
    return f"{detail}worst {worst.name} ({worst.type}) with an error of {worst.error:.3f} (allowed {values.allowed(worst.type):.3f})"


def chat_template(directory: Path) -> str | None:
    """A checkpoint's chat template as it stands there, and nothing of it run; None where it has none."""
    settings = directory / "tokenizer_config.json"
    template = read_json(settings).get("chat_template") if settings.exists() else None
    if template is None and (file := directory / "chat_template.jinja").exists():
        template = read_text(file)
    if template is None and (file := directory / "chat_template.json").exists():
        template = read_json(file).get("chat_template")
    if isinstance(template, list):  # several by name
        named = {
            entry.get("name"): entry.get("template")
            for entry in template
            if isinstance(entry, dict)
        }
        template = named.get("default")
    return template if isinstance(template, str) else None


def check_metadata(
    opened: Gguf, expected: Mapping[str, Value], template: str | None, request: Request
) -> list[Check]:
    """Each key has the value that conversion writes, but for what a quantization changes; and the chat template is the source's.

    Of somebody else's base, keys of the architecture that both have, and the vocabulary as injection compares it.
    """
    prefix, key_of_template, problems, compared = (
        f"{opened.architecture}.",
        Keys.Tokenizer.CHAT_TEMPLATE,
        [],
        0,
    )
    for key in expected.keys() | opened.metadata.keys():
        ours, right = opened.metadata.get(key), expected.get(key)
        if key in FREE or key == key_of_template or (right is None and key.startswith(ADDED)):
            continue
        if not request.ours:
            theirs = key.startswith(prefix) and not key.endswith((".context_length", ".vocab_size"))
            if ours is None or right is None or not theirs:
                continue
        compared += 1
        if ours is None or right is None:
            problems.append(f"{key} is missing" if ours is None else f"{key} does not belong there")
        elif ours != right and (
            request.ours or ours.decode() != right.decode()
        ):  # number types differ between publishers
            problems.append(f"{key} is {_shown(ours)}, not {_shown(right)}")
    if not request.ours:
        compared += sum(key in expected and key in opened.metadata for key in VOCABULARY)
        if difference := match.vocabulary_difference(opened.metadata, expected):
            problems.append("{} is {}, not {}".format(*difference))
    checks = [
        Check(
            "metadata",
            not problems,
            some(sorted(problems)) or f"{compared} keys as conversion writes them",
        )
    ]
    if request.ours:
        stored = opened.get(key_of_template)
        same = stored == template
        detail = (
            f"{len((template or '').encode()):,} bytes, those of the source"
            if template
            else "the source has none"
        )
        checks.append(
            Check("chat template", same, detail if same else _first_difference(stored, template))
        )
    return checks


def _shown(value: Value) -> str:
    text = str(value.decode())
    return text if len(text) <= 60 else f"{text[:60]}..."


def _first_difference(stored: object, right: str | None) -> str:
    if not isinstance(stored, str) or right is None:
        return "is missing" if right is not None else "is there, and the source has none"
    place = next(
        (i for i, (a, b) in enumerate(zip(stored, right, strict=False)) if a != b),
        min(len(stored), len(right)),
    )
    return f"differs from the source's from character {place:,} on"


def check_inventory(
    opened: Gguf, expected: Mapping[str, TensorInfo], architecture: str, request: Request
) -> Check:
    """Names, shapes, and the types of what no quantization changes, are exactly those that the architecture has."""
    found = {name: info.shape for name, info in opened.tensors.items()}
    problems = [f"{name} is missing" for name in expected.keys() - found.keys()]
    problems += [f"{name} does not belong there" for name in found.keys() - expected.keys()]
    problems += [
        f"{name} has shape {list(found[name])}, not {list(expected[name].shape)}"
        for name in expected.keys() & found.keys()
        if drop_leading_ones(found[name]) != drop_leading_ones(expected[name].shape)
    ]
    if request.file_type:  # a base of somebody else's has what it has
        unquantized = request.file_type if request.file_type in quant_types.UNQUANTIZED else None
        for name in expected.keys() & found.keys():
            asked = unquantized if quantizable(expected[name]) else expected[name].type.name
            if asked and opened.tensors[name].type.name != asked:
                problems.append(f"{name} is {opened.tensors[name].type.name}, not {asked}")
    if opened.architecture != architecture:
        problems.append(f"architecture is {opened.architecture}, not {architecture}")
    detail = some(sorted(problems)) or f"{len(expected)} tensors as {architecture} has them"
    return Check("inventory", not problems, detail)


def check_digests(opened: Gguf, recorded: Path) -> Check:
    """The header and every tensor have the bytes that were recorded when the file was made."""
    expected, found = read_json(recorded), reader.digests(opened.path)
    wrong = [
        f"{name} differs"
        for name in expected.keys() | found.keys()
        if found.get(name) != expected.get(name)
    ]
    return Check(
        "bytes",
        not wrong,
        some(sorted(wrong)) or f"header and {len(opened.tensors)} tensors as they were made",
    )


def check_trunk(opened: Gguf, before: Mapping[str, str]) -> tuple[Check, dict[str, Any]]:
    """The trunk is the base's, byte for byte; for the report, the sha256 of all tensors' sha256, before and after.

    Where `before` has the head's digests too, as injection records them, the head has the bytes that were injected.
    """
    trunk, head = trunk_digests(opened), opened.head
    after = {
        **trunk,
        **{name: sha256(piece) for name, piece in head.ranges.items() if name in before},
    }
    wrong = sorted(
        name for name in before.keys() | after.keys() if before.get(name) != after.get(name)
    )
    count = len(before.keys() - head.tensors.keys())
    detail = some(
        [f"{name} differs from the {'head' if name in head.tensors else 'base'}" for name in wrong]
    )
    base = {name: digest for name, digest in before.items() if name not in head.tensors}
    proof = {"tensors": count, "sha256_before": _digest_of(base), "sha256_after": _digest_of(trunk)}
    return Check("trunk", not wrong, detail or f"{count} tensors equal the base's"), {
        "trunk": proof
    }


def _digest_of(digests: Mapping[str, str]) -> str:
    return hashlib.sha256(
        "".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())).encode()
    ).hexdigest()


def head_source(record: Path) -> dict[str, int]:
    """How many tensors of a head that was fetched by itself are verified, and how many trusted on first use, to this day.

    A whole shard has a record beside this one only if it has confirmed them.
    """
    tensors = read_json(record)["tensors"].values()
    confirmed = {
        tensor["shard"]
        for tensor in tensors
        if (record.parent / "records" / f"{tensor['shard']}.json").exists()
    }
    return dict(
        Counter(
            "verified" if tensor["shard"] in confirmed else tensor["standing"] for tensor in tensors
        )
    )
