"""CPU seconds that llama-quantize takes for 10^9 weights of each tensor type, and before it begins: SECONDS and TABLES of
mtpforge.quant_types.

One matrix of random weights, on one thread, with an importance matrix where the type needs one; less what a smaller one takes,
because tables of some types take seconds to make, and a run's first buffers their memory. What a copy costs is not taken off.

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
from mtpforge.gguf.reader import TensorInfo, Value

BUFFER, COLUMNS = 16, 2048  # MiB of float32, weights of a row
FEW = BUFFER * (1 << 20) // 4 // COLUMNS  # rows, which fill that
ROWS = 5 * FEW
NAME = "blk.0.ffn_up.weight"


def write_source(path: Path, rows: int) -> None:
    """A model of one matrix, that llama-quantize takes."""
    keys = {
        "block_count": 1,
        "context_length": 512,
        "embedding_length": COLUMNS,
        "feed_forward_length": rows,
    }
    keys |= {"attention.head_count": 8, "attention.head_count_kv": 8}
    metadata = {"general.architecture": Value.of("llama", GGUFValueType.STRING)}
    metadata |= {
        f"llama.{key}": Value.of(number, GGUFValueType.UINT32) for key, number in keys.items()
    }
    metadata["llama.attention.layer_norm_rms_epsilon"] = Value.of(1e-6, GGUFValueType.FLOAT32)
    weights = (
        np.random.default_rng(0).standard_normal((rows, COLUMNS), np.float32) * np.float32(0.02)
    ).view(np.uint32) >> 16
    info = TensorInfo(NAME, (rows, COLUMNS), GGMLQuantizationType.BF16)
    writer.write(path, metadata, [(info, [memoryview(weights.astype("<u2").tobytes())])])


def write_matrix(path: Path) -> None:
    """An importance matrix for it, as uneven as real ones."""
    metadata = {
        "general.type": Value.of("imatrix", GGUFValueType.STRING),
        "imatrix.datasets": Value.of(["random"], GGUFValueType.ARRAY, GGUFValueType.STRING),
        "imatrix.chunk_count": Value.of(1, GGUFValueType.UINT32),
        "imatrix.chunk_size": Value.of(512, GGUFValueType.UINT32),
    }
    sums = np.random.default_rng(1).lognormal(0, 1, COLUMNS).astype("<f4").tobytes()
    kind = GGMLQuantizationType.F32
    parts = [
        (TensorInfo(f"{NAME}.in_sum2", (1, COLUMNS), kind), sums),
        (TensorInfo(f"{NAME}.counts", (1, 1), kind), b"\0\0\x80?"),
    ]
    writer.write(path, metadata, [(info, [memoryview(data)]) for info, data in parts])


def main() -> None:
    """Parse the command line, measure, print and keep."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "results/bench/costs.json")
    args = parser.parse_args()
    costs: dict[str, dict[str, float]] = {"seconds": {}, "tables": {}}
    with tempfile.TemporaryDirectory() as folder:
        matrix, out = Path(folder) / "imatrix.gguf", Path(folder) / "out.gguf"
        write_matrix(matrix)
        sources = {rows: Path(folder) / f"{rows}.gguf" for rows in (ROWS, FEW)}
        for rows, source in sources.items():
            write_source(source, rows)
        for kind in quant_types.TENSOR_TYPES:
            options = ["--imatrix", matrix] if quant_types.needs_imatrix(NAME, kind, "Q8_0") else []
            options += [
                "--tensor-type",
                f"^{re.escape(NAME)}$={kind.lower()}",
                "--max-buffer-size",
                BUFFER,
            ]
            program = ROOT / "resources/toolchain/bin/llama-quantize"
            many, few = (
                cost_of(program, *options, source, out, "Q8_0", 1).cpu
                for source in sources.values()
            )
            seconds = (many - few) / ((ROWS - FEW) * COLUMNS)
            costs["seconds"][kind], costs["tables"][kind] = (
                round(seconds * 1e9, 1),
                round(few - seconds * FEW * COLUMNS, 1),
            )
            print(
                f"{kind}: {costs['seconds'][kind]}, {costs['tables'][kind]}",
                file=sys.stderr,
                flush=True,
            )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(costs, indent=1) + "\n")
    print(json.dumps(costs))


if __name__ == "__main__":
    main()
