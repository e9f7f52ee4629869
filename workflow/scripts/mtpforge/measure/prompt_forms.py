"""What is measured: prompts of several kinds, raw and by the model's chat template.

The name of a prompt's file says its kind, and the form in which it is natural: `code.txt` is raw, a
text to continue; `summary.chat.txt` a message by the chat template, without thinking where that can
be turned off; `mathematics.thinking.txt` one with thinking. All pairs are measured with each prompt
in its natural form, and the fastest in its other forms too.
"""

from collections.abc import Collection, Mapping
from typing import Literal, NamedTuple, get_args

from mtpforge import progress
from mtpforge.errors import ConfigError, ToolchainError
from mtpforge.llama_cpp.server import Server

Form = Literal["raw", "chat", "thinking"]
FORMS: tuple[Form, ...] = get_args(Form)


class Case(NamedTuple):
    """A prompt of one kind in one form, as llama-server gets it."""

    kind: str
    form: str
    prompt: str


class Cases(NamedTuple):
    """Those to measure all pairs with, and those for the fastest pair alone."""

    main: list[Case]
    more: list[Case]


def kind_and_form(name: str) -> tuple[str, str]:
    """The kind and natural form of a prompt, from its file's name without .txt."""
    kind, _, form = name.rpartition(".")
    return (kind, form) if kind and form in FORMS else (name, "raw")


def check_kinds(names: Collection[str]) -> None:
    """Raise ConfigError if two prompts are of the same kind."""
    kinds = [kind_and_form(name)[0] for name in names]
    if twice := [kind for kind in kinds if kinds.count(kind) > 1]:
        raise ConfigError(f"two prompts of the kind {twice[0]!r}: keep one of them")


def prepare(
    server: Server,
    prompts: Mapping[str, str],
    forms: Collection[str],
    tokens: int,
    *,
    has_template: bool,
) -> Cases:
    """Make the cases of prompts, by their files' names, for answers of at most `tokens`.

    A prompt that llama-server's context is too short for is left out. Raises ToolchainError.
    """
    cases = Cases([], [])
    limit = server.context()
    for name, text in prompts.items():
        kind, natural = kind_and_form(name)
        found = _in_forms(server, text, has_template=has_template)
        wanted = {form: prompt for form, prompt in found.items() if form in forms} or found
        main = next(form for form in (natural, "chat", *FORMS) if form in wanted)
        longest = max(len(server.tokenize(prompt)) for prompt in wanted.values())
        if longest + tokens > limit:
            progress.say(f"prompt {name}: left out, too long for llama-server's context of {limit}")
            continue
        cases.main.append(Case(kind, main, wanted.pop(main)))
        cases.more.extend(Case(kind, form, prompt) for form, prompt in wanted.items())
    if not cases.main:
        raise ToolchainError(f"all prompts are too long for llama-server's context of {limit}")
    return cases


def _in_forms(server: Server, text: str, *, has_template: bool) -> dict[str, str]:
    """A prompt by form; thinking only if the template has it, neither if it does not work."""
    if not has_template:
        return {"raw": text}
    try:
        chat = server.in_chat(text, thinking=False)
        thinking = server.in_chat(text, thinking=True)
    except ToolchainError as error:
        progress.say(f"without chat template: {error}")
        return {"raw": text}
    return {"raw": text, "chat": chat, **({"thinking": thinking} if thinking != chat else {})}
