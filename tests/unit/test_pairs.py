"""The search for the fastest pair of n_max and p_min, on simulated speeds with noise."""

import random
import re
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
from mtpforge import progress
from mtpforge.llama_cpp.server import Completion
from mtpforge.measure.pairs import OFF, Pair, Search
from mtpforge.measure.prompt_forms import Case, Cases
from mtpforge.measure.recommendation import Advice
from mtpforge.measure.speed import Bench, Settings, _Round, _sweep
from test_card import gguf

LENGTHS = [1, 2, 3, 4, 5, 6, 8, 10]
THRESHOLDS = [0, 0.25, 0.5, 0.75, 0.9]
GRID = [Pair(*each) for each in product(LENGTHS, THRESHOLDS)]
Surface = Callable[[Pair], float]


def surface(right: float, draft: float, verify: float, known: float) -> Surface:
    """Tokens per second, 100 without drafting.

    `right` is the share of drafted tokens that are right, `draft` and `verify` are the cost of a
    drafted token in passes of the model, and `known` says how well low probabilities tell the
    wrong ones.
    """

    def speed(pair: Pair) -> float:
        caught, lost = min(1.0, known * pair.p_min), 0.35 * pair.p_min**3
        all_right, one_wrong, tokens, drafted, cost = 1.0, 0.0, 1.0, 0.0, 1.0
        for _ in range(pair.n_max):
            cost += draft * (all_right + one_wrong)
            one_wrong = (all_right * (1 - right) + 0.8 * one_wrong) * (1 - caught)
            all_right *= right * (1 - lost)
            tokens += all_right
            drafted += all_right + one_wrong
        return 100 * tokens / (cost + verify * drafted)

    return speed


FAST = {
    "code on a GPU": surface(0.87, 0.08, 0.02, 0.9),
    "prose on a GPU": surface(0.55, 0.08, 0.02, 0.9),
    "trivial": surface(0.9, 0.12, 0.05, 0.7),
    "nearly free": surface(0.9, 0.03, 0.01, 1.0),
}
SLOW = surface(0.5, 0.4, 0.5, 0.8)


@pytest.mark.parametrize("name", FAST)
def test_a_nearly_fastest_pair_is_found_in_a_third_of_the_rounds(name: str) -> None:
    """Three rounds of the whole grid and of no drafting would be 123."""
    speed = FAST[name]
    best = max(map(speed, GRID))
    lost = []
    for seed in range(100):
        noise = random.Random(seed)
        search = Search(LENGTHS, THRESHOLDS, lambda pair: speed(pair) * noise.gauss(1, 0.02))  # noqa: B023
        lost.append(1 - speed(search.fastest()) / best)
        assert sum(map(len, search.speeds.values())) + 5 <= 123 / 3
    assert sorted(lost)[94] < 0.05 and max(lost) < 0.07


def test_a_grid_of_one_pair_and_one_row_are_searched() -> None:
    speed = FAST["code on a GPU"]
    assert Search([3], [0.5], speed).fastest() == Pair(3, 0.5)
    row = max((Pair(n_max, 0) for n_max in LENGTHS), key=speed)
    assert Search(LENGTHS, [0], speed).fastest() == row


@pytest.mark.parametrize("p_min", [[0, 0.25, 0.5, 0.75], [0, 0.2, 0.4, 0.6, 0.8, 0.9]])
def test_the_highest_p_min_is_tried(p_min: list[float]) -> None:
    """Its neighbours are slower than those of the others, so no path leads to it."""
    search = Search(LENGTHS, p_min, lambda pair: 1 + 9 * (pair.p_min == p_min[-1]))
    assert search.fastest().p_min == p_min[-1]


def test_without_time_only_the_first_pair_is_measured() -> None:
    search = Search(LENGTHS, THRESHOLDS, lambda pair: 1.0, may_go_on=lambda: False)
    assert search.fastest() == next(iter(search.speeds)) and len(search.speeds) == 1


class Simulated(Bench):
    """A bench whose rounds take simulated time, on a machine that other programs slow down."""

    def __init__(
        self,
        speed: Surface,
        load: Callable[[float], float],
        minutes: float = 60,
        blocks: int = 1,
    ) -> None:
        self.path = Path("x.gguf")
        self.gguf = gguf("x.gguf", heads=blocks)
        self.settings = Settings(LENGTHS, THRESHOLDS, repeats=3, minutes=minutes)
        self.cases = Cases([Case("code", "raw", "")], [])
        self.rounds = {}
        self.best = OFF
        self.cut_short = False
        self.left, self.times, self.expected = progress.Left(), None, 0
        self.speed, self.load, self.clock = speed, load, 0.0

    @property
    def can_draft(self) -> bool:
        return True

    def has_time(self, rounds: int) -> bool:
        return self.clock + 10 * rounds <= self.settings.minutes * 60

    def _round(self, tried: Pair, *, more: bool, log: Path) -> _Round:
        slower = self.load(self.clock)
        self.clock += 10
        drafts = 100 * tried.n_max
        answer = Completion("", [1] * 200, self.speed(tried) / slower, drafts, drafts // 2)
        found = {self.cases.main[0]: (answer, [0.5] * tried.n_max)}
        return _Round(found, None, None, cold={} if tried in self.rounds else found)

    def found(self) -> Advice:
        _sweep(self)
        return self.advice()


def test_a_head_of_several_blocks_drafts_no_further_than_it_has_blocks() -> None:
    """llama.cpp b11434 cuts n_max to their number; one block drafts on from its own output."""
    for blocks, tried in ((1, set(LENGTHS)), (2, {1, 2})):
        bench = Simulated(lambda pair: 100.0 + pair.n_max, lambda _: 1.0, blocks=blocks)
        bench.found()
        assert {pair.n_max for pair in bench.rounds} <= tried | {0}
        assert bench.best.n_max == max(tried)


def bursts(seed: int) -> Callable[[float], float]:
    """Half of all minutes are two to four times as slow; seconds vary by 3%."""
    noise = random.Random(seed)
    minutes = [noise.choice([1.0, noise.uniform(2, 4)]) for _ in range(200)]
    return lambda clock: minutes[int(clock // 60)] * noise.gauss(1, 0.03)


def test_other_programs_never_make_a_slow_head_look_fast() -> None:
    """Without the scheduler's accounting, which only tells it sooner."""
    found = [Simulated(SLOW, bursts(seed)).found() for seed in range(40)]
    assert not any(advice.n_max for advice in found)
    assert sum(not advice.steady for advice in found) > 10


def test_a_quiet_machine_gives_a_steady_recommendation() -> None:
    for seed in range(10):
        noise = random.Random(seed)
        bench = Simulated(FAST["code on a GPU"], lambda _: noise.gauss(1, 0.02))  # noqa: B023
        advice = bench.found()
        assert advice.steady and advice.n_max and advice.n_max > 3
        best = [total for total in bench.totals() if total.n_max == advice.n_max]
        assert max(total.repeats for total in best) == 3


def test_one_burst_is_measured_again() -> None:
    """A machine that is busy only while the fastest pair is confirmed first."""
    quiet = Simulated(FAST["trivial"], lambda _: 1.0)
    quiet.found()
    rounds = quiet.clock / 10
    busy = Simulated(FAST["trivial"], lambda clock: 3.0 if clock == (rounds - 2) * 10 else 1.0)
    assert busy.found().steady and busy.clock > quiet.clock


def test_the_budget_of_minutes_is_kept() -> None:
    bench = Simulated(FAST["trivial"], lambda _: 1.0, minutes=2)
    assert bench.found().n_max and bench.clock <= 120
    assert len(bench.rounds) > 3


def test_a_search_that_its_minutes_cut_short_says_so() -> None:
    for minutes, is_cut in ((2, True), (60, False)):
        bench = Simulated(FAST["trivial"], lambda _: 1.0, minutes=minutes)
        advice = bench.found()
        assert bench.cut_short == is_cut == ("search cut short by `minutes`" in advice.verdict)


def test_each_round_says_its_number_of_about_how_many(capsys: pytest.CaptureFixture[str]) -> None:
    bench = Simulated(FAST["code on a GPU"], lambda _: 1.0)
    bench.found()
    said = capsys.readouterr().err.splitlines()
    assert said[:2] == [
        "x.gguf: round 1 of about 26: without drafting",
        "x.gguf: round 2 of about 26: n_max 2",
    ]
    assert re.fullmatch("x.gguf: round 25 of about 25: (n_max.*|without.*)", said[-1])


def test_a_round_on_a_busy_machine_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    bench = Simulated(SLOW, lambda _: 1.0)
    bench.times = (60, 40)
    bench.round(OFF)
    busy = "other programs take 40% of the time: not steady"
    assert capsys.readouterr().err == f"x.gguf: round 1: without drafting ({busy})\n"
    bench.round(OFF)
    assert capsys.readouterr().err == "x.gguf: round 2: without drafting\n"


def test_the_rounds_left_are_those_that_there_is_time_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bench = Simulated(SLOW, lambda _: 1.0, minutes=10)
    monkeypatch.setattr("time.monotonic", lambda: bench.left.start + bench.done * 60)
    bench.expected = 8
    for _ in range(2):
        bench.round(OFF)
    bench.expected = 50
    bench.round(OFF)
    starts = ["round 1 of about 8:", "round 2 of about 8, 7 min 0 s left:", "round 3 of about 10,"]
    for line, start in zip(capsys.readouterr().err.splitlines(), starts, strict=True):
        assert line.startswith(f"x.gguf: {start}")


def test_no_speedup_is_claimed_if_the_speeds_are_not_steady() -> None:
    noise = random.Random(1)
    bench = Simulated(FAST["trivial"], lambda _: noise.choice([1.0, 2.0]))
    assert not bench.found().steady
    assert {each.speedup for each in bench.by_kind(steady=False)} == {None}
