"""The forecast of a measurement: as many rounds as its search takes, within its minutes."""

import random
from dataclasses import replace
from typing import Any

import pytest
from mtpforge.forecast import sweep
from mtpforge.forecast.costs import Machine, ProgramSpeed, Tokens, run
from mtpforge.prompts import answer_tokens
from mtpforge.rules.config import MeasureSettings
from test_pairs import FAST, LENGTHS, SLOW, THRESHOLDS, Simulated

MACHINE = Machine(threads=2, memory=8 << 30, disk=1e9, bandwidth=1e10)
SURFACES = {**FAST, "slow": SLOW}


def planned(prompts: int = 9, blocks: int = 1, **settings: Any) -> sweep.Sweep:
    grid = {"n_max": LENGTHS, "p_min": THRESHOLDS}
    return sweep.sweep(MeasureSettings(**{**grid, **settings}), prompts, blocks)


@pytest.mark.parametrize("name", SURFACES)
def test_as_many_rounds_are_forecast_as_a_search_takes(name: str) -> None:
    noise = random.Random(name)
    bench = Simulated(SURFACES[name], lambda _: noise.gauss(1, 0.02))
    bench.found()
    rounds = sum(map(len, bench.rounds.values()))
    found = planned()
    assert 18 <= rounds <= 31 and 1 / 1.4 < found.servers / rounds < 1.4
    assert 1 / 1.4 < found.pairs / (len(bench.rounds) - 1) < 1.6


def test_a_small_grid_is_measured_whole() -> None:
    found = planned(n_max=[1, 2], p_min=[0, 0.75], repeats=3)
    assert (found.rounds, found.pairs, found.servers) == (4, 4, 1 + 4 + 2 * 2)


def test_a_head_of_several_blocks_drafts_no_further_than_it_has_blocks() -> None:
    assert planned(n_max=[1, 2, 3, 4], p_min=[0], blocks=2).pairs == 2


def test_without_a_head_there_is_no_search() -> None:
    found = planned(blocks=0, repeats=4)
    assert (found.rounds, found.servers, found.tokens.drafted) == (0, 4, 0)
    assert found.tokens.single > 0


def test_first_rounds_have_a_request_more_and_last_rounds_all_forms() -> None:
    """One prompt is asked twice; a later round begins with a few tokens."""
    found = planned(prompts=9, n_max=[2], p_min=[0.5], repeats=3, forms=["raw", "chat"])
    answer = answer_tokens(9)
    tokens = (10 + 9 + 9 + 9) * answer + 2 * sweep.WARM_UP
    assert found.tokens == (tokens, tokens, 0)


@pytest.mark.parametrize("minutes", [1, 2, 20])
def test_the_minutes_bound_it(minutes: int) -> None:
    slow = replace(MACHINE, programs=ProgramSpeed(server=1, token=5e-3, drafted=5e-3))
    whole = planned()
    found, cost = sweep.cost(whole, minutes, 1e7, slow)
    assert cost.seconds <= 60 * minutes or found.rounds == 1
    assert (found.rounds < whole.rounds) == (minutes < 20)
    _, unbounded = sweep.cost(whole, 1000, 1e7, slow)
    assert unbounded.seconds > 60 * 2


def test_each_server_reads_the_file() -> None:
    fast = replace(MACHINE, programs=ProgramSpeed(server=1e-9, token=1e-9, drafted=1e-9))
    found, cost = sweep.cost(planned(), 1000, 1e9, fast, share=0)
    assert cost.seconds == pytest.approx(found.servers * 1e9 / fast.bandwidth, rel=0.1)


def test_a_model_that_memory_limits_drafts_more_tokens_than_it_reads_its_weights() -> None:
    """People report 1.4 to 1.8 times as many; a tiny model takes the time of a request anyway."""
    costs = [
        [costs_of(size, tokens) for tokens in (Tokens(single=1e6), Tokens(drafted=1e6))]
        for size in (20e9, 1e6)
    ]
    assert costs[0][1] == pytest.approx(costs[0][0] / 1.5, rel=0.01)
    assert costs[1][1] == pytest.approx(1.5 * costs[1][0], rel=0.01)


def costs_of(size: float, tokens: Tokens) -> float:
    return run(size, replace(MACHINE, memory=64 << 30), tokens).seconds
