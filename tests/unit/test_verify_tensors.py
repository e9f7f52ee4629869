"""Verification of values and of running files: samples, errors, norms, near ties."""

from pathlib import Path

import numpy as np
import pytest
from gguf.constants import GGMLQuantizationType
from gguf.quants import quantize
from layouts import write_layout
from mtpforge.checkpoint.checkpoint import Checkpoint
from mtpforge.checkpoint.families.registry import family_of
from mtpforge.checkpoint.hparams import Hparams
from mtpforge.convert import plan
from mtpforge.convert import values as converted
from mtpforge.errors import ToolchainError, VerificationError
from mtpforge.gguf import reader, writer
from mtpforge.gguf.reader import Gguf, TensorInfo
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.llama_cpp.server import Choice, Server, serve
from mtpforge.verify import running, sample, tensors
from mtpforge.verify.report import Acceptance, Check, TypeErrors
from mtpforge.verify.request import Request

Q8_0 = GGMLQuantizationType.Q8_0
EXPERTS, ROWS, WIDTH = (
    16,
    200,
    512,
)  # more weights than `sample.LARGE`, and no whole number of stretches in an expert


@pytest.mark.parametrize(
    "name", ["tiny-qwen3.5-moe", "moe-separate-experts", "moe-fp8", "moe-fp8-experts", "qwen3-next"]
)
def test_sampled_rows_of_a_checkpoint_equal_the_converted_tensor(name: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint(write_layout(name, tmp_path))
    family, hparams = family_of(checkpoint.architecture), Hparams(checkpoint.config)
    rng = np.random.default_rng(0)
    for item in plan.plan_conversion(checkpoint, family, hparams, "all"):
        whole = np.concatenate(list(converted.values(checkpoint, item))).reshape(
            -1, item.row.shape[-1]
        )
        some = np.flatnonzero(rng.random(len(whole)) < 0.2)
        some = np.union1d(some, [len(whole) - 1])
        assert np.array_equal(converted.rows(checkpoint, item, some), whole[some]), item.row.name


@pytest.mark.parametrize(
    "shape", [(248_320, 64), (EXPERTS, ROWS, WIDTH), (300, 3, 4096), (2, 1 << 20), (2, 1, 1 << 20)]
)
def test_a_sample_is_spread_over_the_whole_tensor(shape: tuple[int, ...]) -> None:
    info = TensorInfo("blk.0.x.weight", shape, Q8_0)
    rows, matrix = info.elements // shape[-1], shape[-2]
    numbers = sample.sample_rows(info)
    assert np.array_equal(numbers, sample.sample_rows(info)) and np.array_equal(
        numbers, np.unique(numbers)
    )
    assert numbers[0] >= 0 and numbers[-1] < rows
    if matrix > sample.RUN * sample.SAMPLE:
        assert len(numbers) < 2 * rows / sample.SAMPLE + sample.RUN
    assert set(numbers // matrix) == set(range(rows // matrix))  # each expert
    stretches = numbers // (sample.RUN * sample.SAMPLE)
    assert (
        np.diff(np.unique(stretches)).max(initial=1) <= 2
    )  # and no long stretch of rows is left out
    assert np.array_equal(sample.sample_rows(info, whole=True), np.arange(rows))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Gguf, np.ndarray]:
    """A file with one large tensor at Q8_0, and its right values as rows."""
    right = np.random.default_rng(1).standard_normal((EXPERTS * ROWS, WIDTH)).astype(np.float32)
    info = TensorInfo("blk.0.ffn_up_exps.weight", (EXPERTS, ROWS, WIDTH), Q8_0)
    assert info.elements > sample.LARGE
    path = tmp_path_factory.mktemp("large") / "large.gguf"
    writer.write(path, {}, [(info, [memoryview(quantize(right, Q8_0).tobytes())])])
    return reader.read(path), right


def problem(large: tuple[Gguf, np.ndarray], right: np.ndarray) -> str:
    (opened, _), name = large, "blk.0.ffn_up_exps.weight"
    found = tensors.compare_tensors(opened, {name: lambda numbers: right[numbers]}).all
    assert [each.name for each in found] == [name] and 0 < found[0].rows < len(right) / 8
    return found[0].problem


def test_right_values_pass(large: tuple[Gguf, np.ndarray]) -> None:
    assert problem(large, large[1]) == ""


def test_swapped_experts_are_found(large: tuple[Gguf, np.ndarray]) -> None:
    experts = large[1].reshape(EXPERTS, ROWS, WIDTH)
    for a, b in [(0, 1), (7, 8), (0, EXPERTS - 1)]:
        other = experts.copy()
        other[[a, b]] = other[[b, a]]
        assert "(limit" in problem(large, other.reshape(-1, WIDTH)) or "out of place" in problem(
            large, other.reshape(-1, WIDTH)
        )


def test_rows_off_by_one_are_found_anywhere_in_an_expert(
    large: tuple[Gguf, np.ndarray],
) -> None:
    for first in (0, 1500, EXPERTS * ROWS - 140):
        other = large[1].copy()
        other[first : first + 140] = np.roll(other[first : first + 140], 1, axis=0)
        assert "out of place" in problem(large, other) or "(limit" in problem(large, other)


def test_a_row_lost_in_a_scale_is_accepted(tmp_path: Path) -> None:
    """The embedding of an unused token, too small for half precision."""
    right = np.random.default_rng(2).standard_normal((64, 256)).astype(np.float32)
    right[5] = 1e-12
    info = TensorInfo("token_embd.weight", right.shape, Q8_0)
    writer.write(tmp_path / "f.gguf", {}, [(info, [memoryview(quantize(right, Q8_0).tobytes())])])
    opened = reader.read(tmp_path / "f.gguf")
    assert not tensors.stored_rows(opened, info.name, np.array([5])).any()
    assert (
        tensors.compare_tensors(opened, {info.name: lambda numbers: right[numbers]}).problems == []
    )
    right[5] = 0.05  # small, but not lost
    assert (
        "has a row with an error of 1.00"
        in tensors.compare_tensors(opened, {info.name: lambda numbers: right[numbers]}).problems[0]
    )


def test_lost_rows_are_found_at_the_coarsest_type(tmp_path: Path) -> None:
    """An error of 1 is below the limit of ternary types."""
    kind = GGMLQuantizationType.TQ2_0
    right = np.random.default_rng(3).standard_normal((8, 256)).astype(np.float32)
    info = TensorInfo("blk.0.ffn_up.weight", right.shape, kind)
    for lost, problem in [([], ""), ([3], "has only zeros in row 3")]:
        stored = right.copy()
        stored[lost] = 0
        raw = memoryview(quantize(stored, kind).tobytes())
        writer.write(tmp_path / "x.gguf", {}, [(info, [raw])])
        opened = reader.read(tmp_path / "x.gguf")
        found = tensors.compare_tensors(opened, {info.name: lambda rows: right[rows]}).all[0]
        assert found.problem == (problem and f"{info.name} (TQ2_0) {problem}")


def test_values_that_upstream_computed_in_f16_are_accepted(tmp_path: Path) -> None:
    """It adds 1 to the norms of an F16 checkpoint in F16."""
    right = np.random.default_rng(0).normal(1, 0.2, (1, 256)).astype(np.float32)
    info = TensorInfo("blk.0.attn_norm.weight", (256,), GGMLQuantizationType.F32)
    path = tmp_path / "norm.gguf"
    half = right.astype(np.float16).astype(np.float32)
    for stored, passes in (
        (half, True),
        (half * np.float32(1.002), False),
        (right * np.float32(1.0001), False),
        ((half * np.float32(1.05)).astype(np.float16).astype(np.float32), False),
    ):
        writer.write(path, {}, [(info, [memoryview(stored.tobytes())])])
        found = tensors.compare_tensors(reader.read(path), {info.name: lambda rows: right[rows]})
        assert (found.problems == []) == passes


def test_the_report_has_the_error_of_each_type(large: tuple[Gguf, np.ndarray]) -> None:
    opened, right = large
    found = tensors.compare_tensors(
        opened, {name: lambda numbers: right[numbers] for name in opened.tensors}
    )
    assert found.errors is not None
    error = found.errors["blk.0.ffn_up_exps.weight"]
    assert 0.003 < error < 0.0105
    assert found.errors_by_type == {"Q8_0": TypeErrors(1, error, error, 0.0105)}


# ── drafting ──


CHOICES = [
    [Choice(7, 1, 2.0), Choice(8, 9, 0.05), Choice(9, 8, 1.0)],
    [Choice(1, 2, 3.0), Choice(2, 1, 3.0)],
]  # the second ends


@pytest.mark.parametrize(
    ("drafted", "passed", "detail"),
    [
        ([[7, 8, 9, 4], [1, 2]], True, "5 tokens are the same without drafting"),
        ([[7, 9, 1, 1], [1, 2]], True, "3 tokens are the same without drafting, up to 1 near ties"),
        ([[7, 8, 8], [1, 2]], False, "prompt 1, token 2: 8 with drafting, 9 without (1.00 ahead)"),
        ([[7, 8, 9], [2, 2]], False, "prompt 2, token 0: 2 with drafting, 1 without (3.00 ahead)"),
        (
            [[7, 6, 1, 1], [1, 2]],
            False,
            "prompt 1, token 1: 6 with drafting, 8 without (0.05 ahead)",
        ),
        (
            [[7, 8], [1, 2]],
            False,
            "prompt 1, token 2: nothing with drafting, 9 without (1.00 ahead)",
        ),
        (
            [[7, 8, 9], [1, 2, 3]],
            False,
            "prompt 2: the text ends after 2 tokens without drafting, not with it",
        ),
        ([[], []], False, "prompt 1, token 0: nothing with drafting, 7 without (2.00 ahead)"),
    ],
)
def test_text_may_differ_after_a_near_tie(
    monkeypatch: pytest.MonkeyPatch, drafted: list[list[int]], passed: bool, detail: str
) -> None:
    monkeypatch.setattr(running, "EQUAL", 3)
    check = running.check_same(drafted, CHOICES)
    assert check.passed == passed and check.detail.startswith(detail)


def test_a_token_without_probabilities_is_not_skipped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server lists tokens that end within a character, but without probabilities."""

    def entry(token: int, other: int, margin: float) -> dict[str, object]:
        return {
            "id": token,
            "top_logprobs": [
                {"id": token, "logprob": -0.1},
                {"id": other, "logprob": -0.1 - margin},
            ],
        }

    answer = {
        "tokens": [5, 178, 897],
        "completion_probabilities": [entry(5, 6, 1.0), entry(897, 8, 2.0)],
    }
    monkeypatch.setattr(Server, "ask", lambda *_: answer)
    choices = Server(Path(), None, 0).choices("prompt", 3)
    assert choices == [(5, 6, pytest.approx(1.0)), (178, None, 0.0), (897, 8, pytest.approx(2.0))]
    assert (
        running.check_same([[5, 178, 897]], [choices]).passed
        and running.check_same([[5, 4, 4]], [choices]).passed
    )
    assert not running.check_same([[5, 178, 8]], [choices]).passed


@pytest.mark.parametrize(
    ("unquantized", "passed", "detail"),
    [
        (Acceptance(acceptance=0.9), True, "75.0%, BF16 has 90.0%"),
        (
            Acceptance(acceptance=0.96),
            False,
            "75.0%, BF16 has 96.0%: at most 20 points less are allowed",
        ),
        (Acceptance(skipped="too large"), True, "not compared: too large"),
    ],
)
def test_acceptance_is_compared_with_the_unquantized_file(
    tmp_path: Path, unquantized: Acceptance, passed: bool, detail: str
) -> None:
    unquantized.write(tmp_path / "acceptance.json")
    known = Acceptance.read(tmp_path / "acceptance.json")
    check = running.check_acceptance(Acceptance(acceptance=0.75), known, 0.2)
    assert check == Check("acceptance", passed, detail)


def test_a_file_larger_than_the_memory_is_not_run(tmp_path: Path) -> None:
    writer.write(tmp_path / "huge.gguf", {}, [])
    with (tmp_path / "huge.gguf").open("r+b") as file:
        file.truncate(1 << 43)
    found = running.measure_acceptance(tmp_path / "huge.gguf", Request(), LlamaCpp(tmp_path))
    assert "do not fit into" in (found.skipped or "")


def test_a_reference_that_fails_is_named_as_what_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer.write(tmp_path / "all.gguf", {}, [])
    late = Check("drafting", False, "llama-server has not answered")
    monkeypatch.setattr(running, "check_drafting", lambda *_: (late, []))
    monkeypatch.setattr(running.converter_architectures, "why_not_drafting", lambda _: None)
    said = f"the BF16 file that quants are compared with, {tmp_path}/all.gguf: llama-server has"
    with pytest.raises(VerificationError, match=said):
        running.measure_acceptance(tmp_path / "all.gguf", Request(), LlamaCpp(tmp_path))


# ── other programs ──


def test_the_reason_of_an_abort_is_not_its_backtrace(tmp_path: Path) -> None:
    program = tmp_path / "llama-server"
    reason = "binary-ops.cpp:135: binary_op: unsupported types: src1: f16"
    lines = ["load_tensors: CPU", reason, "0x0 in __wait4 () at wait4.c:30", "[Inferior detached]"]
    echoes = [f"echo '{line}'" for line in lines]
    program.write_text("\n".join(["#!/bin/sh", *echoes, "exit 134\n"]))
    program.chmod(0o755)
    with (
        pytest.raises(ToolchainError, match=f"cannot load x.gguf: {reason}"),
        serve(LlamaCpp(tmp_path), Path("x.gguf"), log=tmp_path / "log", options=[]),
    ):
        pass


@pytest.mark.parametrize("status", [0, 1])
def test_the_check_of_other_programs_has_the_given_name(tmp_path: Path, status: int) -> None:
    program = tmp_path / "llama-gguf-split"
    program.write_text(f"#!/bin/sh\nexit {status}\n")
    program.chmod(0o755)
    opened = Gguf(tmp_path / "x.gguf", {}, {}, {})
    check = running.check_programs(opened, LlamaCpp(tmp_path), name="files open")
    assert check.name == "files open" and check.passed == (status == 0)
