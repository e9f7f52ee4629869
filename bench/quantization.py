"""How fast a quantization is beside one plain llama-quantize run, from nothing and after a changed recipe, and with two workers.

Of a BF16 GGUF of Qwen3.5-2B's shapes as Q4_K_M, with a plan, digests and a manifest, as the workflow makes it; all until on the
disk. What is compared takes turns of a second, in which the other is stopped: a machine's speed can drift by more, within
minutes, than there is to see. That each result has the bytes of the plain run is checked.

example: quantization.py --out results/bench/quantization.json
"""

import argparse
import filecmp
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from conversion import QWEN3_5_2B, ROOT, write_checkpoint
from mtpforge import gguf_file
from mtpforge.plan import Plan
from mtpforge.quantize import plan_overrides

RECIPE = {"blk.([0-9]|1[0-4]).ffn_gate": "Q5_K", "attn_k.weight": "Q5_K"}  # a tenth of the weights, which Q4_K_M has as Q4_K
TURN = 1.0  # seconds


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

    def plain(self, recipe: dict[str, str], out: Path, threads: int) -> str:
        """A plain run, whose output is then brought to the disk, as ours is."""
        overrides = plan_overrides(gguf_file.read(self.source), "Q4_K_M", "Q8_0", list(recipe.items()))
        options = [word for pattern, kind in overrides for word in ("--tensor-type", f"{pattern}={kind.lower()}")]
        program = ROOT / "resources/toolchain/bin/llama-quantize"
        return f"{shell(program, *options, self.source, out, 'Q4_K_M', threads)} && {shell('sync', out)}"

    def plan(self, recipe: dict[str, str]) -> str:
        """Plan."""
        (self.work / "recipe.yaml").write_text(json.dumps(recipe))
        program = [sys.executable, ROOT / "workflow/scripts/quantize_plan.py", self.source, "--type", "Q4_K_M"]
        inputs = ["--tensors", self.work / "recipe.yaml", "--digests", self.source.with_suffix(".json")]
        return shell(*program, *inputs, "--bin", ROOT / "resources/toolchain/bin", "--out", self.work / "plan.json")

    def quantize(self, name: str, threads: int, *more: object) -> str:
        """Quantize as planned, with what is there already."""
        results = self.work / "results"
        program = [sys.executable, ROOT / "workflow/scripts/quantize.py", self.source, "--plan", self.work / "plan.json", *more]
        outputs = ["--digests", self.work / f"{name}.json", "--manifest", results / f"manifests/{name}.json"]
        return shell(*program, "--reuse", results, *outputs, "--threads", threads, "--bin", ROOT / "resources/toolchain/bin",
                     "--log", self.work / f"{name}.log", "--out", results / f"{name}.gguf")  # fmt: skip

    def pieces(self, name: str) -> str:
        """Quantize with two workers of one thread each, and put together what they made."""
        first, second = (self.quantize(f"piece{i}", 1, "--piece", f"{i}/2") for i in (1, 2))
        return f"{{ {first} & }} && {second} && wait $! && {self.quantize(name, 2)}"

    def check(self, name: str, plain: Path) -> None:
        """The result has the bytes of the plain run."""
        if not filecmp.cmp(self.work / f"results/{name}.gguf", plain, shallow=False):
            sys.exit(f"error: {name}: other bytes than those of a plain run")


def shell(*words: object) -> str:
    """A command as a shell reads it."""
    return shlex.join(map(str, words))


def in_turns(*commands: str) -> list[float]:
    """The seconds that each command took, of the turns in which it ran and the others were stopped."""
    taken, running = [0.0] * len(commands), dict[int, subprocess.Popen[bytes]]()
    left = list(range(len(commands)))
    with tempfile.TemporaryFile() as said:
        try:
            while left:
                for number in left[:]:
                    start = time.monotonic()
                    if number in running:
                        os.killpg(running[number].pid, signal.SIGCONT)
                    else:
                        words = ["sh", "-c", commands[number]]
                        running[number] = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=said, start_new_session=True)
                    try:
                        status = running[number].wait(TURN)
                    except subprocess.TimeoutExpired:
                        os.killpg(running[number].pid, signal.SIGSTOP)
                    else:
                        if status:
                            said.seek(0)
                            sys.exit(f"error: {commands[number]} failed: {said.read().decode(errors='replace')[-1500:]}")
                        left.remove(number)
                    taken[number] += time.monotonic() - start
        finally:
            for number in left:
                if number in running:
                    with suppress(ProcessLookupError):  # one that failed, with all that it had started
                        os.killpg(running[number].pid, signal.SIGKILL)
    return taken


def make_source(scratch: Path) -> Path:
    """The BF16 GGUF, made once."""
    checkpoint, out = write_checkpoint(scratch / "dense-24-layers", QWEN3_5_2B), scratch / "all.gguf"
    if not out.exists():
        convert = [sys.executable, ROOT / "workflow/scripts/convert.py", checkpoint, "--tokenizer-pre", "qwen35"]
        convert += ["--digests", out.with_suffix(".json"), "--out", out]
        subprocess.run(list(map(str, convert)), check=True, stderr=subprocess.DEVNULL)
    return out


def changed_share(bench: Bench) -> float:
    """The weights that the changed recipe gives another type, of all."""
    types = []
    for recipe in ({}, RECIPE):
        in_turns(bench.plan(recipe))
        types.append(Plan.read(bench.work / "plan.json").types())
    tensors = gguf_file.read(bench.source).tensors
    changed = sum(info.elements for name, info in tensors.items() if types[0][name] != types[1][name])
    return changed / sum(info.elements for info in tensors.values())


def measure(bench: Bench, threads: int, repeats: int) -> dict[str, list[list[float]]]:
    """The seconds of each two works that are compared."""
    plain, changed = bench.source.with_name("plain.gguf"), bench.source.with_name("changed.gguf")
    one, two = (Bench(bench.source, bench.work.with_name(f"{bench.work.name}-{name}")) for name in ("one", "two"))
    taken: dict[str, list[list[float]]] = {"from nothing": [], "changed": [], "two workers": []}

    def compare(name: str, *commands: str) -> None:
        os.sync()
        order = -1 if len(taken[name]) % 2 else 1  # which of them is first changes: the second takes about a hundredth less
        taken[name].append(in_turns(*commands[::order])[::order])
        print(f"{name}: {' and '.join(f'{value:.1f} s' for value in taken[name][-1])}", file=sys.stderr, flush=True)

    subprocess.run(["cat", str(bench.source)], stdout=subprocess.DEVNULL, check=True)
    for _ in range(repeats):
        whole = f"{bench.fresh().plan({})} && {bench.quantize('whole', threads)}"
        compare("from nothing", bench.plain({}, plain, threads), whole)
        bench.check("whole", plain)
        again = f"{bench.plan(RECIPE)} && {bench.quantize('changed', threads)}"
        compare("changed", bench.plain(RECIPE, changed, threads), again)
        bench.check("changed", changed)
        single = f"{one.fresh().plan({})} && {one.quantize('whole', 1)}"
        compare("two workers", single, f"{two.fresh().plan({})} && {two.pieces('whole')}")
        one.check("whole", plain)
        two.check("whole", plain)
        for made in (one, two):
            shutil.rmtree(made.work)
    for path in (plain, changed):
        path.unlink()
    return taken


def table(taken: dict[str, list[list[float]]], share: float) -> str:
    """The means and their ratios, as Markdown."""
    means = {name: [sum(column) / len(pairs) for column in zip(*pairs, strict=True)] for name, pairs in taken.items()}
    rows = {name: f"{left:.1f} s | {right:.1f} s | {right / left:.3f}" for name, (left, right) in means.items()}
    left, right = means["two workers"]
    return "\n".join(
        [
            "| what | llama-quantize | mtpforge | |",
            "| --- | ---: | ---: | --- |",
            f"| from nothing | {rows['from nothing']} × its time |",
            f"| with a recipe changed for {share:.1%} of the weights | {rows['changed']} × its time |",
            f"| one worker of one thread, and two (both mtpforge) | {left:.1f} s | {right:.1f} s | {left / right:.2f} × as fast |",
        ]
    )


def main() -> None:
    """Parse the command line, measure, print and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "results/bench/quantization.json", help="JSON of all figures")
    parser.add_argument("--scratch", type=Path, default=ROOT / "resources/bench", help="about 20 GB are used there")
    parser.add_argument("--repeats", type=int, default=2, help="ten minutes each, best an even number (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of llama-quantize (default: all)")
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    bench = Bench(make_source(args.scratch), args.scratch / "quantization")
    taken = measure(bench, args.threads, args.repeats)
    share = changed_share(bench)
    shutil.rmtree(bench.work)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    result = {"processors": os.cpu_count(), "weights": bench.source.stat().st_size // 2, "share": share, "seconds": taken}
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(table(taken, share))


if __name__ == "__main__":
    main()
