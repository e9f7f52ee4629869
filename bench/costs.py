"""Measure the costs of quantization: SECONDS and TABLES of mtpforge/gguf/quant_types.py.

CPU seconds of llama-quantize for 10^9 weights of each tensor type, and for the tables that a run
computes first. Quantizes a matrix of random weights on one thread, with an importance matrix if the
type needs one, and a smaller matrix: the difference leaves out tables and the first allocations.
The cost of copying is included.

example: costs.py --out results/bench/costs.json
"""

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path

import numpy as np
from conversion import ROOT, cost_of
from gguf.constants import GGMLQuantizationType, GGUFValueType
from mtpforge.gguf import quant_types, writer
from mtpforge.gguf.metadata import Value
from mtpforge.gguf.reader import TensorInfo

BUFFER = 16  # MiB of float32
COLUMNS = 2048
FEW_ROWS = BUFFER * (1 << 20) // 4 // COLUMNS  # they fill the buffer
MANY_ROWS = 5 * FEW_ROWS
NAME = "blk.0.ffn_up.weight"


def main() -> None:
    """Parse the command line, measure all types, and write and print the costs."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results/bench/costs.json")
    args = parser.parse_args()
    costs: dict[str, dict[str, float]] = {"seconds": {}, "tables": {}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_matrix(folder / "imatrix.gguf")
        for rows in (MANY_ROWS, FEW_ROWS):
            write_source(folder / f"{rows}.gguf", rows)
        for kind in quant_types.TENSOR_TYPES:
            seconds, tables = costs_of(kind, folder)
            costs["seconds"][kind] = seconds
            costs["tables"][kind] = tables
            print(f"{kind}: {seconds}, {tables}", file=sys.stderr, flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(costs, indent=1) + "\n")
    print(json.dumps(costs))


def costs_of(kind: str, folder: Path) -> tuple[float, float]:
    """CPU seconds for 10^9 weights of a type, and for its tables."""
    program = ROOT / "resources/toolchain/bin/llama-quantize"
    needs_imatrix = quant_types.needs_imatrix(NAME, kind, "Q8_0")
    options: list[object] = ["--imatrix", folder / "imatrix.gguf"] if needs_imatrix else []
    options += ["--tensor-type", f"^{re.escape(NAME)}$={kind.lower()}"]
    options += ["--max-buffer-size", BUFFER]

    def cpu_seconds(rows: int) -> float:
        out = folder / "out.gguf"
        return cost_of(program, *options, folder / f"{rows}.gguf", out, "Q8_0", 1).cpu

    many = cpu_seconds(MANY_ROWS)
    few = cpu_seconds(FEW_ROWS)
    per_weight = (many - few) / ((MANY_ROWS - FEW_ROWS) * COLUMNS)
    return round(per_weight * 1e9, 1), round(few - per_weight * FEW_ROWS * COLUMNS, 1)


def write_source(path: Path, rows: int) -> None:
    """Write a model of one matrix that llama-quantize accepts."""
    keys = {
        "block_count": 1,
        "context_length": 512,
        "embedding_length": COLUMNS,
        "feed_forward_length": rows,
        "attention.head_count": 8,
        "attention.head_count_kv": 8,
    }
    metadata = {"general.architecture": Value.of("llama", GGUFValueType.STRING)}
    for key, number in keys.items():
        metadata[f"llama.{key}"] = Value.of(number, GGUFValueType.UINT32)
    metadata["llama.attention.layer_norm_rms_epsilon"] = Value.of(1e-6, GGUFValueType.FLOAT32)
    normal = np.random.default_rng(0).standard_normal((rows, COLUMNS), np.float32)
    bf16 = ((normal * np.float32(0.02)).view(np.uint32) >> 16).astype("<u2")
    info = TensorInfo(NAME, (rows, COLUMNS), GGMLQuantizationType.BF16)
    writer.write(path, metadata, [(info, [memoryview(bf16.tobytes())])])


def write_matrix(path: Path) -> None:
    """Write an importance matrix for it that is as uneven as real ones."""
    metadata = {
        "general.type": Value.of("imatrix", GGUFValueType.STRING),
        "imatrix.datasets": Value.of(["random"], GGUFValueType.ARRAY, GGUFValueType.STRING),
        "imatrix.chunk_count": Value.of(1, GGUFValueType.UINT32),
        "imatrix.chunk_size": Value.of(512, GGUFValueType.UINT32),
    }
    sums = np.random.default_rng(1).lognormal(0, 1, COLUMNS).astype("<f4")
    one = np.ones(1, "<f4")
    kind = GGMLQuantizationType.F32
    parts = [
        (TensorInfo(f"{NAME}.in_sum2", (1, COLUMNS), kind), sums),
        (TensorInfo(f"{NAME}.counts", (1, 1), kind), one),
    ]
    writer.write(path, metadata, [(info, [memoryview(data.tobytes())]) for info, data in parts])


if __name__ == "__main__":
    main()
