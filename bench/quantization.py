"""Compare the workflow's quantization with one plain llama-quantize run.

From nothing, after a changed recipe, and with two workers. Quantizes a BF16 GGUF of Qwen3.5-2B's
shapes to Q4_K_M with plan, digests and manifest, as the workflow does; the conversion has written
the source's digests. The two sides of a comparison run one after the other, with the source in
memory and their order swapped on each repeat. A run ends when everything is on the disk. Every
result must have the bytes of the plain run.

example: quantization.py --out results/bench/quantization.json
"""

import argparse
import filecmp
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conversion import QWEN3_5_2B, ROOT, cost_of, write_checkpoint
from mtpforge import cli
from mtpforge.gguf import reader
from mtpforge.quantize.recipe import head_recipe, plan_overrides

SCRIPTS = ROOT / "workflow/scripts"
BIN = ROOT / "resources/toolchain/bin"

RECIPE = {"blk.([0-9]|1[0-4]).ffn_gate": "Q5_K", "attn_k.weight": "Q5_K"}
"""Changes a tenth of the weights, which are Q4_K in a Q4_K_M file."""

Pairs = dict[str, list[list[float]]]
"""For each comparison, the seconds of its two sides in every repeat."""


def main() -> None:
    """Parse the command line, measure, and write and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "results/bench/quantization.json",
        help="JSON of all figures (default: %(default)s)",
    )
    parser.add_argument(
        "--scratch",
        type=Path,
        default=ROOT / "resources/bench",
        help="folder that needs about 20 GB (default: %(default)s)",
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=2,
        help="ten minutes each; best an even number (default: %(default)s)",
    )
    parser.add_argument(
        "--threads",
        type=int,
        default=os.cpu_count(),
        help="threads of llama-quantize (default: all processors)",
    )
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    bench = Bench(make_source(args.scratch), args.scratch / "quantization")
    result = {"processors": os.cpu_count(), **measure(bench, args.threads, args.repeats)}
    shutil.rmtree(bench.work)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


@dataclass(frozen=True)
class Bench:
    """A source, and a folder for everything made from it. Methods return shell commands."""

    source: Path
    work: Path

    def emptied(self) -> "Bench":
        """The same bench with an empty folder."""
        shutil.rmtree(self.work, ignore_errors=True)
        (self.work / "results").mkdir(parents=True)
        return self

    def plain(self, recipe: dict[str, str], name: str, threads: int) -> str:
        """Run llama-quantize directly."""
        source = reader.read(self.source)
        patterns = list(recipe.items())
        options: list[object] = []
        for pattern, kind in plan_overrides(source, "Q4_K_M", head_recipe("Q8_0"), patterns):
            options += ["--tensor-type", f"{pattern}={kind.lower()}"]
        out = self.work / f"{name}.gguf"
        return shell(BIN / "llama-quantize", *options, self.source, out, "Q4_K_M", threads)

    def plan(self, recipe: dict[str, str]) -> str:
        """Plan the quantization."""
        recipe_file = self.work / "recipe.yaml"
        recipe_file.write_text(json.dumps(recipe))
        program = [sys.executable, SCRIPTS / "quantize_plan.py", self.source]
        options = ["--type", "Q4_K_M", "--tensors", recipe_file, "--bin", BIN]
        digests = ["--digests", self.source.with_suffix(".json")]
        return shell(*program, *options, *digests, "--out", self.work / "plan.json")

    def whole(self, name: str, threads: int) -> str:
        """Quantize the whole file as planned, reusing finished tensors."""
        results = self.work / "results"
        outputs = ["--manifest", results / f"manifests/{name}.json", "--out"]
        return self._quantize(name, threads, *outputs, results / f"{name}.gguf")

    def pieces(self, name: str) -> str:
        """Quantize two pieces at once, on one thread each, and assemble the whole."""
        first = self._piece(1)
        second = self._piece(2)
        return f"{{ {first} & }} && {second} && wait $! && {self.whole(name, 1)}"

    def _piece(self, number: int) -> str:
        folder = self.work / "results/manifests/pieces"
        return self._quantize(f"piece{number}", 1, "--piece", f"{number}/2", "--out", folder)

    def _quantize(self, name: str, threads: int, *more: object) -> str:
        program = [sys.executable, SCRIPTS / "quantize.py", self.source]
        inputs = ["--plan", self.work / "plan.json", "--reuse", self.work / "results"]
        outputs = ["--digests", self.work / f"{name}.json", "--log", self.work / f"{name}.log"]
        return shell(*program, *inputs, *more, *outputs, "--threads", threads, "--bin", BIN)


def shell(*words: object) -> str:
    """Quote words as a shell command."""
    return shlex.join(map(str, words))


def make_source(scratch: Path) -> Path:
    """Make the BF16 GGUF, once."""
    checkpoint = write_checkpoint(scratch / "dense-24-layers", QWEN3_5_2B)
    out = scratch / "all.gguf"
    digests = out.with_suffix(".json")
    if not digests.exists():
        program = [sys.executable, SCRIPTS / "convert.py", checkpoint]
        options = ["--tokenizer-pre", "qwen35", "--digests", digests, "--out", out]
        subprocess.run(list(map(str, [*program, *options])), check=True)
    return out


def measure(bench: Bench, threads: int, repeats: int) -> dict[str, Any]:
    """Seconds of both sides of every comparison, and the share of weights the recipe changes."""
    pairs: Pairs = {"from nothing": [], "changed": [], "two workers": []}
    for _ in range(repeats):
        measure_whole(bench, threads, pairs)
        measure_workers(bench, pairs)
    before = reader.read(bench.work / "plain.gguf").tensors
    after = reader.read(bench.work / "changed.gguf").tensors
    weights = sum(info.elements for info in before.values())
    changed = [info for name, info in before.items() if after[name].type != info.type]
    share = sum(info.elements for info in changed) / weights
    return {"weights": weights, "changed": share, "seconds": pairs}


def measure_whole(bench: Bench, threads: int, pairs: Pairs) -> None:
    """Quantize from nothing, then after a change of the recipe."""
    results = bench.work / "results"
    whole = f"{bench.emptied().plan({})} && {bench.whole('whole', threads)}"
    compare(bench, pairs, "from nothing", (bench.plain({}, "plain", threads), whole))
    check(results / "whole.gguf", bench.work / "plain.gguf")
    again = f"{bench.plan(RECIPE)} && {bench.whole('changed', threads)}"
    compare(bench, pairs, "changed", (bench.plain(RECIPE, "changed", threads), again))
    check(results / "changed.gguf", bench.work / "changed.gguf")


def measure_workers(bench: Bench, pairs: Pairs) -> None:
    """Quantize with one worker and with two."""
    one = Bench(bench.source, bench.work / "one").emptied()
    two = Bench(bench.source, bench.work / "two").emptied()
    single = f"{one.plan({})} && {one.whole('whole', 1)}"
    double = f"{two.plan({})} && {two.pieces('whole')}"
    compare(bench, pairs, "two workers", (single, double))
    for each in (one, two):
        check(each.work / "results/whole.gguf", bench.work / "plain.gguf")


def compare(bench: Bench, pairs: Pairs, name: str, commands: tuple[str, str]) -> None:
    """Time two commands, in the other order on every second repeat.

    The machine's speed can change, and the first command leaves its files in memory.
    """
    order = -1 if len(pairs[name]) % 2 else 1
    seconds = [wall(bench, command) for command in commands[::order]][::order]
    pairs[name].append(seconds)
    shown = " and ".join(f"{value:.1f} s" for value in seconds)
    print(f"{name}: {shown}", file=sys.stderr, flush=True)


def wall(bench: Bench, command: str) -> float:
    """Seconds of a shell command, with the source in memory."""
    cost_of("cat", bench.source)
    return cost_of("sh", "-c", command).wall


def check(made: Path, expected: Path) -> None:
    """End the program unless both files have the same bytes."""
    if not filecmp.cmp(made, expected, shallow=False):
        sys.exit(f"error: {made}: other bytes than the plain run's {expected}")


def table(result: dict[str, Any]) -> str:
    """Means and their ratios, as Markdown."""
    share = f"{result['changed']:.1%}"
    changed = f"recipe changed for {share} of the weights | `llama-quantize`"
    pairs = result["seconds"]
    lines = [
        "| quantization | compared with | its time | ours | × its time | × faster |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
        row("from nothing | `llama-quantize`", pairs["from nothing"]),
        row(changed, pairs["changed"]),
        row("two workers of one thread | one of one thread", pairs["two workers"]),
    ]
    return "\n".join(lines)


def row(label: str, pairs: list[list[float]]) -> str:
    """One line of the table."""
    left, right = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
    return f"| {label} | {left:.1f} s | {right:.1f} s | {right / left:.3f} | {left / right:.2f} |"


if __name__ == "__main__":
    cli.run(main)
