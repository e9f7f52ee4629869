"""Importance matrices: both formats are parsed strictly, and a computation is reproducible."""

import struct
from collections.abc import Callable
from pathlib import Path

import imatrix as program
import pytest
from conftest import BIN, CHECKPOINTS, ROOT, Run
from gguf.constants import GGMLQuantizationType as Kind
from gguf.constants import GGUFValueType
from mtpforge.convert import native
from mtpforge.errors import ConfigError, GgufError
from mtpforge.gguf import reader, writer
from mtpforge.gguf.metadata import Value
from mtpforge.gguf.reader import TensorInfo
from mtpforge.llama_cpp import process
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.measure import perplexity
from mtpforge.quantize import imatrix
from mtpforge.rules import fields

TEXT = CHECKPOINTS / "corpus.py"
METADATA = {
    "imatrix.datasets": Value.of(["text"], GGUFValueType.ARRAY, GGUFValueType.STRING),
    "imatrix.chunk_count": Value.of(1, GGUFValueType.UINT32),
    "imatrix.chunk_size": Value.of(512, GGUFValueType.UINT32),
}


@pytest.mark.alone  # threads of llama.cpp that have no processor keep the others waiting
@pytest.mark.parametrize("model", ["tiny-qwen3.5", "tiny-qwen3.5-moe"])
def test_the_bytes_depend_on_neither_threads_nor_paths(
    built: Path, run: Run, tmp_path: Path, model: str
) -> None:
    source = built / f"results/{model}/work/convert/all.gguf"
    made: list[bytes] = []
    for threads, folder in ((1, "here"), (2, "a folder of another name"), (3, "there")):
        text = tmp_path / folder / "calibration.txt"
        out = tmp_path / folder / "out.gguf"
        text.parent.mkdir()
        text.write_bytes(TEXT.read_bytes())
        done = run("imatrix.py", source, "--text", text, "--threads", threads, "--out", out)
        assert done.returncode == 0, done.stderr
        made.append(out.read_bytes())
    assert made[0] == made[1] == made[2]
    opened = reader.read(out)
    tensors = reader.read(source).tensors
    assert opened.get("imatrix.datasets") == ["calibration.txt"]
    assert opened.get("imatrix.chunk_size") == imatrix.CHUNK
    rows = imatrix.read(out)
    experts = "blk.0.ffn_down_exps.weight"
    assert rows["blk.0.attn_qkv.weight"] == 256
    assert rows.get(experts, 0) == (6 * 256 if experts in tensors else 0)
    (head,) = reader.read(source).head_blocks
    assert rows[f"blk.{head}.nextn.eh_proj.weight"] == 512
    assert rows[f"blk.{head}.attn_q.weight"] == 256

    old = tmp_path / "old.dat"
    options = ["-m", source, "--in-file", out, "-o", old, "--output-format", "dat"]
    process.call([BIN / "llama-imatrix", *options])
    assert imatrix.read(old) == rows


def test_the_trunk_has_the_same_rows_with_and_without_the_head(
    toolchain: Path, tmp_path: Path
) -> None:
    found = {}
    for part in ("all", "trunk"):
        model = tmp_path / f"{part}.gguf"
        native.convert(CHECKPOINTS / "tiny-qwen3.5", model, part, "qwen35")
        imatrix.compute(model, TEXT, tmp_path / "matrix", LlamaCpp(toolchain, threads=1))
        found[part] = imatrix.digests(tmp_path / "matrix")
    trunk = {name: row for name, row in found["all"].items() if not name.startswith("blk.4.")}
    assert trunk == found["trunk"] and trunk != found["all"]


@pytest.mark.parametrize("known", [True, False])
def test_only_a_program_that_knows_the_option_is_asked_for_the_head(
    tmp_path: Path, known: bool
) -> None:
    native.convert(CHECKPOINTS / "tiny-qwen3.5", tmp_path / "model.gguf", "all", "qwen35")
    infos = [TensorInfo(f"a.weight.{end}", (1, 1), Kind.F32) for end in ("in_sum2", "counts")]
    write(tmp_path / "made.gguf", METADATA, *infos)
    program = tmp_path / "llama-imatrix"
    program.write_text(
        f"""#!/bin/sh
[ "$1" = --help ] && {{ echo "  {"--nextn  collect" if known else "--other"}"; exit 0; }}
echo "$@" > "{tmp_path}/asked"
while [ "$1" != -o ]; do shift; done
cat "{tmp_path}/made.gguf" > "$2"
"""
    )
    program.chmod(0o755)
    imatrix.compute(tmp_path / "model.gguf", TEXT, tmp_path / "out.gguf", LlamaCpp(tmp_path))
    assert ("--nextn" in (tmp_path / "asked").read_text()) is known


def test_the_embedded_text_is_the_default_of_the_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert program._text(fields.DEFAULT) == ROOT / fields.CALIBRATION
    assert program._text("mine.txt") == Path("mine.txt")


@pytest.mark.parametrize("text", ["", "\n", "too short\n" * 100])
def test_a_short_text_is_refused(
    built: Path, fails: Callable[..., str], tmp_path: Path, text: str
) -> None:
    (tmp_path / "text").write_text(text)
    source = built / "results/tiny-qwen3.5/work/convert/all.gguf"
    message = fails("imatrix.py", source, "--text", tmp_path / "text", out=tmp_path / "out.gguf")
    assert "too short for an importance matrix: needs at least 1,024 tokens" in message


@pytest.mark.parametrize("start", [b"GGUF\3\0\0\0", b"PK\3\4\0"])
@pytest.mark.parametrize("in_folder", [False, True])
def test_what_is_no_text_is_refused(tmp_path: Path, start: bytes, in_folder: bool) -> None:
    """llama.cpp would take its bytes for words, and measure or quantize by them without a word."""
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text("a word or two\n" * 1000)
    text = folder / "b.txt"
    text.write_bytes(start + bytes(10_000))
    given, none = folder if in_folder else text, LlamaCpp(tmp_path)
    kind = "a GGUF" if start.startswith(b"GGUF") else "a binary file"
    with pytest.raises(ConfigError, match=f"b.txt: is {kind}, not a text"):
        imatrix.compute(tmp_path / "model.gguf", given, tmp_path / "out.gguf", none)
    if not in_folder:
        with pytest.raises(ConfigError, match="not a text"):
            perplexity.reference_logits(tmp_path / "model.gguf", text, tmp_path / "out", 1, none)
        with pytest.raises(ConfigError, match="not a text"):
            perplexity.of_text(tmp_path / "model.gguf", text, 1, none)


def legacy(*entries: tuple[bytes, int], count: int | None = None, tail: bytes = b"") -> bytes:
    parts = [struct.pack("<i", len(entries) if count is None else count)]
    parts += [struct.pack(f"<i{len(n)}sii{v}f", len(n), n, 4, v, *([1.0] * v)) for n, v in entries]
    return b"".join(parts) + tail


@pytest.mark.parametrize(
    "tail", [b"", struct.pack("<ii", 4, 0), struct.pack("<ii4s", 4, 4, b"text")]
)
def test_the_legacy_format_is_read(tmp_path: Path, tail: bytes) -> None:
    (tmp_path / "i.dat").write_bytes(
        legacy((b"blk.0.attn_q.weight", 256), (b"output.weight", 3), tail=tail)
    )
    assert imatrix.read(tmp_path / "i.dat") == {"blk.0.attn_q.weight": 256, "output.weight": 3}


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x01",
        legacy(count=0),
        legacy(count=-1),
        legacy((b"a", 1), count=2),
        legacy((b"a", 1), count=2**31 - 1),
        legacy((b"a", 1), (b"a", 1)),
        legacy((b"a\0b", 1)),
        legacy((b"\xff\n", 1)),
        legacy((b"a" * 64, 1)),
        struct.pack("<iiI", 1, -1, 0) + b"\0" * 99,
        struct.pack("<ii1sii", 1, 1, b"a", 4, 2**31 - 1) + b"\0" * 99,
        struct.pack("<ii1sii", 1, 1, b"a", 4, -5) + b"\0" * 99,
        legacy((b"a", 1), tail=b"\0\0"),
        legacy((b"a", 1), tail=struct.pack("<ii", 4, 2**31 - 1)),
        legacy((b"a", 1), tail=struct.pack("<ii", 4, -1)),
    ],
)
def test_a_hostile_file_of_the_legacy_format_is_refused(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "i.dat").write_bytes(data)
    with pytest.raises(GgufError, match=r"i\.dat: "):
        imatrix.read(tmp_path / "i.dat")


def write(path: Path, metadata: dict[str, Value], *tensors: TensorInfo) -> Path:
    """Write an importance matrix whose sums and counts are 1."""
    contents = [(info, [memoryview(struct.pack("<f", 1) * (info.size // 4))]) for info in tensors]
    writer.write(path, metadata, contents)
    return path


def test_a_hostile_gguf_is_refused(tmp_path: Path) -> None:
    sums = TensorInfo("a.weight.in_sum2", (6, 256), Kind.F32)
    counts = TensorInfo("a.weight.counts", (6, 1), Kind.F32)
    assert imatrix.read(write(tmp_path / "good.gguf", METADATA, sums, counts)) == {"a.weight": 1536}
    odd = {**METADATA, "imatrix.chunk_size": Value.of(512, GGUFValueType.UINT64)}
    for name, tensors, metadata in [
        ("nothing", (), METADATA),
        ("no counts", (sums,), METADATA),
        ("no sums", (counts,), METADATA),
        ("five counts", (sums, TensorInfo(counts.name, (5, 1), Kind.F32)), METADATA),
        ("sums of another type", (TensorInfo(sums.name, (6, 256), Kind.F16), counts), METADATA),
        ("no metadata", (sums, counts), {}),
        ("metadata of another type", (sums, counts), odd),
    ]:
        with pytest.raises(GgufError, match=name):
            imatrix.read(write(tmp_path / f"{name}.gguf", metadata, *tensors))


def test_a_missing_or_foreign_matrix_stops_a_quantization(
    built: Path, fails: Callable[..., str], tmp_path: Path
) -> None:
    source = built / "results/tiny-qwen3.5/work/convert/all.gguf"
    matrix = tmp_path / "i.gguf"
    out = tmp_path / "out.gguf"
    write(
        matrix,
        METADATA,
        TensorInfo("blk.0.ffn_up.weight.in_sum2", (512,), Kind.F32),
        TensorInfo("blk.0.ffn_up.weight.counts", (1,), Kind.F32),
    )
    command = ("quantize.py", source, "--type", "IQ2_XS")
    message = fails(*command, "--imatrix", matrix, out=out)
    assert "all.gguf has no matching blk.0.ffn_up.weight" in message
    matrix.write_bytes(b"GGUF\3\0\0\0")
    assert "truncated" in fails(*command, "--imatrix", matrix, out=out)
    message = fails(*command, out=out)
    assert "needs an importance matrix, and there is none for blk.0." in message
    assert "more: give these tensors" in message


def test_a_dry_run_needs_no_output(built: Path, run: Run) -> None:
    source = built / "results/tiny-qwen3.5/work/convert/all.gguf"
    done = run("quantize.py", source, "--type", "Q4_K_M", "--dry-run")
    assert done.returncode == 0
    assert "| blk.{0-2}.ssm_out.weight" in done.stdout
    assert "bits per weight" in done.stdout
    assert run("quantize.py", source, "--type", "Q4_K_M").returncode == 2
