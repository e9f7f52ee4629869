"""Records of local files follow their content, not their times."""

import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import CHECKPOINTS
from mtpforge import local_files, recorded_digests
from mtpforge.checkpoint import safetensors
from mtpforge.errors import ConfigError, DamagedError, ForgeError, GgufError
from mtpforge.io import atomic, ranges
from mtpforge.io.ranges import FileRange, digest_of, sha256
from mtpforge.local_files import LocalFiles
from mtpforge.publish import provenance
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


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sizes of whatever is read to be hashed."""
    sizes: list[int] = []
    blocks = ranges._blocks

    def counted(file: Any, size: int) -> Any:
        sizes.append(size)
        return blocks(file, size)

    monkeypatch.setattr(ranges, "_blocks", counted)
    return sizes


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
    folder: Path, tmp_path: Path, hashed: list[int]
) -> None:
    out = tmp_path / "record.json"
    made = local_files.record(folder, ["config.json"], out)
    hashed.clear()
    local_files.refresh(folder, ["config.json"], out)
    local_files.refresh(folder, ["config.json"], tmp_path / "none.json")
    assert not (tmp_path / "none.json").exists()
    out.unlink()  # as Snakemake does, before it runs a job again
    assert local_files.record(folder, ["config.json"], out) == made
    assert hashed == []


def test_one_pass_gives_the_digests_of_a_file_and_of_its_tensors(
    tmp_path: Path, hashed: list[int]
) -> None:
    """Provenance takes them from there, and the jobs that read the file compare them."""
    shard = CHECKPOINTS / "tiny-qwen3.5/model-00001-of-00004.safetensors"
    path = Path(shutil.copy(shard, tmp_path))
    out = tmp_path / "record.json"
    local_files.record(tmp_path, [path.name], out)
    assert sum(hashed) == path.stat().st_size
    hashed.clear()
    listed = provenance.materials({"path": "x"}, [path], out)
    assert hashed == []
    assert listed == [{"name": path.name, "digest": {"sha256": digest_of(path)}}]
    places = safetensors.ranges(path)
    parts = recorded_digests.open_recorded(out, tmp_path).parts(path, places)
    assert {part.name: part.sha256 for part in parts} == {
        name: sha256(place) for name, place in places.items()
    }


def test_parts_of_any_size_and_what_lies_between_are_hashed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(os.urandom((3 << 20) + 5))
    at = {"b": (9, 2 << 20), "a": (1, 3), "none": (9, 0), "end": ((3 << 20) + 4, 1)}
    parts = {name: FileRange(path, *place) for name, place in at.items()}
    whole, digests = ranges.hash_parts(path, parts)
    assert whole == digest_of(path)
    assert digests == {name: sha256(place) for name, place in parts.items()}


def test_other_content_at_the_old_time_is_refused(folder: Path, tmp_path: Path) -> None:
    """The list shows it, so that jobs run and say so; with another time it is another file."""
    out, path = tmp_path / "record.json", folder / "config.json"
    before, times = path.read_bytes(), path.stat()
    (name, first), *_ = local_files.record(folder, [path.name], out).files.items()
    path.write_bytes(before.upper())
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    for _ in "ab":
        local_files.refresh(folder, [path.name], out)
        assert LocalFiles.read(out).files[name] != first
        with pytest.raises(DamagedError, match="restore it, or if it is right, `touch` it"):
            recorded_digests.check_whole(path, out)
        with pytest.raises(DamagedError, match="damaged"):
            provenance.materials({"path": "x"}, [path], out)
    os.utime(path)
    local_files.refresh(folder, [path.name], out)
    recorded_digests.check_whole(path, out)
    path.write_bytes(before)
    local_files.refresh(folder, [path.name], out)
    assert LocalFiles.read(out).files[name] == first


def test_a_link_to_another_file_with_the_old_time_is_no_damage(tmp_path: Path) -> None:
    out, path = tmp_path / "record.json", tmp_path / "link.txt"
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
        os.utime(tmp_path / name, ns=(10**18, 10**18))
    path.symlink_to("one")
    local_files.record(tmp_path, [path.name], out)
    (tmp_path / "one").write_text("eno")
    os.utime(tmp_path / "one", ns=(10**18, 10**18))
    local_files.refresh(tmp_path, [path.name], out)
    with pytest.raises(DamagedError):
        recorded_digests.check_whole(path, out)
    path.unlink()
    path.symlink_to("two")
    local_files.refresh(tmp_path, [path.name], out)
    recorded_digests.check_whole(path, out)


def test_a_base_that_was_never_right_is_not_called_damaged(tmp_path: Path) -> None:
    path, out = tmp_path / "base.gguf", tmp_path / "record.json"
    path.write_bytes(b"no GGUF")
    local_files.record(tmp_path, [path.name], out)
    with pytest.raises(GgufError):
        recorded_digests.shards(path, out)
    path.write_bytes(b"NO GGUF")
    with pytest.raises(DamagedError):
        recorded_digests.shards(path, out)


def test_a_damaged_record_is_made_again(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "record.json"
    right = local_files.record(folder, ["config.json"], out)
    for damaged in (out, tmp_path / "record/config.json.json"):
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


def test_a_record_that_cannot_be_written_stops_the_graph_with_the_reason(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    models = {"m": {"source": {"path": "checkpoint"}, "variants": {"Q8_0": {}}}}
    rules = FetchRules(parse({"models": models}), None)
    out = Path(layout.local_record("checkpoint"))
    local_files.record(folder, ["config.json"], out)
    of_file = out.with_suffix("") / "config.json.json"
    os.utime(folder / "config.json", ns=(1, 1))
    with (
        atomic.replacing(of_file),
        pytest.raises(ForgeError, match=r"config\.json\.json: another process is writing it"),
    ):
        rules.refresh_local()
    of_file.unlink(missing_ok=True)
    of_file.mkdir()
    with pytest.raises(ForgeError, match=r"config\.json\.json: Is a directory"):
        rules.refresh_local()


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


def test_a_file_that_shrinks_while_it_is_read_is_read_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out, blocks = folder / "config.json", tmp_path / "record.json", ranges._blocks

    def shrinking(opened: Any, size: int) -> Any:
        yield from blocks(opened, size)
        if size:
            os.truncate(file, 2)

    monkeypatch.setattr(ranges, "_blocks", shrinking)
    monkeypatch.setattr(local_files, "_parts", lambda _: {"header": FileRange(file, 0, 4)})
    local_files.record(folder, ["config.json"], out)
    monkeypatch.undo()
    made = local_files.record(folder, ["config.json"], out)
    assert made.files["config.json"].sha256 == digest_of(file)
