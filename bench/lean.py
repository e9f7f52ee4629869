"""Measure the disk that a build takes at its peak, as usual and with profiles/lean and shards.

Builds a split BF16 file and a quant of a checkpoint with random weights from a Hub on loopback,
with real Snakemake, up to verification, which takes no disk. All builds must make the same bytes;
shard by shard, there is no BF16 file. Compares each peak with what plan.py forecasts.

example: lean.py --layers 8 --out results/bench/lean.json
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "workflow/scripts"), str(ROOT / "tests")]

import checkpoint  # noqa: E402
from hub import COMMIT, Hub, serve  # noqa: E402 - a module of the tests
from mtpforge.io import atomic  # noqa: E402

SHARD_BYTES, VOCABULARY = 48_000_000, 8192
SETTINGS = checkpoint.QWEN3_5_2B | {
    "hidden_size": 1024, "intermediate_size": 3584, "vocab_size": VOCABULARY
}  # fmt: skip
QUANT = "Q4_K_M"
PROFILES = ("default", "lean", "shards")
WORK = "results/bench/work"


def main() -> None:
    """Parse the command line, measure, and write and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--scratch", type=Path, default=ROOT / "resources/bench/lean")
    parser.add_argument("--out", type=Path, default=ROOT / "results/bench/lean.json")
    args = parser.parse_args()
    checkpoint.SHARD_BYTES, checkpoint.VOCABULARY = SHARD_BYTES, VOCABULARY
    settings = SETTINGS | {"num_hidden_layers": args.layers}
    source = checkpoint.write_checkpoint(args.scratch / "source", settings)
    with serve({"Owner/Bench": source}) as hub:
        found = {name: measure(name, args.scratch / name, hub) for name in PROFILES}
    usual = found["default"]
    made = {name: each.pop("sha256") for name, each in found.items()}
    if made["lean"] != made["default"] or not made["shards"].items() <= made["default"].items():
        sys.exit("the builds made different bytes")
    for each in found.values():
        each["ratio"] = round(each["peak"] / usual["peak"], 3)
        each["forecast"] = round(each["planned"] / each["peak"], 3)
    shards = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    result = {"checkpoint": shards, **found}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_json(args.out, result)
    print(json.dumps(result, indent=1))


def measure(profile: str, folder: Path, hub: Hub) -> dict[str, Any]:
    """Build in a folder; bytes on the disk at the peak and the end, and the sha256 of the files."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("Snakefile", "workflow", "profiles", "envs"):
        (folder / name).symlink_to(ROOT / name)
    source = {"repo": "Owner/Bench", "revision": COMMIT}
    variants = {**({} if profile == "shards" else {"BF16": {"split": "100M"}}), QUANT: {}}
    config = {
        "toolchain": {"llama_cpp": {"bin_dir": str(ROOT / "resources/toolchain/bin")}},
        "models": {"bench": {"source": source, "tokenizer_pre": "qwen35", "variants": variants}},
    }
    (folder / "config.yaml").write_text(json.dumps(config))
    variables = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "home")}
    planned = forecast(folder, profile, os.environ | variables)
    command = [sys.executable, "-m", "snakemake", "--workflow-profile", f"profiles/{profile}"]
    command += ["--cores", "2", "--quiet", "--", f"{WORK}/quantized/{QUANT}.gguf"]
    peak = 0
    with subprocess.Popen(command, cwd=folder, env=os.environ | variables) as build:
        ended = threading.Event()
        while build.poll() is None:
            peak = max(peak, taken(folder))
            ended.wait(0.05)
    if build.returncode:
        sys.exit(f"{folder}: the build failed")
    made = sorted(
        [*(folder / WORK / "split").rglob("*.gguf"), folder / WORK / f"quantized/{QUANT}.gguf"]
    )
    digests = {str(path.relative_to(folder)): sha256(path) for path in made}
    return {"planned": planned, "peak": peak, "end": taken(folder), "sha256": digests}


def forecast(folder: Path, profile: str, variables: dict[str, str]) -> int:
    """The peak that plan.py forecasts."""
    command = [sys.executable, "workflow/scripts/plan.py", "--json"]
    command += [] if profile == "default" else ["--lean", profile]
    command += ["--bin", str(ROOT / "resources/toolchain/bin")]
    done = subprocess.run(command, cwd=folder, env=variables, check=True, stdout=subprocess.PIPE)
    return int(json.loads(done.stdout)["peak"])


def taken(folder: Path) -> int:
    """Bytes on the disk of all files, those with several names once."""
    sizes: dict[int, int] = {}
    for path in (*folder.glob("re*/**/*"), *folder.glob("re*/**/.*")):  # results and resources
        try:
            about = path.lstat()
        except OSError:  # it has just been renamed
            continue
        sizes[about.st_ino] = 512 * about.st_blocks
    return sum(sizes.values())


def sha256(path: Path) -> str:
    """The digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if __name__ == "__main__":
    main()
