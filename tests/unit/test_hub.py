"""Listing and downloading commits of a Hub on loopback with the real huggingface_hub client.

Connections break, servers misbehave, runs are killed.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import hostile_files
import httpx2
import numpy as np
import pytest
import yaml
from conftest import CHECKPOINTS, ROOT, SCRIPTS
from gguf.constants import GGMLQuantizationType, GGUFValueType
from hub import COMMIT, Fault, Hub, serve
from layouts import Tensors, four_bit, read_shard, read_tensors, write_checkpoint, write_shard
from mtpforge.checkpoint import safetensors
from mtpforge.checkpoint.checkpoint import Checkpoint
from mtpforge.errors import DownloadError
from mtpforge.gguf import reader, writer
from mtpforge.gguf.metadata import Value
from mtpforge.gguf.reader import TensorInfo
from mtpforge.hub import ranged_reads
from mtpforge.hub.listing import Listing
from mtpforge.rules.build import Build
from sparse import write_35b, write_sparse_shard

REPO = "Owner/tiny-qwen3.5"
SHARD = "model-00001-of-00004.safetensors"
TOKEN = "hf_thisIsASecretThatMustNotAppear"


class Client:
    """Runs the programs against a Hub on loopback: with a token, short waits and an empty cache."""

    def __init__(self, hub: Hub, path: Path) -> None:
        self.hub, self.path = hub, path
        self.source, self.listing = hub.repositories[REPO], path / "files.json"
        self.folder, self.home = path / "here" / "tiny-qwen3.5", path / "home"
        self.environment = {
            **os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(self.home), "HF_TOKEN": TOKEN,
            "HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1",
            "MTPFORGE_RETRY_WAIT": "0.02",
        }  # fmt: skip

    def command(self, program: str, *arguments: object) -> list[str]:
        return [sys.executable, str(SCRIPTS / program), *map(str, arguments)]

    def run(self, program: str, *arguments: object) -> "subprocess.CompletedProcess[str]":
        command = self.command(program, *arguments)
        done = subprocess.run(
            command, capture_output=True, text=True, env=self.environment, timeout=120
        )
        assert "Traceback" not in done.stderr and TOKEN not in done.stdout + done.stderr
        return done

    def resolve(
        self, repo: str = REPO, revision: str = COMMIT
    ) -> "subprocess.CompletedProcess[str]":
        return self.run("resolve.py", repo, "--revision", revision, "--out", self.listing)

    def fetch_arguments(self, name: str = SHARD) -> tuple[object, ...]:
        return (
            "fetch.py",
            self.listing,
            name,
            "--folder",
            self.folder,
            "--out",
            self.path / f"{name}.json",
        )

    def fetch(self, name: str = SHARD) -> "subprocess.CompletedProcess[str]":
        return self.run(*self.fetch_arguments(name))

    def refused(
        self, done: "subprocess.CompletedProcess[str]", *words: str, name: str = SHARD
    ) -> None:
        """One error line with these words, and no file under the final name."""
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode == 1 and len(errors) == 1, done.stderr
        for word in words:
            assert word in errors[0]
        assert not (self.folder / name).exists() and not (self.path / f"{name}.json").exists()

    def complete(self, done: "subprocess.CompletedProcess[str]", name: str = SHARD) -> None:
        """The file and its record are right, and no temporary file is left."""
        assert done.returncode == 0, done.stderr
        assert (self.folder / name).read_bytes() == (self.source / name).read_bytes()
        record = json.loads((self.path / f"{name}.json").read_text())
        assert record["name"] == name and record["bytes"] == (self.source / name).stat().st_size
        if name == SHARD:
            assert record["digests"] == reader.hashes(safetensors.ranges(self.source / name))
        assert [path.name for path in self.folder.glob(".*")] == []


@pytest.fixture(scope="module")
def listings() -> dict[str, bytes]:
    """A cache for the listing, which is the same in all tests."""
    return {}


@pytest.fixture
def client(tmp_path: Path, listings: dict[str, bytes]) -> Iterator[Client]:
    """A Hub with the dense checkpoint and files that must not be downloaded; its listing."""
    folder = Path(
        shutil.copytree(
            CHECKPOINTS / "tiny-qwen3.5",
            tmp_path / "repository",
            ignore=shutil.ignore_patterns("prompts"),
        )
    )
    for name in ("modeling.py", "pytorch_model.bin", "weights.pt", "images/a b.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("raise SystemExit('executed')")
    with serve({REPO: folder}) as hub:
        client_ = Client(hub, tmp_path)
        if not listings:
            done = client_.resolve()
            assert done.returncode == 0, done.stderr
            listings[REPO] = client_.listing.read_bytes()
        client_.listing.write_bytes(listings[REPO])
        hub.sent.clear()
        yield client_


# ── listing ──


@pytest.mark.parametrize(
    "name",
    ["101 MB of zeros", "10 million empty lists", "overlapping", "a gap", "a terminal escape"],
)
def test_a_hostile_header_is_refused(client: Client, tmp_path: Path, name: str) -> None:
    (case,) = [c for c in hostile_files.cases() if c.parser == "safetensors" and c.name == name]
    shard = sorted(client.source.glob("model-*.safetensors"))[0]
    shard.unlink()
    hostile_files.make(case._replace(file=shard.name), client.source)
    done = client.resolve()
    assert done.returncode == 1 and done.stderr.startswith("error: ")
    assert f"{REPO}/{shard.name}" in done.stderr and "\x1b" not in done.stderr
    assert len(done.stderr.splitlines()) <= 2 and client.hub.sent[shard.name] < 20_000_000


def test_a_listing_has_files_and_tensors(client: Client) -> None:
    listing = json.loads(client.listing.read_text())
    assert (listing["repo"], listing["revision"]) == (REPO, COMMIT)
    here = {path.name for path in client.source.iterdir() if path.is_file()}
    assert listing["files"].keys() == here
    for tensor in Checkpoint(client.source).tensors.values():
        entry = listing["tensors"].pop(tensor.name)
        assert entry == {
            "dtype": tensor.dtype, "shape": list(tensor.shape), "shard": tensor.shard,
            "offset": tensor.offset, "size": tensor.size
        }  # fmt: skip
    assert listing["tensors"] == {}


def test_listing_reads_only_headers_and_is_reproducible(client: Client) -> None:
    before = client.listing.read_bytes()
    client.hub.sent.clear()
    assert client.resolve().returncode == 0 and client.listing.read_bytes() == before
    assert all(
        count <= 65536 for name, count in client.hub.sent.items() if name.endswith(".safetensors")
    )
    assert not client.hub.sent.keys() & {"modeling.py", "pytorch_model.bin", "weights.pt"}


def test_a_branch_is_refused_with_its_commit(client: Client) -> None:
    client.listing.unlink()
    done = client.resolve(revision="main")
    assert (
        done.returncode == 1
        and f"write `revision: {COMMIT}`" in done.stderr
        and not client.listing.exists()
    )


@pytest.mark.parametrize(
    ("repo", "revision", "reason"),
    [
        ("Owner/other", COMMIT, "no such repository"),
        (REPO, "f" * 40, f"{REPO} at {'f' * 40}: has no such branch, tag or commit"),
        ("no repository", COMMIT, ""),
    ],
)
def test_a_missing_repository_is_refused(
    client: Client, repo: str, revision: str, reason: str
) -> None:
    client.listing.unlink()
    done = client.resolve(repo, revision)
    assert (
        done.returncode == 1
        and repo in done.stderr
        and reason in done.stderr
        and len(done.stderr.splitlines()) == 1
        and not client.listing.exists()
    )


@pytest.mark.parametrize(
    "name",
    ["../evil.safetensors", "/etc/evil.safetensors", "a\\b.safetensors", "x\n.safetensors", "a//b"],
)
def test_an_impossible_file_name_is_refused(client: Client, name: str) -> None:
    client.hub.names[SHARD] = name
    done = client.resolve()
    assert done.returncode == 1 and "refused" in done.stderr and len(done.stderr.splitlines()) == 1


def test_an_index_with_a_path_outside_the_repository_is_refused(client: Client) -> None:
    path = client.source / "model.safetensors.index.json"
    path.write_text(path.read_text().replace(SHARD, "../../evil.safetensors"))
    client.hub.digests.clear()
    done = client.resolve()
    assert done.returncode == 1 and "is not a plain *.safetensors file name" in done.stderr


def test_an_index_that_names_a_missing_shard_is_refused(client: Client) -> None:
    (client.source / SHARD).unlink()
    done = client.resolve()
    assert (
        done.returncode == 1 and f"names {SHARD}, which the repository does not have" in done.stderr
    )


@pytest.mark.parametrize("kind", ["busy", "broken"])
def test_a_busy_hub_is_retried(client: Client, kind: str) -> None:
    client.hub.faults["api"] = [Fault(kind)]
    assert client.resolve().returncode == 0
    client.hub.faults["api"] = [Fault("broken", -1)]
    done = client.resolve()
    assert done.returncode == 0 and "using an earlier listing of the same commit" in done.stderr
    client.listing.with_name(f".{client.listing.name}").unlink()
    done = client.resolve()
    assert done.returncode == 1 and "status 500: gave up after 6 tries" in done.stderr


MIRRORS = {
    "sha1": lambda path: f'"{hashlib.sha1(path.read_bytes()).hexdigest()}"',
    "sha256": lambda path: f'"{hashlib.sha256(path.read_bytes()).hexdigest()}"',
    "sha256 of something else": lambda path: f'"{hashlib.sha256(path.name.encode()).hexdigest()}"',
    "upper case": lambda path: f'"{hashlib.sha256(path.read_bytes()).hexdigest().upper()}"',
    "weak": lambda path: f'W/"{path.stat().st_size:x}-5f3c"',
    "without quotes": lambda path: "5f3c",
    "none": lambda path: "",
}


@pytest.mark.parametrize("etag", MIRRORS.values(), ids=MIRRORS)
def test_a_mirror_with_etags_of_its_own_works(client: Client, etag: Callable[[Path], str]) -> None:
    """The content is compared with the commit in any case."""
    before = client.listing.read_bytes()
    client.hub.mirror = etag
    assert client.resolve().returncode == 0 and client.listing.read_bytes() == before
    client.hub.faults[SHARD] = [Fault("drop", 2, after=5000)]
    for name in (SHARD, "config.json"):
        client.complete(client.fetch(name), name)
    head = ("--folder", client.path / "head", "--out", client.path / "head.json")
    assert client.run("fetch_head.py", client.listing, *head).returncode == 0
    (client.folder / SHARD).unlink()
    (client.path / f"{SHARD}.json").unlink()
    client.hub.faults[SHARD] = [Fault("content", -1)]
    client.refused(client.fetch(), "sha256 is")


def test_a_hub_that_links_another_digest_is_refused(client: Client) -> None:
    client.hub.digests[client.source / SHARD] = "1" * 64
    client.hub.sent.clear()
    client.refused(client.fetch(), "the server now reports 1111", "do not trust this server")
    assert not client.hub.sent[SHARD]


def test_a_rejected_token_is_named_as_the_cause(client: Client) -> None:
    """The repository is public: without the token everything works."""
    client.hub.rejects_tokens = True
    message = "your token was rejected (expired, revoked or mistyped)"
    client.refused(client.fetch(), message, "unset HF_TOKEN", "hf auth logout")
    client.listing.with_name(f".{client.listing.name}").unlink(missing_ok=True)
    done = client.resolve()
    assert done.returncode == 1 and message in done.stderr
    del client.environment["HF_TOKEN"]
    assert client.resolve().returncode == 0
    client.complete(client.fetch())


def test_a_token_with_other_characters_than_ascii_is_named_as_the_cause(client: Client) -> None:
    """As one that was copied with typographic quotes."""
    client.environment["HF_TOKEN"] = "\u201chf_token\u201d"
    done = client.resolve()
    assert done.returncode == 1 and "your token has characters that no token has" in done.stderr


def test_a_token_without_access_is_told_from_no_token(client: Client) -> None:
    client.hub.closed.add(REPO)
    client.refused(client.fetch(), "is gated, and your token does not open it")
    assert "that your token cannot read" in client.resolve("Owner/private").stderr
    del client.environment["HF_TOKEN"]
    client.refused(client.fetch(), "is gated: accept its terms", "set HF_TOKEN")
    assert "a private one: check the name, set HF_TOKEN" in client.resolve("Owner/private").stderr


def test_a_renamed_repository_works_under_its_old_name(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    client.hub.renamed["Old/name"] = REPO
    done = client.resolve("Old/name")
    assert done.returncode == 0
    assert f"Old/name is now called {REPO}: write `repo: {REPO}`" in done.stderr
    client.complete(client.fetch())
    assert f"source: {{repo: {REPO}," in client.run("add.py", "Old/name").stdout
    assert "is now called" not in client.resolve().stderr


def test_a_redirect_from_a_mirror_does_not_get_the_token(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[httpx2.Request] = []
    digest = "1" * 64

    def answer(request: httpx2.Request) -> httpx2.Response:
        asked.append(request)
        return httpx2.Response(
            302,
            headers={"Location": "https://huggingface.co/Owner/x", "X-Linked-ETag": f'"{digest}"'},
            request=request,
        )

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(ranged_reads.constants, "ENDPOINT", "https://mirror.example")
    monkeypatch.setattr(
        ranged_reads, "get_session", lambda: httpx2.Client(transport=httpx2.MockTransport(answer))
    )
    assert ranged_reads._metadata("https://mirror.example/Owner/x") == (
        "https://huggingface.co/Owner/x",
        digest,
        None,
    )
    assert [(request.url.host, "authorization" in request.headers) for request in asked] == [
        ("mirror.example", True)
    ]
    assert "authorization" not in ranged_reads._headers("https://huggingface.co/Owner/x")


def test_a_malformed_token_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_\u00fc")
    with pytest.raises(DownloadError, match="invalid characters"):
        ranged_reads._headers(f"{ranged_reads.constants.ENDPOINT}/x")


def test_add_prints_a_valid_configuration_entry(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    done = client.run("add.py", f"{client.hub.endpoint}/{REPO}/tree/main")
    config = yaml.safe_load("models:\n" + done.stdout)
    assert config["models"]["tiny-qwen3.5"]["source"] == {"repo": REPO, "revision": COMMIT}
    assert Build(config).files() == [
        f"results/tiny-qwen3.5/tiny-qwen3.5-{variant}.gguf" for variant in ("BF16", "Q4_K_M")
    ]


def test_add_names_the_converter_of_an_architecture(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    path = client.source / "config.json"
    path.write_text(
        path.read_text().replace("Qwen3_5ForConditionalGeneration", "Glm4MoeForCausalLM")
    )
    config = yaml.safe_load("models:\n" + client.run("add.py", REPO).stdout)
    assert Build(config).config.models["tiny-qwen3.5"].converter == "llama.cpp"
    path.write_text(path.read_text().replace("Glm4MoeForCausalLM", "OtherForCausalLM"))
    client.hub.digests.clear()
    done = client.run("add.py", REPO)
    assert done.returncode == 1 and "unknown architecture OtherForCausalLM" in done.stderr


def pack(client: Client) -> None:
    """Make the last shard one of an NVFP4 checkpoint, whose settings lie beside config.json."""
    shard = sorted(client.source.glob("*.safetensors"))[-1]
    tensors = read_shard(shard)
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    rows, columns = tensors[name][1].shape
    tensors[name] = ("U8", np.zeros((rows, columns // 2), np.uint8))
    write_shard(shard, tensors)
    settings = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "NVFP4"}}
    (client.source / "hf_quant_config.json").write_text(json.dumps(settings))
    client.hub.digests.clear()


def test_a_checkpoint_that_cannot_be_converted_is_refused_before_its_weights(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    client.listing.unlink()
    pack(client)
    arguments = (REPO, "--revision", COMMIT, "--convert", "mtpforge:all", "--out", client.listing)
    for program, given in {"resolve.py": arguments, "add.py": (REPO,)}.items():
        client.hub.sent.clear()
        done = client.run(program, *given)
        assert done.returncode == 1 and len(done.stderr.splitlines()) == 1
        assert REPO in done.stderr and "quant_method modelopt, quant_algo NVFP4" in done.stderr
        headers = [n for name, n in client.hub.sent.items() if name.endswith(".safetensors")]
        assert max(headers) <= 65536
    assert not client.listing.exists()
    assert client.resolve().returncode == 0  # it may have a base


@pytest.mark.parametrize("stem", ["model-mtp", "model_mtp", "mtp-bf16", "model.mtp", "nextn"])
def test_a_head_beside_the_index_is_listed(client: Client, stem: str) -> None:
    head, weight_map = {}, {}
    for shard in sorted(client.source.glob("*.safetensors")):
        tensors = read_shard(shard)
        head |= {n: t for n, t in tensors.items() if n.startswith("mtp.")}
        write_shard(shard, {n: t for n, t in tensors.items() if n not in head})
        weight_map |= {n: shard.name for n in tensors if n not in head}
    write_shard(client.source / f"{stem}.safetensors", head)
    index = client.source / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    client.hub.digests.clear()
    arguments = (REPO, "--revision", COMMIT, "--convert", "mtpforge:all", "--out", client.listing)
    assert client.run("resolve.py", *arguments).returncode == 0
    listing = Listing.read(client.listing)
    found = {tensor.shard for name, tensor in listing.tensors.items() if name.startswith("mtp.")}
    assert found == {f"{stem}.safetensors"} and found < set(listing.checkpoint_files())


def test_what_can_be_converted_is_listed(client: Client) -> None:
    before = client.listing.read_bytes()
    kinds = ("mtpforge:all", "mtpforge:head")
    done = client.run(
        "resolve.py", REPO, "--revision", COMMIT, "--convert", *kinds, "--out", client.listing
    )
    assert done.returncode == 0 and client.listing.read_bytes() == before


def test_add_proposes_shards_for_files_that_the_hub_would_refuse(client: Client) -> None:
    large = client.path / "large"
    write_35b(large)
    client.hub.repositories["Owner/large"] = large
    client.hub.digests |= dict.fromkeys(large.glob("*.safetensors"), "0" * 64)
    config = yaml.safe_load("models:\n" + client.run("add.py", "Owner/large").stdout)
    variants = config["models"]["large"]["variants"]
    assert variants == {"BF16": {"split": "48G"}, "Q4_K_M": {}}  # 71 and 22 GB


def test_add_proposes_the_type_that_a_packed_checkpoint_has(
    client: Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    config = json.loads((client.source / "config.json").read_text())
    packed = four_bit(config, read_tensors(client.source))
    folder = write_checkpoint(client.path / "packed", client.source, config, packed)
    client.hub.repositories["Owner/packed"] = folder
    entry = yaml.safe_load("models:\n" + client.run("add.py", "Owner/packed").stdout)
    assert entry["models"]["packed"]["converter"] == "llama.cpp"
    assert entry["models"]["packed"]["variants"] == {"NVFP4": {}}
    assert Build(entry).files() == ["results/packed/packed-NVFP4.gguf"]
    refused = client.run("add.py", "Owner/packed", "--type", "Q4_K_M")
    assert refused.returncode == 1 and "is packed as NVFP4, and stays so" in refused.stderr


def test_a_stale_index_is_named_where_a_head_is_lost(client: Client) -> None:
    for shard in client.source.glob("*.safetensors"):
        kept = {n: t for n, t in read_shard(shard).items() if not n.startswith("mtp.")}
        write_shard(shard, kept)
    client.hub.digests.clear()
    arguments = (REPO, "--revision", COMMIT, "--convert", "mtpforge:all", "--out", client.listing)
    refused = client.run("resolve.py", *arguments)
    assert refused.returncode == 1 and "the head is lost, the index is stale" in refused.stderr
    assert client.resolve().returncode == 0
    options = ("--folder", client.path / "head", "--out", client.path / "head.json")
    done = client.run("fetch_head.py", client.listing, *options)
    assert done.returncode == 1 and "which lists it, is stale" in done.stderr
    printed = client.run("add.py", REPO).stdout
    assert "without a head, which its stale index lists" in printed


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("mtp/model.safetensors", "copy it beside the other shards as mtp.safetensors"),
        ("nextn.safetensors", "has no tensor named as a head's"),
    ],
)
def test_add_names_a_file_that_may_be_the_head(client: Client, name: str, hint: str) -> None:
    head: Tensors = {}
    for shard in client.source.glob("*.safetensors"):
        tensors = read_shard(shard)
        head |= {n: t for n, t in tensors.items() if n.startswith("mtp.")}
        write_shard(shard, {n: t for n, t in tensors.items() if not n.startswith("mtp.")})
    (client.source / "model.safetensors.index.json").unlink()
    (client.source / name).parent.mkdir(exist_ok=True)
    write_shard(client.source / name, {n.replace("mtp.", "other."): t for n, t in head.items()})
    client.hub.digests.clear()
    printed = client.run("add.py", REPO).stdout
    assert f"{name} " in printed and hint in printed and "head: none" in printed
    assert yaml.safe_load(f"models:\n{printed}")["models"]


def test_add_leaves_out_a_lost_head(client: Client) -> None:
    for shard in client.source.glob("*.safetensors"):
        kept = {n: t for n, t in read_shard(shard).items() if not n.startswith("mtp.")}
        write_shard(shard, kept)
    (client.source / "model.safetensors.index.json").unlink()
    client.hub.digests.clear()
    printed = client.run("add.py", REPO).stdout
    assert "without a head" in printed and "Q4_K_M: {head: none}" in printed


# ── fetching ──


def test_every_file_that_conversion_reads_is_downloaded(client: Client) -> None:
    names = sorted(
        path.name
        for path in (CHECKPOINTS / "tiny-qwen3.5").iterdir()
        if path.is_file() and path.name != "reference.json"
    )
    for name in names:
        client.complete(client.fetch(name), name)
    copy, original = Checkpoint(client.folder), Checkpoint(client.source)
    assert copy.tensors == original.tensors and copy.config == original.config


def test_a_complete_file_is_hashed_and_not_downloaded_again(client: Client) -> None:
    client.complete(client.fetch())
    client.hub.sent.clear()
    client.complete(client.fetch())
    assert client.hub.sent[SHARD] == 0
    (client.folder / SHARD).write_bytes(bytes((client.source / SHARD).stat().st_size))  # damage it
    client.complete(client.fetch())


PASSING = {
    "drop": [Fault("drop", 3, after=5000)],
    "stall": [Fault("stall", after=70000)],
    "broken": [Fault("broken", 2)],
    "expired": [Fault("expired")],
    "short": [Fault("short")],
    "part short": [Fault("drop", after=5000), Fault("short", skip=1)],
    "wrong range": [Fault("drop", after=5000), Fault("wrong range")],
    "whole for a part": [Fault("drop", after=5000), Fault("whole", 2)],
    "whole for every part": [Fault("drop", after=5000), Fault("whole", -1)],
    "expired in between": [Fault("drop", after=5000), Fault("expired", skip=1)],
}


@pytest.mark.parametrize("faults", PASSING.values(), ids=PASSING.keys())
def test_a_download_survives_a_fault(client: Client, faults: list[Fault]) -> None:
    client.hub.faults[SHARD] = faults
    client.complete(client.fetch())
    assert all(fault.times <= 0 and fault.skip == 0 for fault in faults)  # each fault happened


LASTING = {
    "drop": ([Fault("drop", -1)], "the connection failed"),
    "stall": ([Fault("stall", -1)], "no answer in time"),
    "broken": ([Fault("broken", -1)], "status 500"),
    "expired": ([Fault("expired", -1)], "the address has expired"),
    "short": ([Fault("short", -1)], "Content-Length is"),
    "wrong range": ([Fault("drop", after=5000), Fault("wrong range", -1)], "Content-Range is"),
    "another ETag": (
        [Fault("drop", after=5000), Fault("etag", -1, skip=1)],
        "changed during the download",
    ),
    "wrong content": ([Fault("content", -1)], "sha256 is"),
}


@pytest.mark.parametrize(("faults", "message"), LASTING.values(), ids=LASTING.keys())
def test_a_permanent_fault_ends_with_one_error_line(
    client: Client, faults: list[Fault], message: str
) -> None:
    client.hub.faults[SHARD] = faults
    client.refused(client.fetch(), REPO, SHARD, message)
    client.hub.faults.clear()
    client.complete(client.fetch())


def test_a_small_file_is_checked_by_its_git_id(client: Client) -> None:
    client.hub.faults["tokenizer.json"] = [Fault("content")]
    client.refused(
        client.fetch("tokenizer.json"), "tokenizer.json", "git id is", name="tokenizer.json"
    )
    client.complete(client.fetch("tokenizer.json"), "tokenizer.json")


@pytest.mark.parametrize("kind", ["busy", "busy until"])
def test_retry_after_is_respected(client: Client, kind: str) -> None:
    client.hub.faults[SHARD] = [Fault(kind)]
    start = time.monotonic()
    client.complete(client.fetch())
    assert time.monotonic() - start >= 1


def test_a_killed_download_resumes(client: Client) -> None:
    client.hub.faults[SHARD] = [Fault("stall", after=1_500_000)]
    client.environment["HF_HUB_DOWNLOAD_TIMEOUT"] = "60"
    process = subprocess.Popen(client.command(*client.fetch_arguments()), env=client.environment)
    partial = client.folder / f".{SHARD}.part"
    while not (
        partial.exists() and partial.stat().st_size >= 1_400_000
    ):  # the rest may still be buffered
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    there, size = partial.stat().st_size, (client.source / SHARD).stat().st_size
    assert not (client.folder / SHARD).exists()
    client.hub.sent.clear()
    client.complete(client.fetch())
    assert client.hub.sent[SHARD] == size - there


def test_a_second_download_of_the_same_file_is_refused(client: Client) -> None:
    client.hub.faults[SHARD] = [Fault("stall", after=5000)]
    client.environment["HF_HUB_DOWNLOAD_TIMEOUT"] = "60"
    with subprocess.Popen(
        client.command(*client.fetch_arguments()), env=client.environment
    ) as process:
        while client.hub.sent[SHARD] < 5000:
            time.sleep(0.02)
        client.refused(client.fetch(), "another process is writing it")
        process.kill()


def test_only_the_hub_gets_the_token(client: Client) -> None:
    client.hub.gated.add(REPO)
    client.complete(client.fetch())
    assert set(client.hub.tokens) == {("hub", f"Bearer {TOKEN}")} and client.hub.sent[SHARD]
    kept = [
        path
        for path in client.path.rglob("*")
        if path.is_file() and client.source not in path.parents
    ]
    assert not any(TOKEN.encode() in path.read_bytes() for path in kept)
    (client.folder / SHARD).unlink()
    (client.path / f"{SHARD}.json").unlink()
    del client.environment["HF_TOKEN"]
    client.refused(client.fetch(), "is gated", "HF_TOKEN")
    client.home.mkdir(exist_ok=True)
    (client.home / "token").write_text(TOKEN)  # a stored login
    client.complete(client.fetch())


def test_a_file_in_the_local_cache_is_linked(client: Client) -> None:
    digest = json.loads(client.listing.read_text())["files"][SHARD]["digest"]
    blob = client.home / "hub/models--Owner--tiny-qwen3.5/blobs" / digest
    blob.parent.mkdir(parents=True)
    shutil.copy(client.source / SHARD, blob)
    client.hub.sent.clear()
    client.environment["HF_HUB_OFFLINE"] = "1"
    client.complete(client.fetch())
    assert client.hub.sent[SHARD] == 0 and (client.folder / SHARD).samefile(blob)
    (client.folder / SHARD).unlink()
    blob.write_bytes(bytes(blob.stat().st_size))  # damaged: neither used nor changed
    del client.environment["HF_HUB_OFFLINE"]
    client.complete(client.fetch())
    assert client.hub.sent[SHARD] == (client.source / SHARD).stat().st_size and not any(
        blob.read_bytes()
    )


def test_offline_mode_sends_no_request(client: Client) -> None:
    client.hub.requests.clear()
    client.environment["HF_HUB_OFFLINE"] = "1"
    client.refused(client.fetch(), "HF_HUB_OFFLINE is set")
    assert client.hub.requests == []


def test_disk_space_is_checked_before_the_first_byte(client: Client) -> None:
    huge = 10**13
    write_sparse_shard(client.source / SHARD, {"model.huge": (huge // 2,)})
    index = client.source / "model.safetensors.index.json"
    table = json.loads(index.read_text())["weight_map"]
    kept = {name: shard for name, shard in table.items() if shard != SHARD}
    index.write_text(json.dumps({"weight_map": {**kept, "model.huge": SHARD}}))
    client.hub.digests = {client.source / SHARD: "0" * 64}
    assert client.resolve().returncode == 0
    client.hub.sent.clear()
    client.refused(
        client.fetch("config.json"),
        f"{SHARD}: not enough space",
        "needs 10000.00 GB",
        "free some space",
        name="config.json",
    )
    assert not client.hub.sent


# ── folders and parts ──


def test_additional_chat_templates_are_downloaded_with_the_checkpoint(client: Client) -> None:
    name, other = "additional_chat_templates/tool_use.jinja", "templates/other.jinja"
    for path in (client.source / name, client.source / other):
        path.parent.mkdir()
        path.write_text("{{ 'tools' }}")
    assert client.resolve().returncode == 0
    files = Listing.read(client.listing).checkpoint_files()
    assert name in files and other not in files
    head = ("--folder", client.folder, "--out", client.path / "head.json")
    assert client.run("fetch_head.py", client.listing, *head).returncode == 0
    assert (client.folder / name).read_text() == "{{ 'tools' }}"


def test_adapters_and_optimizer_states_are_not_downloaded(client: Client) -> None:
    tensors = {"base_model.model.lora_A.weight": ("F32", np.zeros(4, "<f4"))}
    for name in ("adapter_model", "optimizer", "consolidated"):
        write_shard(client.source / f"{name}.safetensors", tensors)
    before = client.listing.read_bytes()
    assert client.resolve().returncode == 0
    listing = Listing.read(client.listing)
    client.listing.write_bytes(before)
    assert listing.tensors == Listing.read(client.listing).tensors
    assert not {"adapter_model.safetensors", "optimizer.safetensors"} & {
        *listing.checkpoint_files()
    }


def add_file(client: Client, name: str, content: bytes) -> bytes:
    """Add a file to the repository; list the commit again with `client.resolve()`."""
    (client.source / name).parent.mkdir(parents=True, exist_ok=True)
    (client.source / name).write_bytes(content)
    return content


PARTS = [os.urandom(size) for size in (300_000, 200_000, 100)]
WHOLE = b"".join(PARTS)


def add_parts(client: Client, *numbers: int, count: int = 3, name: str = "Q4/x.gguf") -> None:
    for number in numbers:
        add_file(client, f"{name}.part{number}of{count}", PARTS[number - 1])
    assert client.resolve().returncode == 0


def test_a_file_in_a_folder_is_downloaded_into_that_folder(client: Client) -> None:
    names = ("Q4_K_M/x-00001-of-00002.gguf", "UD/imatrix/m.dat", "Q4_K_M/notes.txt")
    for name in names:
        add_file(client, name, os.urandom(50_000))
    assert client.resolve().returncode == 0
    for name in names:
        (client.path / name).parent.mkdir(parents=True, exist_ok=True)
        client.hub.faults[Path(name).name] = [Fault("drop", after=5000)]
        client.complete(client.fetch(name), name)
    done = client.fetch("x-00001-of-00002.gguf")
    client.refused(done, "but Q4_K_M/x-00001-of-00002.gguf", name="x-00001-of-00002.gguf")


def test_shards_in_folders_are_no_part_of_the_checkpoint(client: Client) -> None:
    before = json.loads(client.listing.read_text())
    add_file(client, "checkpoint-500/model.safetensors", b"no safetensors at all")
    assert client.resolve().returncode == 0
    assert json.loads(client.listing.read_text())["tensors"] == before["tensors"]


def test_parts_of_a_gguf_are_joined(client: Client) -> None:
    add_parts(client, 3, 1, 2)
    client.hub.faults["x.gguf.part2of3"] = [Fault("drop", 2, after=5000)]
    (client.path / "Q4").mkdir()
    done = client.fetch("Q4/x.gguf")
    assert done.returncode == 0, done.stderr
    assert "0.50 MB, joined from 3 parts" in done.stdout
    assert (client.folder / "Q4/x.gguf").read_bytes() == WHOLE
    assert [path.name for path in (client.folder / "Q4").iterdir()] == ["x.gguf"]
    record = json.loads((client.path / "Q4/x.gguf.json").read_text())
    assert record["sha256"] == hashlib.sha256(WHOLE).hexdigest()
    assert record["bytes"] == len(WHOLE)
    assert record["parts"] == {
        f"Q4/x.gguf.part{i}of3": hashlib.sha256(part).hexdigest() for i, part in enumerate(PARTS, 1)
    }
    client.hub.sent.clear()
    assert client.fetch("Q4/x.gguf").returncode == 0 and not client.hub.sent
    damaged = bytearray(WHOLE)
    damaged[-1] ^= 1
    (client.folder / "Q4/x.gguf").write_bytes(damaged)
    assert client.fetch("Q4/x.gguf").returncode == 0
    assert (client.folder / "Q4/x.gguf").read_bytes() == WHOLE


def test_a_wrong_part_is_refused_and_the_good_ones_are_kept(client: Client) -> None:
    add_parts(client, 1, 2, 3)
    (client.path / "Q4").mkdir()
    client.hub.faults["x.gguf.part2of3"] = [Fault("content")]
    client.refused(client.fetch("Q4/x.gguf"), "Q4/x.gguf.part2of3: its sha256", name="Q4/x.gguf")
    client.hub.sent.clear()
    assert client.fetch("Q4/x.gguf").returncode == 0
    assert (client.folder / "Q4/x.gguf").read_bytes() == WHOLE
    assert set(client.hub.sent) == {"x.gguf.part2of3", "x.gguf.part3of3"}


def test_a_missing_part_is_named_before_anything_is_downloaded(client: Client) -> None:
    add_parts(client, 1, 3)
    client.hub.sent.clear()
    done = client.fetch("Q4/x.gguf")
    client.refused(done, "Q4/x.gguf: part 2 of 3 is missing", name="Q4/x.gguf")
    add_parts(client, 1, count=2)
    done = client.fetch("Q4/x.gguf")
    client.refused(done, "has parts of several cuts", name="Q4/x.gguf")
    assert not any(name.startswith("x.gguf") for name in client.hub.sent)


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/../x", "a//x", "a\\x", "./x", "a/", ""])
def test_a_path_outside_the_folder_is_refused(client: Client, name: str) -> None:
    arguments = ("--folder", client.folder, "--out", client.path / "x")
    done = client.run("fetch.py", client.listing, name, *arguments)
    client.refused(done, "plain file name")


def test_a_file_that_is_not_in_the_commit_is_refused(client: Client) -> None:
    client.refused(client.fetch("model.gguf"), "has no file model.gguf", name="model.gguf")


# ── bases ──


def write_base(path: Path, *blocks: int) -> Path:
    """A GGUF with tensors in these blocks, of three of which the last is the head."""
    metadata = {
        "general.architecture": Value.of("qwen35", GGUFValueType.STRING),
        "qwen35.block_count": Value.of(3, GGUFValueType.UINT32),
        "qwen35.nextn_predict_layers": Value.of(1, GGUFValueType.UINT32),
        "long": Value.of("x" * (3 << 20), GGUFValueType.STRING),
    }
    infos = [
        TensorInfo(f"blk.{block}.attn_q.weight", (32, 32), GGMLQuantizationType.Q8_0)
        for block in blocks
    ]
    path.parent.mkdir(exist_ok=True)
    writer.write(path, metadata, [(info, [memoryview(bytes(info.size))]) for info in infos])
    return path


def test_a_base_with_a_head_is_noticed_before_anything_is_built(
    client: Client, tmp_path: Path
) -> None:
    with_head = write_base(tmp_path / "base" / "x-Q8_0.gguf", 0, 1, 2)
    lost = write_base(tmp_path / "base" / "x-Q4_0.gguf", 0, 1)
    client.hub.repositories["Owner/base"] = with_head.parent
    said = "x-Q8_0.gguf: has a head already (1 tensors, Q8_0), so nothing is built"
    for base in ("Owner/base:Q8_0", with_head):
        done = client.run("add.py", client.source, "--base", base)
        assert done.returncode == 1 and said in done.stderr, done.stderr
        done = client.run("add.py", client.source, "--base", base, "--replace-head")
        assert done.returncode == 0 and "replace_head: true" in done.stdout, done.stderr
    for base in ("Owner/base:Q4_0", lost):
        assert client.run("add.py", client.source, "--base", base).returncode == 0
    del client.hub.repositories["Owner/base"]


def test_of_a_base_only_the_header_is_read(client: Client, tmp_path: Path) -> None:
    base = write_base(tmp_path / "base" / "x-Q8_0.gguf", *range(3), *range(3, 3000))
    client.hub.repositories["Owner/base"] = base.parent
    done = client.run("add.py", client.source, "--base", "Owner/base:Q8_0")
    assert "has a head already" in done.stderr
    assert (3 << 20) < client.hub.sent[base.name] < base.stat().st_size - (1 << 20)
    del client.hub.repositories["Owner/base"]
