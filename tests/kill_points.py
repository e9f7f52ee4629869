"""Kills a conversion that frees shards at a point of it, in this process."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
from mtpforge.convert import freeing
from mtpforge.hub.freed import FreedShard
from mtpforge.io import holes
from mtpforge.io.journal import Journal

FREEING = (
    (holes, "_punch"),
    (FreedShard, "write"),
    (Journal, "_append"),
    (Journal, "remove"),
    (freeing.Freeing, "finish"),
)
"""Before a journal or record, and before each hole."""


class Killed(BaseException):
    """What stops a conversion at once: nothing but the operating system cleans up."""


class Faults:
    """Raises an error at a point of a conversion: before a call in FREEING, or of those in `more`.

    It is raised by the call that makes `left` 0; `passed` counts all.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, more: Iterable[tuple[Any, str]] = ()
    ) -> None:
        self.left = 0
        self.error: BaseException = Killed()
        self.passed = 0
        for owner, name in (*FREEING, *more):
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.passed += 1
            self.left -= 1
            if self.left == 0:
                raise self.error
            return real(*arguments, **named)

        return call
