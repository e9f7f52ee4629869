"""The summary table: one row per file, with speed and the draft length to serve with."""

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import Run
from example_records import TEXT, measurement, report, total
from mtpforge.measure.measurement import KlDivergence
from mtpforge.report import distance_tables, page, summary

DIVERGENCE = KlDivergence(
    mean=0.00426,
    mean_error=0.00056,
    p99_9=0.34674,
    maximum=0.50248,
    same_top=0.97598,
    same_top_error=0.00339,
)


def test_models_with_files_of_the_same_name_keep_their_figures(tmp_path: Path, run: Run) -> None:
    for model, off in (("a", 100.0), ("b", 50.0)):
        for part in ("reports", "measure"):
            (tmp_path / model / part).mkdir(parents=True)
        report("x.gguf").write(tmp_path / model / "reports/x.json")
        measured = measurement("x.gguf", by_n_max=(total(0, off),))
        measured.write(tmp_path / model / "measure/x.json")
    reports = sorted(tmp_path.glob("*/reports/*"))
    measurements = sorted(tmp_path.glob("*/measure/*"))
    out = tmp_path / "summary.md"
    done = run("summary.py", *reports, "--measurements", *measurements, "--out", out)
    assert done.returncode == 0, done.stderr
    rows = out.read_text().splitlines()[2:]
    assert [row.split("|")[-3].strip() for row in rows] == ["100", "50"]
    names = [[cell.strip() for cell in row.split("|")[1:3]] for row in rows]
    assert names == [["a", "x.gguf"], ["b", "x.gguf"]]


def test_a_column_names_the_models_unless_their_files_do(tmp_path: Path) -> None:
    def heads(*files: str) -> list[str]:
        paths = [tmp_path / file.replace("/", "/reports/") for file in files]
        for path in paths:
            path.parent.mkdir(parents=True, exist_ok=True)
            report(f"{path.stem}.gguf").write(path)
        return [line.split("|")[1].strip() for line in summary.summary(paths, []).splitlines()[::2]]

    assert heads("m-4b/M-4B-Q4_0.json") == ["file", "M-4B-Q4_0.gguf"]
    assert heads("mine/M-4B-Q4_0.json") == ["file", "M-4B-Q4_0.gguf"]
    assert heads("m-4b/M-4B-Q4_0.json", "n/mtp-N-Q8_0.json")[0] == "file"
    assert heads("m-4b/M-4B-Q4_0.json", "m-4b-injected/M-4B-Q8_0.json") == ["model", "m-4b"]


def test_what_another_run_made_is_listed_too_if_it_can_be_read(tmp_path: Path, run: Run) -> None:
    """A file without a report has no measurement either."""
    for model in ("here", "old"):
        for part in ("reports", "measure"):
            (tmp_path / model / part).mkdir(parents=True)
        report("x.gguf").write(tmp_path / model / "reports/x.split.json")
        measured = measurement("x.gguf", text=TEXT, kl_divergence=DIVERGENCE, steady=False)
        measured.write(tmp_path / model / "measure/x.json")
    (tmp_path / "old/reports/x.split.json").write_text("{}")
    paths = [tmp_path / model / "reports/x.split.json" for model in ("here", "gone", "old")]
    measurements = [tmp_path / model / "measure/x.json" for model in ("here", "gone", "old")]
    out = tmp_path / "summary.md"
    earlier = ("--earlier", tmp_path / "gone", tmp_path / "old")
    done = run("summary.py", *paths, "--measurements", *measurements, *earlier, "--out", out)
    assert done.returncode == 0 and done.stderr.startswith(f"warning: left out: {paths[2]}:")
    table, *below = out.read_text().split("\n\n")
    assert len(table.splitlines()) == 3
    headings = [part for part in below if part.startswith("Distance")]
    assert headings == ["Distance from BF16: here, on at most 16 chunks of held-out.txt"]


def test_what_was_built_now_must_be_readable(tmp_path: Path, run: Run) -> None:
    for folder in ("reports", "measure"):
        (tmp_path / folder).mkdir()
    path, out = tmp_path / "reports/x.json", tmp_path / "summary.md"
    measured = tmp_path / "measure/x.json"
    done = run("summary.py", path, "--out", out)
    assert done.returncode == 1 and f"error: {path}:" in done.stderr and not out.exists()
    report("x.gguf").write(path)
    measured.write_text("{}")
    done = run("summary.py", path, "--measurements", measured, "--out", out)
    assert done.returncode == 1 and f"error: {measured}:" in done.stderr and not out.exists()


def test_speed_is_without_drafting_and_at_the_fastest_n_max() -> None:
    off = total(0, 100.0)
    assert summary.speed(measurement(by_n_max=(off, total(1, 51.0)))) == "100 → 51"
    assert summary.speed(measurement(by_n_max=(off, total(1, 120.0), total(2, 155.0)))) == (
        "100 → 155"
    )
    assert summary.speed(measurement(by_n_max=(off,))) == "100"


def test_speeds_that_were_not_steady_are_to_be_measured_again(tmp_path: Path) -> None:
    for part in ("reports", "measure"):
        (tmp_path / part).mkdir()
    report("x.gguf").write(tmp_path / "reports/x.json")
    again = f"- not steady: measure again on a quiet machine: {summary.REMOVE}, then `make`\n"
    for steady in (True, False):
        measured = measurement("x.gguf", by_n_max=(total(0, 9.0),), steady=steady)
        measured.write(tmp_path / "measure/x.json")
        text = summary.summary([tmp_path / "reports/x.json"], [tmp_path / "measure/x.json"])
        assert (again in text) == (not steady)


def test_the_command_removes_the_measurements_that_were_not_steady(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = Path("results/m/measure")
    folder.mkdir(parents=True)
    for name, steady in (("x", True), ("y", False)):
        measurement(f"{name}.gguf", steady=steady).write(folder / f"{name}.json")
    subprocess.run(["sh", "-c", summary.REMOVE.strip("`")], check=True)
    assert [path.name for path in folder.iterdir()] == ["x.json"]


def test_last_columns_are_empty_without_a_measurement() -> None:
    assert summary.row(report("x.gguf"), None)[-2:] == ("-", "-")
    off = measurement(by_n_max=(total(0, 100.0), total(1, 51.0)), recommended_n_max=0)
    assert summary.row(report("x.gguf"), off)[-2:] == ("100 → 51", "off")
    on = measurement(by_n_max=(total(0, 100.0), total(2, 155.0)), recommended_n_max=2)
    assert summary.row(report("x.gguf"), on)[-2:] == ("100 → 155", "2")


def test_acceptance_is_a_share_with_its_counts() -> None:
    assert summary.acceptance(report("x.gguf", drafts=400, accepted=325)) == "81.2% (325/400)"
    assert summary.acceptance(report("x.gguf")) == "not possible"
    assert summary.acceptance(report("x.gguf", head="none")) == "-"
    assert summary.acceptance(report("mtp-x.gguf", head="")) == "-"


def test_distances_from_bf16_are_below_the_files_of_each_model(tmp_path: Path) -> None:
    for model in "ab":
        for part in ("reports", "measure"):
            (tmp_path / model / part).mkdir(parents=True)
        report("x.gguf").write(tmp_path / model / "reports/x.json")
        found = measurement("x.gguf", bytes=10**9, text=TEXT, kl_divergence=DIVERGENCE)
        replace(found, perplexity=4.0319).write(tmp_path / model / "measure/x.json")
    paths = sorted(tmp_path.glob("*/measure/x.json"))
    made = summary.summary(sorted(tmp_path.glob("*/reports/x.json")), paths)
    table, *others = made.split("\n\n")
    assert len(table.splitlines()) == 4
    assert others[0] == "Distance from BF16: a, on at most 16 chunks of held-out.txt"
    assert [cell.strip() for cell in others[1].splitlines()[2].split("|")[1:-1]] == [
        "x",
        "1.00 GB",
        "0.00426 ± 0.00056",
        "0.3467",
        "0.502",
        "97.60% ± 0.34%",
        "4.0319",
    ]
    assert others[2].startswith("Distance from BF16: b,")


def test_a_bar_in_a_name_stays_in_its_cell(tmp_path: Path) -> None:
    name = r"a|b | c\|d.gguf"
    for part in ("reports", "measure"):
        (tmp_path / "m" / part).mkdir(parents=True)
    report(name).write(tmp_path / "m/reports/x.json")
    measured = measurement(name, text=TEXT, kl_divergence=DIVERGENCE)
    measured.write(tmp_path / "m/measure/x.json")
    made = summary.summary(
        [tmp_path / "m/reports/x.json"], [tmp_path / "m/measure/x.json"], (), (), ()
    )
    rows = [line for line in made.splitlines() if line.startswith("| a")]
    assert [row.split(" | ")[0] for row in rows] == [
        r"| a\|b \| c\|d.gguf", r"| a\|b \| c\|d",
    ]  # fmt: skip
    (tmp_path / "summary.md").write_text(made)
    assert r"<td>a|b | c|d.gguf</td>" in page.table(tmp_path / "summary.md")


def test_a_measurement_of_an_older_version_has_no_errors() -> None:
    assert distance_tables.cells(KlDivergence(mean=-1e-7, p99_9=0.1, same_top=1.0)) == (
        "0.00000", "0.1000", "-", "100.00%"
    )  # fmt: skip
