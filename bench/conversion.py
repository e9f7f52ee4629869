"""Compare conversion with `cp` of checkpoint and result, and with llama.cpp's converter.

Makes checkpoints of a few GB under resources/bench, once, and deletes the converted files.
llama.cpp's converter is measured if `make converter` has installed it.

example: conversion.py --out results/bench/conversion.json
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "workflow/scripts"))

from checkpoint import QWEN3_5_2B, QWEN3_5_35B_A3B, write_checkpoint  # noqa: E402
from mtpforge.gguf import reader  # noqa: E402

MODELS = {
    "dense, 12 layers": {**QWEN3_5_2B, "num_hidden_layers": 12},
    "dense, 24 layers": QWEN3_5_2B,
    "experts, 2 layers": QWEN3_5_35B_A3B,
    "experts, 2 layers, FP8": QWEN3_5_35B_A3B,
}


@dataclass(frozen=True)
class Cost:
    """The cost of a program: wall clock and CPU seconds, and peak memory in bytes."""

    wall: float
    cpu: float
    memory: int


def cost_of(*command: object) -> Cost:
    """Run a program, and measure it until its output is on the disk."""
    start = time.monotonic()
    process = subprocess.Popen(
        list(map(str, command)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(
            f"error: {' '.join(map(str, command))} failed: {said.decode(errors='replace')[-1500:]}"
        )
    os.sync()
    unit = 1 if sys.platform == "darwin" else 1024
    return Cost(time.monotonic() - start, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit)


def typical(measure: Callable[[], Cost], repeats: int) -> Cost:
    """The run with the median wall clock."""
    runs = sorted((measure() for _ in range(repeats)), key=lambda cost: cost.wall)
    return runs[len(runs) // 2]


def measure_model(name: str, scratch: Path, repeats: int, upstream: bool) -> dict[str, Any]:
    """Measure one checkpoint, which is in the page cache if it fits."""
    folder = scratch / name.replace(", ", "-").replace(" ", "-")
    checkpoint = write_checkpoint(folder, MODELS[name], eight_bit=name.endswith("FP8"))
    shards = sorted(checkpoint.glob("*.safetensors"))
    out = scratch / "out"

    def run(*command: object) -> Cost:
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        return cost_of(*command)

    for path in shards:  # into the page cache
        subprocess.run(["cat", str(path)], stdout=subprocess.DEVNULL, check=True)
    copy = typical(lambda: run("cp", *shards, out), repeats)
    converted = out / "ours.gguf"
    convert = typical(lambda: run(*our_command(checkpoint, converted)), repeats)

    def copy_result() -> Cost:
        (out / "copy.gguf").unlink(missing_ok=True)
        return cost_of("cp", converted, out / "copy.gguf")

    again = typical(copy_result, repeats)
    result = {
        "model": name,
        "bytes": sum(path.stat().st_size for path in shards),
        "cp": vars(copy),
        "cp_of_result": vars(again),
        "convert": vars(convert),
        "open": open_seconds(converted),
    }
    if upstream:
        result["upstream"] = vars(run(*upstream_command(checkpoint, out / "upstream.gguf")))
    shutil.rmtree(out, ignore_errors=True)
    return result


def our_command(checkpoint: Path, out: Path) -> list[object]:
    """Convert with convert.py."""
    program = ROOT / "workflow/scripts/convert.py"
    return [sys.executable, program, checkpoint, "--tokenizer-pre", "qwen35", "--out", out]


def upstream_command(checkpoint: Path, out: Path) -> list[object]:
    """Convert with llama.cpp's converter."""
    converter = ROOT / "resources/converter"
    python = converter / "environment/bin/python"
    program = [python, "-I", ROOT / "workflow/scripts/run_upstream.py"]
    source = ["--tokenizer-pre", "qwen35", converter / "source", checkpoint]
    return [*program, *source, "--outtype", "bf16", "--outfile", out]


def open_seconds(path: Path) -> float:
    """Seconds to read the tensor table and all metadata of a GGUF, the median of five."""
    times = []
    for _ in range(5):
        reader._last_strings.clear()
        start = time.perf_counter()
        reader.read(path)
        times.append(time.perf_counter() - start)
    return median(times)


def table(results: list[dict[str, Any]]) -> str:
    """Times and ratios, as Markdown."""
    lines = [
        "| checkpoint | GB | cp | convert | × cp | × cp of result | CPU | peak MB"
        " | upstream | × faster | open |",
        "| --- |" + " ---: |" * 10,
    ]
    for entry in results:
        copy = entry["cp"]["wall"]
        convert = entry["convert"]["wall"]
        theirs = entry.get("upstream", {}).get("wall")
        faster = (f"{theirs:.1f} s", f"{theirs / convert:.1f}") if theirs else ("not run", "")
        cells = [
            entry["model"],
            f"{entry['bytes'] / 1e9:.1f}",
            f"{copy:.1f} s",
            f"{convert:.1f} s",
            f"{convert / copy:.2f}",
            f"{convert / entry['cp_of_result']['wall']:.2f}",
            f"{entry['convert']['cpu']:.1f} s",
            f"{entry['convert']['memory'] / 1e6:.0f}",
            *faster,
            f"{entry['open']:.3f} s",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    by_name = {entry["model"]: entry["convert"]["wall"] for entry in results}
    if {"dense, 12 layers", "dense, 24 layers"} <= by_name.keys():
        ratio = by_name["dense, 24 layers"] / by_name["dense, 12 layers"]
        lines += ["", f"Twice the layers take {ratio:.2f} times as long."]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Parse the command line, measure, and write and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results/bench/conversion.json")
    parser.add_argument(
        "--scratch",
        type=Path,
        default=ROOT / "resources/bench",
        help="folder that needs about 25 GB (default: %(default)s)",
    )
    parser.add_argument("--repeats", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument(
        "--models", nargs="*", default=list(MODELS), choices=list(MODELS), metavar="NAME"
    )
    args = parser.parse_args()
    args.scratch.mkdir(parents=True, exist_ok=True)
    upstream = (ROOT / "resources/converter/stamp.json").exists()
    if not upstream:
        print(
            "llama.cpp's converter is not measured: `make converter` installs it", file=sys.stderr
        )
    results = []
    for name in args.models:
        print(f"measuring: {name}", file=sys.stderr, flush=True)
        results.append(measure_model(name, args.scratch, args.repeats, upstream))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(
        json.dumps({"processors": os.cpu_count(), "results": results}, indent=1) + "\n"
    )
    print(table(results))


if __name__ == "__main__":
    main()
