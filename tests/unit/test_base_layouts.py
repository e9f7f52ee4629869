"""Bases in every layout that llama.cpp loads get a head; injection and verification agree."""

import json
from collections.abc import Callable
from pathlib import Path

import base_layouts as layouts
import numpy as np
import pytest
from base_layouts import Base, write_base
from conftest import CHECKPOINTS
from gguf.constants import GGUFValueType
from layouts import read_tensors, write_checkpoint, write_layout
from mtpforge.convert import native
from mtpforge.errors import GgufError, VerificationError
from mtpforge.gguf import reader
from mtpforge.inject.inject import inject
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.verify.request import Request
from mtpforge.verify.verify import verify

DENSE, MOE, NEXT = "tiny-qwen3.5", "tiny-qwen3.5-moe", "qwen3-next"
NO_PROGRAMS = LlamaCpp(Path("no/programs"))
Change = Callable[[Base], object]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    embedded = {name: CHECKPOINTS / name for name in (DENSE, MOE)}
    return {**embedded, NEXT: write_layout(NEXT, tmp_path_factory.mktemp("next"))}


@pytest.fixture(scope="module")
def trunks(
    checkpoints: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("trunks")
    for name, checkpoint in checkpoints.items():
        native.convert(checkpoint, folder / f"{name}.gguf", "trunk", "qwen35")
    return {name: folder / f"{name}.gguf" for name in checkpoints}


class Bench:
    """One model, and a folder for its bases."""

    def __init__(self, checkpoint: Path, trunk: Path, folder: Path) -> None:
        self.checkpoint = checkpoint
        self.trunk = trunk
        self.folder = folder

    def injected(self, *changes: Change) -> Path:
        base = self.trunk
        for i, change in enumerate(changes):
            base = write_base(base, self.folder / f"base-{i}.gguf", change)
        inject(base, self.checkpoint, self.folder / "out.gguf")
        return self.folder / "out.gguf"

    def verdicts(self, path: Path, request: Request | None = None) -> dict[str, tuple[str, str]]:
        """Check -> verdict and evidence; those fail that need llama.cpp's programs."""
        request = request or Request(checkpoint=self.checkpoint, tokenizer_pre="qwen35")
        with pytest.raises(VerificationError) as error:
            verify(path, request, NO_PROGRAMS)
        rows = [line.strip("| ").split("|") for line in error.value.table.splitlines()[2:]]
        return {row[0].strip(): (row[1].strip(), row[2].strip()) for row in rows}

    def failed(self, *changes: Change) -> str:
        """The evidence of the checks that fail on a base without any program."""
        verdicts = self.verdicts(self.injected(*changes))
        return "; ".join(
            text
            for name, (verdict, text) in verdicts.items()
            if verdict == "FAILED" and name not in ("drafting", "programs")
        )

    def refusal(self, change: Change) -> str:
        with pytest.raises(GgufError) as error:
            self.injected(change)
        assert not (self.folder / "out.gguf").exists()
        return str(error.value)


@pytest.fixture
def bench(
    checkpoints: dict[str, Path], trunks: dict[str, Path], tmp_path: Path
) -> Callable[[str], Bench]:
    return lambda model: Bench(checkpoints[model], trunks[model], tmp_path)


@pytest.mark.parametrize(
    ("model", "changes"),
    [
        (MOE, [layouts.fused_experts]),
        (DENSE, [layouts.fused_attention]),
        (MOE, [layouts.fused_experts, layouts.fused_attention]),
        (DENSE, [layouts.scaled]),
        (MOE, [layouts.scaled]),
        (DENSE, [layouts.fused_attention, layouts.scaled]),
        (DENSE, [layouts.own_output]),
        (DENSE, [layouts.biased]),
        (DENSE, [layouts.biased, layouts.fused_attention]),
        (DENSE, [layouts.projected]),
        (DENSE, [layouts.key_heads_of_each_block]),
        (DENSE, [layouts.resized(1408)]),
        (DENSE, [layouts.resized(1268)]),
        (MOE, [layouts.resized(1333)]),
        (MOE, [layouts.resized(1300), layouts.fused_experts, layouts.scaled]),
        (NEXT, [layouts.grouped_by_key_head]),
    ],
    ids=lambda value: (
        value
        if isinstance(value, str)
        else "-".join(change.__qualname__.split(".")[0] for change in value)
    ),
)
def test_a_base_is_injected_and_all_that_its_source_has_is_compared(
    bench: Callable[[str], Bench], model: str, changes: list[Change]
) -> None:
    made = bench(model)
    verdicts = made.verdicts(made.injected(*changes))
    for name in ("inventory", "metadata", "finite", "norms", "values"):
        assert verdicts[name][0] == "passed", verdicts[name]
    assert "all equal the source" in verdicts["values"][1]
    assert verdicts["drafting"][0] == "FAILED"  # so no other check has stopped it


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (layouts.own_output, "output.weight"),
        (layouts.projected, "cls.output.bias"),
        (layouts.resized(1408), "128 rows of token_embd.weight"),
        (layouts.scaled, ".input_scale"),
    ],
)
def test_the_report_says_what_the_source_does_not_have(
    bench: Callable[[str], Bench], change: Change, named: str
) -> None:
    made = bench(DENSE)
    evidence = made.verdicts(made.injected(change))["values"][1]
    assert "the source does not have" in evidence and named in evidence


def test_nothing_is_said_to_be_left_out_of_a_plain_base(bench: Callable[[str], Bench]) -> None:
    made = bench(MOE)
    for changes in ([], [layouts.fused_experts]):
        assert "does not have" not in made.verdicts(made.injected(*changes))["values"][1]


@pytest.mark.parametrize("apart", [True, False])
def test_a_head_is_fused_or_apart_whatever_the_base_is(
    bench: Callable[[str], Bench], tmp_path: Path, apart: bool
) -> None:
    made = bench(MOE)
    native.convert(made.checkpoint, tmp_path / "head.gguf", "head")
    head = write_base(tmp_path / "head.gguf", tmp_path / "fused.gguf", layouts.fused_experts)
    base = made.trunk
    if not apart:
        base = write_base(base, tmp_path / "base.gguf", layouts.fused_experts)
    inject(base, head, tmp_path / "out.gguf")
    assert "blk.2.ffn_gate_up_exps.weight" in reader.read(tmp_path / "out.gguf").tensors
    assert made.verdicts(tmp_path / "out.gguf")["values"][0] == "passed"
    spoiled = write_base(head, tmp_path / "spoiled.gguf", swap_halves("ffn_gate_up_exps.weight"))
    inject(base, spoiled, tmp_path / "out.gguf")
    assert (
        "blk.2.ffn_gate_up_exps.weight differs" in made.verdicts(tmp_path / "out.gguf")["values"][1]
    )


# ── the same layouts with a fault ──


def swap_halves(ending: str) -> Change:
    """Swap the halves of the rows of each matrix: up before gate, keys before queries."""

    def change(base: Base) -> None:
        for name in [name for name in base.tensors if name.endswith(ending)]:
            base.tensors[name] = np.roll(base.tensors[name], base.tensors[name].shape[-2] // 2, -2)

    return change


def set_all(ending: str, value: float) -> Change:
    """Set all entries of small F32 tensors, or of any tensor to 0."""

    def change(base: Base) -> None:
        for name in [name for name in base.tensors if name.endswith(ending)]:
            base.tensors[name][...] = value

    return change


@pytest.mark.parametrize(
    ("model", "layout", "fault", "found"),
    [
        (MOE, layouts.fused_experts, swap_halves("gate_up_exps.weight"), "ffn_gate_up_exps.weight"),
        (DENSE, layouts.fused_attention, swap_halves("3.attn_qkv.weight"), "blk.3.attn_qkv.weight"),
        (NEXT, layouts.grouped_by_key_head, swap_halves("ssm_in.weight"), "blk.0.ssm_in.weight"),
        (MOE, layouts.scaled, set_all("exps.scale", 1), "_exps.weight"),
        (DENSE, layouts.scaled, set_all("ffn_up.scale", 0), "ffn_up.weight"),
        (DENSE, layouts.resized(1408), swap_halves("token_embd.weight"), "token_embd.weight"),
        (DENSE, layouts.resized(1268), swap_halves("token_embd.weight"), "token_embd.weight"),
        (DENSE, layouts.own_output, swap_halves("ffn_up.weight"), "ffn_up.weight"),
        (DENSE, layouts.own_output, set_all("norm.weight", np.nan), "has NaN"),
        (DENSE, layouts.own_output, swap_halves("output.weight"), "from the source's embeddings"),
        (DENSE, layouts.own_output, set_all("output.weight", 0), "from the source's embeddings"),
    ],
)
def test_a_fault_is_found_in_each_layout(
    bench: Callable[[str], Bench], model: str, layout: Change, fault: Change, found: str
) -> None:
    assert found in bench(model).failed(layout, fault)


@pytest.mark.parametrize("value", [1e-3, 1000.0])
@pytest.mark.parametrize("fused", [(), (layouts.fused_attention,)], ids=["apart", "fused"])
def test_biases_that_the_source_does_not_have_must_be_zero(
    bench: Callable[[str], Bench], tmp_path: Path, value: float, fused: tuple[Change, ...]
) -> None:
    made = bench(DENSE)
    path = made.injected(lambda base: layouts.biased(base, value), *fused)
    verdict, evidence = made.verdicts(path)["values"]
    assert verdict == "FAILED"
    assert "blk.3.attn_q.bias (F32) is not zero" in evidence and "head_from" in evidence
    of_another = Request(head_from=made.checkpoint, tokenizer_pre="qwen35")
    assert made.verdicts(path, of_another)["values"][0] == "passed"


def test_an_output_matrix_that_was_trained_apart_passes(bench: Callable[[str], Bench]) -> None:
    def trained(base: Base) -> None:
        layouts.own_output(base)
        values = (base.tensors["output.weight"].astype(np.uint32) << 16).view(np.float32)
        noise = np.random.default_rng(0).standard_normal(values.shape, np.float32)
        moved = values + 0.3 * values.std() * noise
        base.tensors["output.weight"] = (moved.view(np.uint32) >> 16).astype("<u2")

    assert bench(DENSE).failed(trained) == ""


# ── bases that must be refused ──


def remove(name: str) -> Change:
    return lambda base: base.tensors.pop(name)


def add(name: str, *shape: int) -> Change:
    return lambda base: base.tensors.update({name: np.zeros(shape, "<f4")})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove("blk.1.ffn_up.weight"), "blk.1.ffn_up.weight is missing"),
        (remove("token_embd.weight"), "token_embd.weight is missing"),
        (remove("blk.3.attn_k_norm.weight"), "blk.3.attn_k_norm.weight is missing"),
        (add("rope_freqs.weight", 8), "rope_freqs.weight does not belong there"),
        (add("blk.0.ffn_up.bias", 512), "blk.0.ffn_up.bias does not belong there"),
        (add("blk.0.ssm_conv1d.scale", 1), "blk.0.ssm_conv1d.scale does not belong there"),
        (add("blk.0.ffn_up.weight", 99, 256), "blk.0.ffn_up.weight has shape [99, 256], not"),
        (add("blk.0.ffn_up.scale", 2), "blk.0.ffn_up.scale has shape [2], not [1]"),
        (add("cls.output.bias", 256), "cls.output.bias does not belong there"),
        (add("cls.output.weight", 256, 9), "cls.output.weight has shape [256, 9], not [256, 256]"),
        (add("blk.3.attn_k.bias", 3), "blk.3.attn_k.bias has shape [3], not"),
        (add("output.weight", 1280, 128), "output.weight has shape [1280, 128], not [1280, 256]"),
        (add("token_embd.weight", 1280, 128), "token_embd.weight has shape [1280, 128], not"),
        (add("token_embd.weight", 9, 256), "has 9 rows for 1280 tokens, which llama.cpp cannot"),
    ],
)
def test_a_base_with_other_tensors_is_refused_before_anything_is_written(
    bench: Callable[[str], Bench], change: Change, message: str
) -> None:
    refusal = bench(DENSE).refusal(change)
    assert message in refusal and len(refusal) < 400


def test_injection_and_verification_find_the_same_faults(
    bench: Callable[[str], Bench], tmp_path: Path
) -> None:
    """Without the folder's configuration, a head does not know its trunk."""
    made = bench(DENSE)
    native.convert(made.checkpoint, tmp_path / "head.gguf", "head")
    base = write_base(made.trunk, tmp_path / "base.gguf", remove("blk.1.ffn_up.weight"))
    inject(base, tmp_path / "head.gguf", tmp_path / "out.gguf")
    evidence = made.verdicts(tmp_path / "out.gguf")["inventory"]
    assert evidence == ("FAILED", "blk.1.ffn_up.weight is missing")


def test_a_head_with_embeddings_of_its_own_needs_a_base_with_as_many_tokens(
    bench: Callable[[str], Bench], tmp_path: Path
) -> None:
    """As in GLM-4.5, whose heads have them."""
    made = bench(DENSE)
    native.convert(made.checkpoint, tmp_path / "head.gguf", "head")
    own = add("blk.4.nextn.embed_tokens.weight", 1280, 256)
    head = write_base(tmp_path / "head.gguf", tmp_path / "own.gguf", own)
    inject(made.trunk, head, tmp_path / "out.gguf")
    base = write_base(made.trunk, tmp_path / "base.gguf", layouts.resized(1408))
    with pytest.raises(GgufError, match=r"is for 1280 tokens, .* has 1408: a head with embeddings"):
        inject(base, head, tmp_path / "refused.gguf")


def ollamas_names(base: Base) -> None:
    for name in [name for name in base.tensors if name.endswith("ssm_dt.bias")]:
        base.tensors[name.removesuffix(".bias")] = base.tensors.pop(name)


def ollamas_sections(base: Base) -> None:
    base.set_array("qwen35.rope.dimension_sections", [3, 3, 2], GGUFValueType.INT32)


def ollamas_heads(base: Base) -> None:
    base.set_array("qwen35.attention.head_count_kv", [0, 0, 0, 2], GGUFValueType.UINT32)


@pytest.mark.parametrize(
    ("change", "sign"),
    [
        (add("v.blk.0.attn_q.weight", 16, 16), "v.blk.0.attn_q.weight"),
        (add("mtp.fc.weight", 16, 16), "mtp.fc.weight"),
        (ollamas_names, "blk.0.ssm_dt"),
        (ollamas_sections, "qwen35.rope.dimension_sections is [3, 3, 2]"),
        (ollamas_heads, "qwen35.attention.head_count_kv is [0, 0, 0, 2]"),
    ],
)
def test_a_base_of_ollamas_converter_is_recognized(
    bench: Callable[[str], Bench], change: Change, sign: str
) -> None:
    refusal = bench(DENSE).refusal(change)
    assert f"has the layout of Ollama's converter ({sign}), which llama.cpp cannot load" in refusal
    assert "take a GGUF of llama.cpp's converter" in refusal


def test_one_value_for_each_block_gets_one_for_the_head(bench: Callable[[str], Bench]) -> None:
    made = bench(DENSE)
    out = reader.read(made.injected(layouts.key_heads_of_each_block))
    assert out.get("qwen35.attention.head_count_kv") == [2] * 5


def test_other_key_heads_are_another_model(bench: Callable[[str], Bench]) -> None:
    def change(base: Base) -> None:
        base.set_array("qwen35.attention.head_count_kv", [2, 2, 2, 1], GGUFValueType.UINT32)

    assert "is [2, 2, 2, 1] in" in bench(DENSE).refusal(change)


def test_a_head_knows_whether_its_embeddings_are_tied_as_conversion_does(
    bench: Callable[[str], Bench], tmp_path: Path
) -> None:
    """The levels of config.json disagree; without an output matrix, the base must not have one."""
    made = bench(DENSE)
    config = json.loads((made.checkpoint / "config.json").read_text())
    config["tie_word_embeddings"] = True
    config["text_config"]["tie_word_embeddings"] = False
    folder = write_checkpoint(
        tmp_path / "levels", made.checkpoint, config=config, tensors=read_tensors(made.checkpoint)
    )
    inject(made.trunk, folder, tmp_path / "out.gguf")
    assert "output.weight" not in reader.read(tmp_path / "out.gguf").tensors
