"""Plans and pieces: what decides a tensor's bytes, how work is cut, and that nothing wrong is taken from a file."""

import json
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import BIN, Run
from gguf.constants import GGMLQuantizationType as Kind
from mtpforge import gguf_file, imatrix, pieces, plan, quant_types
from mtpforge.errors import ConfigError, GgufError
from mtpforge.gguf_file import Gguf, TensorInfo, Value
from mtpforge.mixture import Types
from mtpforge.pieces import Work, cut, write_manifest
from mtpforge.plan import Plan
from mtpforge.quantize import choose


def source_of(built: Path) -> Gguf:
    return gguf_file.read(built / "results/tiny-qwen3.5/work/convert/all.gguf")


@pytest.fixture(scope="module")
def made(built: Path) -> Plan:
    source = source_of(built)
    return plan.make(source, gguf_file.digests(source.path), choose(source, "Q4_K_M", bin_dir=BIN), "Q4_K_M", None, BIN)


def work(built: Path, made: Plan, said: list[str] | None = None) -> Work:
    return Work(made, source_of(built), None, 1, BIN, say=(said if said is not None else []).append)


def finished(built: Path, made: Plan, folder: Path) -> Path:
    """A quantization, with its manifest, in a folder of its own."""
    out = folder / "out.gguf"
    folder.mkdir()
    write_manifest(folder / "manifests/out.json", made, work(built, made).whole(out), [out])
    return out


def test_a_plan_is_the_same_for_the_same_work_and_small_enough_to_be_compared(built: Path, made: Plan, tmp_path: Path) -> None:
    made.write(tmp_path / "plan.json")
    assert Plan.read(tmp_path / "plan.json") == made and list(Plan.read(tmp_path / "plan.json").tensors) == list(made.tensors)
    digests = json.loads((built / "results/tiny-qwen3.5/work/convert/all.json").read_text())
    again = plan.make(source_of(built), digests, made.types(), "Q4_K_M", None, BIN)
    again.write(tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "plan.json").read_bytes()
    many = {f"blk.{i}.a_name_as_long_as_they_are.weight": replace(t, row="0" * 128) for i, t in enumerate(made.tensors.values())}
    large = {f"{n}.{i}": tensor for i in range(16) for n, tensor in many.items()}
    replace(made, tensors=large).write(tmp_path / "large.json")
    assert len(large) >= 1118 and (tmp_path / "large.json").stat().st_size < 1e6


def test_a_key_changes_with_all_that_decides_the_bytes_and_nothing_else(made: Plan) -> None:
    name, other = list(made.tensors)[:2]
    for field in ("type", "form", "source", "row"):
        changed = replace(made, tensors={**made.tensors, name: replace(made.tensors[name], **{field: "Q8_0"})})
        assert changed.keys()[name] != made.keys()[name] and changed.keys()[other] == made.keys()[other]
    assert not set(replace(made, toolchain="another").keys().values()) & set(made.keys().values())
    assert replace(made, file_type="Q4_K_S", header="another").keys() == made.keys()


def test_a_row_of_an_importance_matrix_counts_for_its_tensor_alone(tmp_path: Path) -> None:
    def write(path: Path, first: float) -> dict[str, str]:
        metadata = {
            "imatrix.datasets": Value.of(["text"], gguf_file.GGUFValueType.ARRAY, gguf_file.GGUFValueType.STRING),
            "imatrix.chunk_count": Value.of(1, gguf_file.GGUFValueType.UINT32),
            "imatrix.chunk_size": Value.of(512, gguf_file.GGUFValueType.UINT32),
        }
        values = {"a.in_sum2": first, "a.counts": 1.0, "b.in_sum2": 1.0, "b.counts": 1.0}
        parts = [(TensorInfo(n, (1,), Kind.F32), [memoryview(bytes(Value.of(v, gguf_file.GGUFValueType.FLOAT32).raw))])
                 for n, v in values.items()]  # fmt: skip
        gguf_file.write(path, metadata, parts)
        return imatrix.digests(path)

    one, two = write(tmp_path / "one.gguf", 1.0), write(tmp_path / "two.gguf", 2.0)
    assert one["a"] != two["a"] and one["b"] == two["b"]


@pytest.mark.parametrize("text", ["{}", "[]", '{"tensors": 1}', '{"tensors": {"a": ["Q4_K"]}}', '{"tensors": {"a": []}, "b": 1}'])
def test_what_is_no_plan_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "plan.json").write_text(text)
    with pytest.raises(Exception, match=r"plan\.json: ") as error:
        Plan.read(tmp_path / "plan.json")
    assert type(error.value).__module__ == "mtpforge.errors"


def test_a_plan_for_another_source_or_matrix_is_refused(built: Path, made: Plan, tmp_path: Path) -> None:
    trunk = gguf_file.read(built / "results/tiny-qwen3.5/work/convert/trunk.gguf")
    with pytest.raises(GgufError, match="has other tensors or metadata than what the plan is for"):
        Work(made, trunk)
    (tmp_path / "my.dat").write_bytes(b"1")
    with pytest.raises(ConfigError, match=r"is for the importance matrix none, given is .*/my\.dat"):
        Work(made, source_of(built), tmp_path / "my.dat")
    another = replace(made, imatrix="my.dat", imatrix_sha256="0" * 64)
    with pytest.raises(ConfigError, match=r"is for the importance matrix my\.dat \(0{64}\), given is .*/my\.dat"):
        Work(another, source_of(built), tmp_path / "my.dat")


@pytest.mark.parametrize("count", [1, 2, 3, 7, 999])
def test_pieces_have_each_tensor_once_and_about_the_same_cost(built: Path, made: Plan, count: int) -> None:
    source = source_of(built)
    parts = cut(made, source, count)
    assert len(parts) == count and [name for part in parts for name in part] == list(source.tensors)
    costs = [sum(pieces.cost(made, source, name) for name in part) for part in parts]
    largest = max(pieces.cost(made, source, name) for name in source.tensors)
    assert max(costs) <= sum(costs) / count + largest
    assert parts == cut(made, source, count)


def test_every_type_has_a_cost() -> None:
    assert quant_types.SECONDS.keys() == set(quant_types.TENSOR_TYPES)
    assert {quant_types.usual(name) for name in quant_types.FILE_TYPES} <= quant_types.SECONDS.keys()


def test_what_a_finished_file_has_is_taken_also_where_it_was_moved(built: Path, made: Plan, tmp_path: Path) -> None:
    before, said = finished(built, made, tmp_path / "a"), list[str]()
    manifest = tmp_path / "a/manifests/out.json"
    write_manifest(manifest, made, gguf_file.digests(before), [before, tmp_path / "published.gguf"])
    before.rename(tmp_path / "published.gguf")
    work(built, made, said).whole(tmp_path / "b.gguf", tmp_path)
    assert (tmp_path / "b.gguf").read_bytes() == (tmp_path / "published.gguf").read_bytes()
    assert f"({len(made.tensors)} of {len(made.tensors)} tensors) from {tmp_path / 'published.gguf'}; quantized 0" in said[0]


def test_damaged_bytes_are_quantized_anew_with_a_warning(built: Path, made: Plan, tmp_path: Path) -> None:
    before, said = finished(built, made, tmp_path / "a"), list[str]()
    whole, place = before.read_bytes(), gguf_file.read(before).ranges["blk.1.ffn_down.weight"]
    with before.open("r+b") as file:
        file.seek(place.offset + place.size // 2)
        file.write(bytes([whole[place.offset + place.size // 2] ^ 1]))
    digests = work(built, made, said).whole(tmp_path / "b.gguf", tmp_path)
    assert (tmp_path / "b.gguf").read_bytes() == whole and digests == gguf_file.digests(tmp_path / "b.gguf")
    assert said[0].startswith("warning: blk.1.ffn_down.weight ") and said[1].endswith("; quantized 1")


@pytest.mark.parametrize("how", ["gone", "torn", "another", "manifest"])
def test_a_file_that_is_not_there_any_more_costs_only_the_time(built: Path, made: Plan, tmp_path: Path, how: str) -> None:
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
    out, norms = finished(built, made, tmp_path / "a"), [name for name, tensor in made.tensors.items() if tensor.type == "F32"]
    digests = {name: digest for name, digest in gguf_file.digests(out).items() if name in norms}
    write_manifest(tmp_path / "a/manifests/out.json", made, digests, [out])
    assert work(built, made).find(tmp_path).keys() == set(norms) != set(source.tensors)
    work(built, made, said).whole(tmp_path / "b.gguf", tmp_path)
    assert "reused 0 bytes" in said[0]


def test_the_padding_of_a_part_does_not_get_into_the_whole(built: Path, tmp_path: Path) -> None:
    """And one that the source has of its own stays as it is."""
    source, own = source_of(built), {gguf_file.PADDING: Value.of("   ", gguf_file.GGUFValueType.STRING)}
    for number, metadata in enumerate((source.metadata, {**source.metadata, **own})):
        folder = tmp_path / str(number)
        folder.mkdir()
        gguf_file.write(folder / "in.gguf", metadata, gguf_file.contents(source))
        opened = gguf_file.read(folder / "in.gguf")
        types: Types = choose(opened, "Q4_0", bin_dir=BIN)
        job = Work(plan.make(opened, gguf_file.digests(opened.path), types, "Q4_0", None, BIN), opened, None, 1, BIN)
        job.whole(folder / "plain.gguf")
        digests = job.piece(folder / "piece.gguf", 1, 2)
        write_manifest(folder / "manifests/piece.json", job.plan, digests, [folder / "piece.gguf"])
        job.whole(folder / "out.gguf", folder)
        assert (folder / "out.gguf").read_bytes() == (folder / "plain.gguf").read_bytes()


def test_by_hand(built: Path, run: Run, tmp_path: Path) -> None:
    source, results = source_of(built).path, tmp_path / "results"
    options = (source, "--reuse", results, "--threads", 1, "--type")
    first = run("quantize.py", *options, "Q4_K_S", "--manifest", results / "manifests/s.json", "--out", results / "s.gguf")
    assert first.returncode == 0 and "reused 0 bytes" in first.stderr, first.stderr
    second = run("quantize.py", *options, "Q4_K_M", "--digests", tmp_path / "m.json", "--out", tmp_path / "m.gguf")
    assert second.returncode == 0 and "from " in second.stderr and "reused 0" not in second.stderr, second.stderr
    assert (tmp_path / "m.gguf").read_bytes() == (built / "results/tiny-qwen3.5/work/quantized/Q4_K_M.gguf").read_bytes()
    assert json.loads((tmp_path / "m.json").read_text()) == gguf_file.digests(tmp_path / "m.gguf")
    for wrong in (["--piece", "1/2"], ["--plan", "p.json"], ["--plan", "p.json", "--piece", "3/2"]):
        asked = ["--type", "Q4_0", *wrong] if "--plan" not in wrong else wrong if "--piece" in wrong else ["--head", "Q8_0", *wrong]
        assert run("quantize.py", source, *asked, "--out", tmp_path / "no.gguf").returncode == 2


def test_killed_at_any_time_nothing_looks_finished(built: Path, made: Plan, tmp_path: Path) -> None:
    """And the next run clears away what was left."""
    made.write(tmp_path / "plan.json")
    out = tmp_path / "out.gguf"
    command = ["python", "workflow/scripts/quantize.py", str(source_of(built).path), "--plan", str(tmp_path / "plan.json")]
    command += ["--piece", "1/2", "--out", str(out)]
    for seconds in (0.15, 0.3, 0.4, 0.5, 0.6):
        with subprocess.Popen(command, cwd=built, stderr=subprocess.DEVNULL) as process:
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
        if out.exists():
            assert gguf_file.read(out).tensors.keys() == set(cut(made, source_of(built), 2)[0])
            out.unlink()
    assert subprocess.run(command, cwd=built, capture_output=True).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "plan.json"]
