"""Qwen4Exp: quantized or injected, its head passes every check and drafts; a wrong one does not."""

import shutil
from pathlib import Path

import pytest
from layouts import write_layout
from mtpforge.convert import native
from mtpforge.errors import VerificationError
from mtpforge.gguf import reader
from mtpforge.inject import inject
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.llama_cpp.server import serve
from mtpforge.quantize import llama_quantize
from mtpforge.quantize.recipe import head_recipe
from mtpforge.quantize.request import QuantizeRequest
from mtpforge.verify.request import Request
from mtpforge.verify.verify import verify

PROMPTS = ("The quick brown fox", "def area(")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint, and its parts as GGUF."""
    folder = tmp_path_factory.mktemp("qwen4-exp")
    checkpoint = write_layout("qwen4-exp", folder)
    for part in native.PARTS:
        native.convert(checkpoint, folder / f"{part}.gguf", part, "qwen35")
    return folder


def request(made: Path, file_type: str | None = None, base: Path | None = None) -> Request:
    return Request(
        checkpoint=made / "qwen4-exp",
        file_type=file_type,
        base=base,
        head="Q8_0",
        tokenizer_pre="qwen35",
        prompts=PROMPTS,
        min_acceptance=0.95,
    )


def test_a_quantized_file_is_verified_and_drafts(
    made: Path, toolchain: Path, tmp_path: Path
) -> None:
    llama, out = LlamaCpp(toolchain, threads=1), tmp_path / "out.gguf"
    asked = QuantizeRequest("Q4_0", head_recipe("Q8_0"))
    llama_quantize.quantize(made / "all.gguf", out, asked, llama)
    report = verify(out, request(made, "Q4_0"), llama)
    assert report.drafts and report.drafts > 150
    assert report.acceptance and report.acceptance > 0.95


def test_an_injected_head_is_verified_and_drafts(
    made: Path, toolchain: Path, tmp_path: Path
) -> None:
    llama, base, out = LlamaCpp(toolchain, threads=1), tmp_path / "base.gguf", tmp_path / "out.gguf"
    llama_quantize.quantize(made / "trunk.gguf", base, QuantizeRequest("Q4_0"), llama)
    options = inject.Options(head_types=head_recipe("Q8_0"))
    inject.inject(base, made / "head.gguf", out, options, llama)
    assert {c.name for c in verify(out, request(made, base=base), llama).checks} >= {
        "trunk",
        "values",
        "drafting",
    }
    keys = ("attention.compress_ratios", "attention.recurrent_layers", "ple.layer_multipliers")
    whole = reader.read(made / "all.gguf")
    for key in keys:
        assert reader.read(out).get(f"qwen4exp.{key}") == whole.get(f"qwen4exp.{key}") is not None


def test_the_trunk_drafts_with_a_separate_draft_model(
    made: Path, toolchain: Path, tmp_path: Path
) -> None:
    options = ["--model-draft", str(made / "draft.gguf"), "--spec-type", "draft-mtp"]
    options += ["--spec-draft-n-max", "1", "--ctx-size", "2048"]
    llama = LlamaCpp(toolchain, threads=1)
    with serve(llama, made / "trunk.gguf", tmp_path / "log", options) as running:
        answer = running.completion(PROMPTS[0], 100)
    assert answer.drafts > 40 and answer.accepted > 0.95 * answer.drafts


def test_a_head_with_its_halves_swapped_is_refused(
    made: Path, toolchain: Path, tmp_path: Path
) -> None:
    out = tmp_path / "swapped.gguf"
    shutil.copy(made / "all.gguf", out)
    piece = reader.read(out).ranges["blk.2.nextn.eh_proj.weight"]
    with out.open("r+b") as file:
        file.seek(piece.offset)
        rows = [file.read(512) for _ in range(128)]
        file.seek(piece.offset)
        file.write(b"".join(row[256:] + row[:256] for row in rows))
    asked = Request(head="BF16", prompts=PROMPTS, min_acceptance=0.95)
    with pytest.raises(VerificationError, match="drafting"):
        verify(out, asked, LlamaCpp(toolchain, threads=1))
    with pytest.raises(VerificationError, match=r"values: blk\.2\.nextn\.eh_proj"):
        verify(out, request(made, "BF16"), LlamaCpp(toolchain, threads=1))
