"""A head whose norms are stored as w, as MLX leaves them, drafts as well as the original."""

import json
from pathlib import Path

import numpy as np
from conftest import CHECKPOINTS
from gguf.constants import GGMLQuantizationType
from layouts import read_tensors, write_checkpoint
from mtpforge.convert import native
from mtpforge.convert.values import decode, encode
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.prompts import read_prompts
from mtpforge.verify.report import Report
from mtpforge.verify.request import Request
from mtpforge.verify.verify import verify

SOURCE = CHECKPOINTS / "tiny-qwen3.5"


def test_a_head_with_norms_of_mlx_drafts_as_well(
    built: Path, toolchain: Path, tmp_path: Path
) -> None:
    tensors = read_tensors(SOURCE)
    for name, (dtype, stored) in tensors.items():
        if name.startswith("mtp.") and "norm" in name:
            w = decode(stored, dtype) + np.float32(1)
            rounded = np.frombuffer(encode(w, GGMLQuantizationType.BF16), "<u2")
            tensors[name] = dtype, rounded
    config = json.loads((SOURCE / "config.json").read_text())
    copy = write_checkpoint(tmp_path / "tiny-qwen3.5", SOURCE, config, tensors)
    out = tmp_path / "out.gguf"
    assert "7 of 18 norms" in native.convert(copy, out, "all", "qwen35")
    prompts = tuple(read_prompts(SOURCE / "prompts").values())
    request = Request(checkpoint=copy, tokenizer_pre="qwen35", file_type="BF16", prompts=prompts)
    report = verify(out, request, LlamaCpp(toolchain, threads=1))
    clean = Report.read(built / "results/tiny-qwen3.5/reports/tiny-qwen3.5-BF16.json")
    assert report.drafts and report.accepted and clean.accepted
    assert report.accepted >= clean.accepted - 3
