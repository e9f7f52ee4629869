"""What an importance matrix has not seen is counted, and said with what it means."""

import struct
from pathlib import Path

import pytest
from conftest import CHECKPOINTS
from example_records import report
from gguf.constants import GGMLQuantizationType as Kind
from gguf.constants import GGUFValueType
from mtpforge.convert import native
from mtpforge.gguf import reader, writer
from mtpforge.gguf.metadata import Value
from mtpforge.gguf.reader import Gguf, TensorInfo
from mtpforge.quantize.coverage import Coverage, coverage
from mtpforge.report.summary import summary

METADATA = {
    "imatrix.datasets": Value.of(["a/text.txt"], GGUFValueType.ARRAY, GGUFValueType.STRING),
    "imatrix.chunk_count": Value.of(3, GGUFValueType.UINT32),
    "imatrix.chunk_size": Value.of(512, GGUFValueType.UINT32),
}
EXPERTS = ("blk.0.ffn_gate_exps.weight", "blk.0.ffn_up_exps.weight", "blk.1.ffn_up_exps.weight")


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Gguf:
    path = tmp_path_factory.mktemp("moe") / "all.gguf"
    native.convert(CHECKPOINTS / "tiny-qwen3.5-moe", path, "all", tokenizer_pre="qwen35")
    return reader.read(path)


def write(path: Path, counts: dict[str, list[float]]) -> Path:
    """An importance matrix with these counts; its sums are 0 for experts without one, else 1."""
    contents = []
    for name, numbers in counts.items():
        sums = [float(number > 0) for number in numbers for _ in range(256)]
        for end, values in (("in_sum2", sums), ("counts", numbers)):
            info = TensorInfo(
                f"{name}.{end}", (len(numbers), len(values) // len(numbers)), Kind.F32
            )
            contents.append((info, [memoryview(struct.pack(f"<{len(values)}f", *values))]))
    writer.write(path, METADATA, contents)
    return path


def test_experts_without_tokens_and_tensors_without_rows_are_counted(
    moe: Gguf, tmp_path: Path
) -> None:
    counts = {name: [5.0, 0.0, 1.0, 1.0, 0.0, 2.0] for name in EXPERTS[:2]}
    counts |= {EXPERTS[2]: [1.0] * 6, "blk.0.attn_qkv.weight": [9.0], "of.another": [1.0]}
    found = coverage(write(tmp_path / "i.gguf", counts), moe)
    assert (found.matrix, found.tokens, found.matrices) == ("text.txt", 1536, 32)
    assert (found.experts, found.unseen) == (12, {"0": 2})
    assert len(found.missing) == 32 - 4 and "blk.0.ssm_out.weight" in found.missing
    assert not [name for name in found.missing if "norm" in name or "ffn_gate_inp" in name]
    first, missing, experts = found.sentences
    assert first == "text.txt: covers 4 of 32 matrices in 1,536 tokens"
    assert missing.startswith("blk.0.ssm_alpha.weight, blk.0.ssm_beta.weight, blk.0.attn_gate")
    assert "and 25 more without a row: quantized as without an importance matrix" in missing
    assert experts.startswith("2 of 12 experts (16.7%) were never chosen: they are quantized as if")


def test_a_dense_model_that_is_covered_takes_a_line(tmp_path: Path) -> None:
    native.convert(CHECKPOINTS / "tiny-qwen3.5", tmp_path / "all.gguf", "all", "qwen35")
    source = reader.read(tmp_path / "all.gguf")
    names = [name for name in source.tensors if name.startswith("blk.")]
    found = coverage(write(tmp_path / "i.gguf", {name: [1.0] for name in names}), source)
    assert found.sentences == [
        f"text.txt: covers {found.matrices} of {found.matrices} matrices in 1,536 tokens"
    ]
    legacy = struct.pack("<ii20sii256f", 1, 20, b"blk.0.ffn_up.weight ", 4, 256, *[1.0] * 256)
    (tmp_path / "old.dat").write_bytes(legacy)
    assert coverage(tmp_path / "old.dat", source).sentences[0].startswith("old.dat: covers 0 of")


def test_the_summary_ends_with_the_coverage_of_each_matrix(tmp_path: Path) -> None:
    path = tmp_path / "m/work/coverage/text.json"
    path.parent.mkdir(parents=True)
    given = Coverage(matrix="t.txt", tokens=9, matrices=2, missing=(), experts=4, unseen={"0": 1})
    given.write(path)
    (tmp_path / "m/reports").mkdir()
    report("x.gguf").write(tmp_path / "m/reports/x.json")
    made = summary([tmp_path / "m/reports/x.json"], [], coverages=[path])
    table, heading, lines = made.split("\n\n")
    assert len(table.splitlines()) == 3 and heading == "Importance matrices"
    assert lines.splitlines()[0] == "- m: t.txt: covers 2 of 2 matrices in 9 tokens"
    assert lines.splitlines()[1].startswith("- m: 1 of 4 experts (25.0%) were never chosen")
