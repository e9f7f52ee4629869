"""With `profiles/lean` a build frees its shards, and gives the same verified files.

With `profiles/shards` it fetches, converts and quantizes them one by one.
"""

import json
import shutil
from pathlib import Path

import numpy as np
from conftest import CHECKPOINTS, Run
from hub import COMMIT, serve
from layouts import read_shard, write_shard
from repository import CONFIG, Repository

MODEL = "tiny-qwen3.5"
REPO = f"Owner/{MODEL}"
SHARD = "model-00001-of-00004.safetensors"
EMBEDDINGS = "model.language_model.embed_tokens.weight"
TOKENS = 8192
LEAN = ("--workflow-profile", "profiles/lean")
BY_SHARDS = ("--workflow-profile", "profiles/shards")


def write_padded(folder: Path) -> None:
    """Write the checkpoint with so many tokens that its embeddings are compared by sample."""
    shutil.copytree(CHECKPOINTS / MODEL, folder)
    tensors = read_shard(folder / SHARD)
    dtype, words = tensors[EMBEDDINGS]
    padding = np.zeros((TOKENS - len(words), words.shape[1]), words.dtype)
    tensors[EMBEDDINGS] = (dtype, np.concatenate([words, padding]))
    write_shard(folder / SHARD, tensors)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["vocab_size"] = TOKENS
    (folder / "config.json").write_text(json.dumps(config))


def test_a_lean_build_frees_its_shards_and_gives_the_same_files(
    tmp_path: Path, run: Run, toolchain: Path
) -> None:
    write_padded(tmp_path / MODEL)
    copy = Repository(tmp_path / "repository", toolchain)
    source = {"repo": REPO, "revision": COMMIT}
    variants = {"BF16": {}, "Q4_K_M": {"head": "Q8_0"}}
    copy.config["models"] = {
        "lean": {**CONFIG["models"][MODEL], "source": source, "variants": variants}
    }
    copy.write_config()
    with serve({REPO: tmp_path / MODEL}) as hub:
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
        done = copy.snakemake(*LEAN, **environment)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert copy.pending() == {}  # by the default profile too, and without the Hub
    fetched = copy.path / f"resources/hub/{REPO}/{COMMIT}/{MODEL}"
    whole = (fetched / SHARD).stat()
    assert whole.st_size == (tmp_path / MODEL / SHARD).stat().st_size
    assert whole.st_blocks * 512 < 0.5 * whole.st_size
    run("convert.py", tmp_path / MODEL, "--tokenizer-pre", "qwen35", "--out", tmp_path / "a")
    options = ("--type", "Q4_K_M", "--head", "Q8_0", "--threads", 1, "--bin", toolchain)
    run("quantize.py", tmp_path / "a", *options, "--out", tmp_path / "b")
    for name, expected in (("BF16", "a"), ("Q4_K_M", "b")):
        made = copy.path / f"results/lean/{MODEL}-{name}.gguf"
        assert made.read_bytes() == (tmp_path / expected).read_bytes()


def test_a_build_shard_by_shard_gives_the_same_files_without_bf16(
    tmp_path: Path, run: Run, toolchain: Path
) -> None:
    write_padded(tmp_path / MODEL)
    copy = Repository(tmp_path / "repository", toolchain)
    source = {"repo": REPO, "revision": COMMIT}
    variants = {"Q8_0": {}, "Q4_K_M": {"head": "Q6_K", "tensors": {"attn_": "Q5_K"}}}
    copy.config["models"] = {
        "lean": {**CONFIG["models"][MODEL], "source": source, "variants": variants}
    }
    copy.write_config()
    with serve({REPO: tmp_path / MODEL}) as hub:
        environment = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home")}
        done = copy.snakemake(*BY_SHARDS, **environment)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert copy.pending() == {}  # by the default profile too, and without the Hub
    bf16 = (copy.path / "results/lean/work/convert/all.gguf").stat()
    assert bf16.st_blocks * 512 < 0.7 * bf16.st_size  # 64 KB of each tensor are much of so few
    run("convert.py", tmp_path / MODEL, "--tokenizer-pre", "qwen35", "--out", tmp_path / "a")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("attn_: Q5_K")
    mixed = ("--type", "Q4_K_M", "--head", "Q6_K", "--tensors", recipe)
    for name, options in (("Q8_0", ("--type", "Q8_0", "--head", "Q8_0")), ("Q4_K_M", mixed)):
        usual = (*options, "--threads", 1, "--bin", toolchain)
        run("quantize.py", tmp_path / "a", *usual, "--out", tmp_path / name)
        made = copy.path / f"results/lean/{MODEL}-{name}.gguf"
        assert made.read_bytes() == (tmp_path / name).read_bytes()
        report = (copy.path / f"results/lean/reports/{MODEL}-{name}.json").read_text()
        assert "not compared: BF16 was not run: it was freed while it was quantized" in report


def test_what_was_published_and_deleted_can_be_made_again_shard_by_shard(
    tmp_path: Path, toolchain: Path
) -> None:
    """For another repository, and beside another variant: as the first run says."""
    write_padded(tmp_path / MODEL)
    copy = Repository(tmp_path / "repository", toolchain)
    bf16 = copy.path / "results/lean/work/convert/all.gguf"
    (tmp_path / "hub/objects").mkdir(parents=True)
    with serve({REPO: tmp_path / MODEL}, tmp_path / "hub") as hub:
        environment = {
            "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": "hf_token", "HF_HUB_DISABLE_XET": "1",
        }  # fmt: skip

        def publish(place: str, *variants: str) -> str:
            copy.config["models"] = {
                "lean": {
                    **CONFIG["models"][MODEL],
                    "source": {"repo": REPO, "revision": COMMIT},
                    "variants": {name: {} for name in variants},
                    "publish": {"repo": place, "when": "verified", "delete_after": True},
                }
            }
            copy.write_config()
            done = copy.snakemake(*BY_SHARDS, target="publish", **environment)
            return "" if done.returncode == 0 else done.stdout + done.stderr

        def published(place: str) -> list[str]:
            return sorted(path.name for path in hub.repositories[place].glob("*.gguf"))

        assert publish("Owner/first", "Q8_0") == ""
        for place, variants in (("Owner/first", ["Q4_0", "Q8_0"]), ("Owner/second", ["Q8_0"])):
            said = publish(place, *variants)
            assert f"{bf16.relative_to(copy.path)}: damaged" in said
            assert "delete it and run again (a build with `lean: shards` frees" in said
            bf16.unlink()
            assert publish(place, *variants) == ""
            assert published(place) == [f"{MODEL}-{name}.gguf" for name in variants]
            assert not [*copy.path.glob("results/lean/**/*_0.gguf")]
