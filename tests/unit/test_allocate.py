"""The choice of a type for each group of tensors within a number of bytes."""

import itertools
import random
import time

import pytest
from mtpforge.errors import ConfigError
from mtpforge.search.allocate import Groups, Option, allocate

BITS = {"IQ3_S": 3.4375, "IQ4_XS": 4.25, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625, "Q8_0": 8.5}
ERRORS = {"IQ3_S": 2e-2, "IQ4_XS": 6e-3, "Q4_K": 5e-3, "Q5_K": 1.3e-3, "Q6_K": 3.5e-4, "Q8_0": 3e-5}


def made(generator: random.Random, count: int) -> Groups:
    groups = []
    for _ in range(count):
        weights = 256 * generator.choice((1, 64, 256, 512, 1280))
        sensitivity = 10 ** generator.uniform(-3, 1)
        noise = {kind: generator.uniform(0.8, 1.2) for kind in BITS}
        groups.append(
            [
                Option(
                    kind, int(weights * BITS[kind] / 8), sensitivity * ERRORS[kind] * noise[kind]
                )
                for kind in BITS
            ]
        )
    return groups


def loss(chosen: list[Option]) -> float:
    return sum(option.loss for option in chosen)


def size(chosen: list[Option]) -> int:
    return sum(option.bytes for option in chosen)


def test_is_the_best_of_all_choices() -> None:
    generator = random.Random(1)
    excess = []
    for _ in range(60):
        groups = made(generator, count=6)
        smallest = sum(options[0].bytes for options in groups)
        largest = sum(options[-1].bytes for options in groups)
        budget = generator.randint(smallest, largest)
        best = min(
            loss(each) for each in map(list, itertools.product(*groups)) if size(each) <= budget
        )
        chosen = allocate(groups, budget)
        assert size(chosen) <= budget
        excess.append(loss(chosen) / best)
    assert max(excess) < 1 + 1e-9


def odd(generator: random.Random) -> Groups:
    """A few groups with ties, as substitutes of types make them, losses of zero, or one type."""
    groups = []
    losses = generator.choice(([8.0, 4.0, 2.0], [1.0, 0.0, 0.0], [1e6, 1e-6, 1e-12]))
    for _ in range(generator.randint(1, 5)):
        unit = generator.choice((32, 100, 1000))
        kinds = generator.sample(list(BITS), generator.randint(1, 5))
        steps = [list(BITS).index(kind) // 2 for kind in kinds]
        groups.append(
            [
                Option(kind, unit * (step + 1), losses[step] * unit)
                for kind, step in zip(kinds, steps, strict=True)
            ]
        )
    return groups


def test_is_the_best_of_choices_with_ties_in_any_order_of_candidates() -> None:
    generator = random.Random(6)
    for _ in range(400):
        groups = odd(generator)
        least, most = (sum(f(o.bytes for o in group) for group in groups) for f in (min, max))
        budget = generator.randint(least, most + 40)
        best = min(
            loss(each) for each in map(list, itertools.product(*groups)) if size(each) <= budget
        )
        chosen = allocate(groups, budget)
        assert size(chosen) <= budget
        assert loss(chosen) <= best * (1 + 1e-9)
        shuffled = [generator.sample(group, len(group)) for group in groups]
        assert allocate(shuffled, budget) == chosen
        assert loss(allocate(shuffled[::-1], budget)) == pytest.approx(loss(chosen), rel=1e-9)


def test_fills_the_bytes_of_a_model() -> None:
    generator = random.Random(2)
    groups = made(generator, count=300)
    largest = sum(options[-1].bytes for options in groups)
    start = time.process_time()
    for share in (0.45, 0.6, 0.8):
        chosen = allocate(groups, int(share * largest))
        assert 0.999 * share * largest < size(chosen) <= share * largest
    assert time.process_time() - start < 20


def test_more_bytes_never_lose() -> None:
    groups = made(random.Random(3), count=30)
    smallest = sum(options[0].bytes for options in groups)
    losses = [loss(allocate(groups, smallest + 5000 * step)) for step in range(40)]
    assert all(later <= earlier * (1 + 1e-2) for earlier, later in itertools.pairwise(losses))


def test_a_sensitive_group_gets_the_better_type() -> None:
    dull = [Option("Q4_K", 100, 1.0), Option("Q8_0", 200, 0.1)]
    sensitive = [Option("Q4_K", 100, 30.0), Option("Q8_0", 200, 3.0)]
    assert [each.type for each in allocate([dull, sensitive], 300)] == ["Q4_K", "Q8_0"]


def test_ties_go_to_the_first_group() -> None:
    options = [Option("Q4_K", 100, 1.0), Option("Q8_0", 200, 0.1)]
    assert [each.type for each in allocate([options] * 3, 450)] == ["Q8_0", "Q4_K", "Q4_K"]


def test_a_type_that_costs_more_and_loses_more_is_never_chosen() -> None:
    groups = [[Option("IQ4_XS", 90, 0.5), Option("Q4_K", 100, 1.0), Option("Q8_0", 200, 0.1)]] * 4
    assert {each.type for each in allocate(groups, 520)} == {"IQ4_XS", "Q8_0"}


def test_exactly_enough_bytes() -> None:
    groups = made(random.Random(4), count=5)
    smallest = sum(options[0].bytes for options in groups)
    assert {each.type for each in allocate(groups, smallest)} == {"IQ3_S"}
    largest = sum(options[-1].bytes for options in groups)
    assert {each.type for each in allocate(groups, largest)} == {"Q8_0"}


def test_too_few_bytes_are_refused() -> None:
    groups = made(random.Random(5), count=5)
    smallest = sum(options[0].bytes for options in groups)
    with pytest.raises(ConfigError, match="cannot fit: the smallest types take"):
        allocate(groups, smallest - 1)


def test_no_groups_need_no_bytes() -> None:
    assert allocate([], 0) == []
