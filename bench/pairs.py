"""Compare the search for the fastest pair of n_max and p_min with a sweep of the whole grid.

The sweep measures each pair in three rounds, and the best median wins. The pair that the search
finds and the sweep's best, if they differ, then take turns for nine rounds, which neither has seen.

example: pairs.py results/tiny-qwen3.5/tiny-qwen3.5-Q8_0.gguf --out results/bench/pairs.json
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "workflow/scripts"))

from mtpforge import prompts  # noqa: E402
from mtpforge.llama_cpp import programs  # noqa: E402
from mtpforge.llama_cpp.programs import LlamaCpp  # noqa: E402
from mtpforge.measure.pairs import OFF, Pair, Search  # noqa: E402
from mtpforge.measure.speed import Bench, Settings  # noqa: E402

N_MAX = (1, 2, 3, 4, 5, 6, 8, 10)
P_MIN = (0.0, 0.25, 0.5, 0.75, 0.9)
ROUNDS = 3
TURNS = 9


@dataclass(frozen=True)
class Compared:
    """Both ways on one file: pairs, rounds of llama-server and seconds."""

    file: str
    swept: Pair
    searched: Pair
    share: float
    """Speed of the search's pair over that of the sweep's."""
    sweep_rounds: int
    search_rounds: int
    sweep_seconds: float
    search_seconds: float
    waiting: float | None
    """Share of the time that llama-server's threads waited for a processor."""


def main() -> None:
    """Parse the command line, measure each file, print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="F.gguf")
    parser.add_argument("--out", type=Path, required=True)
    prompts.add_option(parser)
    programs.add_options(parser)
    args = parser.parse_args()
    texts = prompts.read_prompts(args.prompts)
    found = [compare(path, texts, programs.from_options(args)) for path in args.files]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps([asdict(each) for each in found], indent=1) + "\n")


def compare(path: Path, texts: Mapping[str, str], llama: LlamaCpp) -> Compared:
    """Sweep, search, and let both results take turns."""
    settings = Settings(N_MAX, P_MIN, ROUNDS, forms=("raw",))
    bench = Bench(path, texts, settings=settings, llama=llama, options=())
    start = time.monotonic()
    searched, rounds = _search(bench)
    middle = time.monotonic()
    speeds = _sweep(bench)
    end = time.monotonic()
    swept = max(speeds, key=lambda pair: median(speeds[pair]))
    bench.best = searched
    result = Compared(
        file=path.name,
        swept=swept,
        searched=searched,
        share=1.0 if searched == swept else _share(bench, searched, swept),
        sweep_rounds=ROUNDS * (1 + len(speeds)),
        search_rounds=rounds,
        sweep_seconds=round(end - middle, 1),
        search_seconds=round(middle - start, 1),
        waiting=bench.waiting(),
    )
    print(result, flush=True)
    return result


def _search(bench: Bench) -> tuple[Pair, int]:
    """The pair, and the number of rounds, those that confirm it included."""
    bench.round(OFF)
    best = Search(N_MAX, P_MIN, bench.round).fastest()
    for _ in range(ROUNDS - 1):
        bench.round(OFF)
        bench.round(best)
    return best, sum(map(len, bench.rounds.values()))


def _sweep(bench: Bench) -> dict[Pair, list[float]]:
    pairs = [Pair(*each) for each in product(N_MAX, P_MIN)]
    speeds: dict[Pair, list[float]] = {pair: [] for pair in pairs}
    for _ in range(ROUNDS):
        bench.round(OFF)
        for pair in pairs:
            speeds[pair].append(bench.round(pair))
    return speeds


def _share(bench: Bench, one: Pair, other: Pair) -> float:
    """The speed of a pair over that of another."""
    speeds: dict[Pair, list[float]] = {one: [], other: []}
    for number in range(TURNS):
        for pair in (one, other) if number % 2 else (other, one):
            speeds[pair].append(bench.round(pair))
    return round(median(speeds[one]) / median(speeds[other]), 3)


if __name__ == "__main__":
    main()
