"""Is a finished GGUF what was asked for, and does its head draft? One verdict per check, and no result without all of them.

A file with a head that is there but wrong loads without a message. So its inventory, types, metadata and values are compared with
the checkpoint; a real llama-server must draft with it, have drafts accepted, and say the same without them.

Of the trunk's large tensors a sample is compared (`values`), which cannot see a changed bit. Digests can: of what conversion,
quantization or injection wrote, taken when it was made, so what changed on the disk since is seen. What was wrong before they were
taken, as by a failing memory while llama-quantize ran, is not, unless it is large enough for the errors; nor is a bad sector that
is still hidden by a copy of the file in memory.
"""

import hashlib
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from gguf.constants import Keys

from . import convert, gguf_file, inject, programs, quant_types, server, split, table, upstream, values
from .checkpoint import Checkpoint, read_json, read_text
from .errors import ConfigError, ForgeError, VerificationError
from .families import Hparams, family_of
from .gguf_file import Gguf, TensorInfo, Value, squeezed
from .quantize import NO_HEAD, Recipe, by_recipe, head_blocks, quantizable, read_head
from .ranges import FileRange, sha256

VISION = "clip"  # general.architecture of every vision tower
# 64 x 64 pixels in one colour, as PNG.
PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAEAAAABAAQMAAACQp+OdAAAAA1BMVEXIHlpnOX0XAAAAD0lEQVR42mNgGAWjgHwAAA"
    "JAAAHgTR1EAAAAAElFTkSuQmCC"
)
N_PREDICT = 200
EQUAL = 100  # tokens of each prompt that must be the same without drafting
TIE = 0.1  # of log-probability: two tokens nearer than this can change places when they are computed in batches of another size
# Metadata that says what was done to a file, not which model it is.
FREE = ("general.file_type", "general.quantization_version", "general.size_label", gguf_file.PADDING)
ADDED = ("quantize.", "split.", gguf_file.PADDING)
# Of somebody else's base: publishers correct the rest of the tokenizer, and the context length.
VOCABULARY = (Keys.Tokenizer.LIST, Keys.Tokenizer.MERGES)


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
    """The sha256 of the file's tensors, as conversion or quantization recorded them when it made it."""
    base: Path | None = None
    """What the head was injected into."""
    trunk: Path | None = None
    """In place of it, the sha256 of its tensors, recorded before."""
    target: Path | None = None
    """Of a draft sidecar, the model that it drafts for."""
    file_type: str | None = None
    head: str | None = None
    recipe: Recipe = ()
    tokenizer_pre: str | None = None
    """As conversion was told, for metadata."""
    unquantized: Path | None = None
    """What `acceptance.py` measured of the BF16 file of the same model."""
    max_acceptance_drop: float = 0.2
    """How much less than that may be accepted."""
    perplexity: bool = False
    """Whether llama-perplexity, which is going to measure it, must load the file too."""
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
    def ours(self) -> bool:
        """Whether the trunk was quantized here, and not by somebody else."""
        return self.file_type is not None


def verify(
    path: Path, request: Request, bin_dir: Path = programs.DEFAULT_BIN,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:  # fmt: skip
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
    against, proof = check_against_source(opened, request, progress)
    checks += against
    if request.base or request.trunk:
        before = read_json(request.trunk) if request.trunk else inject.trunk_digests(split.read(request.base or path))
        check, digests = check_trunk(opened, before)
        checks.append(check)
        proof |= digests
    _raise_failed(path.name, checks)  # what is known to be wrong need not be run
    running, measured = check_running(opened, request, bin_dir)
    checks += running
    checks += check_programs(opened, request, bin_dir)
    _raise_failed(path.name, checks)
    return {**summary(opened), **proof, **measured, "checks": [asdict(check) for check in checks]}


def as_table(report: Mapping[str, Any]) -> str:
    """A report's verdicts as a table for the terminal."""
    rows = [(check["name"], "passed" if check["passed"] else "FAILED", check["detail"]) for check in report["checks"]]
    return table.markdown([(report["file"], "verdict", "what it rests on"), *rows], left=3)


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
        convert.check_sizes(hparams)
        rows = {row.name: TensorInfo(row.name, row.shape, row.type) for row in family.rows(hparams, request.part)}
        checks = [check_inventory(opened, rows, family.gguf_architecture, request)]
        part = request.part
        if part == "all" and convert.EMBEDDINGS not in convert.canonical_names(checkpoint, family):
            part, left_out = "head", "; of the checkpoint only the head is here"  # and no tokenizer
        if checks[0].passed:
            metadata = convert.describe(checkpoint, family, hparams, part, list(rows.values()), request.tokenizer_pre)
            checks += check_metadata(opened, metadata, chat_template(checkpoint.directory), request)
            expected = values.of_checkpoint(checkpoint, convert.plan(checkpoint, family, hparams, part))
    elif request.reference:
        reference = gguf_file.read(request.reference)
        checks = [check_inventory(opened, reference.tensors, reference.architecture, request)]
        if head_blocks(opened) != head_blocks(reference):
            what = f"its head is blocks {list(head_blocks(opened))}, not {list(head_blocks(reference))}"
            checks = [Check("inventory", False, what if checks[0].passed else f"{checks[0].detail}, {what}")]
        if checks[0].passed:
            template = reference.get(Keys.Tokenizer.CHAT_TEMPLATE)
            checks += check_metadata(opened, reference.metadata, template, request)
            expected = values.of_gguf(reference)
    if not all(check.passed for check in checks[:1]):
        return checks, {}
    head = set() if request.headless else set(inject.head_only(opened).tensors)
    exact = set(opened.tensors) if request.ours else head  # what is rounded elsewhere can differ in its last bit
    found = values.look(opened, expected, head, exact, request.threads, progress)
    infinite = [f"{each.name} has values that are no numbers" for each in found.found if not each.finite]
    checks.append(Check("finite", not infinite, _some(infinite) or f"no NaN or infinity in {len(found.found)} tensors"))
    if expected:
        norms = [each for each in found.compared if each.name.endswith("norm.weight")]
        checks.append(Check("norms", not found.shifted, "; ".join(found.shifted) or f"{len(norms)} norms, none with a wrong shift"))
        checks.append(Check("values", not found.problems, _some(found.problems) or _compared(opened, found, left_out)))
    return checks, found.report()


def _compared(opened: Gguf, found: values.Findings, left_out: str) -> str:
    """In words, how much of a file was compared, and where its errors are nearest to what is allowed."""
    weights = sum(each.rows * opened.tensors[each.name].shape[-1] for each in found.compared)
    total = sum(info.elements for info in opened.tensors.values())
    worst = max(found.compared, key=lambda each: (each.error or 0.0) / values.allowed(each.type))
    detail = f"{len(found.compared)} tensors, {weights / total:.1%} of all weights compared{left_out}; "
    if not worst.error:
        return detail + "all as the source has them"
    return (
        f"{detail}worst {worst.name} ({worst.type}) with an error of {worst.error:.3f} (allowed {values.allowed(worst.type):.3f})"
    )


def chat_template(directory: Path) -> str | None:
    """A checkpoint's chat template as it stands there, and nothing of it run; None where it has none."""
    settings = directory / "tokenizer_config.json"
    template = read_json(settings).get("chat_template") if settings.exists() else None
    if template is None and (file := directory / "chat_template.jinja").exists():
        template = read_text(file)
    if template is None and (file := directory / "chat_template.json").exists():
        template = read_json(file).get("chat_template")
    if isinstance(template, list):  # several by name
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def check_metadata(opened: Gguf, expected: Mapping[str, Value], template: str | None, request: Request) -> list[Check]:
    """Each key has the value that conversion writes, but for what a quantization changes; and the chat template is the source's.

    Of somebody else's base, keys of the architecture that both have, and the vocabulary as injection compares it.
    """
    prefix, key_of_template, problems, compared = f"{opened.architecture}.", Keys.Tokenizer.CHAT_TEMPLATE, [], 0
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
        elif ours != right and (request.ours or ours.decode() != right.decode()):  # number types differ between publishers
            problems.append(f"{key} is {_shown(ours)}, not {_shown(right)}")
    if not request.ours:
        compared += sum(key in expected and key in opened.metadata for key in VOCABULARY)
        if difference := inject.vocabulary_difference(opened.metadata, expected):
            problems.append("{} is {}, not {}".format(*difference))
    checks = [Check("metadata", not problems, _some(sorted(problems)) or f"{compared} keys as conversion writes them")]
    if request.ours:
        stored = opened.get(key_of_template)
        same = stored == template
        detail = f"{len((template or '').encode()):,} bytes, those of the source" if template else "the source has none"
        checks.append(Check("chat template", same, detail if same else _first_difference(stored, template)))
    return checks


def _shown(value: Value) -> str:
    text = str(value.decode())
    return text if len(text) <= 60 else f"{text[:60]}..."


def _first_difference(stored: object, right: str | None) -> str:
    if not isinstance(stored, str) or right is None:
        return "is missing" if right is not None else "is there, and the source has none"
    place = next((i for i, (a, b) in enumerate(zip(stored, right, strict=False)) if a != b), min(len(stored), len(right)))
    return f"differs from the source's from character {place:,} on"


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


def check_digests(opened: Gguf, recorded: Path) -> Check:
    """The header and every tensor have the bytes that were recorded when the file was made."""
    expected, found = read_json(recorded), gguf_file.digests(opened.path)
    wrong = [f"{name} differs" for name in expected.keys() | found.keys() if found.get(name) != expected.get(name)]
    return Check("bytes", not wrong, _some(sorted(wrong)) or f"header and {len(opened.tensors)} tensors as they were made")


def check_trunk(opened: Gguf, before: Mapping[str, str]) -> tuple[Check, dict[str, Any]]:
    """The trunk is the base's, byte for byte; for the report, the sha256 of all tensors' sha256, before and after.

    Where `before` has the head's digests too, as injection records them, the head has the bytes that were injected.
    """
    trunk, head = inject.trunk_digests(opened), inject.head_only(opened)
    after = {**trunk, **{name: sha256(piece) for name, piece in head.ranges.items() if name in before}}
    wrong = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    count = len(before.keys() - head.tensors.keys())
    detail = _some([f"{name} differs from the {'head' if name in head.tensors else 'base'}" for name in wrong])
    base = {name: digest for name, digest in before.items() if name not in head.tensors}
    proof = {"tensors": count, "sha256_before": _digest_of(base), "sha256_after": _digest_of(trunk)}
    return Check("trunk", not wrong, detail or f"{count} tensors equal the base's"), {"trunk": proof}


def _digest_of(digests: Mapping[str, str]) -> str:
    return hashlib.sha256("".join(f"{digest}  {name}\n" for name, digest in sorted(digests.items())).encode()).hexdigest()


def check_running(opened: Gguf, request: Request, bin_dir: Path) -> tuple[list[Check], dict[str, Any]]:
    """The file loads, its head drafts well enough, and the text is the same without drafting; for the report, what was accepted."""
    checks, answers = check_drafting(opened, request, bin_dir)
    if not any(answer.drafts for answer in answers):
        return checks, {}
    measured = _accepted(answers)
    if request.unquantized:
        checks.append(check_acceptance(measured["acceptance"], request.unquantized, request.max_acceptance_drop))
    checks.append(check_without_drafting(opened, request, answers, bin_dir))
    return checks, measured


def check_drafting(opened: Gguf, request: Request, bin_dir: Path) -> tuple[list[Check], list[server.Completion]]:
    """A real llama-server loads the file and continues every prompt; with a head it drafts, and a share is accepted.

    One token ahead for each block of the head, greedily: what is accepted then depends on the head alone.
    """
    undrafted = upstream.undrafted(opened)
    drafting = not request.headless and undrafted is None
    options = [*_options(request), "--check-tensors"]  # all values are numbers, those among them that no sample has
    if drafting:
        options += ["--spec-type", "draft-mtp", "--spec-draft-n-max", str(len(head_blocks(opened)))]
    if request.target:
        options += ["--model-draft", str(opened.path)]
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with server.serve(request.target or opened.path, Path(scratch) / "server.log", options, bin_dir) as running:
                answers = [running.completion(prompt, N_PREDICT) for prompt in request.prompts]
        except ForgeError as error:
            return [Check("drafting" if drafting else "loading", False, str(error))], []
    if not drafting:
        tokens = [len(answer.tokens) for answer in answers]
        detail = f"{sum(tokens)} tokens generated from {len(tokens)} prompts" + (f"; {undrafted}" if undrafted else "")
        return [Check("loading", all(tokens), detail)], []
    drafts, accepted = sum(answer.drafts for answer in answers), sum(answer.accepted for answer in answers)
    enough = drafts > 0 and accepted >= request.min_acceptance * drafts
    detail = f"{accepted} of {drafts} drafts accepted"
    if not enough:
        detail += f", at least {request.min_acceptance:.0%} must be: the head is dead or damaged"
    return [Check("drafting", enough, detail)], answers


def _options(request: Request) -> list[str]:
    return ["--ctx-size", "4096", "--threads", str(request.threads)]


def check_without_drafting(opened: Gguf, request: Request, answers: Sequence[server.Completion], bin_dir: Path) -> Check:
    """A server that does not draft says the same as one that did."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            model = request.target or opened.path
            with server.serve(model, Path(scratch) / "server.log", _options(request), bin_dir) as running:
                choices = [running.choices(prompt, EQUAL) for prompt in request.prompts]
        except ForgeError as error:
            return Check("same text", False, str(error))
    return check_same([answer.tokens for answer in answers], choices)


def check_same(drafted: Sequence[Sequence[int]], choices: Sequence[Sequence[server.Choice]]) -> Check:
    """Greedy output with drafting is that without, token by token of each prompt, as far as the latter goes.

    Drafts are checked in batches, which round differently, so two tokens that are nearly as probable can change places, and what
    follows cannot be compared. With the pinned llama.cpp on a processor all is equal; any other difference means that drafts that
    were not accepted left a trace.
    """
    equal, ties, wrong = 0, 0, []
    for number, (tokens, right) in enumerate(zip(drafted, choices, strict=True), 1):
        for place, (token, choice) in enumerate(zip_longest(tokens[: len(right)], right)):
            if token != choice.token:
                tie = choice.margin < TIE and choice.second in (None, token)
                ties += tie
                if not tie:
                    said = "nothing" if token is None else token
                    without = f"{choice.token} without ({choice.margin:.2f} ahead)"
                    wrong.append(f"prompt {number}, token {place}: {said} with drafting, {without}")
                break
            equal += 1
        else:
            if len(right) < EQUAL and len(tokens) > len(right):
                wrong.append(f"prompt {number}: goes on with drafting, ends after {len(right)} tokens without")
    detail = f"{equal} tokens are the same without drafting" + (f", up to {ties} near ties" if ties else "")
    return Check("same text", not wrong and equal > 0, _some(wrong) or detail)


def acceptance(path: Path, request: Request, bin_dir: Path = programs.DEFAULT_BIN) -> dict[str, Any]:
    """What a file accepts of its head's drafts, as its quantizations are going to be measured; or why that was not measured.

    A file larger than the memory is not run: each token would read it from the disk again. Raises VerificationError where it does
    not draft at all.
    """
    memory, size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), path.stat().st_size
    if size > memory:
        return {"skipped": f"BF16 was not run: {table.size(size)} do not fit into {table.size(memory)} of memory"}
    opened = gguf_file.read(path)
    if reason := upstream.undrafted(opened):
        return {"skipped": reason}
    checks, answers = check_drafting(opened, request, bin_dir)
    _raise_failed(path.name, checks)
    return _accepted(answers)


def _accepted(answers: Sequence[server.Completion]) -> dict[str, Any]:
    drafts, accepted = sum(answer.drafts for answer in answers), sum(answer.accepted for answer in answers)
    return {"drafts": drafts, "accepted": accepted, "acceptance": round(accepted / drafts, 4)}


def check_acceptance(share: float, unquantized: Path, most: float) -> Check:
    """Acceptance is not more than `most` below that of the unquantized file, if that could be measured.

    On some 300 drafts chance alone moves it by 0.04, because another quantization soon continues with another text.
    """
    measured = read_json(unquantized)
    if "acceptance" not in measured:
        return Check("acceptance", True, f"not compared: {measured.get('skipped')}")
    drop = measured["acceptance"] - share
    detail = f"{share:.1%}, that of BF16 is {measured['acceptance']:.1%}"
    return Check("acceptance", drop <= most, detail if drop <= most else f"{detail}: it may be lower by {100 * most:.0f} points")


def check_programs(opened: Gguf, request: Request, bin_dir: Path, name: str = "programs") -> list[Check]:
    """The other programs that are going to read the file can: llama-gguf-split, and llama-perplexity where that is asked for."""
    loaded: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text.txt"
        text.write_text("\n".join(request.prompts) * 8, encoding="utf-8")
        commands: dict[str, list[str | Path]] = {
            "llama-gguf-split": ["--split", "--dry-run", "--split-max-size", "999G", opened.path, Path(scratch) / "none"]
        }
        if request.perplexity and not request.target:
            threads = str(request.threads)
            commands["llama-perplexity"] = ["-m", opened.path, "-f", text, "-c", "16", "--chunks", "1", "-t", threads]
        for name, arguments in commands.items():
            try:
                programs.call([programs.find(bin_dir, name), *arguments])
            except ForgeError as error:
                return [Check("programs", False, str(error))]
            loaded.append(name)
    return [Check("programs", True, f"{' and '.join(loaded)} can read it")]


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
            (found,), _ = check_drafting(shards, replace(request, prompts=request.prompts[:1], min_acceptance=0), bin_dir)
            checks += [
                replace(found, name="files load"),
                *check_programs(shards, replace(request, perplexity=False), bin_dir, "files open"),
            ]
        _raise_failed(folder.name, checks)
        sizes = [(file, file.stat().st_size) for file in files]
        listed = [{"name": file.name, "bytes": size, "sha256": sha256(FileRange(file, 0, size))} for file, size in sizes]
    return {"files": listed, "checks": [asdict(check) for check in checks]}


def _raise_failed(name: str, checks: list[Check]) -> None:
    """Raise VerificationError, naming each failed check, where there is one."""
    if failed := [check for check in checks if not check.passed]:
        error = VerificationError(f"{name} is not published: " + "; ".join(f"{c.name}: {c.detail}" for c in failed))
        error.table = as_table({"file": name, "checks": [asdict(check) for check in checks]})
        raise error
