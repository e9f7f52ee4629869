"""The model that a sidecar or a vision tower is run with: which one, and whether a drafter fits."""

from collections.abc import Sequence
from pathlib import Path

from mtpforge.errors import ConfigError
from mtpforge.gguf import split
from mtpforge.gguf.reader import Gguf
from mtpforge.inject import match
from mtpforge.llama_cpp import memory
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.progress import say
from mtpforge.verify.report import Check, some
from mtpforge.verify.request import Request

_SIZES = {
    "embedding_length_out": "embedding_length",
    "attention.key_length": "attention.key_length",
    "attention.key_length_swa": "attention.key_length_swa",
}
"""Key of the drafter -> key of its target that must be equal: llama-server aborts on others."""


def choose_target(path: Path, targets: Sequence[Path], llama: LlamaCpp) -> tuple[Path, str]:
    """The first model that fits into the memory with a file; if none does, the smallest.

    Also returns why it is not the first one; empty if it is. Raises ToolchainError.
    """
    reasons = [memory.too_large([path, target], llama) for target in targets]
    fitting = [target for target, reason in zip(targets, reasons, strict=True) if not reason]
    if fitting:
        chosen = fitting[0]
    else:
        chosen = min(targets, key=lambda target: memory.size_of([target]))
        reason = reasons[targets.index(chosen)]
        say(f"slow, because each token reads {chosen.name} from the disk again: {reason}")
    if chosen == targets[0]:
        return chosen, ""
    return chosen, f"run with {chosen.name} instead of {targets[0].name}: {reasons[0]}"


def check_target(opened: Gguf, request: Request) -> Check:
    """The drafter reads the hidden state and the keys of the target, and has its vocabulary.

    Raises ConfigError without a target.
    """
    if request.target is None:
        raise ConfigError(f"{opened.path}: is a drafter: name its model with --target")
    target = split.read(request.target)
    problems = []
    for key, theirs in _SIZES.items():
        found = opened.get(f"{opened.architecture}.{key}")
        right = target.get(f"{target.architecture}.{theirs}")
        if found != right:
            problems.append(f"{key} is {found}, {theirs} of the target is {right}")
    if difference := match.vocabulary_difference(opened.metadata, target.metadata):
        problems.append(f"{difference.name} is {difference.found!r}, not {difference.expected!r}")
    return Check("target", not problems, some(problems) or f"fits {target.architecture}")
