"""Texts go through a model's own chat template, and are otherwise unchanged."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import CHECKPOINTS, ROOT, Run
from mtpforge.convert import native
from mtpforge.errors import ConfigError, ToolchainError
from mtpforge.gguf import reader
from mtpforge.io.text import text_files
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.quantize import conversations, imatrix

TEXT = """First.

```python
def f():

    return 1
```

Third, of
two lines.


Fourth.
{blank}
Fifth.
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "all.gguf"
    native.convert(CHECKPOINTS / "tiny-qwen3.5", path, "all", tokenizer_pre="qwen35")
    return path


def test_paragraphs_are_said_by_turns(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT.format(blank="   "))
    first, second = conversations.conversations(tmp_path / "a.txt")
    assert [message["role"] for message in first] == ["user", "assistant"] * 2
    assert [message["content"] for message in first] == [
        "First.",
        "```python\ndef f():\n\n    return 1\n```",
        "Third, of\ntwo lines.",
        "Fourth.",
    ]
    assert second == [{"role": "user", "content": "Fifth."}]


@pytest.mark.parametrize("name", ["calibration", "held-out", "mixed"])
def test_no_word_of_an_embedded_text_is_lost(name: str) -> None:
    path = ROOT / f"workflow/texts/{name}.txt"
    said = [each["content"] for part in conversations.conversations(path) for each in part]
    assert " ".join(said).split() == path.read_text(encoding="utf-8").split()


def test_a_line_of_a_jsonl_is_a_conversation(tmp_path: Path) -> None:
    chats = tmp_path / "chats.jsonl"
    asked = {"role": "user", "content": "Hi", "id": 3}
    chats.write_text(json.dumps({"messages": [asked], "source": "x"}) + "\n\n")
    assert list(conversations.conversations(chats)) == [[{"role": "user", "content": "Hi"}]]
    asked["content"] = "Hi\u2028there"
    chats.write_text(json.dumps({"messages": [asked]}, ensure_ascii=False), encoding="utf-8")
    assert next(conversations.conversations(chats))[0]["content"] == "Hi\u2028there"
    for line, message in (
        ("{}", "chats.jsonl:1: has no list of `messages`"),
        ('{"messages": []}', "has no list of `messages`"),
        ('{"messages": [3]}', "needs a `role`"),
        ('{"messages": [{"role": "root", "content": "x"}]}', "needs a `role`"),
        ('{"messages": [{"role": "user", "content": []}]}', "a text as `content`"),
        ("[1]", "chats.jsonl:1"),
        ("{", "chats.jsonl:1"),
    ):
        chats.write_text(line)
        with pytest.raises(ConfigError, match=message):
            list(conversations.conversations(chats))


class Server:
    """Answers like llama-server, or in the wrong form."""

    def __init__(self, answer: Any = None) -> None:
        self.answer = answer

    def ask(self, path: str, request: dict[str, Any]) -> dict[str, Any]:
        assert path == "/apply-template" and request["add_generation_prompt"] is False
        if isinstance(self.answer, ToolchainError):
            raise self.answer
        said = "".join(f"<{each['role']}>{each['content']}" for each in request["messages"])
        return {"prompt": said} if self.answer is None else {"prompt": self.answer}


def answering(monkeypatch: pytest.MonkeyPatch, server: Server) -> None:
    @contextmanager
    def serve(*_: Any) -> Iterator[Server]:
        yield server

    monkeypatch.setattr(conversations, "serve", serve)


def test_a_template_that_is_missing_or_refuses_is_an_error(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("One.\n\nTwo.")
    opened, llama, texts = reader.read(model), LlamaCpp(), [tmp_path / "a.txt"]
    answering(monkeypatch, Server())
    assert conversations.rendered(opened, texts, llama) == "<user>One.<assistant>Two."
    answering(monkeypatch, Server(answer=3))
    with pytest.raises(ToolchainError, match="answers /apply-template with '3'"):
        conversations.rendered(opened, texts, llama)
    answering(monkeypatch, Server(answer=ToolchainError("roles must alternate")))
    with pytest.raises(ToolchainError, match=r"a\.txt: roles must alternate"):
        conversations.rendered(opened, texts, llama)
    del opened.metadata["tokenizer.chat_template"]
    with pytest.raises(ConfigError, match="has no chat template: set no `chat`, or"):
        conversations.rendered(opened, texts, llama)


def test_llama_server_applies_the_template_and_llama_imatrix_sees_its_tokens(
    run: Run, model: Path, toolchain: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("What is six?\n\nSix.")
    chat = {"messages": [{"role": "system", "content": "Be brief."}]}
    (folder / "b.jsonl").write_text(json.dumps(chat))
    out = tmp_path / "chats.txt"
    done = run("conversations.py", model, "--text", folder, "--threads", 1, "--out", out)
    assert done.returncode == 0, done.stderr
    assert out.read_text() == (
        "<|im_start|>user\nWhat is six?<|im_end|>\n"
        "<|im_start|>assistant\nSix.<|im_end|>\n"
        "<|im_start|>system\nBe brief.<|im_end|>\n"
    )
    out.write_text(out.read_text() * 60)
    llama = LlamaCpp(toolchain, threads=1)
    for special in (True, False):
        imatrix.compute(model, out, tmp_path / f"{special}.gguf", llama, special=special)
    chunks = [
        reader.read(tmp_path / f"{special}.gguf").get("imatrix.chunk_count")
        for special in (True, False)
    ]
    assert chunks[0] < chunks[1]  # `<|im_start|>` is one token, or several of plain text


def test_texts_of_a_folder_are_joined_by_name(model: Path, toolchain: Path, tmp_path: Path) -> None:
    folder = tmp_path / "my texts"
    folder.mkdir()
    words = (ROOT / "workflow/texts/mixed.txt").read_text(encoding="utf-8")
    (folder / "2.txt").write_text(words[4000:])
    (folder / "1.txt").write_text(words[:4000])
    (folder / "notes.md").write_text("not read")
    assert [path.name for path in text_files(folder)] == ["1.txt", "2.txt"]
    (tmp_path / "joined.txt").write_text(f"{words[:4000]}\n\n{words[4000:]}\n\n")
    llama = LlamaCpp(toolchain, threads=1)
    imatrix.compute(model, folder, tmp_path / "folder.gguf", llama)
    imatrix.compute(model, tmp_path / "joined.txt", tmp_path / "joined.gguf", llama)
    digests = [imatrix.digests(tmp_path / f"{name}.gguf") for name in ("folder", "joined")]
    assert digests[0] == digests[1]
    assert reader.read(tmp_path / "folder.gguf").get("imatrix.datasets") == ["my texts.txt"]
    (folder / "3.jsonl").write_text("{}")
    with pytest.raises(ConfigError, match=r"3\.jsonl: conversations need the chat template: set"):
        imatrix.compute(model, folder, tmp_path / "x.gguf", llama)


def test_the_embedded_texts_do_not_overlap() -> None:
    """A file would look better on what its importance matrix, or its recipe, has seen."""
    texts = {
        name: (ROOT / f"workflow/texts/{name}.txt").read_text(encoding="utf-8")
        for name in ("calibration", "held-out", "mixed")
    }
    assert len(texts["held-out"].encode()) > 60_000
    length = 60
    held_out = texts.pop("held-out")
    for other in texts.values():
        seen = {other[i : i + length] for i in range(len(other) - length)}
        parts = (held_out[i : i + length] for i in range(len(held_out) - length))
        assert not [part for part in parts if part in seen and len(part.split()) > 4]
