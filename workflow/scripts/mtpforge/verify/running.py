"""Checks in the real llama.cpp: the file loads, the head drafts, drafting changes nothing."""

import os
import tempfile
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from mtpforge import table
from mtpforge.errors import ConfigError, ForgeError
from mtpforge.gguf import reader
from mtpforge.gguf.reader import Gguf
from mtpforge.io.text import read_json
from mtpforge.llama_cpp import architectures, process, programs, server
from mtpforge.verify.request import Check, Request, raise_failed, some

# 64 x 64 pixels in one colour, as PNG.
PICTURE = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAEAAAABAAQMAAACQp+OdAAAAA1BMVEXIHlpnOX0XAAAAD0lEQVR42mNgGAWjgHwAAA"
    "JAAAHgTR1EAAAAAElFTkSuQmCC"
)
N_PREDICT = 200
EQUAL = 100  # tokens of each prompt that must be the same without drafting
TIE = 0.1  # of log-probability: two tokens nearer than this can change places when they are computed in batches of another size


def check_running(
    opened: Gguf, request: Request, bin_dir: Path
) -> tuple[list[Check], dict[str, Any]]:
    """The file loads, its head drafts well enough, and the text is the same without drafting; for the report, what was accepted."""
    checks, answers = check_drafting(opened, request, bin_dir)
    if not any(answer.drafts for answer in answers):
        return checks, {}
    measured = _accepted(answers)
    if request.unquantized:
        checks.append(
            check_acceptance(
                measured["acceptance"], request.unquantized, request.max_acceptance_drop
            )
        )
    checks.append(check_without_drafting(opened, request, answers, bin_dir))
    return checks, measured


def check_drafting(
    opened: Gguf, request: Request, bin_dir: Path
) -> tuple[list[Check], list[server.Completion]]:
    """A real llama-server loads the file and continues every prompt; with a head it drafts, and a share is accepted.

    One token ahead for each block of the head, greedily: what is accepted then depends on the head alone.
    """
    undrafted = architectures.undrafted(opened)
    drafting = not request.headless and undrafted is None
    options = [
        *_options(request),
        "--check-tensors",
    ]  # all values are numbers, those among them that no sample has
    if drafting:
        options += ["--spec-type", "draft-mtp", "--spec-draft-n-max", str(len(opened.head_blocks))]
    if request.target:
        options += ["--model-draft", str(opened.path)]
    with tempfile.TemporaryDirectory() as scratch:
        try:
            with programs.serve(
                request.target or opened.path, Path(scratch) / "server.log", options, bin_dir
            ) as running:
                answers = [running.completion(prompt, N_PREDICT) for prompt in request.prompts]
        except ForgeError as error:
            return [Check("drafting" if drafting else "loading", False, str(error))], []
    if not drafting:
        tokens = [len(answer.tokens) for answer in answers]
        detail = f"{sum(tokens)} tokens generated from {len(tokens)} prompts" + (
            f"; {undrafted}" if undrafted else ""
        )
        return [Check("loading", all(tokens), detail)], []
    drafts, accepted = (
        sum(answer.drafts for answer in answers),
        sum(answer.accepted for answer in answers),
    )
    enough = drafts > 0 and accepted >= request.min_acceptance * drafts
    detail = f"{accepted} of {drafts} drafts accepted"
    if not enough:
        detail += f", at least {request.min_acceptance:.0%} must be: the head is dead or damaged"
    return [Check("drafting", enough, detail)], answers


def _options(request: Request) -> list[str]:
    return ["--ctx-size", "4096", "--threads", str(request.threads)]


def check_without_drafting(
    opened: Gguf, request: Request, answers: Sequence[server.Completion], bin_dir: Path
) -> Check:
    """A server that does not draft says the same as one that did."""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            model = request.target or opened.path
            with programs.serve(
                model, Path(scratch) / "server.log", _options(request), bin_dir
            ) as running:
                choices = [running.choices(prompt, EQUAL) for prompt in request.prompts]
        except ForgeError as error:
            return Check("same text", False, str(error))
    return check_same([answer.tokens for answer in answers], choices)


def check_same(
    drafted: Sequence[Sequence[int]], choices: Sequence[Sequence[server.Choice]]
) -> Check:
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
                wrong.append(
                    f"prompt {number}: goes on with drafting, ends after {len(right)} tokens without"
                )
    detail = f"{equal} tokens are the same without drafting" + (
        f", up to {ties} near ties" if ties else ""
    )
    return Check("same text", not wrong and equal > 0, some(wrong) or detail)


def acceptance(
    path: Path, request: Request, bin_dir: Path = programs.DEFAULT_BIN
) -> dict[str, Any]:
    """What a file accepts of its head's drafts, as its quantizations are going to be measured; or why that was not measured.

    A file larger than the memory is not run: each token would read it from the disk again. Raises VerificationError where it does
    not draft at all.
    """
    memory, size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), path.stat().st_size
    if size > memory:
        return {
            "skipped": f"BF16 was not run: {table.size(size)} do not fit into {table.size(memory)} of memory"
        }
    opened = reader.read(path)
    if reason := architectures.undrafted(opened):
        return {"skipped": reason}
    checks, answers = check_drafting(opened, request, bin_dir)
    raise_failed(path.name, checks)
    return _accepted(answers)


def _accepted(answers: Sequence[server.Completion]) -> dict[str, Any]:
    drafts, accepted = (
        sum(answer.drafts for answer in answers),
        sum(answer.accepted for answer in answers),
    )
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
    return Check(
        "acceptance",
        drop <= most,
        detail if drop <= most else f"{detail}: it may be lower by {100 * most:.0f} points",
    )


def check_programs(
    opened: Gguf, request: Request, bin_dir: Path, name: str = "programs"
) -> list[Check]:
    """The other programs that are going to read the file can: llama-gguf-split, and llama-perplexity where that is asked for."""
    loaded: list[str] = []
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text.txt"
        text.write_text("\n".join(request.prompts) * 8, encoding="utf-8")
        commands: dict[str, list[str | Path]] = {
            "llama-gguf-split": [
                "--split",
                "--dry-run",
                "--split-max-size",
                "999G",
                opened.path,
                Path(scratch) / "none",
            ]
        }
        if request.perplexity and not request.target:
            threads = str(request.threads)
            commands["llama-perplexity"] = [
                "-m",
                opened.path,
                "-f",
                text,
                "-c",
                "16",
                "--chunks",
                "1",
                "-t",
                threads,
            ]
        for program, arguments in commands.items():
            try:
                process.call([programs.find(bin_dir, program), *arguments])
            except ForgeError as error:
                return [Check(name, False, str(error))]
            loaded.append(program)
    return [Check(name, True, f"{' and '.join(loaded)} can read it")]


def check_seeing(opened: Gguf, request: Request, bin_dir: Path) -> Check:
    """Of a vision tower: a real llama-server loads the model with it, and a picture becomes tokens of the prompt."""
    if request.target is None:
        raise ConfigError(
            f"{opened.path}: a vision tower is verified with its model: name it with --target"
        )
    options = [
        "--ctx-size",
        "4096",
        "--threads",
        str(request.threads),
        "--mmproj",
        str(opened.path),
    ]
    text, picture = (
        {"type": "text", "text": "What is this?"},
        {"type": "image_url", "image_url": {"url": PICTURE}},
    )

    def length(running: server.Server, *content: object) -> int:
        answer = running.ask(
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": content}], "max_tokens": 1},
        )
        return int(answer["usage"]["prompt_tokens"])

    with tempfile.TemporaryDirectory() as scratch:
        try:
            with programs.serve(
                request.target, Path(scratch) / "server.log", options, bin_dir
            ) as running:
                seen = length(running, text, picture) - length(running, text)
        except ForgeError as error:
            return Check("seeing", False, str(error))
    return Check("seeing", seen > 1, f"a picture is {seen} tokens of the prompt")
