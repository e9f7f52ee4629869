"""Plans and pieces: what decides a tensor's bytes, how work is cut, and that nothing wrong is taken from a file."""

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
from typing import Any

import pytest
from conftest import BIN, Run
from gguf.constants import GGMLQuantizationType as Kind
from gguf.constants import GGUFValueType
from mtpforge.errors import ConfigError, ForgeError, GgufError
from mtpforge.gguf import quant_types, reader, writer
from mtpforge.gguf.reader import Gguf, TensorInfo, Value
from mtpforge.io import atomic, ranges
from mtpforge.io.ranges import FileRange, Sink
from mtpforge.quantize import imatrix, pieces, plan
from mtpforge.quantize.llama_quantize import choose
from mtpforge.quantize.manifest import write_manifest
from mtpforge.quantize.mixture import Types
from mtpforge.quantize.pieces import Work, cut
from mtpforge.quantize.plan import Plan
from splits import split


def source_of(built: Path) -> Gguf:
    return reader.read(built / "results/tiny-qwen3.5/work/convert/all.gguf")


@pytest.fixture(scope="module")
def made(built: Path) -> Plan:
    source = source_of(built)
    return plan.make(
        source,
        reader.digests(source.path),
        choose(source, "Q4_K_M", bin_dir=BIN),
        "Q4_K_M",
        None,
        BIN,
    )


def work(built: Path, made: Plan, said: list[str] | None = None) -> Work:
    return Work(made, source_of(built), None, 1, BIN, say=(said if said is not None else []).append)


def finished(built: Path, made: Plan, folder: Path) -> Path:
    """A quantization, with its manifest, in a folder of its own."""
    out = folder / "out.gguf"
    folder.mkdir()
    write_manifest(folder / "manifests/out.json", made, work(built, made).whole(out), [out])
    return out


def test_a_plan_is_the_same_for_the_same_work_and_small_enough_to_be_compared(
    built: Path, made: Plan, tmp_path: Path
) -> None:
    made.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == made and list(
        Plan.read(tmp_path / "plan.json").tensors
    ) == list(made.tensors)
    digests = json.loads((built / "results/tiny-qwen3.5/work/convert/all.json").read_text())
    again = plan.make(source_of(built), digests, made.types(), "Q4_K_M", None, BIN)
    again.write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()
    many = {
        f"blk.{i}.a_name_as_long_as_they_are.weight": replace(t, row="0" * 128)
        for i, t in enumerate(made.tensors.values())
    }
    large = {f"{n}.{i}": tensor for i in range(16) for n, tensor in many.items()}
    replace(made, tensors=large).write(tmp_path / "large.json")
    assert len(large) >= 1118 and (tmp_path / "large.json").stat().st_size < 1e6


def test_a_key_changes_with_all_that_decides_the_bytes_and_nothing_else(made: Plan) -> None:
    name, other = list(made.tensors)[:2]
    for field in ("type", "form", "source", "row"):
        changed = replace(
            made, tensors={**made.tensors, name: replace(made.tensors[name], **{field: "Q8_0"})}
        )
        assert (
            changed.keys()[name] != made.keys()[name]
            and changed.keys()[other] == made.keys()[other]
        )
    assert not set(replace(made, toolchain="another").keys().values()) & set(made.keys().values())
    assert replace(made, file_type="Q4_K_S", header="another").keys() == made.keys()


def test_a_row_of_an_importance_matrix_counts_for_its_tensor_alone(tmp_path: Path) -> None:
    def write(path: Path, first: float) -> dict[str, str]:
        metadata = {
            "imatrix.datasets": Value.of(["text"], GGUFValueType.ARRAY, GGUFValueType.STRING),
            "imatrix.chunk_count": Value.of(1, GGUFValueType.UINT32),
            "imatrix.chunk_size": Value.of(512, GGUFValueType.UINT32),
        }
        values = {"a.in_sum2": first, "a.counts": 1.0, "b.in_sum2": 1.0, "b.counts": 1.0}
        parts = [(TensorInfo(n, (1,), Kind.F32), [memoryview(bytes(Value.of(v, GGUFValueType.FLOAT32).raw))])
                 for n, v in values.items()]  # fmt: skip
        writer.write(path, metadata, parts)
        return imatrix.digests(path)

    one, two = write(tmp_path / "one.gguf", 1.0), write(tmp_path / "two.gguf", 2.0)
    assert one["a"] != two["a"] and one["b"] == two["b"]


@pytest.mark.parametrize("form", ["BF16 x", "", "BF16 -1", "BF16 " + 400 * "9"])
def test_a_plan_with_a_shape_that_cannot_be_is_refused(
    made: Plan, tmp_path: Path, form: str
) -> None:
    replace(
        made, tensors={name: replace(tensor, form=form) for name, tensor in made.tensors.items()}
    ).write(tmp_path / "plan.json")
    with pytest.raises(
        GgufError, match=r"plan\.json: is no plan of a quantization .*: make it again"
    ):
        Plan.read(tmp_path / "plan.json")


@pytest.mark.parametrize(("field", "value"), [("file_type", "Q4_K_X"), ("tensors", "Q8_1")])
def test_a_plan_with_a_type_that_cannot_be_is_refused(
    made: Plan, tmp_path: Path, field: str, value: str
) -> None:
    tensors = {name: replace(tensor, type=value) for name, tensor in made.tensors.items()}
    replace(made, **{field: tensors if field == "tensors" else value}).write(tmp_path / "plan.json")  # type: ignore[arg-type]
    with pytest.raises(
        GgufError, match=r"plan\.json: is no plan of a quantization .*a type that cannot be"
    ):
        Plan.read(tmp_path / "plan.json")


def test_a_plan_that_is_missing_is_none_of_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(GgufError, match=r"plan\.json: missing: quantize_plan\.py writes it"):
        Plan.read(tmp_path / "plan.json")


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
def test_what_is_no_plan_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(Exception, match=r"plan\.json: ") as error:
        Plan.read(tmp_path / "plan.json")
    assert type(error.value).__module__ == "mtpforge.errors"


def test_a_plan_for_another_source_or_matrix_is_refused(
    built: Path, made: Plan, tmp_path: Path
) -> None:
    trunk = reader.read(built / "results/tiny-qwen3.5/work/convert/trunk.gguf")
    with pytest.raises(GgufError, match="has other tensors or metadata than what the plan is for"):
        Work(made, trunk)
    (tmp_path / "my.dat").write_bytes(b"1")
    with pytest.raises(
        ConfigError, match=r"is for the importance matrix none, given is .*/my\.dat"
    ):
        Work(made, source_of(built), tmp_path / "my.dat")
    another = replace(made, imatrix="my.dat", imatrix_sha256="0" * 64)
    with pytest.raises(
        ConfigError, match=r"is for the importance matrix my\.dat \(0{64}\), given is .*/my\.dat"
    ):
        Work(another, source_of(built), tmp_path / "my.dat")


def test_a_plan_for_other_weights_under_the_same_header_is_refused(
    built: Path, made: Plan, tmp_path: Path
) -> None:
    """A fine-tune with the same metadata, of which norms can be frozen: reuse would take its bytes for the other's ever after."""
    for name in ("blk.1.attn_norm.weight", "blk.1.ffn_down.weight"):
        another = tmp_path / "all.gguf"
        shutil.copyfile(source_of(built).path, another)
        with another.open("r+b") as file:
            file.seek(source_of(built).ranges[name].offset)
            file.write(bytes(64))
        with pytest.raises(
            GgufError,
            match=r"all\.gguf: has other weights than what the plan is for: make the plan again",
        ):
            Work(made, reader.read(another), bin_dir=BIN)


def test_a_plan_for_another_toolchain_is_refused(built: Path, made: Plan, tmp_path: Path) -> None:
    """Of which nothing may get this one's key: here the same program, built in another way."""
    shutil.copytree(BIN, tmp_path / "bin", symlinks=True)
    assert Work(made, source_of(built), bin_dir=BIN)
    (tmp_path / "stamp.json").write_text('{"commit": "another"}')
    with pytest.raises(
        ConfigError,
        match=rf"is for another llama-quantize than that in {tmp_path}/bin: make the plan again",
    ):
        Work(made, source_of(built), bin_dir=tmp_path / "bin")


def test_libraries_of_the_program_are_part_of_the_toolchain(tmp_path: Path) -> None:
    """Where llama.cpp was built with shared libraries, the quantizers are in these."""
    (tmp_path / "bin").mkdir()
    shutil.copy(BIN / "llama-quantize", tmp_path / "bin/llama-quantize")
    (tmp_path / "bin/libggml-base.so").write_bytes(b"1")
    before = plan.toolchain(tmp_path / "bin")
    (tmp_path / "bin/libggml-base.so").write_bytes(b"2")
    assert plan.toolchain(tmp_path / "bin") != before


@pytest.mark.parametrize("count", [1, 2, 3, 7, 999])
def test_pieces_have_each_tensor_once_and_about_the_same_cost(
    built: Path, made: Plan, count: int
) -> None:
    source = source_of(built)
    parts = cut(made, source, count)
    assert len(parts) == count and [name for part in parts for name in part] == list(source.tensors)
    costs = [sum(made.tensors[name].cost for name in part) for part in parts]
    largest = max(made.tensors[name].cost for name in source.tensors)
    assert max(costs) <= sum(costs) / count + largest
    assert parts == cut(made, source, count)


def test_long_work_is_cut_by_its_cost_and_the_threads_that_there_are(
    made: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of each tensor at the type that a recipe gives it."""
    all_of_it = sum(tensor.cost for tensor in made.tensors.values())
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert made.pieces(1) == made.pieces(8) == 1
    monkeypatch.setattr(plan, "PIECE_SECONDS", all_of_it / 20)
    assert [made.pieces(threads) for threads in (1, 2, 8, 0, 64)] == [20, 10, 2, 2, 2]
    slow = with_other_types(made, "IQ3_S", "ffn_up")
    assert (
        slow.pieces(1)
        == round(20 * sum(tensor.cost for tensor in slow.tensors.values()) / all_of_it)
        > 20
    )
    monkeypatch.setattr(plan, "PIECE_SECONDS", all_of_it / 1e6)
    assert made.pieces(1) == plan.MOST_PIECES


def test_every_type_has_a_cost() -> None:
    assert quant_types.SECONDS.keys() == set(quant_types.TENSOR_TYPES)


def test_what_a_finished_file_has_is_taken_also_where_it_was_moved(
    built: Path, made: Plan, tmp_path: Path
) -> None:
    before, said = finished(built, made, tmp_path / "a"), list[str]()
    manifest = tmp_path / "a/manifests/out.json"
    write_manifest(manifest, made, reader.digests(before), [before, tmp_path / "published.gguf"])
    before.rename(tmp_path / "published.gguf")
    work(built, made, said).whole(tmp_path / "b.gguf", tmp_path)
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "published.gguf").read_bytes()
    assert (
        f"({len(made.tensors)} of {len(made.tensors)} tensors) from {tmp_path / 'published.gguf'}; quantized 0"
        in said[0]
    )


def test_damaged_bytes_are_quantized_anew_with_a_warning(
    built: Path, made: Plan, tmp_path: Path
) -> None:
    before, said = finished(built, made, tmp_path / "a"), list[str]()
    whole, place = before.read_bytes(), reader.read(before).ranges["blk.1.ffn_down.weight"]
    with before.open("r+b") as file:
        file.seek(place.offset + place.size // 2)
        file.write(bytes([whole[place.offset + place.size // 2] ^ 1]))
    digests = work(built, made, said).whole(tmp_path / "b.gguf", tmp_path)
    assert (tmp_path / "b.gguf").read_bytes() == whole and digests == reader.digests(
        tmp_path / "b.gguf"
    )
    assert said[0].startswith(f"warning: {before}: blk.1.ffn_down.weight ") and said[1].endswith(
        "; quantized 1"
    )


def with_other_types(made: Plan, kind: str, *parts: str) -> Plan:
    """The same with another type for some tensors."""
    types = {
        name: replace(tensor, type=kind)
        for name, tensor in made.tensors.items()
        if any(part in name for part in parts)
    }
    return replace(made, tensors=made.tensors | types)


def during_the_work(monkeypatch: pytest.MonkeyPatch, happens: Callable[[], object]) -> None:
    """Let something happen between the look for what can be reused and its copying, in which hours can pass."""
    some = Work._some

    def interrupted(self: Work, names: Iterable[str], out: Path, scratch: Path) -> Gguf:
        monkeypatch.setattr(Work, "_some", some)
        happens()
        return some(self, names, out, scratch)

    monkeypatch.setattr(Work, "_some", interrupted)


@pytest.mark.parametrize("how", ["gone", "replaced", "gone and without links", "torn"])
def test_a_file_that_goes_while_it_is_used_costs_at_most_the_time(
    built: Path, made: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Deleted, it can be read on by its second name; torn, or where there is none, what it had is made anew."""
    changed, said = with_other_types(made, "Q5_0", "attn_qkv"), list[str]()
    expected = work(built, changed).whole(tmp_path / "expected.gguf")
    before = finished(built, made, tmp_path / "a")

    def goes() -> None:
        if how == "torn":
            os.truncate(before, 4096)
        else:
            before.unlink()
        if how == "replaced":
            before.write_bytes(b"GGUF of another job, not finished")

    during_the_work(monkeypatch, goes)
    if how == "gone and without links":
        monkeypatch.setattr(
            os,
            "link",
            lambda *names: (_ for _ in ()).throw(PermissionError(errno.EPERM, "no links")),
        )
    assert (
        work(built, changed, said).whole(tmp_path / "b.gguf", tmp_path)
        == expected
        == reader.digests(tmp_path / "b.gguf")
    )
    if how in ("gone", "replaced"):
        assert said[-1].endswith("; quantized 3") and len(said) == 1
    else:
        assert (
            said[0].startswith(f"warning: {before}: ")
            and "cannot be read" in said[0]
            and "reused 0" in said[-1]
        )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b.gguf", "expected.gguf"]


def test_a_full_disk_is_no_reason_to_quantize_anew(
    built: Path, made: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And stops what is quantized meanwhile."""
    changed = with_other_types(made, "Q5_0", "ffn_up", "ffn_down", "ffn_gate")
    finished(built, made, tmp_path / "a")
    put, some, runs = writer.put, Work._some, list[list[str]]()

    def full(whole: Gguf, name: str, payload: ranges.Payload) -> None:
        if changed.tensors[name] == made.tensors[name]:
            raise OSError(errno.ENOSPC, "no space left")
        put(whole, name, payload)

    def recorded(self: Work, names: Iterable[str], out: Path, scratch: Path) -> Gguf:
        runs.append(list(names))
        return some(self, runs[-1], out, scratch)

    monkeypatch.setattr(writer, "put", full)
    monkeypatch.setattr(Work, "_some", recorded)
    monkeypatch.setattr(pieces, "AT_ONCE", 1)
    with pytest.raises(OSError, match="no space left"):
        work(built, changed).whole(tmp_path / "b.gguf", tmp_path)
    assert len(runs) < 5 < sum(changed.tensors[name] != made.tensors[name] for name in made.tensors)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("how", ["torn", "changed"])
def test_what_goes_while_it_is_copied_is_quantized_anew(
    built: Path, made: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    """Cut off in place, or overwritten; the digests are of what has been written."""
    before, said = finished(built, made, tmp_path / "a"), list[str]()
    whole, places, put = before.read_bytes(), reader.read(before).ranges, writer.put
    middle = sorted(places.values(), key=lambda place: place.offset)[len(places) // 2].offset
    calls = list[str]()

    def fading(into: Gguf, name: str, payload: ranges.Payload) -> None:
        calls.append(name)
        if len(calls) == 2:
            if how == "torn":
                os.truncate(before, middle)
            else:
                before.write_bytes(whole[:middle] + bytes(len(whole) - middle))
        put(into, name, payload)

    monkeypatch.setattr(writer, "put", fading)
    digests = work(built, made, said).whole(tmp_path / "b.gguf", tmp_path)
    assert (tmp_path / "b.gguf").read_bytes() == whole and digests == reader.digests(
        tmp_path / "b.gguf"
    )
    assert "cannot be read" in said[0] and 0 < int(said[-1].rsplit(" ", 1)[1]) < len(made.tensors)


@pytest.mark.parametrize("how", ["gone", "torn", "another", "manifest"])
def test_a_file_that_is_not_there_any_more_costs_only_the_time(
    built: Path, made: Plan, tmp_path: Path, how: str
) -> None:
    before, said = finished(built, made, tmp_path / "a"), list[str]()
    whole = before.read_bytes()
    if how == "gone":
        before.unlink()
    elif how == "torn":
        before.write_bytes(whole[: len(whole) // 2])
    elif how == "another":
        before.write_bytes((built / "results/tiny-qwen3.5/tiny-qwen3.5-BF16.gguf").read_bytes())
    else:
        (tmp_path / "a/manifests/out.json").write_text('{"files": 1, "tensors": [["a", "b"]]}')
    work(built, made, said).whole(tmp_path / "b.gguf", tmp_path)
    assert (tmp_path / "b.gguf").read_bytes() == whole and "reused 0 bytes" in said[-1]


def test_too_little_is_not_worth_a_second_copy(built: Path, made: Plan, tmp_path: Path) -> None:
    """Where only what costs next to nothing is there, llama-quantize writes the file itself."""
    source, said = source_of(built), list[str]()
    out, norms = (
        finished(built, made, tmp_path / "a"),
        [name for name, tensor in made.tensors.items() if tensor.type == "F32"],
    )
    digests = {name: digest for name, digest in reader.digests(out).items() if name in norms}
    write_manifest(tmp_path / "a/manifests/out.json", made, digests, [out])
    (tmp_path / "scratch").mkdir()
    assert (
        work(built, made).find(tmp_path, tmp_path / "scratch").keys()
        == set(norms)
        != set(source.tensors)
    )
    work(built, made, said).whole(tmp_path / "b.gguf", tmp_path)
    assert "reused 0 bytes" in said[0]


@pytest.mark.parametrize(("kind", "used"), [("Q4_0", False), ("IQ4_XS", True)])
def test_what_is_quantized_as_fast_as_it_is_copied_is_not_assembled(
    built: Path, tmp_path: Path, kind: str, used: bool
) -> None:
    source, said = source_of(built), list[str]()
    types = choose(source, kind, recipe=[(".*", kind)], bin_dir=BIN)
    chosen = plan.make(source, reader.digests(source.path), types, kind, None, BIN)
    out = finished(built, chosen, tmp_path / "a")
    digests = {
        name: digest
        for name, digest in reader.digests(out).items()
        if "ffn_up" in name or "ffn_gate" in name
    }
    write_manifest(tmp_path / "a/manifests/out.json", chosen, digests, [out])
    work(built, chosen, said).whole(tmp_path / "b.gguf", tmp_path)
    assert ("reused 0 bytes" in said[0]) != used


def test_a_split_file_is_reused(built: Path, made: Plan, tmp_path: Path) -> None:
    """From the folder of its parts, where that alone is left of it."""
    before, said = finished(built, made, tmp_path / "a"), list[str]()
    whole = before.read_bytes()
    split(before, tmp_path / "published", "parts", 10**6)
    assert len(list((tmp_path / "published").iterdir())) > 1
    write_manifest(
        tmp_path / "a/manifests/out.json",
        made,
        reader.digests(before),
        [before, tmp_path / "published"],
    )
    before.unlink()
    work(built, made, said).whole(tmp_path / "b.gguf", tmp_path)
    assert (
        (tmp_path / "b.gguf").read_bytes() == whole
        and "quantized 0" in said[0]
        and "published/" in said[0]
    )


def make_piece(built: Path, planned: Plan, folder: Path, number: int, count: int) -> str:
    """One piece, as the rule makes it; the last line that was said."""
    said = list[str]()
    digests = work(built, planned, said).piece(folder / "manifests/pieces", number, count, folder)
    assert list(digests) == cut(planned, source_of(built), count)[number - 1]
    return said[-1]


def files_of_pieces(folder: Path) -> dict[Path, dict[str, TensorInfo]]:
    return {
        path: reader.read(path).tensors for path in (folder / "manifests/pieces").glob("*.gguf")
    }


def test_a_piece_that_is_made_again_keeps_what_it_has(
    built: Path, made: Plan, tmp_path: Path
) -> None:
    """Also what it has of another cut, and as much as is right of what is damaged."""
    make_piece(built, made, tmp_path, 1, 2)
    first = files_of_pieces(tmp_path)
    assert (
        make_piece(built, made, tmp_path, 1, 2).endswith("; quantized 0")
        and files_of_pieces(tmp_path) == first
    )
    assert (
        make_piece(built, made, tmp_path, 1, 3).endswith("; quantized 0")
        and files_of_pieces(tmp_path) == first
    )
    (out,) = first
    place = reader.read(out).ranges["blk.0.ffn_up.weight"]
    with out.open("r+b") as file:
        file.seek(place.offset)
        file.write(bytes(64))
    first_of_three = len(
        cut(made, source_of(built), 3)[0]
    )  # which has the damaged one, and leaves the others what is sound
    assert make_piece(built, made, tmp_path, 1, 3).endswith(
        f"; {first_of_three - 1} from pieces; quantized 1"
    )
    assert make_piece(built, made, tmp_path, 1, 2).endswith("; quantized 0")
    changed = with_other_types(made, "Q5_0", "attn_qkv")
    for number in (1, 2):
        make_piece(built, changed, tmp_path, number, 2)
    expected, said = work(built, changed).whole(tmp_path / "expected.gguf"), list[str]()
    assert work(built, changed, said).whole(tmp_path / "b.gguf", tmp_path) == expected
    assert said == [
        f"reused 0 bytes (0 of {len(made.tensors)} tensors) from nothing; {len(made.tensors)} from pieces; quantized 0"
    ]


def test_a_piece_is_made_little_by_little(
    built: Path, made: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tensor that is larger than the limit is made alone. What is finished when a piece is killed is not made again."""
    source, limit, runs, some = source_of(built), 100_000, list[list[str]](), Work._some

    def recorded(self: Work, names: Iterable[str], out: Path, scratch: Path) -> Gguf:
        runs.append(list(names))
        if len(runs) == 3:
            raise KeyboardInterrupt
        return some(self, runs[-1], out, scratch)

    expected = work(built, made).whole(tmp_path / "expected.gguf")
    monkeypatch.setattr(Work, "_some", recorded)
    monkeypatch.setattr(pieces, "AT_ONCE", limit)
    with pytest.raises(KeyboardInterrupt):
        make_piece(built, made, tmp_path, 1, 2)
    names = cut(made, source, 2)[0]
    finished = {name for tensors in files_of_pieces(tmp_path).values() for name in tensors}
    assert [name for run in runs for name in run][: len(finished)] == names[
        : len(finished)
    ] and len(finished) > 1
    del runs[2]
    runs.insert(2, [])  # nothing is interrupted again
    assert make_piece(built, made, tmp_path, 1, 2).endswith(
        f"; {len(finished)} from pieces; quantized {len(names) - len(finished)}"
    )
    assert [name for run in runs for name in run] == names and len(runs) > 6
    sizes = [sum(source.tensors[name].size for name in run) for run in runs]
    assert (
        all(size <= limit or len(run) == 1 for size, run in zip(sizes, runs, strict=True))
        and max(map(len, runs)) > 1
    )
    found = work(built, made).piece(tmp_path / "manifests/pieces", 1, 2, tmp_path)
    assert found == {name: expected[name] for name in names}
    make_piece(built, made, tmp_path, 2, 2)
    assert work(built, made).whole(tmp_path / "b.gguf", tmp_path) == expected
    runs.clear()
    work(built, made).piece(tmp_path / "all", 1, 1)
    assert [len(run) for run in runs] == [len(made.tensors)]  # there is nothing to copy


def test_no_part_of_the_source_is_large(
    built: Path, made: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a large matrix so many rows are made at a time: a model can have gigabytes in one, for which there is not always room."""
    sizes, quantize = list[tuple[int, int]](), Work._quantize

    def recorded(self: Work, source: Gguf, out: Path) -> Gguf:
        sizes.append(
            (sum(info.size for info in source.tensors.values()), source.path.stat().st_size)
        )
        return quantize(self, source, out)

    limit, expected = 50_000, work(built, made).whole(tmp_path / "expected.gguf")
    monkeypatch.setattr(Work, "_quantize", recorded)
    monkeypatch.setattr(pieces, "AT_ONCE", limit)
    for number in (1, 2):
        make_piece(built, made, tmp_path, number, 2)
    source = source_of(built)
    assert max(source.tensors[name].size for name in source.tensors) > 5 * limit
    assert (
        max(size for size, _ in sizes) <= limit and max(size for _, size in sizes) < limit + 10_000
    )
    assert sum(size for size, _ in sizes) == sum(info.size for info in source.tensors.values())
    assert work(built, made).whole(tmp_path / "b.gguf", tmp_path) == expected


def test_tables_of_a_type_are_not_made_for_a_few_weights(
    built: Path, made: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """IQ1_M takes nine CPU seconds before it begins: as long as for 65 million weights, which would be a run."""
    monkeypatch.setattr(pieces, "AT_ONCE", 50_000)
    many = [name for name in made.tensors if "ffn" in name]
    runs = {
        kind: list(work(built, with_other_types(made, kind, "ffn"))._runs(many))
        for kind in ("Q4_K", "IQ1_M")
    }
    assert len(runs["Q4_K"]) > 10 and runs["IQ1_M"] == [
        [name for run in runs["Q4_K"] for name in run]
    ]
    assert quant_types.TABLES.keys() < quant_types.SECONDS.keys()


def test_memory_of_what_nobody_else_reads_is_freed(
    built: Path, made: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    """A piece's, once it is copied; that of a file that is somebody's result is not ours."""
    copied, forgotten = list[FileRange](), list[FileRange]()
    append, forget = Sink._append_range, ranges.forget

    def appended(self: Sink, piece: FileRange) -> None:
        append(self, piece)
        copied.append(piece)

    def recorded(piece: FileRange) -> None:
        assert piece in copied
        forgotten.append(piece)
        forget(piece)

    monkeypatch.setattr(Sink, "_append_range", appended)
    monkeypatch.setattr(pieces, "forget", recorded)
    finished(built, made, tmp_path / "a")
    work(built, made).whole(tmp_path / "b.gguf", tmp_path / "a")
    assert not forgotten
    make_piece(built, made, tmp_path / "c", 1, 1)
    expected = reader.digests(tmp_path / "b.gguf")
    assert work(built, made).whole(tmp_path / "c.gguf", tmp_path / "c") == expected
    sizes = [info.size for info in reader.read(tmp_path / "c.gguf").tensors.values()]
    assert sorted(piece.size for piece in forgotten) == sorted(sizes)


def test_one_copies_at_a_time(
    built: Path, made: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lock that the system has for a file would let the others spin; they hash meanwhile."""
    finished(built, made, tmp_path / "a")
    put, inside, most = writer.put, list[int](), list[int]()

    def counted(whole: Gguf, name: str, payload: ranges.Payload) -> None:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.002)
        put(whole, name, payload)
        inside.pop()

    monkeypatch.setattr(writer, "put", counted)
    replace(work(built, made), threads=4).whole(tmp_path / "b.gguf", tmp_path)
    assert max(most) == 1 and len(most) == len(made.tensors)


def test_a_part_has_no_vocabulary_but_its_size(built: Path, made: Plan, tmp_path: Path) -> None:
    """With which llama-quantize is longer than with many a tensor; the whole has it."""
    source = source_of(built)
    work(built, made).piece(tmp_path / "pieces", 1, 2)
    (part,) = (reader.read(path) for path in (tmp_path / "pieces").glob("*.gguf"))
    assert not [key for key in part.metadata if key.startswith("tokenizer.")]
    assert part.get("qwen35.vocab_size") == len(source.metadata["tokenizer.ggml.tokens"]) > 1000
    finished(built, made, tmp_path / "a")
    work(built, made).whole(tmp_path / "b.gguf", tmp_path)
    assert source.metadata.items() - reader.read(tmp_path / "b.gguf").metadata.items() == {
        ("general.file_type", source.metadata["general.file_type"])
    }


def test_metadata_of_the_whole_is_that_of_llama_quantize(built: Path, tmp_path: Path) -> None:
    """With what it drops, what it moves, and of a source that has but one tensor."""
    source = source_of(built)
    name = "blk.0.ffn_up.weight"
    split_keys = {key: Value.of(0, GGUFValueType.UINT16) for key in ("split.no", "split.count")}
    for number, names in enumerate(([name], [name, "blk.0.ffn_down.weight"])):
        folder = tmp_path / str(number)
        folder.mkdir()
        writer.write(
            folder / "in.gguf",
            split_keys | source.metadata,
            reader.contents(reader.select_tensors(source, names)),
        )
        opened = reader.read(folder / "in.gguf")
        types: Types = dict.fromkeys(sorted(names), Kind.Q4_0)
        job = Work(
            plan.make(opened, reader.digests(opened.path), types, "Q4_0", None, BIN),
            opened,
            None,
            1,
            BIN,
        )
        digests = job.whole(folder / "plain.gguf")
        write_manifest(folder / "manifests/plain.json", job.plan, digests, [folder / "plain.gguf"])
        assert not [
            key for key in reader.read(folder / "plain.gguf").metadata if key.startswith("split.")
        ]
        (folder / "scratch").mkdir()
        made = job.find(folder, folder / "scratch")
        job._assemble(made, folder / "out.gguf", folder / "scratch")
        assert (folder / "out.gguf").read_bytes() == (folder / "plain.gguf").read_bytes()


def test_tensors_of_the_same_bytes_are_made_into_files_of_their_own(made: Plan) -> None:
    """A head can have a copy of the embeddings; two jobs can be at them at once."""
    one, two = list(made.tensors)[:2]
    same = replace(made, tensors={**made.tensors, two: made.tensors[one]})
    assert same.keys()[one] == same.keys()[two] and pieces._digest(same, [one]) != pieces._digest(
        same, [two]
    )


def test_a_termination_does_not_wait_for_what_is_copied(
    built: Path, made: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    finished(built, made, tmp_path / "a")
    changed, written = with_other_types(made, "Q5_0", "attn_qkv"), list[int]()
    append = writer.append_run

    def slow(sink: Any, infos: Any, payload: ranges.Payload) -> None:
        def steps() -> Any:
            for step in payload:
                time.sleep(0.05)
                written.append(1)
                yield step

        append(sink, infos, steps())

    def terminated(self: Work, names: Iterable[str], out: Path, scratch: Path) -> Gguf:
        raise KeyboardInterrupt

    job = work(built, changed)
    (tmp_path / "scratch").mkdir()
    reused = job.find(tmp_path, tmp_path / "scratch")
    metadata = job._metadata(tmp_path / "scratch")
    monkeypatch.setattr(Work, "_metadata", lambda self, scratch: metadata)
    monkeypatch.setattr(Work, "_some", terminated)
    monkeypatch.setattr(writer, "append_run", slow)
    monkeypatch.setattr(pieces, "CHUNK", 1000)
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        job._assemble(reused, tmp_path / "b.gguf", tmp_path / "scratch")
    assert (
        time.monotonic() - start < 5
        and len(written) < 10 < sum(tensor.piece.size for tensor in reused.values()) / 1000
    )


@pytest.mark.parametrize("name", ["x" * 5000, "a\0b", "\ud800", "loop", "fifo", "folder", "~", "/"])
def test_a_manifest_that_cannot_be_stops_nothing(
    built: Path, made: Plan, tmp_path: Path, name: str
) -> None:
    (tmp_path / "manifests/folder").mkdir(parents=True)
    (tmp_path / "manifests/folder/a.gguf").mkdir()
    (tmp_path / "manifests/loop").symlink_to("loop")
    for pipe in ("fifo", "pipe.json"):
        os.mkfifo(tmp_path / "manifests" / pipe)
    entries = [[name, key, "0"] for name, key in made.keys().items()]
    (tmp_path / "manifests/bad.json").write_text(json.dumps({"files": [name], "tensors": entries}))
    said = list[str]()
    assert work(built, made, said).whole(tmp_path / "b.gguf", tmp_path).keys() == {
        "header",
        *made.tensors,
    }
    assert said == [
        f"reused 0 bytes (0 of {len(made.tensors)} tensors) from nothing; quantized {len(made.tensors)}"
    ]


def test_what_a_manifest_does_not_say_yet_is_not_taken(
    built: Path, made: Plan, tmp_path: Path
) -> None:
    """Of a run that was killed between its file and its manifest: the file is new, and the manifest that of the last one."""
    changed, said = with_other_types(made, "Q4_1", "ffn_up", "attn_qkv"), list[str]()
    before = finished(built, changed, tmp_path / "a")
    expected = work(built, made).whole(before)
    assert work(built, changed, said).whole(tmp_path / "b.gguf", tmp_path) == work(
        built, changed
    ).whole(tmp_path / "c.gguf")
    assert work(built, made, said).whole(tmp_path / "d.gguf", tmp_path) == expected
    changes = sum(changed.tensors[name] != made.tensors[name] for name in made.tensors)
    assert [line.rsplit("; ", 1)[1] for line in said] == [f"quantized {changes}"] * 2


def test_two_at_once(built: Path, made: Plan, tmp_path: Path) -> None:
    """Of different files each is right, whatever it sees of the other; of one file the second is refused."""
    finished(built, made, tmp_path / "a")
    plans = {f"{kind}.gguf": with_other_types(made, kind, "attn_qkv") for kind in ("Q4_1", "Q5_0")}

    def make(name: str) -> dict[str, str]:
        digests = work(built, plans[name]).whole(tmp_path / name, tmp_path)
        write_manifest(tmp_path / f"manifests/{name}.json", plans[name], digests, [tmp_path / name])
        return digests

    for _ in range(3):
        with ThreadPoolExecutor(2) as pool:
            assert all(
                digests == reader.digests(tmp_path / n)
                for n, digests in zip(plans, pool.map(make, plans), strict=True)
            )
    for name, planned in plans.items():
        assert reader.digests(tmp_path / name) == work(built, planned).whole(
            tmp_path / "plain.gguf"
        )
    with (
        atomic.scratch_folder(tmp_path / "Q4_1.gguf"),
        pytest.raises(ForgeError, match="another process is writing it"),
    ):
        make("Q4_1.gguf")


def test_the_padding_of_a_part_does_not_get_into_the_whole(built: Path, tmp_path: Path) -> None:
    """And one that the source has of its own stays as it is."""
    source, own = source_of(built), {reader.PADDING: Value.of("   ", GGUFValueType.STRING)}
    for number, metadata in enumerate((source.metadata, {**source.metadata, **own})):
        folder = tmp_path / str(number)
        folder.mkdir()
        writer.write(folder / "in.gguf", metadata, reader.contents(source))
        opened = reader.read(folder / "in.gguf")
        types: Types = choose(opened, "Q4_0", bin_dir=BIN)
        job = Work(
            plan.make(opened, reader.digests(opened.path), types, "Q4_0", None, BIN),
            opened,
            None,
            1,
            BIN,
        )
        job.whole(folder / "plain.gguf")
        job.piece(folder / "manifests/pieces", 1, 2)
        job.whole(folder / "out.gguf", folder)
        assert (folder / "out.gguf").read_bytes() == (folder / "plain.gguf").read_bytes()


def test_by_hand(built: Path, run: Run, tmp_path: Path) -> None:
    source, results = source_of(built).path, tmp_path / "results"
    said = []
    for kind in ("Q4_K_S", "Q4_K_M"):
        plan_file, out = tmp_path / f"{kind}.plan", results / f"{kind}.gguf"
        assert run("quantize_plan.py", source, "--type", kind, "--out", plan_file).returncode == 0
        options = (
            "--plan",
            plan_file,
            "--reuse",
            results,
            "--threads",
            1,
            "--digests",
            tmp_path / f"{kind}.json",
        )
        keep = (
            "--manifest",
            results / f"manifests/{kind}.json",
            "--keep",
            results / f"manifests/{kind}.gguf",
        )
        done = run("quantize.py", source, *options, *keep, "--out", out)
        assert done.returncode == 0, done.stderr
        assert json.loads((tmp_path / f"{kind}.json").read_text()) == reader.digests(out)
        assert (results / f"manifests/{kind}.gguf").samefile(out)
        out.unlink()
        said.append(done.stderr)
    assert (
        "reused 0 bytes" in said[0]
        and "manifests/Q4_K_S.gguf; quantized " in said[1]
        and "reused 0" not in said[1]
    )
    assert (
        run("quantize.py", source, "--type", "Q4_K_M", "--out", tmp_path / "m.gguf").returncode == 0
    )
    assert (tmp_path / "m.gguf").read_bytes() == (results / "manifests/Q4_K_M.gguf").read_bytes()


@pytest.mark.parametrize(
    "wrong",
    [
        "--plan p.json --head Q8_0",
        "--plan p.json --piece 3/2",
        "--plan p.json --piece 0/2",
        "--plan p.json --type Q4_0",
        "",
    ]
    + [
        f"--plan p.json --piece 1/2 {option}"
        for option in ("--manifest m.json", "--keep k.gguf", "--also a.gguf")
    ]
    + ["--plan p.json --piece 1/2"]
    + [
        f"--type Q4_0 {option}"
        for option in (
            "--piece 1/2",
            "--reuse r",
            "--manifest m.json",
            "--keep k.gguf",
            "--also a.gguf",
        )
    ],
)
def test_what_does_not_go_together_is_refused(
    built: Path, run: Run, tmp_path: Path, wrong: str
) -> None:
    assert (
        run(
            "quantize.py", source_of(built).path, *wrong.split(), "--out", tmp_path / "no.gguf"
        ).returncode
        == 2
    )


def test_killed_at_any_time_nothing_looks_finished(built: Path, made: Plan, tmp_path: Path) -> None:
    """And the next run clears away what was left."""
    made.write(tmp_path / "plan.json")
    out = tmp_path / "manifests"
    command = [
        "python",
        "workflow/scripts/quantize.py",
        str(source_of(built).path),
        "--plan",
        str(tmp_path / "plan.json"),
    ]
    command += ["--piece", "1/2", "--out", str(out)]

    def is_there(sign: str) -> bool:
        """Of what llama-quantize makes, when it has begun to write."""
        try:
            return any(path.is_dir() or path.stat().st_size for path in out.glob(sign))
        except OSError:
            return False

    for sign in (".1-of-2.scratch", ".1-of-2.scratch/part.gguf", ".*.gguf.part"):
        for _ in range(50):  # it can be too quick for us
            shutil.rmtree(out, ignore_errors=True)
            with subprocess.Popen(command, cwd=built, stderr=subprocess.DEVNULL) as process:
                while not is_there(sign) and process.poll() is None:
                    time.sleep(0.001)
                process.kill()
            if not list(out.glob("[!.]*")):
                break
        assert not list(out.glob("[!.]*")) and is_there(sign), sign
    (left,) = out.glob(".*.gguf.part")
    left.write_bytes(b"left behind")
    (out / ".1-of-2.scratch").mkdir(exist_ok=True)
    (out / ".1-of-2.scratch/part.gguf").write_bytes(b"left behind")
    assert subprocess.run(command, cwd=built, capture_output=True).returncode == 0
    (finished,) = out.glob("*.gguf")
    assert reader.read(finished).tensors.keys() == set(cut(made, source_of(built), 2)[0])
    assert sorted(path.name for path in out.iterdir()) == [finished.name, f"{finished.stem}.json"]


def test_padding_of_a_reused_file_is_not_taken(built: Path, made: Plan, tmp_path: Path) -> None:
    """No digest knows it, and it would be handed on from file to file."""
    out = finished(built, made, tmp_path / "a")
    whole, opened = out.read_bytes(), reader.read(out)
    piece = next(piece for piece in opened.ranges.values() if piece.size % reader.ALIGNMENT)
    with out.open("r+b") as file:
        file.seek(piece.offset + piece.size)
        file.write(b"\xff")
    said = list[str]()
    work(built, made, said).whole(tmp_path / "b.gguf", tmp_path)
    assert f"({len(made.tensors)} of {len(made.tensors)} tensors)" in said[0]
    assert (tmp_path / "b.gguf").read_bytes() == whole


def test_manifests_are_found_behind_links_and_where_folders_go_meanwhile(
    built: Path, made: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finished(built, made, tmp_path / "a")
    (tmp_path / "results").mkdir()
    (tmp_path / "results/model").symlink_to(tmp_path / "a")
    going, listed = tmp_path / "results/going", os.scandir
    going.mkdir()

    def scandir(path: Any) -> Any:
        if str(path).endswith("going"):
            raise FileNotFoundError(errno.ENOENT, "gone", str(path))
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(FileNotFoundError):
        os.scandir(going)
    (tmp_path / "scratch").mkdir()
    assert (
        work(built, made).find(tmp_path / "results", tmp_path / "scratch").keys()
        == made.tensors.keys()
    )
