"""Measuring: llama.cpp's output is parsed strictly; a head is recommended only if it is faster."""

import contextlib
import shlex
import struct
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import CHECKPOINTS, ROOT
from mtpforge.convert import native
from mtpforge.errors import ConfigError, ToolchainError
from mtpforge.llama_cpp import process
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.llama_cpp.server import Completion
from mtpforge.measure import perplexity
from mtpforge.measure.measurement import Run as MeasuredRun
from mtpforge.measure.measurement import Total
from mtpforge.measure.pairs import Pair
from mtpforge.measure.prompt_forms import Case
from mtpforge.measure.recommendation import recommend
from mtpforge.measure.speed import _since, by_position, combine, describe_machine, make_run
from mtpforge.rules.build import Build

sys.path.insert(0, str(CHECKPOINTS))

import corpus

LOG = """\
0.00.832.143 I slot print_timing: id  0 | task 0 | draft acceptance = 0.65672 \
(  132 accepted /   201 generated), mean len =  2.97
0.00.832.151 I slot print_timing: id  0 | task 0 |      acc per pos = (0.985, 0.582, 0.403)
0.00.832.203 I spec common_specu: statistics draft-mtp: #mean acc len = 2.97, \
#acc rate/pos = (0.985, 0.582, 0.403), dur = 0.002 ms
0.01.378.601 I slot print_timing: id  0 | task 70 |      acc per pos = (0.500, 0.250, 0.000)
"""
SAID = """\
====== Perplexity statistics ======
Mean PPL(Q)                   :   4.036618 ±   0.309490
Mean PPL(base)                :   3.914228 ±   0.287455
Mean PPL(Q)/PPL(base)         :   1.031268 ±   0.007998

====== KL divergence statistics ======
Mean    KLD:   0.002733 ±   0.000321
Maximum KLD:   0.253097
99.9%   KLD:   0.199753
99.0%   KLD:   0.062472

====== Token probability statistics ======
99.9%   Δp:  5.962%
Same top p: 98.039 ± 0.307 %
"""


def total(
    n_max: int, low: float, speed: float, high: float, off: float = 100.0, p_min: float = 0.0
) -> Total:
    return Total(
        n_max=n_max,
        p_min=p_min,
        repeats=3,
        tokens_per_second=speed,
        spread=(low, high),
        cold_tokens_per_second=speed,
        drafts=100 * n_max,
        accepted=80 * n_max,
        acceptance=0.8 if n_max else None,
        by_position=(),
        speedup=round(speed / off, 3),
        memory_bytes=None,
    )


OFF = total(0, 98, 100, 102)


def test_a_pair_that_is_faster_in_each_round_is_recommended() -> None:
    best = total(6, 180, 190, 191, p_min=0.75)
    verdict = (
        "1.90 times as fast as without drafting: 190.0 tokens/s with n_max 6, p_min 0.75,"
        " 100.0 without"
    )
    assert recommend([OFF, total(1, 150, 155, 160), best], best, 0.01) == (6, 0.75, verdict, True)


def test_a_slow_head_is_not_recommended() -> None:
    best = total(1, 50, 51, 53)
    speeds = "51.0 tokens/s with n_max 1, 100.0 without"
    verdict = f"slower than without drafting: {speeds}: leave drafting off"
    assert recommend([OFF, best], best, None) == (0, 0, verdict, True)


@pytest.mark.parametrize("drafting", [(90, 101, 110), (101, 110, 120), (95, 99, 99)])
def test_nothing_is_recommended_within_the_spread(drafting: tuple[float, float, float]) -> None:
    best = total(1, *drafting)
    advice = recommend([OFF, best], best, None)
    assert advice.n_max == 0
    assert advice.verdict.startswith("no faster than without drafting, given the spread")


@pytest.mark.parametrize(
    ("off", "drafting", "waiting", "reason"),
    [
        ((98, 100, 102), (150, 155, 160), 0.34, "took processors from llama-server for 34% of"),
        ((60, 100, 102), (150, 155, 160), 0.01, "60.0 to 102.0 tokens/s without drafting:"),
        ((98, 100, 102), (105, 155, 160), None, "105.0 to 160.0 tokens/s with n_max 2, p_min 0.5:"),
        ((98, 100, 102), (30, 41, 50), None, "30.0 to 50.0 tokens/s with n_max 2, p_min 0.5:"),
    ],
)
def test_nothing_is_claimed_on_a_busy_machine(
    off: tuple[float, float, float],
    drafting: tuple[float, float, float],
    waiting: float | None,
    reason: str,
) -> None:
    best = total(2, *drafting, p_min=0.5)
    advice = recommend([total(0, *off), best], best, waiting)
    assert advice[:2] == (None, None) and not advice.steady
    assert advice.verdict.startswith("not steady: ") and reason in advice.verdict


def test_nothing_is_recommended_without_a_head() -> None:
    verdict = "no head that llama.cpp can draft with"
    assert recommend([OFF], None, 0.1) == (0, 0, verdict, True)
    busy = recommend([OFF], None, 0.9)
    assert busy.n_max == 0 and not busy.steady
    assert busy.verdict.startswith(f"{verdict}; not steady: ")


def test_nothing_is_known_after_one_round() -> None:
    once = replace(total(1, 150, 155, 160), repeats=1)
    advice = recommend([OFF, once], once, None)
    assert advice.n_max is None and advice.steady and "measured once" in advice.verdict
    assert not recommend([OFF, once], once, 0.9).steady


def test_nothing_is_recommended_without_drafts() -> None:
    dead = replace(total(1, 150, 155, 160), drafts=0)
    assert recommend([OFF, dead], dead, None).verdict == "nothing was drafted: the head is dead"
    wary = replace(dead, p_min=0.9)
    assert recommend([OFF, wary], wary, None) == (
        *(0, 0, "nothing was drafted with p_min 0.9: lower it"), True,
    )  # fmt: skip


def test_the_thread_that_waited_most_counts_if_it_computes() -> None:
    """One of eight that a program holds up slows every token; a logging thread does not."""
    before = {str(number): (50, 50) for number in range(7)}
    after = {str(number): (1050, 50) for number in range(7)} | {"7": (600, 400), "log": (9, 900)}
    assert _since(before, after) == (600, 400)
    assert _since({}, {}) is None and _since(before, before) is None


def test_acceptance_by_position_is_read_for_each_request() -> None:
    assert by_position(LOG, [201, 0, 12]) == [[0.985, 0.582, 0.403], [], [0.5, 0.25, 0.0]]


@pytest.mark.parametrize("drafts", [[201], [201, 12, 12], [0, 0]])
def test_positions_that_do_not_match_the_requests_are_dropped(drafts: list[int]) -> None:
    assert by_position(LOG, drafts) == [[] for _ in drafts]


def runs_of(
    n_max: int, kind: str, *parts: tuple[float, int, int, list[float]]
) -> list[MeasuredRun]:
    """A cold and a warm run of requests: (tokens/s, drafts, accepted, acceptance by position)."""
    answers = [
        Completion("", [1, 2], speed, drafts, accepted) for speed, drafts, accepted, _ in parts
    ]
    rates = [part[3] for part in parts]
    case, tried = Case(kind, "raw", ""), Pair(n_max, 0.5)
    return [
        make_run(case, tried, "cold", answers[:1], rates[:1]),
        make_run(case, tried, "warm", answers[1:], rates[1:]),
    ]


def test_kinds_are_weighted_by_equal_numbers_of_tokens() -> None:
    """1 s for 60 tokens of one kind and 2 s for 60 of the other: 120 in 3 s."""
    cold = (1.0, 0, 0, [])
    runs = runs_of(0, "code", cold, (10.0, 0, 0, []), (20.0, 0, 0, []), (30.0, 0, 0, []))
    off = combine(runs, Pair(0, 0), None)
    assert (off.tokens_per_second, off.spread, off.acceptance, off.speedup, off.repeats) == (
        20.0,
        (10.0, 30.0),
        None,
        1.0,
        3,
    )
    runs = runs_of(2, "code", cold, (60.0, 30, 27, [1.0, 0.8]))
    runs += runs_of(2, "prose", cold, (30.0, 10, 3, [0.6, 0.0]))
    pair = Pair(2, 0.5)
    found = combine(runs, pair, off)
    assert (found.tokens_per_second, found.cold_tokens_per_second, found.speedup) == (40, 1, 2)
    assert (found.drafts, found.accepted, found.acceptance) == (40, 30, 0.75)
    assert found.by_position == (0.9, 0.6)
    runs += runs_of(2, "structured", cold, (30.0, 10, 3, []))  # its positions were not logged
    assert combine(runs, pair, off).by_position == (0.9, 0.6)


def test_the_output_of_llama_perplexity_is_read() -> None:
    assert perplexity.figures(SAID, perplexity._DIVERGENCE) == {
        "perplexity": 4.036618,
        "mean": 0.002733,
        "mean_error": 0.000321,
        "maximum": 0.253097,
        "p99.9": 0.199753,
        "same_top": 98.039,
        "same_top_error": 0.307,
    }


@pytest.mark.parametrize(
    "line", ["Mean PPL(Q) ", "Mean    KLD", "Maximum KLD", "99.9%   KLD", "Same top p"]
)
@pytest.mark.parametrize("instead", ["", "{} : nan ± nan %"])
def test_a_missing_figure_is_an_error(line: str, instead: str) -> None:
    said = "\n".join(
        instead.format(line) if row.startswith(line) else row for row in SAID.splitlines()
    )
    with pytest.raises(ToolchainError, match="does not print"):
        perplexity.figures(said, perplexity._DIVERGENCE)


@pytest.mark.parametrize("shown", ["nan", "-nan", "inf"])
def test_predictions_that_are_not_numbers_are_an_error(
    monkeypatch: pytest.MonkeyPatch, shown: str
) -> None:
    """llama-perplexity leaves them out of the KL divergence, which is zero without the others."""
    rows = [f"Mean PPL(Q)                   :       {shown} ±       -nan"]
    rows.append("Mean    KLD:   0.000000 ±   0.000000")
    monkeypatch.setattr(LlamaCpp, "perplexity", lambda self, arguments: "\n".join(rows))
    for read in (perplexity.mean_divergence, perplexity.against_reference):
        with pytest.raises(ToolchainError, match="not numbers"):
            read(Path("model.gguf"), Path("logits"), LlamaCpp())


@pytest.mark.parametrize(
    ("said", "runs"),
    [
        (SAID, 1),
        (SAID.partition("Same top")[0], perplexity.ATTEMPTS),
        ("perf_context_print: total time", 1),
    ],
)
def test_output_that_was_cut_off_is_requested_again(
    monkeypatch: pytest.MonkeyPatch, said: str, runs: int
) -> None:
    called: list[object] = []
    monkeypatch.setattr(LlamaCpp, "perplexity", lambda _, options: called.append(options) or said)
    with contextlib.suppress(ToolchainError):
        perplexity.against_reference(Path("F.gguf"), Path("logits"), LlamaCpp())
    assert len(called) == runs


def test_logits_of_another_vocabulary_are_noticed(tmp_path: Path) -> None:
    """llama-perplexity would print figures, and they would be wrong."""
    native.convert(CHECKPOINTS / "tiny-qwen3.5", tmp_path / "draft.gguf", "draft", "qwen35")
    logits = tmp_path / "logits"
    header = b"_logits_" + struct.pack("<3i", 512, 1408, 16)
    logits.write_bytes(header.ljust(perplexity.size(16, 1408), b"\0"))
    assert perplexity.vocabularies(tmp_path / "draft.gguf", logits) == (1280, 1408)
    for numbers in ((512, 1408, 17), (1 << 30, 1408, 16), (512, -1408, 16), (512, 1408, -1)):
        logits.write_bytes(b"_logits_" + struct.pack("<3i", *numbers) + logits.read_bytes()[20:])
        with pytest.raises(ConfigError, match="header and its size do not agree"):
            perplexity.vocabularies(tmp_path / "draft.gguf", logits)
    for damaged in (b"", logits.read_bytes()[:19], bytes(20)):
        logits.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"not written by reference_logits\.py"):
            perplexity.vocabularies(tmp_path / "draft.gguf", logits)


def test_a_server_that_cannot_list_its_devices_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llama-server").write_text("#!/bin/sh\nexec sleep 5\n")
    (tmp_path / "llama-server").chmod(0o755)
    monkeypatch.setattr(process, "SILENCE", 0.1)
    with pytest.raises(ToolchainError, match="llama-server printed nothing"):
        describe_machine(LlamaCpp(tmp_path))


def test_the_size_of_logits_is_predicted() -> None:
    assert (
        perplexity.size(8, 1280) == 5_255_124
    )  # as llama-perplexity of the pinned llama.cpp wrote them
    assert round(perplexity.size(16, 248_320) / 1e9, 2) == 2.03


def test_the_held_out_text_is_generated_by_the_grammar() -> None:
    assert (CHECKPOINTS / "held-out.txt").read_text(encoding="utf-8") == corpus.held_out_text()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--n-max", "0"],
        ["--n-max", "1,x"],
        ["--repeats", "0"],
        ["--prompts", "."],
        ["--p-min", "1"],
        ["--minutes", "0"],
        ["--forms", "raw,spoken"],
    ],
)
def test_invalid_options_are_refused(run, tmp_path: Path, arguments: list[str]) -> None:
    done = run("measure.py", tmp_path / "none.gguf", "--out", tmp_path / "out.json", *arguments)
    assert (
        done.returncode and "Traceback" not in done.stderr and not (tmp_path / "out.json").exists()
    )


# ── config.yaml ──

TINY = {"source": {"path": "tests/checkpoints/tiny-qwen3.5"}, "variants": {"BF16": {}, "Q8_0": {}}}


def build(measured: dict[str, Any] | None, **model: Any) -> Build:
    return Build(
        {"models": {"m": {**TINY, **({} if measured is None else {"measure": measured}), **model}}}
    )


def wildcards(variant: str = "Q8_0") -> Any:
    return SimpleNamespace(model="m", variant=variant, base="tiny-qwen3.5")


@pytest.fixture
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.usefixtures("at_root")
def test_nothing_is_measured_by_default() -> None:
    made = build(None)
    assert made.measurements() == []
    with pytest.raises(ConfigError, match="models/m/measure"):
        made.measure.options(wildcards())


@pytest.mark.usefixtures("at_root")
def test_configured_options_reach_the_measurement() -> None:
    made = build({})
    assert made.measurements() == [
        f"results/m/measure/tiny-qwen3.5-{variant}.json" for variant in ("BF16", "Q8_0")
    ]
    assert (
        made.measure.options(wildcards())
        == "--report results/m/reports/tiny-qwen3.5-Q8_0.json --n-max 1,2,3,4,6"
        " --p-min 0,0.75 --repeats 3 --minutes 60 --forms raw,chat,thinking"
        and made.measure.logits(wildcards()) == []
    )
    made = build({"n_max": [2], "repeats": 1, "text": "README.md"}, split="48G")
    logits = "results/m/work/logits/reference.bin"
    assert made.measure.logits(wildcards()) == [logits] and made.measure.chunks(wildcards()) == 16
    report, *options = made.measure.options(wildcards()).split(" --")
    assert report == "--report results/m/reports/tiny-qwen3.5-Q8_0.split.json"
    assert [each for each in options if "recorded" not in each] == [
        "n-max 2",
        "p-min 0,0.75",
        "repeats 1",
        "minutes 60",
        "forms raw,chat,thinking",
        "text README.md",
        "chunks 16",
        f"reference-logits {logits}",
    ]
    assert made.measure.file(wildcards()) == "results/m/tiny-qwen3.5-Q8_0"
    assert made.measure.report(wildcards()) == "results/m/reports/tiny-qwen3.5-Q8_0.split.json"
    made = build({"n_max": [2], "serve": ["-fa", "on", "--chat-template-kwargs", '{"a": 1}']})
    *_, served = made.measure.options(wildcards()).partition("--forms raw,chat,thinking ")
    assert shlex.split(shlex.split(served)[0].removeprefix("--serve=")) == [
        "-fa",
        "on",
        "--chat-template-kwargs",
        '{"a": 1}',
    ]
    build({"serve": ["--spec-draft-ngl", "99", "--spec-draft-sampling", "probabilistic"]})
    drafting = ("--spec-type", "--spec-draft-n-max", "--spec-draft-p-min", "--draft-p-min")
    for own in (*drafting, "-m", "--port", "--host"):
        with pytest.raises(ConfigError, match="measure/serve/0"):
            build({"serve": [own, "1"]})


@pytest.mark.usefixtures("at_root")
def test_a_fetched_head_alone_is_not_compared_with_bf16(tmp_path: Path) -> None:
    (tmp_path / "base.gguf").touch()
    theirs = {"base": {"path": str(tmp_path / "base.gguf")}}
    source = {"repo": "Owner/Name", "revision": "0" * 40}
    made = build({"text": "README.md", "chunks": 4}, source=source, variants={"mine": theirs})
    assert (
        made.measure.text(wildcards("mine")) == ["README.md"]
        and made.measure.logits(wildcards("mine")) == []
    )
    options = made.measure.options(wildcards("mine"))
    assert "--text README.md --chunks 4" in options and "logits" not in options


@pytest.mark.usefixtures("at_root")
@pytest.mark.parametrize(
    ("measured", "message"),
    [
        ({"nmax": [1]}, "models/m/measure/nmax: unknown key"),
        ({"n_max": []}, "models/m/measure/n_max"),
        ({"n_max": [0]}, "models/m/measure/n_max/0"),
        ({"repeats": 0}, "models/m/measure/repeats"),
        ({"p_min": [1]}, "models/m/measure/p_min/0"),
        ({"p_min": [0.5, 0.5]}, "models/m/measure/p_min: 0.5 is listed twice"),
        ({"forms": ["spoken"]}, "models/m/measure/forms/0"),
        ({"prompts": "nowhere"}, r"models/m/measure/prompts: no \*.txt files in nowhere"),
        ({"text": "nowhere.txt"}, "models/m/measure/text: no such file: nowhere.txt"),
    ],
)
def test_configuration_errors_name_their_key(measured: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build(measured)
