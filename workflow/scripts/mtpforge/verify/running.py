"""Checks in llama.cpp: the file loads, its head drafts, and drafting does not change the text."""

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path

from mtpforge import recorded_digests
from mtpforge.errors import ConfigError, ForgeError, StorageError, VerificationError
from mtpforge.gguf import quant_types, reader, split
from mtpforge.gguf.reader import Gguf
from mtpforge.llama_cpp import converter_architectures, memory
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.llama_cpp.server import Choice, Completion, Server, serve
from mtpforge.prompts import EQUAL, N_PREDICT
from mtpforge.verify.report import Acceptance, Check, some
from mtpforge.verify.request import LEAST_ACCEPTANCE, Request

TIE = 0.1
"""Difference in log-probability below which two tokens can swap in batches of another size."""
# 64 x 64 pixels in one colour, as PNG.
_PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAEAAAABAAQMAAACQp+OdAAAAA1BMVEXIHlpnOX0XAAAAD0lE"
    "QVR42mNgGAWjgHwAAAJAAAHgTR1EAAAAAElFTkSuQmCC"
)


def check_running(
    opened: Gguf, request: Request, llama: LlamaCpp
) -> tuple[list[Check], Acceptance | None]:
    """The file loads, enough drafts are accepted, and the text is the same without drafting."""
    check, answers = check_drafting(opened, request, llama)
    if not any(answer.drafts for answer in answers):
        return [check], None
    measured = _acceptance_of(answers)
    checks = [check]
    if request.unquantized:
        unquantized = Acceptance.read(request.unquantized)
        checks.append(check_acceptance(measured, unquantized, request.max_acceptance_drop))
    checks.append(check_without_drafting(opened, request, answers=answers, llama=llama))
    return checks, measured


def why_not_run(opened: Gguf, request: Request, llama: LlamaCpp) -> str | None:
    """Why a file need not run here; None if it must.

    An unquantized file that is larger than the memory is proven without: its tensors equal those of
    its source. A quantized one has to draft, however slowly.
    """
    types = {info.type.name for info in opened.tensors.values()}
    proven = request.ours and bool(request.checkpoint or request.reference)
    if not proven or request.target or not types <= {*quant_types.UNQUANTIZED, quant_types.TABLE}:
        return None
    return memory.too_large([opened.path], llama)


@contextmanager
def reading_target(request: Request) -> Iterator[None]:
    """Check the target, if there is one, against its digests while llama-server reads it."""
    if request.target is None:
        yield
        return
    with recorded_digests.reading(request.target, request.target_recorded):
        yield


def check_drafting(
    opened: Gguf, request: Request, llama: LlamaCpp
) -> tuple[Check, list[Completion]]:
    """llama-server loads the file and continues every prompt; a share of the drafts is accepted.

    It drafts greedily, as far as the head predicts in one go: acceptance then depends on the head
    alone. Without a head, or if llama.cpp cannot draft with it, the file only has to load.
    """
    reason = converter_architectures.why_not_drafting(opened)
    drafts = not request.headless and reason is None
    options = ["--check-tensors"]  # refuses NaN and infinity in all weights, not only in samples
    if drafts:
        options += ["--spec-type", "draft-mtp", "--spec-draft-n-max", str(opened.draft_length)]
    if request.target:
        options += ["--model-draft", str(opened.path)]
    try:
        with _serve(request.target or opened.path, options, llama) as server:
            answers = [server.completion(prompt, N_PREDICT) for prompt in request.prompts]
    except StorageError:
        raise  # says nothing about the file
    except ForgeError as error:
        detail = f"{error}{_unknown_types(opened)}"
        return Check("drafting" if drafts else "loading", False, detail), []
    if drafts:
        return _check_accepted(_counts(answers), request.min_acceptance), answers
    return _check_loading(answers, None if request.headless else reason), []


def check_without_drafting(
    opened: Gguf, request: Request, answers: Sequence[Completion], llama: LlamaCpp
) -> Check:
    """A server that does not draft generates the same text."""
    try:
        with _serve(request.target or opened.path, [], llama) as server:
            choices = [server.choices(prompt, EQUAL) for prompt in request.prompts]
    except StorageError:
        raise  # says nothing about the file
    except ForgeError as error:
        return Check("same text", False, str(error))
    return check_same([answer.tokens for answer in answers], choices)


def check_same(drafted: Sequence[Sequence[int]], choices: Sequence[Sequence[Choice]]) -> Check:
    """Greedy output with drafting equals output without it, as far as `choices` go.

    Drafts are verified in batches, which round differently: two tokens of nearly the same
    probability can swap, and the text after them cannot be compared. Any other difference means
    that a rejected draft left a trace.
    """
    equal = 0
    ties = 0
    wrong = []
    for number, (tokens, right) in enumerate(zip(drafted, choices, strict=True), 1):
        place = _first_difference(tokens, right)
        equal += len(right) if place is None else place
        if place is None:
            if len(right) < EQUAL and len(tokens) > len(right):
                end = f"after {len(right)} tokens"
                wrong.append(f"prompt {number}: the text ends {end} without drafting, not with it")
            continue
        token = tokens[place] if place < len(tokens) else None
        choice = right[place]
        if choice.margin < TIE and choice.second in (None, token):
            ties += 1
        else:
            found = "nothing" if token is None else token
            without = f"{choice.token} without ({choice.margin:.2f} ahead)"
            wrong.append(f"prompt {number}, token {place}: {found} with drafting, {without}")
    detail = f"{equal} tokens are the same without drafting"
    detail += f", up to {ties} near ties" if ties else ""
    return Check("same text", not wrong and equal > 0, some(wrong) or detail)


def check_acceptance(measured: Acceptance, unquantized: Acceptance, most: float) -> Check:
    """Acceptance is at most `most` below that of the unquantized file, if that was measured.

    With 300 drafts, chance alone moves it by 0.04: another quant soon generates a different text.
    """
    if measured.acceptance is None or unquantized.acceptance is None:
        return Check("acceptance", True, f"not compared: {unquantized.skipped}")
    passed = unquantized.acceptance - measured.acceptance <= most
    detail = f"{measured.acceptance:.1%}, BF16 has {unquantized.acceptance:.1%}"
    limit = f": at most {100 * most:.0f} points less are allowed"
    return Check("acceptance", passed, detail if passed else detail + limit)


def measure_acceptance(path: Path, request: Request, llama: LlamaCpp) -> Acceptance:
    """Measure the acceptance of an unquantized file, to compare its quants with.

    It is a draft model if there is a target. A file larger than the memory is skipped: each token
    would read it from the disk again. Raises VerificationError if the head drafts nothing,
    DamagedError if the file or its target has changed.
    """
    files = [path, *([request.target] if request.target else [])]
    if reason := memory.too_large(files, llama):
        return Acceptance(skipped=f"BF16 was not run: {reason}")
    opened = split.read(path)
    if reason := converter_architectures.why_not_drafting(opened):
        return Acceptance(skipped=reason)
    with recorded_digests.reading(path, request.digests), reading_target(request):
        check, answers = check_drafting(opened, request, llama)
    if not check.passed:
        raise VerificationError(
            f"the BF16 file that quants are compared with, {path}: {check.detail}"
        )
    return _acceptance_of(answers)


def check_programs(opened: Gguf, llama: LlamaCpp, name: str = "programs") -> Check:
    """llama-gguf-split can read the file."""
    dry_run = ("--split", "--dry-run", "--split-max-size", "999G")
    with tempfile.TemporaryDirectory() as scratch:
        try:
            llama.gguf_split([*dry_run, opened.path, Path(scratch) / "none"])
        except StorageError:
            raise  # says nothing about the file
        except ForgeError as error:
            return Check(name, False, str(error))
    return Check(name, True, "llama-gguf-split can read it")


def check_vision(opened: Gguf, request: Request, llama: LlamaCpp) -> Check:
    """llama-server loads a model with this vision tower, and an image becomes prompt tokens."""
    if request.target is None:
        raise ConfigError(f"{opened.path}: is a vision tower: name its model with --target")
    text = {"type": "text", "text": "What is this?"}
    picture = {"type": "image_url", "image_url": {"url": _PICTURE}}
    try:
        with _serve(request.target, ["--mmproj", str(opened.path)], llama) as server:
            tokens = server.prompt_tokens([text, picture]) - server.prompt_tokens([text])
    except StorageError:
        raise  # says nothing about the file
    except ForgeError as error:
        return Check("vision", False, str(error))
    return Check("vision", tokens > 1, f"a picture adds {tokens} tokens to the prompt")


@contextmanager
def _serve(model: Path, options: Sequence[str], llama: LlamaCpp) -> Iterator[Server]:
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "server.log"
        with serve(llama, model, log=log, options=["--ctx-size", "4096", *options]) as server:
            yield server


def _counts(answers: Sequence[Completion]) -> tuple[int, int]:
    """Numbers of drafted and accepted tokens."""
    drafts = sum(answer.drafts for answer in answers)
    return drafts, sum(answer.accepted for answer in answers)


def _acceptance_of(answers: Sequence[Completion]) -> Acceptance:
    drafts, accepted = _counts(answers)
    return Acceptance(drafts=drafts, accepted=accepted, acceptance=round(accepted / drafts, 4))


def _unknown_types(opened: Gguf) -> str:
    """Advice for a file with types that the programs may not know; empty without any."""
    names = reader.unreadable(opened)
    if not names:
        return ""
    listed = ", ".join(f"{name} ({count} tensors)" for name, count in names.items())
    return (
        f"; it has types that these programs may not know: {listed}: set "
        "`toolchain.llama_cpp.bin_dir` (by hand: --bin) to programs that can run them"
    )


def _check_accepted(counts: tuple[int, int], least: float) -> Check:
    drafts, accepted = counts
    detail = f"{accepted} of {drafts} drafts accepted"
    if drafts > 0 and accepted >= least * drafts:
        return Check("drafting", True, detail)
    alive = drafts > 0 and accepted >= LEAST_ACCEPTANCE * drafts
    reason = "below min_acceptance" if alive else "the head is dead or damaged"
    return Check("drafting", False, f"{detail}, fewer than {least:.0%}: {reason}")


def _check_loading(answers: Sequence[Completion], reason: str | None) -> Check:
    tokens = [len(answer.tokens) for answer in answers]
    detail = f"{sum(tokens)} tokens generated from {len(tokens)} prompts"
    return Check("loading", all(tokens), detail + (f"; {reason}" if reason else ""))


def _first_difference(tokens: Sequence[int], right: Sequence[Choice]) -> int | None:
    """Where the text with drafting departs from the choices without it."""
    pairs = enumerate(zip_longest(tokens[: len(right)], right))
    return next((place for place, (token, choice) in pairs if token != choice.token), None)
