"""A conversion that was killed goes on where it was, and makes the same bytes."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import CHECKPOINTS, SCRIPTS
from mtpforge import local_files
from mtpforge.checkpoint import safetensors
from mtpforge.io import journal, leftovers

CONVERT = """
import os, signal, sys, time
from contextlib import contextmanager
from mtpforge import cli, progress
from mtpforge.io import journal
from mtpforge.io.ranges import Sink
import convert

journal.STEP = int(os.environ["STEP"])
point, number = int(sys.argv.pop(1)), int(sys.argv.pop(1))
done = {}
appended = 0
append = Sink.append

def counted(sink, payload):
    global appended
    size = append(sink, payload)
    appended += size
    return size

@contextmanager
def bar(label):
    def show(size, total):
        done[label] = size
        if sum(done.values()) >= point:
            os.kill(os.getpid(), number)
            time.sleep(9)
    yield show

progress.bar = bar
Sink.append = counted
cli.run(convert.main)
print("appended", appended)
"""
SPLITS = ("", "2M")
NEVER = 1 << 40
SIZE = 5_500_000
CODE = "0" * 64


class Conversion:
    """A conversion of a copy of the dense checkpoint."""

    def __init__(self, folder: Path, split: str = "") -> None:
        self.checkpoint = folder / "checkpoint"
        shutil.copytree(CHECKPOINTS / "tiny-qwen3.5", self.checkpoint)
        self.record = folder / "record.json"
        names = [path.name for path in self.checkpoint.iterdir() if path.is_file()]
        local_files.record(self.checkpoint, names, self.record)
        self.results = folder / "results"
        self.out = self.results / ("all" if split else "all.gguf")
        self.digests = folder / "digests.json"
        self.options = ["--split", split] if split else []
        self.code = CODE
        self.step = 200_000

    def run(
        self, point: int = NEVER, number: int = signal.SIGKILL
    ) -> "subprocess.CompletedProcess[str]":
        """Run it, and send it a signal once it has written `point` bytes of tensors."""
        arguments: list[object] = [
            self.checkpoint, "--tokenizer-pre", "qwen35", *self.options, "--resume", self.code,
            "--recorded", self.record,
            "--out", self.out, "--digests", self.digests,
        ]  # fmt: skip
        return subprocess.run(
            [sys.executable, "-c", CONVERT, *map(str, (point, int(number), *arguments))],
            env={**os.environ, "PYTHONPATH": str(SCRIPTS), "STEP": str(self.step)},
            capture_output=True,
            text=True,
            timeout=100,
        )

    def finish(self) -> int:
        """Run it to its end; the bytes that it wrote."""
        done = self.run()
        assert done.returncode == 0, done.stderr
        assert list(self.results.iterdir()) == [self.out]
        return int(done.stdout.split("appended ")[1])

    def content(self) -> dict[str, bytes]:
        files = sorted(self.out.iterdir()) if self.out.is_dir() else [self.out]
        return {path.name: path.read_bytes() for path in [*files, self.digests]}

    @property
    def temporary(self) -> Path:
        return self.results / f".{self.out.name}.part"


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, bytes]]:
    """What undisturbed conversions make."""
    found = {}
    for split in SPLITS:
        made = Conversion(tmp_path_factory.mktemp("right"), split)
        assert made.finish() >= SIZE
        found[split] = made.content()
    return found


@pytest.fixture
def whole(tmp_path: Path) -> Conversion:
    return Conversion(tmp_path)


def killed(made: Conversion, point: int = 4_000_000) -> Path:
    """The journal that a kill leaves."""
    assert made.run(point).returncode == -signal.SIGKILL
    return journal.beside(made.temporary)


@pytest.mark.parametrize("split", SPLITS)
def test_it_goes_on_after_each_kill(
    tmp_path: Path, right: dict[str, dict[str, bytes]], split: str
) -> None:
    made = Conversion(tmp_path, split)
    points = sorted(random.Random(20).sample(range(100_000, SIZE), 4))
    for point in points:
        assert made.run(point).returncode == -signal.SIGKILL
        assert not made.out.exists() and not made.digests.exists()
    kept = len(journal.beside(made.temporary).read_text().splitlines())
    assert kept > 20
    assert made.finish() < SIZE - points[-1] + 1_000_000  # a step, and the largest tensor
    assert made.content() == right[split]


def test_it_goes_on_if_each_shard_is_smaller_than_a_step(tmp_path: Path) -> None:
    made = Conversion(tmp_path, "1M")
    made.step = 1_500_000
    assert made.run(4_500_000).returncode == -signal.SIGKILL
    assert made.finish() < 3_500_000


@pytest.mark.usefixtures("terminal_signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_goes_on_after_a_signal(
    whole: Conversion, right: dict[str, dict[str, bytes]], number: int
) -> None:
    assert whole.run(4_000_000, number).returncode == 128 + number
    assert whole.finish() < 2_500_000
    assert whole.content() == right[""]


def test_damaged_bytes_are_written_again(
    whole: Conversion, right: dict[str, dict[str, bytes]]
) -> None:
    killed(whole)
    data = bytearray(whole.temporary.read_bytes())
    for place in range(0, 2_000_000, 1000):
        data[place] ^= 1
    whole.temporary.write_bytes(data)
    assert whole.finish() > 3_000_000
    assert whole.content() == right[""]


GARBLED = {
    "torn": lambda text: text[:-40],
    "no origin": lambda text: "\n".join(text.splitlines()[1:]) + "\n",
    "not JSON": lambda text: "}" * 1000 + "\n" + text,
    "another digest": lambda text: text[:-5] + '00"]\n',
}


@pytest.mark.parametrize("name", GARBLED)
def test_a_garbled_journal_costs_time_alone(
    whole: Conversion, right: dict[str, dict[str, bytes]], name: str
) -> None:
    path = killed(whole)
    path.write_text(GARBLED[name](path.read_text()))
    assert whole.finish() > 1_000_000
    assert whole.content() == right[""]


HOSTILE = (
    "[" * 100_000,
    f'{{"code": "{CODE}", "inputs": {{"\\u0000": []}}}}',
    "[]",
    '{"code": []}',
)


@pytest.mark.parametrize("line", HOSTILE)
def test_a_hostile_journal_is_not_gone_on_with(tmp_path: Path, line: str) -> None:
    temporary = tmp_path / ".x.gguf.part"
    temporary.touch()
    journal.beside(temporary).write_text(line + "\n")
    assert not journal.can_go_on(temporary, {CODE})


def touch(made: Conversion) -> None:
    shard = min(made.checkpoint.glob("*.safetensors"))
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))


@pytest.mark.parametrize("split", SPLITS)
def test_a_second_name_of_a_file_is_not_written_to(
    tmp_path: Path, right: dict[str, dict[str, bytes]], split: str
) -> None:
    """Publishing that was killed leaves a link to its source under the temporary name."""
    made = Conversion(tmp_path, split)
    killed(made)
    left = max(made.temporary.iterdir()) if split else made.temporary
    source = tmp_path / "source.gguf"
    shutil.copy(left, source)
    with source.open("r+b") as file:
        file.write(b"mine")
    before = source.read_bytes()
    left.unlink()
    left.hardlink_to(source)
    made.finish()
    assert made.content() == right[split]
    assert source.read_bytes() == before


def edit(made: Conversion) -> None:
    made.code = "1" * 64


def rename(made: Conversion) -> None:
    made.options = ["--name", "Other-1B"]


CHANGES = {"a shard's time": touch, "the program": edit, "an option": rename}


@pytest.mark.parametrize("change", CHANGES)
def test_after_a_change_it_starts_anew(whole: Conversion, tmp_path: Path, change: str) -> None:
    killed(whole)
    CHANGES[change](whole)
    assert whole.finish() >= SIZE
    fresh = Conversion(tmp_path / "fresh")
    CHANGES[change](fresh)
    fresh.finish()
    assert whole.content() == fresh.content()


def damage(made: Conversion) -> str:
    """Flip a bit of a tensor, and leave its shard's time alone; the tensor's name."""
    shard = min(made.checkpoint.glob("*.safetensors"))
    times, data = shard.stat(), bytearray(shard.read_bytes())
    name = next(
        name for name in safetensors.ranges(shard) if name.endswith("layers.0.mlp.up_proj.weight")
    )
    data[safetensors.ranges(shard)[name].offset] ^= 1
    shard.write_bytes(data)
    os.utime(shard, ns=(times.st_atime_ns, times.st_mtime_ns))
    return name


def test_a_damaged_source_is_found_before_it_is_in_the_journal(whole: Conversion) -> None:
    name = damage(whole)
    done = whole.run(5_300_000)
    assert done.returncode == 1 and f"damaged: {name} " in done.stderr
    assert list(whole.results.iterdir()) == []


def test_a_source_that_changed_without_its_time_is_read_again(whole: Conversion) -> None:
    killed(whole)
    name = damage(whole)
    done = whole.run()
    assert done.returncode == 1 and f"damaged: {name} " in done.stderr
    assert list(whole.results.iterdir()) == []


def test_a_new_run_keeps_only_what_it_can_go_on_with(whole: Conversion) -> None:
    left = {killed(whole), whole.temporary}
    assert leftovers.remove(whole.results, codes=[CODE]) == []
    assert set(leftovers.find(whole.results)) == left  # `make clean-work` lists them
    shutil.copytree(whole.results, whole.results.with_name("copy"))
    for codes in ([], ["1" * 64]):
        shutil.copytree(whole.results.with_name("copy"), whole.results, dirs_exist_ok=True)
        assert set(leftovers.remove(whole.results, codes=codes)) == left
    shutil.copytree(whole.results.with_name("copy"), whole.results, dirs_exist_ok=True)
    touch(whole)
    assert set(leftovers.remove(whole.results, codes=[CODE])) == left
    assert list(whole.results.iterdir()) == []


def test_the_journal_of_a_living_job_stays(whole: Conversion) -> None:
    arguments = [sys.executable, "-c", CONVERT.replace("time.sleep(9)", "time.sleep(60)")]
    options = ["4000000", "0", str(whole.checkpoint), "--tokenizer-pre", "qwen35"]
    options += ["--resume", CODE, "--out", str(whole.out)]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPTS), "STEP": str(whole.step)}
    job = subprocess.Popen([*arguments, *options], env=environment)
    try:
        path = journal.beside(whole.temporary)
        while not path.exists():
            assert job.poll() is None
            time.sleep(0.05)
        assert leftovers.remove(whole.results) == [] and path.exists()
    finally:
        job.kill()
        job.wait()
    assert set(leftovers.remove(whole.results)) == {path, whole.temporary}
