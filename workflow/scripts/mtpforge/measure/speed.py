"""How fast a GGUF decodes with and without drafting, and how much of what is drafted is accepted, in a real llama-server.

For each kind of prompt and each number of tokens drafted ahead (n_max; 0 is off) a server of its own is started. Its first
request is **cold**: no weights were touched by this process, since the usual warm-up run is left out; the prompt is read before the
first token is decoded, so of a dense model all weights are in memory by then, of a mixture of experts those that the prompt needed.
The page cache is left as it is, and a file that was just made or verified is in it: what a disk gives is not measured. The
requests after it are **warm**: the same prompt again, without prompt cache. All are greedy, at p_min 0.

Speeds are the server's own, of decoding alone. Those of several kinds are put together as their harmonic mean: the speed of equally
many tokens of each kind.

Acceptance by position is what the server logs at verbosity 4 after each request: of all times that drafts were verified, the
share in which that position was accepted (and so were those before it). Empty where a build does not log it.
"""

import hashlib
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import harmonic_mean, median
from typing import Any

from mtpforge.errors import ToolchainError
from mtpforge.gguf import split
from mtpforge.llama_cpp import architectures, process, programs, server, toolchain

N_PREDICT = 200  # tokens, as in verification
DEVICES_LIMIT = 60.0  # seconds
LOG_LIMIT = 5.0  # seconds that the log may lag behind
_BY_POSITION = re.compile(r"acc per pos = \(([0-9., ]+)\)")

Run = dict[str, Any]


def measure(
    path: Path, prompts: Mapping[str, str], n_max: Sequence[int], repeats: int, threads: int, bin_dir: Path = programs.DEFAULT_BIN,
    options: Sequence[str] = (),
) -> dict[str, Any]:  # fmt: skip
    """The measurements of a file (of a split one, the first) on `prompts` by kind, with more `options` of llama-server. ForgeError.

    `runs` has one entry for each n_max, kind and state (cold, warm), `by_n_max` their sum. Speeds are tokens a second, `spread` is
    the slowest and the fastest; `memory_bytes` is the largest resident size of the server, pages of the mapped file among it, which
    the kernel can take back (None where /proc does not tell).
    """
    shards = split.shards(path)
    can_draft = (
        bool(split.joined(shards).head_blocks)
        and architectures.why_not_drafting(split.joined(shards)) is None
    )
    version, where = toolchain.version(bin_dir, ("llama-server",)), machine(bin_dir)
    runs: list[Run] = []
    totals: list[dict[str, Any]] = []
    memory: dict[int, list[int]] = {
        ahead: [] for ahead in sorted({0, *(n_max if can_draft else ())})
    }
    for number, (kind, prompt) in enumerate(
        prompts.items(), 1
    ):  # outermost, so that a change of the machine's speed meets all n_max
        for ahead, peaks in memory.items():
            print(
                f"{path.name}: {kind} ({number} of {len(prompts)}), n_max {ahead}",
                file=sys.stderr,
                flush=True,
            )
            pair, peak = _serve(path, kind, prompt, ahead, repeats, threads, bin_dir, options)
            runs += pair
            peaks += [] if peak is None else [peak]
    for ahead, peaks in memory.items():
        totals.append(
            {**together(runs, ahead, totals[:1]), "memory_bytes": max(peaks, default=None)}
        )
        print(f"{path.name}: {_line(totals[-1])}", flush=True)
    recommended, verdict = recommend(totals, repeats)
    return {
        "file": path.name,
        "bytes": sum(shard.path.stat().st_size for shard in shards),
        "threads": threads,
        "options": list(options),
        "llama.cpp": f"{version['llama.cpp']} {version['commit']}",
        "machine": where,
        "prompts": {
            kind: hashlib.sha256(prompt.encode()).hexdigest() for kind, prompt in prompts.items()
        },
        "repeats": repeats,
        "n_predict": N_PREDICT,
        "runs": runs,
        "by_n_max": totals,
        "recommended_n_max": recommended,
        "verdict": verdict,
        "memory_bytes": max(
            (total["memory_bytes"] for total in totals if total["memory_bytes"]), default=None
        ),
    }


def _serve(
    path: Path, kind: str, prompt: str, n_max: int, repeats: int, threads: int, bin_dir: Path, more: Sequence[str]
) -> tuple[list[Run], int | None]:  # fmt: skip
    """A fresh server's first request and `repeats` more, as a cold and a warm run; and its largest resident size."""
    options = [
        "--ctx-size",
        "4096",
        "--threads",
        str(threads),
        "--no-warmup",
        "--verbosity",
        "4",
        *more,
    ]
    if n_max:
        options += [
            "--spec-type",
            "draft-mtp",
            "--spec-draft-n-max",
            str(n_max),
            "--spec-draft-p-min",
            "0",
        ]
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "server.log"
        with programs.serve(path, log, options, bin_dir) as running:
            answers = [running.completion(prompt, N_PREDICT) for _ in range(1 + repeats)]
            memory = running.peak_memory()
            positions = _positions(log, [answer.drafts for answer in answers])
    if any(len(answer.tokens) < 2 or not answer.tokens_per_second for answer in answers):
        raise ToolchainError(
            f"llama-server generated nothing from the prompt {kind!r}, so there is nothing to measure"
        )
    cold = _run(kind, "cold", n_max, answers[:1], positions[:1])
    return [cold, _run(kind, "warm", n_max, answers[1:], positions[1:])], memory


def _run(
    kind: str,
    state: str,
    n_max: int,
    answers: list[server.Completion],
    positions: list[list[float]],
) -> Run:
    return {
        "n_max": n_max, "kind": kind, "state": state, "repeats": len(answers),
        **_speeds([answer.tokens_per_second for answer in answers]),
        **_acceptance([(answer.drafts, answer.accepted, rates) for answer, rates in zip(answers, positions, strict=True)]),
    }  # fmt: skip


def _positions(log: Path, drafts: Sequence[int]) -> list[list[float]]:
    """The same of a server that still runs: its log is written behind its answers, and not to the end when it is stopped."""
    deadline = time.monotonic() + LOG_LIMIT
    while True:
        found = by_position(log.read_text(encoding="utf-8", errors="replace"), drafts)
        if all(found[i] for i, count in enumerate(drafts) if count) or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def by_position(log: str, drafts: Sequence[int]) -> list[list[float]]:
    """The share accepted at each position, for each request, from the server's log; `drafts` are the tokens that each drafted.

    Only requests that drafted have a line. Where the lines do not fit the requests, none is trusted.
    """
    lines = [[float(rate) for rate in found.split(",")] for found in _BY_POSITION.findall(log)]
    if len(lines) != sum(count > 0 for count in drafts):
        return [[] for _ in drafts]
    logged = iter(lines)
    return [next(logged) if count else [] for count in drafts]


def together(runs: Sequence[Run], n_max: int, off: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """All kinds of one n_max; `off` is the same without drafting, if that is not it."""
    mine = [run for run in runs if run["n_max"] == n_max]
    warm = [run["tokens_per_second"] for run in mine if run["state"] == "warm"]
    cold = [run["tokens_per_second"] for run in mine if run["state"] == "cold"]
    speeds = _speeds([harmonic_mean(repeat) for repeat in zip(*warm, strict=True)])
    speed = speeds["median"]
    return {
        "n_max": n_max,
        "tokens_per_second": speed,
        "spread": speeds["spread"],
        "cold_tokens_per_second": round(harmonic_mean([speed for (speed,) in cold]), 2),
        **_acceptance(
            [
                (run["drafts"], run["accepted"], run["by_position"])
                for run in mine
                if run["state"] == "warm"
            ]
        ),
        "speedup": round(speed / off[0]["tokens_per_second"], 3) if off else 1.0,
    }


def _speeds(values: Sequence[float]) -> dict[str, Any]:
    values = [round(value, 2) for value in values]
    return {
        "tokens_per_second": values,
        "median": round(median(values), 2),
        "spread": [min(values), max(values)],
    }


def _acceptance(parts: Sequence[tuple[int, int, Sequence[float]]]) -> dict[str, Any]:
    """Of (drafts, accepted, share by position): their sums, and the known shares weighted by how much was drafted."""
    drafts, accepted = sum(part[0] for part in parts), sum(part[1] for part in parts)
    known = [(count, rates) for count, _, rates in parts if count and rates]
    width, weight = (
        min((len(rates) for _, rates in known), default=0),
        sum(count for count, _ in known),
    )
    shares = [sum(count * rates[i] for count, rates in known) / weight for i in range(width)]
    return {
        "drafts": drafts,
        "accepted": accepted,
        "acceptance": round(accepted / drafts, 4) if drafts else None,
        "by_position": [round(share, 3) for share in shares],
    }


def recommend(by_n_max: Sequence[Mapping[str, Any]], repeats: int) -> tuple[int, str]:
    """The n_max to serve with, and why: the fastest one, if its slowest repeat beats the fastest one without drafting, else 0."""
    off, *others = by_n_max
    if not others:
        return 0, "there is no head to draft with"
    if not (drafting := [entry for entry in others if entry["drafts"]]):
        return 0, "nothing was drafted: the head is dead"
    if repeats < 2:
        return (
            0,
            "measured once, so what chance alone does is not known: leave drafting off, or measure with more repeats",
        )
    best = max(drafting, key=lambda entry: entry["tokens_per_second"])
    speeds = f"{best['tokens_per_second']:.1f} tokens/s with n_max {best['n_max']}, {off['tokens_per_second']:.1f} without"
    if best["spread"][0] > off["spread"][1]:
        return best["n_max"], f"{best['speedup']:.2f} times as fast as without drafting: {speeds}"
    if best["spread"][1] < off["spread"][0]:
        return 0, f"slower than without: {speeds}: leave drafting off"
    return 0, f"not faster than without by more than the spread: {speeds}: leave drafting off"


def _line(total: Mapping[str, Any]) -> str:
    low, high = total["spread"]
    text = f"n_max {total['n_max']}: {total['tokens_per_second']:.1f} tokens/s ({low:.1f} to {high:.1f})"
    if total["drafts"]:
        text += f", {total['speedup']:.2f} times without, {total['acceptance']:.1%} accepted"
    return text


def machine(bin_dir: Path) -> dict[str, Any]:
    """What the times are of: processor, how many, and the devices that llama.cpp sees."""
    info = Path("/proc/cpuinfo")
    model = (
        re.search(r"^model name\s*: (.+)$", info.read_text(errors="replace"), re.MULTILINE)
        if info.exists()
        else None
    )
    command: list[str | Path] = [programs.find(bin_dir, "llama-server"), "--list-devices"]
    try:
        listed = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=DEVICES_LIMIT,
            env=process.environment(),
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ToolchainError(f"llama-server cannot list its devices: {error}") from None
    devices = re.findall(r"^  (\w+: .+)$", listed.stdout, re.MULTILINE)
    return {
        "processor": model[1] if model else platform.processor() or platform.machine(),
        "processors": os.cpu_count(),
        "devices": devices,
    }
