"""Uploads to a Hub on loopback by the real client: file by file, and each way to be refused."""

import hashlib
import re
import shutil
import socket
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import example_records
import pytest
from conftest import Run
from gguf.constants import GGMLQuantizationType, GGUFValueType
from hub import Fault, Hub, serve
from huggingface_hub import constants
from huggingface_hub.utils import _http
from mtpforge.errors import DamagedError, DownloadError, UploadError, VerificationError
from mtpforge.gguf import reader, writer
from mtpforge.gguf.metadata import Value
from mtpforge.gguf.reader import TensorInfo
from mtpforge.hub import retry
from mtpforge.io.ranges import digest_of
from mtpforge.publish import access, receipts, sums, upload
from mtpforge.publish.sums import Sums
from mtpforge.verify import published
from mtpforge.verify.report import Report, Shard

REPO = "Owner/name"
NAMES = ("a-Q4_0.gguf", "a-Q8_0.gguf")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with serve({}, tmp_path_factory.mktemp("hub")) as hub:
        yield hub


@pytest.fixture
def hub(running: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """The Hub without any repository."""
    monkeypatch.setenv("HF_TOKEN", "hf_token")
    monkeypatch.setattr(constants, "ENDPOINT", running.endpoint)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    (tmp_path / "objects").mkdir()
    running.new, running.rejects_tokens = tmp_path, False
    for state in (running.repositories, running.faults, running.received, running.digests):
        state.clear()
    for seen in (running.requests, running.commits):
        seen.clear()
    running.private.clear()
    running.foreign.clear()
    running.user = {"name": "Owner"}
    return running


@pytest.fixture(autouse=True)
def slept(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """How long each loop waits, without waiting."""
    waits: list[float] = []
    monkeypatch.setattr(retry.time, "sleep", waits.append)
    assert _http.time is retry.time
    return waits


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A results folder with two verified files, and no list yet."""
    (tmp_path / "results/reports").mkdir(parents=True)
    for number, name in enumerate(NAMES):
        write(tmp_path / "results", name, bytes([number]) * 1000)
    return tmp_path / "results"


def write(folder: Path, name: str, content: bytes) -> Report:
    (folder / name).write_bytes(content)
    digest = hashlib.sha256(content).hexdigest()
    report = example_records.report(name, bytes=len(content), sha256=digest)
    report.write(folder / "reports" / f"{Path(name).stem}.json")
    return report


def files(folder: Path, *names: str) -> Sums:
    return {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in names}


def send(folder: Path, *names: str) -> int:
    return upload.send(folder, REPO, files(folder, *names), private=True)


def refused(folder: Path, *names: str) -> str:
    with pytest.raises(UploadError) as error:
        send(folder, *(names or NAMES[:1]))
    assert "hf_token" not in str(error.value) and len(str(error.value).splitlines()) == 1
    return str(error.value)


# ── what is sent ──


def test_each_file_is_a_commit_and_is_sent_once(hub: Hub, folder: Path) -> None:
    assert [send(folder, name) for name in NAMES] == [1, 1]
    assert hub.commits == [[name] for name in NAMES] and hub.private == {REPO}
    received = Counter(hub.received)
    assert [send(folder, name) for name in NAMES] == [0, 0]
    assert hub.received == received and len(hub.commits) == 2


def test_what_arrived_before_a_kill_is_not_sent_again(hub: Hub, folder: Path) -> None:
    """The object is there, and the commit failed."""
    hub.faults["commit"] = [Fault("broken")]
    assert "run again, which continues" in refused(folder)
    (digest,) = hub.received
    assert send(folder, NAMES[0]) == 1
    assert hub.received[digest] == 1000 and hub.commits == [[NAMES[0]]]


def test_a_file_that_changed_is_not_sent(hub: Hub, folder: Path) -> None:
    expected = files(folder, NAMES[0])
    (folder / NAMES[0]).write_bytes(bytes(1001))
    with pytest.raises(VerificationError, match="changed after"):
        upload.send(folder, REPO, expected, private=True)
    assert hub.commits == [] and not hub.received


def test_a_file_with_another_sha256_there_is_sent(hub: Hub, folder: Path) -> None:
    send(folder, NAMES[0])
    write(folder, NAMES[0], b"x" * 1000)  # of the same size
    assert send(folder, NAMES[0]) == 1
    assert (hub.repositories[REPO] / NAMES[0]).read_bytes() == b"x" * 1000


def test_the_hub_must_report_the_sha256(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "digest", lambda path: "f" * 64)
    assert f"missing or different after the upload: {NAMES[0]}" in refused(folder)


# ── refusals ──


@pytest.mark.parametrize("step", ["create", "preupload", "batch", "put", "commit"])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("full", ("storage limit reached", "settings/billing", "run again")),
        ("too large", ("exceeds the maximum size of 500 GB", "set `split: 48G`", "run again")),
        ("denied", ("your token cannot write there", "must have write access", "settings/tokens")),
        ("busy for hours", ("limits requests and commits", "run again in 2 h 1 min")),
    ],
)
def test_a_refusal_says_what_to_do(
    hub: Hub, folder: Path, slept: list[float], step: str, kind: str, words: tuple[str, ...]
) -> None:
    hub.faults[step] = [Fault(kind, times=-1)]
    said = refused(folder)
    assert all(word in said for word in words), said
    assert sum(slept) == 0


@pytest.mark.parametrize("step", ["preupload", "batch", "put"])
@pytest.mark.parametrize(("kind", "wait"), [("busy", 2), ("broken", 1), ("unheard", 1)])
def test_a_passing_fault_is_tried_again(
    hub: Hub, folder: Path, slept: list[float], step: str, kind: str, wait: float
) -> None:
    hub.faults[step] = [Fault(kind)]
    assert send(folder, NAMES[0]) == 1
    assert slept == [wait]


def test_a_commit_waits_as_long_as_the_hub_asks(
    hub: Hub, folder: Path, slept: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    """A night's build with `delete_after` must not end there."""
    hub.faults["commit"] = [Fault("busy", times=2)]
    assert send(folder, NAMES[0]) == 1
    assert slept == [1, 1] and hub.commits == [[NAMES[0]]]
    assert set(hub.received.values()) == {1000}
    assert capsys.readouterr().err.count("limits requests and commits: going on in 1.0 s") == 2


def test_a_limit_of_commits_that_stays_says_when_to_go_on(
    hub: Hub, folder: Path, slept: list[float]
) -> None:
    hub.faults["commit"] = [Fault("busy", times=-1)]
    assert "run again in 1.0 s, which continues from what was uploaded" in refused(folder)
    assert len(slept) == retry.TRIES - 1
    hub.faults.clear()
    assert send(folder, NAMES[0]) == 1


@pytest.mark.parametrize("step", ["preupload", "batch", "put"])
def test_a_request_that_huggingface_hub_tries_again_is_tried_by_it_alone(
    hub: Hub, folder: Path, slept: list[float], step: str
) -> None:
    hub.faults[step] = [Fault("busy", times=-1)]
    assert "limits requests and commits" in refused(folder)
    assert len(slept) == 5


def test_a_revoked_token_is_told_from_a_missing_one(
    hub: Hub, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.rejects_tokens = True
    with pytest.raises(DownloadError, match="your token was rejected"):
        send(folder, NAMES[0])
    monkeypatch.setattr("huggingface_hub.hf_api.get_token", lambda: None)
    monkeypatch.setattr("huggingface_hub.utils._headers.get_token", lambda: None)
    assert "access denied: set HF_TOKEN" in refused(folder)


# ── before a build, and in a dry run ──


@pytest.fixture
def no_token(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("utils._headers", "utils._auth"):
        monkeypatch.setattr(f"huggingface_hub.{module}.get_token", lambda: None)
    monkeypatch.setattr(access, "get_token", lambda: None)


def refused_before(repo: str = REPO) -> str:
    with pytest.raises(UploadError) as error:
        access.check(repo)
    return str(error.value).removeprefix(f"{repo}: ")


def test_a_token_that_may_write_is_enough(hub: Hub, folder: Path) -> None:
    assert access.check(REPO) == ""  # it need not exist
    hub.repositories[REPO] = folder
    assert access.check(REPO) == ""
    assert access.check("owner/other") == ""  # the Hub ignores case
    hub.user = {"name": "me", "orgs": [{"name": "Owner", "roleInOrg": "write"}]}
    assert access.check("Owner/other") == ""
    nothing = {"orgs": [{"name": "other", "roleInOrg": None}], "auth": {"accessToken": None}}
    hub.user = {"name": "Owner", **nothing}
    assert access.check("Owner/other") == ""


@pytest.mark.parametrize("exists", [False, True])
def test_no_token_is_refused_before_the_build(
    hub: Hub, folder: Path, no_token: None, exists: bool
) -> None:
    hub.repositories |= {REPO: folder} if exists else {}
    assert refused_before().startswith("there is no token: set HF_TOKEN")


def test_the_repository_of_somebody_else_is_refused_before_the_build(
    hub: Hub, folder: Path
) -> None:
    hub.user = {"name": "me", "orgs": [{"name": "Owner", "roleInOrg": "read"}]}
    assert "is that of me, who cannot create repositories of Owner" in refused_before()
    hub.repositories[REPO], hub.foreign = folder, {REPO}
    said = "your token may not write there (Forbidden: pass a token that can write): correct"
    assert refused_before().startswith(said)


def test_a_token_that_cannot_write_is_refused_before_the_build(hub: Hub) -> None:
    hub.user = {"name": "Owner", "auth": {"accessToken": {"role": "read"}}}
    assert refused_before().startswith("your token can only read")
    hub.rejects_tokens = True
    assert refused_before().startswith("your token was rejected")


READ, WRITE = "repo.content.read", "repo.write"


def fine_grained(scoped: object) -> dict[str, object]:
    return {"role": "fineGrained", "fineGrained": {"global": ["post.write"], "scoped": scoped}}


def scope(name: str, *permissions: str) -> dict[str, object]:
    return {"entity": {"_id": "1", "type": "user", "name": name}, "permissions": permissions}


@pytest.mark.parametrize(
    "scoped", [[], [scope("Owner", READ)], [scope("Owner"), scope("other", WRITE)]]
)
def test_a_fine_grained_token_without_the_right_is_refused_before_the_build(
    hub: Hub, scoped: object
) -> None:
    hub.user = {"name": "Owner", "auth": {"accessToken": fine_grained(scoped)}}
    said = "your fine-grained token may not write to repositories of Owner"
    assert refused_before().startswith(said)


@pytest.mark.parametrize(
    "token",
    [
        fine_grained([scope("other", READ), scope("owner", READ, WRITE)]),
        fine_grained(None),
        {"role": "fineGrained"},
    ],
)
def test_a_fine_grained_token_with_the_right_or_without_a_list_is_enough(
    hub: Hub, token: object
) -> None:
    """Its rights count, not who owns it."""
    hub.user = {"name": "me", "orgs": [], "auth": {"accessToken": token}}
    assert access.check(REPO) == ""


@pytest.mark.parametrize(
    "user",
    [
        [],
        {},
        {"name": "Owner", "auth": {"accessToken": fine_grained([{"on": "Owner"}])}},
        {"name": "Owner", "orgs": "none"},
    ],
)
def test_an_answer_of_another_form_refuses_nothing(hub: Hub, user: object) -> None:
    hub.user = user
    assert access.check(REPO).endswith("/api/whoami-v2 answers in an unexpected form")


@pytest.mark.parametrize("skip", [0, 1])
@pytest.mark.parametrize(
    ("kind", "words"),
    [("login page", "is a web page"), ("proxy", "status 403"), ("deep JSON", "is nested")],
)
def test_what_is_not_of_the_hub_refuses_nothing(hub: Hub, kind: str, words: str, skip: int) -> None:
    hub.faults["access"] = [Fault(kind, skip=skip)]
    assert words in access.check(REPO)


def test_without_a_network_nothing_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    assert "refused" in access.check(REPO)


def test_a_dry_run_with_a_rejected_token_lists_the_files(
    hub: Hub, folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    sums.write_sums(folder / "SHA256SUMS", files(folder, *NAMES))
    hub.rejects_tokens = True
    done = run("publish.py", "--dry-run", "--private", folder, REPO)
    assert done.returncode == 1 and f"{REPO}: 3 files to upload" in done.stdout
    assert done.stderr.startswith(f"error: {REPO}: your token was rejected")
    assert "renew it" in done.stderr and "unset" not in done.stderr


def test_a_dry_run_lists_all_repositories_before_those_that_refuse(
    hub: Hub, folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    sums.write_sums(folder / "SHA256SUMS", files(folder, *NAMES))
    hub.user = {"name": "Owner"}
    done = run("publish.py", "--dry-run", "--public", folder, "They/x", "--public", folder, REPO)
    assert done.returncode == 1 and done.stderr.startswith("error: They/x: your token is that of")
    assert "They/x: 3 files to upload" in done.stdout and f"would create {REPO}" in done.stdout


def test_a_plan_says_what_is_private(hub: Hub, folder: Path) -> None:
    """As it is on the Hub, whatever the configuration says, or as it will be."""
    sums.write_sums(folder / "SHA256SUMS", files(folder, *NAMES))
    plan = upload.compare(folder, REPO, private=True)
    assert plan.preview == f"`make publish` would create {REPO} (private), and upload 3 files"
    upload.upload(upload.compare(folder, REPO, private=False))
    plan = upload.compare(folder, REPO, private=True)
    assert plan.preview == f"{REPO} (public) has all files already"
    write(folder, NAMES[0], b"new")
    sums.write_sums(folder / "SHA256SUMS", files(folder, *NAMES))
    plan = upload.compare(folder, REPO, private=True)
    assert plan.preview == f"`make publish` would upload 2 files to {REPO} (public)"
    assert len(upload.everything(folder, REPO).missing) == 3


# ── one loop of retries ──


@pytest.mark.parametrize("kind", ["broken", "busy", "unheard"])
def test_requests_are_retried_by_one_loop(
    hub: Hub, folder: Path, slept: list[float], kind: str
) -> None:
    hub.repositories[REPO] = folder
    hub.faults["api"] = [Fault(kind, times=-1)]
    with pytest.raises(DownloadError, match=f"gave up after {retry.TRIES} tries"):
        send(folder, NAMES[0])
    assert hub.requests == [f"GET /api/models/{REPO}"] * retry.TRIES
    assert slept == [retry.FIRST_WAIT * 2**i for i in range(retry.TRIES - 1)]


def test_without_a_network_each_address_is_tried_six_times(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connections = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                connections.append(1)
                connection.close()

        thread = threading.Thread(target=hang_up, daemon=True)
        thread.start()
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        with pytest.raises(DownloadError, match="gave up after 6 tries"):
            send(folder, NAMES[0])
        server.shutdown(socket.SHUT_RDWR)
    assert len(connections) == retry.TRIES


def test_answers_give_their_connections_back(hub: Hub, folder: Path) -> None:
    """There are a hundred in all."""
    send(folder, NAMES[0])
    for _ in range(101):
        assert upload._uploaded(REPO)


# ── files that are deleted after they were uploaded ──


def gguf(path: Path) -> Path:
    info = TensorInfo("x", (4096,), GGMLQuantizationType.F32)
    metadata = {"general.architecture": Value.of("qwen35", GGUFValueType.STRING)}
    writer.write(path, metadata, [(info, [memoryview(bytes(4 * 4096))])])
    return path


@pytest.fixture
def sent(folder: Path) -> tuple[Path, Report]:
    """A file with a receipt and a stand-in."""
    path = gguf(folder / NAMES[0])
    report = write(folder, path.name, path.read_bytes())
    receipts.write_stand_in(folder, report)
    receipt = receipts.Receipt(place=REPO, files=receipts.shards(report))
    receipt.write(receipts.path_of(path))
    return path, report


def test_a_stand_in_has_the_header_and_the_size(sent: tuple[Path, Report]) -> None:
    path, report = sent
    kept = receipts.stand_in(path)
    read, whole = reader.read(kept), reader.read(path)
    assert read.metadata == whole.metadata and read.tensors == whole.tensors
    assert kept.stat().st_size == path.stat().st_size and not list(kept.parent.glob("*.gguf"))
    path.unlink()
    published.check([(kept, report)])
    other = write(path.parent, path.name, b"another")
    with pytest.raises(DamagedError, match="about another file"):
        published.check([(kept, other)])


def test_only_what_was_uploaded_is_deleted(sent: tuple[Path, Report], run: Run) -> None:
    path, _ = sent
    receipt, content = receipts.path_of(path), path.read_bytes()
    intermediate = path.with_name("intermediate.gguf")

    def delete() -> str:
        intermediate.touch()
        done = run("delete_uploaded.py", receipt, path, intermediate)
        assert done.returncode == (1 if path.exists() else 0) and "Traceback" not in done.stderr
        assert path.exists() == intermediate.exists()
        return done.stderr

    for other in (content + b"x", bytes(len(content))):
        path.write_bytes(other)
        assert "is not the file that was uploaded, so it is not deleted: move" in delete()
        assert path.read_bytes() == other
    path.write_bytes(content)
    assert delete() == "" and delete() == ""  # as after a kill


def test_other_files_in_the_folder_of_a_split_one_are_not_deleted(folder: Path) -> None:
    (folder / "b").mkdir()
    shard = gguf(folder / "b/b-00001-of-00001.gguf")
    (folder / "b/.snakemake_timestamp").touch()
    file = Shard("b/b-00001-of-00001.gguf", shard.stat().st_size, digest_of(shard))
    receipts.Receipt(place=REPO, files=(file,)).write(receipts.path_of(folder / "b"))
    receipts.check_uploaded(receipts.path_of(folder / "b"), folder / "b")
    (folder / "b/mine").touch()
    with pytest.raises(VerificationError, match="b/mine: is not the file"):
        receipts.check_uploaded(receipts.path_of(folder / "b"), folder / "b")


def test_stand_ins_of_an_older_split_go(folder: Path) -> None:
    (folder / "b").mkdir()
    for count in (2, 1):
        names = [f"b-0000{number}-of-0000{count}.gguf" for number in range(1, count + 1)]
        sizes = [gguf(folder / "b" / name).stat().st_size for name in names]
        files = tuple(Shard(*each, "0" * 64) for each in zip(names, sizes, strict=True))
        receipts.write_stand_in(folder, example_records.report("b", files=files))
    kept = receipts.stand_in(folder / "b")
    assert [path.name for path in kept.iterdir()] == ["b-00001-of-00001.gguf"]


def test_a_split_file_has_a_stand_in_for_each_shard(folder: Path) -> None:
    (folder / "b").mkdir()
    names = [f"b-0000{number}-of-00002.gguf" for number in (1, 2)]
    shards = [gguf(folder / "b" / name) for name in names]
    files = tuple(Shard(each.name, each.stat().st_size, digest_of(each)) for each in shards)
    report = example_records.report("b", files=files)
    receipts.write_stand_in(folder, report)
    receipt = receipts.Receipt(place=REPO, files=receipts.shards(report))
    receipt.write(receipts.path_of(folder / "b"))
    kept = receipts.stand_in(folder / "b")
    assert [reader.read(kept / name).tensors.keys() for name in names] == [{"x"}] * 2
    published.check([(kept, report)])
    assert set(receipts.known(folder)) == {f"b/{name}" for name in names}


def test_a_deleted_file_is_listed_and_need_not_be_here(
    sent: tuple[Path, Report], capsys: pytest.CaptureFixture[str]
) -> None:
    path, report = sent
    folder, reports = path.parent, [path.parent / "reports/a-Q4_0.json"]
    path.unlink()
    found = sums.collect(folder, reports, [])
    assert found[path.name] == report.sha256
    sums.write_sums(folder / "SHA256SUMS", found)
    assert upload.listed(folder).keys() == {*found, "SHA256SUMS"}
    problems = sums.check(folder)
    assert not any("missing" in line for line in problems)
    assert f"{path.name}: not here: it was uploaded" in capsys.readouterr().err
    shutil.rmtree(folder / "work")
    assert f"{path.name}: missing" in sums.check(folder)
    with pytest.raises(VerificationError, match="missing, though"):
        upload.listed(folder)
    with pytest.raises(FileNotFoundError):
        sums.collect(folder, reports, [])


def test_the_rest_follows_without_the_file_unless_the_hub_lost_it(
    hub: Hub, sent: tuple[Path, Report]
) -> None:
    path, _ = sent
    folder = path.parent
    send(folder, path.name)
    path.unlink()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n")
    listed = sums.collect(folder, [folder / "reports/a-Q4_0.json"], [folder / "README.md"])
    sums.write_sums(folder / "SHA256SUMS", listed)
    plan = upload.compare(folder, REPO, private=True)
    small = ["README.md", "SHA256SUMS", "reports/a-Q4_0.json"]
    assert sorted(name for name, _ in plan.missing) == small
    upload.upload(plan)
    assert hub.commits == [[path.name], small]
    assert upload.compare(folder, REPO, private=True).missing == []
    (hub.repositories[REPO] / path.name).unlink()
    receipt = re.escape(str(receipts.path_of(path)))  # alone: other files are still there
    with pytest.raises(UploadError, match=f"not there any more, nor here: delete {receipt} and"):
        upload.compare(folder, REPO, private=True)
