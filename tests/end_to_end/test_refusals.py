"""A head that is there but wrong is never published: planted faults are refused by verify, with a message that says why."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import CHECKPOINTS, Run
from mtpforge import gguf_file
from mtpforge.gguf_file import TensorInfo
from mtpforge.quantize import head_blocks

Fails = Callable[..., str]
Change = Callable[[TensorInfo, bytearray], None]


def damaged(source: Path, out: Path, change: Change) -> Path:
    """A copy of a GGUF whose head's tensors went through `change`, which works in place on their bytes."""
    opened = gguf_file.read(source)
    raw, prefix = source.read_bytes(), f"blk.{head_blocks(opened)[0]}."
    tensors, touched = [], 0
    for name, info in opened.tensors.items():
        data = bytearray(raw[opened.ranges[name].offset :][: info.size])
        if name.startswith(prefix):
            before = bytes(data)
            change(info, data)
            touched += before != data
        tensors.append((info, [memoryview(data)]))
    assert touched, "the fault was not planted"
    gguf_file.write(out, opened.metadata, tensors)
    return out


def unshift_norms(info: TensorInfo, data: bytearray) -> None:
    """As converters write them that do not know of the +1."""
    if info.name.endswith("norm.weight"):
        values = np.frombuffer(data, np.float32)
        values -= 1


def swap_experts(info: TensorInfo, data: bytearray) -> None:
    """Two experts' down projections change places."""
    if info.name.endswith("ffn_down_exps.weight"):
        size = len(data) // info.shape[0]
        data[:size], data[size : 2 * size] = data[size : 2 * size], data[:size]


def swap_halves(info: TensorInfo, data: bytearray) -> None:
    """`eh_proj` with hidden state and embedding the wrong way round."""
    if info.name.endswith("eh_proj.weight"):
        rows = np.frombuffer(data, np.uint16).reshape(info.shape)
        rows[:] = np.roll(rows, info.shape[1] // 2, axis=1)


def swap_rows(info: TensorInfo, data: bytearray) -> None:
    """One pair of rows of one matrix."""
    if info.name.endswith("attn_output.weight"):
        size = len(data) // info.shape[0]
        data[:size], data[size : 2 * size] = data[size : 2 * size], data[:size]


def prompts(model: str) -> tuple[object, ...]:
    return ("--prompts", CHECKPOINTS / model / "prompts", "--threads", 1)


def test_a_head_without_the_shift_of_its_norms_is_refused_because_it_drafts_nothing(
    built: Path, fails: Fails, tmp_path: Path
) -> None:
    source = built / "results/tiny-qwen3.5/tiny-qwen3.5-BF16.gguf"
    dead = damaged(source, tmp_path / "dead.gguf", unshift_norms)
    message = fails("verify.py", dead, *prompts("tiny-qwen3.5"), out=tmp_path / "report.json")
    assert "drafts accepted" in message and "the head is dead or damaged" in message


@pytest.mark.parametrize("variant", ["BF16", "Q4_K_M"])
def test_a_head_with_two_experts_swapped_is_refused(built: Path, fails: Fails, tmp_path: Path, variant: str) -> None:
    source = built / f"results/tiny-qwen3.5-moe/tiny-qwen3.5-moe-{variant}.gguf"
    swapped = damaged(source, tmp_path / "swapped.gguf", swap_experts)
    checkpoint = ("--checkpoint", CHECKPOINTS / "tiny-qwen3.5-moe")
    message = fails("verify.py", swapped, *checkpoint, *prompts("tiny-qwen3.5-moe"), out=tmp_path / "report.json")
    assert "head values: blk." in message and "ffn_down_exps.weight" in message


@pytest.mark.parametrize("change", [swap_halves, swap_rows, unshift_norms])
def test_other_faults_of_a_head_are_refused_by_its_values(built: Path, fails: Fails, tmp_path: Path, change: Change) -> None:
    faulty = damaged(built / "results/tiny-qwen3.5/tiny-qwen3.5-Q8_0.gguf", tmp_path / "faulty.gguf", change)
    checkpoint = ("--checkpoint", CHECKPOINTS / "tiny-qwen3.5")
    assert "head values" in fails("verify.py", faulty, *checkpoint, *prompts("tiny-qwen3.5"), out=tmp_path / "report.json")


def test_a_row_out_of_place_is_seen_through_a_quantization(built: Path, fails: Fails, tmp_path: Path) -> None:
    faulty = damaged(built / "results/tiny-qwen3.5/tiny-qwen3.5-Q4_K_M.gguf", tmp_path / "faulty.gguf", swap_rows)
    checkpoint = ("--checkpoint", CHECKPOINTS / "tiny-qwen3.5")
    message = fails("verify.py", faulty, *checkpoint, *prompts("tiny-qwen3.5"), out=tmp_path / "report.json")
    assert "attn_output.weight" in message


def test_another_type_than_asked_for_is_refused(built: Path, fails: Fails, tmp_path: Path) -> None:
    file, asked = built / "results/tiny-qwen3.5/tiny-qwen3.5-Q4_K_M.gguf", ("--type", "Q8_0", "--head", "Q6_K")
    message = fails("verify.py", file, *asked, *prompts("tiny-qwen3.5"), out=tmp_path / "report.json")
    assert "not that of Q8_0" in message and "is Q8_0, not Q6_K" in message


def test_a_trunk_that_is_not_the_bases_is_refused(built: Path, fails: Fails, tmp_path: Path) -> None:
    file, base = (built / f"results/tiny-qwen3.5/tiny-qwen3.5-{v}.gguf" for v in ("Q4_K_M-injected", "IQ4_XS"))
    message = fails("verify.py", file, "--base", base, *prompts("tiny-qwen3.5"), out=tmp_path / "report.json")
    assert "differs from the base" in message


def test_a_file_without_a_head_is_refused(built: Path, fails: Fails, tmp_path: Path) -> None:
    trunk = built / "results/tiny-qwen3.5/work/convert/trunk.gguf"
    assert "has no head" in fails("verify.py", trunk, *prompts("tiny-qwen3.5"), out=tmp_path / "report.json")


def zero_end(source: Path, out: Path, name: str) -> Path:
    """A copy of a GGUF with the last third of one tensor zeroed."""
    piece, raw = gguf_file.read(source).ranges[name], bytearray(source.read_bytes())
    raw[piece.offset + piece.size * 2 // 3 : piece.offset + piece.size] = bytes(piece.size - piece.size * 2 // 3)
    out.write_bytes(raw)
    return out


@pytest.mark.parametrize("name", ["blk.1.ffn_down.weight", "token_embd.weight"])
def test_a_damaged_file_without_a_head_is_refused_by_its_values(
    built: Path, run: Run, fails: Fails, tmp_path: Path, name: str
) -> None:
    trunk, checkpoint = built / "results/tiny-qwen3.5/work/convert/trunk.gguf", CHECKPOINTS / "tiny-qwen3.5"
    asked = ("--checkpoint", checkpoint, "--type", "BF16", "--head", "none", *prompts("tiny-qwen3.5"))
    assert run("verify.py", trunk, *asked, "--out", tmp_path / "good.json").returncode == 0
    message = fails("verify.py", zero_end(trunk, tmp_path / "bad.gguf", name), *asked, out=tmp_path / "report.json")
    assert f"values: {name} differs from its source" in message


def test_a_damaged_draft_sidecar_is_refused_by_its_values(built: Path, run: Run, fails: Fails, tmp_path: Path) -> None:
    """Most of its drafts are still accepted."""
    checkpoint, draft = CHECKPOINTS / "tiny-qwen3.5", tmp_path / "draft.gguf"
    assert run("convert.py", checkpoint, "--tokenizer-pre", "qwen35", "--part", "draft", "--out", draft).returncode == 0
    target = built / "results/tiny-qwen3.5/tiny-qwen3.5-BF16.gguf"
    asked = ("--checkpoint", checkpoint, "--target", target, "--type", "BF16", "--head", "BF16", *prompts("tiny-qwen3.5"))
    assert run("verify.py", draft, *asked, "--out", tmp_path / "good.json").returncode == 0
    bad = zero_end(draft, tmp_path / "bad.gguf", "token_embd.weight")
    message = fails("verify.py", bad, *asked, out=tmp_path / "report.json")
    assert "head values: token_embd.weight differs" in message and "drafting" not in message


def test_what_was_converted_and_then_damaged_is_refused_by_its_digests(built: Path, fails: Fails, tmp_path: Path) -> None:
    work = built / "results/tiny-qwen3.5/work/convert"
    bad = zero_end(work / "all.gguf", tmp_path / "bad.gguf", "blk.0.ffn_up.weight")
    asked = ("--digests", work / "all.json", *prompts("tiny-qwen3.5"))
    assert "bytes: blk.0.ffn_up.weight differs" in fails("verify.py", bad, *asked, out=tmp_path / "report.json")


@pytest.mark.parametrize("kind", ["F16", "F32"])
def test_an_unquantized_file_of_another_type_can_be_published(built: Path, run: Run, tmp_path: Path, kind: str) -> None:
    source, out = built / "results/tiny-qwen3.5/tiny-qwen3.5-BF16.gguf", tmp_path / f"{kind}.gguf"
    assert run("quantize.py", source, "--type", kind, "--head", kind, "--out", out).returncode == 0
    asked = ("--checkpoint", CHECKPOINTS / "tiny-qwen3.5", "--type", kind, "--head", kind, *prompts("tiny-qwen3.5"))
    done = run("verify.py", out, *asked, "--out", tmp_path / "report.json")
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("--type", "Q4_K_X"), "unknown quantization type 'Q4_K_X'"),
        (("--type", "Q4_K_M", "--head", "Q9"), "unknown tensor type 'Q9'"),
        (("--type", "IQ2_XXS"), "needs an importance matrix"),
        (("--type", "Q4_K_M", "--bin", "/nonexistent"), "missing or not executable"),
    ],
)
def test_a_quantization_that_cannot_be_leaves_no_file(
    built: Path, fails: Fails, tmp_path: Path, arguments: tuple[str, ...], named: str
) -> None:
    source = built / "results/tiny-qwen3.5/tiny-qwen3.5-BF16.gguf"
    assert named in fails("quantize.py", source, *arguments, out=tmp_path / "out.gguf")
