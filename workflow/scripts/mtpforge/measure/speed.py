"""Decoding speed of a GGUF with and without drafting, and acceptance of its drafts.

Each kind of prompt and each n_max (tokens drafted ahead; 0: no drafting) gets its own llama-server.
Its first request is **cold**: the server starts without its usual warm-up, so the process has not
touched the weights. The prompt is processed before the first token is decoded, which loads all
weights of a dense model, or the experts that the prompt uses. The page cache is not cleared, and
holds a file that was just written: disk speed is not measured. The next requests are **warm**: the
same prompt, without prompt cache. All are greedy, at p_min 0.

Speeds are llama-server's own, of decoding alone. Speeds of several kinds are combined by their
harmonic mean: the speed at the same number of tokens of each kind.

Acceptance by position comes from llama-server's log at verbosity 4: the share of verified drafts in
which this position, and therefore all before it, was accepted. It is empty if a build does not log
it.
"""

import hashlib
import os
import platform
import re
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import harmonic_mean, median

from mtpforge import progress
from mtpforge.errors import ToolchainError
from mtpforge.gguf import split
from mtpforge.llama_cpp import converter_architectures
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.llama_cpp.server import Completion, serve
from mtpforge.measure.measurement import Machine, Measurement, Run, Spread, Total
from mtpforge.measure.recommendation import recommend
from mtpforge.prompts import N_PREDICT

LOG_LIMIT = 5.0
"""Seconds that llama-server's log may lag behind its answers."""
_BY_POSITION = re.compile(r"acc per pos = \(([0-9., ]+)\)")
_OPTIONS = ("--ctx-size", "4096", "--no-warmup", "--verbosity", "4")


def measure(
    path: Path,
    prompts: Mapping[str, str],
    n_max: Sequence[int],
    repeats: int,
    llama: LlamaCpp,
    options: Sequence[str] = (),
) -> Measurement:
    """Measure a GGUF (the first file of a split one) on `prompts`, by kind. Raises ForgeError.

    Each n_max gets `repeats` warm requests for each prompt. `options` go to llama-server, which is
    not started without prompts.
    """
    shards = split.shards(path)
    whole = split.joined(shards)
    can_draft = bool(whole.head_blocks) and converter_architectures.why_not_drafting(whole) is None
    version = llama.version("llama-server")
    machine = describe_machine(llama)
    runs: list[Run] = []
    peaks: dict[int, list[int]] = {
        ahead: [] for ahead in sorted({0, *(n_max if can_draft else ())}) if prompts
    }
    left = progress.Left()
    # Prompts outermost: a change in the machine's speed then affects every n_max.
    for number, (kind, prompt) in enumerate(prompts.items(), 1):
        for ahead, memory in peaks.items():
            more = left.of(len(runs) / 2, len(prompts) * len(peaks))  # a cold and a warm run each
            progress.say(
                f"{path.name}: {kind} ({number} of {len(prompts)}), n_max {ahead or 'off'}{more}"
            )
            session = _Session(path, kind, prompt=prompt, n_max=ahead, llama=llama)
            runs += session.run(repeats, options)
            memory += session.memory
    totals = _totals(path.name, runs, peaks)
    recommended, verdict = recommend(totals, repeats)
    return Measurement(
        file=path.name,
        bytes=sum(shard.path.stat().st_size for shard in shards),
        threads=llama.processors,
        options=tuple(options),
        llama_cpp=str(version),
        machine=machine,
        prompts={kind: _digest(prompt) for kind, prompt in prompts.items()},
        repeats=repeats,
        n_predict=N_PREDICT,
        runs=tuple(runs),
        by_n_max=tuple(totals),
        recommended_n_max=recommended,
        verdict=verdict,
        memory_bytes=max(filter(None, (total.memory_bytes for total in totals)), default=None),
        perplexity=None,
        kl_divergence=None,
    )


def make_run(
    kind: str, state: str, n_max: int, answers: Sequence[Completion], by_position: list[list[float]]
) -> Run:
    """Make a run from these answers; `by_position` has the acceptance of each answer."""
    speeds = tuple(round(answer.tokens_per_second, 2) for answer in answers)
    drafts = sum(answer.drafts for answer in answers)
    accepted = sum(answer.accepted for answer in answers)
    weighted = [(answer.drafts, each) for answer, each in zip(answers, by_position, strict=True)]
    return Run(
        n_max=n_max,
        kind=kind,
        state=state,
        repeats=len(answers),
        tokens_per_second=speeds,
        median=round(median(speeds), 2),
        spread=(min(speeds), max(speeds)),
        drafts=drafts,
        accepted=accepted,
        acceptance=_share(accepted, drafts),
        by_position=_mean_by_position(weighted),
    )


def by_position(log: str, drafts: Sequence[int]) -> list[list[float]]:
    """The share accepted at each position, for each request, from llama-server's log.

    `drafts` has the number of tokens that each request drafted: only requests that drafted have a
    line. If the lines do not fit the requests, none is used.
    """
    lines = [[float(rate) for rate in found.split(",")] for found in _BY_POSITION.findall(log)]
    if len(lines) != sum(count > 0 for count in drafts):
        return [[] for _ in drafts]
    logged = iter(lines)
    return [next(logged) if count else [] for count in drafts]


def combine(
    runs: Sequence[Run], n_max: int, off: Total | None, memory_bytes: int | None = None
) -> Total:
    """Combine all kinds at one n_max; `off` is the total without drafting, unless this is it."""
    warm = [run for run in runs if (run.n_max, run.state) == (n_max, "warm")]
    cold = [run for run in runs if (run.n_max, run.state) == (n_max, "cold")]
    repeats = zip(*(run.tokens_per_second for run in warm), strict=True)
    speeds = [round(harmonic_mean(repeat), 2) for repeat in repeats]
    speed = round(median(speeds), 2)
    spread: Spread = (min(speeds), max(speeds))
    drafts = sum(run.drafts for run in warm)
    accepted = sum(run.accepted for run in warm)
    return Total(
        n_max=n_max,
        tokens_per_second=speed,
        spread=spread,
        cold_tokens_per_second=round(harmonic_mean([run.median for run in cold]), 2),
        drafts=drafts,
        accepted=accepted,
        acceptance=_share(accepted, drafts),
        by_position=_mean_by_position([(run.drafts, run.by_position) for run in warm]),
        speedup=round(speed / off.tokens_per_second, 3) if off else 1.0,
        memory_bytes=memory_bytes,
    )


def describe_machine(llama: LlamaCpp) -> Machine:
    """The processor, the number of processors, and the devices that llama.cpp sees."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(errors="replace") if info.exists() else ""
    model = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    processor = model[1] if model else platform.processor() or platform.machine()
    return Machine(processor=processor, processors=os.cpu_count(), devices=llama.devices())


class _Session:
    """One llama-server: its first, cold request, and the warm ones after it."""

    def __init__(self, path: Path, kind: str, prompt: str, n_max: int, llama: LlamaCpp) -> None:
        self.path = path
        self.kind = kind
        self.prompt = prompt
        self.n_max = n_max
        self.llama = llama
        self.memory: list[int] = []
        """Peak resident size, if /proc tells it."""

    def run(self, repeats: int, more: Sequence[str]) -> list[Run]:
        """Start the server, send the requests: a cold and a warm run. Raises ToolchainError."""
        with tempfile.TemporaryDirectory() as scratch:
            log = Path(scratch) / "server.log"
            options = [*_OPTIONS, *more, *self._drafting()]
            # A user's options, such as a long context, may need more memory than a file does.
            with serve(self.llama, self.path, log=log, options=options, memory=not more) as server:
                answers = [server.completion(self.prompt, N_PREDICT) for _ in range(1 + repeats)]
                self.memory = [peak for peak in [server.peak_memory()] if peak is not None]
                positions = _positions(log, [answer.drafts for answer in answers])
        if any(len(answer.tokens) < 2 or not answer.tokens_per_second for answer in answers):
            raise ToolchainError(
                f"llama-server generated nothing from the prompt {self.kind!r}: nothing to measure"
            )
        return [
            make_run(
                self.kind, "cold", n_max=self.n_max, answers=answers[:1], by_position=positions[:1]
            ),
            make_run(
                self.kind, "warm", n_max=self.n_max, answers=answers[1:], by_position=positions[1:]
            ),
        ]

    def _drafting(self) -> list[str]:
        if not self.n_max:
            return []
        ahead = ["--spec-draft-n-max", str(self.n_max), "--spec-draft-p-min", "0"]
        return ["--spec-type", "draft-mtp", *ahead]


def _positions(log: Path, drafts: Sequence[int]) -> list[list[float]]:
    """`by_position` of a running server, which writes its log after its answers."""
    deadline = time.monotonic() + LOG_LIMIT
    while True:
        found = by_position(log.read_text(encoding="utf-8", errors="replace"), drafts)
        complete = all(each for each, count in zip(found, drafts, strict=True) if count)
        if complete or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def _totals(name: str, runs: Sequence[Run], peaks: Mapping[int, Sequence[int]]) -> list[Total]:
    totals: list[Total] = []
    for n_max, memory in peaks.items():
        off = totals[0] if totals else None
        totals.append(combine(runs, n_max, off=off, memory_bytes=max(memory, default=None)))
        print(f"{name}: {_line(totals[-1])}", flush=True)
    return totals


def _line(total: Total) -> str:
    low, high = total.spread
    text = f"n_max {total.n_max}: {total.tokens_per_second:.1f} tokens/s ({low:.1f} to {high:.1f})"
    if total.acceptance is not None:
        text += f", {total.speedup:.2f} times without, {total.acceptance:.1%} accepted"
    return text


def _share(accepted: int, drafts: int) -> float | None:
    return round(accepted / drafts, 4) if drafts else None


def _mean_by_position(parts: Sequence[tuple[int, Sequence[float]]]) -> tuple[float, ...]:
    """The mean of known shares by position, weighted by the number of drafts."""
    known = [(drafts, shares) for drafts, shares in parts if drafts and shares]
    weight = sum(drafts for drafts, _ in known)
    width = min((len(shares) for _, shares in known), default=0)
    sums = [sum(drafts * shares[i] for drafts, shares in known) for i in range(width)]
    return tuple(round(total / weight, 3) for total in sums)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
