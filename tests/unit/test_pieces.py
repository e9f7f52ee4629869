"""Plans, pieces and reuse: keys cover what bytes depend on, and only intact tensors are reused."""

import errno
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import BIN, Run
from gguf.constants import GGMLQuantizationType as Kind
from gguf.constants import GGUFValueType
from mtpforge import processors, progress
from mtpforge.errors import ConfigError, ForgeError, GgufError
from mtpforge.gguf import quant_types, reader, writer
from mtpforge.gguf.metadata import Value
from mtpforge.gguf.reader import Gguf, TensorInfo
from mtpforge.io import atomic, ranges
from mtpforge.io.ranges import FileRange, Sink
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.quantize import assembly, imatrix, piece_count, pieces, plan
from mtpforge.quantize import job as jobs
from mtpforge.quantize.job import QuantizeJob
from mtpforge.quantize.llama_quantize import choose_types
from mtpforge.quantize.manifest import Manifest
from mtpforge.quantize.pieces import quantize_piece, quantize_whole, split_into_pieces
from mtpforge.quantize.plan import QuantizePlan, make_plan
from mtpforge.quantize.recipe import Recipe
from mtpforge.quantize.request import QuantizeRequest
from mtpforge.quantize.reuse import ReusableTensor, find_reusable, report
from splits import split

LLAMA = LlamaCpp(BIN, threads=1)


def source_of(built: Path) -> Gguf:
    return reader.read(built / "results/tiny-qwen3.5/work/convert/all.gguf")


def plan_for(source: Gguf, file_type: str, recipe: Recipe = ()) -> QuantizePlan:
    request = QuantizeRequest(file_type, recipe=recipe)
    types = choose_types(source, request, LLAMA)
    return make_plan(source, reader.digests(source.path), types, request, LLAMA)


@pytest.fixture(scope="module")
def q4(built: Path) -> QuantizePlan:
    """The plan of a Q4_K_M file."""
    return plan_for(source_of(built), "Q4_K_M")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The notes that are printed during a test."""
    lines: list[str] = []
    monkeypatch.setattr(progress, "say", lines.append)
    return lines


def test_what_was_reused_has_the_same_type(said: list[str]) -> None:
    norm = ReusableTensor(FileRange(Path("a.gguf"), 0, 4096), "", Path("a.gguf"))
    report({"norm": norm}, ["norm", "ffn"])
    assert said == ["reused 1 of 2 tensors (4,096 bytes) of the same type from a.gguf; quantized 1"]


def job_for(built: Path, planned: QuantizePlan) -> QuantizeJob:
    return QuantizeJob(planned, source_of(built), LLAMA)


def write_manifest(
    path: Path, planned: QuantizePlan, digests: dict[str, str], files: list[Path]
) -> None:
    Manifest.of(planned, digests, files).write(path)


def quantized(built: Path, planned: QuantizePlan, out: Path) -> dict[str, str]:
    """Quantize to `out` without reuse, silently; the digests."""
    with pytest.MonkeyPatch.context() as quiet:
        quiet.setattr(progress, "say", lambda line: None)
        return quantize_whole(job_for(built, planned), out)


def finished(built: Path, planned: QuantizePlan, folder: Path) -> Path:
    """A quantized file with its manifest, in a folder of its own."""
    out = folder / "out.gguf"
    folder.mkdir()
    write_manifest(folder / "manifests/out.json", planned, quantized(built, planned, out), [out])
    return out


def reusable_names(built: Path, planned: QuantizePlan, folder: Path, scratch: Path) -> set[str]:
    scratch.mkdir()
    return set(find_reusable(job_for(built, planned), folder, scratch))


def with_other_types(planned: QuantizePlan, kind: str, *parts: str) -> QuantizePlan:
    """The plan with another type for the tensors whose names contain one of `parts`."""
    types = {
        name: replace(tensor, type=kind)
        for name, tensor in planned.tensors.items()
        if any(part in name for part in parts)
    }
    return replace(planned, tensors=planned.tensors | types)


def overwrite(path: Path, offset: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)


def test_equal_work_has_an_equal_plan_that_is_small_enough_for_snakemake_to_compare(
    built: Path, q4: QuantizePlan, tmp_path: Path
) -> None:
    q4.write(tmp_path / "plan.json")
    again = QuantizePlan.read(tmp_path / "plan.json")
    assert again == q4
    assert list(again.tensors) == list(q4.tensors)
    digests = json.loads((built / "results/tiny-qwen3.5/work/convert/all.json").read_text())
    request = QuantizeRequest("Q4_K_M")
    make_plan(source_of(built), digests, q4.types(), request, LLAMA).write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()
    many = {
        f"blk.{i}.a_name_as_long_as_they_are.weight": replace(tensor, row="0" * 128)
        for i, tensor in enumerate(q4.tensors.values())
    }
    large = {f"{name}.{i}": tensor for i in range(16) for name, tensor in many.items()}
    replace(q4, tensors=large).write(tmp_path / "large.json")
    assert len(large) >= 1118
    assert (tmp_path / "large.json").stat().st_size < 1e6


def test_a_key_changes_with_everything_the_bytes_depend_on_and_nothing_else(
    q4: QuantizePlan,
) -> None:
    name, other = list(q4.tensors)[:2]
    for field in ("type", "form", "source", "row"):
        tensor = replace(q4.tensors[name], **{field: "Q8_0"})
        changed = replace(q4, tensors={**q4.tensors, name: tensor})
        assert changed.keys()[name] != q4.keys()[name]
        assert changed.keys()[other] == q4.keys()[other]
    assert not set(replace(q4, toolchain="another").keys().values()) & set(q4.keys().values())
    assert replace(q4, file_type="Q4_K_S", header="another").keys() == q4.keys()


def test_a_row_of_an_importance_matrix_affects_only_its_own_tensor(tmp_path: Path) -> None:
    def write(path: Path, first: float) -> dict[str, str]:
        metadata = {
            "imatrix.datasets": Value.of(["text"], GGUFValueType.ARRAY, GGUFValueType.STRING),
            "imatrix.chunk_count": Value.of(1, GGUFValueType.UINT32),
            "imatrix.chunk_size": Value.of(512, GGUFValueType.UINT32),
        }
        values = {"a.in_sum2": first, "a.counts": 1.0, "b.in_sum2": 1.0, "b.counts": 1.0}
        parts: list[tuple[TensorInfo, ranges.Payload]] = []
        for name, value in values.items():
            data = Value.of(value, GGUFValueType.FLOAT32).raw
            parts.append((TensorInfo(name, (1,), Kind.F32), [memoryview(bytes(data))]))
        writer.write(path, metadata, parts)
        return imatrix.digests(path)

    one = write(tmp_path / "one.gguf", 1.0)
    two = write(tmp_path / "two.gguf", 2.0)
    assert one["a"] != two["a"]
    assert one["b"] == two["b"]


INVALID = r"plan\.json: invalid quantization plan \(.*\): delete it, or run quantize_plan\.py again"


@pytest.mark.parametrize("form", ["BF16 x", "", "BF16 -1", "BF16 " + 400 * "9"])
def test_a_plan_with_an_impossible_shape_is_refused(
    q4: QuantizePlan, tmp_path: Path, form: str
) -> None:
    tensors = {name: replace(tensor, form=form) for name, tensor in q4.tensors.items()}
    replace(q4, tensors=tensors).write(tmp_path / "plan.json")
    with pytest.raises(GgufError, match=INVALID):
        QuantizePlan.read(tmp_path / "plan.json")


@pytest.mark.parametrize(("field", "value"), [("file_type", "Q4_K_X"), ("tensors", "Q8_1")])
def test_a_plan_with_an_unknown_type_is_refused(
    q4: QuantizePlan, tmp_path: Path, field: str, value: str
) -> None:
    tensors = {name: replace(tensor, type=value) for name, tensor in q4.tensors.items()}
    changed: Any = {field: tensors if field == "tensors" else value}
    replace(q4, **changed).write(tmp_path / "plan.json")
    with pytest.raises(GgufError, match=INVALID.replace(".*", f"unknown type {value}")):
        QuantizePlan.read(tmp_path / "plan.json")


def test_a_missing_plan_is_refused_with_the_program_that_writes_it(tmp_path: Path) -> None:
    with pytest.raises(GgufError, match=r"plan\.json: missing: write it with quantize_plan\.py"):
        QuantizePlan.read(tmp_path / "plan.json")


@pytest.mark.parametrize(
    "text",
    [
        "{}",
        "[]",
        '{"tensors": 1}',
        '{"tensors": {"a": ["Q4_K"]}}',
        '{"tensors": {"a": []}, "b": 1}',
    ],
)
def test_a_file_that_is_not_a_plan_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(Exception, match=r"plan\.json: ") as error:
        QuantizePlan.read(tmp_path / "plan.json")
    assert type(error.value).__module__ == "mtpforge.errors"


def test_a_plan_for_another_source_or_matrix_is_refused(
    built: Path, q4: QuantizePlan, tmp_path: Path
) -> None:
    trunk = reader.read(built / "results/tiny-qwen3.5/work/convert/trunk.gguf")
    with pytest.raises(GgufError, match="tensors or metadata differ from those of the plan"):
        QuantizeJob(q4, trunk, LLAMA)
    (tmp_path / "my.dat").write_bytes(b"1")
    given = r"another importance matrix than .*/my\.dat: expected "
    with pytest.raises(ConfigError, match=given + "none"):
        QuantizeJob(q4, source_of(built), LLAMA, tmp_path / "my.dat")
    another = replace(q4, imatrix="my.dat", imatrix_sha256="0" * 64)
    with pytest.raises(ConfigError, match=given + r"my\.dat \(sha256 0{64}\)"):
        QuantizeJob(another, source_of(built), LLAMA, tmp_path / "my.dat")


def test_a_plan_for_other_weights_with_the_same_header_is_refused(
    built: Path, q4: QuantizePlan, tmp_path: Path
) -> None:
    """A fine-tune can have the same metadata and norms; its bytes would be reused ever after."""
    for name in ("blk.1.attn_norm.weight", "blk.1.ffn_down.weight"):
        another = tmp_path / "all.gguf"
        shutil.copyfile(source_of(built).path, another)
        overwrite(another, source_of(built).ranges[name].offset, bytes(64))
        message = r"all\.gguf: weights differ from those of the plan: run quantize_plan\.py again"
        with pytest.raises(GgufError, match=message):
            QuantizeJob(q4, reader.read(another), LLAMA)


def test_a_plan_for_another_toolchain_is_refused(
    built: Path, q4: QuantizePlan, tmp_path: Path
) -> None:
    """Here the same program with the stamp of another build: keys of the two must not mix."""
    shutil.copytree(BIN, tmp_path / "bin", symlinks=True)
    assert QuantizeJob(q4, source_of(built), LLAMA)
    (tmp_path / "stamp.json").write_text('{"commit": "another"}')
    message = rf"another llama-quantize than the one in {tmp_path}/bin: run quantize_plan\.py again"
    with pytest.raises(ConfigError, match=message):
        QuantizeJob(q4, source_of(built), LlamaCpp(tmp_path / "bin"))


def test_shared_libraries_of_the_program_are_part_of_the_toolchain(tmp_path: Path) -> None:
    """They contain the quantizers if llama.cpp was built with shared libraries."""
    (tmp_path / "bin").mkdir()
    shutil.copy(BIN / "llama-quantize", tmp_path / "bin/llama-quantize")
    (tmp_path / "bin/libggml-base.so").write_bytes(b"1")
    before = plan.toolchain_digest(LlamaCpp(tmp_path / "bin"))
    (tmp_path / "bin/libggml-base.so").write_bytes(b"2")
    assert plan.toolchain_digest(LlamaCpp(tmp_path / "bin")) != before


@pytest.mark.parametrize("count", [1, 2, 3, 7, 999])
def test_pieces_contain_every_tensor_once_at_about_equal_cost(
    built: Path, q4: QuantizePlan, count: int
) -> None:
    source = source_of(built)
    parts = split_into_pieces(q4, source, count)
    assert len(parts) == count
    assert [name for part in parts for name in part] == list(source.tensors)
    costs = [sum(q4.tensors[name].cost for name in part) for part in parts]
    largest = max(q4.tensors[name].cost for name in source.tensors)
    assert max(costs) <= sum(costs) / count + largest
    assert parts == split_into_pieces(q4, source, count)


def test_the_number_of_pieces_follows_from_the_cost_and_the_threads(
    q4: QuantizePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cost is that of each tensor at the type which a recipe gives it.

    The pieces may be made on a machine with more processors.
    """
    monkeypatch.setattr(processors, "available", lambda: 8)

    def count(planned: QuantizePlan, threads: int) -> int:
        return piece_count.piece_count(planned, LlamaCpp(threads=threads))

    assert count(q4, 1) == count(q4, 8) == 1
    monkeypatch.setattr(piece_count, "PIECE_SECONDS", q4.cost / 20)
    assert [count(q4, threads) for threads in (1, 2, 8, 0, 64)] == [20, 10, 2, 2, 1]
    slow = with_other_types(q4, "IQ3_S", "ffn_up")
    assert count(slow, 1) == round(20 * slow.cost / q4.cost) > 20
    monkeypatch.setattr(piece_count, "PIECE_SECONDS", q4.cost / 1e6)
    assert count(q4, 1) == piece_count.MAX_PIECES


def test_machines_that_share_the_work_get_a_piece_each() -> None:
    """If it is long enough; a longer one has pieces of the usual time."""

    def count(seconds: float, machines: int) -> int:
        planned: Any = SimpleNamespace(cost=seconds)
        return piece_count.piece_count(planned, LlamaCpp(threads=1), machines)

    assert [count(seconds, 8) for seconds in (60, 1199, 1200, 4000, 36_000)] == [1, 1, 2, 6, 8]
    assert [count(seconds, 1) for seconds in (60, 4000, 36_000)] == [1, 1, 5]
    assert count(40 * piece_count.PIECE_SECONDS, 8) == 40


def test_every_type_has_a_cost() -> None:
    assert quant_types.SECONDS.keys() == set(quant_types.TENSOR_TYPES)


def test_tensors_of_a_finished_file_are_reused_even_if_it_was_moved(
    built: Path, q4: QuantizePlan, tmp_path: Path, said: list[str]
) -> None:
    before = finished(built, q4, tmp_path / "a")
    moved = tmp_path / "published.gguf"
    write_manifest(tmp_path / "a/manifests/out.json", q4, reader.digests(before), [before, moved])
    before.rename(moved)
    quantize_whole(job_for(built, q4), tmp_path / "b.gguf", tmp_path)
    assert (tmp_path / "b.gguf").read_bytes() == moved.read_bytes()
    count = len(q4.tensors)
    assert said[0].startswith(f"reused {count} of {count} tensors (")
    assert said[0].endswith(f" of the same type from {moved}; quantized 0")


def test_damaged_tensors_are_requantized_with_a_warning(
    built: Path, q4: QuantizePlan, tmp_path: Path, said: list[str]
) -> None:
    before = finished(built, q4, tmp_path / "a")
    whole = before.read_bytes()
    place = reader.read(before).ranges["blk.1.ffn_down.weight"]
    middle = place.offset + place.size // 2
    overwrite(before, middle, bytes([whole[middle] ^ 1]))
    digests = quantize_whole(job_for(built, q4), tmp_path / "b.gguf", tmp_path)
    assert (tmp_path / "b.gguf").read_bytes() == whole
    assert digests == reader.digests(tmp_path / "b.gguf")
    assert said[0].startswith(f"warning: {before}: blk.1.ffn_down.weight cannot be read, or ")
    assert said[1].endswith("; quantized 1")


def before_the_first_run(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], object]) -> None:
    """Let something happen after the search for reusable tensors, hours before they are copied."""
    quantize_tensors = QuantizeJob.quantize_tensors

    def interrupted(self: QuantizeJob, names: Iterable[str], out: Path, scratch: Path) -> Gguf:
        monkeypatch.setattr(QuantizeJob, "quantize_tensors", quantize_tensors)
        happens()
        return quantize_tensors(self, names, out, scratch)

    monkeypatch.setattr(QuantizeJob, "quantize_tensors", interrupted)


@pytest.mark.parametrize("how", ["gone", "replaced", "gone and without links", "torn"])
def test_a_file_that_disappears_during_reuse_costs_at_most_time(
    built: Path,
    q4: QuantizePlan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: list[str],
    how: str,
) -> None:
    """A deleted file stays readable by its hard link; without one, its tensors are requantized."""
    changed = with_other_types(q4, "Q5_0", "attn_qkv")
    expected = quantized(built, changed, tmp_path / "expected.gguf")
    before = finished(built, q4, tmp_path / "a")

    def disappear() -> None:
        if how == "torn":
            os.truncate(before, 4096)
        else:
            before.unlink()
        if how == "replaced":
            before.write_bytes(b"GGUF of another job, not finished")

    def no_links(*names: object) -> None:
        raise PermissionError(errno.EPERM, "no links")

    before_the_first_run(monkeypatch, disappear)
    if how == "gone and without links":
        monkeypatch.setattr(os, "link", no_links)
    digests = quantize_whole(job_for(built, changed), tmp_path / "b.gguf", tmp_path)
    assert digests == expected == reader.digests(tmp_path / "b.gguf")
    if how in ("gone", "replaced"):
        assert said[-1].endswith("; quantized 3")
        assert len(said) == 1
    else:
        assert said[0].startswith(f"warning: {before}: ")
        assert "cannot be read" in said[0]
        assert "reused 0 of " in said[-1]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b.gguf", "expected.gguf"]


def test_a_full_disk_stops_the_job(
    built: Path, q4: QuantizePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It does not requantize what could not be copied, and ends the runs meanwhile."""
    changed = with_other_types(q4, "Q5_0", "ffn_up", "ffn_down", "ffn_gate")
    finished(built, q4, tmp_path / "a")
    put = writer.put
    quantize_tensors = QuantizeJob.quantize_tensors
    runs: list[list[str]] = []

    def full(whole: Gguf, name: str, payload: ranges.Payload) -> None:
        if changed.tensors[name] == q4.tensors[name]:
            raise OSError(errno.ENOSPC, "no space left")
        put(whole, name, payload)

    def recorded(self: QuantizeJob, names: Iterable[str], out: Path, scratch: Path) -> Gguf:
        runs.append(list(names))
        return quantize_tensors(self, runs[-1], out, scratch)

    monkeypatch.setattr(writer, "put", full)
    monkeypatch.setattr(QuantizeJob, "quantize_tensors", recorded)
    monkeypatch.setattr(jobs, "RUN_BYTES", 1)
    with pytest.raises(OSError, match="the disk is full"):
        quantize_whole(job_for(built, changed), tmp_path / "b.gguf", tmp_path)
    assert len(runs) < 5 < sum(changed.tensors[name] != q4.tensors[name] for name in q4.tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("how", ["torn", "changed"])
def test_tensors_that_change_while_they_are_copied_are_requantized(
    built: Path,
    q4: QuantizePlan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    said: list[str],
    how: str,
) -> None:
    """The file is truncated in place, or overwritten; the digests are those of the copies."""
    before = finished(built, q4, tmp_path / "a")
    whole = before.read_bytes()
    places = sorted(reader.read(before).ranges.values(), key=lambda place: place.offset)
    middle = places[len(places) // 2].offset
    put = writer.put
    calls: list[str] = []

    def fading(into: Gguf, name: str, payload: ranges.Payload) -> None:
        calls.append(name)
        if len(calls) == 2:
            if how == "torn":
                os.truncate(before, middle)
            else:
                before.write_bytes(whole[:middle] + bytes(len(whole) - middle))
        put(into, name, payload)

    monkeypatch.setattr(writer, "put", fading)
    digests = quantize_whole(job_for(built, q4), tmp_path / "b.gguf", tmp_path)
    assert (tmp_path / "b.gguf").read_bytes() == whole
    assert digests == reader.digests(tmp_path / "b.gguf")
    assert "cannot be read" in said[0]
    assert 0 < int(said[-1].rsplit(" ", 1)[1]) < len(q4.tensors)


@pytest.mark.parametrize("how", ["gone", "torn", "another", "manifest"])
def test_a_file_that_no_longer_fits_its_manifest_is_not_reused(
    built: Path, q4: QuantizePlan, tmp_path: Path, said: list[str], how: str
) -> None:
    before = finished(built, q4, tmp_path / "a")
    whole = before.read_bytes()
    if how == "gone":
        before.unlink()
    elif how == "torn":
        before.write_bytes(whole[: len(whole) // 2])
    elif how == "another":
        before.write_bytes((built / "results/tiny-qwen3.5/tiny-qwen3.5-BF16.gguf").read_bytes())
    else:
        (tmp_path / "a/manifests/out.json").write_text('{"files": 1, "tensors": [["a", "b"]]}')
    quantize_whole(job_for(built, q4), tmp_path / "b.gguf", tmp_path)
    assert (tmp_path / "b.gguf").read_bytes() == whole
    assert "reused 0 of " in said[-1]


def test_reuse_that_saves_too_little_is_not_worth_a_second_copy(
    built: Path, q4: QuantizePlan, tmp_path: Path, said: list[str]
) -> None:
    """If only norms can be reused, llama-quantize writes the whole file."""
    out = finished(built, q4, tmp_path / "a")
    norms = {name for name, tensor in q4.tensors.items() if tensor.type == "F32"}
    digests = {name: digest for name, digest in reader.digests(out).items() if name in norms}
    write_manifest(tmp_path / "a/manifests/out.json", q4, digests, [out])
    found = reusable_names(built, q4, tmp_path, tmp_path / "scratch")
    assert found == norms != set(source_of(built).tensors)
    quantize_whole(job_for(built, q4), tmp_path / "b.gguf", tmp_path)
    assert "reused 0 of " in said[0]


@pytest.mark.parametrize(("kind", "used"), [("Q4_0", False), ("IQ4_XS", True)])
def test_types_that_quantize_as_fast_as_a_copy_are_not_reused(
    built: Path, tmp_path: Path, said: list[str], kind: str, used: bool
) -> None:
    chosen = plan_for(source_of(built), kind, [(".*", kind)])
    out = finished(built, chosen, tmp_path / "a")
    digests = {
        name: digest
        for name, digest in reader.digests(out).items()
        if "ffn_up" in name or "ffn_gate" in name
    }
    write_manifest(tmp_path / "a/manifests/out.json", chosen, digests, [out])
    quantize_whole(job_for(built, chosen), tmp_path / "b.gguf", tmp_path)
    assert ("reused 0 of " in said[0]) != used


def test_a_split_file_is_reused_from_the_folder_of_its_shards(
    built: Path, q4: QuantizePlan, tmp_path: Path, said: list[str]
) -> None:
    before = finished(built, q4, tmp_path / "a")
    whole = before.read_bytes()
    shards = tmp_path / "published"
    split(before, shards, "parts", 10**6)
    assert len(list(shards.iterdir())) > 1
    write_manifest(tmp_path / "a/manifests/out.json", q4, reader.digests(before), [before, shards])
    before.unlink()
    quantize_whole(job_for(built, q4), tmp_path / "b.gguf", tmp_path)
    assert (tmp_path / "b.gguf").read_bytes() == whole
    assert "quantized 0" in said[0]
    assert "published/" in said[0]


def make_piece(built: Path, planned: QuantizePlan, folder: Path, number: int, count: int) -> str:
    """Make one piece as the rule does; the last note that it prints."""
    said: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(progress, "say", said.append)
        out = folder / "manifests/pieces"
        digests = quantize_piece(job_for(built, planned), out, number, count, folder)
    assert list(digests) == split_into_pieces(planned, source_of(built), count)[number - 1]
    return said[-1]


def files_of_pieces(folder: Path) -> dict[Path, dict[str, TensorInfo]]:
    paths = (folder / "manifests/pieces").glob("*.gguf")
    return {path: reader.read(path).tensors for path in paths}


def test_a_repeated_piece_keeps_its_finished_tensors(
    built: Path, q4: QuantizePlan, tmp_path: Path, said: list[str]
) -> None:
    """Also if the work is cut differently, and all intact tensors of a damaged file."""
    make_piece(built, q4, tmp_path, 1, 2)
    first = files_of_pieces(tmp_path)
    assert make_piece(built, q4, tmp_path, 1, 2).endswith("; quantized 0")
    assert files_of_pieces(tmp_path) == first
    assert make_piece(built, q4, tmp_path, 1, 3).endswith("; quantized 0")
    assert files_of_pieces(tmp_path) == first
    (out,) = first
    overwrite(out, reader.read(out).ranges["blk.0.ffn_up.weight"].offset, bytes(64))
    # The first of three pieces has the damaged tensor; the others keep the rest of the file.
    count = len(split_into_pieces(q4, source_of(built), 3)[0])
    line = make_piece(built, q4, tmp_path, 1, 3)
    assert line.endswith(f"; {count - 1} from pieces; quantized 1")
    assert make_piece(built, q4, tmp_path, 1, 2).endswith("; quantized 0")
    changed = with_other_types(q4, "Q5_0", "attn_qkv")
    for number in (1, 2):
        make_piece(built, changed, tmp_path, number, 2)
    expected = quantized(built, changed, tmp_path / "expected.gguf")
    assert quantize_whole(job_for(built, changed), tmp_path / "b.gguf", tmp_path) == expected
    count = len(q4.tensors)
    assert said == [f"reused 0 of {count} tensors (0 bytes); {count} from pieces; quantized 0"]


def test_a_killed_piece_keeps_its_finished_runs(
    built: Path, q4: QuantizePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run has neighbouring tensors up to the size limit, or a single larger one."""
    source = source_of(built)
    limit = 100_000
    runs: list[list[str]] = []
    quantize_tensors = QuantizeJob.quantize_tensors

    def recorded(self: QuantizeJob, names: Iterable[str], out: Path, scratch: Path) -> Gguf:
        runs.append(list(names))
        if len(runs) == 3:
            raise KeyboardInterrupt
        return quantize_tensors(self, runs[-1], out, scratch)

    expected = quantized(built, q4, tmp_path / "expected.gguf")
    monkeypatch.setattr(QuantizeJob, "quantize_tensors", recorded)
    monkeypatch.setattr(jobs, "RUN_BYTES", limit)
    with pytest.raises(KeyboardInterrupt):
        make_piece(built, q4, tmp_path, 1, 2)
    names = split_into_pieces(q4, source, 2)[0]
    kept = {name for tensors in files_of_pieces(tmp_path).values() for name in tensors}
    assert [name for run in runs for name in run][: len(kept)] == names[: len(kept)]
    assert len(kept) > 1
    del runs[2]
    runs.insert(2, [])  # there is no second interrupt
    line = make_piece(built, q4, tmp_path, 1, 2)
    assert line.endswith(f"; {len(kept)} from pieces; quantized {len(names) - len(kept)}")
    assert [name for run in runs for name in run] == names
    assert len(runs) > 6
    sizes = [sum(source.tensors[name].size for name in run) for run in runs]
    assert all(size <= limit or len(run) == 1 for size, run in zip(sizes, runs, strict=True))
    assert max(map(len, runs)) > 1
    job = job_for(built, q4)
    found = quantize_piece(job, tmp_path / "manifests/pieces", 1, 2, tmp_path)
    assert found == {name: expected[name] for name in names}
    make_piece(built, q4, tmp_path, 2, 2)
    assert quantize_whole(job, tmp_path / "b.gguf", tmp_path) == expected
    runs.clear()
    quantize_piece(job, tmp_path / "all", 1, 1)
    assert [len(run) for run in runs] == [len(q4.tensors)]  # one run, which copies nothing


def test_runs_copy_little_of_the_source_at_a_time(
    built: Path, q4: QuantizePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large matrix is quantized some rows at a time: it can have gigabytes in a real model."""
    sizes: list[tuple[int, int]] = []
    quantize = QuantizeJob.quantize

    def recorded(self: QuantizeJob, source: Gguf, out: Path) -> Gguf:
        tensors = sum(info.size for info in source.tensors.values())
        sizes.append((tensors, source.path.stat().st_size))
        return quantize(self, source, out)

    limit = 50_000
    expected = quantized(built, q4, tmp_path / "expected.gguf")
    monkeypatch.setattr(QuantizeJob, "quantize", recorded)
    monkeypatch.setattr(jobs, "RUN_BYTES", limit)
    for number in (1, 2):
        make_piece(built, q4, tmp_path, number, 2)
    source = source_of(built)
    assert max(source.tensors[name].size for name in source.tensors) > 5 * limit
    assert max(size for size, _ in sizes) <= limit
    assert max(size for _, size in sizes) < limit + 10_000
    assert sum(size for size, _ in sizes) == sum(info.size for info in source.tensors.values())
    assert quantize_whole(job_for(built, q4), tmp_path / "b.gguf", tmp_path) == expected


def test_types_with_slow_tables_get_larger_runs(
    built: Path, q4: QuantizePlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """IQ1_M computes tables for nine CPU seconds, as long as it quantizes 65 million weights."""
    monkeypatch.setattr(jobs, "RUN_BYTES", 50_000)
    many = [name for name in q4.tensors if "ffn" in name]
    runs = {
        kind: list(job_for(built, with_other_types(q4, kind, "ffn")).batches(many))
        for kind in ("Q4_K", "IQ1_M")
    }
    assert len(runs["Q4_K"]) > 10
    assert runs["IQ1_M"] == [[name for run in runs["Q4_K"] for name in run]]
    assert quant_types.TABLES.keys() < quant_types.SECONDS.keys()


def test_the_page_cache_of_pieces_is_freed_after_copying(
    built: Path, q4: QuantizePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of finished files is not, because others may read them."""
    copied: list[FileRange] = []
    forgotten: list[FileRange] = []
    append = Sink._append_range
    forget = ranges.forget

    def appended(self: Sink, piece: FileRange) -> None:
        append(self, piece)
        copied.append(piece)

    def recorded(piece: FileRange) -> None:
        assert piece in copied
        forgotten.append(piece)
        forget(piece)

    monkeypatch.setattr(Sink, "_append_range", appended)
    monkeypatch.setattr(assembly, "forget", recorded)
    finished(built, q4, tmp_path / "a")
    job = job_for(built, q4)
    quantize_whole(job, tmp_path / "b.gguf", tmp_path / "a")
    assert not forgotten
    for number in (1, 2):  # a single one would become the file, without a copy
        make_piece(built, q4, tmp_path / "c", number, 2)
    expected = reader.digests(tmp_path / "b.gguf")
    assert quantize_whole(job, tmp_path / "c.gguf", tmp_path / "c") == expected
    sizes = [info.size for info in reader.read(tmp_path / "c.gguf").tensors.values()]
    assert sorted(piece.size for piece in forgotten) == sorted(sizes)


def test_only_one_thread_copies_at_a_time(
    built: Path, q4: QuantizePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The others would spin in the kernel's lock of the file; they hash meanwhile."""
    finished(built, q4, tmp_path / "a")
    put = writer.put
    inside: list[int] = []
    most: list[int] = []

    def counted(whole: Gguf, name: str, payload: ranges.Payload) -> None:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.002)
        put(whole, name, payload)
        inside.pop()

    monkeypatch.setattr(writer, "put", counted)
    job = replace(job_for(built, q4), llama=LlamaCpp(BIN, threads=4))
    quantize_whole(job, tmp_path / "b.gguf", tmp_path)
    assert max(most) == 1
    assert len(most) == len(q4.tensors)


def test_a_part_has_only_the_size_of_the_vocabulary(
    built: Path, q4: QuantizePlan, tmp_path: Path
) -> None:
    """llama-quantize takes longer for a real vocabulary than for most tensors. The whole has it."""
    source = source_of(built)
    job = job_for(built, q4)
    quantize_piece(job, tmp_path / "pieces", 1, 2)
    (part,) = (reader.read(path) for path in (tmp_path / "pieces").glob("*.gguf"))
    assert not [key for key in part.metadata if key.startswith("tokenizer.")]
    assert part.get("qwen35.vocab_size") == len(source.metadata["tokenizer.ggml.tokens"]) > 1000
    finished(built, q4, tmp_path / "a")
    quantize_whole(job, tmp_path / "b.gguf", tmp_path)
    written = reader.read(tmp_path / "b.gguf").metadata
    assert source.metadata.items() - written.items() == {
        ("general.file_type", source.metadata["general.file_type"])
    }


def test_an_assembled_file_has_the_metadata_that_llama_quantize_writes(
    built: Path, tmp_path: Path
) -> None:
    """Including keys that it drops or moves, and for a source with a single tensor."""
    source = source_of(built)
    name = "blk.0.ffn_up.weight"
    split_keys = {key: Value.of(0, GGUFValueType.UINT16) for key in ("split.no", "split.count")}
    for number, names in enumerate(([name], [name, "blk.0.ffn_down.weight"])):
        folder = tmp_path / str(number)
        folder.mkdir()
        tensors = reader.contents(reader.select_tensors(source, names))
        writer.write(folder / "in.gguf", split_keys | source.metadata, tensors)
        opened = reader.read(folder / "in.gguf")
        types = dict.fromkeys(sorted(names), Kind.Q4_0)
        digests = reader.digests(opened.path)
        planned = make_plan(opened, digests, types, QuantizeRequest("Q4_0"), LLAMA)
        job = QuantizeJob(planned, opened, LLAMA)
        plain = folder / "plain.gguf"
        write_manifest(folder / "manifests/a.json", planned, quantize_whole(job, plain), [plain])
        assert not [key for key in reader.read(plain).metadata if key.startswith("split.")]
        scratch = folder / "scratch"
        scratch.mkdir()
        assembly.assemble(job, find_reusable(job, folder, scratch), folder / "out.gguf", scratch)
        assert (folder / "out.gguf").read_bytes() == plain.read_bytes()


def test_equal_tensors_under_other_names_go_into_other_files(q4: QuantizePlan) -> None:
    """A head can have a copy of the embeddings, and two jobs can quantize them at once."""
    one, two = list(q4.tensors)[:2]
    same = replace(q4, tensors={**q4.tensors, two: q4.tensors[one]})
    assert same.keys()[one] == same.keys()[two]
    assert pieces.batch_name(same, [one]) != pieces.batch_name(same, [two])


def test_a_termination_does_not_wait_for_copies(
    built: Path, q4: QuantizePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(built, q4, tmp_path / "a")
    written: list[int] = []
    append = writer.append_run

    def slow(sink: Any, infos: Any, payload: ranges.Payload) -> None:
        def steps() -> Any:
            for step in payload:
                time.sleep(0.05)
                written.append(1)
                yield step

        append(sink, infos, steps())

    def terminated(self: QuantizeJob, names: Iterable[str], out: Path, scratch: Path) -> Gguf:
        raise KeyboardInterrupt

    monkeypatch.setattr(LlamaCpp, "processors", 2)  # with one, copies come first
    job = job_for(built, with_other_types(q4, "Q5_0", "attn_qkv"))
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    reusable = find_reusable(job, tmp_path, scratch)
    metadata = assembly.whole_metadata(job, scratch)
    monkeypatch.setattr(assembly, "whole_metadata", lambda job, scratch: metadata)
    monkeypatch.setattr(QuantizeJob, "quantize_tensors", terminated)
    monkeypatch.setattr(writer, "append_run", slow)
    monkeypatch.setattr(assembly, "CHUNK", 1000)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        assembly.assemble(job, reusable, tmp_path / "b.gguf", scratch)
    assert time.monotonic() - start < 5
    assert len(written) < 10 < sum(tensor.data.size for tensor in reusable.values()) / 1000


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\ud800", "loop", "fifo", "folder", "~", "/"])
def test_an_impossible_manifest_is_ignored(
    built: Path, q4: QuantizePlan, tmp_path: Path, said: list[str], name: str
) -> None:
    (tmp_path / "manifests/folder").mkdir(parents=True)
    (tmp_path / "manifests/folder/a.gguf").mkdir()
    (tmp_path / "manifests/loop").symlink_to("loop")
    for pipe in ("fifo", "pipe.json"):
        os.mkfifo(tmp_path / "manifests" / pipe)
    entries = [[name, key, "0"] for name, key in q4.keys().items()]
    (tmp_path / "manifests/bad.json").write_text(json.dumps({"files": [name], "tensors": entries}))
    digests = quantize_whole(job_for(built, q4), tmp_path / "b.gguf", tmp_path)
    assert digests.keys() == {"header", *q4.tensors}
    count = len(q4.tensors)
    assert said == [f"reused 0 of {count} tensors (0 bytes); quantized {count}"]


def test_tensors_that_a_manifest_does_not_list_yet_are_not_reused(
    built: Path, q4: QuantizePlan, tmp_path: Path, said: list[str]
) -> None:
    """A run killed between file and manifest leaves a new file with the manifest of the old one."""
    changed = with_other_types(q4, "Q4_1", "ffn_up", "attn_qkv")
    before = finished(built, changed, tmp_path / "a")
    expected = quantized(built, q4, before)
    digests = quantize_whole(job_for(built, changed), tmp_path / "b.gguf", tmp_path)
    assert digests == quantized(built, changed, tmp_path / "c.gguf")
    assert quantize_whole(job_for(built, q4), tmp_path / "d.gguf", tmp_path) == expected
    changes = sum(changed.tensors[name] != q4.tensors[name] for name in q4.tensors)
    assert [line.rsplit("; ", 1)[1] for line in said] == [f"quantized {changes}"] * 2


def test_two_jobs_at_once(built: Path, q4: QuantizePlan, tmp_path: Path) -> None:
    """Two files both come out right, whatever one job sees of the other; one file is refused."""
    finished(built, q4, tmp_path / "a")
    plans = {f"{kind}.gguf": with_other_types(q4, kind, "attn_qkv") for kind in ("Q4_1", "Q5_0")}

    def make(name: str) -> dict[str, str]:
        out = tmp_path / name
        digests = quantize_whole(job_for(built, plans[name]), out, tmp_path)
        write_manifest(tmp_path / f"manifests/{name}.json", plans[name], digests, [out])
        return digests

    for _ in range(3):
        with ThreadPoolExecutor(2) as pool:
            results = dict(zip(plans, pool.map(make, plans), strict=True))
        assert all(results[name] == reader.digests(tmp_path / name) for name in plans)
    for name, planned in plans.items():
        plain = quantized(built, planned, tmp_path / "plain.gguf")
        assert reader.digests(tmp_path / name) == plain
    with (
        atomic.scratch_folder(tmp_path / "Q4_1.gguf"),
        pytest.raises(ForgeError, match="another process is writing it"),
    ):
        make("Q4_1.gguf")


def test_the_padding_of_parts_does_not_get_into_the_whole(built: Path, tmp_path: Path) -> None:
    """Padding that the source itself has is kept."""
    source = source_of(built)
    own = {reader.PADDING: Value.of("   ", GGUFValueType.STRING)}
    for number, metadata in enumerate((source.metadata, {**source.metadata, **own})):
        folder = tmp_path / str(number)
        folder.mkdir()
        writer.write(folder / "in.gguf", metadata, reader.contents(source))
        opened = reader.read(folder / "in.gguf")
        job = QuantizeJob(plan_for(opened, "Q4_0"), opened, LLAMA)
        quantize_whole(job, folder / "plain.gguf")
        quantize_piece(job, folder / "manifests/pieces", 1, 2)
        quantize_whole(job, folder / "out.gguf", folder)
        assert (folder / "out.gguf").read_bytes() == (folder / "plain.gguf").read_bytes()


def test_the_programs_plan_quantize_and_reuse(built: Path, run: Run, tmp_path: Path) -> None:
    source = source_of(built).path
    results = tmp_path / "results"
    said: list[str] = []
    for kind in ("Q4_K_S", "Q4_K_M"):
        plan_file = tmp_path / f"{kind}.plan"
        out = results / f"{kind}.gguf"
        digests = tmp_path / f"{kind}.json"
        link = results / f"manifests/{kind}.gguf"
        assert run("quantize_plan.py", source, "--type", kind, "--out", plan_file).returncode == 0
        options = ("--plan", plan_file, "--reuse", results, "--threads", 1, "--digests", digests)
        keep = ("--manifest", link.with_suffix(".json"), "--keep", link)
        done = run("quantize.py", source, *options, *keep, "--out", out)
        assert done.returncode == 0, done.stderr
        assert json.loads(digests.read_text()) == reader.digests(out)
        assert link.samefile(out)
        out.unlink()
        said.append(done.stderr)
    assert "reused 0 of " in said[0]
    assert "manifests/Q4_K_S.gguf; quantized " in said[1]
    assert "reused 0 of " not in said[1]
    plain = tmp_path / "m.gguf"
    assert run("quantize.py", source, "--type", "Q4_K_M", "--out", plain).returncode == 0
    assert plain.read_bytes() == (results / "manifests/Q4_K_M.gguf").read_bytes()


NEED_PLAN = ("--piece 1/2", "--reuse r", "--manifest m.json", "--keep k.gguf", "--also a.gguf")
WRONG = [
    "",
    "--plan p.json --head Q8_0",
    "--plan p.json --type Q4_0",
    "--plan p.json --piece 0/2",
    "--plan p.json --piece 3/2",
    "--plan p.json --piece 1/2",  # the folder of --out is not called manifests
    *(f"--plan p.json --piece 1/2 {option}" for option in NEED_PLAN[2:]),
    *(f"--type Q4_0 {option}" for option in NEED_PLAN),
]


@pytest.mark.parametrize("wrong", WRONG)
def test_options_that_exclude_each_other_are_refused(
    built: Path, run: Run, tmp_path: Path, wrong: str
) -> None:
    source = source_of(built).path
    done = run("quantize.py", source, *wrong.split(), "--out", tmp_path / "no.gguf")
    assert done.returncode == 2


def test_a_kill_at_any_time_leaves_nothing_that_looks_finished(
    built: Path, q4: QuantizePlan, tmp_path: Path
) -> None:
    """The next run removes the leftovers."""
    q4.write(tmp_path / "plan.json")
    out = tmp_path / "manifests"
    command = ["python", "workflow/scripts/quantize.py", str(source_of(built).path)]
    command += ["--plan", str(tmp_path / "plan.json"), "--piece", "1/2", "--out", str(out)]

    def has_begun(sign: str) -> bool:
        """Whether a folder exists, or llama-quantize has begun to write a file."""
        try:
            return any(path.is_dir() or path.stat().st_size for path in out.glob(sign))
        except OSError:
            return False

    for sign in (".1-of-2.scratch", ".1-of-2.scratch/part.gguf", ".*.gguf.part"):
        for _ in range(50):  # it can finish before it is killed
            shutil.rmtree(out, ignore_errors=True)
            with subprocess.Popen(command, cwd=built, stderr=subprocess.DEVNULL) as process:
                while not has_begun(sign) and process.poll() is None:
                    time.sleep(0.001)
                process.kill()
            if not list(out.glob("[!.]*")):
                break
        assert not list(out.glob("[!.]*")), sign
        assert has_begun(sign), sign
    (left,) = out.glob(".*.gguf.part")
    left.write_bytes(b"left behind")
    (out / ".1-of-2.scratch").mkdir(exist_ok=True)
    (out / ".1-of-2.scratch/part.gguf").write_bytes(b"left behind")
    assert subprocess.run(command, cwd=built, capture_output=True).returncode == 0
    (made,) = out.glob("*.gguf")
    assert reader.read(made).tensors.keys() == set(split_into_pieces(q4, source_of(built), 2)[0])
    assert sorted(path.name for path in out.iterdir()) == [made.name, f"{made.stem}.json"]


def test_the_alignment_padding_of_a_reused_file_is_not_copied(
    built: Path, q4: QuantizePlan, tmp_path: Path, said: list[str]
) -> None:
    """No digest covers it, and it would be passed on from file to file."""
    out = finished(built, q4, tmp_path / "a")
    whole = out.read_bytes()
    places = reader.read(out).ranges.values()
    place = next(place for place in places if place.size % reader.ALIGNMENT)
    overwrite(out, place.offset + place.size, b"\xff")
    quantize_whole(job_for(built, q4), tmp_path / "b.gguf", tmp_path)
    assert f"reused {len(q4.tensors)} of {len(q4.tensors)} tensors" in said[0]
    assert (tmp_path / "b.gguf").read_bytes() == whole


def test_manifests_are_found_behind_links_and_while_folders_disappear(
    built: Path, q4: QuantizePlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(built, q4, tmp_path / "a")
    (tmp_path / "results").mkdir()
    (tmp_path / "results/model").symlink_to(tmp_path / "a")
    going = tmp_path / "results/going"
    going.mkdir()
    listed = os.scandir

    def scandir(path: Any) -> Any:
        if str(path).endswith("going"):
            raise FileNotFoundError(errno.ENOENT, "gone", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(FileNotFoundError):
        os.scandir(going)
    found = reusable_names(built, q4, tmp_path / "results", tmp_path / "scratch")
    assert found == set(q4.tensors)
