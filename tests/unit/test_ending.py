"""The end of a run: what there is, where, how to serve it, and what to do next, in 20 lines."""

import os
from pathlib import Path
from typing import Any

import pytest
from example_records import measurement, report, total
from gguf.constants import GGUFValueType
from huggingface_hub import constants
from mtpforge.gguf.metadata import Value
from mtpforge.gguf.reader import Gguf
from mtpforge.report import ending
from mtpforge.rules.config import HubTarget, S3Folder
from mtpforge.rules.publish import UploadedModel

TITLES = ["files", "reports", "serve", "next"]


@pytest.fixture
def results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which every GGUF is one with a head."""
    numbers = {"qwen35.block_count": 5, "qwen35.nextn_predict_layers": 1}
    metadata = {key: Value.of(value, GGUFValueType.UINT32) for key, value in numbers.items()}
    metadata["general.architecture"] = Value.of("qwen35", GGUFValueType.STRING)
    monkeypatch.setattr(ending.reader, "read", lambda path: Gguf(path, metadata, {"a": None}, {}))
    monkeypatch.chdir(tmp_path)
    return Path("results")


def write(results: Path, model: str, *names: str, bits: float = 4.6) -> list[Path]:
    for name in names:
        report(f"{name}.gguf", bits_per_weight=bits).write(results / model / f"reports/{name}.json")
    return [results / model / f"reports/{name}.json" for name in names]


def summary(results: Path, rows: int) -> Path:
    path = results / "summary.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text("| file |\n| --- |\n" + "".join(f"| {n} |\n" for n in range(rows)))
    return path


def shown(results: Path, reports: list[Path], **options: Any) -> list[str]:
    return ending.after_build(summary(results, len(reports)), reports, **options).splitlines()


def test_an_upload_is_offered_if_a_model_has_a_place_for_it(results: Path) -> None:
    reports = write(results, "m", "x-Q4_0")
    assert "`make publish DRY_RUN=1` lists an upload" in shown(results, reports, publish=True)[-1]
    without = shown(results, reports)[-1]
    assert "make publish" not in without
    assert "`publish: {repo: YOU/NAME}` in a model's entry prepares an upload" in without
    line = shown(results, reports, repo="Owner/Name")[-1]
    assert "`make add REPO=Owner/Name PUBLISH=YOU/NAME` prepares an upload" in line


def test_the_report_is_of_the_models_that_the_run_was_for(results: Path) -> None:
    reports = write(results, "m", "x-Q4_0")
    assert "`make report` draws" in shown(results, reports)[-1]
    assert "`make report MODELS=m` draws" in shown(results, reports, models=["m"])[-1]
    assert "`make report MODELS='m n'` draws" in shown(results, reports, models=["m", "n"])[-1]


def test_an_upload_ends_with_its_files_and_its_address(results: Path) -> None:
    reports = [str(path) for path in write(results, "m", *(f"x{n}" for n in range(12)))]
    target = HubTarget(repo="Owner/Name")
    upload = UploadedModel("results/m/README.md", reports, ["results/m/measure/x0.json"], target)
    lines = ending.after_upload([upload]).splitlines()
    assert sum(line.startswith("| ") for line in lines[2:]) == 9
    assert "and 3 more: see results/m/README.md" in lines
    assert [line.split()[0] for line in lines[-5:]] == [*TITLES[:3], "uploaded", "next"]
    assert lines[-2] == f"uploaded  {constants.ENDPOINT}/Owner/Name"
    assert lines[-1].endswith(
        "if it is private, publish it: `.venv/bin/hf repos settings Owner/Name --public`"
    )
    folder = UploadedModel(upload.card, reports, [], S3Folder(url="s3://bucket/folder"))
    assert ending.after_upload([folder]).endswith("\nuploaded  s3://bucket/folder")
    five = ending.after_upload([folder] * 5).splitlines()
    assert five[-3:] == ["uploaded  s3://bucket/folder"] * 2 + ["uploaded  and 3 more"]
    dry = ending.after_upload([upload], dry_run=True).splitlines()
    assert dry[-1].startswith("next      `make publish` uploads these files")


def test_all_is_said_in_twenty_lines(results: Path) -> None:
    for count in (1, 10, 11, 60):
        lines = shown(results, write(results, "m", *(f"x{n}" for n in range(count))))
        assert [line.split()[0] for line in lines[-4:]] == TITLES
        assert len(lines) + 3 <= 20  # the count of jobs between two empty lines comes first
        left_out = count - sum(line.startswith("| ") for line in lines[2:])
        assert (f"and {left_out} more: see results/summary.md" in lines) == (count > 10)


def test_verdicts_on_found_types_are_not_rows_of_the_table(results: Path) -> None:
    reports = write(results, "m", *(f"x{number}" for number in range(12)))
    path = summary(results, 12)
    table = path.read_text()
    for count, rows, verdicts in ((0, 9, 0), (2, 7, 2), (3, 6, 3), (5, 6, 2)):
        path.write_text(table + "\n" + "".join(f"- f{n}: no better\n" for n in range(count)))
        lines = ending.after_build(path, reports).splitlines()
        assert len(lines) + 3 <= 20
        assert sum(line.startswith("| ") for line in lines[2:]) == rows
        assert f"and {12 - rows} more: see results/summary.md" in lines
        assert sum(line.endswith(": no better") for line in lines) == verdicts
        assert ("and 3 more verdicts: see results/summary.md" in lines) == (count == 5)


def test_the_command_serves_a_quantized_file_as_it_was_measured(results: Path) -> None:
    reports = write(results, "m", "x-BF16", bits=16.0) + write(results, "m", "x-Q4_0")
    serve = shown(results, reports)[-2].split(maxsplit=1)[1]
    program = "resources/toolchain/bin/llama-server -m results/m/x-Q4_0.gguf"
    assert serve == f"{program} --spec-type draft-mtp --spec-draft-n-max 1"
    (results / "m/measure").mkdir()
    options = {"options": ("-ngl", "999"), "by_n_max": (total(0, 9.0), total(3, 20.0))}
    measured = measurement("x-Q4_0.gguf", **options, recommended_n_max=3)
    measured.write(results / "m/measure/x-Q4_0.json")
    serve = shown(results, reports)[-2].split(maxsplit=1)[1]
    assert serve == f"{program} -ngl 999 --spec-type draft-mtp --spec-draft-n-max 3"


def test_the_command_serves_a_file_that_this_run_has_made(results: Path) -> None:
    old, new = write(results, "m", "x-Q4_K_M"), write(results, "m", "x-IQ2_M")
    os.utime(old[0], (1000, 1000))
    path, reports = summary(results, 2), [*old, *new]
    for since, name in ((0, "x-Q4_K_M"), (2000, "x-IQ2_M"), (2**40, "x-Q4_K_M")):
        serve = ending.after_build(path, reports, since).splitlines()[-2]
        assert f"results/m/{name}.gguf" in serve


def test_a_report_that_has_gone_hides_the_command_alone(results: Path) -> None:
    reports = write(results, "m", "x-Q4_0")
    reports[0].unlink()
    titles = [line.split()[0] for line in shown(results, reports)[-3:]]
    assert titles == ["files", "reports", "next"]
