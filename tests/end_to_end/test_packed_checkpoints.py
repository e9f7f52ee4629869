"""An NVFP4 checkpoint, converted by llama.cpp's converter, is verified and drafts."""

import json
from pathlib import Path

import pytest
from conftest import CHECKPOINTS, ROOT
from layouts import four_bit, fused_head, read_tensors, separate_experts, write_checkpoint
from mtpforge.checkpoint.checkpoint import Checkpoint
from mtpforge.convert.upstream import convert_upstream
from mtpforge.gguf import reader
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.prompts import read_prompts
from mtpforge.verify.request import Request
from mtpforge.verify.verify import verify

CONVERTER = ROOT / "resources" / "converter"

pytestmark = pytest.mark.skipif(
    not (CONVERTER / "stamp.json").exists(),
    reason="upstream's environment is missing: `make converter`",
)


@pytest.mark.parametrize("name", ["tiny-qwen3.5", "tiny-qwen3.5-moe"])
def test_a_packed_trunk_drafts_with_its_head(name: str, toolchain: Path, tmp_path: Path) -> None:
    source = CHECKPOINTS / name
    config = json.loads((source / "config.json").read_text())
    tensors = read_tensors(source)
    if name.endswith("moe"):
        tensors = separate_experts(config, fused_head(config, tensors))
    checkpoint = write_checkpoint(
        tmp_path / name, source, config, four_bit(config, tensors), shards=2
    )
    out = tmp_path / f"{name}-NVFP4.gguf"
    convert_upstream(Checkpoint(checkpoint), out, CONVERTER, tokenizer_pre="qwen35")
    made = reader.read(out)
    packed = {name for name, info in made.tensors.items() if info.type.name == "NVFP4"}
    assert packed and not packed & made.head.tensors.keys()
    for name in packed:
        assert {name.replace("weight", which) for which in ("scale", "input_scale")} < {
            *made.tensors
        }
    prompts = tuple(read_prompts(source / "prompts").values())
    request = Request(
        reference=out,
        tokenizer_pre="qwen35",
        file_type="NVFP4",
        min_acceptance=0.8,
        prompts=prompts,
    )
    report = verify(out, request, LlamaCpp(toolchain, threads=1))
    assert [check for check in report.checks if not check.passed] == []
    assert report.drafts
