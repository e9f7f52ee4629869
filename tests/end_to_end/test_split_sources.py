"""A BF16 file in several files, as publishers split it, is quantized and verified like one file."""

import hashlib
import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import CHECKPOINTS, Run
from mtpforge.convert import native
from mtpforge.gguf import reader

Fails = Callable[..., str]

CHECKPOINT = CHECKPOINTS / "tiny-qwen3.5"
QUANTIZE = ("--type", "Q4_K_M", "--threads", 1)
VERIFY = ("--checkpoint", CHECKPOINT, "--tokenizer-pre", "qwen35", "--type", "BF16")
VERIFY += ("--prompts", CHECKPOINT / "prompts", "--threads", 1)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "BF16.gguf"
    native.convert(CHECKPOINT, path, "all", "qwen35")
    return path


@pytest.fixture(scope="module")
def first(whole: Path, toolchain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first of three files, behind links to names that tell nothing, as in a Hub cache."""
    folder = tmp_path_factory.mktemp("split")
    (folder / "blobs").mkdir()
    (folder / "BF16").mkdir()
    command = [toolchain / "llama-gguf-split", "--split-max-size", "2M", whole, folder / "X-BF16"]
    subprocess.run(list(map(str, command)), check=True, capture_output=True)
    files = sorted(folder.glob("*.gguf"))
    assert len(files) == 3
    for file in files:
        blob = folder / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        file.rename(blob)
        (folder / "BF16" / file.name).symlink_to(blob)
    return folder / "BF16" / files[0].name


def test_it_quantizes_to_the_same_bytes(whole: Path, first: Path, run: Run, tmp_path: Path) -> None:
    outputs = {}
    for name, source in (("whole", whole), ("split", first)):
        out = tmp_path / f"{name}.gguf"
        done = run("quantize.py", source, *QUANTIZE, "--out", out)
        assert done.returncode == 0, done.stderr
        outputs[name] = out.read_bytes()
    assert outputs["split"] == outputs["whole"]
    plan = tmp_path / "plan.json"
    assert run("quantize_plan.py", first, *QUANTIZE, "--out", plan).returncode == 0
    planned = ("--plan", plan, "--threads", 1, "--out", tmp_path / "planned.gguf")
    assert run("quantize.py", first, *planned).returncode == 0
    assert (tmp_path / "planned.gguf").read_bytes() == outputs["whole"]


def test_it_is_verified_as_a_whole_and_drafts(
    whole: Path, first: Path, run: Run, tmp_path: Path
) -> None:
    out, digests = tmp_path / "report.json", tmp_path / "digests.json"
    digests.write_text(json.dumps(reader.digests(whole)))
    done = run("verify.py", first, *VERIFY, "--digests", digests, "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(out.read_text())
    assert report["file"] == "BF16" and report["acceptance"] > 0.9
    files = sorted(first.parent.iterdir())
    assert [(each["name"], each["bytes"], each["sha256"]) for each in report["files"]] == [
        (file.name, file.stat().st_size, file.resolve().name) for file in files
    ]
    assert report["bytes"] == sum(file.stat().st_size for file in files)
    assert report["sha256"] == hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()


def test_what_cannot_be_done_with_it_is_said_with_its_own_name(
    first: Path, fails: Fails, tmp_path: Path
) -> None:
    publish = ("--publish", tmp_path / "final.gguf")
    message = fails("verify.py", first, *VERIFY, *publish, out=tmp_path / "report.json")
    assert f"{first}: is split: verify it without --publish" in message
    assert not (tmp_path / "final.gguf").exists()
    second = Path(str(first).replace("-00001-", "-00002-"))
    message = fails("quantize.py", second, *QUANTIZE, out=tmp_path / "out.gguf")
    assert "is one of 3 files: give the first" in message
