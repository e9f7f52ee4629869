"""Gemma 4 drafts with its drafter, which upstream converts: its bytes are proven, and it is run.

Needs the toolchain and `make converter`.
"""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from gemma4 import EXTRA, HIDDEN, WIDE, write_gemma4
from mtpforge.checkpoint.checkpoint import Checkpoint
from mtpforge.convert import proof
from mtpforge.convert.upstream import convert_upstream
from mtpforge.errors import GgufError, VerificationError
from mtpforge.gguf import reader
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.quantize import llama_quantize
from mtpforge.quantize.recipe import head_recipe
from mtpforge.quantize.request import QuantizeRequest
from mtpforge.verify.request import Request
from mtpforge.verify.verify import verify
from test_other_architectures import PLAIN, PYTHON, SOURCE, call, rewrite

CONVERTER = ROOT / "resources" / "converter"
PARTS = ("trunk", "draft")

pytestmark = pytest.mark.skipif(
    not PYTHON.exists(), reason="upstream's environment is missing: `make converter`"
)


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Target and drafter, and what unmodified upstream makes of them."""
    folder = tmp_path_factory.mktemp("gemma")
    jobs: list[object] = [PYTHON, "-c", PLAIN, SOURCE]
    for checkpoint, part in zip(write_gemma4(folder, "Unified"), PARTS, strict=True):
        out = folder / f"{part}.gguf"
        convert_upstream(Checkpoint(checkpoint), out, CONVERTER, part, log=folder / f"{part}.log")
        settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
        plain = shutil.copytree(checkpoint, folder / "plain" / checkpoint.name)
        (plain / "tokenizer_config.json").write_text(json.dumps(settings))
        jobs += [plain, folder / f"plain-{part}.gguf"]
    done = call(jobs)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def test_both_have_upstreams_bytes(gemma: Path) -> None:
    for part in PARTS:
        assert (gemma / f"{part}.gguf").read_bytes() == (gemma / f"plain-{part}.gguf").read_bytes()
    drafter = reader.read(gemma / "draft.gguf")
    assert list(drafter.head_blocks) == [0, 1] and not any("masked" in n for n in drafter.tensors)
    assert not reader.read(gemma / "trunk.gguf").head_blocks
    assert drafter.get("tokenizer.ggml.tokens")[-1] == EXTRA
    assert drafter.get("tokenizer.ggml.token_type")[-1] == 3  # a control token


def test_the_target_drafts_with_the_quantized_drafter(
    gemma: Path, toolchain: Path, tmp_path: Path
) -> None:
    llama, out = LlamaCpp(toolchain, threads=1), tmp_path / "draft-Q8_0.gguf"
    asked = QuantizeRequest("Q8_0", head_recipe("Q8_0"))
    llama_quantize.quantize(gemma / "draft.gguf", out, asked, llama)
    request = Request(
        reference=gemma / "draft.gguf",
        target=gemma / "trunk.gguf",
        file_type="Q8_0",
        head="Q8_0",
        prompts=("the quick brown fox", "jumps over the lazy dog"),
        min_acceptance=0.95,
    )
    report = verify(out, request, llama)
    found = [check.name for check in report.checks]
    assert found[-4:] == ["target", "drafting", "same text", "programs"]
    assert report.head == "Q8_0" and report.drafts > 150 and report.acceptance > 0.95


def test_a_drafter_with_its_halves_swapped_is_refused(
    gemma: Path, toolchain: Path, tmp_path: Path
) -> None:
    made = reader.read(gemma / "draft.gguf")
    place = made.ranges["nextn.pre_projection.weight"]
    raw = bytearray(made.path.read_bytes())
    halves = np.frombuffer(raw, "<u2", place.size // 2, place.offset).reshape(WIDE, 2, HIDDEN)
    raw[place.offset : place.offset + place.size] = halves[:, ::-1].tobytes()
    (tmp_path / "swapped.gguf").write_bytes(raw)
    request = Request(target=gemma / "trunk.gguf", prompts=("the quick brown fox",))
    with pytest.raises(VerificationError, match="the head is dead or damaged"):
        verify(tmp_path / "swapped.gguf", request, LlamaCpp(toolchain, threads=1))


@pytest.mark.parametrize(
    "name",
    [
        "nextn.pre_projection.weight",
        "nextn.post_projection.weight",
        "rope_freqs.weight",
        "token_embd.weight",
        "output_norm.weight",
        "blk.1.layer_output_scale.weight",
        "blk.0.attn_q.weight",
    ],
)
def test_a_lost_or_changed_tensor_is_named(gemma: Path, tmp_path: Path, name: str) -> None:
    checkpoint, good = Checkpoint(gemma / "gemma-assistant"), reader.read(gemma / "draft.gguf")
    with pytest.raises(GgufError, match="and none of the GGUF"):
        proof.prove(rewrite(good.path, tmp_path / "lost.gguf", drop=name), checkpoint, "draft")
    raw = bytearray(good.path.read_bytes())
    raw[good.ranges[name].offset] ^= 1
    (tmp_path / "changed.gguf").write_bytes(raw)
    with pytest.raises(GgufError, match=f"and {re.escape(name)} "):
        proof.prove(reader.read(tmp_path / "changed.gguf"), checkpoint, "draft")
