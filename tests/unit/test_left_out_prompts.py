"""Prompts to which a model generates nothing are left out of its measurement, with a word."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import CHECKPOINTS
from mtpforge.convert import native
from mtpforge.errors import ToolchainError
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.llama_cpp.server import Completion
from mtpforge.measure import speed
from mtpforge.measure.measurement import Measurement

PROMPTS = {"code": "def add(", "prose": "A text.", "review.chat": "Review:"}


class Server:
    """A server that ends its answer at once to a prompt that begins with `ends`."""

    def __init__(self, ends: str) -> None:
        self.ends = ends

    def context(self) -> int:
        return 4096

    def tokenize(self, text: str) -> list[int]:
        return [1] * len(text)

    def in_chat(self, text: str, *, thinking: bool) -> str:
        return f"<user>{text}"

    def processor_time(self) -> dict[str, tuple[int, int]]:
        return {}

    def peak_memory(self) -> None:
        return None

    def completion(self, prompt: str, n_predict: int) -> Completion:
        tokens = [] if prompt.startswith(self.ends) else [1] * n_predict
        return Completion("", tokens, 100.0 if tokens else 0.0, 0, 0)


@pytest.fixture
def measured(
    toolchain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Measurement]:
    """Measures the prompts with a model that answers nothing to some of them."""
    path = tmp_path / "trunk.gguf"
    native.convert(CHECKPOINTS / "tiny-qwen3.5", path, "trunk", tokenizer_pre="qwen35")

    def measure(ends: str) -> Measurement:
        @contextmanager
        def serve(*_: Any, log: Path, **__: Any) -> Iterator[Server]:
            log.touch()
            yield Server(ends)

        monkeypatch.setattr(speed, "serve", serve)
        settings = speed.Settings([1], [0.0], repeats=2)
        return speed.measure(path, PROMPTS, settings, LlamaCpp(toolchain))

    return measure


def test_all_prompts_that_were_measured_are_listed(measured: Callable[..., Measurement]) -> None:
    assert measured("none").prompts.keys() == {"code", "prose", "review"}


@pytest.mark.parametrize(("ends", "left_out"), [("A text.", "prose"), ("<user>Review:", "review")])
def test_a_prompt_without_an_answer_is_left_out(
    measured: Callable[..., Measurement],
    capsys: pytest.CaptureFixture[str],
    ends: str,
    left_out: str,
) -> None:
    """In its other forms too: a base model may end a text at once, but not a chat."""
    found = measured(ends)
    assert found.prompts.keys() == {"code", "prose", "review"} - {left_out}
    assert {run.kind for run in found.runs} == found.prompts.keys()
    assert found.by_n_max[0].repeats == 2
    assert f"left out, because the model generates nothing: {left_out}" in capsys.readouterr().err


def test_a_model_that_answers_nothing_at_all_is_an_error(
    measured: Callable[..., Measurement],
) -> None:
    with pytest.raises(ToolchainError, match="llama-server generated nothing from any prompt"):
        measured("")
