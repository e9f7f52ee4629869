"""A quantization in pieces, or with tensors of other files, is to the byte what one plain llama-quantize run makes."""

import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import pytest
from conftest import BIN, CHECKPOINTS, MODELS
from mtpforge.gguf import quant_types, reader, writer
from mtpforge.gguf.reader import Gguf
from mtpforge.llama_cpp import process
from mtpforge.quantize import imatrix, llama_quantize, manifest, plan
from mtpforge.quantize.llama_quantize import choose
from mtpforge.quantize.pieces import Work
from mtpforge.quantize.recipe import Recipe, head_recipe, plan_overrides

RECIPE = (("attn_q|ffn_down", "Q6_K"), ("blk.1.", "Q5_K"))


@pytest.fixture(scope="module")
def matrices(built: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of each model an importance matrix, which as ever does not cover the head."""
    folder = tmp_path_factory.mktemp("matrices")
    for model in MODELS:
        imatrix.compute(
            source_of(built, model).path,
            CHECKPOINTS / "corpus.py",
            folder / f"{model}.gguf",
            bin_dir=BIN,
        )
    return {model: folder / f"{model}.gguf" for model in MODELS}


def source_of(built: Path, model: str) -> Gguf:
    return reader.read(built / f"results/{model}/work/convert/all.gguf")


@pytest.fixture(scope="module")
def sources(built: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Gguf]:
    """Of each model the embeddings, some of a block of each kind of attention, and the head: a type then takes no time."""
    folder, sources = tmp_path_factory.mktemp("sources"), {}
    lefts = {
        "tiny-qwen3.5": ("blk.0.", "blk.2.", "blk.1.ffn", "blk.3.attn_k", "blk.3.ffn_gate"),
        "tiny-qwen3.5-moe": (
            "blk.0.ffn",
            "blk.0.attn_gate",
            "blk.1.ffn_gate",
            "blk.1.attn_k",
            "output.",
        ),
    }
    for model, left in lefts.items():
        whole = source_of(built, model)
        kept = reader.select_tensors(
            whole, [name for name in whole.tensors if not name.startswith(left)]
        )
        writer.write(folder / f"{model}.gguf", whole.metadata, reader.contents(kept))
        sources[model] = reader.read(folder / f"{model}.gguf")
    return sources


def plain(
    source: Gguf, out: Path, kind: str, head: str, recipe: Recipe, matrix: Path | None
) -> bytes:
    """What llama-quantize makes in one run, as a user would call it."""
    command: list[object] = [
        BIN / "llama-quantize",
        *(["--imatrix", matrix.name] if matrix else []),
    ]
    for pattern, tensor_type in plan_overrides(source, kind, head_recipe(head), recipe):
        command += ["--tensor-type", f"{pattern}={tensor_type.lower()}"]
    place = matrix.parent if matrix else out.parent
    subprocess.run(
        list(map(str, [*command, source.path, out, kind, 2])),
        check=True,
        capture_output=True,
        cwd=place,
    )
    return out.read_bytes()


def work(
    source: Gguf, kind: str, head: str, recipe: Recipe = (), matrix: Path | None = None, said: list[str] | None = None
) -> Work:  # fmt: skip
    types = choose(source, kind, head_recipe(head), recipe, matrix, BIN)
    made = plan.make(source, reader.digests(source.path), types, kind, matrix, BIN)
    return Work(made, source, matrix, 2, BIN, say=(said if said is not None else []).append)


def in_pieces(job: Work, folder: Path, count: int, said: list[str]) -> bytes:
    """The whole that is put together from so many pieces, each of which has its part of the tensors and no more."""

    out = folder / "manifests/pieces"
    with ThreadPoolExecutor(os.cpu_count()) as workers:
        of_pieces = list(
            workers.map(lambda number: job.piece(out, number, count, folder), range(1, count + 1))
        )
    held = [entry for digests in of_pieces for entry in digests.items()]
    of_files = [reader.digests(path) for path in out.glob("*.gguf")]
    assert sorted(held) == sorted(
        entry for digests in of_files for entry in digests.items() if entry[0] != "header"
    )
    assert sorted(name for name, _ in held) == sorted(job.source.tensors)
    whole = folder / "whole.gguf"
    assert job.whole(whole, folder) == reader.digests(whole)
    count = len(job.source.tensors)
    assert (
        said[-1]
        == f"reused 0 bytes (0 of {count} tensors) from nothing; {count} from pieces; quantized 0"
    )
    assert not [line for line in said if line.startswith("warning:")]
    return whole.read_bytes()


def usual(file_type: str) -> str:
    """The tensor type that most of a file of this type has."""
    others = {"IQ3_M": "IQ3_S", "IQ3_XS": "IQ3_S", "IQ2_M": "IQ2_S", "MXFP4_MOE": "MXFP4"}
    named = file_type if file_type in quant_types.TENSOR_TYPES else re.sub("_[SML]$", "", file_type)
    return others.get(file_type, named)


SLOW = ("IQ3_XXS", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S")
"""Types with tables that each run of llama-quantize computes for up to ten seconds."""


def cases() -> Iterator[tuple[str, str, bool, bool, tuple[int, ...]]]:
    """Dense and experts in every type, with and without an importance matrix and a recipe, where that can be, in 1, 2, 3 and 7
    pieces; slow types, which all need the matrix, in one of these numbers for each model and recipe.
    """
    one_of = dict(zip(product(MODELS, (False, True)), (7, 2, 3, 1), strict=True))
    for model, kind, with_matrix, with_recipe in product(
        MODELS, quant_types.FILE_TYPES, (False, True), (False, True)
    ):
        if (with_matrix or kind not in quant_types.NEED_IMATRIX) and not (
            with_recipe and kind in quant_types.UNQUANTIZED
        ):
            counts = (one_of[model, with_recipe],) if kind in SLOW else (1, 2, 3, 7)
            yield model, kind, with_matrix, with_recipe, counts


@pytest.mark.parametrize(
    ("model", "kind", "with_matrix", "with_recipe", "counts"),
    list(cases()),
    ids=lambda value: str(value).replace(", ", "-"),
)
def test_the_same_bytes_as_one_run(
    sources: dict[str, Gguf], matrices: dict[str, Path], tmp_path: Path,
    model: str, kind: str, with_matrix: bool, with_recipe: bool, counts: tuple[int, ...],
) -> None:  # fmt: skip
    source, recipe, matrix = (
        sources[model],
        RECIPE if with_recipe else (),
        matrices[model] if with_matrix else None,
    )
    head = "Q8_0" if kind not in quant_types.UNQUANTIZED else kind
    expected = plain(source, tmp_path / "plain.gguf", kind, head, recipe, matrix)
    said = list[str]()
    job = work(source, kind, head, recipe, matrix, said)
    assert usual(kind) in {tensor.type for tensor in job.plan.tensors.values()} or kind in (
        "IQ2_S",
        "MXFP4_MOE",
    )
    for count in counts:
        if count == 1:
            assert (
                job.whole(tmp_path / "one.gguf")
                and (tmp_path / "one.gguf").read_bytes() == expected
            )
            continue
        (tmp_path / str(count)).mkdir()
        assert in_pieces(job, tmp_path / str(count), count, said) == expected, count
    assert not list(tmp_path.rglob(".*"))


@pytest.mark.parametrize("kind", quant_types.TENSOR_TYPES)
def test_the_same_bytes_of_a_matrix_that_is_made_some_rows_at_a_time(
    sources: dict[str, Gguf],
    matrices: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    """Of which the last would be one, that is none for llama-quantize alone."""
    model, name = MODELS[0], "blk.3.attn_q.weight"
    some_rows = reader.rows(sources[model], name, 0, 257)
    norm = reader.select_tensors(sources[model], ["output_norm.weight"])
    tensors = reader.contents(some_rows) + reader.contents(norm)
    writer.write(tmp_path / "in.gguf", sources[model].metadata, tensors)
    source, matrix = reader.read(tmp_path / "in.gguf"), matrices[model]
    job = work(source, "Q8_0", "Q8_0", ((re.escape(name), kind),), matrix)
    expected = job.whole(tmp_path / "whole.gguf")
    runs, quantize = list[int](), Work._quantize
    monkeypatch.setattr(Work, "_limit", lambda self, name: source.tensors[name].size // 257 * 150)

    def counted(self: Work, source: Gguf, out: Path) -> Gguf:
        runs.append(source.tensors[name].shape[0])
        return quantize(self, source, out)

    monkeypatch.setattr(Work, "_quantize", counted)
    (tmp_path / "scratch").mkdir()
    made = job._some([name], tmp_path / "rows.gguf", tmp_path / "scratch")
    assert (
        reader.digests(made.path)[name] == expected[name] and made.tensors[name].type.name == kind
    )
    assert runs == [128, 129]


def test_a_small_buffer_makes_the_same_bytes(
    sources: dict[str, Gguf],
    matrices: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Experts with their rows of an importance matrix, a MiB at a time, as llama-quantize makes them of large tensors."""
    model = MODELS[1]
    source, matrix = sources[model], matrices[model]
    assert process.knows(BIN / "llama-quantize", llama_quantize.BUFFER[0])
    assert not process.knows(BIN / "llama-quantize", "--no-such-option")
    assert (
        max(info.elements * 6 for name, info in source.tensors.items() if "exps" in name) > 2 << 20
    )
    expected = plain(source, tmp_path / "plain.gguf", "IQ4_XS", "Q8_0", (), matrix)
    monkeypatch.setattr(llama_quantize, "BUFFER", [llama_quantize.BUFFER[0], "1"])
    assert work(source, "IQ4_XS", "Q8_0", (), matrix).whole(tmp_path / "one.gguf")
    assert (tmp_path / "one.gguf").read_bytes() == expected


def test_the_same_bytes_of_a_type_that_only_tensors_can_have(
    sources: dict[str, Gguf], tmp_path: Path
) -> None:
    recipe = (("ffn_|attn_q", "NVFP4"),)
    expected = plain(sources[MODELS[0]], tmp_path / "plain.gguf", "Q4_K_M", "Q8_0", recipe, None)
    said = list[str]()
    assert (
        in_pieces(work(sources[MODELS[0]], "Q4_K_M", "Q8_0", recipe, said=said), tmp_path, 3, said)
        == expected
    )


@pytest.mark.parametrize("model", MODELS)
def test_tensors_of_another_type_of_file_and_of_the_trunk_alone_are_taken(
    built: Path, tmp_path: Path, model: str
) -> None:
    """Q4_K_M after Q4_K_S costs what differs, and the trunk without a head then nothing."""
    source, said = source_of(built, model), list[str]()
    for kind in ("Q4_K_S", "Q4_K_M"):
        job = work(source, kind, "Q8_0", said=said)
        out = tmp_path / f"{kind}.gguf"
        manifest.write_manifest(
            tmp_path / f"manifests/{kind}.json", job.plan, job.whole(out, tmp_path), [out]
        )
    first, second = (
        reader.read(tmp_path / f"{kind}.gguf").tensors for kind in ("Q4_K_S", "Q4_K_M")
    )
    same = [name for name in second if first[name].type == second[name].type]
    reused = sum(second[name].size for name in same)
    assert 0 < len(same) < len(second)
    assert (
        f"reused {reused:,} bytes ({len(same)} of {len(second)} tensors) from {tmp_path / 'Q4_K_S.gguf'}; quantized "
        in said[1]
    )
    assert (tmp_path / "Q4_K_M.gguf").read_bytes() == plain(
        source, tmp_path / "plain.gguf", "Q4_K_M", "Q8_0", (), None
    )
    (tmp_path / "trunk").mkdir()
    trunk = reader.read(built / f"results/{model}/work/convert/trunk.gguf")
    job = work(trunk, "Q4_K_M", "Q8_0", said=said)
    job.whole(tmp_path / "trunk/out.gguf", tmp_path)
    assert int(said[2].rsplit(" ", 1)[1]) < len(trunk.tensors) / 4
    assert (tmp_path / "trunk/out.gguf").read_bytes() == (
        built / f"results/{model}/work/trunk/Q4_K_M.gguf"
    ).read_bytes()
