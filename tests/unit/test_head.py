"""The head of a checkpoint is downloaded separately: its bytes, and hardly any others."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import CHECKPOINTS, SCRIPTS
from hub import COMMIT, Fault, Hub, serve
from layouts import read_tensors, write_checkpoint, write_layout, write_shard
from mtpforge.checkpoint.checkpoint import Checkpoint
from mtpforge.checkpoint.safetensors import CheckpointTensor
from mtpforge.hub import fetch_records, freed, head
from mtpforge.hub.fetch_records import FetchRecord, HeadRecord, HeadTensor
from mtpforge.hub.freed import FreedShard
from mtpforge.verify.digests import head_source
from sparse import write_35b

REPO = "Owner/model"
LAST = "model-00005-of-00005.safetensors"  # the last two of the small MoE have the head


class Client:
    """Runs the programs against a Hub on loopback."""

    def __init__(self, hub: Hub, path: Path) -> None:
        self.hub, self.path, self.source = hub, path, hub.repositories[REPO]
        self.listing, self.record = path / "files.json", path / "head.json"
        self.folder, self.whole = path / "head" / "model", path / "model"
        self.environment = {
            **os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(path / "home"),
            "HF_HUB_DOWNLOAD_TIMEOUT": "5", "MTPFORGE_RETRY_WAIT": "0.02",
        }  # fmt: skip
        self.run("resolve.py", REPO, "--revision", COMMIT, "--out", self.listing)
        hub.sent.clear()

    def command(self, program: str, *arguments: object) -> list[str]:
        return [sys.executable, str(SCRIPTS / program), *map(str, arguments)]

    def run(self, program: str, *arguments: object, fails: bool = False) -> str:
        command = self.command(program, *arguments)
        done = subprocess.run(
            command, capture_output=True, text=True, env=self.environment, timeout=120
        )
        assert done.returncode == int(fails) and "Traceback" not in done.stderr, done.stderr
        return done.stderr

    def fetch_head(self, fails: bool = False) -> str:
        return self.run(*self.arguments(), fails=fails)

    def arguments(self) -> tuple[object, ...]:
        return (
            "fetch_head.py",
            self.listing,
            "--folder",
            self.folder,
            "--whole",
            self.whole,
            "--out",
            self.record,
        )

    def fetch(self, name: str, fails: bool = False) -> str:
        paths = ("--folder", self.whole, "--head", self.record, "--out", self.path / f"{name}.json")
        return self.run("fetch.py", self.listing, name, *paths, fails=fails)

    def tensors(self) -> dict[str, CheckpointTensor]:
        """The head's tensors in the whole checkpoint."""
        return {
            name: t
            for name, t in Checkpoint(self.source).tensors.items()
            if name.startswith(("mtp.", "model.mtp."))
        }

    def standings(self) -> set[str]:
        return {
            entry["standing"] for entry in json.loads(self.record.read_text())["tensors"].values()
        }

    def weights(self) -> int:
        """Bytes of safetensors files that the servers sent."""
        return sum(count for name, count in self.hub.sent.items() if name.endswith(".safetensors"))

    def complete(self) -> None:
        """The folder has exactly the head's tensors, with the right bytes and recorded digests."""
        whole, small = Checkpoint(self.source), Checkpoint(self.folder)
        recorded = json.loads(self.record.read_text())["tensors"]
        assert (
            small.tensors.keys() == self.tensors().keys() == recorded.keys()
            and small.config == whole.config
        )
        for name, tensor in self.tensors().items():
            found = small.tensors[name]
            assert (found.shard, found.dtype, found.shape) == (
                tensor.shard,
                tensor.dtype,
                tensor.shape,
            )
            assert small.digest(found) == whole.digest(tensor) == recorded[name]["sha256"]


@contextmanager
def serving(folder: Path, path: Path) -> Iterator[Client]:
    with serve({REPO: folder}) as hub:
        yield Client(hub, path)


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    """A client of a Hub with the tiny MoE."""
    folder = Path(shutil.copytree(CHECKPOINTS / "tiny-qwen3.5-moe", tmp_path / "repository"))
    with serving(folder, tmp_path) as ready:
        yield ready


@pytest.mark.parametrize(
    "layout",
    [
        "tiny-qwen3.5-moe",
        "moe-fused-head",
        "dense-text-only",
        "dense-fp8",
        "dense-wide-types",
        "qwen3-next",
    ],
)
def test_the_head_converts_to_the_same_bytes_as_in_the_whole_checkpoint(
    layout: str, tmp_path: Path
) -> None:
    source = Path(
        shutil.copytree(write_layout(layout, tmp_path / "layouts"), tmp_path / "whole" / "model")
    )
    with serving(source, tmp_path) as client:
        client.fetch_head()
        client.complete()
        assert client.weights() == sum(
            tensor.size for tensor in client.tensors().values()
        )  # not a byte more
        for folder, out in ((source, "whole.gguf"), (client.folder, "small.gguf")):
            client.run("convert.py", folder, "--part", "head", "--out", tmp_path / out)
        assert (tmp_path / "small.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()


@pytest.mark.parametrize("prefix", ["mtp.", "model.mtp."])
def test_a_separate_head_file_is_found(tmp_path: Path, prefix: str) -> None:
    """Some repositories publish it beside an index without it."""
    original = CHECKPOINTS / "tiny-qwen3.5"
    config, tensors = json.loads((original / "config.json").read_text()), read_tensors(original)
    heads = {
        name.replace("mtp.", prefix, 1): tensors.pop(name)
        for name in list(tensors)
        if name.startswith("mtp.")
    }
    source = write_checkpoint(tmp_path / "whole" / "model", original, config, tensors, shards=2)
    write_shard(source / "mtp.safetensors", heads)
    with serving(source, tmp_path) as client:
        client.fetch_head()
        client.complete()
        assert {tensor.shard for tensor in Checkpoint(client.folder).tensors.values()} == {
            "mtp.safetensors"
        }
        client.run("convert.py", client.folder, "--part", "head", "--out", tmp_path / "head.gguf")


def test_the_head_of_the_35b_is_1_69_gb(tmp_path: Path) -> None:
    size = write_35b(tmp_path / "35b")
    assert abs(size / 1.69e9 - 1) < 0.01
    with serve({REPO: tmp_path / "35b"}) as hub:
        hub.digests = dict.fromkeys(
            (tmp_path / "35b").glob("*.safetensors"), "0" * 64
        )  # do not hash 70 GB of zeros
        client = Client(hub, tmp_path)
        tensors = json.loads(client.listing.read_text())["tensors"]
        assert {t["shard"][:11] for name, t in tensors.items() if name.startswith("mtp.")} == {
            "model-00013",
            "model-00014",
        }
        client.fetch_head()
        assert size <= sum(hub.sent.values()) <= 1.01 * size
        assert len(Checkpoint(client.folder).tensors) == 785
        shutil.rmtree(client.folder)


def test_adjacent_tensors_are_joined_and_long_ranges_cut() -> None:
    def tensor(offset: int, size: int) -> CheckpointTensor:
        return CheckpointTensor(f"t{offset}", "U8", (size,), "s.safetensors", offset, size)

    assert head.pieces([tensor(100, 50), tensor(150, 1), tensor(160, 5)]) == [
        (100, 151),
        (160, 165),
    ]
    assert head.pieces([tensor(8, head.PIECE), tensor(8 + head.PIECE, 1)]) == [
        (8, 8 + head.PIECE),
        (8 + head.PIECE, 9 + head.PIECE),
    ]


@pytest.mark.parametrize(
    "fault",
    [
        Fault("drop", 2, after=5000), Fault("stall", after=5000), Fault("broken"), Fault("busy"),
        Fault("expired"), Fault("short"),
        Fault("whole"), Fault("wrong range"),
    ],
    ids=lambda fault: fault.kind,
)  # fmt: skip
def test_a_head_download_survives_a_fault(client: Client, fault: Fault) -> None:
    client.environment["HF_HUB_DOWNLOAD_TIMEOUT"] = "1"
    client.hub.faults[LAST] = [fault]
    client.fetch_head()
    client.complete()
    assert fault.times == 0


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("drop", -1), "the connection failed"),
        (Fault("broken", -1), "status 500"),
        (Fault("expired", -1), "the address has expired"),
        (Fault("short", -1), "Content-Length is"),
        (Fault("whole", -1), "the server sent the whole file instead of a range"),
        (Fault("wrong range", -1), "Content-Range is"),
        (Fault("etag", -1, skip=1), "changed during the download"),
    ],
    ids=lambda value: value.kind if isinstance(value, Fault) else "",
)
def test_a_permanent_fault_ends_with_one_error_line(
    client: Client, fault: Fault, message: str
) -> None:
    client.hub.faults[LAST] = [Fault("drop", after=5000), fault]
    error = client.fetch_head(fails=True)
    assert (
        message in error
        and LAST in error
        and len([line for line in error.splitlines() if line.startswith("error: ")]) == 1
    )
    assert not (client.folder / LAST).exists() and not client.record.exists()
    client.hub.faults.clear()
    client.fetch_head()
    client.complete()


def test_a_shard_that_changed_since_the_listing_is_refused(client: Client) -> None:
    client.hub.digests[client.source / LAST] = "0" * 64
    error = client.fetch_head(fails=True)
    assert "a commit does not change" in error and not client.record.exists()


SMALL_PIECES = """
import sys
sys.path.insert(0, sys.argv[1])
from mtpforge import cli
from mtpforge.hub import head
import fetch_head
head.PIECE = 500_000
del sys.argv[1]
cli.run(fetch_head.main)
"""


def test_a_killed_head_download_keeps_intact_pieces(client: Client) -> None:
    command = [sys.executable, "-c", SMALL_PIECES, str(SCRIPTS), *map(str, client.arguments()[1:])]
    size = sum(tensor.size for tensor in client.tensors().values() if tensor.shard == LAST)
    partial = client.folder / f".{LAST}.part"

    def interrupted() -> None:
        """Stall in the third piece of the last shard, then kill the run."""
        client.hub.faults[LAST] = [Fault("stall", after=100_000, skip=2)]
        with subprocess.Popen(
            command, env={**client.environment, "HF_HUB_DOWNLOAD_TIMEOUT": "60"}
        ) as process:
            while client.hub.sent[LAST] < 1_100_000:
                assert process.poll() is None
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)

    def resumed() -> int:
        client.hub.sent.clear()
        subprocess.run(command, env=client.environment, check=True)
        client.complete()
        return client.weights()

    interrupted()
    assert resumed() == size - 1_000_000
    assert resumed() == 0
    (client.folder / LAST).unlink()
    (client.folder / f".{LAST}.sums").unlink()
    interrupted()
    torn = bytearray(partial.read_bytes())
    torn[900_000] ^= 1  # as after a power cut
    partial.write_bytes(torn)
    assert resumed() == size - 500_000


def test_a_head_is_trusted_on_first_use_until_whole_shards_verify_it(client: Client) -> None:
    client.fetch_head()
    assert client.standings() == {fetch_records.FIRST_USE}
    client.fetch(LAST)
    assert json.loads((client.path / f"{LAST}.json").read_text()).keys() == {
        "name",
        "bytes",
        "sha256",
        "digests",
    }
    tensors = client.tensors()
    confirmed = sum(tensor.shard == LAST for tensor in tensors.values())
    assert head_source(client.record) == {fetch_records.FIRST_USE: len(tensors)}
    (client.path / "records").mkdir()
    (client.path / f"{LAST}.json").rename(client.path / "records" / f"{LAST}.json")
    assert head_source(client.record) == {
        fetch_records.FIRST_USE: len(tensors) - confirmed,
        fetch_records.VERIFIED: confirmed,
    }


def test_a_shard_confirms_a_head_only_by_what_it_had_when_it_was_whole(tmp_path: Path) -> None:
    """One that was laid out from ranges has a record too (`lean: shards`)."""
    name, records = "a.safetensors", tmp_path / "records"
    tensor = HeadTensor(name, 4, "1" * 64, fetch_records.FIRST_USE)
    head = HeadRecord("a/b", "0" * 40, {"large": tensor, "small": tensor})
    sparse = FetchRecord(name, 9, "2" * 64, digests={"small": tensor.sha256})
    sparse.write(records / f"{name}.json")
    FreedShard(never_whole=True).write(freed.record(records, name))
    assert head.count_standings(records) == {fetch_records.FIRST_USE: 2}
    FreedShard().write(freed.record(records, name))
    for large, expected in (
        ("3" * 64, {fetch_records.FIRST_USE: 1, fetch_records.VERIFIED: 1}),
        (tensor.sha256, {fetch_records.VERIFIED: 2}),
    ):
        whole = replace(sparse, digests={**sparse.digests, "large": large})
        whole.write(fetch_records.digests_record(records, name))
        assert head.count_standings(records) == expected


def test_a_whole_shard_exposes_a_wrong_listing(client: Client) -> None:
    """Tensor offsets come from byte ranges, which no digest covers."""
    client.fetch(LAST)
    listing = json.loads(client.listing.read_text())
    entries = [
        entry
        for name, entry in listing["tensors"].items()
        if entry["shard"] == LAST and name.startswith("mtp.")
    ]
    one, other = next(
        (a, b) for a in entries for b in entries if a is not b and a["size"] == b["size"]
    )
    one["offset"], other["offset"] = other["offset"], one["offset"]
    client.listing.write_text(json.dumps(listing))
    for said in (client.fetch_head(fails=True), client.fetch(LAST, fails=True)):
        assert "differ from the listing" in said


def test_a_whole_shard_exposes_wrong_bytes_of_a_head(client: Client) -> None:
    """The Hub has no digests of parts, so the head is only trusted until then."""
    client.hub.faults[LAST] = [Fault("content")]
    client.fetch_head()
    assert client.standings() == {fetch_records.FIRST_USE}
    error = client.fetch(LAST, fails=True)
    assert (
        "differs from the head that was downloaded on its own" in error
        and f"delete {client.record}" in error
    )


def test_a_head_from_local_whole_shards_is_verified(client: Client) -> None:
    for shard in {tensor.shard for tensor in client.tensors().values()}:
        client.fetch(shard)
    client.hub.sent.clear()
    client.fetch_head()
    client.complete()
    assert client.standings() == {fetch_records.VERIFIED} and client.weights() == 0


def test_a_checkpoint_without_its_head_is_refused(tmp_path: Path) -> None:
    with serve({REPO: write_layout("tiny-qwen3.5", tmp_path)}) as hub:
        client = Client(hub, tmp_path)
        listing = json.loads(client.listing.read_text())
        listing["tensors"] = {
            name: t for name, t in listing["tensors"].items() if not name.startswith("mtp.")
        }
        client.listing.write_text(json.dumps(listing))
        assert "has lost its head" in client.fetch_head(fails=True)
