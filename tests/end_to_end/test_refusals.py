"""Wrong files are never published: verification refuses planted faults and names them."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from conftest import CHECKPOINTS, MODELS, Run
from layouts import read_tensors, write_checkpoint
from mtpforge.gguf import reader, writer
from mtpforge.gguf.metadata import Value
from mtpforge.gguf.reader import TensorInfo
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.prompts import read_prompts
from mtpforge.verify.request import Request
from mtpforge.verify.running import check_drafting

MOE, INJECTED = MODELS[1], "Q4_K_M-injected"

Fails = Callable[..., str]
Change = Callable[[TensorInfo, bytearray], None]


def damaged(source: Path, out: Path, change: Change, names: str = ".*") -> Path:
    """A copy of a GGUF in which `change` has edited the bytes of the tensors with these names."""
    opened, raw = reader.read(source), bytearray(source.read_bytes())
    before = bytes(raw)
    for name, info in opened.tensors.items():
        if re.search(names, name):
            start = opened.ranges[name].offset
            data = raw[start : start + info.size]
            change(info, data)
            assert data != raw[start : start + info.size]
            raw[start : start + info.size] = data
    assert raw != before, "the fault was not planted"
    out.write_bytes(raw)
    return out


def swap_first(info: TensorInfo, data: bytearray) -> None:
    """Swap the first two rows of a matrix, or the first two experts."""
    size = len(data) // info.shape[0]
    data[:size], data[size : 2 * size] = data[size : 2 * size], data[:size]


def swap_halves(info: TensorInfo, data: bytearray) -> None:
    """Swap hidden state and embedding in `eh_proj`."""
    rows = np.frombuffer(data, np.uint8).reshape(info.shape[0], -1)
    rows[:] = np.roll(rows, rows.shape[1] // 2, axis=1)


def prompts(model: str) -> tuple[object, ...]:
    return ("--prompts", CHECKPOINTS / model / "prompts", "--threads", 1)


def test_a_head_with_unshifted_norms_drafts_nothing_and_is_refused(
    built: Path, toolchain: Path, fails: Fails, tmp_path: Path
) -> None:
    """Without a source, its values show it before llama-server does."""
    source = built / "results/tiny-qwen3.5/tiny-qwen3.5-BF16.gguf"
    dead = damaged(source, tmp_path / "dead.gguf", shift(-1), r"blk\.4\..*norm\.weight")
    message = fails("verify.py", dead, *prompts("tiny-qwen3.5"), out=tmp_path / "report.json")
    assert "norms: 1 is not added to 7 norms" in message
    texts = tuple(read_prompts(CHECKPOINTS / "tiny-qwen3.5" / "prompts").values())
    request = Request(prompts=texts)
    check, _ = check_drafting(reader.read(dead), request, LlamaCpp(toolchain, threads=1))
    assert not check.passed and "the head is dead or damaged" in check.detail


@dataclass(frozen=True)
class Fault:
    """A change to a finished file, and the beginning of the resulting error."""

    verdict: str
    tensors: str
    """Regular expression of the names of changed tensors."""
    change: Change
    model: str = "tiny-qwen3.5"
    variant: str = "Q4_K_M"


def shift(by: float) -> Change:
    """Shift norms a second time (1), or undo the shift (-1)."""

    def change(info: TensorInfo, data: bytearray) -> None:
        values = np.frombuffer(data, np.float32)
        values += np.float32(by)

    return change


def flip_bit(info: TensorInfo, data: bytearray) -> None:
    """Flip the last bit of the byte in the middle."""
    data[len(data) // 2] ^= 1


def poison(info: TensorInfo, data: bytearray) -> None:
    """Make the scale of a Q4_K or Q8_0 block a half-precision NaN."""
    data[:2] = b"\x00\x7e"


FAULTS = {
    "raw norms": Fault("norms: 1 is not added to 7 norms", r"blk\.4\..*norm\.weight", shift(-1)),
    "raw norms of the trunk": Fault(
        "norms: 1 is not added to 2 norms", r"blk\.[01]\.attn_norm", shift(-1), variant="BF16"
    ),
    "norms shifted twice": Fault(
        "norms: 1 is added twice to 7 norms", r"blk\.2\..*norm\.weight", shift(1), MOE
    ),
    "one norm shifted twice": Fault(
        "norms: 1 is added twice to blk.2", r"blk\.2\.post_attention_norm", shift(1)
    ),
    "halves": Fault("values: blk.4.nextn.eh_proj.weight", r"eh_proj", swap_halves, variant="BF16"),
    "halves at Q8_0": Fault("values: blk.2.nextn.eh_proj.weight", r"eh_proj", swap_halves, MOE),
    "experts": Fault(
        "values: blk.2.ffn_down_exps.weight", r"blk\.2\.ffn_down_exps", swap_first, MOE, "BF16"
    ),
    "experts at Q8_0": Fault(
        "values: blk.2.ffn_down_exps.weight", r"blk\.2\.ffn_down_exps", swap_first, MOE
    ),
    "experts of the trunk": Fault(
        "values: blk.1.ffn_up_exps.weight", r"blk\.1\.ffn_up_exps", swap_first, MOE
    ),
    "rows": Fault(
        "values: blk.4.attn_output.weight (Q8_0) has a", r"blk\.4\.attn_output", swap_first
    ),
    "rows of the trunk": Fault(
        "values: blk.0.ffn_up.weight (Q4_K) has a", r"blk\.0\.ffn_up", swap_first
    ),
    "a scale": Fault(
        "finite: blk.2.ffn_gate.weight has NaN or infinite values", r"blk\.2\.ffn_gate", poison
    ),
}
SHOWN_BY_DIGESTS = {
    "a bit": Fault("bytes: blk.2.ffn_up.weight differs", r"blk\.2\.ffn_up\.", flip_bit),
    "a bit of an expert": Fault(
        "bytes: blk.1.ffn_up_exps.weight differs",
        r"blk\.1\.ffn_up_exps",
        flip_bit,
        MOE,
        "IQ4_XS",
    ),
    "a bit of an unquantized trunk": Fault(
        "bytes: blk.2.ffn_up.weight differs", r"blk\.2\.ffn_up\.", flip_bit, variant="BF16"
    ),
    "a bit of a base": Fault(
        "trunk: blk.2.ffn_up.weight differs from the base",
        r"blk\.2\.ffn_up\.",
        flip_bit,
        variant=INJECTED,
    ),
    "a bit of an injected head": Fault(
        "trunk: blk.2.ffn_up_exps.weight differs from the head",
        r"blk\.2\.ffn_up_exps",
        flip_bit,
        MOE,
        INJECTED,
    ),
}


def asked(built: Path, model: str, variant: str, digests: bool = False) -> tuple[object, ...]:
    """Options that the rules use for a variant; `digests` adds those for its bytes."""
    work = built / "results" / model / "work"
    kind = {INJECTED: "Q4_K_M"}.get(variant, variant)
    record = work / ("injected" if variant == INJECTED else "quantized") / f"{variant}.json"
    option = (
        "--trunk" if variant == INJECTED else "--digests",
        work / "convert/all.json" if variant == "BF16" else record,
    )
    source = ("--checkpoint", CHECKPOINTS / model, "--tokenizer-pre", "qwen35", "--type", kind)
    return (*source, *(option if digests else ()), *prompts(model))


def refused(built: Path, fails: Fails, folder: Path, fault: Fault, digests: bool) -> str:
    """Return the message on a file with this fault; no other file appears."""
    name = f"{fault.model}-{fault.variant}.gguf"
    faulty = damaged(
        built / "results" / fault.model / name, folder / "faulty.gguf", fault.change, fault.tensors
    )
    options = (
        "--publish",
        folder / "final.gguf",
        *asked(built, fault.model, fault.variant, digests),
    )
    message = fails("verify.py", faulty, *options, out=folder / "report.json")
    assert list(folder.iterdir()) == [faulty]
    return message.partition(" is not published: ")[2]


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_refused_by_the_right_check(
    built: Path, fails: Fails, tmp_path: Path, name: str
) -> None:
    message = refused(built, fails, tmp_path, FAULTS[name], digests=False)
    assert message.startswith(FAULTS[name].verdict) or f"; {FAULTS[name].verdict}" in message
    assert ("norms: " in message) == (
        FAULTS[name].verdict.startswith("norms")
    ) and "drafting" not in message


@pytest.mark.parametrize("name", SHOWN_BY_DIGESTS)
def test_only_digests_find_a_changed_bit(
    built: Path, fails: Fails, tmp_path: Path, name: str
) -> None:
    """The check of values finds it only in unquantized files."""
    fault = SHOWN_BY_DIGESTS[name]
    message = refused(built, fails, tmp_path, fault, digests=True)
    assert fault.verdict in message and ("values: " in message) == (fault.variant == "BF16")


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize(
    ("key", "change", "verdict"),
    [
        (
            "rope.dimension_sections",
            lambda raw: raw[:16] + raw[20:24] + raw[16:20] + raw[24:],
            "metadata: {}.rope.dimension_sections is [",
        ),
        (
            "tokenizer.ggml.eos_token_id",
            lambda raw: bytes([raw[0] ^ 1]) + raw[1:],
            "metadata: tokenizer.ggml.eos_token_id is ",
        ),
        (
            "tokenizer.chat_template",
            lambda raw: raw[:-1] + bytes([raw[-1] ^ 1]),
            "chat template: differs from the source's from",
        ),
    ],
)
def test_wrong_metadata_is_refused(
    built: Path,
    fails: Fails,
    tmp_path: Path,
    model: str,
    key: str,
    change: Callable[[bytes], bytes],
    verdict: str,
) -> None:
    opened = reader.read(built / "results" / model / f"{model}-Q8_0.gguf")
    key = key if key.startswith("tokenizer.") else f"{opened.architecture}.{key}"
    other = Value(opened.metadata[key].type, change(opened.metadata[key].raw))
    assert other != opened.metadata[key]
    tensors = [(info, [opened.ranges[name]]) for name, info in opened.tensors.items()]
    writer.write(tmp_path / "faulty.gguf", {**opened.metadata, key: other}, tensors)
    options = ("--publish", tmp_path / "final.gguf", *asked(built, model, "Q8_0"))
    message = fails("verify.py", tmp_path / "faulty.gguf", *options, out=tmp_path / "report.json")
    assert (
        verdict.format(opened.architecture) in message and ";" not in message
    )  # and no other check fails
    assert [path.name for path in tmp_path.iterdir()] == ["faulty.gguf"]


@pytest.mark.parametrize("model", MODELS)
def test_a_head_from_another_checkpoint_is_refused(
    built: Path, run: Run, fails: Fails, tmp_path: Path, model: str
) -> None:
    """All shapes match and it drafts: the same head with slightly changed matrices."""
    config, tensors = (
        json.loads((CHECKPOINTS / model / "config.json").read_text()),
        read_tensors(CHECKPOINTS / model),
    )
    for name, (dtype, array) in tensors.items():
        if name.startswith("mtp.") and array.ndim > 1:
            tensors[name] = (dtype, array ^ (array & 1 << 6 ^ 1 << 6))
    other = write_checkpoint(tmp_path / "other" / model, CHECKPOINTS / model, config, tensors)
    base, out = built / "results" / model / "work/trunk/Q4_K_M.gguf", tmp_path / "file.gguf"
    assert (
        run("inject.py", base, "--head", other, "--head-type", "Q8_0", "--out", out).returncode == 0
    )
    options = ("--base", base, "--publish", tmp_path / "final.gguf", *asked(built, model, "Q4_K_M"))
    message = fails("verify.py", out, *options, out=tmp_path / "report.json")
    assert re.search(r"values: blk\.[24]\.", message) and "trunk: " not in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file.gguf", "other"]


def test_a_type_that_was_not_requested_is_refused(
    built: Path, fails: Fails, tmp_path: Path
) -> None:
    file, asked = (
        built / "results/tiny-qwen3.5/tiny-qwen3.5-Q4_K_M.gguf",
        ("--type", "Q8_0", "--head", "Q6_K"),
    )
    message = fails(
        "verify.py", file, *asked, *prompts("tiny-qwen3.5"), out=tmp_path / "report.json"
    )
    assert "general.file_type is 15, not 7 (Q8_0)" in message and "is Q8_0, not Q6_K" in message


def test_the_trunk_of_another_base_is_refused(built: Path, fails: Fails, tmp_path: Path) -> None:
    file, base = (
        built / f"results/tiny-qwen3.5/tiny-qwen3.5-{v}.gguf" for v in ("Q4_K_M-injected", "IQ4_XS")
    )
    message = fails(
        "verify.py", file, "--base", base, *prompts("tiny-qwen3.5"), out=tmp_path / "report.json"
    )
    assert "differs from the base" in message


def test_a_file_without_a_head_is_refused(built: Path, fails: Fails, tmp_path: Path) -> None:
    trunk = built / "results/tiny-qwen3.5/work/convert/trunk.gguf"
    assert "has no head" in fails(
        "verify.py", trunk, *prompts("tiny-qwen3.5"), out=tmp_path / "report.json"
    )


def zero_end(source: Path, out: Path, name: str) -> Path:
    """A copy of a GGUF with the last third of one tensor zeroed."""
    piece, raw = reader.read(source).ranges[name], bytearray(source.read_bytes())
    raw[piece.offset + piece.size * 2 // 3 : piece.offset + piece.size] = bytes(
        piece.size - piece.size * 2 // 3
    )
    out.write_bytes(raw)
    return out


@pytest.mark.parametrize("name", ["blk.1.ffn_down.weight", "token_embd.weight"])
def test_a_damaged_file_without_a_head_is_refused_by_its_values(
    built: Path, run: Run, fails: Fails, tmp_path: Path, name: str
) -> None:
    trunk, checkpoint = (
        built / "results/tiny-qwen3.5/work/convert/trunk.gguf",
        CHECKPOINTS / "tiny-qwen3.5",
    )
    options = (
        "--checkpoint",
        checkpoint,
        "--tokenizer-pre",
        "qwen35",
        "--type",
        "BF16",
        "--head",
        "none",
        *prompts("tiny-qwen3.5"),
    )
    assert run("verify.py", trunk, *options, "--out", tmp_path / "good.json").returncode == 0
    message = fails(
        "verify.py",
        zero_end(trunk, tmp_path / "bad.gguf", name),
        *options,
        out=tmp_path / "report.json",
    )
    assert f"values: {name} differs from its source" in message


def test_a_damaged_draft_sidecar_is_refused_by_its_values(
    built: Path, run: Run, fails: Fails, tmp_path: Path
) -> None:
    """Most of its drafts are still accepted."""
    checkpoint, draft = CHECKPOINTS / "tiny-qwen3.5", tmp_path / "draft.gguf"
    assert (
        run(
            "convert.py", checkpoint, "--tokenizer-pre", "qwen35", "--part", "draft", "--out", draft
        ).returncode
        == 0
    )
    target = built / "results/tiny-qwen3.5/tiny-qwen3.5-BF16.gguf"
    options = (
        "--checkpoint",
        checkpoint,
        "--tokenizer-pre",
        "qwen35",
        "--target",
        target,
        "--type",
        "BF16",
        "--head",
        "BF16",
    )
    options = (*options, *prompts("tiny-qwen3.5"))
    assert run("verify.py", draft, *options, "--out", tmp_path / "good.json").returncode == 0
    bad = zero_end(draft, tmp_path / "bad.gguf", "token_embd.weight")
    message = fails("verify.py", bad, *options, out=tmp_path / "report.json")
    assert "values: token_embd.weight differs" in message and "drafting" not in message


def test_damage_after_conversion_is_refused_by_the_digests(
    built: Path, fails: Fails, tmp_path: Path
) -> None:
    work = built / "results/tiny-qwen3.5/work/convert"
    bad = zero_end(work / "all.gguf", tmp_path / "bad.gguf", "blk.0.ffn_up.weight")
    asked = ("--digests", work / "all.json", *prompts("tiny-qwen3.5"))
    assert "bytes: blk.0.ffn_up.weight differs" in fails(
        "verify.py", bad, *asked, out=tmp_path / "report.json"
    )


@pytest.mark.parametrize("kind", ["F16", "F32"])
def test_f16_and_f32_files_can_be_published(
    built: Path, run: Run, tmp_path: Path, kind: str
) -> None:
    source, out = built / "results/tiny-qwen3.5/tiny-qwen3.5-BF16.gguf", tmp_path / f"{kind}.gguf"
    assert run("quantize.py", source, "--type", kind, "--head", kind, "--out", out).returncode == 0
    done = run(
        "verify.py",
        out,
        *asked(built, "tiny-qwen3.5", kind),
        "--head",
        kind,
        "--out",
        tmp_path / "report.json",
    )
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
def test_an_impossible_quantization_leaves_no_file(
    built: Path, fails: Fails, tmp_path: Path, arguments: tuple[str, ...], named: str
) -> None:
    source = built / "results/tiny-qwen3.5/tiny-qwen3.5-BF16.gguf"
    assert named in fails("quantize.py", source, *arguments, out=tmp_path / "out.gguf")
