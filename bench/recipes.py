"""Compare recipes that were found for a size with llama.cpp's own mixtures of that size.

For both tiny checkpoints at the sizes of four types, with an importance matrix for both sides. The
KL divergence from BF16 is measured on held-out.txt; matrix and sensitivities are from other text.
First it tells what errors and all runs by tensor take, and how much of that is llama.cpp: in
CPU time, which other programs on the machine hardly change. Ends with 1 if a target is missed.

example: recipes.py --out results/bench/recipes.json
"""

import argparse
import json
import math
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CHECKPOINTS = ROOT / "tests/checkpoints"
sys.path[:0] = [str(ROOT / "workflow/scripts"), str(CHECKPOINTS)]

import corpus  # noqa: E402
from mtpforge import processors, table  # noqa: E402
from mtpforge.convert import native  # noqa: E402
from mtpforge.gguf import reader  # noqa: E402
from mtpforge.gguf.reader import Gguf  # noqa: E402
from mtpforge.llama_cpp.programs import LlamaCpp  # noqa: E402
from mtpforge.measure import perplexity  # noqa: E402
from mtpforge.quantize import imatrix  # noqa: E402
from mtpforge.quantize.llama_quantize import run  # noqa: E402
from mtpforge.quantize.mixture import Types  # noqa: E402
from mtpforge.quantize.recipe import head_recipe  # noqa: E402
from mtpforge.quantize.request import QuantizeRequest  # noqa: E402
from mtpforge.rules.variant import CANDIDATES  # noqa: E402
from mtpforge.search import found, groups, probes, sensitivity  # noqa: E402
from mtpforge.search.errors import Errors, measure_errors  # noqa: E402
from mtpforge.search.settings import CHUNKS, PROBE  # noqa: E402

MODELS = ("tiny-qwen3.5", "tiny-qwen3.5-moe")
TYPES = ("Q3_K_M", "IQ4_XS", "Q4_K_M", "Q5_K_M")
TARGETS = {
    ("tiny-qwen3.5", "tensor"): 0.65,
    ("tiny-qwen3.5", "class"): 0.80,
    ("tiny-qwen3.5-moe", "tensor"): 0.30,
    ("tiny-qwen3.5-moe", "class"): 0.35,
}
"""The most that the geometric mean of found over stock KL divergence may be."""
MOST_SECONDS = 180
"""The most that errors and runs by tensor may take on two cores."""
LEAST_SHARE = 0.9
"""The least share of their CPU time that must be llama.cpp's."""
METHODS = ("tensor", "class", "prior")
HELD_OUT_CHUNKS = 16

Ratios = dict[str, dict[str, tuple[float, float]]]
"""Method -> type -> KL divergence and bytes, each over those of the stock file."""


def main() -> None:
    """Parse the command line, measure, and write and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "results/bench/recipes.json",
        help="JSON of all figures (default: %(default)s)",
    )
    parser.add_argument("--model", choices=MODELS, action="append", help="default: both")
    parser.add_argument("--threads", type=int, default=processors.available())
    args = parser.parse_args()
    llama = LlamaCpp(ROOT / "resources/toolchain/bin", args.threads)
    figures: dict[str, Ratios] = {}
    times: dict[str, Times] = {}
    for name in args.model or MODELS:
        with tempfile.TemporaryDirectory() as folder:
            search = Bench(name, Path(folder), llama)
            times[name] = search.measure()
            print(f"{name}: errors and runs by tensor: {times[name]}", flush=True)
            figures[name] = search.ratios()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(shown(figures))
    sys.exit("\n".join([*too_slow(times), *missed(figures)]) or 0)


@dataclass(frozen=True)
class Times:
    """Seconds by the clock, and CPU seconds of this process and of the programs that it ran."""

    clock: float
    own: float
    programs: float

    @classmethod
    def now(cls) -> "Times":
        """Those since this process started."""
        own, programs = (
            used.ru_utime + used.ru_stime
            for used in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        )
        return cls(time.monotonic(), own, programs)

    def __sub__(self, earlier: "Times") -> "Times":
        """Those in between."""
        return Times(
            self.clock - earlier.clock, self.own - earlier.own, self.programs - earlier.programs
        )

    @property
    def share(self) -> float:
        """That of llama.cpp in the CPU time."""
        return self.programs / (self.own + self.programs)

    def __str__(self) -> str:
        """In words."""
        return (
            f"{table.duration(self.clock)}, {self.own + self.programs:.0f} CPU seconds, "
            f"{self.share:.0%} of them in llama.cpp"
        )


@dataclass(frozen=True)
class Bench:
    """A checkpoint, and a folder for everything made from it."""

    name: str
    folder: Path
    llama: LlamaCpp

    @cached_property
    def source(self) -> Gguf:
        """The BF16 file."""
        path = self.folder / "BF16.gguf"
        native.convert(CHECKPOINTS / self.name, path, "all", "qwen35")
        return reader.read(path)

    @cached_property
    def matrix(self) -> Path:
        """The importance matrix."""
        text, path = self.folder / "matrix.txt", self.folder / "matrix.gguf"
        text.write_text(corpus.held_out_text(40_000, seed=23), encoding="utf-8")
        imatrix.compute(self.source.path, text, path, self.llama)
        return path

    @cached_property
    def errors(self) -> dict[str, Errors]:
        """The errors of all types."""
        kinds = (*CANDIDATES, PROBE)
        return {kind: measure_errors(self.source, kind, self.matrix, self.llama) for kind in kinds}

    @cached_property
    def search(self) -> probes.Search:
        """What a search needs first."""
        text = self.folder / "search.txt"
        text.write_text(corpus.held_out_text(seed=22), encoding="utf-8")
        return probes.Search(
            self.source,
            logits=self.logits(text, CHUNKS),
            matrix=self.matrix,
            llama=self.llama,
            keep=self.folder / "kept",
            identity=self.name,
        )

    def measure(self) -> Times:
        """The errors, and the runs by tensor, which are kept."""
        search, start = self.search, Times.now()
        assert self.errors
        probes.measure(search, "tensor")
        return Times.now() - start

    @cached_property
    def sensitivities(self) -> dict[str, dict[str, float]]:
        """The sensitivity of each unit, by method."""
        search = self.search
        units = groups.units(self.source)
        errors = {name: each.error for name, each in self.errors[PROBE].tensors.items()}
        by_tensor = probes.measure(search, "tensor").kl_divergence
        by_class = probes.measure(search, "class").kl_divergence
        return {
            "tensor": sensitivity.by_tensor(units, errors, by_tensor),
            "class": sensitivity.by_class_and_layer(units, errors, by_class),
            "prior": sensitivity.by_prior(units),
        }

    @cached_property
    def reference(self) -> Path:
        """The logits on the held-out text."""
        return self.logits(CHECKPOINTS / "held-out.txt", HELD_OUT_CHUNKS)

    def logits(self, text: Path, chunks: int) -> Path:
        """Those on a text."""
        path = self.folder / f"{text.stem}.logits"
        perplexity.reference_logits(self.source.path, text, path, chunks=chunks, llama=self.llama)
        return path

    def ratios(self) -> Ratios:
        """All methods at all sizes."""
        made: Ratios = {method: {} for method in METHODS}
        for kind in TYPES:
            for method, ratio in self.at(kind):
                made[method][kind] = ratio
        return made

    def at(self, kind: str) -> Iterator[tuple[str, tuple[float, float]]]:
        """Each method's KL divergence and bytes at the size of a type, over those of the type."""
        asked = QuantizeRequest(kind, head=head_recipe("Q8_0"), imatrix=self.matrix)
        sizes = found.Sizes.measure(self.source, asked, self.llama)
        stock = found.stock_types(self.source, asked, self.llama)
        size, moved = self.made(kind, stock)
        assert size == sizes.of(stock), "the size that is reckoned is not that of the file"
        for method in METHODS:
            types = found.choose(
                sizes,
                stock,
                errors=[self.errors[each] for each in CANDIDATES],
                sensitivities=self.sensitivities[method],
                most=size,
            )
            own_size, own_moved = self.made(kind, types)
            assert own_size == sizes.of(types) <= size
            yield method, (own_moved / moved, own_size / size)

    def made(self, kind: str, types: Types) -> tuple[int, float]:
        """Bytes and KL divergence of the file with these types."""
        out = self.folder / "made.gguf"
        run(self.source, out, types=types, file_type=kind, matrix=self.matrix, llama=self.llama)
        _, moved = perplexity.against_reference(out, self.reference, self.llama)
        return out.stat().st_size, moved.mean


def mean(ratios: Mapping[str, tuple[float, float]]) -> float:
    """The geometric mean of the KL divergences."""
    return math.exp(sum(math.log(max(moved, 1e-9)) for moved, _ in ratios.values()) / len(ratios))


def shown(figures: Mapping[str, Ratios]) -> str:
    """A table of all figures."""
    rows = [("model", "sensitivity", *TYPES, "mean", "target", "least of size")]
    for model, methods in figures.items():
        for method, ratios in methods.items():
            target = TARGETS.get((model, method))
            cells = [f"{ratios[kind][0]:.2f}" for kind in TYPES]
            least = min(size for _, size in ratios.values())
            end = (f"{mean(ratios):.3f}", f"{target:.2f}" if target else "-", f"{least:.4f}")
            rows.append((model, method, *cells, *end))
    return table.markdown(rows, left=2)


def too_slow(times: Mapping[str, Times]) -> Iterator[str]:
    """The models whose errors and runs take too long, or too long outside of llama.cpp."""
    for model, took in times.items():
        if (took.own + took.programs) / 2 > MOST_SECONDS:
            yield f"{model}: errors and runs by tensor take over {MOST_SECONDS} s on two cores"
        if took.share < LEAST_SHARE:
            yield f"{model}: {took.share:.0%} of the time is llama.cpp's, not {LEAST_SHARE:.0%}"


def missed(figures: Mapping[str, Ratios]) -> Iterator[str]:
    """The targets that are not reached."""
    for model, methods in figures.items():
        for method, ratios in methods.items():
            target = TARGETS.get((model, method))
            if target and mean(ratios) > target:
                yield f"{model} by {method}: {mean(ratios):.3f}, not {target}"
            if method == "tensor" and max(moved for moved, _ in ratios.values()) > 1:
                yield f"{model} by tensor: worse than a stock type"
            if min(size for _, size in ratios.values()) < 0.99:
                yield f"{model} by {method}: more than 1% below the size"


if __name__ == "__main__":
    main()
