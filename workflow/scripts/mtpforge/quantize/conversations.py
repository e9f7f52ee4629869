"""Texts as conversations in a model's own chat template, which llama-server applies.

Paragraphs of a plain text, between blank lines, become by turns what the user says and what the
model answers, `TURNS` in a conversation; a block between ``` lines counts as one paragraph. Each
line of a *.jsonl is a conversation: `{"messages": [{"role": "user", "content": "..."}, ...]}`.
"""

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from mtpforge.errors import ConfigError, ToolchainError
from mtpforge.gguf.reader import Gguf
from mtpforge.io import text
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.llama_cpp.server import Server, serve

Messages = list[dict[str, str]]

TURNS = 4
"""Messages of a conversation."""
_ROLES = ("system", "user", "assistant")
_OPTIONS = ("--no-warmup", "--no-prefill-assistant", "--ctx-size", "512")
_TEMPLATE = "tokenizer.chat_template"


def rendered(model: Gguf, files: Iterable[Path], llama: LlamaCpp) -> str:
    """All conversations of these texts, one after the other, as the model sees them.

    Raises ConfigError if the model has no chat template, or a *.jsonl is malformed, ToolchainError
    if llama-server cannot load the model or the template refuses a conversation.
    """
    if not model.get(_TEMPLATE):
        raise ConfigError(f"{model.path}: has no chat template: set no `chat`, or `chat_template`")
    given = [(path, messages) for path in files for messages in conversations(path)]
    with (
        tempfile.TemporaryDirectory() as folder,
        serve(llama, model.path, Path(folder, "log"), _OPTIONS) as server,
    ):
        return "".join(_applied(server, path, messages) for path, messages in given)


def conversations(path: Path) -> Iterator[Messages]:
    """The conversations of a text. Raises ConfigError if it is a malformed *.jsonl."""
    if path.suffix == ".jsonl":
        for where, line in text.read_json_lines(path, ConfigError):
            yield _messages(where, line)
        return
    paragraphs = list(_paragraphs(text.read_text(path, ConfigError, within=text.ANYWHERE)))
    for start in range(0, len(paragraphs), TURNS):
        turns = enumerate(paragraphs[start : start + TURNS])
        yield [{"role": _ROLES[1 + turn % 2], "content": said} for turn, said in turns]


def _paragraphs(content: str) -> Iterator[str]:
    """The paragraphs between blank lines; those in a block of code do not count."""
    lines: list[str] = []
    in_code = False
    for line in content.splitlines():
        in_code ^= line.startswith("```")
        if line.strip() or in_code:
            lines.append(line)
        elif lines:
            yield "\n".join(lines)
            lines = []
    if lines:
        yield "\n".join(lines)


def _messages(where: Path, line: dict[str, Any]) -> Messages:
    """The messages in a line of a *.jsonl; other fields than role and content are left out."""
    messages = line.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ConfigError(f"{where}: has no list of `messages`")
    return [_message(where, each) for each in messages]


def _message(where: Path, message: Any) -> dict[str, str]:
    found = message if isinstance(message, dict) else {}
    role, content = found.get("role"), found.get("content")
    if role not in _ROLES or not isinstance(content, str):
        raise ConfigError(
            f"{where}: a message needs a `role` ({', '.join(_ROLES)}) and a text as `content`"
        )
    return {"role": role, "content": content}


def _applied(server: Server, path: Path, messages: Messages) -> str:
    request = {"messages": messages, "add_generation_prompt": False}
    try:
        prompt = server.ask("/apply-template", request).get("prompt")
    except ToolchainError as error:
        raise ToolchainError(f"{path}: {error}") from None
    if not isinstance(prompt, str):
        raise ToolchainError(f"llama-server answers /apply-template with {str(prompt)[:60]!r}")
    return prompt
