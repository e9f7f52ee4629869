"""Pieces and reused tensors give the same bytes as one plain run of llama-quantize."""

import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
from conftest import BIN, CHECKPOINTS, MODELS
from mtpforge import progress
from mtpforge.gguf import quant_types, reader, writer
from mtpforge.gguf.reader import Gguf
from mtpforge.llama_cpp import process, programs
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.quantize import imatrix
from mtpforge.quantize.job import QuantizeJob
from mtpforge.quantize.llama_quantize import choose_types
from mtpforge.quantize.manifest import Manifest
from mtpforge.quantize.pieces import quantize_piece, quantize_whole
from mtpforge.quantize.plan import make_plan
from mtpforge.quantize.recipe import Recipe, head_recipe, plan_overrides
from mtpforge.quantize.request import QuantizeRequest

LLAMA = LlamaCpp(BIN, threads=2)
RECIPE = (("attn_q|ffn_down", "Q6_K"), ("blk.1.", "Q5_K"))


@pytest.fixture(scope="module")
def matrices(built: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An importance matrix of each model; it does not cover the head."""
    folder = tmp_path_factory.mktemp("matrices")
    paths = {model: folder / f"{model}.gguf" for model in MODELS}
    for model, path in paths.items():
        source = source_of(built, model).path
        imatrix.compute(source, CHECKPOINTS / "corpus.py", path, LlamaCpp(BIN, threads=1))
    return paths


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The notes that are printed during a test."""
    lines: list[str] = []
    monkeypatch.setattr(progress, "say", lines.append)
    return lines


def source_of(built: Path, model: str) -> Gguf:
    return reader.read(built / f"results/{model}/work/convert/all.gguf")


@pytest.fixture(scope="module")
def sources(built: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Gguf]:
    """A small source of each model, so that all types can be tested.

    It has the embeddings, some tensors of each kind of attention, and the head.
    """
    folder = tmp_path_factory.mktemp("sources")
    left_out: dict[str, tuple[str, ...]] = {
        "tiny-qwen3.5": ("blk.0.", "blk.2.", "blk.1.ffn", "blk.3.attn_k", "blk.3.ffn_gate"),
        "tiny-qwen3.5-moe": (
            "blk.0.ffn",
            "blk.0.attn_gate",
            "blk.1.ffn_gate",
            "blk.1.attn_k",
            "output.",
        ),
    }
    sources: dict[str, Gguf] = {}
    for model, prefixes in left_out.items():
        whole = source_of(built, model)
        names = [name for name in whole.tensors if not name.startswith(prefixes)]
        tensors = reader.contents(reader.select_tensors(whole, names))
        writer.write(folder / f"{model}.gguf", whole.metadata, tensors)
        sources[model] = reader.read(folder / f"{model}.gguf")
    return sources


def asked(
    kind: str, recipe: Recipe = (), matrix: Path | None = None, head: str = "Q8_0"
) -> QuantizeRequest:
    return QuantizeRequest(kind, head_recipe(head), recipe, matrix)


def plain(source: Gguf, out: Path, request: QuantizeRequest) -> bytes:
    """One run of llama-quantize, as a user would call it; the bytes that it writes."""
    matrix = request.imatrix
    command: list[object] = [BIN / "llama-quantize"]
    command += ["--imatrix", matrix.name] if matrix else []
    overrides = plan_overrides(source, request.file_type, request.head, request.recipe)
    for pattern, tensor_type in overrides:
        command += ["--tensor-type", f"{pattern}={tensor_type.lower()}"]
    command += [source.path, out, request.file_type, 2]
    folder = matrix.parent if matrix else out.parent
    subprocess.run(list(map(str, command)), check=True, capture_output=True, cwd=folder)
    return out.read_bytes()


def job_for(source: Gguf, request: QuantizeRequest) -> QuantizeJob:
    types = choose_types(source, request, LLAMA)
    plan = make_plan(source, reader.digests(source.path), types, request, LLAMA)
    return QuantizeJob(plan, source, LLAMA, request.imatrix)


def in_pieces(job: QuantizeJob, folder: Path, count: int, said: list[str]) -> bytes:
    """Assemble the whole from `count` pieces, which together have every tensor once."""
    out = folder / "manifests/pieces"

    def make(number: int) -> dict[str, str]:
        return quantize_piece(job, out, number, count, folder)

    with ThreadPoolExecutor(os.cpu_count()) as workers:
        pieces = list(workers.map(make, range(1, count + 1)))
    made = sorted(entry for digests in pieces for entry in digests.items())
    files = [entry for path in out.glob("*.gguf") for entry in reader.digests(path).items()]
    assert made == sorted(entry for entry in files if entry[0] != "header")
    assert [name for name, _ in made] == sorted(job.source.tensors)
    whole = folder / "whole.gguf"
    assert quantize_whole(job, whole, folder) == reader.digests(whole)
    total = len(job.source.tensors)
    expected = f"reused 0 of {total} tensors (0 bytes); {total} from pieces; quantized 0"
    assert said[-1] == expected
    assert not [line for line in said if line.startswith("warning:")]
    return whole.read_bytes()


def usual(file_type: str) -> str:
    """The type of most tensors in a file of this type."""
    others = {"IQ3_M": "IQ3_S", "IQ3_XS": "IQ3_S", "IQ2_M": "IQ2_S", "MXFP4_MOE": "MXFP4"}
    named = file_type if file_type in quant_types.TENSOR_TYPES else re.sub("_[SML]$", "", file_type)
    return others.get(file_type, named)


SLOW = ("IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")
"""Types whose tables each run of llama-quantize computes first, for up to ten seconds."""


Case = tuple[str, str, bool, bool, tuple[int, ...]]


def cases() -> Iterator[Case]:
    """Every type, dense and experts, with and without importance matrix and recipe if possible.

    Each in 1, 2, 3 and 7 pieces; slow types, which all need the matrix, in one of these numbers.
    """
    one_of = dict(zip(product(MODELS, (False, True)), (7, 2, 3, 1), strict=True))
    for model, kind in product(MODELS, quant_types.FILE_TYPES):
        for with_matrix, with_recipe in product((False, True), (False, True)):
            needs_matrix = kind in quant_types.NEED_IMATRIX
            takes_recipe = kind not in quant_types.UNQUANTIZED
            if (with_matrix or not needs_matrix) and (takes_recipe or not with_recipe):
                counts = (one_of[model, with_recipe],) if kind in SLOW else (1, 2, 3, 7)
                yield model, kind, with_matrix, with_recipe, counts


def case_name(value: object) -> str:
    return str(value).replace(", ", "-")


@pytest.mark.parametrize("case", list(cases()), ids=case_name)
def test_pieces_give_the_bytes_of_one_run(
    sources: dict[str, Gguf],
    matrices: dict[str, Path],
    tmp_path: Path,
    said: list[str],
    case: Case,
) -> None:
    model, kind, with_matrix, with_recipe, counts = case
    source = sources[model]
    request = asked(
        kind,
        recipe=RECIPE if with_recipe else (),
        matrix=matrices[model] if with_matrix else None,
        head=kind if kind in quant_types.UNQUANTIZED else "Q8_0",
    )
    expected = plain(source, tmp_path / "plain.gguf", request)
    job = job_for(source, request)
    types = {tensor.type for tensor in job.plan.tensors.values()}
    assert usual(kind) in types or kind in ("IQ2_S", "MXFP4_MOE")
    for count in counts:
        if count == 1:
            assert quantize_whole(job, tmp_path / "one.gguf")
            assert (tmp_path / "one.gguf").read_bytes() == expected
        else:
            (tmp_path / str(count)).mkdir()
            assert in_pieces(job, tmp_path / str(count), count, said) == expected, count
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("kind", quant_types.TENSOR_TYPES)
def test_quantizing_some_rows_at_a_time_gives_the_same_bytes(
    sources: dict[str, Gguf],
    matrices: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """The last run would have a single row, which llama-quantize would take for a vector."""
    model = MODELS[0]
    name = "blk.3.attn_q.weight"
    some_rows = reader.rows(sources[model], name, 0, 257)
    norm = reader.select_tensors(sources[model], ["output_norm.weight"])
    tensors = reader.contents(some_rows) + reader.contents(norm)
    writer.write(tmp_path / "in.gguf", sources[model].metadata, tensors)
    source = reader.read(tmp_path / "in.gguf")
    job = job_for(source, asked("Q8_0", [(re.escape(name), kind)], matrices[model]))
    expected = quantize_whole(job, tmp_path / "whole.gguf")
    runs: list[int] = []
    quantize = QuantizeJob.quantize
    limit = source.tensors[name].size // 257 * 150
    monkeypatch.setattr(QuantizeJob, "_run_limit", lambda self, name: limit)

    def counted(self: QuantizeJob, source: Gguf, out: Path) -> Gguf:
        runs.append(source.tensors[name].shape[0])
        return quantize(self, source, out)

    monkeypatch.setattr(QuantizeJob, "quantize", counted)
    (tmp_path / "scratch").mkdir()
    made = job.quantize_tensors([name], tmp_path / "rows.gguf", tmp_path / "scratch")
    assert reader.digests(made.path)[name] == expected[name]
    assert made.tensors[name].type.name == kind
    assert runs == [128, 129]


def test_a_small_buffer_gives_the_same_bytes(
    sources: dict[str, Gguf],
    matrices: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Experts with an importance matrix, one MiB at a time: real tensors exceed the real buffer."""
    model = MODELS[1]
    source = sources[model]
    option = programs.BUFFER[0]
    assert process.knows(BIN / "llama-quantize", option)
    assert not process.knows(BIN / "llama-quantize", "--no-such-option")
    experts = [info for name, info in source.tensors.items() if "exps" in name]
    assert max(info.elements * 6 for info in experts) > 2 << 20
    request = asked("IQ4_XS", matrix=matrices[model])
    expected = plain(source, tmp_path / "plain.gguf", request)
    monkeypatch.setattr(programs, "BUFFER", (option, "1"))
    assert quantize_whole(job_for(source, request), tmp_path / "one.gguf")
    assert (tmp_path / "one.gguf").read_bytes() == expected


def test_pieces_give_the_same_bytes_for_a_type_that_only_tensors_have(
    sources: dict[str, Gguf], tmp_path: Path, said: list[str]
) -> None:
    source = sources[MODELS[0]]
    request = asked("Q4_K_M", [("ffn_|attn_q", "NVFP4")])
    expected = plain(source, tmp_path / "plain.gguf", request)
    assert in_pieces(job_for(source, request), tmp_path, 3, said) == expected


@pytest.mark.parametrize("model", MODELS)
def test_tensors_of_another_file_type_and_of_the_trunk_are_reused(
    built: Path, tmp_path: Path, said: list[str], model: str
) -> None:
    """After Q4_K_S, Q4_K_M costs only the tensors that differ, and its trunk then hardly any."""
    source = source_of(built, model)
    for kind in ("Q4_K_S", "Q4_K_M"):
        job = job_for(source, asked(kind))
        out = tmp_path / f"{kind}.gguf"
        digests = quantize_whole(job, out, tmp_path)
        Manifest.of(job.plan, digests, [out]).write(tmp_path / f"manifests/{kind}.json")
    first = reader.read(tmp_path / "Q4_K_S.gguf").tensors
    second = reader.read(tmp_path / "Q4_K_M.gguf").tensors
    same = [name for name in second if first[name].type == second[name].type]
    size = sum(second[name].size for name in same)
    assert 0 < len(same) < len(second)
    reused = f"reused {len(same)} of {len(second)} tensors ({size:,} bytes)"
    assert said[1].startswith(
        f"{reused} of the same type from {tmp_path / 'Q4_K_S.gguf'}; quantized "
    )
    expected = plain(source, tmp_path / "plain.gguf", asked("Q4_K_M"))
    assert (tmp_path / "Q4_K_M.gguf").read_bytes() == expected
    (tmp_path / "trunk").mkdir()
    trunk = reader.read(built / f"results/{model}/work/convert/trunk.gguf")
    quantize_whole(job_for(trunk, asked("Q4_K_M")), tmp_path / "trunk/out.gguf", tmp_path)
    assert int(said[2].rsplit(" ", 1)[1]) < len(trunk.tensors) / 4
    expected = (built / f"results/{model}/work/trunk/Q4_K_M.gguf").read_bytes()
    assert (tmp_path / "trunk/out.gguf").read_bytes() == expected
