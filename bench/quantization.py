"""How fast a quantization is beside one plain llama-quantize run, from nothing and after a changed recipe, and with two workers.

Of a BF16 GGUF of Qwen3.5-2B's shapes as Q4_K_M, with a plan, digests and a manifest, as the workflow makes it; the source's digests
are those that the conversion writes. What is compared runs one after the other, each with the source in memory, and in the other
order the next time; it has ended when all is on the disk. That each result has the bytes of the plain run is checked.

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

RECIPE = {
    "blk.([0-9]|1[0-4]).ffn_gate": "Q5_K",
    "attn_k.weight": "Q5_K",
}  # a tenth of the weights, which Q4_K_M has as Q4_K


@dataclass(frozen=True)
class Bench:
    """A source, and a folder for all that is made of it; the commands are a shell's."""

    source: Path
    work: Path

    def fresh(self) -> "Bench":
        """The same with nothing made yet."""
        shutil.rmtree(self.work, ignore_errors=True)
        (self.work / "results").mkdir(parents=True)
        return self

    def plain(self, recipe: dict[str, str], name: str, threads: int) -> str:
        """A plain run."""
        overrides = plan_overrides(
            reader.read(self.source), "Q4_K_M", head_recipe("Q8_0"), list(recipe.items())
        )
        options = [
            word
            for pattern, kind in overrides
            for word in ("--tensor-type", f"{pattern}={kind.lower()}")
        ]
        program = ROOT / "resources/toolchain/bin/llama-quantize"
        return shell(program, *options, self.source, self.work / f"{name}.gguf", "Q4_K_M", threads)

    def plan(self, recipe: dict[str, str]) -> str:
        """Plan."""
        (self.work / "recipe.yaml").write_text(json.dumps(recipe))
        program = [
            sys.executable,
            ROOT / "workflow/scripts/quantize_plan.py",
            self.source,
            "--type",
            "Q4_K_M",
        ]
        inputs = [
            "--tensors",
            self.work / "recipe.yaml",
            "--digests",
            self.source.with_suffix(".json"),
        ]
        return shell(
            *program,
            *inputs,
            "--bin",
            ROOT / "resources/toolchain/bin",
            "--out",
            self.work / "plan.json",
        )

    def whole(self, name: str, threads: int) -> str:
        """Quantize as planned, with what is there already."""
        results = self.work / "results"
        return self.quantize(
            name,
            threads,
            "--manifest",
            results / f"manifests/{name}.json",
            "--out",
            results / f"{name}.gguf",
        )

    def pieces(self, name: str) -> str:
        """Quantize with two workers of one thread each, and put together what they made."""
        folder = self.work / "results/manifests/pieces"
        first, second = (
            self.quantize(f"piece{i}", 1, "--piece", f"{i}/2", "--out", folder) for i in (1, 2)
        )
        return f"{{ {first} & }} && {second} && wait $! && {self.whole(name, 1)}"

    def quantize(self, name: str, threads: int, *more: object) -> str:
        """The program, with its plan and what is there already."""
        program = [
            sys.executable,
            ROOT / "workflow/scripts/quantize.py",
            self.source,
            "--plan",
            self.work / "plan.json",
            *more,
        ]
        files = [
            "--reuse",
            self.work / "results",
            "--digests",
            self.work / f"{name}.json",
            "--log",
            self.work / f"{name}.log",
        ]
        return shell(
            *program, *files, "--threads", threads, "--bin", ROOT / "resources/toolchain/bin"
        )


def shell(*words: object) -> str:
    """A command as a shell reads it."""
    return shlex.join(map(str, words))


def make_source(scratch: Path) -> Path:
    """The BF16 GGUF, made once."""
    checkpoint, out = (
        write_checkpoint(scratch / "dense-24-layers", QWEN3_5_2B),
        scratch / "all.gguf",
    )
    if not out.with_suffix(".json").exists():
        convert = [
            sys.executable,
            ROOT / "workflow/scripts/convert.py",
            checkpoint,
            "--tokenizer-pre",
            "qwen35",
        ]
        convert += ["--digests", out.with_suffix(".json"), "--out", out]
        subprocess.run(list(map(str, convert)), check=True)
    return out


def measure(bench: Bench, threads: int, repeats: int) -> dict[str, Any]:
    """The seconds of each two works that are compared, and the share of the weights that the changed recipe touches."""
    one, two = (Bench(bench.source, bench.work / name) for name in ("one", "two"))
    plain, changed = bench.work / "plain.gguf", bench.work / "changed.gguf"
    taken: dict[str, list[list[float]]] = {"from nothing": [], "changed": [], "two workers": []}

    def compare(name: str, *commands: str) -> None:
        order = (
            -1 if len(taken[name]) % 2 else 1
        )  # the speed of a machine can change, and what the first leaves in memory
        taken[name].append([wall(command) for command in commands[::order]][::order])
        print(
            f"{name}: {' and '.join(f'{value:.1f} s' for value in taken[name][-1])}",
            file=sys.stderr,
            flush=True,
        )

    def wall(command: str) -> float:
        cost_of("cat", bench.source)
        return cost_of("sh", "-c", command).wall

    def check(made: Path, expected: Path) -> None:
        if not filecmp.cmp(made, expected, shallow=False):
            sys.exit(f"error: {made}: other bytes than those of a plain run")

    for _ in range(repeats):
        whole = f"{bench.fresh().plan({})} && {bench.whole('whole', threads)}"
        compare("from nothing", bench.plain({}, "plain", threads), whole)
        check(bench.work / "results/whole.gguf", plain)
        again = f"{bench.plan(RECIPE)} && {bench.whole('changed', threads)}"
        compare("changed", bench.plain(RECIPE, "changed", threads), again)
        check(bench.work / "results/changed.gguf", changed)
        single = f"{one.fresh().plan({})} && {one.whole('whole', 1)}"
        compare("two workers", single, f"{two.fresh().plan({})} && {two.pieces('whole')}")
        check(one.work / "results/whole.gguf", plain)
        check(two.work / "results/whole.gguf", plain)
    before, after = (reader.read(path).tensors for path in (plain, changed))
    weights = sum(info.elements for info in before.values())
    touched = sum(info.elements for name, info in before.items() if after[name].type != info.type)
    return {"weights": weights, "changed": touched / weights, "seconds": taken}


def table(result: dict[str, Any]) -> str:
    """The means and their ratios, as Markdown."""

    def row(what: str, name: str) -> str:
        pairs = result["seconds"][name]
        left, right = (sum(column) / len(pairs) for column in zip(*pairs, strict=True))
        return (
            f"| {what} | {left:.1f} s | {right:.1f} s | {right / left:.3f} | {left / right:.2f} |"
        )

    return "\n".join(
        [
            "| what | beside | that takes | this | × its time | × faster |",
            "| --- | --- | ---: | ---: | ---: | ---: |",
            row("from nothing | `llama-quantize`", "from nothing"),
            row(
                f"with a recipe changed for {result['changed']:.1%} of the weights | `llama-quantize`",
                "changed",
            ),
            row("two workers of one thread | one of one thread", "two workers"),
        ]
    )


def main() -> None:
    """Parse the command line, measure, print and keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=ROOT / "results/bench/quantization.json",
        help="JSON of all figures",
    )
    parser.add_argument(
        "--scratch", type=Path, default=ROOT / "resources/bench", help="about 20 GB are used there"
    )
    parser.add_argument(
        "--repeats",
        type=int,
        default=2,
        help="ten minutes each, best an even number (default: %(default)s)",
    )
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="of llama-quantize (default: all)"
    )
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    bench = Bench(make_source(args.scratch), args.scratch / "quantization")
    result = {"processors": os.cpu_count(), **measure(bench, args.threads, args.repeats)}
    shutil.rmtree(bench.work)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(result))


if __name__ == "__main__":
    cli.run(main)
