"""Verdicts on types that were found, from files that are really made and measured.

The planted loss: with sensitivities from a table, the dense checkpoint at the size of Q4_K_M is no
better than llama.cpp's own mixture, and nothing may say that it is.
"""

import json
import re
from pathlib import Path

import pytest
import yaml
from conftest import CHECKPOINTS, Run
from example_records import STAMP, measurement, report
from mtpforge.convert import native
from mtpforge.gguf import reader
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.measure import perplexity
from mtpforge.publish import card
from mtpforge.publish.card_config import About
from mtpforge.publish.result import Result
from mtpforge.report.summary import summary
from mtpforge.rules.variant import CANDIDATES
from mtpforge.search.compared import Compared
from mtpforge.search.errors import measure_errors

MODEL = "tiny-qwen3.5"
NAME = "tiny-qwen3.5-auto.gguf"
TYPES = ("--type", "Q4_K_M", "--head", "Q8_0", "--threads", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, toolchain: Path, run: Run) -> Path:
    """A model's folder with BF16.gguf, the file that was found, and its comparison."""
    made = tmp_path_factory.mktemp("verdict") / MODEL
    (made / "work/compared").mkdir(parents=True)
    source, llama = made / "BF16.gguf", LlamaCpp(toolchain, threads=1)
    native.convert(CHECKPOINTS / MODEL, source, "all", "qwen35")
    errors = [made / f"{kind}.json" for kind in CANDIDATES]
    for kind, path in zip(CANDIDATES, errors, strict=True):
        measure_errors(reader.read(source), kind, None, llama).write(path)
    perplexity.reference_logits(
        source, CHECKPOINTS / "held-out.txt", made / "logits", chunks=16, llama=llama
    )
    about, recipe = made / "about.json", made / "found.yaml"
    ran(run, "allocate.py", source, *TYPES, "--size", "Q4_K_M", "--errors", *errors, "--about",
        about, "--out", recipe)  # fmt: skip
    ran(run, "quantize.py", source, *TYPES, "--tensors", recipe, "--out", made / NAME)
    _, moved = perplexity.against_reference(made / NAME, made / "logits", llama)
    (made / "measure").mkdir()
    measured = made / "measure/tiny-qwen3.5-auto.json"
    measurement(NAME, bytes=(made / NAME).stat().st_size, kl_divergence=moved).write(measured)
    ran(run, "compare_stock.py", source, "--file", NAME, "--about", about, "--measurement",
        measured, "--reference-logits", made / "logits", *TYPES[2:], "--out",
        made / "work/compared/auto.json")  # fmt: skip
    return made


def ran(run: Run, program: str, *arguments: object) -> None:
    done = run(program, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_loss_is_said(folder: Path) -> None:
    compared = Compared.read(folder / "work/compared/auto.json")
    assert compared.sensitivity == "prior" and compared.kl_divergence and compared.stock
    assert compared.kl_divergence.mean > 0.99 * compared.stock.kl_divergence.mean
    assert 0.99 * compared.stock.bytes <= compared.bytes <= compared.stock.bytes
    assert compared.bytes == (folder / NAME).stat().st_size
    assert compared.verdict.startswith("no better than Q4_K_M: take that (0.00")


def test_nothing_calls_a_loss_better(folder: Path) -> None:
    compared = Compared.read(folder / "work/compared/auto.json")
    (folder / "reports").mkdir()
    made = report(NAME, bytes=compared.bytes)
    made.write(folder / "reports/tiny-qwen3.5-auto.json")
    table = summary(
        (folder / "reports").iterdir(),
        (folder / "measure").iterdir(),
        (folder / "work/compared").iterdir(),
    )
    about = {"name": MODEL, "source": {"path": MODEL}, "variants": {"auto": {"size": "Q4_K_M"}}}
    text = card.make(
        About.parse(json.dumps(about)),
        [Result(made, None, reader.read(folder / NAME))],
        checkpoint_card=folder / "none",
        stamp=STAMP,
        template=card_template(),
        compared=[compared],
    )
    # The mixture was made only to compare, so readers of the card cannot take it.
    verdicts = {table: compared.verdict, text: compared.verdict.replace(": take that", "")}
    for page, verdict in verdicts.items():
        assert verdict in page.replace("\\", "")
        assert not re.search(r"(?<!no )\bbetter\b|-\d+% KL divergence", page)


def card_template() -> Path:
    return Path(card.__file__).parents[3] / "templates/card.md"


def test_a_found_recipe_can_be_pasted_and_gives_the_same_bytes(folder: Path, run: Run) -> None:
    """As `tensors:` of a variant without a `size`."""
    recipe = yaml.safe_load((folder / "found.yaml").read_text())
    pasted = folder / "pasted.yaml"
    pasted.write_text(yaml.safe_dump(recipe))
    ran(run, "quantize.py", folder / "BF16.gguf", *TYPES, "--tensors", pasted, "--out",
        folder / "pasted.gguf")  # fmt: skip
    assert (folder / "pasted.gguf").read_bytes() == (folder / NAME).read_bytes()
