"""How fast a quantization is beside one plain llama-quantize run, from nothing and after a changed recipe, and with two workers.

Of a BF16 GGUF of Qwen3.5-2B's shapes as Q4_K_M, with a plan, digests and a manifest, as the workflow makes it; all until on the
disk. That each result has the bytes of the plain run is checked.

example: quantization.py --out results/bench/quantization.json
"""

import argparse
import filecmp
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from conversion import QWEN3_5_2B, ROOT, cost_of, write_checkpoint
from mtpforge import gguf_file
from mtpforge.plan import Plan
from mtpforge.quantize import plan_overrides

RECIPE = {"blk.([0-9]|1[0-4]).ffn_gate": "Q5_K", "attn_k.weight": "Q5_K"}  # a tenth of the weights, which Q4_K_M has as Q4_K


@dataclass(frozen=True)
class Bench:
    """A source, and a folder for all that is made of it."""

    source: Path
    work: Path

    def fresh(self) -> "Bench":
        """The same with nothing made yet."""
        shutil.rmtree(self.work, ignore_errors=True)
        (self.work / "results").mkdir(parents=True)
        os.sync()
        return self

    def plain(self, recipe: dict[str, str], out: Path) -> list[object]:
        """The command of a plain run."""
        overrides = plan_overrides(gguf_file.read(self.source), "Q4_K_M", "Q8_0", list(recipe.items()))
        options = [word for pattern, kind in overrides for word in ("--tensor-type", f"{pattern}={kind.lower()}")]
        return [ROOT / "resources/toolchain/bin/llama-quantize", *options, self.source, out, "Q4_K_M"]

    def plan(self, recipe: dict[str, str]) -> list[object]:
        """The command that plans."""
        (self.work / "recipe.yaml").write_text(json.dumps(recipe))
        program = [sys.executable, ROOT / "workflow/scripts/quantize_plan.py", self.source, "--type", "Q4_K_M"]
        inputs = ["--tensors", self.work / "recipe.yaml", "--digests", self.source.with_suffix(".json")]
        return [*program, *inputs, "--bin", ROOT / "resources/toolchain/bin", "--out", self.work / "plan.json"]

    def quantize(self, name: str, threads: int, *more: object) -> list[object]:
        """The command that quantizes as planned, with what is there already."""
        results = self.work / "results"
        program = [sys.executable, ROOT / "workflow/scripts/quantize.py", self.source, "--plan", self.work / "plan.json", *more]
        outputs = ["--digests", self.work / f"{name}.json", "--manifest", results / f"manifests/{name}.json"]
        return [*program, "--reuse", results, *outputs, "--threads", threads, "--bin", ROOT / "resources/toolchain/bin",
                "--log", self.work / f"{name}.log", "--out", results / f"{name}.gguf"]  # fmt: skip

    def outside(self, name: str, wall: float) -> float:
        """Seconds of a wall clock in which llama-quantize did not run: they do not depend on how fast that just was."""
        inside = re.findall(r"total time = *([\d.]+) ms", (self.work / f"{name}.log").read_text())
        return wall - sum(map(float, inside)) / 1000

    def check(self, name: str, plain: Path) -> None:
        """The result has the bytes of the plain run."""
        if not filecmp.cmp(self.work / f"results/{name}.gguf", plain, shallow=False):
            sys.exit(f"error: {name}: other bytes than those of a plain run")


def make_source(scratch: Path) -> Path:
    """The BF16 GGUF, made once."""
    checkpoint, out = write_checkpoint(scratch / "dense-24-layers", QWEN3_5_2B), scratch / "all.gguf"
    if not out.exists():
        convert = [sys.executable, ROOT / "workflow/scripts/convert.py", checkpoint, "--tokenizer-pre", "qwen35"]
        convert += ["--digests", out.with_suffix(".json"), "--out", out]
        subprocess.run(list(map(str, convert)), check=True, stderr=subprocess.DEVNULL)
    return out


def seconds(*commands: list[object]) -> float:
    """Wall clock of commands that run one after the other."""
    return sum(cost_of(*command).wall for command in commands)


def changed_share(bench: Bench) -> float:
    """The weights that the changed recipe gives another type, of all."""
    types = []
    for recipe in ({}, RECIPE):
        cost_of(*bench.plan(recipe))
        types.append(Plan.read(bench.work / "plan.json").types())
    tensors = gguf_file.read(bench.source).tensors
    changed = sum(info.elements for name, info in tensors.items() if types[0][name] != types[1][name])
    return changed / sum(info.elements for info in tensors.values())


def measure(bench: Bench, threads: int, repeats: int) -> tuple[dict[str, list[tuple[float, float]]], float]:
    """Wall clock of each kind of work, in pairs of which one runs right after the other: a machine's speed can drift.

    Which of the two is first changes from one repeat to the next. And the seconds of a whole quantization that are ours.
    """
    ours: list[float] = []
    plain, changed = bench.source.with_name("plain.gguf"), bench.source.with_name("changed.gguf")

    def from_nothing() -> float:
        taken = seconds(bench.fresh().plan({}), bench.quantize("whole", threads))
        bench.check("whole", plain)
        ours.append(bench.outside("whole", taken))
        return taken

    def after_a_change() -> float:
        taken = seconds(bench.plan(RECIPE), bench.quantize("changed", threads))
        bench.check("changed", changed)
        return taken

    def one_worker() -> float:
        taken = seconds(bench.fresh().plan({}), bench.quantize("one", 1))
        bench.check("one", plain)
        return taken

    def two_workers() -> float:
        plan, start = bench.fresh().plan({}), time.monotonic()
        cost_of(*plan)
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda i: cost_of(*bench.quantize(f"piece{i}", 1, "--piece", f"{i}/2")), (1, 2)))
        cost_of(*bench.quantize("two", 2))
        taken = time.monotonic() - start
        bench.check("two", plain)
        return taken

    pairs = {
        "from nothing": (lambda: seconds([*bench.plain({}, plain), threads]), from_nothing),
        "changed": (lambda: seconds([*bench.plain(RECIPE, changed), threads]), after_a_change),
        "two workers": (one_worker, two_workers),
    }
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in pairs}
    subprocess.run(["cat", str(bench.source)], stdout=subprocess.DEVNULL, check=True)
    for repeat in range(repeats):
        for name, (one, other) in pairs.items():
            times = [run() for run in ((one, other) if repeat % 2 == 0 else (other, one))]
            taken[name].append((times[0], times[1]) if repeat % 2 == 0 else (times[1], times[0]))
            print(f"{name}: {taken[name][-1][0]:.1f} s, {taken[name][-1][1]:.1f} s", file=sys.stderr, flush=True)
    for path in (plain, changed):
        path.unlink()
    return taken, min(ours)


def table(taken: dict[str, list[tuple[float, float]]], share: float, ours: float) -> str:
    """The best of each, because what else a machine does only adds to it, and their ratios, as Markdown."""

    def row(name: str, what: str, show: Callable[[float], str]) -> str:
        left, right = map(min, zip(*taken[name], strict=True))
        return f"| {what} | {left:.1f} s | {right:.1f} s | {show(right / left)} |"

    return "\n".join(
        [
            "| what | llama-quantize | mtpforge | |",
            "| --- | ---: | ---: | ---: |",
            row("from nothing", "from nothing", lambda ratio: f"{ratio:.3f} × its time; {ours:.1f} s are ours"),
            row("changed", f"with a recipe changed for {share:.1%} of the weights", lambda ratio: f"{ratio:.1%} of its time"),
            row("two workers", "one worker of one thread, and two (both mtpforge)", lambda ratio: f"{1 / ratio:.2f} × as fast"),
        ]
    )


def main() -> None:
    """Parse the command line, measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "results/bench/quantization.json")
    parser.add_argument("--scratch", type=Path, default=ROOT / "resources/bench", help="about 12 GB are used there")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    bench = Bench(make_source(args.scratch), args.scratch / "quantization")
    taken, ours = measure(bench, args.threads, args.repeats)
    share = changed_share(bench)
    shutil.rmtree(bench.work)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    about = {"processors": os.cpu_count(), "weights": bench.source.stat().st_size // 2, "share": share}
    result = {**about, "seconds": taken, "ours": ours}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(taken, share, ours))


if __name__ == "__main__":
    main()
