"""Scores of llama-perplexity on tasks with known answers; outputs are those of a real run."""

import struct
from pathlib import Path
from typing import Any

import pytest
from conftest import CHECKPOINTS, ROOT
from example_records import measurement
from mtpforge.convert import native
from mtpforge.errors import ConfigError, ToolchainError
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.measure import perplexity, tasks
from mtpforge.measure.measurement import Score
from mtpforge.measure.perplexity import NoFiguresError
from mtpforge.report.scores import scores
from mtpforge.rules import layout
from mtpforge.rules.build import Build
from mtpforge.rules.local_paths import FileOnDisk

HELLASWAG = """\
0.00.181.730 I hellaswag_score : loaded 30 tasks from prompt.
0.00.181.733 I hellaswag_score : selecting 4 randomized tasks.

task\tacc_norm\t95% confidence interval
1\t0.00000000%\t[0.0000%, 79.3451%]
2\t50.00000000%\t[9.4531%, 90.5469%]
3\t66.66666667%\t[20.7660%, 93.8508%]
4\t75.00000000%\t[30.0642%, 95.4413%]
"""
WINOGRANDE = """\
0.00.166.599 I winogrande_score : loaded 3 tasks from prompt.
1\t100.0000\t -6.928442   -7.125224  1  1
2\t50.0000\t -6.786776   -7.337582  1  2
3\t66.6667\t -6.812735   -7.236125  1  1
"""
CHOICE = """\
0.00.029.945 I multiple_choice_score: there are 2 tasks in prompt
0.00.030.521 I multiple_choice_score : calculating TruthfulQA score over 2 tasks.

task\tacc_norm
1\t100.00000000
2\t50.00000000

0.00.109.337 I Final result: 50.0000 +/- 50.0000
"""
SAID = {"hellaswag": HELLASWAG, "winogrande": WINOGRANDE, "multiple_choice": CHOICE}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("hellaswag", Score(tasks=4, share=0.75, error=0.25)),
        ("winogrande", Score(tasks=3, share=0.666667, error=0.333333)),
        ("multiple_choice", Score(tasks=2, share=0.5, error=0.5)),
    ],
)
def test_the_score_is_that_after_the_last_task(kind: str, expected: Score) -> None:
    """The error is that of llama-perplexity's last line, which small files do not get."""
    said, pattern = SAID[kind], tasks.KINDS[kind][1]
    assert tasks.parse(said, pattern) == expected
    lines = said.splitlines()
    last = max(number for number, line in enumerate(lines) if "\t" in line)
    assert tasks.parse("\n".join(lines[:last]), pattern) is None
    assert tasks.parse("", pattern) is None
    with pytest.raises(ToolchainError, match="prints a score of"):
        tasks.parse(said.replace(lines[last], f"{expected.tasks}\t142.00000000"), pattern)


def test_output_that_was_cut_off_is_requested_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "h.txt").write_text("x")
    printed = [HELLASWAG[:-60], HELLASWAG]
    monkeypatch.setattr(LlamaCpp, "perplexity", lambda *_: printed.pop(0))
    found = tasks.score("hellaswag", Path("F.gguf"), tmp_path / "h.txt", LlamaCpp())
    assert found.tasks == 4 and not printed
    monkeypatch.setattr(LlamaCpp, "perplexity", lambda *_: HELLASWAG[:-60])
    with pytest.raises(NoFiguresError, match="does not print the score of all tasks in"):
        tasks.score("hellaswag", Path("F.gguf"), tmp_path / "h.txt", LlamaCpp())
    monkeypatch.setattr(LlamaCpp, "perplexity", lambda *_: "nothing")
    with pytest.raises(ConfigError, match="finds no hellaswag task in it"):
        tasks.score("hellaswag", Path("F.gguf"), tmp_path / "h.txt", LlamaCpp())


def test_a_long_run_is_repeated_only_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log is lost at the end of a run of moments; a run of hours fails for another reason."""
    (tmp_path / "h.txt").write_text("x")
    clock, runs = [0.0], []

    def run(*_: Any) -> str:
        clock[0] += 3600
        runs.append(clock[0])
        return HELLASWAG[:-60]

    monkeypatch.setattr(LlamaCpp, "perplexity", run)
    monkeypatch.setattr(perplexity.time, "monotonic", lambda: clock[0])
    with pytest.raises(NoFiguresError):
        tasks.score("hellaswag", Path("F.gguf"), tmp_path / "h.txt", LlamaCpp())
    assert len(runs) == 3
    with pytest.raises(NoFiguresError):
        perplexity.of_text(Path("F.gguf"), tmp_path / "h.txt", 1, LlamaCpp())
    assert len(runs) == 6


def test_a_file_that_cannot_be_of_its_kind_is_refused(tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    for content in (b"", b"abc", b"garbage", struct.pack("<I", 2) + b"1234"):
        bad.write_bytes(content)
        with pytest.raises(ConfigError, match="bad: not a file of llama-perplexity's --multiple"):
            tasks.check("multiple_choice", bad)
    with pytest.raises(ConfigError, match="'arc' is not a kind of tasks: use one of hellaswag,"):
        tasks.check("arc", bad)
    with pytest.raises(ConfigError, match="missing"):
        tasks.check("hellaswag", tmp_path / "none")


def write_tasks(folder: Path) -> dict[str, Path]:
    """Five tasks of each kind."""
    files = {kind: folder / kind for kind in tasks.KINDS}
    endings = ["bread.", "a lamp.", "a bridge.", "a law."]
    lines = [line for n in range(5) for line in (f"Baker {n} sells", str(n % 4), *endings)]
    files["hellaswag"].write_text("\n".join(lines) + "\n")
    rows = [f'{n},"The cup is not in box {n}, since the _ is small.",cup,box,2' for n in range(6)]
    files["winogrande"].write_text("\n".join(rows) + "\n")
    answers = struct.pack("<I", 4) + b"".join(map(text, endings)) + struct.pack("<4i", 1, 0, 0, 0)
    one = text("What does a baker sell?") + answers + struct.pack("<I", 0)
    positions = struct.pack("<6I", 5, *range(0, 5 * len(one), len(one)))
    files["multiple_choice"].write_bytes(positions + 5 * one)
    return files


def text(words: str) -> bytes:
    return struct.pack("<I", len(words)) + words.encode()


def test_llama_perplexity_scores_each_kind(toolchain: Path, tmp_path: Path) -> None:
    model = tmp_path / "all.gguf"
    native.convert(CHECKPOINTS / "tiny-qwen3.5", model, "all", tokenizer_pre="qwen35")
    llama = LlamaCpp(toolchain, threads=1)
    for kind, path in write_tasks(tmp_path).items():
        assert tasks.score(kind, model, path, llama).tasks == 5


def test_files_of_tasks_decide_a_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(FileOnDisk, "problem", lambda path: None)
    given = {"hellaswag": "my tasks.txt", "multiple_choice": "m.bin"}
    model: dict[str, Any] = {
        "source": {"path": "tests/checkpoints/tiny-qwen3.5"},
        "measure": {"tasks": given},
        "variants": {"Q8_0": {}},
    }
    build = Build({"models": {"m": model}})
    wildcards: Any = type("Wildcards", (), {"model": "m", "variant": "Q8_0"})
    records = [layout.local_record(path) for path in given.values()]
    assert build.measure.records(wildcards) == records
    assert build.measure.text_records(wildcards) == []
    options = build.measure.options(wildcards)
    assert f"--task hellaswag 'my tasks.txt' '{records[0]}'" in options
    assert f"--task multiple_choice m.bin {records[1]}" in options


def test_scores_are_in_the_summary_with_their_error() -> None:
    path = Path("results/m/measure/x.json")
    score = Score(tasks=400, share=0.7125, error=0.0226)
    shown = scores({path: measurement("x.gguf", tasks={"multiple_choice": score})})
    assert shown.splitlines()[0] == "Right answers: m"
    assert shown.splitlines()[2:] == [
        "| file |     multiple choice |",
        "| ---- | ------------------: |",
        "| x    | 71.2% ± 2.3% of 400 |",
    ]
    assert scores({path: measurement("x.gguf")}) == ""
