"""The table that comes before a quantization: read strictly from llama-quantize, grouped to be read, and what will be written."""

from dataclasses import replace
from pathlib import Path

import pytest
from conftest import MODELS
from gguf.constants import GGMLQuantizationType as Kind
from mtpforge.errors import ConfigError, ToolchainError
from mtpforge.gguf import quant_types, reader, writer
from mtpforge.gguf.reader import Gguf, TensorInfo
from mtpforge.quantize import imatrix, mixture
from mtpforge.quantize.llama_quantize import quantize

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
    """The source's types but for tensors whose name has a keyword in it."""
    kinds = {name: info.type for name, info in gguf.tensors.items()}
    return {
        n: next((Kind[c] for key, c in chosen.items() if key in n), kind)
        for n, kind in kinds.items()
    }


def said(gguf: Gguf) -> list[str]:
    """The lines of a dry run that makes every BF16 tensor Q4_K, in another order than the file's."""
    lines = ["llama_model_loader: - type bf16:   6 tensors"]
    for i, (name, info) in enumerate(sorted(gguf.tensors.items())):
        line = f"[{i + 1:4d}/{len(SHAPES):4d}] {name:36s} - [   256,      1,      1,      1], type = {info.type.name.lower():>6s}, "
        lines.append(
            line
            + (
                "size =    0.001 MiB"
                if "norm" in name
                else "size =     0.62 MiB ->     0.21 MiB (q4_K)"
            )
        )
    return [*lines, "llama_model_quantize_impl: quant size  =     0.94 MiB (2.85 BPW)"]


def test_a_dry_run_is_read_in_its_order_which_is_that_of_the_file_to_be() -> None:
    gguf = source()
    expected = sorted(types(gguf, embd="Q4_K", ffn="Q4_K").items())
    assert list(mixture.parse("\n".join(said(gguf)), gguf).items()) == expected


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("(q4_K)", "(q4_X)"),  # an unknown type
        ("type =   bf16", "type =    f16"),  # not what the source has
        ("token_embd.weight ", "token_embed.weight"),
        ("blk.1.ffn_down.weight", "blk.0.ffn_down.weight"),  # twice
        (" MiB ->", " GiB ->"),
        ("[   7/   7] token_embd.weight", "token_embd.weight"),  # not said
    ],
)
def test_a_line_that_is_not_understood_is_an_error(old: str, new: str) -> None:
    output = "\n".join(said(source()))
    assert old in output
    with pytest.raises(ToolchainError, match="of another version"):
        mixture.parse(output.replace(old, new, 1), source())


def test_blocks_of_one_kind_share_a_row() -> None:
    gguf = source()
    chosen = types(gguf, **{"blk.3.ffn": "Q6_K", "embd": "Q8_0", "ffn": "IQ3_S"})
    assert mixture.show(gguf, types(gguf, embd="Q6_K", ffn="IQ3_S"), chosen) == (
        "| tensor                      | default | chosen |    size |\n"
        "| --------------------------- | ------: | -----: | ------: |\n"
        "| token_embd.weight           |    Q6_K |   Q8_0 | 0.35 MB |\n"
        "| blk.{0-2,4}.ffn_down.weight |   IQ3_S |  IQ3_S | 1.80 MB |\n"
        "| blk.3.ffn_down.weight       |   IQ3_S |   Q6_K | 0.86 MB |\n"
        "| 1 others, as they are       |         |        | 0.00 MB |\n"
        "| all, in bits per weight     |    3.62 |   4.32 | 3.01 MB |\n"
    )


FULL = {f"blk.{i}.ffn_down.weight": 8 * 256 for i in range(5)}


@pytest.mark.parametrize(
    ("rows", "chosen", "message"),
    [
        (FULL, {"ffn": "IQ2_XS", "embd": "Q4_K"}, None),
        ({}, {"ffn": "IQ3_S", "embd": "IQ2_S"}, None),
        (
            {"token_embd.weight": 7, **FULL},
            {"ffn": "Q4_K", "embd": "Q4_K"},
            None,
        ),  # llama-quantize ignores it
        (
            {},
            {"ffn": "IQ3_XXS"},
            r"none for blk\.0\.ffn_down\.weight \(IQ3_XXS\), .*blk\.2\.ffn_down\.weight \(IQ3_XXS\) and 2 more",
        ),
        (
            {},
            {"blk.4.ffn": "Q2_K"},
            r"in\.gguf as Q2_K_S needs an importance matrix, and .* none for blk\.4\.ffn_down\.weight \(Q2_K\):",
        ),
        (FULL, {"embd": "IQ2_XS"}, r"i\.dat has none for token_embd\.weight \(IQ2_XS\):"),
        ({**FULL, "token_embd.weight": 7}, {"embd": "IQ2_XS"}, r"has none for token_embd\.weight"),
        (
            {**FULL, "blk.1.ffn_down.weight": 256},
            {"ffn": "Q4_K"},
            r"of another model: .* blk\.1\.ffn_down\.weight",
        ),
        (
            {"blk.0.ffn_dwn.weight": 256},
            {"ffn": "Q4_K"},
            r"of another model: .* blk\.0\.ffn_dwn\.weight",
        ),
    ],
)
def test_what_an_importance_matrix_must_cover(
    rows: dict[str, int], chosen: dict[str, str], message: str | None
) -> None:
    gguf, path = source(), Path("i.dat") if rows else None
    if message is None:
        mixture.check_imatrix(gguf, types(gguf, **chosen), "Q2_K_S", path, rows)
    else:
        with pytest.raises(ConfigError, match=message):
            mixture.check_imatrix(gguf, types(gguf, **chosen), "Q2_K_S", path, rows)


@pytest.mark.parametrize("model", MODELS)
def test_the_file_types_that_need_an_importance_matrix_are_known_beforehand(
    built: Path, model: str
) -> None:
    """Before a checkpoint is there, by the type's name alone; after, by every tensor's."""
    needing = []
    for file_type in quant_types.FILE_TYPES:
        try:
            quantize(built / f"results/{model}/work/convert/all.gguf", None, file_type)
        except ConfigError:
            needing.append(file_type)
    assert needing == [
        file_type for file_type in quant_types.FILE_TYPES if file_type in quant_types.NEED_IMATRIX
    ]


RECIPES = {
    "Q4_K_M": (), "IQ4_XS": (), "Q2_K": (("token_embd", "Q3_K"),), "TQ1_0": (), "F16": (), "Q8_0": (("ffn_(up|gate)", "F16"),),
    "IQ3_S": (("attn_", "Q5_0"), ("ffn", "IQ4_NL")), "IQ2_XS": (),
}  # fmt: skip


@pytest.fixture(scope="module")
def matrices(built: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = {model: tmp_path_factory.mktemp(model) / "imatrix.gguf" for model in MODELS}
    for model, path in out.items():
        imatrix.compute(
            built / f"results/{model}/work/convert/all.gguf",
            built / "tests/checkpoints/corpus.py",
            path,
        )
    return out


@pytest.mark.parametrize("file_type", RECIPES)
@pytest.mark.parametrize("model", MODELS)
def test_what_the_table_says_is_what_is_written(
    built: Path,
    matrices: dict[str, Path],
    model: str,
    file_type: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    matrix = matrices[model] if file_type in quant_types.NEED_IMATRIX else None
    path, log = built / f"results/{model}/work/convert/all.gguf", tmp_path / "log"
    quantize(path, tmp_path / "out.gguf", file_type, (), RECIPES[file_type], matrix, log=log)
    table = capsys.readouterr().out.strip()
    written, original = reader.read(tmp_path / "out.gguf"), reader.read(path)
    # The same table, made of the file that was written; the default types are the table's own.
    rows = [
        tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in table.splitlines()[2:-2]
    ]
    told = {name: chosen for pattern, _, chosen, _ in rows for name in expanded(pattern)}
    assert {name: info.type.name for name, info in written.tensors.items()} == {
        name: told.get(name, info.type.name) for name, info in original.tensors.items()
    }
    size = sum(info.size for info in written.tensors.values())
    assert f"| {size / 1e6:.2f} MB |" in table.splitlines()[-1]
    assert log.read_text().startswith(table) and "quant size" in log.read_text()


def expanded(pattern: str) -> list[str]:
    """The names that a row of the table stands for."""
    if "{" not in pattern:
        return [pattern]
    start, rest = pattern.split("{")
    blocks, end = rest.split("}")
    runs = [[int(number) for number in run.split("-")] for run in blocks.split(",")]
    return [f"{start}{block}{end}" for run in runs for block in range(run[0], run[-1] + 1)]


def test_a_row_that_does_not_fit_a_type_falls_back_in_the_table_too(
    built: Path, tmp_path: Path
) -> None:
    opened = reader.read(built / "results/tiny-qwen3.5/work/convert/all.gguf")
    odd = {"blk.0.ffn_down.weight": (256, 96), "blk.1.ffn_down.weight": (256, 40)}
    infos = [
        replace(info, shape=odd.get(name, info.shape)) for name, info in opened.tensors.items()
    ]
    writer.write(
        tmp_path / "odd.gguf",
        opened.metadata,
        [(i, [replace(opened.ranges[i.name], size=i.size)]) for i in infos],
    )
    quantize(tmp_path / "odd.gguf", tmp_path / "out.gguf", "IQ4_XS")  # which compares them too
    written = reader.read(tmp_path / "out.gguf").tensors
    assert [written[name].type.name for name in odd] == ["IQ4_NL", "F16"]
