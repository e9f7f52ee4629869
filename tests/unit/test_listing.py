"""The listing of a repository: written, read, and cheap for checkpoints of 200,000 tensors."""

import json
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import CHECKPOINTS
from hub import COMMIT
from mtpforge.checkpoint.safetensors import CheckpointTensor
from mtpforge.errors import DownloadError
from mtpforge.hub.listing import File, Listing
from mtpforge.rules import fetch
from mtpforge.rules.build import Build

COUNT = 10_000


def large() -> Listing:
    """Experts in FP8, each matrix with its scale, in shards of 1,000 tensors."""
    tensors = {}
    for i in range(COUNT):
        name = f"model.language_model.layers.{i // 512}.mlp.experts.{i % 512}.down_proj.weight"
        shard = f"model-{i // 1000 + 1:05}-of-00010.safetensors"
        tensors[name] = CheckpointTensor(
            name, "F8_E4M3", shape=(4096, 1024), shard=shard, offset=i * 4194304, size=4194304
        )
    files = {tensor.shard: File(5 * 10**9, "0" * 64) for tensor in tensors.values()}
    return Listing("Owner/large", COMMIT, files=files, tensors=tensors)


def peak(work: Callable[[], object]) -> float:
    """Bytes for each tensor that the work allocates at most."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1] / COUNT
    finally:
        tracemalloc.stop()


def test_a_listing_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "files.json"
    large().write(path)
    assert Listing.read(path) == large()
    odd = Listing('Owner/"x"', COMMIT, files={}, tensors={})
    odd.lost["mtp.fc.weight"] = "mtp.safetensors"
    odd.write(path)
    assert Listing.read(path) == odd and json.loads(path.read_text())["tensors"] == {}


def test_memory_for_many_tensors_is_bounded(tmp_path: Path) -> None:
    path = tmp_path / "files.json"
    listing = large()
    assert peak(lambda: listing.write(path)) < 50  # it is streamed
    assert path.stat().st_size / COUNT < 220
    assert peak(lambda: Listing.read(path)) < 900


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value.pop("tensors"),
        lambda value: value["tensors"]["a"].pop("shape"),
        lambda value: value["tensors"]["a"].update(shape=3),
        lambda value: value["tensors"]["a"].update(dtype=[]),
        lambda value: value["tensors"].update(a=1),
        lambda value: value["tensors"].update(a=dict.fromkeys("abcde", 1)),
        lambda value: value["tensors"]["a"].update(shape=["1"]),
        lambda value: value["tensors"]["a"].update(offset=1.5),
        lambda value: value["tensors"]["a"].update(size=True),
        lambda value: value["files"].update(a={"bytes": -1, "digest": ""}),
        lambda value: value["files"].update(a={"bytes": "1", "digest": ""}),
        lambda value: value["files"].update(a={}),
    ],
)
def test_a_malformed_listing_is_refused(
    tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    entry = {"dtype": "F32", "shape": [1], "shard": "s", "offset": 0, "size": 4}
    value = {"repo": "a/b", "revision": COMMIT, "files": {}, "tensors": {"a": entry}}
    path = tmp_path / "files.json"
    path.write_text(json.dumps(value))
    assert Listing.read(path).tensors["a"].shape == (1,)
    change(value)
    path.write_text(json.dumps(value))
    with pytest.raises(DownloadError, match="malformed listing"):
        Listing.read(path)


NESTED = {
    "nothing": "",
    "open lists": "[" * 100_000,
    "open objects": '{"a":' * 100_000,
    "digits": '{"files": ' + "9" * 5000 + "}",
    "empty lists": "[" + "[]," * 4_000_000,
}


@pytest.mark.parametrize("text", NESTED.values(), ids=NESTED)
def test_a_listing_of_nothing_but_nesting_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "files.json").write_text(text)
    start = time.process_time()
    with pytest.raises(DownloadError, match=r"files\.json: "):
        Listing.read(tmp_path / "files.json")
    assert time.process_time() - start < 1


def test_the_graph_parses_a_listing_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "files.json"
    large().write(path)
    parsed = []

    def read(path: Path) -> Listing:
        parsed.append(path)
        return large()

    monkeypatch.setattr(fetch.Listing, "read", read)
    source = {"repo": "Owner/large", "revision": COMMIT}
    models = {"m": {"source": source, "prompts": str(CHECKPOINTS / "tiny-qwen3.5/prompts")}}
    models["m"]["variants"] = {"BF16": {}}
    resolved = SimpleNamespace(get=lambda **_: SimpleNamespace(output=[str(path)]))
    build = Build({"models": models}, SimpleNamespace(resolve=resolved))
    jobs = [build.fetch.checkpoint_inputs(SimpleNamespace(model="m")) for _ in range(3)]
    assert len(parsed) == 1 and jobs[0] == jobs[2] and len(jobs[0]) == 10
    large().write(path)
    build.fetch.checkpoint_inputs(SimpleNamespace(model="m"))
    assert len(parsed) == 2


@pytest.mark.parametrize(
    ("model", "parts"),
    [
        ({}, "mtpforge:all"),
        ({"sidecar": "Q8_0", "mmproj": True}, "llama.cpp:mmproj mtpforge:all"),
        ({"variants": {"Q8_0": {"head": "none"}}}, "mtpforge:trunk"),
        ({"converter": "llama.cpp"}, "llama.cpp:all"),
        ({"converter": "llama.cpp", "sidecar": "Q8_0"}, "llama.cpp:all llama.cpp:draft"),
        (
            {"converter": "llama.cpp", "variants": {"a": {"base": {"type": "Q4_0"}}}},
            "llama.cpp:all llama.cpp:trunk",
        ),
        (
            {
                "variants": {
                    "a": {"base": {"repo": "a/b", "file": "c.gguf", "revision": COMMIT}},
                }
            },
            "mtpforge:head",
        ),
    ],
)
def test_the_parts_that_a_build_converts_are_checked(model: dict[str, Any], parts: str) -> None:
    source = {"repo": "Owner/model", "revision": COMMIT}
    made = Build({"models": {"m": {"source": source, "variants": {"BF16": {}}, **model}}})
    assert made.fetch.conversions(SimpleNamespace(**source)) == f"--convert {parts}"
    other = SimpleNamespace(repo="Owner/base", revision=COMMIT)
    assert made.fetch.conversions(other) == ""
