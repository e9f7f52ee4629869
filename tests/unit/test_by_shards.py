"""Built shard by shard, quants have the same bytes, whatever interrupts the build."""

import errno
import fcntl
import json
import os
import random
import shutil
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any

import acceptance
import convert
import convert_and_quantize
import fetch
import pytest
import quantize
import quantize_plan
from conftest import CHECKPOINTS
from hub import COMMIT, Hub, serve
from huggingface_hub import close_session, constants
from kill_points import Faults, Killed
from mtpforge import recorded_digests
from mtpforge.checkpoint.checkpoint import Checkpoint
from mtpforge.convert import freeing, native
from mtpforge.errors import CheckpointError, DamagedError, DownloadError
from mtpforge.gguf import reader, writer
from mtpforge.hub import download, freed, resolve, retry, sparse
from mtpforge.io.journal import Journal
from mtpforge.io.ranges import sha256
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.quantize import as_converted, plan
from mtpforge.quantize.as_converted import Wanted
from mtpforge.quantize.job import QuantizeJob
from mtpforge.quantize.manifest import Manifest
from mtpforge.quantize.request import QuantizeRequest
from mtpforge.verify import sample, tensors
from mtpforge.verify.report import Acceptance
from mtpforge.verify.request import Request
from mtpforge.verify.source import open_source

MODEL = "tiny-qwen3.5"
REPO = f"Owner/{MODEL}"
VARIANTS: dict[str, dict[str, Any]] = {
    "Q8_0": {"type": "Q8_0", "head": "Q8_0"},
    "mix": {"type": "Q4_0", "head": "Q6_K", "tensors": {"attn_": "Q5_0"}},
}
SMALL = 1 << 12
"""Bytes; larger tensors are freed here."""
KILLS = int(os.environ.get("MTPFORGE_KILLS", "3"))
"""Points at which a conversion is killed; 0: all."""
KILLED = ((Manifest, "write"), (download, "download"), (writer, "put"))
"""Further calls at which one is killed."""


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "LARGE", SMALL)
    monkeypatch.setattr(freeing, "_SMALL", SMALL)
    monkeypatch.setattr(freed, "SMALL", SMALL)
    monkeypatch.setattr(plan, "SAMPLE", SMALL)
    monkeypatch.setattr(as_converted, "SAMPLE", SMALL)


def call(program: Any, *arguments: object) -> None:
    """Run a program in this process."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(sys, "argv", [program.__name__, *map(str, arguments)])
        program.main()


def taken(*paths: Path) -> int:
    """Bytes of files on the disk."""
    return sum(512 * path.stat().st_blocks for path in paths)


class Build:
    """The jobs of a build in a folder, as the rules run them."""

    def __init__(self, folder: Path, programs: Path) -> None:
        self.folder, self.programs = folder, programs
        self.commit, self.work = folder / "commit", folder / "results/work"
        self.checkpoint, self.recorded = self.commit / MODEL, self.commit / "records"
        self.bf16, self.digests = self.work / "all.gguf", self.work / "all.json"

    def fetch(self, *options: str) -> None:
        listing = resolve.list_commit(REPO, COMMIT)
        listing.write(self.commit / "files.json")
        for name in listing.checkpoint_files():
            out = self.recorded / f"{name}.json"
            folder = ("--folder", self.checkpoint)
            call(fetch, self.commit / "files.json", name, *folder, "--out", out, *options)

    def convert(self, program: Any, *options: object) -> None:
        call(
            program, self.checkpoint, "--tokenizer-pre", "qwen35", "--recorded", self.recorded,
            "--resume", "0" * 64, "--out", self.bf16, "--digests", self.digests, *options,
        )  # fmt: skip

    def convert_by_shards(self) -> None:
        wanted = [
            json.dumps({**VARIANTS[name], "folder": str(self.piece(name))}) for name in VARIANTS
        ]
        programs = ("--threads", 1, "--bin", self.programs, "--reuse", self.folder / "results")
        self.convert(convert_and_quantize, *programs, "--free", "--quantize", *wanted)

    def piece(self, name: str) -> Path:
        return self.work / "manifests/pieces/quantized" / name

    def quantize(self, name: str) -> Path:
        """A variant's file, from its plan."""
        wanted = VARIANTS[name]
        recipe, planned = self.work / f"{name}.yaml", self.work / f"{name}-plan.json"
        recipe.write_text(json.dumps(wanted.get("tensors", {})))
        usual = (self.bf16, "--bin", self.programs, "--threads", 1)
        types = ("--type", wanted["type"], "--head", wanted["head"], "--tensors", recipe)
        call(quantize_plan, *usual, *types, "--digests", self.digests, "--out", planned)
        out = self.work / f"{name}.gguf"
        reused = ("--plan", planned, "--reuse", self.folder / "results", "--out", out)
        manifest = self.work / f"manifests/quantized/{name}.json"
        digests = out.with_suffix(".json")
        call(quantize, *usual, *reused, "--digests", digests, "--manifest", manifest)
        return out

    def content(self) -> dict[str, bytes]:
        """All files that the variants are, and all digests of BF16."""
        made = {name: self.quantize(name).read_bytes() for name in VARIANTS}
        digests = json.loads(self.digests.read_text())
        digests.pop("freed", None)
        return {**made, "digests": json.dumps(digests).encode()}

    @property
    def shards(self) -> list[Path]:
        return sorted(self.checkpoint.glob("*.safetensors"))


@pytest.fixture(scope="module")
def right(tmp_path_factory: pytest.TempPathFactory, toolchain: Path) -> dict[str, bytes]:
    """What an ordinary build makes."""
    usual = Build(tmp_path_factory.mktemp("usual"), toolchain)
    with serving(usual.folder):
        usual.fetch()
    usual.convert(convert)
    return usual.content()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A Hub with the checkpoint, and an empty cache of it."""
    with serving(tmp_path) as found:
        yield found


@contextmanager
def serving(folder: Path) -> Iterator[Hub]:
    with serve({REPO: CHECKPOINTS / MODEL}) as found, pytest.MonkeyPatch.context() as patched:
        patched.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        patched.setattr(retry, "TRIES", 1)
        patched.setattr(constants, "ENDPOINT", found.endpoint)
        template = f"{found.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        patched.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        close_session()
        yield found
        close_session()


@pytest.fixture
def fetched(hub: Hub, tmp_path: Path, toolchain: Path) -> Build:
    """A checkpoint of sparse shards."""
    found = Build(tmp_path / "by-shards", toolchain)
    found.fetch("--sparse")
    return found


def test_shards_come_one_by_one_and_bf16_is_never_whole(
    fetched: Build, right: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = sum(path.stat().st_size for path in fetched.shards)
    assert taken(*fetched.shards) < 0.1 * whole
    bf16: list[int] = []
    held: list[int] = []
    real = Journal.tell

    def tell(journal: Journal, names: Collection[str]) -> None:
        bf16.append(taken(journal.temporary))
        held.append(taken(*fetched.shards))
        real(journal, names)

    monkeypatch.setattr(Journal, "tell", tell)
    fetched.convert_by_shards()
    assert fetched.content() == right
    assert len(bf16) >= 10 and max(bf16) < 0.35 * fetched.bf16.stat().st_size
    assert max(held) < 0.85 * whole  # two of four shards are nearly all of it
    assert taken(*fetched.shards) < 0.5 * whole  # a tenth is the head, and blocks are large here
    proven = {path.stem for path in (fetched.commit / "digests").iterdir()}
    assert proven == {path.name for path in fetched.shards}


def test_verification_finds_what_it_compares(fetched: Build) -> None:
    fetched.convert_by_shards()
    request = Request(
        checkpoint=fetched.checkpoint, recorded=fetched.recorded, tokenizer_pre="qwen35"
    )
    source = open_source(request)
    assert source is not None
    opened = reader.read(fetched.quantize("Q8_0"))
    found = tensors.compare_tensors(opened, source.rows(), whole=set(opened.head.tensors), exact=())
    source.check([])
    assert not found.problems and len(found.errors) == len(opened.tensors)


def test_a_finished_piece_becomes_the_file_without_a_copy(fetched: Build) -> None:
    fetched.convert_by_shards()
    made = fetched.piece("Q8_0") / "whole.gguf"
    file = fetched.quantize("Q8_0")
    assert file.samefile(made)
    before = file.read_bytes()
    fetched.bf16.unlink()  # a conversion that starts again does not write into the file
    (fetched.work / "manifests/quantized/Q8_0.json").unlink()
    fetched.convert_by_shards()
    assert file.read_bytes() == before == made.read_bytes() and not file.samefile(made)


def test_a_variant_is_its_own_piece_beside_pieces_with_the_same_tensors(fetched: Build) -> None:
    fetched.convert_by_shards()
    assert all(
        fetched.quantize(name).samefile(fetched.piece(name) / "whole.gguf") for name in VARIANTS
    )


def test_another_variant_later_makes_only_that(
    fetched: Build, right: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.delitem(VARIANTS, "mix")
        fetched.convert_by_shards()
        fetched.quantize("Q8_0")
    shutil.rmtree(fetched.piece("Q8_0"))  # as the rule does
    with pytest.raises(DamagedError, match="`lean: shards`"):
        fetched.quantize("mix")
    fetched.bf16.unlink()
    fetched.convert_by_shards()
    assert [path.parent.name for path in fetched.folder.rglob("whole.gguf")] == ["mix"]
    assert fetched.content() == right


def test_it_goes_on_after_each_kill(
    fetched: Build, right: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    faults = Faults(monkeypatch, KILLED)
    copies = (Build(fetched.folder.with_name(f"{n}"), fetched.programs) for n in count())

    def copied() -> Build:
        made = next(copies)
        shutil.copytree(fetched.folder, made.folder)
        return made

    copied().convert_by_shards()
    points = range(1, faults.passed + 1)
    for point in random.Random(20).sample(points, KILLS) if KILLS else points:
        killed = copied()
        for at in (point, point // 2):  # the second may come too late
            faults.left = at
            with suppress(Killed):
                killed.convert_by_shards()
            if killed.bf16.exists():  # so Snakemake would delete it
                killed.bf16.unlink()
                break
        faults.left = 0
        killed.convert_by_shards()
        assert killed.content() == right, point
        shutil.rmtree(killed.folder)


def test_what_a_kill_leaves_is_not_made_again(
    fetched: Build, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    real = QuantizeJob.quantize_tensors

    def quantize_tensors(job: QuantizeJob, names: Collection[str], *places: Path) -> reader.Gguf:
        made.extend(names)
        if "blk.4.attn_q.weight" in names and first:
            raise Killed
        return real(job, names, *places)

    monkeypatch.setattr(QuantizeJob, "quantize_tensors", quantize_tensors)
    first = True
    with pytest.raises(Killed):
        fetched.convert_by_shards()
    last = fetched.shards[-1]  # and its download may have broken off
    last.with_name(f".{last.name}.part").write_bytes(last.read_bytes()[:100])
    sent, done, first = hub.sent.copy(), len(made), False
    fetched.convert_by_shards()
    all_of_it = len(VARIANTS) * len(reader.read(fetched.bf16).tensors)
    assert done > 0.5 * all_of_it and len(made) < 1.3 * all_of_it
    name = fetched.shards[0].name
    assert hub.sent[name] == sent[name]  # it was converted before the kill


def test_a_damaged_piece_is_made_again(fetched: Build, right: dict[str, bytes]) -> None:
    fetched.convert_by_shards()
    piece = fetched.piece("Q8_0") / "whole.gguf"
    place = reader.read(piece).ranges["blk.0.ffn_up.weight"]
    with piece.open("r+b") as file:
        file.seek(place.offset)
        file.write(bytes(100))
    with pytest.raises(DamagedError, match="`lean: shards`"):
        fetched.quantize("Q8_0")
    fetched.bf16.unlink()
    fetched.convert_by_shards()
    assert fetched.content() == right


def test_pieces_outlive_the_bf16_file(
    fetched: Build, right: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A damaged or deleted one is made again, but not what was quantized of it."""
    fetched.convert_by_shards()
    fetched.bf16.unlink()
    made: list[str] = []
    real = QuantizeJob.quantize_tensors

    def quantize_tensors(job: QuantizeJob, names: Collection[str], *places: Path) -> reader.Gguf:
        made.extend(names)
        return real(job, names, *places)

    monkeypatch.setattr(QuantizeJob, "quantize_tensors", quantize_tensors)
    faults = Faults(monkeypatch)
    faults.left = 20
    with pytest.raises(Killed):
        fetched.convert_by_shards()
    faults.left = 0
    fetched.convert_by_shards()
    assert made == []
    assert fetched.content() == right


def test_a_tensor_that_is_converted_to_other_bytes_is_made_again(
    tmp_path: Path, toolchain: Path
) -> None:
    native.convert(CHECKPOINTS / MODEL, tmp_path / "bf16.gguf", "all", "qwen35")
    source, name = reader.read(tmp_path / "bf16.gguf"), "blk.0.ffn_up.weight"
    wanted = Wanted(tmp_path / "manifests", QuantizeRequest("Q8_0"))
    piece = as_converted._Piece(wanted, source, LlamaCpp(toolchain, threads=1))
    made = []
    for content in (None, bytes(source.tensors[name].size)):
        if content:
            with source.path.open("r+b") as file:
                file.seek(source.ranges[name].offset)
                file.write(content)
        piece.add({name: sha256(source.ranges[name])})
        (entry,) = Manifest.read(piece.path.with_suffix(".json")).tensors
        assert entry.sha256 == sha256(reader.read(piece.path).ranges[name])
        made.append(entry)
    assert made[0].key != made[1].key and made[0].sha256 != made[1].sha256


def test_digests_say_whether_bf16_can_be_run(fetched: Build) -> None:
    """They change when it is made again by another profile, and then its acceptance is measured."""
    fetched.convert_by_shards()
    out, before = fetched.work / "acceptance.json", fetched.digests.read_bytes()
    call(acceptance, fetched.bf16, "--recorded", fetched.digests, "--out", out)
    assert "freed while it was quantized" in str(Acceptance.read(out).skipped)
    fetched.bf16.unlink()
    fetched.convert(convert, "--free")
    assert fetched.digests.read_bytes() != before
    assert not recorded_digests.is_freed(fetched.digests)


def test_without_file_locks_bf16_stays(
    fetched: Build, right: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    fetched.convert_by_shards()
    assert not recorded_digests.is_freed(fetched.digests)
    assert fetched.content() == right


def test_another_mixture_needs_another_conversion(fetched: Build) -> None:
    fetched.convert_by_shards()
    shutil.rmtree(fetched.piece("Q8_0"))
    with pytest.raises(DamagedError, match="`lean: shards`"):
        fetched.quantize("Q8_0")


def test_a_shard_that_differs_from_its_ranges_is_refused(fetched: Build) -> None:
    path = fetched.recorded / f"{fetched.shards[0].name}.json"
    record = json.loads(path.read_text())
    record["digests"][next(iter(record["digests"]))] = "0" * 64
    path.write_text(json.dumps(record))
    with pytest.raises(DamagedError):
        fetched.convert_by_shards()  # its header is hashed first
    record["digests"] = {"model.language_model.norm.weight": "0" * 64}
    path.write_text(json.dumps(record))
    with pytest.raises((DownloadError, DamagedError)):
        fetched.convert_by_shards()


def test_weights_that_were_never_downloaded_are_not_taken_for_zeros(fetched: Build) -> None:
    checkpoint = Checkpoint(fetched.checkpoint, recorded=fetched.recorded)
    large = max(checkpoint.tensors.values(), key=lambda tensor: tensor.size)
    with pytest.raises(CheckpointError, match="needed again"):
        checkpoint.array(large)
    small = min(checkpoint.tensors.values(), key=lambda tensor: tensor.size)
    checkpoint.array(small)  # to plan
    with pytest.raises(CheckpointError, match="needed again"):
        checkpoint.require([small], to_convert=True)


def test_a_damaged_shard_that_was_freed_is_downloaded_whole(fetched: Build) -> None:
    """Its conversion does not run again, and verification needs what is left of it."""
    fetched.convert_by_shards()
    shard = fetched.shards[0]
    shard.unlink()  # as the error says
    (fetched.recorded / f"{shard.name}.json").unlink()
    fetched.fetch("--sparse")
    checkpoint = Checkpoint(fetched.checkpoint, recorded=fetched.recorded)
    for tensor in checkpoint.tensors.values():
        if tensor.shard == shard.name:
            checkpoint.array(tensor)


def test_a_shard_can_be_the_first_file_of_its_folder(hub: Hub, tmp_path: Path) -> None:
    listing = resolve.list_commit(REPO, COMMIT)
    shards = [name for name in listing.checkpoint_files() if name.endswith(".safetensors")]
    assert all(sparse.is_possible(listing, name, tmp_path / "not/there") for name in shards)


def test_shards_that_are_here_stay(hub: Hub, tmp_path: Path, toolchain: Path) -> None:
    made = Build(tmp_path / "made", toolchain)
    made.fetch()
    before = {path: path.stat().st_ino for path in made.shards}
    made.fetch("--sparse")
    assert before == {path: path.stat().st_ino for path in made.shards}
    assert not list((made.commit / "freed").glob("*"))
