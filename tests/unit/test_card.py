"""Model cards: front matter that the Hub takes, figures that stand in the reports, lines that name the file that they mean."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from gguf.constants import GGUFValueType
from huggingface_hub import ModelCard
from mtpforge.checkpoint.families.registry import FAMILIES
from mtpforge.gguf.reader import Gguf, Value
from mtpforge.llama_cpp import architectures, runtimes
from mtpforge.publish import card, serving
from mtpforge.publish.result import Result

TEMPLATE = ROOT / "workflow" / "templates" / "card.md"
STAMP = {"llama.cpp": "0.5.0-dev", "commit": "0c1e57098"}
REVISION = "851bf6e806efd8d0a36b00ddf55e13ccb7b8cd0a"
ABOUT = {
    "name": "Qwen3.5-4B",
    "source": {"repo": "Qwen/Qwen3.5-4B", "revision": REVISION},
    "publish": {"repo": "Someone/Qwen3.5-4B-MTP-GGUF", "private": True},
    "variants": {"BF16": {}, "IQ4_XS": {"head": "Q8_0", "replace_head": False}},
}


MEASURED_ON = {
    "text": {"name": "held-out.txt", "sha256": "ab" * 32, "chunks": 16},
    "prompts": {"prose": "c" * 64, "code": "d" * 64},
    "repeats": 3,
}


def opened(name: str, architecture: str = "qwen35", heads: int = 1) -> Gguf:
    def number(value: int) -> Value:
        return Value.of(value, GGUFValueType.UINT32)

    metadata = {
        "general.architecture": Value.of(architecture, GGUFValueType.STRING),
        f"{architecture}.block_count": number(33),
        f"{architecture}.nextn_predict_layers": number(heads),
    }
    return Gguf(Path(name), metadata, dict.fromkeys("ab"), {})  # type: ignore[arg-type]


def result(
    variant: str = "IQ4_XS", measured: dict[str, Any] | None = None, heads: int = 1, **report: Any
) -> Result:
    name = f"Qwen3.5-4B-{variant}.gguf"
    known = {
        "file": name,
        "bytes": 2_700_000_000,
        "bits_per_weight": 16.06 if variant == "BF16" else 4.61,
        "head": "Q8_0",
    }
    return Result(
        {**known, "acceptance": 0.8125, "drafts": 400, **report},
        measured,
        opened(name, heads=heads),
    )


def beside(name: str, architecture: str = "qwen35") -> Result:
    """A sidecar or a vision tower."""
    return Result(
        {"file": name, "bytes": 1, "bits_per_weight": 8.5, "head": ""},
        None,
        opened(name, architecture),
    )


SIDECAR = beside("mtp-Qwen3.5-4B-Q8_0.gguf")


def measurement(
    recommended: int = 2, speeds: tuple[float, ...] = (207.0, 250.0, 290.0, 280.0)
) -> dict[str, Any]:
    """As measure.py writes it, for the sweep 0 to 3."""
    runs, totals = [], []
    for n_max, speed in enumerate(speeds):
        for kind, share in (("code", 90), ("prose", 40)):
            for state, accepted in (("cold", share - 20), ("warm", share)):
                drafts = 100 if n_max else 0
                run = {
                    "n_max": n_max,
                    "kind": kind,
                    "state": state,
                    "repeats": 1,
                    "tokens_per_second": [speed],
                    "drafts": drafts,
                }
                runs.append({**run, "accepted": accepted if n_max else 0})
        acceptance = (
            {"acceptance": 0.65, "by_position": [0.8, 0.5][:n_max]}
            if n_max
            else {"acceptance": None, "by_position": []}
        )
        spread = [speed - 1, speed + 1]
        totals.append(
            {
                "n_max": n_max,
                "tokens_per_second": speed,
                "spread": spread,
                "speedup": speed / speeds[0],
                **acceptance,
            }
        )
        totals[-1]["cold_tokens_per_second"] = speed / 2
    return {
        "file": "Qwen3.5-4B-IQ4_XS.gguf", "bytes": 1, "threads": 4, "llama.cpp": "0.5.0-dev 0c1e57098",
        "runs": runs, "by_n_max": totals, "recommended_n_max": recommended, "verdict": "what measure.py found",
        "memory_bytes": 3_000_000_000, "perplexity": 8.1234,
        "kl_divergence": {"mean": 0.01234, "p99.9": 0.5678, "same_top": 0.951},
    }  # fmt: skip


def make(*results: Result, theirs: str = "", folder: Path | None = None, **about: Any) -> str:
    path = (folder or Path("nowhere")) / "README.md"
    if theirs:
        path.write_text(theirs)
    return card.make({**ABOUT, **about}, results or (result(),), path, STAMP, TEMPLATE)


def front(text: str) -> dict[str, Any]:
    return dict(yaml.safe_load(text.split("---\n")[1]))


def rows(text: str) -> list[list[str]]:
    """The cells of every table."""
    return [
        [cell.strip() for cell in line.strip("| ").split(" | ")]
        for line in text.splitlines()
        if line.startswith("|")
    ]


def column(text: str, heading: str, after: str = "## Files") -> list[str]:
    headings, _, *lines = rows(_first_table(text, after))
    return [line[headings.index(heading)] for line in lines]


def _first_table(text: str, after: str) -> str:
    lines = text[text.index(after) :].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    end = next(i for i in range(start, len(lines)) if not lines[i].startswith("|"))
    return "\n".join(lines[start:end])


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


def test_front_matter_is_that_of_a_quantization_and_the_checkpoints_own(tmp_path: Path) -> None:
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


def test_of_a_local_checkpoint_no_base_model_is_claimed(tmp_path: Path) -> None:
    text = make(theirs=THEIRS, folder=tmp_path, source={"path": "Qwen3.5-4B"})
    assert not {"base_model", "base_model_relation", "license_link"} & front(text).keys()


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
def test_a_hostile_card_of_a_checkpoint_harms_nothing(tmp_path: Path, theirs: str) -> None:
    data = front(make(theirs=theirs, folder=tmp_path))
    assert data.keys() == {
        "base_model",
        "base_model_relation",
        "quantized_by",
        "tags",
    } and "Injected" not in str(data)


def test_without_measurements_it_says_so_and_has_no_columns_for_them() -> None:
    text = make()
    assert rows(text)[0] == ["file", "size", "bits/weight", "head", "acceptance"]
    assert rows(text)[2] == ["`Qwen3.5-4B-IQ4_XS.gguf`", "2.70 GB", "4.61", "Q8_0", "81.2%"]
    assert "Speed and KL divergence were not measured." in text and "measure/" not in text


def test_every_figure_is_that_of_the_measurements() -> None:
    text = make(result("BF16"), result(measured=measurement()))
    assert column(text, "tok/s") == ["-", "290.0"] and column(text, "tok/s without drafting") == [
        "-",
        "207.0",
    ]
    assert column(text, "drafted ahead") == ["-", "2"] and column(text, "memory") == [
        "-",
        "3.00 GB",
    ]
    assert column(text, "KL divergence") == ["-", "0.01234"] and column(text, "99.9%") == [
        "-",
        "0.5678",
    ]
    assert column(text, "same first choice") == ["-", "95.1%"] and column(text, "perplexity") == [
        "-",
        "8.1234",
    ]
    sweep = "### `Qwen3.5-4B-IQ4_XS.gguf`"
    assert column(text, "drafted ahead", sweep) == ["off", "1", "2", "3"]
    assert column(text, "tok/s", sweep) == ["207.0", "250.0", "290.0", "280.0"]
    assert (
        column(text, "x without", sweep)[2] == "1.40"
        and column(text, "from-to", sweep)[0] == "206.0-208.0"
    )
    assert column(text, "cold", sweep) == ["103.5", "125.0", "145.0", "140.0"]
    assert column(text, "accepted", sweep) == ["-", "65.0%", "65.0%", "65.0%"]
    assert column(text, "cold, accepted", sweep) == ["-", "45.0%", "45.0%", "45.0%"]
    assert (
        column(text, "code", sweep)[1:] == ["90.0%"] * 3
        and column(text, "prose", sweep)[1:] == ["40.0%"] * 3
    )
    assert column(text, "by position", sweep)[1:] == ["80%", "80% 50%", "80% 50%"]
    assert "--spec-draft-n-max 2" in text and "what measure.py found" in text


def test_the_options_that_it_was_measured_with_are_those_to_serve_it_with() -> None:
    options = ["-fa", "on", "--ctx-size", "8192"]
    text = make(result(measured={**measurement(), "options": options}))
    assert (
        "-hf Someone/Qwen3.5-4B-MTP-GGUF:IQ4_XS -fa on --ctx-size 8192 --spec-type draft-mtp --spec-draft-n-max 2"
        in text
    )
    assert "threads: 4, `-fa on --ctx-size 8192`" in text
    text = make(result(measured={**measurement(0), "options": options}))
    assert "-hf Someone/Qwen3.5-4B-MTP-GGUF:IQ4_XS -fa on --ctx-size 8192\n" in text


def test_a_bad_result_is_printed_and_drafting_is_off() -> None:
    text = make(result(measured=measurement(0, (94.0, 47.6))))
    assert column(text, "drafted ahead") == ["off"] and column(text, "tok/s") == ["94.0"]
    assert column(text, "x without", "### ") == ["1.00", "0.51"]
    assert (
        "llama-server -hf Someone/Qwen3.5-4B-MTP-GGUF:IQ4_XS\n" in text
        and "--spec-draft" not in text
    )
    assert "Drafting is off, because it was not faster" in text


def test_it_says_on_what_was_measured_as_far_as_that_is_known() -> None:
    sha256 = "ab" * 32
    measured = {**measurement(), **MEASURED_ON}
    assert (
        f"Perplexity and KL divergence on `held-out.txt` (sha256 `{sha256}`, at most 16 chunks of 512 tokens)."
        " Speed on prompts of the kinds code, prose, 3 warm requests each.\n"
    ) in make(result(measured=measured))
    text = make(result(measured={**measured, "kl_divergence": None, "repeats": 1}))
    assert "\nPerplexity on `held-out.txt`" in text and "prose, 1 warm request each." in text
    text = make(result(measured={**measured, "text": None}))
    assert "Perplexity" not in text and "\nSpeed on prompts" in text
    text = make(result(measured=measurement()))
    assert "Perplexity" not in text and "Speed on prompts" not in text


def test_what_rounds_to_zero_has_no_sign() -> None:
    text = make(
        result(
            measured={
                **measurement(),
                "kl_divergence": {"mean": -1e-7, "p99.9": -0.0, "same_top": 1.0},
            }
        )
    )
    assert column(text, "KL divergence") == ["0.00000"] and column(text, "99.9%") == ["0.0000"]


def served(text: str) -> list[str]:
    """The commands of the card."""
    blocks = text.split("## Run it")[1].split("## How")[0].split("```")[1::2]
    return [line for block in blocks for line in block.strip().splitlines()]


def test_the_lines_name_the_first_quantized_file_that_drafts_and_not_the_fastest() -> None:
    slow, fast = measurement(1, (10.0, 20.0)), measurement(3, (30.0, 31.0, 32.0, 40.0))
    results = [
        result("BF16", fast),
        result("none", measurement(0, (99.0,)), heads=0),
        result(measured=slow),
        result("IQ2_XS", fast),
    ]
    text = make(*results)
    assert served(text)[0] == (
        "llama-server -hf Someone/Qwen3.5-4B-MTP-GGUF:IQ4_XS --spec-type draft-mtp --spec-draft-n-max 1"
    )
    for line in ("lemonade pull R:IQ4_XS", "lms get https://huggingface.co/R@IQ4_XS"):
        assert line.replace("R", "Someone/Qwen3.5-4B-MTP-GGUF") in served(text)
    assert (
        "change the tag, and draft as far ahead as the table says: `--spec-type draft-mtp --spec-draft-n-max N`"
        in text
    )


@pytest.mark.parametrize(
    ("results", "variant"),
    [
        ([result("BF16"), result("none", heads=0)], "BF16"),
        ([result("BF16", heads=0), result("none", heads=0)], "none"),
        ([result("BF16", heads=0)], "BF16"),
        ([SIDECAR, result("Q4_0")], "Q4_0"),
    ],
)
def test_a_file_that_drafts_comes_before_one_that_is_quantized(
    results: list[Result], variant: str
) -> None:
    found = serving.best(results)
    assert (
        found is not None
        and found.name == f"Qwen3.5-4B-{variant}.gguf"
        and serving.best([SIDECAR]) is None
    )


def test_for_another_file_it_says_what_changes() -> None:
    assert "For another file" not in make()
    assert "For another file, change the tag.\n" in make(result("BF16"), result())
    text = make(result("BF16"), result(), result("none", heads=0))
    assert (
        "change the tag, and draft as far ahead as here: " in text
        and "or neither where a file has no head." in text
    )
    text = make(result("Q4_K_M"), result("Q4_K_M-injected"))
    assert "For another file, change the model to `-hf REPOSITORY --hf-file FILE`.\n" in text


LOCAL = "hf download Someone/Qwen3.5-4B-MTP-GGUF {} --local-dir ."


def test_beside_a_sidecar_the_file_drafts_with_its_own_head() -> None:
    """With `-hf` llama-server would draft with the sidecar, which was not measured."""
    text = make(
        result(measured=measurement()), SIDECAR, beside("mmproj-Qwen3.5-4B-F16.gguf", "clip")
    )
    assert served(text)[:2] == [
        LOCAL.format("Qwen3.5-4B-IQ4_XS.gguf mmproj-Qwen3.5-4B-F16.gguf"),
        "llama-server -m Qwen3.5-4B-IQ4_XS.gguf --mmproj mmproj-Qwen3.5-4B-F16.gguf --spec-type draft-mtp --spec-draft-n-max 2",
    ]
    assert "server -hf" not in text and not any(
        line.startswith("lemonade") for line in served(text)
    )
    assert "Not by `-hf` or `lemonade pull`" in text
    parts = [{"name": f"Qwen3.5-4B-Q8_0-0000{i}-of-00002.gguf"} for i in (1, 2)]
    lines = served(make(result("Q8_0", file="Qwen3.5-4B-Q8_0", files=parts), SIDECAR))
    first, second = (f"Qwen3.5-4B-Q8_0/{part['name']}" for part in parts)
    assert lines[0] == LOCAL.format(f"{first} {second}") and lines[1].startswith(
        f"llama-server -m {first} --spec-type"
    )


def test_a_sidecar_is_for_a_file_without_a_head() -> None:
    drafting = "-md mtp-Qwen3.5-4B-Q8_0.gguf --spec-type draft-mtp --spec-draft-n-max 1"
    measured = {**measurement(0, (99.0,)), "options": ["-fa", "on"]}
    text = make(result("BF16"), result("none", measured, heads=0), SIDECAR)
    assert "It is for `Qwen3.5-4B-none.gguf`, which has none:" in text
    assert served(text)[2:4] == [
        LOCAL.format("Qwen3.5-4B-none.gguf mtp-Qwen3.5-4B-Q8_0.gguf"),
        f"llama-server -m Qwen3.5-4B-none.gguf {drafting.replace(' --spec-type', ' -fa on --spec-type')}",
    ]
    text = make(result("BF16"), SIDECAR)
    assert "It is for a GGUF of this model that has none, as MODEL:" in text
    assert served(text)[2:4] == [
        LOCAL.format("mtp-Qwen3.5-4B-Q8_0.gguf"),
        f"llama-server -m MODEL {drafting}",
    ]


def test_ollama_gets_a_file_that_it_loads_or_no_command() -> None:
    text = make()
    assert "issue 16282" in text and "ollama run" not in text
    text = make(result(), result("none", heads=0))
    assert "16282" not in text and "ollama run hf.co/Someone/Qwen3.5-4B-MTP-GGUF:none\n" in text
    text = make(result(heads=0, head="none"))
    assert "16282" not in text and "ollama run hf.co/Someone/Qwen3.5-4B-MTP-GGUF:IQ4_XS\n" in text
    text = make(
        result("Q4_0"), result("Q4_0-headless", heads=0)
    )  # the tag Q4_0 is that of the second too
    assert "give Lemonade and LM Studio the file itself." in text and served(text)[1:] == [
        "ollama run hf.co/Someone/Qwen3.5-4B-MTP-GGUF:Q4_0-headless"
    ]
    parts = [{"name": f"Qwen3.5-4B-BF16-0000{i}-of-00002.gguf"} for i in (1, 2)]
    text = make(result("BF16", file="Qwen3.5-4B-BF16", files=parts))
    assert "ollama run" not in text and "Ollama does not load a model in several files." in text
    assert (
        "- `Qwen3.5-4B-BF16/Qwen3.5-4B-BF16-00002-of-00002.gguf`" in text
        and ":BF16 --spec-type" in text
    )


NAMES = [
    "X-Q4_K_M.gguf",
    "X-Q4_K_M-injected.gguf",
    "X-Q8_0.gguf",
    "mtp-X-IQ4_NL.gguf",
    "mmproj-X-F16.gguf",
]
NAMES += [f"X-{word}Q2_K.gguf" for word in ("imatrix", "mtp-", "eagle3-", "dflash-", "dspark-")]
NAMES += ["X-Q3_K.GGUF", "mtp-folder/X-MTP-Q5_K.gguf"]


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
        ("Q5_K", "mtp-folder/X-MTP-Q5_K.gguf"),  # by the name of the file alone, as it is written
    ],
)
def test_a_tag_is_resolved_as_llama_cpp_does(tag: str, name: str | None) -> None:
    assert serving.resolve(tag, NAMES) == name


def test_a_file_that_no_tag_names_is_named_itself() -> None:
    text = make(result("Q4_K_M", bits_per_weight=4.0), result("Q4_K_M-injected"))
    assert (
        "-hf Someone/Qwen3.5-4B-MTP-GGUF --hf-file Qwen3.5-4B-Q4_K_M.gguf --spec-type" in text
        and "lemonade pull" not in text
    )


def test_names_are_shown_and_never_markup() -> None:
    text = make(
        name="a|b `x` <b>[c](d)",
        source={"path": "a|b `x` <b>[c](d)"},
        publish={"repo": "Some/Name", "private": True},
    )
    assert (
        "<b>" not in text.replace("`a|b x <b>[c](d)`", "")
        and r"a\|b \`x\` &lt;b&gt;\[c\](d)" in text
    )


def test_every_architecture_has_its_runtimes() -> None:
    """A build if and only if the pinned llama.cpp, which is newer than all of them, drafts with it."""
    known = {entry.gguf: entry.drafts for entry in architectures.ARCHITECTURES.values()}
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


def test_the_recipe_is_the_configurations() -> None:
    recipe = make().split("```yaml\n")[1].split("```")[0]
    assert yaml.safe_load(recipe) == {"variants": {"BF16": {}, "IQ4_XS": {"head": "Q8_0"}}}
