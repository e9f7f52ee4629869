"""Prompts of several kinds, raw and by a model's chat template."""

from typing import Any

import pytest
from mtpforge import prompts
from mtpforge.errors import ConfigError, ToolchainError
from mtpforge.measure.prompt_forms import check_kinds, kind_and_form, prepare

TEXTS = {"code": "def f", "review.chat": "Review:", "sum.thinking": "2 + 2?"}


class Server:
    """A server whose tokens are words of a letter, with a template like that of Qwen3."""

    def __init__(self, context: int = 100, thinks: bool = True, works: bool = True) -> None:
        self.limit, self.thinks, self.works = context, thinks, works

    def context(self) -> int:
        return self.limit

    def tokenize(self, text: str) -> list[int]:
        return [1] * len(text)

    def in_chat(self, text: str, *, thinking: bool) -> str:
        if not self.works:
            raise ToolchainError("llama-server answers /apply-template with status 500")
        return f"<user>{text}<model>" + "<think>" * (thinking and self.thinks)


def made(
    server: Server, forms: tuple[str, ...] = ("raw", "chat", "thinking"), **values: Any
) -> Any:
    found = prepare(server, TEXTS, forms, 10, **{"has_template": True, **values})  # type: ignore[arg-type]
    return [[(case.kind, case.form) for case in cases] for cases in found]


def test_each_prompt_is_natural_in_one_form_and_compared_in_the_others() -> None:
    main, more = made(Server())
    assert main == [("code", "raw"), ("review", "chat"), ("sum", "thinking")]
    assert more == [
        ("code", "chat"),
        ("code", "thinking"),
        ("review", "raw"),
        ("review", "thinking"),
        ("sum", "raw"),
        ("sum", "chat"),
    ]


def test_a_template_without_thinking_has_two_forms() -> None:
    main, more = made(Server(thinks=False))
    assert main == [("code", "raw"), ("review", "chat"), ("sum", "chat")]
    assert more == [("code", "chat"), ("review", "raw"), ("sum", "raw")]


@pytest.mark.parametrize("values", [{"has_template": False}, {"server": Server(works=False)}])
def test_without_a_template_that_works_all_are_raw(values: dict[str, Any]) -> None:
    assert made(**{"server": Server(), **values}) == [
        [("code", "raw"), ("review", "raw"), ("sum", "raw")],
        [],
    ]


def test_forms_can_be_chosen() -> None:
    assert made(Server(), ("chat",)) == [
        [("code", "chat"), ("review", "chat"), ("sum", "chat")],
        [],
    ]


def test_a_prompt_that_is_too_long_is_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    main, _ = made(Server(context=20), ("raw",))
    assert main == [("code", "raw"), ("review", "raw"), ("sum", "raw")]
    main, _ = made(Server(context=16), ("raw",))
    assert main == [("code", "raw"), ("sum", "raw")]
    assert "prompt review.chat: left out" in capsys.readouterr().err
    with pytest.raises(ToolchainError, match="all prompts are too long"):
        made(Server(context=5))


def test_the_embedded_prompts_are_of_nine_kinds() -> None:
    found = prompts.read_prompts(prompts.MEASURED)
    check_kinds(found)
    assert {kind_and_form(name)[1] for name in found} == {"raw", "chat", "thinking"}
    assert len(found) == 9 and max(map(len, found.values())) < 6000
    assert len(prompts.read_prompts(prompts.PROMPTS)) == 3  # verification stays as short


def test_two_prompts_of_a_kind_are_refused() -> None:
    with pytest.raises(ConfigError, match="two prompts of the kind 'code'"):
        check_kinds(["code", "prose", "code.chat"])
    assert kind_and_form("v1.2") == ("v1.2", "raw") and kind_and_form(".chat") == (".chat", "raw")
