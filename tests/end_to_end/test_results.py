"""`make` builds twelve files that match config.yaml, load in llama.cpp and draft."""

import json
import re
from pathlib import Path

import pytest
from conftest import CHECKPOINTS, MODELS
from mtpforge.gguf import head, reader
from mtpforge.gguf.reader import Gguf
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.llama_cpp.server import serve
from mtpforge.quantize.recipe import by_recipe, read_recipe
from mtpforge.search.compared import Compared
from tokenizers import Tokenizer

VARIANTS = ("BF16", "Q8_0", "Q4_K_M", "IQ4_XS", "Q4_K_M-auto", "Q4_K_M-injected")
HEADS = {
    "BF16": "BF16",
    "Q8_0": "BF16",
    "Q4_K_M": "Q8_0",
    "IQ4_XS": "Q8_0",
    "Q4_K_M-auto": "Q8_0",
    "Q4_K_M-injected": "Q8_0",
}


def result(built: Path, model: str, variant: str) -> Path:
    return built / "results" / model / f"{model}-{variant}.gguf"


def content(opened: Gguf, name: str) -> bytes:
    piece = opened.ranges[name]
    with piece.path.open("rb") as file:
        file.seek(piece.offset)
        return file.read(piece.size)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", MODELS)
def test_each_file_has_its_head_and_its_report(built: Path, model: str, variant: str) -> None:
    path = result(built, model, variant)
    opened = reader.read(path)
    report = json.loads(
        (built / "results" / model / "reports" / f"{model}-{variant}.json").read_text()
    )
    assert all(check["passed"] for check in report["checks"]) and report["drafts"] > 0
    assert report["file"] == path.name and report["bytes"] == path.stat().st_size
    assert head.types_of(opened.head) == {HEADS[variant]} == {report["head"]}
    assert report["acceptance"] >= 0.6


def test_the_summary_has_a_line_for_each_file(built: Path) -> None:
    summary = (built / "results" / "summary.md").read_text()
    table = summary.partition("\n\n")[0].splitlines()
    assert [line.split()[1] for line in table[2:]] == [
        f"{model}-{variant}.gguf" for model in MODELS for variant in VARIANTS
    ]
    for column in ("file", "size", "bits/weight", "head", "acceptance", "tokens/s", "n_max"):
        assert column in table[0]
    for model in MODELS:
        assert f"Distance from BF16: {model}, on at most" in summary


@pytest.mark.parametrize("model", MODELS)
def test_a_variant_with_a_size_has_the_types_that_were_found(built: Path, model: str) -> None:
    path = result(built, model, "Q4_K_M-auto")
    work = built / "results" / model / "work"
    tensors = reader.read(path).tensors
    recipe = by_recipe(tensors, read_recipe(work / "found/Q4_K_M-auto.yaml"))
    assert len(recipe) > 10
    assert recipe.items() <= {name: info.type.name for name, info in tensors.items()}.items()
    compared = Compared.read(work / "compared/Q4_K_M-auto.json")
    stock = result(built, model, "Q4_K_M").stat().st_size
    assert compared.stock and compared.stock.bytes == stock
    assert 0.99 * stock <= compared.bytes == path.stat().st_size <= stock


@pytest.mark.parametrize("model", MODELS)
def test_a_found_recipe_is_better_than_stock_and_that_is_said(built: Path, model: str) -> None:
    results = built / "results" / model
    compared = Compared.read(results / "work/compared/Q4_K_M-auto.json")
    assert re.match(r"-\d+% KL divergence at the size of Q4_K_M \(0", compared.verdict)
    line = f"- {model}-Q4_K_M-auto.gguf: {compared.verdict}"
    assert line in (built / "results/summary.md").read_text().splitlines()
    assert compared.verdict in (results / "README.md").read_text().replace("\\", "")


@pytest.mark.parametrize("model", MODELS)
def test_llama_cpp_accepts_the_same_drafts_as_the_torch_reference(
    built: Path, toolchain: Path, tmp_path: Path, model: str
) -> None:
    reference = json.loads((CHECKPOINTS / model / "reference.json").read_text())
    options = [
        "--ctx-size",
        "4096",
        "--spec-type",
        "draft-mtp",
        "--spec-draft-n-max",
        "1",
    ]
    llama = LlamaCpp(toolchain, threads=1)
    with serve(llama, result(built, model, "BF16"), tmp_path / "log", options) as running:
        for kind, expected in reference["prompts"].items():
            assert running.tokenize(expected["prompt"]) == expected["prompt_tokens"], kind
            answer = running.completion(expected["prompt"], reference["n_predict"])
            assert expected["accepted"] / expected["drafts"] >= 0.7, kind
            # Within 1% of the tokens: BF16 can decide near ties differently.
            difference = abs(answer.accepted - expected["accepted"])
            assert difference <= expected["drafts"] / 100, (
                kind,
                answer.accepted,
                answer.drafts,
                expected["accepted"],
            )


MIXED_TEXT = """# Notes / Notizen (2026-11-21)
The quick brown fox's 12 lazy dogs can't jump; they'll "rest" -- won't they?   Tabs\there,  \
double  spaces  there.
def area(width: float, height: float = 3.5e-2) -> float:\n    return width * height  # m²
{"id": 10423, "tags": ["a_b", "C++", "x-y"], "ok": true, "nil": null, \
"url": "https://example.org/?q=1&r=%20#frag"}
Grüße aus Köln, à bientôt, ¿qué tal?, Привет, мир! Γειά σου. \
你好，世界。こんにちは世界 안녕하세요 हिन्दी ภาษาไทย עברית العربية
Emoji: 😀 👩‍👩‍👧 🇫🇷 ✅; maths: ∑ ∫ √2 ≈ 1.41421; arrows → ⇒; currency € £ ¥; quotes “ ” ‘ ’ « ».
<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nHi.<|im_end|>\n
\r\nWindows line\r\n\r\n\r\n   trailing   \n\n\n\n1234567890 3.14159 1,000,000 v2.0.1-rc3 0xFF\n"""


@pytest.mark.parametrize("model", MODELS)
def test_llama_cpp_tokenizes_like_the_tokenizers_package(
    built: Path, toolchain: Path, tmp_path: Path, model: str
) -> None:
    expected = (
        Tokenizer.from_file(str(CHECKPOINTS / model / "tokenizer.json")).encode(MIXED_TEXT).ids
    )
    llama = LlamaCpp(toolchain, threads=1)
    with serve(llama, result(built, model, "Q8_0"), tmp_path / "log") as running:
        assert running.tokenize(MIXED_TEXT) == expected


@pytest.mark.parametrize("model", MODELS)
def test_injecting_equals_quantizing_the_whole(
    built: Path, run, tmp_path: Path, model: str
) -> None:
    """A BF16 head in a headless Q8_0 trunk equals the whole at Q8_0 with a BF16 head."""
    work = built / "results" / model / "work" / "convert"
    base, out = tmp_path / "trunk-Q8_0.gguf", tmp_path / "injected.gguf"
    for done in (
        run("quantize.py", work / "trunk.gguf", "--type", "Q8_0", "--out", base),
        run("inject.py", base, "--head", work / "head.gguf", "--out", out),
    ):
        assert done.returncode == 0, done.stderr
    injected, whole = reader.read(out), reader.read(result(built, model, "Q8_0"))
    assert set(injected.tensors.values()) == set(whole.tensors.values())
    assert all(content(injected, name) == content(whole, name) for name in whole.tensors)
