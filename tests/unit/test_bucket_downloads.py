"""Downloads from object storage: resumed, pinned by a list, and refused if something changed."""

import hashlib
import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from buckets import KEY, SECRET, Store, serve
from conftest import Run
from mtpforge.errors import DownloadError
from mtpforge.s3 import client, download
from mtpforge.s3.address import Address

BUCKET = "checkpoints"
ADDRESS = Address.parse(f"s3://{BUCKET}/tuned")
SHARD = "model-00001-of-00001.safetensors"
FILES = {
    SHARD: random.Random(1).randbytes(5_000_000),
    "config.json": b"{}",
    "additional_chat_templates/tool.jinja": b"tool",
}


@pytest.fixture(scope="module")
def running() -> Iterator[Store]:
    with serve() as store:
        yield store


@pytest.fixture
def store(running: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    for name, value in running.variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(download, "FIRST_WAIT", 0.01)
    running.client.create_bucket(Bucket=BUCKET)
    for name, content in FILES.items():
        put(running, name, content)
    yield running
    for key in running.content(BUCKET):
        running.client.delete_object(Bucket=BUCKET, Key=key)
    running.client.delete_bucket(Bucket=BUCKET)


def put(store: Store, name: str, content: bytes) -> None:
    store.client.put_object(Bucket=BUCKET, Key=f"tuned/{name}", Body=content)


def there(folder: Path) -> dict[str, bytes]:
    paths = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


@pytest.fixture
def answers(store: Store, monkeypatch: pytest.MonkeyPatch) -> "Answers":
    return Answers(monkeypatch)


class Answers:
    """Breaks off answers with a file after `after` bytes, `times` times; logs the ranges asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.times, self.after = 0, 0
        self.ranges: list[str | None] = []
        connect = client.connect

        def breaking() -> Any:
            made = connect()
            made.meta.events.register("before-call.s3.GetObject", self._log)
            made.meta.events.register("after-call.s3.GetObject", self._break)
            return made

        monkeypatch.setattr(client, "connect", breaking)

    def _log(self, params: dict[str, Any], **_: Any) -> None:
        self.ranges.append(params["headers"].get("Range"))

    def _break(self, parsed: dict[str, Any], **_: Any) -> None:
        from botocore.response import StreamingBody

        if self.times and parsed["ContentLength"] > self.after:
            self.times -= 1
            start = parsed["Body"].read(self.after)
            parsed["Body"] = StreamingBody(io.BytesIO(start), parsed["ContentLength"])


def test_a_checkpoint_is_downloaded_without_code(store: Store, tmp_path: Path) -> None:
    for name in ("modeling.py", "pytorch_model.bin", "notes (1).txt", "../tuned-2/x.json", ""):
        put(store, name, b"no")
    folder = tmp_path / "tuned"
    listing = download.download(ADDRESS, folder)
    assert there(folder) == FILES
    written = json.loads((tmp_path / "tuned.s3.json").read_text())
    assert {name: each["sha256"] for name, each in written["files"].items()} == {
        name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()
    }
    assert download.Listing.read(tmp_path / "tuned.s3.json") == listing


def test_a_second_run_downloads_what_is_missing(
    store: Store, tmp_path: Path, answers: Answers
) -> None:
    download.download(ADDRESS, tmp_path / "tuned")
    (tmp_path / "tuned" / "config.json").write_bytes(b"[]")  # damaged, of the same size
    answers.ranges.clear()
    download.download(ADDRESS, tmp_path / "tuned")
    assert len(answers.ranges) == 1
    assert there(tmp_path / "tuned") == FILES


def test_a_download_goes_on_where_it_broke_off(
    store: Store, tmp_path: Path, answers: Answers
) -> None:
    answers.times, answers.after = 2, 2_000_000
    download.download(ADDRESS, tmp_path / "tuned")
    assert [each for each in answers.ranges if each] == ["bytes=2000000-", "bytes=4000000-"]
    assert there(tmp_path / "tuned") == FILES


def test_another_run_goes_on_too(
    store: Store, tmp_path: Path, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers.times, answers.after = 1, 2_000_000
    monkeypatch.setattr(download, "TRIES", 1)
    with pytest.raises(DownloadError, match=f"{SHARD}: ended too early"):
        download.download(ADDRESS, tmp_path / "tuned")
    assert SHARD not in there(tmp_path / "tuned")
    download.download(ADDRESS, tmp_path / "tuned")
    assert [each for each in answers.ranges if each] == ["bytes=2000000-"]
    assert there(tmp_path / "tuned") == FILES


def test_the_beginning_of_another_file_is_not_continued(
    store: Store, tmp_path: Path, answers: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers.times, answers.after = 1, 2_000_000
    monkeypatch.setattr(download, "TRIES", 1)
    with pytest.raises(DownloadError):
        download.download(ADDRESS, tmp_path / "tuned")
    other = random.Random(2).randbytes(5_000_000)
    put(store, SHARD, other)
    with pytest.raises(DownloadError, match=r"changed since .*tuned\.s3\.json was written"):
        download.download(ADDRESS, tmp_path / "tuned")
    (tmp_path / "tuned.s3.json").unlink()
    download.download(ADDRESS, tmp_path / "tuned")
    assert there(tmp_path / "tuned")[SHARD] == other


@pytest.mark.parametrize("change", ["changed", "is gone"])
def test_what_changed_in_the_bucket_is_refused(store: Store, tmp_path: Path, change: str) -> None:
    download.download(ADDRESS, tmp_path / "tuned")
    if change == "changed":
        put(store, "config.json", b"[]")
    else:
        store.client.delete_object(Bucket=BUCKET, Key="tuned/config.json")
    with pytest.raises(DownloadError, match=f"config.json: {change} since"):
        download.download(ADDRESS, tmp_path / "tuned")
    assert there(tmp_path / "tuned") == FILES


def test_what_changes_during_the_download_is_refused(
    store: Store, tmp_path: Path, answers: Answers
) -> None:
    listed = download._Source(ADDRESS).list()
    put(store, SHARD, FILES[SHARD][::-1])
    with pytest.raises(DownloadError, match="changed while it was read"):
        download._Source(ADDRESS).fetch(SHARD, listed.files[SHARD], tmp_path / SHARD, keep=False)
    assert not (tmp_path / SHARD).exists()


def test_the_digests_of_the_folder_are_checked(store: Store, tmp_path: Path) -> None:
    sums = {name: hashlib.sha256(content).hexdigest() for name, content in FILES.items()}
    right = "".join(f"{digest}  ./{name}\n" for name, digest in sums.items())
    put(store, "SHA256SUMS", right.encode())
    download.download(ADDRESS, tmp_path / "right")
    put(store, "SHA256SUMS", right.replace(sums[SHARD], "0" * 64).encode())
    with pytest.raises(DownloadError, match=f"{SHARD}: its sha256 is {sums[SHARD]}, expected 000"):
        download.download(ADDRESS, tmp_path / "wrong")
    assert SHARD not in there(tmp_path / "wrong")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"url": "s3://a", "files": {"config.json": {"bytes": "1", "etag": "a"}}}',
        '{"url": "s3://checkpoints/tuned", "files": {"../x": {"bytes": 1, "etag": "a"}}}',
        '{"url": "s3://other/tuned", "files": {}}',
    ],
)
def test_a_wrong_list_is_refused(store: Store, tmp_path: Path, content: str) -> None:
    (tmp_path / "tuned.s3.json").write_text(content)
    with pytest.raises(DownloadError):
        download.download(ADDRESS, tmp_path / "tuned")
    assert not (tmp_path / "x").exists()


def test_a_folder_without_a_checkpoint_is_an_error(store: Store, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="has no file of a checkpoint"):
        download.download(Address.parse(f"s3://{BUCKET}/tune"), tmp_path / "tuned")


def test_the_program_says_no_secret(store: Store, tmp_path: Path, run: Run) -> None:
    done = run("download.py", ADDRESS, "--out", tmp_path / "tuned")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "3 files, 5.00 MB\n"
    written = (tmp_path / "tuned.s3.json").read_text()
    assert not any(secret in done.stdout + done.stderr + written for secret in (KEY, SECRET))
    done = run("download.py", "s3://absent/tuned", "--out", tmp_path / "other")
    assert done.stderr.startswith("error: s3://absent/tuned: no such bucket")
