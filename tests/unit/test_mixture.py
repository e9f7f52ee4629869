"""The table of types: dry runs are parsed strictly, and the file has the types that are shown."""

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import BIN, MODELS
from gguf.constants import GGMLQuantizationType as Kind
from mtpforge.errors import ConfigError, ToolchainError
from mtpforge.gguf import quant_types, reader, writer
from mtpforge.gguf.reader import Gguf, TensorInfo
from mtpforge.io.ranges import Payload
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.quantize import imatrix, mixture
from mtpforge.quantize.llama_quantize import choose_types, quantize
from mtpforge.quantize.recipe import Recipe
from mtpforge.quantize.request import QuantizeRequest

LLAMA = LlamaCpp(BIN)

SHAPES = {
    "token_embd.weight": (1280, 256),
    **{f"blk.{i}.ffn_down.weight": (8, 512, 256) for i in range(5)},
    "blk.0.attn_norm.weight": (256,),
}


def source(**types: str) -> Gguf:
    infos = {
        n: TensorInfo(n, shape, Kind.F32 if "norm" in n else Kind.BF16)
        for n, shape in SHAPES.items()
    }
    return Gguf(Path("in.gguf"), {}, infos, {})


def types(gguf: Gguf, **chosen: str) -> dict[str, Kind]:
    """The source's types, except for tensors whose name contains a keyword."""

    def kind(info: TensorInfo) -> Kind:
        return next((Kind[chosen[key]] for key in chosen if key in info.name), info.type)

    return {name: kind(info) for name, info in gguf.tensors.items()}


def dry_run_output(gguf: Gguf) -> str:
    """A dry run that makes every BF16 tensor Q4_K, in another order than the source's."""
    lines = ["llama_model_loader: - type bf16:   6 tensors"]
    for i, (name, info) in enumerate(sorted(gguf.tensors.items())):
        number = f"[{i + 1:4d}/{len(SHAPES):4d}]"
        old = info.type.name.lower()
        size = "    0.001 MiB" if "norm" in name else "    0.62 MiB ->     0.21 MiB (q4_K)"
        shape = "[   256,      1,      1,      1]"
        lines.append(f"{number} {name:36s} - {shape}, type = {old:>6s}, size ={size}")
    total = "llama_model_quantize_impl: quant size  =     0.94 MiB (2.85 BPW)"
    return "\n".join([*lines, total])


def test_types_come_in_the_order_of_the_dry_run() -> None:
    gguf = source()
    expected = sorted(types(gguf, embd="Q4_K", ffn="Q4_K").items())
    assert list(mixture.parse(dry_run_output(gguf), gguf).items()) == expected


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(q4_K)", "(q4_X)"),  # an unknown type
        ("type =   bf16", "type =    f16"),  # not what the source has
        ("token_embd.weight ", "token_embed.weight"),
        ("blk.1.ffn_down.weight", "blk.0.ffn_down.weight"),  # a duplicate
        (" MiB ->", " GiB ->"),
        ("[   7/   7] token_embd.weight", "token_embd.weight"),  # missing
    ],
)
def test_an_unexpected_line_is_an_error(old: str, new: str) -> None:
    output = dry_run_output(source())
    assert old in output
    with pytest.raises(ToolchainError, match="is it another version"):
        mixture.parse(output.replace(old, new, 1), source())


def test_equal_blocks_share_a_row() -> None:
    gguf = source()
    chosen = types(gguf, **{"blk.3.ffn": "Q6_K", "embd": "Q8_0", "ffn": "IQ3_S"})
    assert mixture.show(gguf, types(gguf, embd="Q6_K", ffn="IQ3_S"), chosen) == (
        "| tensor                      | default | chosen |    size |\n"
        "| --------------------------- | ------: | -----: | ------: |\n"
        "| token_embd.weight           |    Q6_K |   Q8_0 | 0.35 MB |\n"
        "| blk.{0-2,4}.ffn_down.weight |   IQ3_S |  IQ3_S | 1.80 MB |\n"
        "| blk.3.ffn_down.weight       |   IQ3_S |   Q6_K | 0.86 MB |\n"
        "| 1 others, unchanged         |         |        |  1.0 kB |\n"
        "| total, in bits per weight   |    3.62 |   4.32 | 3.01 MB |\n"
    )


FULL = {f"blk.{i}.ffn_down.weight": 8 * 256 for i in range(5)}


@pytest.mark.parametrize(
    ("rows", "chosen", "message"),
    [
        (FULL, {"ffn": "IQ2_XS", "embd": "Q4_K"}, None),
        ({}, {"ffn": "IQ3_S", "embd": "IQ2_S"}, None),
        # llama-quantize ignores rows of embeddings
        ({"token_embd.weight": 7, **FULL}, {"ffn": "Q4_K", "embd": "Q4_K"}, None),
        (
            {},
            {"ffn": "IQ3_XXS"},
            r"none for blk\.0\.ffn_down\.weight \(IQ3_XXS\), .*"
            r"blk\.2\.ffn_down\.weight \(IQ3_XXS\) and 2 more",
        ),
        (
            {},
            {"blk.4.ffn": "Q2_K"},
            r"in\.gguf as Q2_K_S needs an importance matrix, and .* none for "
            r"blk\.4\.ffn_down\.weight \(Q2_K\):",
        ),
        (FULL, {"embd": "IQ2_XS"}, r"i\.dat has no row for token_embd\.weight \(IQ2_XS\):"),
        (
            {**FULL, "token_embd.weight": 7},
            {"embd": "IQ2_XS"},
            r"has no row for token_embd\.weight",
        ),
        (
            {**FULL, "blk.1.ffn_down.weight": 256},
            {"ffn": "Q4_K"},
            r"importance matrix of another model: .* blk\.1\.ffn_down\.weight",
        ),
        (
            {"blk.0.ffn_dwn.weight": 256},
            {"ffn": "Q4_K"},
            r"importance matrix of another model: .* blk\.0\.ffn_dwn\.weight",
        ),
    ],
)
def test_the_importance_matrix_must_cover_types_that_need_it(
    rows: dict[str, int], chosen: dict[str, str], message: str | None
) -> None:
    gguf = source()
    request = QuantizeRequest("Q2_K_S", imatrix=Path("i.dat") if rows else None)
    if message is None:
        mixture.check_imatrix(gguf, types(gguf, **chosen), request, rows)
    else:
        with pytest.raises(ConfigError, match=message):
            mixture.check_imatrix(gguf, types(gguf, **chosen), request, rows)


@pytest.mark.parametrize("model", MODELS)
def test_the_table_of_file_types_that_need_an_importance_matrix_is_right(
    built: Path, model: str
) -> None:
    """The table is used before a checkpoint exists; afterwards every tensor is checked."""
    opened = reader.read(built / f"results/{model}/work/convert/all.gguf")
    needing = []
    for file_type in quant_types.FILE_TYPES:
        try:
            choose_types(opened, QuantizeRequest(file_type), LLAMA)
        except ConfigError:
            needing.append(file_type)
    assert needing == [kind for kind in quant_types.FILE_TYPES if kind in quant_types.NEED_IMATRIX]


RECIPES: dict[str, Recipe] = {
    "Q4_K_M": (),
    "IQ4_XS": (),
    "Q2_K": [("token_embd", "Q3_K")],
    "TQ1_0": (),
    "F16": (),
    "Q8_0": [("ffn_(up|gate)", "F16")],
    "IQ3_S": [("attn_", "Q5_0"), ("ffn", "IQ4_NL")],
    "IQ2_XS": (),
}


@pytest.fixture(scope="module")
def matrices(built: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = {model: tmp_path_factory.mktemp(model) / "imatrix.gguf" for model in MODELS}
    for model, path in out.items():
        source = built / f"results/{model}/work/convert/all.gguf"
        imatrix.compute(source, built / "tests/checkpoints/corpus.py", path, LLAMA)
    return out


@pytest.mark.parametrize("file_type", RECIPES)
@pytest.mark.parametrize("model", MODELS)
def test_the_file_has_the_types_of_the_table(
    built: Path,
    matrices: dict[str, Path],
    model: str,
    file_type: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = built / f"results/{model}/work/convert/all.gguf"
    request = QuantizeRequest(
        file_type,
        recipe=RECIPES[file_type],
        imatrix=matrices[model] if file_type in quant_types.NEED_IMATRIX else None,
    )
    log = tmp_path / "log"
    quantize(path, tmp_path / "out.gguf", request, LlamaCpp(BIN, log=log))
    table = capsys.readouterr().out.strip()
    written = reader.read(tmp_path / "out.gguf")
    original = reader.read(path)
    # The table's chosen types are compared with the file; its default types are not.
    rows = [
        tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in table.splitlines()[2:-2]
    ]
    shown = {name: chosen for pattern, _, chosen, _ in rows for name in expanded(pattern)}
    assert {name: info.type.name for name, info in written.tensors.items()} == {
        name: shown.get(name, info.type.name) for name, info in original.tensors.items()
    }
    size = sum(info.size for info in written.tensors.values())
    assert f"| {size / 1e6:.2f} MB |" in table.splitlines()[-1]
    assert log.read_text().startswith(table)
    assert "quant size" in log.read_text()


def expanded(pattern: str) -> list[str]:
    """The names of the tensors that share a row of the table."""
    if "{" not in pattern:
        return [pattern]
    start, rest = pattern.split("{")
    numbers, end = rest.split("}")
    blocks: list[int] = []
    for run in numbers.split(","):
        first, *last = map(int, run.split("-"))
        blocks += range(first, (last or [first])[0] + 1)
    return [f"{start}{block}{end}" for block in blocks]


def test_the_table_shows_fallback_types_for_rows_that_do_not_fit(
    built: Path, tmp_path: Path
) -> None:
    opened = reader.read(built / "results/tiny-qwen3.5/work/convert/all.gguf")
    odd = {"blk.0.ffn_down.weight": (256, 96), "blk.1.ffn_down.weight": (256, 40)}
    infos = [
        replace(info, shape=odd.get(name, info.shape)) for name, info in opened.tensors.items()
    ]
    tensors: list[tuple[TensorInfo, Payload]] = []
    for info in infos:
        tensors.append((info, [replace(opened.ranges[info.name], size=info.size)]))
    writer.write(tmp_path / "odd.gguf", opened.metadata, tensors)
    # Raises if the file has other types than the table.
    quantize(tmp_path / "odd.gguf", tmp_path / "out.gguf", QuantizeRequest("IQ4_XS"), LLAMA)
    written = reader.read(tmp_path / "out.gguf").tensors
    assert [written[name].type.name for name in odd] == ["IQ4_NL", "F16"]
