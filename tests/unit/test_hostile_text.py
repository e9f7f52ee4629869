"""Hostile text is refused with one line, at once, within little memory; nothing is left.

Kinds and programs are in `hostile_text`; `bench/hostile_text.py` prints the worst of each kind.
"""

from pathlib import Path

import hostile_text
import pytest
from hostile_text import CASES, Case

SECONDS = 5.0
"""Of CPU time far less is used; a machine that is busy with other tests takes longer."""
MEGABYTES = 200.0
"""On top of what this process has."""


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kind}-{case.name}")
def test_hostile_text_is_refused(case: Case, tmp_path: Path) -> None:
    before = hostile_text.resident()
    outcome = hostile_text.attempt(hostile_text.prepared(case, tmp_path))
    assert hostile_text.problem(outcome, tmp_path) == ""
    assert outcome.seconds < SECONDS
    assert outcome.megabytes - before < MEGABYTES


def test_there_are_enough_cases_of_each_kind() -> None:
    assert len(CASES) > 400
    kinds = [case.kind for case in CASES]
    assert min(map(kinds.count, kinds)) >= 3
