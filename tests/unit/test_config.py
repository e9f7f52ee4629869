"""config.yaml is strict: a mistake is refused with the path of its key and what would be right."""

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from conftest import ROOT
from jsonschema import Draft202012Validator
from mtpforge.errors import ConfigError
from mtpforge.rules import config_checks, schema
from mtpforge.rules.build import Build
from mtpforge.rules.config import Config, Model, parse
from mtpforge.rules.fields import Entry
from mtpforge.rules.local_paths import LocalPath
from mtpforge.rules.variant import HubGguf, ImatrixText, OwnBase, Variant
from pydantic import Field, TypeAdapter

REVISION = "0" * 40
HUB = {"repo": "Owner/Name", "revision": REVISION}


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def config(model: dict[str, Any] | None = None, **variant: Any) -> dict[str, Any]:
    entry = {"source": HUB, "variants": {"Q4_K_M": variant}, **(model or {})}
    return {"models": {"m": entry}}


def entries() -> set[type[Entry]]:
    """All kinds of entries."""
    found = {Config}
    pending: list[type[Entry]] = [Entry]
    while pending:
        subclasses = pending.pop().__subclasses__()
        found |= {*subclasses}
        pending += subclasses
    return found


def test_the_configuration_of_the_repository_is_valid() -> None:
    build = Build(yaml.safe_load((ROOT / "config.yaml").read_text()))
    assert len(build.files()) == 12
    assert "results/tiny-qwen3.5/tiny-qwen3.5-Q4_K_M-auto.gguf" in build.files()
    others = build.config.models.keys() - {model.key for model in build.config.chosen}
    assert {"example-qwen3.5-4b", "example-qwen3.5-35b-a3b"} <= others


def test_the_schema_for_editors_is_current() -> None:
    written = (ROOT / "docs/config.schema.json").read_text()
    assert written == schema.json_schema(), "run: make docs"
    first = (ROOT / "config.yaml").read_text().splitlines()[0]
    assert first == "# yaml-language-server: $schema=docs/config.schema.json"


def test_the_schema_agrees_with_the_models(bad: list[dict[str, Any]]) -> None:
    """An independent validator accepts what is right, and refuses most of what is wrong."""
    validator = Draft202012Validator(json.loads(schema.json_schema()))
    validator.validate(yaml.safe_load((ROOT / "config.yaml").read_text()))
    refused = [entry for entry in bad if not validator.is_valid(entry)]
    assert len(refused) > len(bad) / 2


def test_every_key_is_described_in_a_sentence() -> None:
    assert len(entries()) > 12
    for entry in entries():
        assert entry.__doc__
        for name, field in entry.model_fields.items():
            text = field.description or ""
            assert text[:1].isupper() and text.endswith("."), f"{entry.__name__}.{name}: {text}"


def test_defaults() -> None:
    model = parse(config()).models["m"]
    assert (model.key, model.base_name, model.converter) == ("m", "Name", "mtpforge")
    assert (model.min_acceptance, model.max_acceptance_drop) == (0.1, 0.2)
    assert (model.measure, model.publish, model.sidecar) == (None, None, None)
    variant = model.variants["Q4_K_M"]
    assert (variant.name, variant.file_type, variant.head_type) == ("Q4_K_M", "Q4_K_M", "Q8_0")
    assert variant.recipe == {} and not variant.foreign and not variant.unquantized


def test_entries_are_typed() -> None:
    base = {**HUB, "file": "b.gguf"}
    variants = {"a": {"base": base}, "b": {"base": {"type": "Q4_0"}}, "BF16": {}}
    variants["Q4_0"] = {"imatrix": {"text": "a.txt"}, "head": "none"}
    model = parse(config({"variants": variants})).models["m"]
    assert model.variants["a"].base == HubGguf(**base) and model.variants["a"].foreign
    assert model.variants["b"].base == OwnBase(type="Q4_0")
    assert model.variants["b"].file_type == "Q4_0"
    assert model.variants["BF16"].head_type == "BF16" and model.variants["BF16"].unquantized
    assert model.variants["Q4_0"].imatrix == ImatrixText(text="a.txt")
    assert model.variants["Q4_0"].head_types is None and model.variants["Q4_0"].part == "trunk"


def test_a_head_has_types_by_pattern() -> None:
    exceptions = {"eh_proj": "Q8_0", "attn_.*": "Q6_K"}
    variant = parse(config(head={"type": "Q4_K", "tensors": exceptions})).models["m"]
    head = variant.variants["Q4_K_M"].head_types
    assert head and head.type == "Q4_K" and list(head.tensors.items()) == list(exceptions.items())


def test_a_recipe_by_name_is_the_recipe() -> None:
    recipe = {"ffn_": "Q4_K", "attn_": "Q6_K"}
    named = parse({**config(tensors="mix"), "recipes": {"mix": recipe, "other": {"a": "Q8_0"}}})
    assert named.models["m"].variants["Q4_K_M"].recipe == recipe
    assert parse(config(tensors=recipe)).models["m"].variants["Q4_K_M"].recipe == recipe


def test_types_that_need_an_importance_matrix_are_allowed_with_one() -> None:
    imatrix = {"text": "tests/checkpoints/held-out.txt"}
    mixed = {"type": "Q4_0", "tensors": {"a": "IQ3_XXS"}, "imatrix": imatrix}
    Build(config({"variants": {"IQ2_M": {"imatrix": imatrix}, "a": mixed}}))


def test_forms_that_need_no_correction() -> None:
    model = parse(config({"source": {"path": "models/Name/"}, "variants": {"Q8_0": None}}))
    assert model.models["m"].base_name == "Name"
    assert model.models["m"].variants["Q8_0"].head_type == "Q8_0"


def test_only_models_that_are_built_need_their_files() -> None:
    other = {"source": {"path": "no/such"}, "variants": {"BF16": {}}}
    models = {**config()["models"], "other": other}
    assert Build({"models": models, "build": ["m"]}).files() == ["results/m/Name-Q4_K_M.gguf"]
    with pytest.raises(ConfigError, match="models/other/source/path: no such folder"):
        Build({"models": models, "build": "all"})


def test_a_low_bit_head_is_warned_of_once(capsys: pytest.CaptureFixture[str]) -> None:
    Build(config(head={"type": "Q8_0", "tensors": {"ffn": "IQ3_S"}}))
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and "models/m/variants/Q4_K_M/head: a head at IQ3_S" in lines[0]
    assert "use Q4_K or better" in lines[0]
    Build(config(head="Q4_K"))
    assert capsys.readouterr().err == ""
    assert config_checks.low_bit_heads(parse({**config(head="IQ3_S"), "build": []})) == []


def test_a_text_that_is_measured_and_calibrated_on_is_warned_of(
    capsys: pytest.CaptureFixture[str],
) -> None:
    held_out, own = "workflow/texts/held-out.txt", {"text": "tests/checkpoints/held-out.txt"}
    variants = {"Q4_0": {"imatrix": {"text": f"./{held_out}"}}, "Q8_0": {"imatrix": own}}
    Build(config({"measure": {"text": "default"}, "variants": variants}))
    (line,) = capsys.readouterr().err.splitlines()
    assert f"variants/Q4_0/imatrix/text: {held_out} is also the text that is measured" in line


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        (
            {"variants": {"a": {"base": {"path": "no.gguf"}}}},
            "m/variants/a/base/path: no such file",
        ),
        (
            {"variants": {"a": {"base": {"path": "b-00001-of-00002.gguf"}}}},
            "m/variants/a/base/path: no such file: .*b-00002-of-00002.gguf",
        ),
        ({"variants": {"a": {"base": {"path": "pipe.gguf"}}}}, "base/path: not a regular file"),
        (
            {"variants": {"Q8_0": {"imatrix": {"text": "no"}}}},
            "imatrix/text: no such file: no",
        ),
        (
            {"variants": {"Q8_0": {"imatrix": {"text": "."}}}},
            "imatrix/text: no \\*.txt files in .",
        ),
        (
            {"variants": {"Q8_0": {"imatrix": {"path": "no"}}}},
            "imatrix/path: no such file: no",
        ),
        (
            {"variants": {"Q4_0": {"base": {"type": "Q4_0"}, "head_from": {"path": "no"}}}},
            "models/m/variants/Q4_0/head_from/path: no such folder: no",
        ),
        ({"head_from": {"path": "no"}}, "models/m/head_from/path: no such folder: no"),
        ({"measure": {"text": "no"}}, "models/m/measure/text: no such file: no"),
        ({"measure": {"text": "."}}, "models/m/measure/text: not a regular file: ."),
        ({"prompts": "no"}, "models/m/prompts: no \\*.txt files in no"),
    ],
)
def test_every_path_is_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "workflow").symlink_to(ROOT / "workflow")
    (tmp_path / "b-00001-of-00002.gguf").touch()
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ConfigError, match=message):
        Build(config(entry))


def test_programs_are_checked_too() -> None:
    with pytest.raises(ConfigError, match="toolchain/llama_cpp/bin_dir: no such folder: no"):
        Build({**config(), "toolchain": {"llama_cpp": {"bin_dir": "no"}}})


def test_each_key_that_names_a_path_gives_one() -> None:
    for entry in entries():
        for name, field in entry.model_fields.items():
            if name in ("path", "text", "prompts", "bin_dir"):
                kind: Any = TypeAdapter(Annotated[(field.annotation, Field(), *field.metadata)])
                assert isinstance(kind.validate_python("x/y.gguf"), LocalPath), entry


VARIANT = "models/m/variants/Q4_K_M"
MISTAKES: list[tuple[dict[str, Any], str]] = [
    ({}, "models: missing"),
    ({"modles": {}}, "modles: unknown key, did you mean models"),
    ({**config(), "sign": {"key": "k.pem"}}, "sign: unknown key"),
    (config({"sauce": 1}), "models/m/sauce: unknown key, did you mean source"),
    (config(hed="Q8_0"), f"{VARIANT}/hed: unknown key, did you mean head"),
    (config(quality=1), f"{VARIANT}/quality: unknown key: known keys are type, head, tensors,"),
    (config(head="Q8_0", allow_low_bit_head=True), f"{VARIANT}/allow_low_bit_head: unknown key"),
    (
        config({"source": {"repo": "Owner/Name"}}),
        "models/m/source/revision: missing: `python workflow/scripts/add.py Owner/Name` prints the",
    ),
    (
        config({"source": {"repo": "Owner/Name", "revision": "main"}}),
        "models/m/source/revision: 'main' is not a commit hash: `python workflow/scripts/add.py OW",
    ),
    (config({"source": {"repo": "../x", "revision": REVISION}}), "models/m/source/repo: '../x'"),
    (config({"source": {"path": "no/such"}}), "models/m/source/path: no such folder: no/such"),
    (config({"source": {"path": "here/."}}), "models/m/source/path: 'here/.' must not .* end"),
    (
        config({"source": {"path": str(ROOT / "tests/checkpoints/tiny-qwen35")}}),
        r"no such folder: .*/tiny-qwen35; did you mean tiny-qwen3.5\?",
    ),
    *(
        (
            config({"source": {key: text, **pin}} if key else {"source": text}),
            rf"models/m/source.*: .*{said}Owner/Name",
        )
        for key, pin, said in (
            ("path", {}, "did you mean `repo: "),
            ("repo", {"revision": REVISION}, r"did you mean "),
            ("", {}, "such as `{repo: "),
        )
        for text in (
            "https://huggingface.co/Owner/Name",
            "hf.co/Owner/Name/tree/main?x",
            "hf://Owner/Name",
        )
    ),
    *(
        (config({"source": {"repo": f"Owner/Name{more}", "revision": REVISION}}), "mean Owner/Name")
        for more in ("@main", ":Q4_K_M", "/")
    ),
    (config({"publish": "Owner/Name"}), "models/m/publish: .* such as `{repo: Owner/Name}`"),
    (config({"publish": "s3://bucket/x"}), "models/m/publish: .* such as `{url: s3://bucket/x}`"),
    (config({"sidecar": "q8_0"}), r"models/m/sidecar: .*; did you mean Q8_0\?"),
    (config({"split": 48}), "models/m/split: 48: must be a valid string, such as 48G"),
    (config({"split": 48_000_000_000}), "models/m/split: 48000000000: must be .*, such as 48G"),
    (config({"split": 2_500_000}), "models/m/split: 2500000: must be a valid string, such as 2M"),
    (config({"split": 0.5}), "models/m/split: 0.5: must be a valid string, such as 500M"),
    (config({"split": float("inf")}), "models/m/split: inf: must be a valid string, such as 48G"),
    (config({"split": "48GB"}), r"models/m/split: '48GB' .*; did you mean 48G\?"),
    (config({"variants": {"x": {"size": "11 gb", "text": "x"}}}), r"x/size: .* did you mean 11G\?"),
    (config({"variants": {"x": {"size": "q4_k_m", "text": "x"}}}), r"did you mean Q4_K_M\?"),
    (config({"variants": {"iq4_xs": {}}}), r"variants/iq4_xs: .*, did you mean IQ4_XS\?"),
    (config(head="None"), r"'None'; did you mean none\?"),
    ({**config(), "build": ["M"]}, r"build: there is no model 'M': .*; did you mean m\?"),
    (config({"source": {"path": "a{b}/c"}}), "models/m/source/path: 'a{b}/c' must not have braces"),
    (
        config({"source": {"path": "~/here"}}),
        f"models/m/source/path: '~/here': `~` is not expanded: write {Path.home()}/here",
    ),
    (
        config({"source": {"path": "mine.gguf"}}),
        "models/m/source/path: a GGUF is not a checkpoint: .* `base: {path: mine.gguf}`",
    ),
    (
        config({"source": {"repo": "https://hf.co/Owner/Name/tree/main", "revision": REVISION}}),
        "is not a repository: write OWNER/NAME, .*; did you mean Owner/Name",
    ),
    (
        config({"source": {"repo": "Owner/Name", "revision": 12345678}}),
        "models/m/source/revision: 12345678: must be a valid string: put it in quotes",
    ),
    (
        config({"source": {"path": "a", "repo": "A/b"}}),
        "models/m/source: must have exactly one of the keys path, repo",
    ),
    (config({"prompts": "workflow"}), r"models/m/prompts: no \*.txt files in workflow"),
    (config({"tokenizer_pre": "Qwen 3"}), "models/m/tokenizer_pre: 'Qwen 3' is not"),
    (config({"tokenizer_pre": "qwen-35"}), "'qwen-35' is not one of llama.cpp's names of"),
    (config({"tokenizer_pre": "qwen3.5"}), "did you mean qwen35?"),
    (config({"converter": "mine"}), "models/m/converter: 'mine': must be 'mtpforge' or"),
    (config({"norms": "w + 1"}), r"models/m/norms: 'w \+ 1': must be 'w' or 'w-1'"),
    (
        config({"norms": "w", "converter": "llama.cpp"}),
        "models/m/norms: llama.cpp's converter always reads w - 1: remove it",
    ),
    (
        config({"variants": {"mtp-Q8_0": {}}}),
        "models/m/variants/mtp-Q8_0: llama.cpp would not find Name-mtp-Q8_0.gguf",
    ),
    (
        config({"variants": {"Q4_0-imatrix": {}}}),
        "would not find Name-Q4_0-imatrix.gguf in a repository",
    ),
    (config({"min_acceptance": 0}), "models/m/min_acceptance: 0: must be greater than or equal"),
    (config({"min_acceptance": "a"}), "models/m/min_acceptance: 'a': must be a valid number"),
    (config({"pieces": 0}), "models/m/pieces: 0: must be greater than"),
    (config({"mmproj": "yes"}), "models/m/mmproj: 'yes': must be true or false"),
    (config({"measure": None}), "models/m/measure: empty: remove the key"),
    (config({"variants": {}}), "models/m/variants: must not be empty"),
    (
        config({"variants": ["Q4_K_M", "Q8_0"]}),
        "models/m/variants: .* must be a mapping, such as `Q4_K_M: {}`",
    ),
    (
        config({"variants": [{"Q4_K_M": {"head": "Q8_0"}}, {"Q8_0": {}}]}),
        "models/m/variants: .* must be a mapping: leave out the dash before `Q4_K_M`",
    ),
    (config({"variants": {"q4_k_m": {}}}), "type 'q4_k_m', did you mean Q4_K_M"),
    (config({"variants": {"UD-Q4_K_XL": {}}}), "type 'UD-Q4_K_XL', did you mean Q4_K_M"),
    (config({"variants": {"a/b": {}}}), "models/m/variants/a/b: 'a/b' is not a variant's name"),
    (
        {"models": {"My Model": config()["models"]["m"]}},
        "models/My Model: 'My Model' is not a model's name: .*; did you mean my-model",
    ),
    (
        config({"variants": {"Q9_X": {}}}),
        "models/m/variants/Q9_X: unknown quantization type 'Q9_X': llama.cpp has",
    ),
    (config(type="Q4KM"), f"{VARIANT}/type: unknown quantization type 'Q4KM'"),
    (config(head="Q7"), f"{VARIANT}/head: unknown tensor type 'Q7'"),
    (config(head="q8_0"), f"{VARIANT}/head: unknown tensor type 'q8_0', did you mean Q8_0"),
    (config(head=False), f"{VARIANT}/head: False: .*; `none` leaves the head out"),
    (config(head={"type": "none"}), f"{VARIANT}/head/type: unknown tensor type 'none'"),
    (config(head={"tensors": {"ffn": "Q4_K"}}), f"{VARIANT}/head/type: missing"),
    (config(head={"type": "Q8_0", "tensors": {}}), f"{VARIANT}/head/tensors: must not be empty"),
    (
        config(head={"type": "Q8_0", "tensors": {"a=b": "Q4_K"}}),
        f"{VARIANT}/head/tensors/a=b: .* without white space or '='",
    ),
    (config(replace_head=True), f"{VARIANT}/replace_head: there is no base"),
    (config(tensors={"attn_.*": "Q4_K_M"}), f"{VARIANT}/tensors/attn_.*: unknown tensor type"),
    (config(tensors={"attn_(": "Q4_K"}), "tensor pattern 'attn_\\('"),
    (config(tensors={"attn _q": "Q4_K"}), "without white space"),
    (config(tensors={"ATTN": "Q4_K"}), "lower case"),
    (config(tensors="mix"), f"{VARIANT}/tensors: there is no recipe 'mix': recipes has none"),
    (
        {**config(tensors="m"), "recipes": {"a": {"a": "Q8_0"}, "b": {"a": "Q8_0"}}},
        "no recipe 'm': recipes has a, b",
    ),
    (
        {**config(), "recipes": {"mix": {"attn (": "Q8_0"}}},
        "recipes/mix/attn \\(: tensor pattern 'attn \\(': must be",
    ),
    (
        {**config(), "recipes": {"mix": {"attn_": "Q4_K_M"}}},
        "recipes/mix/attn_: unknown tensor type 'Q4_K_M'",
    ),
    ({**config(), "recipes": {"mix": {}}}, "recipes/mix: must not be empty"),
    (config(tensors={"attn_": 4}), f"{VARIANT}/tensors/attn_: 4: must be a valid string"),
    (
        config(tensors={"attn_": "IQ2_S"}),
        f"{VARIANT}/imatrix: missing, and IQ2_S cannot be quantized without: give one, or use an",
    ),
    (config({"variants": {"Q2_K_S": {}}}), "variants/Q2_K_S/imatrix: missing, and Q2_K_S cannot"),
    (config(base={"type": "IQ3_XS"}), "IQ3_XS cannot be quantized without: use another type"),
    (
        config(imatrix={"txt": "a"}),
        f"{VARIANT}/imatrix: must have exactly one of the keys text, path, repo",
    ),
    (config(base={"type": "Q4_K_M"}, tensors={"a": "Q8_0"}), "a base is already quantized"),
    (config(base={"type": "Q4_K_M"}, imatrix={"path": "x"}), "/imatrix: nothing is quantized"),
    (config({"variants": {"BF16": {"imatrix": {"path": "x"}}}}), "/imatrix: nothing is quantized"),
    (
        config(base={"repo": "A/b", "file": "b.gguf", "revision": "main"}),
        f"{VARIANT}/base/revision: 'main' is not a commit hash: https://huggingface",
    ),
    *(
        (
            config(base={"repo": "A/b", "file": file, "revision": REVISION}),
            f"{VARIANT}/base/file: {re.escape(repr(file))} is not a GGUF of a repository",
        )
        for file in (
            "../b.gguf",
            "a/../b.gguf",
            "/b.gguf",
            "a//b.gguf",
            "./b.gguf",
            "a\\b.gguf",
            "a/.gguf",
            "b.gguf/",
            "b.gguf.part1",
            "b.gguf.part1of",
            "a/b.gguf/c",
            "b.bin.part1of2",
            "a/b.gguf\n",
        )
    ),
    (
        config(base="b.gguf"),
        f"{VARIANT}/base: must have exactly one of .*, such as `{{path: b.gguf}}`",
    ),
    (config(base={"path": "b.bin"}), f"{VARIANT}/base/path: 'b.bin' is not a GGUF"),
    (config(base={"path": "b.gguf", "in_place": True}), f"{VARIANT}/base/in_place: unknown key"),
    *(
        (
            config(imatrix={"repo": "A/b", "file": file, "revision": REVISION}),
            f"{VARIANT}/imatrix/file: {re.escape(repr(file))} is not a file of a repository",
        )
        for file in ("../c", "c/../d", "/c", "c//d", "c\\d", "c/", "./c", "")
    ),
    (config(base={"type": "Q4"}), f"{VARIANT}/base/type: unknown quantization type 'Q4'"),
    (
        config({"variants": {"BF16": {"head": "Q8_0"}}}),
        "models/m/variants/BF16/head: BF16 is not quantized, so its head must be BF16 or none",
    ),
    (
        config({"variants": {"BF16": {"tensors": {"a": "Q8_0"}}}}),
        "models/m/variants/BF16/tensors: BF16 is not quantized, so a recipe has no effect",
    ),
    (
        config({"variants": {"NVFP4": {}}}),
        "models/m/variants/NVFP4: only llama.cpp's converter writes NVFP4, from a checkpoint",
    ),
    (
        config({"converter": "llama.cpp", "variants": {"NVFP4": {"head": "Q8_0"}}}),
        "models/m/variants/NVFP4/head: NVFP4 is not quantized, so its head must be BF16 or none",
    ),
    (
        config({"converter": "llama.cpp"}, base={"type": "NVFP4"}),
        f"{VARIANT}/base: llama-quantize cannot make NVFP4",
    ),
    (
        config(head="none", base={"type": "Q4_K_M"}),
        f"{VARIANT}/head: `none` leaves the head out, but",
    ),
    (
        config({"sidecar": "Q4_K_M"}),
        "models/m/sidecar: a sidecar cannot have type 'Q4_K_M': use one of F32, F16, BF16, Q8_0",
    ),
    (config({"sidecar": "IQ3_S"}), "models/m/sidecar: a sidecar cannot have type 'IQ3_S'"),
    (config({"split": "48"}), "models/m/split: '48' is not a size"),
    (config({"split": "48 GB"}), "models/m/split: '48 GB' is not a size: .*; did you mean 48G"),
    (config(split="1.5G"), f"{VARIANT}/split: '1.5G' is not a size"),
    ({**config(), "build": ["n"]}, "build: there is no model 'n': models has m"),
    ({**config(), "build": ["m", "m"]}, "build: 'm' is listed twice"),
    ({**config(), "build": "m"}, "build: 'm' is not a list of models"),
]


@pytest.fixture
def bad() -> list[dict[str, Any]]:
    return [mistake for mistake, _ in MISTAKES]


@pytest.mark.parametrize(("bad_config", "message"), MISTAKES)
def test_a_mistake_is_refused_with_its_path(bad_config: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"^config.yaml: .*{message}") as caught:
        Build(bad_config)
    assert len(str(caught.value).splitlines()) == 1


def test_names_of_a_build_are_plain(tmp_path: Path) -> None:
    (tmp_path / "a\nb").mkdir()
    source = {"path": str(tmp_path / "a\nb")}
    with pytest.raises(ConfigError, match=r"models/m/source/path: .* rename it"):
        Build(config({"source": source}))


def test_two_outputs_of_one_name_are_refused() -> None:
    variants = {"Q8_0": {}, "Q8_0.gguf": {"type": "Q8_0", "split": "2M"}}
    with pytest.raises(ConfigError, match=r"would be results/m/Name-Q8_0\.gguf: rename one"):
        Build(config({"variants": variants}))


def test_models_and_variants_are_independent() -> None:
    """YAML anchors make several models share one mapping."""
    entry = config(tensors="mix")["models"]["m"]
    found = parse({"models": {"a": entry, "b": entry}, "recipes": {"mix": {"attn_": "Q6_K"}}})
    a, b = found.models["a"], found.models["b"]
    assert isinstance(a, Model) and isinstance(a.variants["Q4_K_M"], Variant)
    assert (a.key, b.key) == ("a", "b") and a.variants["Q4_K_M"] is not b.variants["Q4_K_M"]
    assert entry["variants"]["Q4_K_M"] == {"tensors": "mix"}
