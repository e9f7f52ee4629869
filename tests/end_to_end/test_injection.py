"""Injected heads draft in llama-server; as many drafts are accepted as of a kept head."""

from functools import cache
from pathlib import Path

import pytest
from conftest import CHECKPOINTS, MODELS, Run
from mtpforge.gguf import quant_types, reader
from mtpforge.gguf.head import trunk_digests, types_of
from mtpforge.gguf.reader import Gguf
from mtpforge.inject.inject import Options, inject
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.llama_cpp.server import serve
from mtpforge.quantize.llama_quantize import quantize
from mtpforge.quantize.plan import QuantizePlan
from mtpforge.quantize.recipe import Recipe, head_recipe
from mtpforge.quantize.request import QuantizeRequest
from splits import split

BASES = ("Q8_0", "Q4_K_M", "IQ4_XS", "IQ3_S")
HEADS = ("BF16", "Q8_0", "Q4_K")
LIMIT = 1_000_000
FINE = [name for name in quant_types.TENSOR_TYPES if quant_types.bits(name) >= 4]


class Bench:
    """The parts of both embedded models, and the files made of them, each once."""

    def __init__(self, folder: Path, built: Path, programs: Path) -> None:
        self.folder = folder
        self.built = built
        self.programs = programs
        self.base = cache(self._base)
        self.shards = cache(self._shards)
        self.preserved = cache(self._preserved)

    def part(self, model: str, name: str) -> Path:
        return self.built / "results" / model / "work/convert" / f"{name}.gguf"

    def _base(self, model: str, file_type: str) -> Path:
        path = self.folder / f"{model}-{file_type}.gguf"
        request = QuantizeRequest(file_type)
        quantize(self.part(model, "trunk"), path, request, LlamaCpp(self.programs))
        return path

    def _shards(self, model: str, file_type: str) -> Path:
        base = self.base(model, file_type)
        return split(base, self.folder / base.stem, base.stem, LIMIT)[0]

    def _preserved(self, model: str, file_type: str, head: str) -> tuple[Gguf, float]:
        path = self.folder / f"{model}-{file_type}-with-{head}.gguf"
        request = QuantizeRequest(file_type, head_recipe(head))
        quantize(self.part(model, "all"), path, request, LlamaCpp(self.programs))
        return reader.read(path), self.acceptance(model, path)

    def inject(self, model: str, base: Path, out: Path, types: Recipe) -> None:
        """Inject the model's BF16 head at these types."""
        inject(base, self.part(model, "head"), out, Options(types), LlamaCpp(self.programs))

    def acceptance(self, model: str, path: Path) -> float:
        """The share of drafts that is accepted; fails if there are none."""
        prompt = sorted((CHECKPOINTS / model / "prompts").glob("*.txt"))[0].read_text()
        options = [
            "--ctx-size",
            "1024",
            "--spec-type",
            "draft-mtp",
            "--spec-draft-n-max",
            "1",
        ]
        llama = LlamaCpp(self.programs, threads=1)
        with serve(llama, path, self.folder / "server.log", options) as running:
            answer = running.completion(prompt, 64)
        assert answer.drafts > 0
        return answer.accepted / answer.drafts


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, built: Path, toolchain: Path) -> Bench:
    return Bench(tmp_path_factory.mktemp("injection"), built, toolchain)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("file_type", BASES)
@pytest.mark.parametrize("files", ["single", "split"])
@pytest.mark.parametrize("model", MODELS)
def test_acceptance_equals_that_of_a_head_that_was_kept(
    bench: Bench, tmp_path: Path, model: str, files: str, file_type: str, head: str
) -> None:
    base = bench.base(model, file_type) if files == "single" else bench.shards(model, file_type)
    out = tmp_path / "out.gguf"
    bench.inject(model, base, out, head_recipe(head))
    made, (preserved, expected) = reader.read(out), bench.preserved(model, file_type, head)
    assert trunk_digests(made) == trunk_digests(reader.read(bench.base(model, file_type)))
    assert types_of(made.head) == {head}
    acceptance = bench.acceptance(model, out)
    if trunk_digests(made) == trunk_digests(preserved):
        assert acceptance == expected
    else:  # llama-quantize's mixes of types depend on the number of blocks
        assert acceptance >= expected - 0.1


@pytest.mark.parametrize("model", MODELS)
def test_a_split_result_drafts(bench: Bench, tmp_path: Path, model: str) -> None:
    first = bench.shards(model, "Q4_K_M")
    bench.inject(model, first, tmp_path / "out", head_recipe("Q8_0"))
    assert (
        bench.acceptance(model, tmp_path / "out" / first.name)
        >= bench.preserved(model, "Q4_K_M", "Q8_0")[1] - 0.1
    )


@pytest.mark.parametrize("head", FINE)
def test_every_head_type_from_four_bits_up_drafts(bench: Bench, tmp_path: Path, head: str) -> None:
    """The projection has another type."""
    model, mixed = MODELS[0], head_recipe(head, [("eh_proj", "Q6_K")])
    bench.inject(model, bench.base(model, "Q4_K_M"), tmp_path / "out.gguf", mixed)
    made = reader.read(tmp_path / "out.gguf").head
    assert (
        made.tensors["blk.4.nextn.eh_proj.weight"].type.name == "Q6_K"
        and made.tensors["blk.4.attn_q.weight"].type.name == head
    )
    assert bench.acceptance(model, tmp_path / "out.gguf") >= 0.7


def test_the_programs_read_types_within_the_head_from_a_file(
    built: Path, bench: Bench, tmp_path: Path, run: Run
) -> None:
    """Injected and quantized heads have them; verify.py refuses a head that has others."""
    model, exceptions = MODELS[0], tmp_path / "head.yaml"
    exceptions.write_text("eh_proj: Q8_0\n'attn_.*': Q6_K\n")
    types = ("--head-type", "Q4_K", "--head-tensors", exceptions)
    head, injected = bench.part(model, "head"), tmp_path / "injected.gguf"
    base = bench.base(model, "Q4_K_M")
    done = run("inject.py", base, "--head", head, *types, "--out", injected)
    assert done.returncode == 0, done.stderr
    types = ("--head", "Q4_K", "--head-tensors", exceptions)
    source, quantized = bench.part(model, "all"), tmp_path / "quantized.gguf"
    done = run("quantize.py", source, "--type", "Q5_0", *types, "--out", quantized)
    assert done.returncode == 0, done.stderr
    plan = tmp_path / "plan.json"
    done = run("quantize_plan.py", source, "--type", "Q5_0", *types, "--out", plan)
    assert done.returncode == 0, done.stderr
    planned = QuantizePlan.read(plan).types()
    for opened in map(reader.read, (injected, quantized)):
        found = {name.split(".", 2)[2]: info.type for name, info in opened.head.tensors.items()}
        assert found["nextn.eh_proj.weight"].name == "Q8_0"
        assert found["attn_q.weight"].name == "Q6_K" and found["ffn_up.weight"].name == "Q4_K"
    assert planned == {name: info.type for name, info in opened.tensors.items()}
    prompts = ("--prompts", CHECKPOINTS / model / "prompts", "--out", tmp_path / "report.json")
    prompts += ("--threads", 1)
    done = run("verify.py", injected, *types, *prompts)
    assert done.returncode == 0, done.stderr
    done = run("verify.py", injected, "--head", "Q4_K", *prompts)
    assert done.returncode == 1 and "attn_q.weight is Q6_K, not Q4_K" in done.stderr


@pytest.mark.parametrize(
    ("program", "needed"),
    [
        (("inject.py", "--head", "h.gguf"), "--head-type"),
        (("quantize.py", "--type", "Q4_0"), "--head"),
        (("quantize_plan.py", "--type", "Q4_0"), "--head"),
        (("verify.py",), "--head"),
    ],
)
def test_exceptions_need_a_type_to_except_from(
    run: Run, tmp_path: Path, program: tuple[str, ...], needed: str
) -> None:
    name, *options = program
    done = run(
        name, "in.gguf", *options, "--head-tensors", "f.yaml", "--out", tmp_path / "out.gguf"
    )
    assert done.returncode == 2 and f"--head-tensors needs {needed}" in done.stderr
