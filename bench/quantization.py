"""How fast a quantization is beside one plain llama-quantize run, from nothing, after a changed recipe, and in two pieces.

Of a BF16 GGUF of Qwen3.5-2B's shapes as Q4_K_M, with a plan, digests and a manifest, as the workflow makes it; all until on the
disk. That each result has the bytes of the plain run is checked.

example: quantization.py --out results/bench/quantization.json
"""

import argparse
import filecmp
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversion import QWEN3_5_2B, ROOT, cost_of, typical, write_checkpoint
from mtpforge import gguf_file
from mtpforge.plan import Plan
from mtpforge.quantize import plan_overrides

RECIPE = {"attn_qkv": "Q5_K"}  # a ninth of the weights, which Q4_K_M has as Q4_K and Q6_K


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


def in_two_pieces(bench: Bench, workers: int, threads: int) -> float:
    """Wall clock of a plan, of two pieces by so many workers, and of the whole of them, for which the cores are free then."""
    start = time.monotonic()
    cost_of(*bench.plan({}))
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda i: cost_of(*bench.quantize(f"piece{i}", threads, "--piece", f"{i}/2")), (1, 2)))
    cost_of(*bench.quantize("two", workers * threads))
    taken = time.monotonic() - start
    bench.check("two", bench.source.with_name("plain.gguf"))
    return taken


def changed_share(bench: Bench) -> float:
    """The weights that the changed recipe gives another type, of all."""
    types = []
    for recipe in ({}, RECIPE):
        cost_of(*bench.plan(recipe))
        types.append(Plan.read(bench.work / "plan.json").types())
    tensors = gguf_file.read(bench.source).tensors
    changed = sum(info.elements for name, info in tensors.items() if types[0][name] != types[1][name])
    return changed / sum(info.elements for info in tensors.values())


def measure(bench: Bench, threads: int, repeats: int) -> dict[str, Any]:
    """All figures."""
    plain, changed = bench.source.with_name("plain.gguf"), bench.source.with_name("changed.gguf")
    subprocess.run(["cat", str(bench.source)], stdout=subprocess.DEVNULL, check=True)
    result: dict[str, Any] = {"weights": bench.source.stat().st_size // 2, "threads": threads}
    result["llama-quantize"] = typical(lambda: cost_of(*bench.plain({}, plain), threads), repeats).wall
    whole, recipe, full = [], [], 0.0
    for _ in range(repeats):
        bench.fresh()
        whole.append(seconds(bench.plan({}), bench.quantize("whole", threads)))
        bench.check("whole", plain)
        recipe.append(seconds(bench.plan(RECIPE), bench.quantize("changed", threads)))
    full = seconds([*bench.plain(RECIPE, changed), threads])
    bench.check("changed", changed)
    result |= {
        "quantize": sorted(whole)[repeats // 2],
        "recipe": sorted(recipe)[repeats // 2],
        "recipe plain": full,
        "share": changed_share(bench),
    }
    result["one worker"] = seconds(bench.fresh().plan({}), bench.quantize("one", 1))
    bench.check("one", plain)
    result["two workers"] = in_two_pieces(bench.fresh(), 2, 1)
    result["two pieces"] = in_two_pieces(bench.fresh(), 1, threads)
    for path in (plain, changed):
        path.unlink()
    shutil.rmtree(bench.work)
    return result


def table(result: dict[str, Any]) -> str:
    """The ratios, as Markdown."""
    plain, full = result["llama-quantize"], result["recipe plain"]
    one, two = result["one worker"], result["two workers"]
    rows = [
        ("from nothing", f"{plain:.1f} s", f"{result['quantize']:.1f} s", f"{result['quantize'] / plain:.3f} × its time"),
        (f"a recipe for {100 * result['share']:.0f}% of the weights changed", f"{full:.1f} s", f"{result['recipe']:.1f} s",
         f"{100 * result['recipe'] / full:.1f}% of its time"),
        ("in two pieces, one after the other", f"{plain:.1f} s", f"{result['two pieces']:.1f} s",
         f"{result['two pieces'] / plain:.3f} × its time"),
        ("two workers of one thread each, beside one", f"{one:.1f} s", f"{two:.1f} s", f"{one / two:.2f} × as fast"),
    ]  # fmt: skip
    lines = ["| what | llama-quantize | mtpforge | |", "| --- | ---: | ---: | ---: |"]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)]) + "\n"


def main() -> None:
    """Parse the command line, measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "results/bench/quantization.json")
    parser.add_argument("--scratch", type=Path, default=ROOT / "resources/bench", help="about 12 GB are used there")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    result = measure(Bench(make_source(args.scratch), args.scratch / "quantization"), args.threads, args.repeats)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps({"processors": os.cpu_count(), **result}, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
