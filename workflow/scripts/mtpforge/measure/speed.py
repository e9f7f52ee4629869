"""Decoding speed of a GGUF with and without drafting, and acceptance of its drafts.

A round is one llama-server with one pair of n_max (tokens drafted ahead; 0: no drafting) and p_min,
and one request for each prompt. llama-server takes the pair when it starts, not with a request. So
that a change in the machine's speed affects all pairs, none has its rounds one after the other: the
search for the fastest pair takes turns, and in the end the fastest and no drafting alternate.

The first request of a pair's first round is **cold**: the server starts without its usual warm-up,
so the process has not touched the weights. The prompt is processed before the first token is
decoded, which loads all weights of a dense model, or the experts that the prompt uses. The page
cache is not cleared, and holds a file that was just written: disk speed is not measured. All others
are **warm**: in later rounds, a few tokens come first. All are greedy, and without prompt cache.

Speeds are llama-server's own, of decoding alone. Speeds of several prompts are combined by their
harmonic mean: the speed at the same number of tokens of each.

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
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import harmonic_mean, median

from mtpforge import progress
from mtpforge.errors import ToolchainError
from mtpforge.gguf import split
from mtpforge.llama_cpp import converter_architectures
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.llama_cpp.server import Completion, Server, serve
from mtpforge.measure import pairs, prompt_forms
from mtpforge.measure.measurement import KindSpeed, Machine, Measurement, Run, Spread, Total
from mtpforge.measure.pairs import OFF, Pair, Search
from mtpforge.measure.prompt_forms import FORMS, Case, Cases
from mtpforge.measure.recommendation import WAITING, Advice, pair, recommend
from mtpforge.prompts import answer_tokens

LOG_LIMIT = 5.0
"""Seconds that llama-server's log may lag behind its answers."""
WARM_UP = 16
"""Tokens of a later round's first request."""
_BY_POSITION = re.compile(r"acc per pos = \(([0-9., ]+)\)")
_OPTIONS = ("--ctx-size", "4096", "--no-warmup", "--verbosity", "4")


@dataclass(frozen=True)
class Settings:
    """How to measure: the grid of pairs, rounds of the fastest, and limits."""

    n_max: Sequence[int]
    p_min: Sequence[float]
    repeats: int
    minutes: float = float("inf")
    """No further pair is tried when the rounds that must follow would end later than this."""
    forms: Sequence[str] = FORMS


def measure(
    path: Path,
    prompts: Mapping[str, str],
    settings: Settings,
    llama: LlamaCpp,
    options: Sequence[str] = (),
) -> Measurement:
    """Measure a GGUF (the first file of a split one) on `prompts`, by name. Raises ForgeError.

    `options` go to llama-server, which is not started without prompts.
    """
    shards = split.shards(path)
    prompt_forms.check_kinds(prompts)
    bench = Bench(path, prompts, settings=settings, llama=llama, options=options)
    version = llama.version("llama-server")
    machine = describe_machine(llama)
    if prompts:
        _sweep(bench)
    totals, runs = bench.totals(), tuple(bench.runs())
    advice = bench.advice()
    for total in totals:
        print(f"{path.name}: {_line(total)}", flush=True)
    return Measurement(
        file=path.name,
        bytes=sum(shard.path.stat().st_size for shard in shards),
        threads=llama.processors,
        options=tuple(options),
        llama_cpp=str(version),
        machine=machine,
        prompts=_digests(prompts, runs),
        repeats=settings.repeats,
        n_predict=bench.tokens,
        runs=runs,
        by_n_max=tuple(_claimed(totals, steady=advice.steady)),
        by_kind=tuple(bench.by_kind(steady=advice.steady)),
        steady=advice.steady,
        waiting=bench.waiting(),
        recommended_n_max=advice.n_max,
        recommended_p_min=advice.p_min,
        verdict=advice.verdict,
        cut_short=bench.cut_short,
        memory_bytes=max(filter(None, (total.memory_bytes for total in totals)), default=None),
        perplexity=None,
        kl_divergence=None,
    )


def make_run(
    case: Case, tried: Pair, state: str, answers: Sequence[Completion], shares: list[list[float]]
) -> Run:
    """Make a run from these answers; `shares` has the acceptance by position of each answer."""
    speeds = tuple(round(answer.tokens_per_second, 2) for answer in answers)
    drafts = sum(answer.drafts for answer in answers)
    accepted = sum(answer.accepted for answer in answers)
    weighted = [(answer.drafts, each) for answer, each in zip(answers, shares, strict=True)]
    return Run(
        n_max=tried.n_max,
        p_min=tried.p_min,
        kind=case.kind,
        form=case.form,
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
    runs: Sequence[Run], tried: Pair, off: Total | None, memory_bytes: int | None = None
) -> Total:
    """Combine the runs of one pair; `off` is the total without drafting, unless this is it."""
    warm = [run for run in runs if run.state == "warm"]
    cold = [run for run in runs if run.state == "cold"]
    rounds = zip(*(run.tokens_per_second for run in warm), strict=True)
    speeds = [round(harmonic_mean(each), 2) for each in rounds]
    speed = round(median(speeds), 2)
    spread: Spread = (min(speeds), max(speeds))
    drafts = sum(run.drafts for run in warm)
    accepted = sum(run.accepted for run in warm)
    return Total(
        n_max=tried.n_max,
        p_min=tried.p_min,
        repeats=len(speeds),
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


def draft_lengths(wanted: Sequence[int], blocks: int) -> list[int]:
    """The draft lengths that differ: with several blocks in its head, a model drafts one each."""
    return sorted({min(length, blocks) if blocks > 1 else length for length in wanted})


def describe_machine(llama: LlamaCpp) -> Machine:
    """The processor, the number of processors, and the devices that llama.cpp sees."""
    info = Path("/proc/cpuinfo")
    text = info.read_text(errors="replace") if info.exists() else ""
    model = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    processor = model[1] if model else platform.processor() or platform.machine()
    return Machine(processor=processor, processors=os.cpu_count(), devices=llama.devices())


@dataclass
class _Round:
    """The answers of one server, each with its acceptance by position."""

    answers: dict[Case, tuple[Completion, list[float]]]
    memory: int | None
    """Peak resident size, if /proc tells it."""
    times: tuple[int, int] | None
    """Nanoseconds that threads ran for its requests, and that they waited for a processor."""
    cold: dict[Case, tuple[Completion, list[float]]] = field(default_factory=dict)


class Bench:
    """The rounds of one file."""

    def __init__(
        self,
        path: Path,
        prompts: Mapping[str, str],
        settings: Settings,
        llama: LlamaCpp,
        options: Sequence[str],
    ) -> None:
        self.path = path
        self.prompts = prompts
        self.settings = settings
        self.llama = llama
        self.options = options
        self.gguf = split.joined(split.shards(path))
        self.tokens = answer_tokens(len(prompts))
        self.cases = Cases([], [])
        self.rounds: dict[Pair, list[_Round]] = {}
        self.best = OFF
        """The pair that is compared with no drafting."""
        self.cut_short = False
        """Whether the search for it had to end early."""
        self.expected = 0
        """About how many rounds there will be; 0 if unknown."""
        self.left = progress.Left()
        """Tells how much time is left; it has started."""
        self.times: tuple[int, int] | None = None
        """The `times` of the last round."""

    @property
    def can_draft(self) -> bool:
        """Whether llama-server can draft with the file's head."""
        why_not = converter_architectures.why_not_drafting(self.gguf)
        return bool(self.gguf.head_blocks) and why_not is None

    @property
    def done(self) -> int:
        """Rounds so far."""
        return sum(map(len, self.rounds.values()))

    def round(self, tried: Pair, *, more: bool = False) -> float:
        """Measure a pair once: tokens per second, 0 if it should draft and does not.

        `more`: in all forms. Raises ToolchainError.
        """
        progress.say(f"{self.path.name}: {self._next()}: {_label(*tried)}{self._disturbed()}")
        with tempfile.TemporaryDirectory() as scratch:
            log = Path(scratch) / "server.log"
            found = self._round(tried, more=more, log=log)
        self.rounds.setdefault(tried, []).append(found)
        self.times = found.times
        answers = [found.answers[case][0] for case in self.cases.main]
        if tried.n_max and not any(answer.drafts for answer in answers):
            return 0.0
        return harmonic_mean([answer.tokens_per_second for answer in answers])

    def has_time(self, rounds: int) -> bool:
        """Whether there is time for so many rounds."""
        done = self.done
        forms = 2 * len(self.cases.more) / max(1, len(self.cases.main))  # the last of each pair
        spent = time.monotonic() - self.left.start
        return spent * (1 + (rounds + forms) / max(1, done)) <= self.settings.minutes * 60

    def totals(self) -> list[Total]:
        """The totals of all pairs, in ascending order; the first is without drafting."""
        totals: list[Total] = []
        main = {(case.kind, case.form) for case in self.cases.main}
        runs = [run for run in self.runs() if (run.kind, run.form) in main]
        for tried in sorted(self.rounds):
            own = [run for run in runs if (run.n_max, run.p_min) == tried]
            memory = max(filter(None, (each.memory for each in self._last(tried))), default=None)
            totals.append(
                combine(own, tried, off=totals[0] if totals else None, memory_bytes=memory)
            )
        return totals

    def runs(self) -> list[Run]:
        """The runs of all pairs, cold and warm."""
        runs: list[Run] = []
        for tried in sorted(self.rounds):
            last = self._last(tried)
            cold = [self.rounds[tried][0].cold]
            for state, rounds in (("cold", cold), ("warm", [each.answers for each in last])):
                for case in [*self.cases.main, *self.cases.more]:
                    found = [each[case] for each in rounds if case in each]
                    if found:
                        answers, shares = zip(*found, strict=True)
                        runs.append(make_run(case, tried, state, answers, list(shares)))
        return runs

    def by_kind(self, *, steady: bool) -> list[KindSpeed]:
        """Each kind in each form, with the fastest pair and without drafting."""
        warm = [run for run in self.runs() if run.state == "warm"]
        without = {(run.kind, run.form): run.median for run in warm if run.n_max == 0}
        own = [
            _kind_speed(run, without[run.kind, run.form], steady=steady)
            for run in warm
            if (run.n_max, run.p_min) == self.best and (run.kind, run.form) in without
        ]
        return sorted(own, key=lambda each: (each.kind, FORMS.index(each.form)))

    def advice(self) -> Advice:
        """The pair to serve with."""
        totals = self.totals()
        best = [total for total in totals[1:] if (total.n_max, total.p_min) == self.best]
        found = recommend(totals, best[0] if best else None, self.waiting())
        cut = "; search cut short by `minutes`" if self.cut_short else ""
        return found._replace(verdict=found.verdict + cut)

    def waiting(self) -> float | None:
        """Share of the time that threads waited for a processor while comparing the fastest."""
        times = [each.times for tried in {OFF, self.best} for each in self._last(tried)]
        known = [each for each in times if each is not None]
        total = sum(ran + waited for ran, waited in known)
        return round(sum(waited for _, waited in known) / total, 3) if total else None

    def _next(self) -> str:
        """The next round's number, and how many rounds and how much time there will be."""
        spent = time.monotonic() - self.left.start
        done, total = self.done, self.expected
        if done and spent:
            total = int(min(total, done * 60 * self.settings.minutes / spent))
        of_about = f" of about {total}" if done < total else ""
        return f"round {done + 1}{of_about}{self.left.of(done, total)}"

    def _disturbed(self) -> str:
        """What the last round lost to other programs; empty if that was little."""
        lost = _share_waited(self.times) if self.times else 0
        return f" (other programs take {lost:.0%} of the time: not steady)" * (lost > WAITING)

    def _last(self, tried: Pair) -> list[_Round]:
        """The rounds that count: the last ones, after any that were not steady."""
        return self.rounds.get(tried, [])[-self.settings.repeats :]

    def _round(self, tried: Pair, *, more: bool, log: Path) -> _Round:
        # A user's options, such as a long context, may need more memory than a file does.
        options = [*_OPTIONS, *self.options, *_drafting(tried)]
        limited = not self.options
        with serve(self.llama, self.path, log=log, options=options, memory=limited) as server:
            cases = self._cases(server, more=more)
            first = tried not in self.rounds
            before = server.processor_time()
            answers = [
                server.completion(cases[0].prompt, self.tokens if first else WARM_UP),
                *(server.completion(case.prompt, self.tokens) for case in cases),
            ]
            memory = server.peak_memory()
            times = _since(before, server.processor_time())
            shares = _positions(log, [answer.drafts for answer in answers])
        found = list(zip(answers, shares, strict=True))
        warm = {case: each for case, each in zip(cases, found[1:], strict=True) if _counts(each[0])}
        if short := [case for case in self.cases.main if case not in warm]:
            self._leave_out(short, tried)
            return self._round(tried, more=more, log=log)
        return _Round(warm, memory, times, cold={cases[0]: found[0]} if first else {})

    def _leave_out(self, short: Sequence[Case], tried: Pair) -> None:
        """Leave out prompts that the model has no answer to: a base model may end a text at once.

        Raises ToolchainError if no prompt is left, or drafting is the reason.
        """
        kinds = ", ".join(case.kind for case in short)
        if tried in self.rounds:
            raise ToolchainError(
                f"llama-server generated nothing from {kinds}, though it did before: run again"
            )
        if tried != OFF:
            raise ToolchainError(
                f"llama-server generated nothing from {kinds} with drafting (n_max {tried.n_max}), "
                "though it does without: drafting changes the text: verify the file again"
            )
        kept = [case for case in self.cases.main if case not in short]
        if not kept:
            raise ToolchainError(
                f"llama-server generated nothing from any prompt ({kinds}): nothing to measure"
            )
        progress.say(f"left out, because the model generates nothing: {kinds}")
        left = {case.kind for case in kept}
        more = [case for case in self.cases.more if case.kind in left]
        self.cases = Cases(kept, more)

    def _cases(self, server: Server, *, more: bool) -> list[Case]:
        if not self.cases.main:
            self.cases = prompt_forms.prepare(
                server,
                self.prompts,
                self.settings.forms,
                self.tokens,
                has_template="tokenizer.chat_template" in self.gguf.metadata,
            )
        return [*self.cases.main, *(self.cases.more if more else ())]


def _sweep(bench: Bench) -> None:
    """Find the fastest pair, and confirm it by turns with no drafting.

    They take turns again if their rounds disagree, unless other programs are the reason.
    """
    left = bench.settings.repeats - 1
    if not bench.can_draft:
        bench.expected = 1 + left
        for index in range(1 + left):
            bench.round(OFF, more=index == left)
        return
    lengths = draft_lengths(bench.settings.n_max, blocks=len(bench.gguf.head_blocks))
    bench.expected = 1 + pairs.expected(lengths, bench.settings.p_min).rounds + 2 * left
    bench.round(OFF, more=not left)
    search = Search(
        lengths,
        bench.settings.p_min,
        bench.round,
        may_go_on=lambda: bench.has_time(1 + 2 * left),
    )
    bench.best = search.fastest()
    bench.cut_short = search.cut_short
    bench.expected = bench.done + 2 * left
    _confirm(bench, left)
    busy = (bench.waiting() or 0) > WAITING
    if not (bench.advice().steady or busy) and bench.has_time(2 * left + 2):
        progress.say(f"{bench.path.name}: not steady: measured again")
        bench.expected = bench.done + 2 * left + 2
        _confirm(bench, left + 1)


def _confirm(bench: Bench, rounds: int) -> None:
    """Measure the fastest pair and no drafting by turns: in all forms at last."""
    for index in range(rounds):
        turns = (OFF, bench.best) if index % 2 else (bench.best, OFF)
        for tried in turns:
            bench.round(tried, more=index == rounds - 1)


def _drafting(tried: Pair) -> list[str]:
    if not tried.n_max:
        return []
    ahead = ["--spec-draft-n-max", str(tried.n_max), "--spec-draft-p-min", f"{tried.p_min:g}"]
    return ["--spec-type", "draft-mtp", *ahead]


def _since(
    before: Mapping[str, tuple[int, int]], after: Mapping[str, tuple[int, int]]
) -> tuple[int, int] | None:
    """How long the thread that waited most ran and waited between two moments; None if unknown.

    Each token waits for the slowest of the threads that compute it, so a mean over many threads
    would hide one. Threads that ran for less than half as long as the busiest compute nothing.
    """
    times = [
        (ran - before.get(thread, (0, 0))[0], waited - before.get(thread, (0, 0))[1])
        for thread, (ran, waited) in after.items()
    ]
    most = max((ran for ran, _ in times), default=0)
    return max((each for each in times if 2 * each[0] >= most > 0), key=_share_waited, default=None)


def _share_waited(times: tuple[int, int]) -> float:
    ran, waited = times
    return waited / (ran + waited)


def _counts(answer: Completion) -> bool:
    """Whether there is a speed."""
    return len(answer.tokens) > 1 and answer.tokens_per_second > 0


def _positions(log: Path, drafts: Sequence[int]) -> list[list[float]]:
    """`by_position` of a running server, which writes its log after its answers."""
    deadline = time.monotonic() + LOG_LIMIT
    while True:
        found = by_position(log.read_text(encoding="utf-8", errors="replace"), drafts)
        complete = all(each for each, count in zip(found, drafts, strict=True) if count)
        if complete or time.monotonic() > deadline:
            return found
        time.sleep(0.05)


def _claimed(totals: Sequence[Total], *, steady: bool) -> list[Total]:
    """The totals, without speedups if the speeds were not steady."""
    return [total if steady else replace(total, speedup=None) for total in totals]


def _kind_speed(run: Run, without: float, *, steady: bool) -> KindSpeed:
    claimed = run.n_max and run.repeats > 1
    return KindSpeed(
        kind=run.kind,
        form=run.form,
        n_max=run.n_max,
        p_min=run.p_min,
        tokens_per_second=run.median,
        without=without,
        speedup=round(run.median / without, 3) if steady and claimed else None,
        acceptance=run.acceptance,
    )


def _label(n_max: int, p_min: float) -> str:
    return pair(n_max, p_min) if n_max else "without drafting"


def _line(total: Total) -> str:
    low, high = total.spread
    label = _label(total.n_max, total.p_min)
    text = f"{label}: {total.tokens_per_second:.1f} tokens/s ({low:.1f} to {high:.1f})"
    return text if total.acceptance is None else f"{text}, {total.acceptance:.1%} accepted"


def _share(accepted: int, drafts: int) -> float | None:
    return round(accepted / drafts, 4) if drafts else None


def _mean_by_position(parts: Sequence[tuple[int, Sequence[float]]]) -> tuple[float, ...]:
    """The mean of known shares by position, weighted by the number of drafts."""
    known = [(drafts, shares) for drafts, shares in parts if drafts and shares]
    weight = sum(drafts for drafts, _ in known)
    width = min((len(shares) for _, shares in known), default=0)
    sums = [sum(drafts * shares[i] for drafts, shares in known) for i in range(width)]
    return tuple(round(total / weight, 3) for total in sums)


def _digests(prompts: Mapping[str, str], runs: Iterable[Run]) -> dict[str, str]:
    """The sha256 of the prompts that were measured, by kind."""
    kinds = {run.kind for run in runs}
    by_kind = {prompt_forms.kind_and_form(name)[0]: text for name, text in prompts.items()}
    return {
        kind: hashlib.sha256(text.encode()).hexdigest()
        for kind, text in by_kind.items()
        if kind in kinds
    }
