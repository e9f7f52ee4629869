"""Models, bases and importance matrices from the Hub go through the workflow like local ones."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import CHECKPOINTS, ROOT
from hub import COMMIT, Fault, Hub, serve
from layouts import read_shard, write_shard
from mtpforge.gguf import head, reader
from repository import CONFIG, Repository

MODEL = "tiny-qwen3.5"
SHARD = "model-00001-of-00004.safetensors"
SOURCE = {"repo": f"Owner/{MODEL}", "revision": COMMIT}


@pytest.fixture
def remote(tmp_path: Path) -> Path:
    """The dense checkpoint as a repository."""
    return Path(
        shutil.copytree(
            CHECKPOINTS / MODEL, tmp_path / "remote", ignore=shutil.ignore_patterns("prompts")
        )
    )


def repository(path: Path, toolchain: Path, variants: dict[str, object]) -> Repository:
    """A repository whose only model comes from the Hub."""
    copy = Repository(path, toolchain)
    copy.config["models"] = {
        "fetched": {**CONFIG["models"][MODEL], "source": SOURCE, "variants": variants}
    }
    copy.write_config()
    return copy


def environment(hub: Hub, tmp_path: Path) -> dict[str, str]:
    return {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp_path / "home"),
        "MTPFORGE_RETRY_WAIT": "0.05",
    }


def weights(hub: Hub) -> int:
    return sum(count for name, count in hub.sent.items() if name.endswith(".safetensors"))


def test_a_hub_model_gives_the_same_file_as_a_local_one(
    tmp_path: Path, remote: Path, built: Path, toolchain: Path
) -> None:
    """Also after dropped connections, and a kill in the middle of a shard, which then resumes."""
    copy = repository(tmp_path / "repository", toolchain, {"BF16": {}})
    size = sum(path.stat().st_size for path in remote.glob("*.safetensors"))
    with serve({SOURCE["repo"]: remote}) as hub:
        hub.faults["model-00002-of-00004.safetensors"] = [
            Fault("drop", after=5000),
            Fault("expired", skip=1),
        ]
        hub.faults[SHARD] = [
            Fault("stall", after=1_000_000, skip=1)
        ]  # not while its header is read
        command = [sys.executable, "-m", "snakemake", "--cores", "2", "all"]
        variables = {**os.environ, **environment(hub, tmp_path), "HF_HUB_DOWNLOAD_TIMEOUT": "60"}
        with (tmp_path / "killed.log").open("w") as log:
            process = subprocess.Popen(
                command,
                cwd=copy.path,
                env=variables,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
            others = {f"{path.name}.json" for path in remote.glob("*.safetensors")} - {
                f"{SHARD}.json"
            }
            while hub.sent[SHARD] < 1_000_000 or not others <= {
                path.name for path in copy.path.rglob("records/*.json")
            }:
                assert process.poll() is None, (tmp_path / "killed.log").read_text()
                time.sleep(0.05)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        fetched = copy.path / f"resources/hub/Owner/{MODEL}/{COMMIT}"
        there = (fetched / MODEL / f".{SHARD}.part").stat().st_size
        assert there > 900_000 and not list(fetched.rglob(f"{SHARD}*"))
        hub.sent.clear()
        done = copy.snakemake(**environment(hub, tmp_path))
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        assert weights(hub) == (remote / SHARD).stat().st_size - there < size / 2
    name = f"{MODEL}-BF16.gguf"
    assert (copy.path / "results/fetched" / name).read_bytes() == (
        built / "results" / MODEL / name
    ).read_bytes()
    assert copy.pending() == {}  # even without the Hub: a commit does not change
    for shard in fetched.rglob("*.safetensors"):
        shard.touch()
    assert copy.pending() == {}


def test_a_hub_moe_gives_the_same_file_as_a_local_one(
    tmp_path: Path, built: Path, toolchain: Path
) -> None:
    name = "tiny-qwen3.5-moe"
    remote = Path(
        shutil.copytree(
            CHECKPOINTS / name, tmp_path / "remote", ignore=shutil.ignore_patterns("prompts")
        )
    )
    copy = repository(tmp_path / "repository", toolchain, {"BF16": {}})
    copy.config["models"]["fetched"]["source"] = {"repo": f"Owner/{name}", "revision": COMMIT}
    copy.write_config()
    with serve({f"Owner/{name}": remote}) as hub:
        done = copy.snakemake(**environment(hub, tmp_path))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert (copy.path / f"results/fetched/{name}-BF16.gguf").read_bytes() == (
        built / f"results/{name}/{name}-BF16.gguf"
    ).read_bytes()


def test_a_checkpoint_that_cannot_be_converted_is_refused_before_it_is_fetched(
    tmp_path: Path, remote: Path, toolchain: Path
) -> None:
    for shard in remote.glob("*.safetensors"):
        tensors = read_shard(shard)
        write_shard(shard, {n: t for n, t in tensors.items() if not n.startswith("mtp.")})
    (remote / "model.safetensors.index.json").unlink()
    copy = repository(tmp_path / "repository", toolchain, {"BF16": {}})
    with serve({SOURCE["repo"]: remote}) as hub:
        done = copy.snakemake(**environment(hub, tmp_path))
        assert done.returncode == 1 and "has lost its head" in done.stdout + done.stderr
        assert weights(hub) <= 4 * 65536
    assert list(copy.path.rglob("files.json")) == list(copy.path.rglob("*.safetensors.json")) == []


def test_injection_downloads_only_the_head(
    tmp_path: Path, remote: Path, built: Path, toolchain: Path
) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    shutil.copy(built / "results" / MODEL / "work/trunk/Q4_K_M.gguf", theirs / "base-Q4_K_M.gguf")
    base = {"repo": "They/base", "file": "base-Q4_K_M.gguf", "revision": COMMIT}
    copy = repository(
        tmp_path / "repository", toolchain, {"Q4_K_M-injected": {"base": base, "head": "Q8_0"}}
    )
    with serve({SOURCE["repo"]: remote, "They/base": theirs}) as hub:
        done = copy.snakemake(**environment(hub, tmp_path))
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        assert hub.sent["base-Q4_K_M.gguf"] == (theirs / base["file"]).stat().st_size
        headers = 4 * 65536
        assert weights(hub) <= headers + 1.01 * sum(
            path.stat().st_size for path in copy.path.rglob("head/*/*.safetensors")
        )
        assert weights(hub) < sum(path.stat().st_size for path in remote.glob("*.safetensors")) / 2
    name = f"{MODEL}-Q4_K_M-injected.gguf"
    report = json.loads(
        (copy.path / f"results/fetched/reports/{MODEL}-Q4_K_M-injected.json").read_text()
    )
    assert report["head_source"] == {"trusted on first use": 15}
    assert (copy.path / "results/fetched" / name).read_bytes() == (
        built / "results" / MODEL / name
    ).read_bytes()
    assert copy.pending() == {}


def test_a_variant_uses_an_imatrix_from_the_hub(
    tmp_path: Path, built: Path, toolchain: Path
) -> None:
    theirs = tmp_path / "theirs"
    (theirs / "matrices").mkdir(parents=True)
    model, text = (
        built / "results" / MODEL / f"{MODEL}-BF16.gguf",
        CHECKPOINTS / MODEL / "prompts" / "prose.txt",
    )
    (tmp_path / "text.txt").write_text(text.read_text() * 100)
    command = [
        toolchain / "llama-imatrix",
        "-m",
        model,
        "-f",
        tmp_path / "text.txt",
        "-o",
        theirs / "matrices" / "imatrix.gguf",
    ]
    options = ["-c", "512", "--chunks", "2", "-t", "1"]
    subprocess.run([*command, *options], check=True, capture_output=True)
    copy = Repository(tmp_path / "repository", toolchain)
    imatrix = {"repo": "They/matrices", "file": "matrices/imatrix.gguf", "revision": COMMIT}
    copy.config["models"] = {
        MODEL: {**CONFIG["models"][MODEL], "variants": {"IQ4_XS": {"imatrix": imatrix}}}
    }
    copy.write_config()
    with serve({"They/matrices": theirs}) as hub:
        done = copy.snakemake(**environment(hub, tmp_path))
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    made = reader.read(copy.path / "results" / MODEL / f"{MODEL}-IQ4_XS.gguf")
    assert made.get("quantize.imatrix.file") == "imatrix.gguf"  # no path of this machine


def test_a_split_base_from_the_hub_gets_its_head(
    tmp_path: Path, remote: Path, toolchain: Path
) -> None:
    theirs = tmp_path / "theirs" / "Q4_K_M"
    theirs.mkdir(parents=True)
    source = ROOT / "results" / MODEL / "work/trunk/Q4_K_M.gguf"
    command = [
        toolchain / "llama-gguf-split",
        "--split-max-size",
        "1M",
        source,
        theirs / f"{MODEL}-Q4_K_M",
    ]
    subprocess.run(command, check=True, capture_output=True)
    files = sorted(path.name for path in theirs.iterdir())
    base = {"repo": "They/base", "file": f"Q4_K_M/{files[0]}", "revision": COMMIT}
    copy = repository(tmp_path / "repository", toolchain, {"theirs": {"base": base}})
    with serve({SOURCE["repo"]: remote, "They/base": theirs.parent}) as hub:
        done = copy.snakemake(**environment(hub, tmp_path))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    fetched = copy.path / f"resources/hub/They/base/{COMMIT}/base/Q4_K_M"
    assert len(files) > 1 and sorted(path.name for path in fetched.iterdir()) == files
    assert all((fetched / name).read_bytes() == (theirs / name).read_bytes() for name in files)
    made = reader.read(next((copy.path / "results").glob("*/*-theirs.gguf")))
    assert head.trunk_digests(made) == head.trunk_digests(reader.read(source))


def test_add_prints_a_configuration_entry(tmp_path: Path, remote: Path, toolchain: Path) -> None:
    copy = Repository(tmp_path / "repository", toolchain)
    with serve({SOURCE["repo"]: remote}) as hub:
        command = [
            sys.executable,
            "-m",
            "snakemake",
            "--cores",
            "1",
            "add",
            "--config",
            f"repo={SOURCE['repo']}",
        ]
        variables = {**os.environ, **environment(hub, tmp_path)}
        done = subprocess.run(command, cwd=copy.path, env=variables, capture_output=True, text=True)
    assert (
        done.returncode == 0
        and f"    source: {{repo: {SOURCE['repo']}, revision: {COMMIT}}}\n" in done.stdout
    )
