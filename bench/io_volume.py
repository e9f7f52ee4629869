"""Measure the bytes that each step reads from the disk and writes to it, if little is cached.

Builds a BF16 file, Q8_0 in three pieces and Q4_K_M of a checkpoint with random weights, with real
Snakemake, one step after the other, and takes what the kernel counted for each. All of it must run
with much less memory than the checkpoint has bytes, page cache included, so that no step finds in
memory what the one before it read or wrote.

example: systemd-run --user --scope -p MemoryMax=1G .venv/bin/python bench/io_volume.py
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "workflow/scripts"))

import checkpoint  # noqa: E402
from mtpforge import table  # noqa: E402
from mtpforge.io import atomic  # noqa: E402
from mtpforge.llama_cpp import memory  # noqa: E402

WORK = "results/bench/work"
PIECES = 3
BLOCK = 512
"""Bytes: the unit of the kernel's counters."""
SIZES = {"BF16": f"{WORK}/convert/all.gguf", "result": f"{WORK}/quantized/Q8_0.gguf"}
"""What reads and writes are compared with."""
STEPS = {
    "convert": ("BF16", [SIZES["BF16"]]),
    "Q8_0, three pieces": (
        "BF16",
        [f"{WORK}/pieces/quantized/Q8_0/{n}-of-{PIECES}.json" for n in range(1, PIECES + 1)],
    ),
    "joining them": ("result", [SIZES["result"]]),
    "Q4_K_M in one run": ("BF16", [f"{WORK}/quantized/Q4_K_M.gguf"]),
    "verify BF16, without running it": ("BF16", ["results/bench/bench-BF16.gguf"]),
}
"""Step: its measure, and what it makes."""


def main() -> None:
    """Parse the command line, build, and write and print the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=24, help="default: %(default)s")
    parser.add_argument("--scratch", type=Path, default=ROOT / "resources/bench/io-volume")
    parser.add_argument("--out", type=Path, default=ROOT / "results/bench/io-volume.json")
    args = parser.parse_args()
    settings = checkpoint.QWEN3_5_2B | {"num_hidden_layers": args.layers}
    source = checkpoint.write_checkpoint(args.scratch / "source", settings)
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    if memory.usable() > size / 3:
        sys.exit(
            f"error: {table.size(memory.usable())} of memory cache much of {table.size(size)}: "
            "limit it, as in the example of --help"
        )
    folder = args.scratch / "build"
    prepare(source, folder)
    found = {}
    for step, (measure, targets) in STEPS.items():
        counted = moved(folder, targets)
        size = (folder / SIZES[measure]).stat().st_size
        found[step] = [f"{count / size:.2f} x {measure}" for count in counted]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_json(args.out, found)
    rows = [(step, *both) for step, both in found.items()]
    print(table.markdown([("step", "read", "written"), *rows]), end="")


def prepare(source: Path, folder: Path) -> None:
    """Write a configuration, and make what comes before the first step."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in ("Snakefile", "workflow", "profiles", "envs"):
        (folder / name).symlink_to(ROOT / name)
    model = {
        "source": {"path": str(source)},
        "name": "bench",
        "tokenizer_pre": "qwen35",
        "variants": {"BF16": {}, "Q8_0": {"pieces": PIECES}, "Q4_K_M": {"pieces": 1}},
    }
    bin_dir = str(ROOT / "resources/toolchain/bin")
    config = {"toolchain": {"llama_cpp": {"bin_dir": bin_dir}}, "models": {"bench": model}}
    (folder / "config.yaml").write_text(json.dumps(config))
    moved(folder, [SIZES["BF16"], "toolchain"], "--until", "local_files", "toolchain")


def moved(folder: Path, targets: list[str], *options: str) -> tuple[int, int]:
    """Bytes that the jobs of some targets read from the disk and wrote to it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-m", "snakemake", "--cores", "2", "--quiet", "all", *options]
    subprocess.run([*command, "--", *targets], cwd=folder, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    read, written = after.ru_inblock - before.ru_inblock, after.ru_oublock - before.ru_oublock
    return read * BLOCK, written * BLOCK


if __name__ == "__main__":
    main()
