"""A model's folder is what the Hub gets: made by real Snakemake, uploaded to a Hub on loopback, checked as a download."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SCRIPTS, Run
from google.protobuf import json_format
from hub import Fault, Hub, serve
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement
from mtpforge.io import ranges
from repository import CONFIG, Repository

MODEL, TARGET, TOKEN = "tiny-qwen3.5", "Owner/tiny-qwen3.5-MTP-GGUF", "hf_VerySecretToken"
GGUFS = ["tiny-qwen3.5-BF16.gguf", "tiny-qwen3.5-Q8_0.gguf"]
PUBLISHED = sorted(
    [
        "README.md",
        "SHA256SUMS",
        *GGUFS,
        *(
            f"{folder}/{name.replace('gguf', 'json')}"
            for folder in ("provenance", "reports")
            for name in GGUFS
        ),
    ]
)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory, toolchain: Path) -> Repository:
    copy = Repository(tmp_path_factory.mktemp("publish") / "repository", toolchain)
    set_model(copy)
    done = copy.snakemake()
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return copy


def set_model(copy: Repository, **keys: object) -> None:
    copy.config["models"] = {
        MODEL: {**CONFIG["models"][MODEL], "publish": {"repo": TARGET}, **keys}
    }
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
    """Run the rule; all that it said."""
    done = copy.snakemake(*arguments, target="publish", **environment(hub, copy.path / "home"))
    said = done.stdout + done.stderr
    assert done.returncode == 0, said[-4000:]
    assert TOKEN not in said and all(
        TOKEN not in log.read_text() for log in (copy.path / "logs").rglob("*.log")
    )
    return said


def content(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_all_makes_a_folder_that_is_whole_and_a_second_run_makes_nothing(
    repository: Repository, run: Run
) -> None:
    results = repository.path / "results" / MODEL
    assert [
        line.split()[1] for line in (results / "SHA256SUMS").read_text().splitlines()
    ] == sorted(set(PUBLISHED) - {"SHA256SUMS"})
    assert run("check_results.py", results).returncode == 0
    assert (
        subprocess.run(
            ["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=results
        ).returncode
        == 0
    )
    assert repository.pending() == {}


def test_a_dry_run_lists_and_uploads_nothing(repository: Repository, hub: Hub) -> None:
    said = publish(repository, hub, "--config", "dry_run=true")
    assert f"{TARGET} (new repository): {len(PUBLISHED)} files to upload" in said
    for name in PUBLISHED:
        assert (
            f"{(repository.path / 'results' / MODEL / name).stat().st_size:>15,}  {name}\n" in said
        )
    assert hub.repositories == {} and hub.commits == [] and not hub.received


def test_the_first_run_uploads_all_and_the_second_nothing(repository: Repository, hub: Hub) -> None:
    publish(repository, hub)
    results = repository.path / "results" / MODEL
    assert hub.private == {TARGET} and hub.commits == [PUBLISHED]
    expected = {name: data for name, data in content(results).items() if name in PUBLISHED}
    there = content(hub.repositories[TARGET])
    assert {name: data for name, data in there.items() if name != ".gitattributes"} == expected
    assert {where for where, token in hub.tokens} == {"hub"} and {
        token for _, token in hub.tokens
    } == {f"Bearer {TOKEN}"}
    received = dict(hub.received)
    said = publish(repository, hub)
    assert (
        f"{TARGET}: 0 files to upload" in said
        and len(hub.commits) == 1
        and dict(hub.received) == received
    )
    for path in results.rglob("*"):
        path.touch()
    assert "0 files to upload" in publish(repository, hub) and len(hub.commits) == 1


def test_a_new_variant_uploads_itself_and_the_card_but_one_that_is_left_does_not(
    repository: Repository, hub: Hub
) -> None:
    set_model(repository, variants={"BF16": {}, "Q4_0": {}})
    pending = repository.pending()
    assert pending == {
        "recipe": 1,
        "plan": 1,
        "quantize": 1,
        "verify": 1,
        "summary": 1,
        "provenance": 1,
        "card": 1,
        "sums": 1,
    }
    said = publish(repository, hub)
    names = [
        "README.md",
        "SHA256SUMS",
        "provenance/tiny-qwen3.5-Q4_0.json",
        "reports/tiny-qwen3.5-Q4_0.json",
    ]
    assert hub.commits[1:] == [[*names, "tiny-qwen3.5-Q4_0.gguf"]]
    assert f"not uploaded: results/{MODEL}/tiny-qwen3.5-Q8_0.gguf is no longer configured" in said
    assert "left alone: tiny-qwen3.5-Q8_0.gguf is only in the repository" in said
    card = (hub.repositories[TARGET] / "README.md").read_text()
    assert "Q4_0" in card and "Q8_0.gguf" not in card


def test_a_download_is_checked_by_itself(hub: Hub, tmp_path: Path, run: Run) -> None:
    copy = Path(
        shutil.copytree(
            hub.repositories[TARGET], tmp_path / "copy", ignore=shutil.ignore_patterns("*Q8_0*")
        )
    )
    assert run("check_results.py", copy).returncode == 0

    def wrong() -> str:
        done = run("check_results.py", copy)
        assert (
            done.returncode == 1
            and "Traceback" not in done.stderr
            and done.stderr.startswith("error: ")
        )
        return done.stderr

    path = copy / "tiny-qwen3.5-Q4_0.gguf"
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    (copy / "another.gguf").write_bytes(data)
    (copy / "reports/tiny-qwen3.5-BF16.json").unlink()
    said = wrong()
    for text in (
        "Q4_0.gguf: its sha256 differs",
        "another.gguf: not listed",
        "reports/tiny-qwen3.5-BF16.json: missing",
    ):
        assert text in said
    assert "BF16.gguf" not in said
    path.unlink()
    assert "tiny-qwen3.5-Q4_0.gguf: missing" in wrong()
    (copy / "SHA256SUMS").unlink()
    assert "no such file" in wrong()


def test_an_interrupted_upload_goes_on(repository: Repository, tmp_path: Path) -> None:
    results = repository.path / "results" / MODEL
    (tmp_path / "objects").mkdir()
    command = [sys.executable, SCRIPTS / "publish.py", "--public", results, TARGET]
    with serve({}, tmp_path) as hub:
        variables = {**os.environ, **environment(hub, tmp_path / "home")}
        hub.faults["put"] = [Fault("stall")]
        process = subprocess.Popen(
            command, env=variables, start_new_session=True, stderr=subprocess.PIPE
        )
        while len(list((tmp_path / "objects").iterdir())) < 1 or len(hub.received) < 2:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        (there,) = (path.name for path in (tmp_path / "objects").iterdir())
        assert hub.commits == []
        hub.received.clear()
        done = subprocess.run(command, env=variables, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert (
            there not in hub.received
            and len(hub.received) == 1
            and len(hub.commits) == 1
            and hub.private == set()
        )


def test_what_the_hub_refuses_is_an_error(repository: Repository, hub: Hub, tmp_path: Path) -> None:
    command = [
        sys.executable,
        SCRIPTS / "publish.py",
        "--private",
        repository.path / "results" / MODEL,
        "Owner/other",
    ]
    variables = {**os.environ, **environment(hub, tmp_path / "home")}
    del variables["HF_TOKEN"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "error: Owner/other: is not allowed: set HF_TOKEN" in done.stderr


@pytest.mark.parametrize("name", [GGUFS[0], f"reports/{GGUFS[0].replace('gguf', 'json')}"])
@pytest.mark.parametrize(
    "later", [-60, 60]
)  # seconds; a fault of the disk leaves the time of a file as it was
def test_a_file_that_was_changed_after_its_proof_is_not_uploaded(
    repository: Repository, hub: Hub, tmp_path: Path, name: str, later: int
) -> None:
    copy = Path(shutil.copytree(repository.path / "results" / MODEL, tmp_path / "copy"))
    path = copy / name
    data = path.read_bytes()
    path.write_bytes(data[:-2] + bytes([data[-2] ^ 1]) + data[-1:])
    now = (copy / "SHA256SUMS").stat().st_mtime
    os.utime(path, (now + later, now + later))
    command = [sys.executable, SCRIPTS / "publish.py", "--private", copy, "Owner/another"]
    variables = {**os.environ, **environment(hub, tmp_path / "home")}
    commits = len(hub.commits)
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    assert (
        done.returncode == 1
        and "changed after SHA256SUMS was written" in done.stderr
        and len(hub.commits) == commits
    )


def test_the_statement_says_what_a_file_is_made_of(repository: Repository) -> None:
    """Nothing of this machine is in it, and the digests are those of the files."""
    text = (repository.path / f"results/{MODEL}/provenance/tiny-qwen3.5-BF16.json").read_text()
    statement = json.loads(text)
    definition = statement["predicate"]["buildDefinition"]
    assert definition["externalParameters"]["variants"].keys() == {"BF16"}
    found = {
        entry["name"]: entry.get("digest", {}).get("sha256")
        for entry in definition["resolvedDependencies"]
    }
    checkpoint = repository.path / f"tests/checkpoints/{MODEL}"
    for name in ("config.json", "model-00003-of-00004.safetensors"):
        assert found[name] == ranges.sha256(
            ranges.FileRange(checkpoint / name, 0, (checkpoint / name).stat().st_size)
        )
    assert {
        "llama-quantize",
        "llama-server",
        "mtpforge",
        "envs/run.txt",
        "envs/llama.cpp.txt",
    } <= found.keys()
    assert str(repository.path) not in text and "tests/checkpoints" not in text
    Statement.copy_from_pb(json_format.ParseDict(statement, statement_pb2.Statement())).validate()
    predicate = json_format.ParseDict(
        statement["predicate"], provenance_pb2.Provenance()
    )  # refuses keys that SLSA does not have
    dependencies = predicate.build_definition.resolved_dependencies
    assert len(dependencies) > 10 and all(entry.uri or entry.digest for entry in dependencies)


def test_a_model_that_fails_its_proof_is_not_uploaded(repository: Repository, hub: Hub) -> None:
    set_model(repository, min_acceptance=1.0)
    requests, commits = len(hub.requests), len(hub.commits)
    done = repository.snakemake(target="publish", **environment(hub, repository.path / "home"))
    assert done.returncode == 1 and "at least 100% must be" in done.stdout + done.stderr
    assert len(hub.requests) == requests and len(hub.commits) == commits
