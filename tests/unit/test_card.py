"""Model cards: valid front matter, figures from reports, and commands for the right file."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import hostile_text
import pytest
import yaml
from conftest import ROOT
from example_records import DIVERGENCE, STAMP, TEXT, report, run, total
from example_records import measurement as example_measurement
from gguf.constants import GGUFValueType
from huggingface_hub import ModelCard
from mtpforge.checkpoint.families.registry import FAMILIES
from mtpforge.errors import ConfigError
from mtpforge.gguf.metadata import Value
from mtpforge.gguf.reader import Gguf
from mtpforge.llama_cpp import converter_architectures, runtimes
from mtpforge.measure import recommendation
from mtpforge.measure.measurement import KindSpeed, KlDivergence, Measurement
from mtpforge.publish import card, card_parts, choice, details
from mtpforge.publish.card_config import About
from mtpforge.publish.result import Result
from mtpforge.quantize.coverage import Coverage
from mtpforge.search.compared import Compared, Stock
from mtpforge.verify.report import Shard

TEMPLATE = ROOT / "workflow" / "templates" / "card.md"
DETAILS = TEMPLATE.with_name("details.md")
REVISION = "851bf6e806efd8d0a36b00ddf55e13ccb7b8cd0a"
ABOUT = {
    "name": "Qwen3.5-4B",
    "source": {"repo": "Qwen/Qwen3.5-4B", "revision": REVISION},
    "publish": {"repo": "Someone/Qwen3.5-4B-MTP-GGUF", "private": True},
    "variants": {"BF16": {}, "IQ4_XS": {"head": "Q8_0", "replace_head": False}},
}


def gguf(name: str, architecture: str = "qwen35", heads: int = 1) -> Gguf:
    def number(value: int) -> Value:
        return Value.of(value, GGUFValueType.UINT32)

    metadata = {
        "general.architecture": Value.of(architecture, GGUFValueType.STRING),
        f"{architecture}.block_count": number(33),
        f"{architecture}.nextn_predict_layers": number(heads),
    }
    return Gguf(Path(name), metadata, dict.fromkeys("ab"), {})  # type: ignore[arg-type]


def result(
    variant: str = "IQ4_XS", measured: Measurement | None = None, heads: int = 1, **values: Any
) -> Result:
    name = f"Qwen3.5-4B-{variant}.gguf"
    known = {
        "file": name,
        "bytes": 2_700_000_000,
        "bits_per_weight": 16.06 if variant == "BF16" else 4.61,
        "drafts": 400,
        "acceptance": 0.8125,
    }
    return Result(report(**{**known, **values}), measured, gguf(name, heads=heads))


def split_result(variant: str) -> Result:
    """A file in two shards."""
    name = f"Qwen3.5-4B-{variant}"
    shards = [Shard(f"{name}-0000{i}-of-00002.gguf", 1, "0" * 64) for i in (1, 2)]
    return result(variant, file=name, files=tuple(shards))


def beside(name: str, architecture: str = "qwen35") -> Result:
    """A sidecar or a vision tower."""
    return Result(report(name, bits_per_weight=8.5, head=""), None, gguf(name, architecture))


SIDECAR = beside("mtp-Qwen3.5-4B-Q8_0.gguf")


def measurement(
    recommended: int = 2,
    speeds: tuple[float, ...] = (207.0, 250.0, 290.0, 280.0),
    **values: Any,
) -> Measurement:
    """A sweep from 0 to 3. Acceptance is 90% for code and 40% for prose, 20% less when cold."""
    shares = [
        ("code", "warm", 90),
        ("code", "cold", 70),
        ("prose", "warm", 40),
        ("prose", "cold", 20),
    ]
    runs = [
        run(n_max, kind, state, accepted)
        for n_max in range(len(speeds))
        for kind, state, accepted in shares
    ]
    known = {
        "runs": tuple(runs),
        "by_n_max": tuple(total(n, speed, speeds[0]) for n, speed in enumerate(speeds)),
        "recommended_n_max": recommended,
        "verdict": "what measure.py found",
        "memory_bytes": 3_000_000_000,
        "perplexity": 8.1234,
        "kl_divergence": DIVERGENCE,
    }
    return example_measurement("Qwen3.5-4B-IQ4_XS.gguf", **{**known, **values})


def make(
    *results: Result,
    theirs: str = "",
    folder: Path | None = None,
    template: Path = TEMPLATE,
    **about: Any,
) -> str:
    path = (folder or Path("nowhere")) / "README.md"
    if theirs:
        path.write_text(theirs)
    model = About.parse(json.dumps({**ABOUT, **about}))
    return card.make(model, results or (result(),), path, STAMP, template)


def test_the_acceptance_of_bf16_is_said_if_the_table_does_not_have_it() -> None:
    quant = result(bf16_acceptance=0.94)
    assert "accepted in verification (BF16: 94%)" in make(quant)
    assert "drafts greedily with each head (BF16: 94%)." in second(quant)
    assert "(BF16:" not in make(quant, result("BF16"))
    assert "(BF16:" not in make(result())


def test_a_card_without_a_repository_says_what_sets_its_name() -> None:
    said = "`OWNER/NAME-MTP-GGUF` stands for the name of this repository, which `publish: {repo:"
    assert said in make(publish={})
    assert "stands for" not in make(publish={"repo": "Owner/Name"})


def second(*results: Result, template: Path = DETAILS, **about: Any) -> str:
    """The second page."""
    model = About.parse(json.dumps({**ABOUT, **about}))
    return details.make(model, results or (result(),), template)


def front(text: str) -> dict[str, Any]:
    return dict(yaml.safe_load(text.split("---\n")[1]))


def rows(text: str) -> list[list[str]]:
    """The cells of every table."""
    return [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in text.splitlines()
        if line.startswith("|")
    ]


def column(text: str, heading: str, after: str = "## ") -> list[str]:
    headings, _, *lines = rows(_first_table(text, after))
    return [line[headings.index(heading)] for line in lines]


def _first_table(text: str, after: str) -> str:
    lines = text[text.index(after) :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    return "\n".join(lines[start:end])


def served(text: str) -> list[str]:
    """The commands of the card."""
    blocks = text.split("## Run it")[1].split("## How")[0].split("```")[1::2]
    return [line for block in blocks for line in block.strip().splitlines()]


THEIRS = """---
license: other
license_name: qwen
license_link: LICENSE
library_name: transformers
pipeline_tag: image-text-to-text
language: en
tags: [vision, mtp]
base_model: Qwen/Qwen3.5-4B-Base
---
# Theirs
"""


# ── front matter ──


def test_front_matter_combines_ours_with_the_checkpoints(tmp_path: Path) -> None:
    text = make(theirs=THEIRS, folder=tmp_path)
    assert front(text) == {
        "base_model": ["Qwen/Qwen3.5-4B"],
        "base_model_relation": "quantized",
        "quantized_by": "Someone",
        "license": "other",
        "license_name": "qwen",
        "license_link": f"https://huggingface.co/Qwen/Qwen3.5-4B/blob/{REVISION}/LICENSE",
        "pipeline_tag": "image-text-to-text",
        "language": ["en"],
        "tags": ["vision", "mtp", "gguf", "speculative-decoding"],
    }
    assert ModelCard(text).data.base_model == ["Qwen/Qwen3.5-4B"]


def test_local_checkpoint_has_no_base_model(tmp_path: Path) -> None:
    text = make(theirs=THEIRS, folder=tmp_path, source={"path": "Qwen3.5-4B"})
    assert not {"base_model", "base_model_relation", "license_link"} & front(text).keys()
    assert "a local folder, `Qwen3.5-4B`" in text


BASE = {"repo": "Tuner/My-Tune-GGUF", "revision": "1" * 40, "file": "My-Tune-Q4_K_M.gguf"}
DONORS = [{"repo": "Qwen/Qwen3.5-4B", "revision": REVISION}]
COPIED = "Only the head is new; every other tensor was copied byte for byte."


def test_an_adopted_base_is_the_base_model_and_the_donor_is_named(tmp_path: Path) -> None:
    about: dict[str, Any] = {"source": None, "bases": [BASE], "donors": DONORS}
    text = make(theirs=THEIRS, folder=tmp_path, name="My-Tune", **about)
    assert front(text)["base_model"] == [BASE["repo"]]
    assert front(text)["base_model_relation"] == "quantized"
    commit = f"blob/{'1' * 40}/LICENSE"
    assert front(text)["license_link"] == f"https://huggingface.co/Tuner/My-Tune-GGUF/{commit}"
    link = "[Tuner/My-Tune-GGUF](https://huggingface.co/Tuner/My-Tune-GGUF)"
    donor = "[Qwen/Qwen3.5-4B](https://huggingface.co/Qwen/Qwen3.5-4B)"
    assert f"A GGUF of {link} with the multi-token prediction head" in text
    assert f"also called NextN) of {donor}. The model" in text
    base = f"`My-Tune-Q4_K_M.gguf` of {link}, commit `{'1' * 40}`"
    lines = [f"- Base: {base}. {COPIED}", f"- Head from: {donor}, commit `{REVISION}`"]
    assert "\n".join(lines) in text and "- Checkpoint" not in text


def test_each_head_is_said_to_be_that_of_its_checkpoint() -> None:
    donor = {"repo": "Owner/Other", "revision": REVISION}
    own = "[Qwen/Qwen3.5-4B](https://huggingface.co/Qwen/Qwen3.5-4B)"
    other = "[Owner/Other](https://huggingface.co/Owner/Other)"
    for about, heads in [
        ({"donors": [donor], "own_head": True}, f"of {own} and {other}. The model"),
        ({"donors": [donor], "own_head": False}, f"of {other}. The model"),
        ({"donors": [], "own_head": True}, "NextN). The model"),
    ]:
        assert heads in make(**about)


def test_a_title_has_mtp_once() -> None:
    assert "# Mine-MTP-GGUF\n" in make(name="Mine-MTP", publish={})


def test_a_base_beside_a_checkpoint_is_a_base_model_too(tmp_path: Path) -> None:
    local = {"path": "My-Tune-Q4_K_M.gguf"}
    text = make(theirs=THEIRS, folder=tmp_path, bases=[BASE, local], donors=DONORS)
    assert front(text)["base_model"] == ["Qwen/Qwen3.5-4B", BASE["repo"]]
    assert "- Checkpoint: [Qwen/" in text
    assert f"- Base: a local file, `My-Tune-Q4_K_M.gguf`. {COPIED}" in text


def test_a_base_with_the_checkpoints_head_is_named_but_is_no_base_model(tmp_path: Path) -> None:
    """The file is a quantization of the checkpoint, whoever made it."""
    text = make(theirs=THEIRS, folder=tmp_path, injected=[BASE], own_head=True)
    assert front(text)["base_model"] == ["Qwen/Qwen3.5-4B"]
    assert front(text)["base_model_relation"] == "quantized"
    link = "[Tuner/My-Tune-GGUF](https://huggingface.co/Tuner/My-Tune-GGUF)"
    given = f"Quants of {link} were given this head; their other tensors are unchanged."
    assert given in text.split("## ")[0]
    base = f"- Base: `My-Tune-Q4_K_M.gguf` of {link}, commit `{'1' * 40}`. {COPIED}"
    assert base in text and "- Checkpoint: [Qwen/" in text


@pytest.mark.parametrize(
    "theirs",
    [
        "no front matter\n",
        "---\n[\n---\n",
        "---\n- a\n---\n",
        "---\nlicense: {a: b}\ntags: [1, {x: y}]\nlanguage: 5\n---\n",
        "---\nlicense_link: 'http://[x'\n---\n",
        "---\nlicense_link: 'javascript:alert(1)'\n---\n",
        "---\n" + "[" * 3000 + "\n---\n",
        '---\nlicense: "x\\n---\\n# Injected"\n---\n',
        "---\nself: 1\nignore_metadata_errors: 2\neval_results: 3\nmodel-index: 4\n---\n",
    ],
)
def test_hostile_front_matter_is_dropped(tmp_path: Path, theirs: str) -> None:
    data = front(make(theirs=theirs, folder=tmp_path))
    assert data.keys() == {"base_model", "base_model_relation", "quantized_by", "tags"}
    assert "Injected" not in str(data)


# ── figures ──


def test_pages_without_measurements_have_no_columns_for_them() -> None:
    text, more = make(), second()
    headings, _, row = rows(_first_table(text, "## Files"))
    assert headings == ["file", "size", "head", "accepted"]
    assert row == ["[IQ4_XS](Qwen3.5-4B-IQ4_XS.gguf)", "2.7 GB", "Q8_0", "81%"]
    headings, _, row = rows(_first_table(more, "## All files"))
    assert headings == ["file", "size", "bits/weight", "head", "acceptance"]
    name = "[Qwen3.5-4B-IQ4_XS.gguf](Qwen3.5-4B-IQ4_XS.gguf)"
    assert row == [name, "2.70 GB", "4.61", "Q8_0", "81.2%"]
    for page in (text, more):
        assert "Speed and KL divergence were not measured." in page
        assert "measure/" not in page and "<img" not in page


UNRUN = measurement(
    by_n_max=(),
    runs=(),
    prompts={},
    verdict="not measured: too large",
    perplexity=None,
    kl_divergence=None,
)


def test_a_file_that_was_not_run_is_named() -> None:
    large = result("BF16")
    large = replace(large, report=replace(large.report, not_run="9 GB do not fit into 8 GB"))
    results = [replace(large, measured=UNRUN), result(measured=measurement())]
    text, more = make(*results), second(*results)
    assert "`Qwen3.5-4B-BF16.gguf` was not run before it was published (9 GB do not fit" in text
    checked = "with a head was checked in llama-server: the head drafts, and 81% of its drafts are"
    assert f"Each other file {checked} accepted." in text
    assert column(text, "tokens/s", "## Files") == ["-", "210 → 290"]
    assert "- `Qwen3.5-4B-BF16.gguf`: not measured: too large." in more
    assert "### `Qwen3.5-4B-BF16.gguf`" not in more
    assert column(more, "tok/s") == ["-", "290.0"]
    assert more.count("Speed was measured on") == 1


def test_a_file_that_was_not_run_alone_has_not_drafted() -> None:
    large = result("BF16")
    large = replace(large, report=replace(large.report, not_run="9 GB do not fit into 8 GB"))
    large = replace(large, measured=UNRUN)
    text, more = make(large), second(large)
    assert "was not run" in text and "checked in llama-server" not in text
    assert "- `Qwen3.5-4B-BF16.gguf`: not measured: too large." in more
    for page in (text, more):
        assert "Speed and KL divergence were not measured." in page
        assert "Measured with" not in page and "measured on" not in page and "<img" not in page


@pytest.mark.parametrize(
    ("heading", "cells"),
    [
        ("tok/s", ["-", "290.0"]),
        ("tok/s without drafting", ["-", "207.0"]),
        ("draft length", ["-", "2"]),
        ("memory", ["-", "3.00 GB"]),
        ("KL divergence", ["-", "0.01234"]),
        ("KL 99.9%", ["-", "0.5678"]),
        ("top-token agreement", ["-", "95.1%"]),
        ("perplexity", ["-", "8.1234"]),
    ],
)
def test_table_of_all_files_shows_measurements(heading: str, cells: list[str]) -> None:
    text = second(result("BF16"), result(measured=measurement()))
    assert column(text, heading) == cells


@pytest.mark.parametrize(
    ("heading", "cells"),
    [
        ("draft length", ["off", "1", "2", "3"]),
        ("tok/s", ["207.0", "250.0", "290.0", "280.0"]),
        ("range", ["206.0-208.0", "249.0-251.0", "289.0-291.0", "279.0-281.0"]),
        ("cold tok/s", ["103.5", "125.0", "145.0", "140.0"]),
        ("speedup", ["1.00", "1.21", "1.40", "1.35"]),
        ("acceptance", ["-", "65.0%", "65.0%", "65.0%"]),
        ("cold acceptance", ["-", "45.0%", "45.0%", "45.0%"]),
        ("code", ["-", "90.0%", "90.0%", "90.0%"]),
        ("prose", ["-", "40.0%", "40.0%", "40.0%"]),
        ("by position", ["-", "80%", "80% 50%", "80% 50% 30%"]),
    ],
)
def test_sweep_table_shows_measurements(heading: str, cells: list[str]) -> None:
    text = second(result("BF16"), result(measured=measurement()))
    assert column(text, heading, "### `Qwen3.5-4B-IQ4_XS.gguf`") == cells


def tried(measured: Measurement) -> Measurement:
    """The last pair was tried once in the search; the recommended one took turns, code twice."""
    *totals, last = measured.by_n_max
    once = replace(last, repeats=1, spread=(last.tokens_per_second, last.tokens_per_second))
    kinds = tuple(
        KindSpeed(
            kind=kind, form="raw", n_max=2, p_min=0.0, tokens_per_second=290.0, without=207.0,
            speedup=speedup, acceptance=0.9,
        )
        for kind, speedup in (("code", 1.4), ("prose", None))
    )  # fmt: skip
    return replace(measured, by_n_max=(*totals, once), by_kind=kinds)


def test_rounds_of_the_search_are_told_from_those_in_turns_with_no_drafting() -> None:
    text = second(result(measured=tried(measurement())))
    rounds = ["3 in turns", "3 search", "3 in turns", "1 search"]
    assert column(text, "rounds", "### ") == rounds
    assert column(text, "range", "### ")[2:] == ["289.0-291.0", "280.0"]
    assert column(text, "speedup", "### `Qwen3.5-4B-IQ4_XS.gguf` by kind") == ["1.40", "-"]


def test_the_columns_of_the_second_page_are_explained_if_they_are_there() -> None:
    names = ("draft length", "p_min", "rounds", "range", "cold", "by position", "form", "speedup")

    def explained(measured: Measurement) -> list[str]:
        text = second(result(measured=measured), result("Q8_0", measured=measured))
        assert text.count("- draft length:") == 1
        return [name for name in names if f"\n- {name}: " in text]

    full = tried(measurement())
    assert explained(full) == [name for name in names if name != "p_min"]
    stops = tuple(replace(each, p_min=0.75) for each in full.by_n_max)
    assert "p_min" in explained(replace(full, by_n_max=stops))
    unsteady = replace(full, steady=False)
    assert explained(unsteady) == ["draft length", "cold", "by position", "form"]
    assert explained(measurement()) == ["draft length", "range", "cold", "by position"]


def test_the_columns_of_the_card_are_explained_if_they_are_there() -> None:
    swept = measurement(2, recommended_p_min=0.75)
    words = ("draft: how many tokens", "p_min: drafting stops at")
    for measured, shown in ((swept, (1, 1)), (measurement(2), (1, 0)), (UNRUN, (0, 0))):
        text = make(result(measured=measured))
        assert tuple(text.count(each) for each in words) == shown
    unsteady = replace(swept, steady=False, recommended_n_max=None, recommended_p_min=None)
    assert words[0] not in make(result(measured=unsteady))


def test_speed_that_was_steady_for_no_file_has_no_columns_and_is_said_once() -> None:
    speedless = {
        "steady": False,
        "recommended_n_max": None,
        "verdict": f"not steady: 60 to 102 tokens/s: {recommendation.AGAIN}"
        "; search cut short by `minutes`",
    }
    unsteady = result(measured=measurement(2, **speedless))
    bare = measurement(0, (99.0,), **{**speedless, "recommended_n_max": 0})
    files = [unsteady, result("none", bare, heads=0)]
    text, more = make(*files), second(*files)
    for page, heading in ((text, "## Files"), (more, "## All files")):
        headings, *_ = rows(_first_table(page, heading))
        assert not {"tokens/s", "tok/s", "tok/s without drafting", "draft", "draft length"} & {
            *headings
        }
        assert page.count("No measurement of speed was steady, so none is shown.") == 1
        assert "quiet machine" not in page
    assert "- `Qwen3.5-4B-IQ4_XS.gguf`: not steady: 60 to 102 tokens/s; search cut short.\n" in more
    assert "[acceptance at each draft length](DETAILS.md#drafting)" in text
    assert "in the table" not in text.split("## Run it")[1]
    text = make(unsteady, result("Q8_0", measurement()))
    assert column(text, "tokens/s", "## Files") == ["not steady", "210 → 290"]
    assert "No measurement of speed" not in text


def test_the_first_lines_say_how_many_files_there_are_and_how_they_were_checked() -> None:
    checked = "was checked in llama-server: the head drafts"
    one = make()
    assert f"The file {checked}, and 81% of its drafts are accepted." in one
    assert "\nA GGUF of [Qwen/" in one
    several = make(result(), result("Q8_0", acceptance=0.9449), result("none", heads=0))
    assert f"Each file with a head {checked}, and 81-94% of its drafts are accepted." in several
    assert "\nGGUF quantizations of [Qwen/" in several
    assert f"The file {checked}.\n" in make(result(acceptance=None))


def test_an_arrow_between_speeds_is_explained_if_there_is_one() -> None:
    off, drafting = measurement(0, (94.0, 47.6)), measurement(2)
    assert "; tokens/s: without drafting; " in make(result(measured=off))
    both = make(result(measured=off), result("Q8_0", measured=drafting))
    for text in (make(result(measured=drafting)), both):
        assert "tokens/s: without → with drafting" in text


def test_the_text_of_the_divergence_is_named() -> None:
    text = make(result(measured=measurement(text=TEXT)))
    assert "KL: mean KL divergence from BF16 on `held-out.txt`, lower is better" in text


@pytest.mark.parametrize("heading", ["## Files", "## All files"])
def test_files_are_listed_from_small_to_large_and_models_first(heading: str) -> None:
    sizes = {"Q4_K_M": 5, "Q8_0": 9, "IQ2_M": 2, "Q4_K_L": 6}
    models = [result(name, bytes=size * 10**9) for name, size in sizes.items()]
    page = (make if heading == "## Files" else second)(SIDECAR, *models)
    names = [cell.split("](")[0].strip("[") for cell in column(page, "file", heading)]
    kinds = [name.removesuffix(".gguf").removeprefix("Qwen3.5-4B-") for name in names]
    assert kinds[:4] == ["IQ2_M", "Q4_K_M", "Q4_K_L", "Q8_0"] and kinds[4].startswith("mtp-")


def test_the_second_page_keeps_the_order_of_its_table() -> None:
    large = result("Q8_0", measurement(), bytes=9 * 10**9)
    small = result("Q4_0", measurement(), bytes=5 * 10**9)
    more = second(large, small)
    for mark in ("- `", "### `"):
        assert more.index(f"{mark}Qwen3.5-4B-Q4_0") < more.index(f"{mark}Qwen3.5-4B-Q8_0")


def test_verdict_and_recommended_draft_length_are_shown() -> None:
    results = [result("BF16"), result(measured=measurement())]
    assert "--spec-draft-n-max 2" in make(*results)
    assert "- `Qwen3.5-4B-IQ4_XS.gguf`: what measure.py found.\n" in second(*results)


def test_kind_of_prompt_named_like_a_column_keeps_its_own_column() -> None:
    runs = (run(0, "speedup"), run(1, "speedup", accepted=90))
    text = second(result(measured=measurement(1, (10.0, 20.0), runs=runs)))
    headings, _, _, drafting = rows(_first_table(text, "### "))
    cells = [cell for name, cell in zip(headings, drafting, strict=True) if name == "speedup"]
    assert cells == ["2.00", "90.0%"]


def test_commands_serve_with_the_measured_options() -> None:
    options = ("-fa", "on", "--ctx-size", "8192")
    command = "-hf Someone/Qwen3.5-4B-MTP-GGUF:IQ4_XS -fa on --ctx-size 8192"
    text = make(result(measured=measurement(options=options)))
    assert f"{command} --spec-type draft-mtp --spec-draft-n-max 2\n" in text
    assert "llama.cpp 0.5.0-dev 0c1e57098, 4 threads, `-fa on --ctx-size 8192` on A" in text
    text = make(result(measured=measurement(0, options=options)))
    assert f"{command}\n" in text


def test_drafting_is_off_if_it_is_slower() -> None:
    slower = result(measured=measurement(0, (94.0, 47.6)))
    text, more = make(slower), second(slower)
    assert column(text, "draft", "## Files") == ["off"]
    assert column(text, "tokens/s", "## Files") == ["94"]
    assert column(more, "draft length") == ["off"]
    assert column(more, "tok/s") == ["94.0"]
    assert column(more, "speedup", "### ") == ["1.00", "0.51"]
    assert "llama-server -hf Someone/Qwen3.5-4B-MTP-GGUF:IQ4_XS\n" in text
    assert "--spec-draft" not in "".join(served(text)) and "--speculative-draft" not in text


def test_drafting_that_is_off_is_to_be_tried_on_a_gpu_unless_one_was_measured() -> None:
    off = "Drafting is off because it was not faster when measured on"
    on_a_gpu = "; on a GPU, try `--spec-type draft-mtp --spec-draft-n-max 2`:"
    slower = measurement(0, (94.0, 47.6), threads=2)
    assert f"{off} 2 CPU threads{on_a_gpu}\n" in make(result(measured=slower))
    one = replace(slower, threads=1)
    assert f"{off} 1 CPU thread{on_a_gpu}\n" in make(result(measured=one))
    gpu = replace(slower, machine=replace(slower.machine, devices=("CUDA0: H100 (80 MiB)",)))
    assert f"{off} CUDA0: H100 (80 MiB):\n" in make(result(measured=gpu))
    dead = replace(slower, by_n_max=tuple(replace(each, drafts=0) for each in slower.by_n_max))
    assert f"{off} 2 CPU threads:\n" in make(result(measured=dead))


def test_a_search_that_was_cut_short_tried_few_settings() -> None:
    tried = "of the few settings tried (search cut short)"
    off = make(result(measured=measurement(0, (94.0, 47.6), cut_short=True)))
    assert f"Drafting is off because it was not faster with any {tried}" in off
    tried = tried.replace("of", "among", 1)
    text = make(result(measured=measurement(2, cut_short=True)))
    assert f"the draft length that was fastest {tried}:" in text
    assert "cut short" not in make(result(measured=measurement(2)))


def test_inputs_of_measurements_are_named() -> None:
    where = f"on `held-out.txt` (sha256 `{TEXT.sha256}`, up to 16 chunks of 512 tokens)."
    prompts = "Speed was measured on prompts of these kinds: code, prose"
    measured = measurement(text=TEXT)
    assert (
        f"\nPerplexity and KL divergence were measured {where} {prompts} (3 rounds).\n"
    ) in second(result(measured=measured))
    text = second(result(measured=replace(measured, kl_divergence=None, repeats=1)))
    assert f"\nPerplexity was measured {where} {prompts} (1 round).\n" in text
    text = second(result(measured=replace(measured, text=None)))
    assert "Perplexity" not in text
    assert f"\n{prompts}" in text


def test_number_that_rounds_to_zero_has_no_sign() -> None:
    divergence = replace(DIVERGENCE, mean=-1e-7, p99_9=-0.0)
    text = second(result(measured=measurement(kl_divergence=divergence)))
    assert column(text, "KL divergence") == ["0.00000"]
    assert column(text, "KL 99.9%") == ["0.0000"]


# ── serving ──


def test_commands_use_the_first_quantized_file_that_drafts() -> None:
    """Not the fastest, which is usually a smaller one."""
    slow = measurement(1, (10.0, 20.0))
    fast = measurement(3, (30.0, 31.0, 32.0, 40.0))
    results = [
        result("BF16", fast),
        result("none", measurement(0, (99.0,)), heads=0),
        result(measured=slow),
        result("IQ2_XS", fast),
    ]
    text = make(*results)
    assert served(text)[0] == (
        "llama-server -hf Someone/Qwen3.5-4B-MTP-GGUF:IQ4_XS "
        "--spec-type draft-mtp --spec-draft-n-max 1"
    )
    for line in ("lemonade pull R:IQ4_XS", "lms get https://huggingface.co/R@IQ4_XS"):
        assert line.replace("R", "Someone/Qwen3.5-4B-MTP-GGUF") in served(text)
    assert (
        "change the tag, and the draft length to that in the table "
        "(`--spec-type draft-mtp --spec-draft-n-max N`; leave out both options if it says off)."
    ) in text


@pytest.mark.parametrize(
    ("results", "variant"),
    [
        ([result("BF16"), result("none", heads=0)], "BF16"),
        ([result("BF16", heads=0), result("none", heads=0)], "none"),
        ([result("BF16", heads=0)], "BF16"),
        ([SIDECAR, result("Q4_0")], "Q4_0"),
    ],
)
def test_recommended_file_drafts_if_any_does(results: list[Result], variant: str) -> None:
    found = choice.recommended(results)
    assert found is not None
    assert found.name == f"Qwen3.5-4B-{variant}.gguf"


def test_sidecar_alone_has_no_recommended_file() -> None:
    assert choice.recommended([SIDECAR]) is None
    assert "no complete model" in make(SIDECAR)


def test_changes_for_another_file_are_explained_before_the_commands() -> None:
    """The table by memory may name another file than the commands."""
    assert "If you chose another file" not in make()
    text = make(result("BF16"), result("Q4_K_M"))
    assert (
        "These commands use `Qwen3.5-4B-Q4_K_M.gguf`, the file that llama.cpp takes without a tag "
        "(`-hf REPOSITORY`). If you chose another file, change the tag.\n"
    ) in text
    assert text.index("If you chose another file") < text.index("llama-server -hf")
    text = make(result("BF16"), result(), result("none", heads=0))
    options = "`--spec-type draft-mtp --spec-draft-n-max N`"
    assert f"change the tag. Drop {options} if the file has no head." in text
    text = make(result("Q4_K_M"), result("Q4_K_M-injected"))
    model = "`-hf REPOSITORY --hf-file FILE`"
    assert f"If you chose another file, change the model to {model}. Without a tag" in text


LOCAL = "hf download Someone/Qwen3.5-4B-MTP-GGUF {} --local-dir ."


def test_model_published_with_a_sidecar_drafts_with_its_own_head() -> None:
    """With `-hf` llama-server would draft with the sidecar, which was not measured."""
    tower = beside("mmproj-Qwen3.5-4B-F16.gguf", "clip")
    text = make(result(measured=measurement()), SIDECAR, tower)
    assert served(text)[:2] == [
        LOCAL.format("Qwen3.5-4B-IQ4_XS.gguf mmproj-Qwen3.5-4B-F16.gguf"),
        "llama-server -m Qwen3.5-4B-IQ4_XS.gguf --mmproj mmproj-Qwen3.5-4B-F16.gguf"
        " --spec-type draft-mtp --spec-draft-n-max 2",
    ]
    assert "server -hf" not in text
    assert not any(line.startswith("lemonade") for line in served(text))
    assert "Do not use `-hf` or `lemonade pull`" in text


def test_split_model_with_a_sidecar_is_downloaded_whole() -> None:
    model = split_result("Q8_0")
    first, second = model.shards
    download, serve = served(make(model, SIDECAR))[:2]
    assert download == LOCAL.format(f"{first} {second}")
    assert serve.startswith(f"llama-server -m {first} --spec-type")


def test_sidecar_is_for_a_file_without_a_head() -> None:
    drafting = "-md mtp-Qwen3.5-4B-Q8_0.gguf{} --spec-type draft-mtp --spec-draft-n-max 1"
    measured = measurement(0, (99.0,), options=("-fa", "on"))
    text = make(result("BF16"), result("none", measured, heads=0), SIDECAR)
    assert "draft model, for `Qwen3.5-4B-none.gguf`, which has no head:" in text
    assert served(text)[2:4] == [
        LOCAL.format("Qwen3.5-4B-none.gguf mtp-Qwen3.5-4B-Q8_0.gguf"),
        f"llama-server -m Qwen3.5-4B-none.gguf {drafting.format(' -fa on')}",
    ]
    text = make(result("BF16"), SIDECAR)
    assert "draft model, for a GGUF of this model without one (MODEL):" in text
    assert served(text)[2:4] == [
        LOCAL.format("mtp-Qwen3.5-4B-Q8_0.gguf"),
        f"llama-server -m MODEL {drafting.format('')}",
    ]


def test_ollama_drafts_with_a_modelfile_and_old_ones_need_a_file_without_a_head() -> None:
    text = make()
    name = "hf.co/Someone/Qwen3.5-4B-MTP-GGUF:{}"
    assert f"FROM {name.format('IQ4_XS')}\nPARAMETER draft_num_predict 1\n" in text
    refused = "cannot load files of this architecture with a head (ollama issue 16282)"
    assert f"{refused}." in text
    assert f"{refused}, but can load `{name.format('none')}`" in make(
        result(), result("none", heads=0)
    )
    for model in (result(heads=0, head="none"), result(measured=measurement(0, (9.0, 8.0)))):
        assert f"\nollama run {name.format('IQ4_XS')}\n" in (text := make(model))
        assert ("16282" in text) == model.has_head
        assert "draft_num_predict" not in text


def test_ollama_needs_a_tag_and_a_single_file() -> None:
    text = make(result("Q4_0"), result("Q4_0-headless", heads=0))  # the tag Q4_0 matches both
    assert "load the downloaded file in Lemonade and LM Studio." in text
    assert "ollama run" not in text and "In Ollama, import the downloaded file too." in text
    text = make(split_result("BF16"))
    assert "ollama run" not in text
    assert "Ollama does not load split files." in text
    assert ":BF16 --spec-type" in text
    shards = second(split_result("BF16"))
    assert "- `Qwen3.5-4B-BF16/Qwen3.5-4B-BF16-00002-of-00002.gguf`" in shards


def test_the_draft_length_to_start_with_has_a_reason() -> None:
    unsteady = measurement(2, steady=False, recommended_n_max=None)
    once = measurement(2, recommended_n_max=None)
    for measured, why in (
        (None, "Speed was not measured"),
        (unsteady, "There is no reliable measurement of speed"),
        (once, "Speed was measured only once"),
    ):
        text = make(result(measured=measured))
        assert f"`Qwen3.5-4B-IQ4_XS.gguf`. {why}, so start with a draft length of 1:" in text


def test_other_runtimes_get_the_recommended_settings() -> None:
    options = ("-fa", "on")
    text = make(result(measured=measurement(3, options=options)))
    entry = yaml.safe_load(text.split("```yaml\n")[1].split("```")[0])
    words = "--spec-type draft-mtp --spec-draft-n-max 3"
    assert entry == {
        "models": {
            "Qwen3.5-4B-IQ4_XS": {
                "cmd": "llama-server --port ${PORT} -hf Someone/Qwen3.5-4B-MTP-GGUF:IQ4_XS "
                f"-fa on {words}"
            }
        }
    }
    assert f"lemonade run MODEL --llamacpp-args '-fa on {words}'" in served(text)
    load = "lms load MODEL --speculative-draft-mtp --speculative-draft-max-tokens 3"
    assert load in served(text)
    assert "PARAMETER draft_num_predict 3" in served(text)
    off = served(make(result(measured=measurement(0, (9.0, 8.0)))))
    assert "lemonade run MODEL --llamacpp-args '--spec-type none'" in off


NAMES = [
    "X-Q4_K_M.gguf",
    "X-Q4_K_M-injected.gguf",
    "X-Q8_0.gguf",
    "mtp-X-IQ4_NL.gguf",
    "mmproj-X-F16.gguf",
]
NAMES += [f"X-{word}Q2_K.gguf" for word in ("imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")]
NAMES += ["X-Q3_K.GGUF", "mtp-folder/X-MTP-Q5_K.gguf", "X-Q6_K-00002-of-00002.gguf"]


@pytest.mark.parametrize(
    ("tag", "name"),
    [
        ("Q4_K_M", "X-Q4_K_M-injected.gguf"),  # sorts first
        ("Q4_K_M-injected", "X-Q4_K_M-injected.gguf"),
        ("q8_0", "X-Q8_0.gguf"),
        ("IQ4_NL", None),
        ("F16", None),
        ("Q2_K", None),
        ("Q3_K", None),
        ("Q6_K", None),  # not the first shard
        ("Q5_K", "mtp-folder/X-MTP-Q5_K.gguf"),  # only the file name counts, and its case
    ],
)
def test_tags_resolve_as_in_llama_cpp(tag: str, name: str | None) -> None:
    assert choice.resolve(tag, NAMES) == name


def test_file_without_a_tag_is_served_by_name() -> None:
    text = make(result("Q4_K_M"), result("Q4_K_M-headless", heads=0))
    command = "-hf Someone/Qwen3.5-4B-MTP-GGUF --hf-file Qwen3.5-4B-Q4_K_M.gguf --spec-type"
    assert command in text
    assert "lemonade pull" not in text
    named = "These commands use `Qwen3.5-4B-Q4_K_M.gguf`, the recommended file."
    assert named in text and "(`-hf REPOSITORY`), llama.cpp may take another." in text


def test_the_file_that_llama_cpp_takes_without_a_tag_is_recommended() -> None:
    """Unless it does not draft, or is not quantized."""
    first, default = result("IQ4_XS"), result("Q4_K_M")
    assert choice.recommended([first, default]) is default
    assert "the file that llama.cpp takes without a tag" in make(first, default)
    for others in ([default, result("Q4_K_M-auto")], [result("Q6_K")]):
        text = make(first, *others)
        assert "the recommended file" in text and "llama.cpp takes" not in text
    headless = make(first, result("Q4_K_M", heads=0))
    assert "llama.cpp takes `Qwen3.5-4B-Q4_K_M.gguf`." in headless
    assert choice.recommended([first, result("Q4_K_M", heads=0)]) is first
    split = split_result("Q8_0")
    assert choice.recommended([first, split]) is split


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["X-IQ4_XS.gguf", "X-Q8_0.gguf", "X-Q4_K_M.gguf"], ["X-Q4_K_M.gguf"]),
        (["X-Q4_K_M.gguf", "X-Q4_K_M-auto.gguf"], ["X-Q4_K_M-auto.gguf", "X-Q4_K_M.gguf"]),
        (["X-IQ4_XS.gguf", "X-Q8_0.gguf", "mtp-X-Q4_K_M.gguf"], ["X-Q8_0.gguf"]),
        (["X-Q4_0.gguf", "X-IQ4_XS.gguf"], ["X-IQ4_XS.gguf", "X-Q4_0.gguf"]),
        (["Q/X-Q8_0-00002-of-00002.gguf", "Q/X-Q8_0-00001-of-00002.gguf"],
         ["Q/X-Q8_0-00001-of-00002.gguf"]),
        (["mtp-X-Q8_0.gguf", "README.md"], []),
    ],
)  # fmt: skip
def test_no_tag_resolves_as_in_llama_cpp(names: list[str], found: list[str]) -> None:
    """It takes the first that the Hub lists, whose order nobody promises."""
    assert choice.without_tag(names) == found


def test_names_are_escaped() -> None:
    text = make(
        name="a|b `x` <b>[c](d)",
        source={"path": "a|b `x` <b>[c](d)"},
        publish={"repo": "Some/Name", "private": True},
    )
    assert "<b>" not in text.replace("`a|b x <b>[c](d)`", "")
    assert r"a\|b \`x\` &lt;b&gt;\[c\](d)" in text


def test_types_that_few_programs_know_are_named() -> None:
    text = make(result(types={"F32": 30, "IQ4_KS": 40, "type 250": 1}))
    assert "`Qwen3.5-4B-IQ4_XS.gguf` has `IQ4_KS` and `type 250` tensors: few programs" in text
    assert "few programs" not in make(result(types={"F32": 30, "IQ4_XS": 40}))
    assert "few programs" not in make(result(types={"I32": 1, "MXFP4": 40}))


def test_every_architecture_has_its_runtimes() -> None:
    """It has a first build if and only if the pinned (newer) llama.cpp drafts with it."""
    upstream = converter_architectures.ARCHITECTURES.values()
    known = {entry.gguf: entry.drafts for entry in upstream if entry.only != "trunk"}
    known |= {family.gguf_architecture: True for family in FAMILIES}
    assert {name: bool(each.llama_cpp) for name, each in runtimes.RUNTIMES.items()} == known
    for name, each in runtimes.RUNTIMES.items():
        assert bool(each.llama_cpp) == bool(each.pull_requests), name
    builds = [
        int(number)
        for each in runtimes.RUNTIMES.values()
        for number in re.findall(r"\bb(\d+)", each.llama_cpp)
    ]
    assert max(builds) < int(runtimes.PINNED[1:])


@pytest.mark.parametrize(
    ("architecture", "words"),
    [
        ("qwen35", "use llama.cpp b9180 or newer; b9495 or newer recommended (fixes"),
        ("qwen4exp", "use llama.cpp newer than b11312. Builds"),
        ("deepseek4", "use llama.cpp of 2 August 2026 or newer. Builds"),
        ("step35", "use llama.cpp b9480 (with three blocks b9745) or newer. Builds"),
    ],
)
def test_the_llama_cpp_that_drafts_is_named(architecture: str, words: str) -> None:
    made = replace(result(), gguf=gguf("x.gguf", architecture))
    assert f"To draft with a `{architecture}` model, {words}" in make(made)


def test_types_are_explained_if_there_is_a_choice() -> None:
    text = make(result("BF16"), result("Q8_0"), result("UD-Q4_K_XL"), result("IQ2_M"))
    assert (
        "By type: BF16 is not quantized; Q8 is practically as good as BF16; Q4 is the usual "
        "compromise between size and quality; IQ2 loses a lot: for when nothing else fits."
    ) in text
    assert "IQ4_XS is a little smaller than Q4 and about as good" in make(
        result("Q4_0"), result("IQ4_XS")
    )
    assert "is a little smaller than Q4" not in make(
        result("Q4_0"), result("Q8_0"), result("IQ4_NL")
    )
    for results in ([result()], [result("Q4_K_M"), result("Q4_K_S")], [result("a"), result("b")]):
        assert "By type" not in make(*results)


def test_the_type_of_a_file_is_not_taken_from_the_name_of_its_model() -> None:
    text = make(*(result(f"Name-BF16-{kind}") for kind in ("Q8_0", "Q4_K_M")))
    assert "By type: Q8 is practically as good as BF16; Q4 is" in text


def test_a_download_is_checked_without_mtpforge() -> None:
    text = make()
    assert "`sha256sum --check --ignore-missing SHA256SUMS`" in text
    assert "make check-results" not in text


def test_memory_is_explained_where_it_is_shown() -> None:
    measured = measurement()
    assert "Memory is llama-server's peak resident size" in second(result(measured=measured))
    without = second(result(measured=replace(measured, memory_bytes=None)))
    assert "resident" not in without and "resident" not in second()


MATRIX = Coverage(
    matrix="calibration.txt", tokens=98_304, matrices=426, missing=(), experts=0, unseen={}
)


def test_importance_matrices_are_named_with_what_they_cover(tmp_path: Path) -> None:
    matrices = [
        {"text": "calibration.txt", "chat": False},
        {"text": "chats", "chat": True},
        {"path": "theirs.gguf"},
        {"repo": "Owner/Name", "file": "imatrix.dat", "revision": "1" * 40},
    ]
    unseen = replace(MATRIX, missing=("a", "b"), experts=10_240, unseen={"3": 12})
    about = About.parse(json.dumps({**ABOUT, "matrices": matrices})).covered(
        [MATRIX, unseen, replace(MATRIX, experts=8), replace(MATRIX, tokens=None)]
    )
    text = card.make(about, (result(),), tmp_path / "none", STAMP, TEMPLATE)
    assert [line for line in text.splitlines() if line.startswith("- Importance")] == [
        "- Importance matrix: from `calibration.txt`; covers 426 of 426 matrices in 98,304 tokens",
        "- Importance matrix: from `chats`, put through the chat template; "
        "covers 424 of 426 matrices in 98,304 tokens, and 10,228 of 10,240 experts",
        "- Importance matrix: `theirs.gguf`; "
        "covers 426 of 426 matrices in 98,304 tokens, and all 8 experts",
        "- Importance matrix: `imatrix.dat` of [Owner/Name](https://huggingface.co/Owner/Name); "
        "covers 426 of 426 matrices",
    ]
    assert "Importance" not in make()


def test_embedded_texts_are_said_to_be_mtpforge_s(tmp_path: Path) -> None:
    matrix = {"text": "calibration.txt", "chat": False, "published": "X-imatrix.gguf"}
    texts: dict[str, Any] = {"matrices": [matrix], "texts": {"held-out.txt": TEXT.sha256}}
    measured = result(measured=measurement(text=TEXT))
    text, more = make(measured, **texts), second(measured, **texts)
    assert "KL: mean KL divergence from BF16 on mtpforge's `held-out.txt`, lower" in text
    assert "measured on mtpforge's `held-out.txt` (sha256 `abab" in more
    assert "matrix: from `calibration.txt`" in text  # the owner's, with the same name
    texts["matrices"] = [matrix | {"sha256": "0" * 64}]
    text = make(measured, **texts)
    assert f"matrix: from mtpforge's `calibration.txt` (sha256 `{'0' * 64}`)\n" in text
    assert "computed from mtpforge's `calibration.txt`, with the unquantized" in text
    texts["texts"] = {"held-out.txt": "0" * 64}
    for page in (make(measured, **texts), second(measured, **texts)):
        assert "mtpforge's `held-out.txt`" not in page and " on `held-out.txt`" in page


def test_the_card_names_mtpforge() -> None:
    assert "Made with mtpforge: `provenance/` has the digest of its programs." in make()


def test_a_published_importance_matrix_is_linked_with_what_it_is(tmp_path: Path) -> None:
    chat = {"text": "a.txt", "chat": True, "published": "X-imatrix.gguf"}
    about = About.parse(json.dumps({**ABOUT, "matrices": [chat, {"path": "theirs.gguf"}]}))
    text = card.make(about, (result(),), tmp_path / "none", STAMP, TEMPLATE)
    assert (
        "\n\n[X-imatrix.gguf](X-imatrix.gguf) is the importance matrix that llama-imatrix computed "
        "from `a.txt`, put through the chat template, with the unquantized model. "
        "`llama-quantize --imatrix` makes other quantizations with it.\n\n## Run it\n"
    ) in text
    none = "(SLSA provenance v1), except for importance matrices; `reports/`"
    assert f"the inputs of each GGUF as an in-toto statement {none}" in text
    unpublished = About.parse(json.dumps({**ABOUT, "matrices": [{"path": "theirs.gguf"}]}))
    other = card.make(unpublished, (result(),), tmp_path / "none", STAMP, TEMPLATE)
    assert "llama-imatrix" not in other and "importance matrices;" not in other


def test_sources_and_verdicts_are_said_once() -> None:
    text, more = make(), second()
    for words in ("- Checkpoint: ", "- llama.cpp: "):
        assert words in text and words not in more


def test_recipe_comes_from_the_configuration() -> None:
    recipe = second().split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(recipe) == {"variants": {"BF16": {}, "IQ4_XS": {"head": "Q8_0"}}}


@pytest.mark.parametrize("kind", hostile_text.OWN)
def test_a_template_that_is_no_file_is_refused(tmp_path: Path, kind: str) -> None:
    hostile_text.special(tmp_path / "card.md", kind)
    with pytest.raises(ConfigError, match=r"card\.md: "):
        make(template=tmp_path / "card.md")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff", "not UTF-8"),
        (b"a" * (5 << 20), "larger than 4 MB"),
        (b"{{ title", "cannot be filled in"),
        (b"{{ title.nothing.more }}", "cannot be filled in"),
        (b"{% include 'other.md' %}", "cannot be filled in"),
        (b"{{ 1 // 0 }}", "cannot be filled in"),
        (b"{{ title + 1 }}", "cannot be filled in"),
        (b"{{ " + b"(" * 100_000, "cannot be filled in"),
        (b"---\n- a list\n---\n", "cannot be filled in"),
    ],
)
def test_a_template_that_cannot_be_filled_in_is_refused(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    (tmp_path / "card.md").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"card\.md: .*{reason}"):
        make(template=tmp_path / "card.md")
    if b"- a list" not in content:  # the second page has no front matter
        with pytest.raises(ConfigError, match=rf"card\.md: .*{reason}"):
            second(template=tmp_path / "card.md")


def test_readers_are_told_to_take_only_what_is_published(tmp_path: Path) -> None:
    stock = replace(DIVERGENCE, mean=0.0027)
    found = Compared(
        file="Qwen3.5-4B-Q4_K_M-auto.gguf",
        bytes=1000,
        sensitivity="class",
        mixture={},
        kl_divergence=stock,
        stock=Stock(type="Q4_K_M", bytes=1000, kl_divergence=stock),
    )
    auto = result("Q4_K_M-auto", measurement(kl_divergence=stock))
    other = result("Q4_K_M", measurement(kl_divergence=DIVERGENCE))  # with another matrix
    compared_with = result("Q4_K_M", measurement(kl_divergence=stock))
    about = About.parse(json.dumps(ABOUT))
    for results, words in (
        ((auto,), "no better than Q4_K_M (0.0027 vs 0.0027)."),
        ((auto, other), "no better than Q4_K_M (0.0027 vs 0.0027)."),
        ((auto, compared_with), "no better than Q4_K_M: take that (0.0027 vs 0.0027)."),
    ):
        text = card.make(about, results, tmp_path / "none", STAMP, TEMPLATE, compared=[found])
        assert f"[found by a search](DETAILS.md#types-found-by-the-search): {words}" in text


def test_a_found_recipe_is_shown_with_its_verdict_and_mixture(tmp_path: Path) -> None:
    def moved(mean: float) -> KlDivergence:
        return KlDivergence(mean=mean, p99_9=0.1, same_top=0.98)

    found = Compared(
        file="Qwen3.5-4B-auto",
        bytes=1000,
        sensitivity="class",
        mixture={"attn_q.weight": {"Q6_K": 3, "Q4_K": 5}},
        kl_divergence=moved(0.001),
        stock=Stock(type="Q4_K_M", bytes=1000, kl_divergence=moved(0.002)),
    )
    about = About.parse(json.dumps(ABOUT))
    text = card.make(about, (result(),), tmp_path / "none", STAMP, TEMPLATE, compared=[found])
    shown = text.replace("\\", "")
    verdict = "-50% KL divergence at the size of Q4_K_M (0.001 vs 0.002)"
    found_by = "[found by a search](DETAILS.md#types-found-by-the-search)"
    assert f"The types in `Qwen3.5-4B-auto` were {found_by}: {verdict}" in shown
    text = details.make(about, (result(),), DETAILS, compared=[found])
    assert "`Qwen3.5-4B-auto`: how much a tensor matters was measured by class" in text
    assert verdict not in text.replace("\\", "")  # it is in the card
    assert re.search(r"\| attn_q.weight +\| +3 \| +5 \|", text)


@pytest.mark.parametrize(
    ("build", "commit", "shown"),
    [
        (None, "b11434", "0.6.0-dev b11434"),
        ("11434", "b11434", "0.6.0-dev b11434"),
        ("11434", "6d1c03ae", "0.6.0-dev b11434 6d1c03ae"),
        ("0", "unknown", "0.6.0-dev unknown"),
    ],
)
def test_each_part_of_llama_cpps_version_is_said_once(
    build: str | None, commit: str, shown: str
) -> None:
    stamp = replace(STAMP, llama_cpp="0.6.0-dev", build=build, commit=commit)
    assert card_parts.toolchain(stamp) == shown
