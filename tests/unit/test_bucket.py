"""Uploads to object storage: what is sent, what is not sent again, and what arrives damaged."""

import hashlib
import io
import os
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from buckets import KEY, SECRET, Store, serve
from conftest import Run
from mtpforge.errors import ConfigError, UploadError, VerificationError
from mtpforge.publish import bucket
from mtpforge.rules.build import Build
from mtpforge.s3 import client
from mtpforge.s3.address import Address
from repository import CONFIG

MODEL = CONFIG["models"]["tiny-qwen3.5"]
BUCKET = "models"
ADDRESS = Address.parse(f"s3://{BUCKET}/some/model")
LARGE = "model-Q8_0.gguf"
PART = 5 << 20  # the least that the service takes


@pytest.fixture(scope="module")
def running() -> Iterator[Store]:
    with serve() as store:
        yield store


@pytest.fixture
def store(running: Store, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    for name, value in running.variables.items():
        monkeypatch.setenv(name, value)
    running.client.create_bucket(Bucket=BUCKET)
    yield running
    for begun in running.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", []):
        running.client.abort_multipart_upload(
            Bucket=BUCKET, Key=begun["Key"], UploadId=begun["UploadId"]
        )
    for key in running.content(BUCKET):
        running.client.delete_object(Bucket=BUCKET, Key=key)
    running.client.delete_bucket(Bucket=BUCKET)


@pytest.fixture
def requests(store: Store, monkeypatch: pytest.MonkeyPatch) -> "Requests":
    """What is asked of the service from now on."""
    return Requests(monkeypatch)


class Requests:
    """Operations with their keys; `spoil` is called with each before it is sent."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, str]] = []
        self.spoil: Any = lambda operation, params: None
        connect = client.connect

        def recording() -> Any:
            made = connect()
            made.meta.events.register("before-call.s3", self._record)
            return made

        monkeypatch.setattr(client, "connect", recording)

    def _record(self, model: Any, params: dict[str, Any], **_: Any) -> None:
        self.spoil(model.name, params)
        self.seen.append((model.name, params["url_path"].rpartition("/")[2]))

    def sent(self) -> list[str]:
        """Names of files or parts that were sent since the last call."""
        found = [key for name, key in self.seen if name in ("PutObject", "UploadPart")]
        self.seen.clear()
        return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "model"
    files = {
        LARGE: random.Random(1).randbytes(300_000),
        "README.md": b"card",
        "reports/a.json": b"{}",
    }
    for name, content in files.items():
        (made / name).parent.mkdir(parents=True, exist_ok=True)
        (made / name).write_bytes(content)
    list_files(made)
    return made


def list_files(folder: Path) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [
        f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.relative_to(folder)}\n"
        for path in paths
        if path.name != "SHA256SUMS"
    ]
    (folder / "SHA256SUMS").write_text("".join(lines))


def grow(folder: Path, seed: int = 2, size: int = 2 * PART + 1000) -> None:
    """Make the large file one of three parts."""
    (folder / LARGE).write_bytes(random.Random(seed).randbytes(size))
    list_files(folder)


def upload(folder: Path) -> None:
    bucket.upload(bucket.compare(folder, ADDRESS))


def content(folder: Path) -> dict[str, bytes]:
    return {
        f"some/model/{path.relative_to(folder)}": path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


# ── what is sent ──


def test_everything_is_sent_once_and_the_list_last(
    store: Store, folder: Path, requests: Requests
) -> None:
    upload(folder)
    assert store.content(BUCKET) == content(folder)
    assert requests.sent() == ["README.md", LARGE, "a.json", "SHA256SUMS"]
    upload(folder)
    assert requests.sent() == []


def test_only_what_changed_is_sent_again(store: Store, folder: Path, requests: Requests) -> None:
    upload(folder)
    requests.sent()
    (folder / "README.md").write_text("CARD")  # of the same size
    list_files(folder)
    assert [name for name, _ in bucket.compare(folder, ADDRESS).missing] == [
        "README.md",
        "SHA256SUMS",
    ]
    upload(folder)
    assert requests.sent() == ["README.md", "SHA256SUMS"]
    assert store.content(BUCKET) == content(folder)


def test_an_object_that_others_wrote_is_sent_again(store: Store, folder: Path) -> None:
    upload(folder)
    other = bytes(len((folder / LARGE).read_bytes()))
    store.client.put_object(Bucket=BUCKET, Key=ADDRESS.key(LARGE), Body=other)
    upload(folder)
    assert store.content(BUCKET) == content(folder)


def test_other_objects_are_left_and_named(
    store: Store, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for key in ("some/model/old.gguf", "some/model-2/other.gguf", "some/README.md"):
        store.client.put_object(Bucket=BUCKET, Key=key, Body=b"old")
    plan = bucket.compare(folder, ADDRESS)
    plan.show()
    assert plan.foreign == ["old.gguf"]
    assert "old.gguf is only in the bucket" in capsys.readouterr().err
    bucket.upload(plan)
    assert store.content(BUCKET).items() >= content(folder).items()
    assert store.content(BUCKET)["some/model/old.gguf"] == b"old"


# ── parts ──


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bucket, "PART", PART)
    monkeypatch.setattr(bucket, "AT_ONCE", 1)


def fail_at(number: int) -> Any:
    """Break off the upload at this part."""

    def spoil(operation: str, params: dict[str, Any]) -> None:
        from botocore.exceptions import EndpointConnectionError

        if operation == "UploadPart" and params["query_string"]["partNumber"] == number:
            raise EndpointConnectionError(endpoint_url=f"http://{KEY}:{SECRET}@host")

    return spoil


def test_a_large_file_goes_in_parts(
    store: Store, folder: Path, requests: Requests, parts: None
) -> None:
    grow(folder)
    upload(folder)
    assert requests.sent().count(LARGE) == 3
    assert store.content(BUCKET) == content(folder)
    assert bucket.compare(folder, ADDRESS).missing == []


def test_an_interrupted_upload_continues(
    store: Store, folder: Path, requests: Requests, parts: None
) -> None:
    grow(folder)
    requests.spoil = fail_at(3)
    with pytest.raises(UploadError, match=f"{LARGE}: cannot be reached") as failed:
        upload(folder)
    assert SECRET not in str(failed.value)
    assert ADDRESS.key(LARGE) not in store.content(BUCKET)
    assert requests.sent().count(LARGE) == 2
    requests.spoil = lambda *_: None
    upload(folder)
    assert requests.sent().count(LARGE) == 1
    assert store.content(BUCKET) == content(folder)
    assert bucket.compare(folder, ADDRESS).missing == []


@pytest.mark.parametrize("keep", [0, PART])  # bytes at its start that stay the same
def test_the_parts_of_another_file_are_not_continued(
    store: Store, folder: Path, requests: Requests, parts: None, keep: int
) -> None:
    grow(folder)
    before = (folder / LARGE).read_bytes()[:keep]
    requests.spoil = fail_at(3)
    with pytest.raises(UploadError):
        upload(folder)
    requests.spoil = lambda *_: None
    grow(folder, seed=3)
    (folder / LARGE).write_bytes(before + (folder / LARGE).read_bytes()[keep:])
    list_files(folder)
    upload(folder)
    assert store.content(BUCKET) == content(folder)
    assert bucket.compare(folder, ADDRESS).missing == []
    assert "Uploads" not in store.client.list_multipart_uploads(Bucket=BUCKET)


# ── damage ──


@pytest.mark.parametrize("large", [False, True])
def test_a_file_that_arrives_damaged_is_deleted(
    store: Store, folder: Path, requests: Requests, parts: None, large: bool
) -> None:
    if large:
        grow(folder)

    def spoil(operation: str, params: dict[str, Any]) -> None:
        if operation in ("PutObject", "UploadPart") and params["url_path"].endswith(LARGE):
            params["body"] = io.BytesIO(bytes(len(params["body"].getvalue())))

    requests.spoil = spoil
    with pytest.raises(UploadError, match=f"{LARGE}: another file arrived"):
        upload(folder)
    assert ADDRESS.key(LARGE) not in store.content(BUCKET)
    assert ADDRESS.key("SHA256SUMS") not in store.content(BUCKET)


@pytest.mark.parametrize("large", [False, True])
def test_a_file_whose_upload_was_killed_is_compared_before_it_may_be_deleted(
    store: Store, folder: Path, requests: Requests, parts: None, large: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """All of it was sent, and what the service keeps was not compared any more."""
    if large:
        grow(folder)
    files = {LARGE: hashlib.sha256((folder / LARGE).read_bytes()).hexdigest()}

    def spoil(operation: str, params: dict[str, Any]) -> None:
        if operation in ("PutObject", "UploadPart"):
            params["body"] = io.BytesIO(bytes(len(params["body"].getvalue())))

    def kill(*_: object, **named: object) -> None:
        raise KeyboardInterrupt

    requests.spoil = spoil
    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(bucket._Bucket, "_check", kill)
        bucket.send(folder, ADDRESS, files)
    requests.spoil = lambda *_: None
    assert ADDRESS.key(LARGE) in store.content(BUCKET)
    with pytest.raises(UploadError, match=f"{LARGE}: another file arrived"):
        bucket.send(folder, ADDRESS, files)
    assert [bucket.send(folder, ADDRESS, files) for _ in range(2)] == [1, 0]
    assert store.content(BUCKET)[ADDRESS.key(LARGE)] == (folder / LARGE).read_bytes()


@pytest.mark.parametrize("large", [False, True])
def test_a_file_that_changed_after_it_was_listed_is_not_sent(
    store: Store, folder: Path, parts: None, large: bool
) -> None:
    if large:
        grow(folder)
    path = folder / LARGE
    before = path.stat()
    plan = bucket.compare(folder, ADDRESS)
    path.write_bytes(bytes(before.st_size))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(VerificationError, match="changed after SHA256SUMS was written"):
        bucket.upload(plan)
    assert ADDRESS.key(LARGE) not in store.content(BUCKET)
    assert "Uploads" not in store.client.list_multipart_uploads(Bucket=BUCKET)


# ── the program ──


def test_the_program_uploads_and_says_no_secret(store: Store, folder: Path, run: Run) -> None:
    options = ("--s3", folder, ADDRESS)
    listed = run("publish.py", *options, "--dry-run")
    assert listed.returncode == 0, listed.stderr
    assert "s3://models/some/model: 4 files to upload" in listed.stdout
    assert store.content(BUCKET) == {}
    done = run("publish.py", *options)
    assert done.returncode == 0, done.stderr
    assert store.content(BUCKET) == content(folder)
    assert "0 files to upload" in run("publish.py", *options).stdout
    assert not any(secret in done.stdout + done.stderr for secret in (KEY, SECRET))


def test_a_bucket_that_does_not_exist_is_an_error(store: Store, folder: Path, run: Run) -> None:
    done = run("publish.py", "--s3", folder, "s3://other/model")
    assert done.returncode == 1
    assert done.stderr.startswith("error: s3://other/model: no such bucket")


def test_missing_credentials_are_an_error(
    store: Store, folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    done = run("publish.py", "--s3", folder, ADDRESS)
    assert done.returncode == 1
    assert done.stderr.startswith("error: s3://models/some/model: no credentials")


@pytest.mark.parametrize("code", ["InvalidAccessKeyId", "403", "SlowDown\x1b[2J"])
def test_what_a_service_says_is_not_repeated(store: Store, code: str) -> None:
    from botocore.exceptions import ClientError

    answer = {"Error": {"Code": code, "Message": f"{KEY} {SECRET}"}}
    said = client.explain(ClientError(answer, "PutObject"))
    assert said.isprintable()
    assert not any(secret in said for secret in (KEY, SECRET))


@pytest.mark.parametrize(
    "variables", [{"AWS_PROFILE": "absent"}, {"AWS_ENDPOINT_URL": f"{KEY}:{SECRET}@"}]
)
def test_wrong_settings_are_an_error_without_a_secret(
    store: Store, monkeypatch: pytest.MonkeyPatch, variables: dict[str, str]
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="check the AWS_") as failed:
        client.connect()
    assert SECRET not in str(failed.value)


def test_missing_boto3_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(ConfigError, match="run `make s3`"):
        client.connect()


# ── the configuration ──


def build(**keys: object) -> Build:
    return Build({"models": {"m": {**MODEL, "publish": keys}}})


def test_the_rule_gets_the_address() -> None:
    made = build(url="s3://my-bucket/a/b/").publish
    assert made.upload_options(None) == "--s3 results/m s3://my-bucket/a/b"
    assert made.uploads(None) == ["results/summary.md", "results/m/SHA256SUMS"]


@pytest.mark.parametrize(
    "url",
    [
        "my-bucket/a",
        "https://my-bucket/a",
        f"s3://{KEY}:{SECRET}@my-bucket/a",
        "s3://my-bucket/../a",
        "s3://my-bucket//a",
        "s3://my-bucket/a b",
        "s3://my-bucket/a?x",
        "s3://B/a",
    ],
)
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="models/m/publish/url: not an address") as failed:
        build(url=url)
    assert SECRET not in str(failed.value)


def test_a_model_goes_to_one_place() -> None:
    with pytest.raises(ConfigError, match="exactly one of the keys repo, url"):
        build(url="s3://my-bucket/a", repo="O/N")
    there, same = ({**MODEL, "publish": {"url": f"s3://my-bucket/a{end}"}} for end in ("", "/"))
    with pytest.raises(ConfigError, match="b/publish/url: s3://my-bucket/a is the folder of a"):
        Build({"models": {"a": there, "b": same}})


def test_one_file_is_uploaded_before_the_rest(
    store: Store, requests: Requests, tmp_path: Path
) -> None:
    (tmp_path / LARGE).write_bytes(b"content")
    files = {LARGE: hashlib.sha256(b"content").hexdigest()}
    assert bucket.send(tmp_path, ADDRESS, files) == 1
    assert requests.sent() == [LARGE]
    assert bucket.send(tmp_path, ADDRESS, files) == 0 and requests.sent() == []
    (tmp_path / LARGE).write_bytes(b"changed")
    with pytest.raises(VerificationError, match="changed after"):
        bucket.send(tmp_path, ADDRESS, {LARGE: "0" * 64})
