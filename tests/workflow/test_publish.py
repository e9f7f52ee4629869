"""Publishing: a model's folder made by Snakemake, uploaded to a Hub on loopback, and checked."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import buckets
import pytest
from conftest import SCRIPTS, Run
from google.protobuf import json_format
from hub import Fault, Hub, serve
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement
from mtpforge.io import ranges
from repository import CONFIG, Repository

MODEL = "tiny-qwen3.5"
TARGET = "Owner/tiny-qwen3.5-MTP-GGUF"
TOKEN = "hf_VerySecretToken"
GGUFS = ["tiny-qwen3.5-BF16.gguf", "tiny-qwen3.5-Q8_0.gguf"]
REPORTS = [f"reports/{name.replace('gguf', 'json')}" for name in GGUFS]
STATEMENTS = [f"provenance/{name.replace('gguf', 'json')}" for name in GGUFS]
PAGES = ["README.md", "DETAILS.md"]
PUBLISHED = sorted([*PAGES, "SHA256SUMS", *GGUFS, *REPORTS, *STATEMENTS])


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, toolchain: Path) -> Repository:
    copy = Repository(tmp_path_factory.mktemp("publish") / "repository", toolchain)
    set_model(copy)
    done = copy.snakemake()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return copy


def set_model(copy: Repository, **keys: object) -> None:
    model = {**CONFIG["models"][MODEL], "publish": {"repo": TARGET}, **keys}
    copy.config["models"] = {MODEL: model}
    copy.write_config()


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    new = tmp_path_factory.mktemp("hub")
    (new / "objects").mkdir()
    with serve({}, new) as running:
        yield running


def environment(hub: Hub, home: Path) -> dict[str, str]:
    home.mkdir(exist_ok=True)
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(home),
    }


def publish(copy: Repository, hub: Hub, *arguments: str) -> str:
    """Run the rule `publish` and return its output, which must not contain the token."""
    done = copy.snakemake(*arguments, target="publish", **environment(hub, copy.path / "home"))
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-4000:]
    logs = [log.read_text() for log in (copy.path / "logs").rglob("*.log")]
    assert not any(TOKEN in text for text in [output, *logs])
    return output


def upload(
    folder: Path, repo: str, variables: dict[str, str], *options: str
) -> "subprocess.CompletedProcess[str]":
    """Run publish.py."""
    options = options or ("--private",)
    command = [sys.executable, SCRIPTS / "publish.py", *options, folder, repo]
    return subprocess.run(command, env=variables, capture_output=True, text=True)


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_results_folder_is_complete(repository: Repository, run: Run) -> None:
    results = repository.path / "results" / MODEL
    lines = (results / "SHA256SUMS").read_text().splitlines()
    assert [line.split()[1] for line in lines] == sorted(set(PUBLISHED) - {"SHA256SUMS"})
    assert run("check_results.py", results).returncode == 0
    command = ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"]
    assert subprocess.run(command, cwd=results).returncode == 0


def test_second_run_makes_nothing(repository: Repository) -> None:
    assert repository.pending() == {}


def test_dry_run_only_lists_files(repository: Repository, hub: Hub) -> None:
    output = publish(repository, hub, "--config", "dry_run=true")
    assert f"{TARGET} (new repository): {len(PUBLISHED)} files to upload" in output
    for name in PUBLISHED:
        size = (repository.path / "results" / MODEL / name).stat().st_size
        assert f"{size:>15,}  {name}\n" in output
    last = f"`make publish` would create {TARGET} (private), and upload {len(PUBLISHED)} files"
    assert f"dry run: nothing was uploaded; {last}\n" in output
    assert "start  upload" not in output
    assert hub.repositories == {}
    assert hub.commits == []
    assert not hub.received


def test_a_dry_run_works_without_a_network(repository: Repository, tmp_path: Path) -> None:
    with serve({}) as gone:
        variables = {**os.environ, **environment(gone, tmp_path / "home")}
    done = upload(repository.path / "results" / MODEL, TARGET, variables, "--dry-run", "--private")
    assert done.returncode == 0, done.stderr
    assert f"{TARGET}: {len(PUBLISHED)} files to upload" in done.stdout
    assert "dry run: nothing was uploaded; not checked with the Hub: " in done.stdout


def test_a_dry_run_fails_if_the_hub_would_refuse(
    repository: Repository, hub: Hub, tmp_path: Path
) -> None:
    variables = {**os.environ, **environment(hub, tmp_path / "home"), "HF_TOKEN": ""}
    done = upload(repository.path / "results" / MODEL, TARGET, variables, "--dry-run", "--private")
    assert done.returncode == 1 and "files to upload" in done.stdout
    assert f"error: {TARGET}: there is no token: set HF_TOKEN" in done.stderr


def test_nothing_is_built_for_an_upload_that_the_hub_would_refuse(
    repository: Repository, hub: Hub
) -> None:
    set_model(repository, variants={"BF16": {}, "Q4_0": {}}, publish={"repo": "Other/name"})
    done = repository.snakemake(target="publish", **environment(hub, repository.path / "home"))
    set_model(repository)
    assert done.returncode == 1
    output = done.stdout + done.stderr
    assert "error: Other/name: your token is that of Owner, who cannot create" in output
    assert " start " not in output


def test_first_run_uploads_everything(repository: Repository, hub: Hub) -> None:
    output = publish(repository, hub)
    page = f"{hub.endpoint}/{TARGET}"
    assert f"{TARGET} (private): uploaded {len(PUBLISHED)} files: {page}\n" in output
    assert hub.private == {TARGET}
    assert hub.commits == [PUBLISHED]
    published = content(repository.path / "results" / MODEL)
    uploaded = content(hub.repositories[TARGET])
    assert {name: data for name, data in uploaded.items() if name != ".gitattributes"} == {
        name: data for name, data in published.items() if name in PUBLISHED
    }
    assert set(hub.tokens) == {("hub", f"Bearer {TOKEN}")}  # the storage server gets no token


def test_second_run_uploads_nothing(repository: Repository, hub: Hub) -> None:
    received = dict(hub.received)
    assert f"{TARGET}: 0 files to upload" in publish(repository, hub)
    assert len(hub.commits) == 1
    assert dict(hub.received) == received
    for path in (repository.path / "results" / MODEL).rglob("*"):
        path.touch()
    hub.foreign = {TARGET}  # the token only reads
    output = publish(repository, hub)
    hub.foreign = set()
    assert "0 files to upload" in output and "your token may not write there" in output
    assert len(hub.commits) == 1


def test_new_variant_is_uploaded_and_a_removed_one_is_left_alone(
    repository: Repository, hub: Hub
) -> None:
    set_model(repository, variants={"BF16": {}, "Q4_0": {}})
    assert repository.pending() == {
        "recipe": 1,
        "plan_types": 1,
        "quantize": 1,
        "verify": 1,
        "summary": 1,
        "provenance": 1,
        "card": 1,
        "sums": 1,
    }
    output = publish(repository, hub)
    assert hub.commits[1:] == [
        [
            "DETAILS.md",
            "README.md",
            "SHA256SUMS",
            "provenance/tiny-qwen3.5-Q4_0.json",
            "reports/tiny-qwen3.5-Q4_0.json",
            "tiny-qwen3.5-Q4_0.gguf",
        ]
    ]
    old = f"results/{MODEL}/tiny-qwen3.5-Q8_0.gguf"
    assert f"not uploaded: {old} is no longer configured" in output
    assert "left alone: tiny-qwen3.5-Q8_0.gguf is only in the repository" in output
    card = (hub.repositories[TARGET] / "README.md").read_text()
    assert "Q4_0" in card
    assert "Q8_0.gguf" not in card


def test_partial_download_can_be_checked(hub: Hub, tmp_path: Path, run: Run) -> None:
    copy = download(hub, tmp_path / "copy")
    assert run("check_results.py", copy).returncode == 0


def test_damage_to_a_download_is_reported(hub: Hub, tmp_path: Path, run: Run) -> None:
    copy = download(hub, tmp_path / "copy")

    def problems() -> str:
        done = run("check_results.py", copy)
        assert done.returncode == 1
        assert done.stderr.startswith("error: ")
        assert "Traceback" not in done.stderr
        return done.stderr

    path = copy / "tiny-qwen3.5-Q4_0.gguf"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (copy / "another.gguf").write_bytes(data)
    (copy / "reports/tiny-qwen3.5-BF16.json").unlink()
    found = problems()
    assert "Q4_0.gguf: its sha256 differs" in found
    assert "another.gguf: not listed" in found
    assert "reports/tiny-qwen3.5-BF16.json: missing" in found
    assert "BF16.gguf" not in found
    path.unlink()
    assert "tiny-qwen3.5-Q4_0.gguf: missing" in problems()
    (copy / "SHA256SUMS").unlink()
    assert "no such file" in problems()


def download(hub: Hub, folder: Path) -> Path:
    """A copy of the repository without the file that is no longer listed."""
    ignore = shutil.ignore_patterns("*Q8_0*")
    return Path(shutil.copytree(hub.repositories[TARGET], folder, ignore=ignore))


def test_interrupted_upload_continues(repository: Repository, tmp_path: Path) -> None:
    results = repository.path / "results" / MODEL
    objects = tmp_path / "objects"
    objects.mkdir()
    with serve({}, tmp_path) as hub:
        variables = {**os.environ, **environment(hub, tmp_path / "home")}
        kill_after_first_object(hub, objects, results, variables)
        (uploaded,) = (path.name for path in objects.iterdir())
        assert hub.commits == []
        hub.received.clear()
        done = upload(results, TARGET, variables, "--public")
        assert done.returncode == 0, done.stderr
        assert uploaded not in hub.received
        assert len(hub.received) == 1
        assert len(hub.commits) == 1
        assert hub.private == set()


def kill_after_first_object(
    hub: Hub, objects: Path, results: Path, variables: dict[str, str]
) -> None:
    """Kill an upload when one large file is complete and the next has stalled."""
    hub.faults["put"] = [Fault("stall")]
    command = [sys.executable, SCRIPTS / "publish.py", "--public", results, TARGET]
    process = subprocess.Popen(
        command, env=variables, start_new_session=True, stderr=subprocess.PIPE
    )
    while len(list(objects.iterdir())) < 1 or len(hub.received) < 2:
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def test_upload_without_a_token_is_an_error(
    repository: Repository, hub: Hub, tmp_path: Path
) -> None:
    variables = {**os.environ, **environment(hub, tmp_path / "home")}
    del variables["HF_TOKEN"]
    done = upload(repository.path / "results" / MODEL, "Owner/other", variables)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "error: Owner/other: access denied: set HF_TOKEN" in done.stderr


@pytest.mark.parametrize("name", [GGUFS[0], REPORTS[0]])
@pytest.mark.parametrize("later", [-60, 60])  # seconds; a disk fault does not change a file's time
def test_file_changed_after_verification_is_not_uploaded(
    repository: Repository, hub: Hub, tmp_path: Path, name: str, later: int
) -> None:
    copy = Path(shutil.copytree(repository.path / "results" / MODEL, tmp_path / "copy"))
    path = copy / name
    data = path.read_bytes()
    path.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    changed = (copy / "SHA256SUMS").stat().st_mtime + later
    os.utime(path, (changed, changed))
    commits = len(hub.commits)
    variables = {**os.environ, **environment(hub, tmp_path / "home")}
    done = upload(copy, "Owner/another", variables)
    assert done.returncode == 1
    assert "changed after SHA256SUMS was written" in done.stderr
    assert len(hub.commits) == commits


@pytest.fixture
def statement(repository: Repository) -> str:
    return (repository.path / "results" / MODEL / STATEMENTS[0]).read_text()


def test_statement_names_all_inputs(repository: Repository, statement: str) -> None:
    definition = json.loads(statement)["predicate"]["buildDefinition"]
    assert definition["externalParameters"]["variants"].keys() == {"BF16"}
    found = {
        entry["name"]: entry.get("digest", {}).get("sha256")
        for entry in definition["resolvedDependencies"]
    }
    checkpoint = repository.path / f"tests/checkpoints/{MODEL}"
    for name in ("config.json", "model-00003-of-00004.safetensors"):
        path = checkpoint / name
        assert found[name] == ranges.sha256(ranges.FileRange(path, 0, path.stat().st_size))
    programs = {"llama-quantize", "llama-server", "mtpforge"}
    assert programs | {"envs/run.txt", "envs/llama.cpp.txt"} <= found.keys()


def test_statement_names_no_local_path(repository: Repository, statement: str) -> None:
    assert str(repository.path) not in statement
    assert "tests/checkpoints" not in statement


def test_statement_is_valid_in_toto_and_slsa(statement: str) -> None:
    value = json.loads(statement)
    Statement.copy_from_pb(json_format.ParseDict(value, statement_pb2.Statement())).validate()
    # Parsing refuses keys that are not in SLSA's schema.
    predicate = json_format.ParseDict(value["predicate"], provenance_pb2.Provenance())
    dependencies = predicate.build_definition.resolved_dependencies
    assert len(dependencies) > 10
    assert all(entry.uri or entry.digest for entry in dependencies)


def test_model_that_fails_verification_is_not_uploaded(repository: Repository, hub: Hub) -> None:
    set_model(repository, min_acceptance=1.0)
    sent = [line for line in hub.requests if line.startswith("POST ")]
    commits = len(hub.commits)
    done = repository.snakemake(target="publish", **environment(hub, repository.path / "home"))
    assert done.returncode == 1
    assert "drafts accepted, fewer than 100%" in done.stdout + done.stderr
    assert [line for line in hub.requests if line.startswith("POST ")] == sent
    assert len(hub.commits) == commits


def test_the_rule_uploads_to_object_storage(tmp_path: Path, toolchain: Path) -> None:
    copy = Repository(tmp_path / "repository", toolchain)
    set_model(copy, publish={"url": "s3://models/tiny"})
    results = copy.path / "results" / MODEL
    results.mkdir(parents=True)
    (results / "README.md").write_text("card")
    (results.parent / "summary.md").touch()
    digest = ranges.digest_of(results / "README.md")
    (results / "SHA256SUMS").write_text(f"{digest}  README.md\n")
    with buckets.serve() as store:
        store.client.create_bucket(Bucket="models")
        done = copy.snakemake(
            "--allowed-rules", "publish", target="publish", **store.variables
        )  # nothing is built
        assert done.returncode == 0, done.stderr
        assert store.content("models") == {
            f"tiny/{name}": (results / name).read_bytes() for name in ("README.md", "SHA256SUMS")
        }
    written = [path for path in copy.path.rglob("*") if path.is_file()]
    assert len([path for path in written if "/.snakemake/" in str(path)]) > 1
    texts = [path.read_bytes() for path in written] + [(done.stdout + done.stderr).encode()]
    secrets = (buckets.KEY.encode(), buckets.SECRET.encode())
    assert not any(secret in text for text in texts for secret in secrets)
