"""Shards are freed as they are converted, and verification finds in them what it compares."""

import errno
import fcntl
import json
import os
import random
import shutil
import sys
from contextlib import suppress
from pathlib import Path

import convert
import pytest
from conftest import CHECKPOINTS
from huggingface_hub import constants
from kill_points import Faults, Killed
from layouts import write_layout
from mtpforge.checkpoint import safetensors
from mtpforge.checkpoint.checkpoint import Checkpoint
from mtpforge.convert import freeing
from mtpforge.errors import (
    CheckpointError,
    DamagedError,
    DownloadError,
    RecordError,
    StorageError,
)
from mtpforge.gguf import reader, split
from mtpforge.gguf.file_names import first_file
from mtpforge.hub import download, retry
from mtpforge.hub.fetch_records import FetchRecord
from mtpforge.hub.listing import File, Listing
from mtpforge.io import holes, storage
from mtpforge.io.ranges import digest_of
from mtpforge.verify import sample, tensors
from mtpforge.verify.request import Request
from mtpforge.verify.source import open_source

LAYOUTS = ("dense", "moe", "moe-fp8-experts")
SMALL = 1 << 12
"""Weights; larger tensors are compared by sample here."""
KILLS = int(os.environ.get("MTPFORGE_KILLS", "4"))
"""Points at which a conversion is killed; 0: all."""


class Fetched:
    """A fetched checkpoint, and conversions of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checkpoint, self.recorded = folder / "Name", folder / "records"
        self.results = folder / "results"
        self.out = self.results / "all.gguf"
        self.options = ["--free"]

    def fetch(self, source: Path) -> None:
        """What `resolve` and `fetch` leave of a repository."""
        shutil.copytree(source, self.checkpoint, ignore=shutil.ignore_patterns("prompts"))
        files: dict[str, File] = {}
        for path in filter(Path.is_file, self.checkpoint.iterdir()):
            files[path.name] = File(path.stat().st_size, digest_of(path))
            is_shard = path.suffix == ".safetensors"
            digests = reader.hashes(safetensors.ranges(path)) if is_shard else {}
            record = FetchRecord(path.name, *vars(files[path.name]).values(), digests=digests)
            record.write(self.recorded / f"{path.name}.json")
        found = Checkpoint(self.checkpoint).tensors
        Listing("Owner/Name", "0" * 40, files=files, tensors=found).write(self.listing)

    def convert(self) -> None:
        """Convert, as the rule does."""
        arguments: list[object] = [
            self.checkpoint, "--tokenizer-pre", "qwen35", "--resume", "0" * 64,
            "--recorded", self.recorded, "--out", self.out,
            "--digests", self.results / "all.json", *self.options,
        ]  # fmt: skip
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr(sys, "argv", ["convert.py", *map(str, arguments)])
            convert.main()

    @property
    def listing(self) -> Path:
        return self.folder / "files.json"

    def content(self) -> dict[str, bytes]:
        return {
            str(path.relative_to(self.results)): path.read_bytes()
            for path in self.results.rglob("*")
            if path.is_file()
        }

    def taken(self) -> int:
        """Bytes of the shards on the disk."""
        return sum(512 * path.stat().st_blocks for path in self.shards)

    @property
    def shards(self) -> list[Path]:
        return sorted(self.checkpoint.glob("*.safetensors"))

    @property
    def size(self) -> int:
        return sum(path.stat().st_size for path in self.shards)

    def compare(self, file: Path | None = None) -> tensors.Comparisons:
        """What verification compares with the checkpoint. Raises DamagedError."""
        request = Request(
            checkpoint=self.checkpoint, recorded=self.recorded, tokenizer_pre="qwen35"
        )
        source = open_source(request)
        assert source is not None
        opened = split.read(first_file(file or self.out))
        head = set(opened.head.tensors)
        found = tensors.compare_tensors(opened, source.rows(), whole=head, exact=opened.tensors)
        source.check([])
        return found


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "LARGE", SMALL)
    monkeypatch.setattr(freeing, "_SMALL", SMALL)


@pytest.fixture(autouse=True)
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache of the Hub, which cannot be reached."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(retry, "TRIES", 1)
    return tmp_path / "cache"


@pytest.fixture(scope="module", params=LAYOUTS)
def original(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Fetched:
    """A checkpoint that was fetched and converted, and is whole."""
    folder = tmp_path_factory.mktemp(request.param)
    plain = {"dense": "tiny-qwen3.5", "moe": "tiny-qwen3.5-moe"}.get(request.param)
    source = CHECKPOINTS / plain if plain else write_layout(request.param, folder)
    made = Fetched(folder / "fetched")
    made.fetch(source)
    made.options = []
    made.convert()
    return made


@pytest.fixture
def fetched(original: Fetched, tmp_path: Path) -> Fetched:
    """A copy that is not converted."""
    shutil.copytree(original.folder, tmp_path / "copy", ignore=shutil.ignore_patterns("results"))
    return Fetched(tmp_path / "copy")


@pytest.fixture
def freed(fetched: Fetched) -> Fetched:
    """The same, converted."""
    fetched.convert()
    return fetched


def fill(whole: Fetched) -> None:
    """Put the shards into the Hub's cache."""
    listing = Listing.read(whole.listing)
    for shard in whole.shards:
        blob = download.cached(listing, shard.name)
        blob.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(shard, blob)


dense = pytest.mark.parametrize("original", ["dense"], indirect=True)


def test_verification_finds_in_freed_shards_what_it_compares(
    original: Fetched, freed: Fetched
) -> None:
    assert freed.content() == original.content()
    assert freed.taken() < 0.45 * freed.size  # blocks and samples are large here
    assert original.compare() == freed.compare() and not freed.compare().problems


@dense
@pytest.mark.parametrize("split_size", ["", "2M"])
def test_it_goes_on_after_each_kill_without_a_download(
    original: Fetched,
    fetched: Fetched,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
    split_size: str,
) -> None:
    faults = Faults(monkeypatch)

    def copy(name: str) -> Fetched:
        made = Fetched(Path(shutil.copytree(fetched.folder, fetched.folder.with_name(name))))
        if split_size:
            made.out = made.results / "all"
            made.options = ["--split", split_size, "--free"]
        return made

    right = copy("right")
    right.convert()
    points = range(1, faults.passed + 1)
    for point in random.Random(20).sample(points, KILLS) if KILLS else points:
        killed = copy(f"{point}")
        for at in (point, point // 2):  # the second may come too late
            faults.left = at
            with suppress(Killed):
                killed.convert()
            if late := killed.out.exists():  # so Snakemake would delete it, and nothing is left
                fill(original)
                break
        faults.left = 0
        killed.convert()
        assert killed.content() == right.content()
        assert late or killed.taken() < 0.45 * killed.size
        shutil.rmtree(cache, ignore_errors=True)
        shutil.rmtree(killed.folder)


@dense
def test_it_goes_on_after_a_full_disk_without_a_download(
    original: Fetched, fetched: Fetched, monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = Faults(monkeypatch)
    faults.error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for point in (3, 40, 1):
        faults.left = point
        with pytest.raises(OSError, match=r"disk is full|No space"):
            fetched.convert()
    faults.left = 0
    fetched.convert()
    assert fetched.content() == original.content()


@dense
def test_what_is_needed_again_is_downloaded_again(original: Fetched, freed: Fetched) -> None:
    """For instance, because the converter has changed; with or without freeing."""
    shutil.rmtree(freed.results)
    with pytest.raises(DownloadError):
        freed.convert()
    fill(original)
    freed.convert()
    assert freed.content() == original.content()
    assert freed.taken() >= freed.size  # they are in the cache too, so they stay
    assert freed.compare() == original.compare()
    assert not list((freed.folder / "freed").iterdir())


@dense
def test_what_another_conversion_needs_stays(fetched: Fetched) -> None:
    fetched.options = ["--free", "draft"]
    fetched.convert()
    assert fetched.taken() < 0.8 * fetched.size
    fetched.out = fetched.results / "draft.gguf"
    fetched.options = ["--part", "draft"]
    fetched.convert()


@dense
def test_without_file_locks_all_of_it_must_fit(
    original: Fetched,
    fetched: Fetched,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """There is no journal then, so nothing is freed before the end, and a message says so."""

    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    room = int(0.9 * original.out.stat().st_size)
    with monkeypatch.context() as full:
        full.setattr(storage, "file_system", lambda _: "ext4")
        full.setattr(storage, "room", lambda _: room)
        with pytest.raises(StorageError, match="not enough space"):
            fetched.convert()
    fetched.convert()
    assert "nothing is freed before the end" in capsys.readouterr().err
    assert fetched.content() == original.content()
    assert fetched.taken() < 0.45 * fetched.size


def largest(made: Fetched) -> safetensors.CheckpointTensor:
    every = Checkpoint(made.checkpoint, recorded=made.recorded).tensors.values()
    return max((each for each in every if "layers.0.mlp" in each.name), key=lambda t: t.size)


@dense
def test_damage_in_what_is_left_is_found(freed: Fetched) -> None:
    tensor = largest(freed)
    record = json.loads((freed.folder / "freed" / f"{tensor.shard}.json").read_text())
    offset, size = record["tensors"][tensor.name]["ranges"][-1]
    with (freed.checkpoint / tensor.shard).open("r+b") as file:
        file.seek(offset + size - 1)
        byte = file.read(1)[0]
        file.seek(offset + size - 1)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(DamagedError, match="damaged: "):
        freed.compare()


@dense
def test_freed_weights_are_never_taken_for_zeros(freed: Fetched) -> None:
    checkpoint = Checkpoint(freed.checkpoint, recorded=freed.recorded)
    with pytest.raises(CheckpointError, match="were freed once they were converted"):
        checkpoint.array(largest(freed))
    with pytest.raises(CheckpointError, match="were freed once they were converted"):
        checkpoint.digest(largest(freed))
    with pytest.MonkeyPatch.context() as other:
        other.setattr(sample, "SAMPLE", 3)  # as if another version compared other rows
        with pytest.raises(CheckpointError, match="were freed once they were converted"):
            freed.compare()


@dense
def test_a_garbled_record_is_refused(freed: Fetched) -> None:
    for path in (freed.folder / "freed").iterdir():
        path.write_text('{"tensors": {"x": {"ranges": [[1]], "sha256": ""}}}')
    with pytest.raises(RecordError, match="malformed record of a freed shard"):
        Checkpoint(freed.checkpoint, recorded=freed.recorded)


@dense
def test_a_shard_with_another_name_belongs_to_the_user(fetched: Fetched, tmp_path: Path) -> None:
    mine = tmp_path / "mine.safetensors"
    mine.hardlink_to(fetched.shards[0])
    before = mine.read_bytes()
    fetched.convert()
    assert mine.read_bytes() == before and 512 * mine.stat().st_blocks >= len(before)


def test_other_blocks_of_a_file_stay(tmp_path: Path) -> None:
    path = tmp_path / "file"
    content = bytes(range(1, 256)) * 300
    path.write_bytes(content)
    holes.punch(path, [(100, 30_000), (40_000, 10), (60_000, 16_500)])
    left = bytearray(content)
    left[4096:28672] = bytes(24576)
    left[61440:73728] = bytes(12288)
    assert path.read_bytes() == left


def test_a_file_system_that_frees_no_ranges(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert holes.are_supported(tmp_path)

    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "not supported")

    monkeypatch.setattr(holes, "_punch", refuse)
    assert not holes.are_supported(tmp_path)
