"""Records of local files follow their content, not their times."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mtpforge.errors import ConfigError
from mtpforge.io import local_files
from mtpforge.io.local_files import LocalFiles
from mtpforge.rules import layout
from mtpforge.rules.code import pins
from mtpforge.rules.config import parse
from mtpforge.rules.fetch import FetchRules


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "checkpoint"
    made.mkdir()
    for name in ("model.safetensors", "config.json"):
        (made / name).write_text(name)
    return made


def test_a_record_changes_only_with_the_content(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    names = ["config.json", "model.safetensors"]
    first = local_files.record(folder, names, out)
    before = (out.stat().st_ino, out.read_bytes())
    os.utime(folder / "model.safetensors", (1, 1))
    local_files.refresh(folder, names, out)
    assert (out.stat().st_ino, out.read_bytes()) == before
    (folder / "model.safetensors").write_text("MODEL.safetensors")
    os.utime(folder / "model.safetensors", (1, 1))  # the same size and time
    local_files.refresh(folder, names, out)
    changed = LocalFiles.read(out).files
    assert changed["config.json"] == first.files["config.json"]
    assert changed["model.safetensors"].sha256 != first.files["model.safetensors"].sha256
    local_files.refresh(folder, names[:1], out)
    assert list(LocalFiles.read(out).files) == names[:1]


def test_unchanged_files_are_not_read_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "record.json"
    local_files.record(folder, ["config.json"], out)
    monkeypatch.setattr(local_files, "digest_of", lambda path: pytest.fail(f"reads {path}"))
    local_files.refresh(folder, ["config.json"], out)
    local_files.refresh(folder, ["config.json"], tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists()


def test_a_damaged_record_is_made_again(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    right = local_files.record(folder, ["config.json"], out)
    for damaged in (out, out.with_suffix(".seen")):
        damaged.write_text("{")
        local_files.refresh(folder, ["config.json"], out)
        assert LocalFiles.read(out) == right


def test_the_graph_brings_records_up_to_date(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    variants: dict[str, Any] = {"Q8_0": {}}
    rules = FetchRules(
        parse({"models": {"m": {"source": {"path": "checkpoint"}, "variants": variants}}}), None
    )
    record = layout.local_record("checkpoint")
    at: Any = SimpleNamespace(model="m", place=Path(record).stem)
    assert rules.checkpoint_inputs(at) == [record]
    assert rules.local_files(at) == ["checkpoint/config.json", "checkpoint/model.safetensors"]
    rules.refresh_local()
    assert not Path(record).exists()
    local_files.record(folder, rules.local_names(at), Path(record))
    (folder / "chat_template.jinja").write_text("b")
    rules.refresh_local()
    assert "chat_template.jinja" in LocalFiles.read(Path(record)).files
    with pytest.raises(ConfigError, match="no file or folder is other"):
        rules.local_files(SimpleNamespace(place="other"))  # type: ignore[arg-type]


def test_comments_of_requirements_decide_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "lock.txt"
    monkeypatch.setattr("mtpforge.rules.code.SCRIPTS", tmp_path / "workflow/scripts")
    found = []
    for text in ("a==1\nb==2\n", "# c\na==1  # d\n\nb==2", "a==1\nb==3\n", "a==1\nb==2#x\n"):
        lock.write_text(text)
        found.append(pins("lock.txt"))
    assert found[0] == found[1] and len({*found}) == 3
