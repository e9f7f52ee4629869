"""The check that a drafter and the model that it drafts for belong together."""

from mtpforge.errors import ConfigError
from mtpforge.gguf import split
from mtpforge.gguf.reader import Gguf
from mtpforge.inject import match
from mtpforge.verify.report import Check, some
from mtpforge.verify.request import Request

_SIZES = {
    "embedding_length_out": "embedding_length",
    "attention.key_length": "attention.key_length",
    "attention.key_length_swa": "attention.key_length_swa",
}
"""Key of the drafter -> key of its target that must be equal: llama-server aborts on others."""


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
