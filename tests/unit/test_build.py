"""config.yaml is strict: a mistake is refused with the path of its key, and defaults are those of the schema."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from conftest import ROOT
from mtpforge.build import Build, _record
from mtpforge.errors import ConfigError

REVISION = "0" * 40


def config(model: dict[str, Any] | None = None, **variant: Any) -> dict[str, Any]:
    entry = {
        "source": {"repo": "Owner/Name", "revision": REVISION},
        "variants": {"Q4_K_M": variant},
        **(model or {}),
    }
    return {"models": {"m": entry}}


def wildcards(variant: str = "Q4_K_M", model: str = "m", kind: str = "quantized") -> Any:
    return SimpleNamespace(model=model, variant=variant, base="Name", kind=kind, name=variant)


def test_the_configuration_of_the_repository_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    build = Build(yaml.safe_load((ROOT / "config.yaml").read_text()))
    assert (
        len(build.files()) == 12
        and "results/tiny-qwen3.5/tiny-qwen3.5-IQ3_S-mix.gguf" in build.files()
    )
    assert {"qwen3.5-4b", "qwen3.5-35b-a3b"} <= build.models.keys() - set(build.chosen)


def test_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    build = Build(config())
    assert build.files() == ["results/m/Name-Q4_K_M.gguf"]
    assert build.file_type(wildcards()) == "Q4_K_M" and build.head(wildcards()) == "Q8_0"
    assert build.candidate(wildcards()) == "results/m/work/quantized/Q4_K_M.gguf"
    assert build.checkpoint(wildcards()) == f"resources/hub/Owner/Name/{REVISION}/Name"
    assert "--min-acceptance 0.1" in build.verify_options(wildcards())


def test_the_routes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    variants = {
        "BF16": {},
        "mine": {"base": {"type": "Q4_K_M"}},
        "theirs": {"base": {"path": "x/base.gguf"}},
    }
    build = Build(config({"variants": variants}))
    assert build.candidate(wildcards("BF16")) == "results/m/work/convert/all.gguf"
    assert build.head(wildcards("BF16")) == "BF16"
    assert build.candidate(wildcards("mine")) == "results/m/work/injected/mine.gguf"
    assert build.base(wildcards("mine")) == "results/m/work/trunk/Q4_K_M.gguf"
    assert build.base(wildcards("theirs")) == "x/base.gguf"
    assert "--type" not in build.verify_options(wildcards("theirs"))


def test_a_base_on_the_disk_brings_all_its_files_and_may_be_changed_in_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    several, own = {"path": "x/base-00001-of-00002.gguf"}, {"path": "x/own.gguf", "in_place": True}
    build = Build(
        config(
            {"variants": {"several": {"base": several, "replace_head": True}, "own": {"base": own}}}
        )
    )
    assert build.base_if_any(wildcards("several")) == [
        "x/base-00001-of-00002.gguf",
        "x/base-00002-of-00002.gguf",
    ]
    assert build.inject_options(wildcards("several")) == "--replace-head"
    assert (build.base_if_any(wildcards("own")), build.own_base_if_any(wildcards("own"))) == (
        [],
        ["x/own.gguf"],
    )
    assert build.inject_options(wildcards("own")) == "--in-place"
    assert "--trunk results/m/work/injected/own.json" in build.verify_options(wildcards("own"))
    with pytest.raises(
        ConfigError,
        match=r"variants/b/base: \./x/own\.gguf is changed in place for models/m/variants/a",
    ):
        Build(config({"variants": {"b": {"base": {"path": "./x/own.gguf"}}, "a": {"base": own}}}))


def test_a_head_has_types_by_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    build = Build(config(head={"type": "Q4_K", "tensors": {"eh_proj": "Q8_0", "attn_.*": "Q6_K"}}))
    assert build.head(wildcards()) == "Q4_K,eh_proj=Q8_0,attn_.*=Q6_K"
    assert "--type Q4_K_M --head 'Q4_K,eh_proj=Q8_0,attn_.*=Q6_K'" in build.planned_options(
        wildcards()
    )


def test_of_a_checkpoint_that_only_lends_its_head_only_the_head_is_fetched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    theirs = {"repo": "They/Base", "file": "Base-Q4_K_M-00001-of-00002.gguf", "revision": "1" * 40}
    variants: dict[str, Any] = {
        "theirs": {"base": theirs},
        "mine": {"base": {"path": "x/base.gguf"}},
    }
    build = Build(config({"variants": variants}))
    assert build.checkpoint(wildcards("theirs")) == f"resources/hub/Owner/Name/{REVISION}/head/Name"
    assert build.checkpoint_inputs(wildcards("theirs")) == [
        f"resources/hub/Owner/Name/{REVISION}/head.json"
    ]
    place = f"resources/hub/They/Base/{'1' * 40}"
    assert build.base(wildcards("theirs")) == f"{place}/Base/Base-Q4_K_M-00001-of-00002.gguf"
    assert build.base_if_any(wildcards("theirs")) == [
        f"{place}/records/Base-Q4_K_M-0000{i}-of-00002.gguf.json" for i in (1, 2)
    ]
    more_variants = [{**variants, "Q8_0": {}}, {**variants, "a": {"base": {"type": "Q4_0"}}}]
    keys: list[dict[str, Any]] = [{"sidecar": "Q8_0"}, {"mmproj": True}, {"converter": "llama.cpp"}]
    for more in [*({"variants": more} for more in more_variants), *keys]:
        build = Build(config({"variants": variants, **more}))
        assert build.checkpoint(wildcards("theirs")) == f"resources/hub/Owner/Name/{REVISION}/Name"


def test_an_importance_matrix_is_named_by_a_relative_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    build = Build(
        config(imatrix={"repo": "They/Base", "file": "imatrix.dat", "revision": "1" * 40})
    )
    place = f"resources/hub/They/Base/{'1' * 40}"
    assert build.planned_imatrix_option(wildcards()) == f"--imatrix {place}/Base/imatrix.dat"
    assert build.planned_imatrix_if_any(wildcards()) == [f"{place}/records/imatrix.dat.json"]
    build = Build(config(imatrix={"path": "my imatrix.dat"}))
    assert build.planned_imatrix_option(wildcards()) == "--imatrix 'my imatrix.dat'"
    assert build.planned_imatrix_if_any(wildcards()) == ["my imatrix.dat"]
    for kind in ("quantized", "trunk"):
        assert Build(config()).planned_imatrix_option(wildcards(kind=kind)) == ""
        assert Build(config()).planned_imatrix_if_any(wildcards(kind=kind)) == []


def test_an_importance_matrix_of_a_text_is_shared_and_no_two_texts_share_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    texts = ["a/b.txt", "a_b.txt", "a%2Fb.txt", "../a/b.txt", "b.txt", "/a/b.txt", "my text.txt"]
    build = Build(
        config(
            {
                "variants": {
                    f"v{i}": {"type": "Q4_0", "imatrix": {"text": text}}
                    for i, text in enumerate(texts)
                }
            }
        )
    )
    files = [build.planned_imatrix_if_any(wildcards(f"v{i}"))[0] for i in range(len(texts))]
    assert files[0].startswith("results/m/work/imatrix/b-") and len({*files}) == len(texts)
    for text, file in zip(texts, files, strict=True):
        assert build.imatrix_text(SimpleNamespace(text=Path(file).stem)) == text  # type: ignore[arg-type]
        assert Path(file).parent == Path("results/m/work/imatrix")


def test_a_recipe_by_name_is_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipe = {"ffn_": "Q4_K", "attn_": "Q6_K"}
    named = Build({**config(tensors="mix"), "recipes": {"mix": recipe, "other": {"a": "Q8_0"}}})
    assert (
        named.recipe(wildcards())
        == Build(config(tensors=recipe)).recipe(wildcards())
        == json.dumps(recipe)
    )


def test_types_that_need_an_importance_matrix_can_be_had_with_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    imatrix = {"text": "a.txt"}
    Build(
        config(
            {
                "variants": {
                    "IQ2_M": {"imatrix": imatrix},
                    "a": {"type": "Q4_0", "tensors": {"a": "IQ3_XXS"}, "imatrix": imatrix},
                }
            }
        )
    )


def test_a_split_variant_is_a_folder_and_a_variant_decides_for_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    build = Build(
        config(
            {"split": "48G", "sidecar": "Q8_0", "variants": {"BF16": {}, "Q8_0": {"split": "2G"}}}
        )
    )
    assert build.files() == [
        "results/m/Name-BF16",
        "results/m/Name-Q8_0",
        "results/m/mtp-Name-Q8_0.gguf",
    ]
    assert build.split_options(wildcards("BF16")).endswith(" --split 48G")
    assert build.split_options(wildcards("Q8_0")).endswith(" --split 2G")


def test_two_outputs_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=r"would both be results/m/Name-Q8_0\.gguf"):
        Build(config({"variants": {"Q8_0": {}, "Q8_0.gguf": {"type": "Q8_0", "split": "2M"}}}))


def test_what_llama_cpp_converted_is_compared_with_it_or_with_its_digests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    build = Build(
        config(
            {
                "converter": "llama.cpp",
                "variants": {"BF16": {}, "Q8_0": {}, "Q4_0": {"head": "none"}},
            }
        )
    )
    work = "results/m/work/convert"
    assert build.source_option(wildcards("Q8_0")) == f"--reference {work}/all.gguf"
    assert build.source_option(wildcards("Q4_0")) == f"--reference {work}/trunk.gguf"
    assert f"--digests {work}/all.json" in build.verify_options(wildcards("BF16"))
    assert "--digests results/m/work/quantized/Q8_0.json" in build.verify_options(wildcards("Q8_0"))
    assert build.models_of("llama.cpp") == "m" and build.models_of("mtpforge") == "(?!)"


def test_without_a_head_a_variant_is_made_of_the_trunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    build = Build(
        config({"mmproj": True, "variants": {"BF16": {"head": "none"}, "Q4_K_M": {"head": "none"}}})
    )
    assert (
        build.candidate(wildcards("BF16"))
        == build.source(wildcards())
        == "results/m/work/convert/trunk.gguf"
    )
    assert build.unquantized_file(wildcards()) == "results/m/work/convert/trunk.gguf"
    assert build.planned_source(wildcards()) == "results/m/work/convert/trunk.gguf"
    assert "--head" not in build.planned_options(
        wildcards()
    ) and "--head none" in build.verify_options(wildcards())


def test_a_part_alone_is_quantized_without_what_a_variant_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    build = Build(
        config({"sidecar": "Q6_K"}, tensors={"attn_": "Q8_0"}, imatrix={"path": "my.dat"})
    )
    trunk, draft = wildcards("Q4_K_M", kind="trunk"), wildcards("Q6_K", kind="draft")
    assert (
        build.planned_options(trunk) == "--type Q4_K_M"
        and build.planned_options(draft) == "--type Q6_K --head Q6_K"
    )
    assert build.planned_source(trunk) == "results/m/work/convert/trunk.gguf"
    assert build.planned_digests(draft) == "results/m/work/convert/draft.json"
    for part in (trunk, draft):
        assert build.planned_recipe_if_any(part) == build.planned_imatrix_if_any(part) == []
    assert (
        build.planned_name_option(trunk) == ""
        and build.planned_name_option(draft) == "--also results/m/mtp-Name-Q6_K.gguf"
    )
    assert "--tensors results/m/work/recipes/Q4_K_M.yaml" in build.planned_options(wildcards())
    kept = "results/m/work/manifests/quantized/Q4_K_M.gguf"
    assert (
        build.planned_name_option(wildcards())
        == f"--also results/m/Name-Q4_K_M.gguf results/m/Name-Q4_K_M --keep {kept}"
    )


def test_a_base_that_is_made_here_lies_in_what_is_injected_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Snakemake deletes the base before it is made anew: its tensors are then taken from there."""
    monkeypatch.chdir(ROOT)
    variants = {"inj": {"base": {"type": "Q4_K_M"}, "head": "Q8_0"}, "Q4_K_M": {}}
    build = Build(config({"variants": variants}))
    work, published = "results/m/work", "results/m/Name-inj.gguf results/m/Name-inj"
    assert (
        build.planned_name_option(wildcards("Q4_K_M", kind="trunk"))
        == f"--also {work}/injected/inj.gguf {published}"
    )


def test_pieces_are_those_of_the_configuration_or_of_the_plan(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(ROOT)
    asked = list[dict[str, str]]()

    def planned(**names: str) -> Any:
        asked.append(names)
        (tmp_path / "plan.pieces").write_text("3\n")
        return SimpleNamespace(output=SimpleNamespace(pieces=str(tmp_path / "plan.pieces")))

    snakemakes = SimpleNamespace(plan=SimpleNamespace(get=planned))
    model = {"variants": {"IQ3_S": {}, "own": {"type": "Q8_0", "pieces": 2}}}
    build = Build(config(model), snakemakes)
    assert build.pieces(wildcards("own")) == [
        f"results/m/work/pieces/quantized/own/{i}-of-2.json" for i in (1, 2)
    ]
    assert build.pieces(wildcards("IQ3_S", kind="draft")) == [] and not asked
    assert build.pieces(wildcards("IQ3_S")) == [
        f"results/m/work/pieces/quantized/IQ3_S/{i}-of-3.json" for i in (1, 2, 3)
    ]
    assert len(build.pieces(wildcards("IQ3_S", kind="trunk"))) == 3
    assert asked == [
        {"model": "m", "kind": kind, "name": "IQ3_S"} for kind in ("quantized", "trunk")
    ]
    build = Build(config({**model, "pieces": 1}), snakemakes)
    assert build.pieces(wildcards("IQ3_S")) == [] and len(build.pieces(wildcards("own"))) == 2
    build = Build(config({**model, "pieces": 5}), snakemakes)
    assert (
        len(build.pieces(wildcards("IQ3_S", kind="trunk"))) == 5
        and build.pieces(wildcards("Q8_0", kind="draft")) == []
    )
    assert len(asked) == 2


def test_what_is_published_of_the_configuration_has_no_pieces_but_patterns_of_any_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    build = Build(config(tensors={"pieces": "Q6_K"}, pieces=3))
    file = SimpleNamespace(model="m", stem="Name-Q4_K_M")
    for part in (build.about(wildcards()), build.parameters(file)):  # type: ignore[arg-type]
        variant = json.loads(part)["variants"]["Q4_K_M"]
        assert variant["tensors"] == {"pieces": "Q6_K"} and "pieces" not in variant


def test_only_variants_and_types_are_names_of_what_is_quantized(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    names = Build(config({"variants": {"my-mix": {"type": "Q4_0"}}})).names()["name"]
    assert {"my-mix", "IQ3_S"} < set(names) and "another" not in names


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({}, "models"),
        ({"modles": {}}, "modles: unknown key"),
        (config({"sauce": 1}), "models/m/sauce: unknown key: known are source"),
        (config(hed="Q8_0"), "models/m/variants/Q4_K_M/hed: unknown key: known are type, head"),
        (config({"source": {"repo": "Owner/Name"}}), "models/m/source: 'revision' is a required"),
        (
            config({"source": {"repo": "Owner/Name", "revision": "main"}}),
            "models/m/source/revision: 'main' is no full commit",
        ),
        (config({"source": {"repo": "../x", "revision": REVISION}}), "models/m/source/repo"),
        (config({"source": {"path": "no/such"}}), "models/m/source/path: no such folder: no/such"),
        (config({"prompts": "workflow"}), r"models/m/prompts: no \*.txt files in workflow"),
        (
            config({"variants": {"mtp-Q8_0": {}}}),
            "models/m/variants/mtp-Q8_0: llama.cpp would not find Name-mtp-Q8_0.gguf",
        ),
        (
            config({"variants": {"Q4_0-imatrix": {}}}),
            "would not find Name-Q4_0-imatrix.gguf in a repository",
        ),
        (config({"min_acceptance": 0}), "models/m/min_acceptance: 0 is less than"),
        (config({"variants": {}}), "models/m/variants"),
        (config({"variants": {"a/b": {}}}), "models/m/variants: 'a/b' does not match"),
        (
            config({"variants": {"Q9_X": {}}}),
            "models/m/variants/Q9_X: unknown quantization type 'Q9_X': llama.cpp has",
        ),
        (config(type="Q4KM"), "models/m/variants/Q4_K_M: unknown quantization type 'Q4KM'"),
        (config(head="Q7"), "models/m/variants/Q4_K_M: unknown tensor type 'Q7'"),
        (config(head="IQ3_S"), "drafts badly: take Q4_K or better"),
        (
            config(head={"type": "Q8_0", "tensors": {"ffn": "IQ3_S"}}),
            "drafts badly: take Q4_K or better",
        ),
        (
            config(head={"type": "Q8_0", "tensors": {"a,b": "Q4_K"}}),
            "variants/Q4_K_M/head/tensors: 'a,b' does not match",
        ),
        (
            config(head={"tensors": {"ffn": "Q4_K"}}),
            "variants/Q4_K_M/head: 'type' is a required property",
        ),
        (
            config(base={"path": "a-00001-of-00002.gguf", "in_place": True}),
            "none can be changed in place",
        ),
        (config(base={"type": "Q4_0"}, head={"type": "none"}), "head: none: a base is there"),
        (config(replace_head=True), "replace_head: there is no base"),
        (config(tensors={"attn_.*": "Q4_K_M"}), "unknown tensor type 'Q4_K_M'"),
        (config(tensors={"attn_(": "Q4_K"}), "is no regular expression"),
        (config(tensors={"attn _q": "Q4_K"}), "without white space"),
        (config(tensors={"ATTN": "Q4_K"}), "lower case"),
        (
            config(tensors="mix"),
            "models/m/variants/Q4_K_M/tensors: there is no recipe 'mix': recipes has none",
        ),
        (
            {**config(tensors="m"), "recipes": {"a": {"a": "Q8_0"}, "b": {"a": "Q8_0"}}},
            "no recipe 'm': recipes has a, b",
        ),
        (
            {**config(), "recipes": {"mix": {"attn (": "Q8_0"}}},
            "recipes/mix: tensor pattern 'attn \\(': must be",
        ),
        (
            {**config(), "recipes": {"mix": {"attn_": "Q4_K_M"}}},
            "recipes/mix: unknown tensor type 'Q4_K_M'",
        ),
        ({**config(), "recipes": {"mix": {}}}, "recipes/mix: .* non-empty"),
        (
            config(tensors={"attn_": 4}),
            "models/m/variants/Q4_K_M/tensors/attn_: 4 is not of type 'string'",
        ),
        (
            config(tensors={"attn_": "IQ2_S"}),
            "Q4_K_M: imatrix: IQ2_S cannot be quantized without .*: name one, or take another",
        ),
        (
            config({"variants": {"Q2_K_S": {}}}),
            "models/m/variants/Q2_K_S: imatrix: Q2_K_S cannot be quantized without",
        ),
        (
            config(base={"type": "IQ3_XS"}),
            "imatrix: IQ3_XS cannot be quantized without an importance matrix: take another type",
        ),
        (config(imatrix={"txt": "a"}), "models/m/variants/Q4_K_M/imatrix"),
        (
            config(base={"type": "Q4_K_M"}, tensors={"a": "Q8_0"}),
            "tensors: a base is already quantized",
        ),
        (
            config(base={"type": "Q4_K_M"}, imatrix={"path": "x"}),
            "imatrix: nothing is quantized here",
        ),
        (
            config({"variants": {"BF16": {"imatrix": {"path": "x"}}}}),
            "imatrix: nothing is quantized here",
        ),
        (
            config(base={"repo": "A/b", "file": "b.gguf", "revision": "main"}),
            "m/variants/Q4_K_M/base/revision: 'main' is no full",
        ),
        (
            config(base={"repo": "A/b", "file": "../b.gguf", "revision": REVISION}),
            "m/variants/Q4_K_M/base/file",
        ),
        (
            config(imatrix={"repo": "A/b", "file": "c/d", "revision": REVISION}),
            "m/variants/Q4_K_M/imatrix/file",
        ),
        (config(base={"type": "Q4"}), "unknown quantization type 'Q4'"),
        (config({"variants": {"BF16": {"head": "Q8_0"}}}), "BF16 is not quantized"),
        (
            config(head="none", base={"type": "Q4_K_M"}),
            "head: none: a base is there to be given a head",
        ),
        (
            config({"sidecar": "Q4_K_M"}),
            "models/m/sidecar: 'Q4_K_M' is no type for a head alone: F32, F16, BF16, Q8_0",
        ),
        (config({"sidecar": "IQ3_S"}), "models/m/sidecar"),
        (config({"split": "48"}), "models/m/split: '48' does not match"),
        (config(split="1.5G"), "models/m/variants/Q4_K_M/split"),
        ({**config(), "build": ["n"]}, "build: there is no model 'n': models has m"),
    ],
)
def test_a_mistake_is_refused_with_its_path(
    bad: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(ConfigError, match=message) as caught:
        Build(bad)
    assert len(str(caught.value).splitlines()) == 1


def test_a_low_bit_head_can_be_insisted_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert Build(config(head="IQ3_S", allow_low_bit_head=True)).head(wildcards()) == "IQ3_S"


def test_a_fetched_file_that_is_gone_is_said_with_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Snakemake sees the records alone, and a conversion without its tokenizer_config.json would be another one."""
    monkeypatch.chdir(tmp_path)
    source, folder = (
        {"repo": "Owner/Name", "revision": REVISION},
        Path(f"resources/hub/Owner/Name/{REVISION}"),
    )
    record, file = folder / "records/config.json.json", folder / "Name/config.json"
    assert _record(source, "config.json") == str(record)  # not fetched yet
    for path, text in ((record, '{"bytes": 2}'), (file, "{}")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert _record(source, "config.json") == str(record)
    file.write_text("{ }")
    with pytest.raises(
        ConfigError,
        match=r"of another size, though it was fetched: delete .*config\.json\.json and run again",
    ):
        _record(source, "config.json")
    file.unlink()
    with pytest.raises(ConfigError, match="is gone"):
        _record(source, "config.json")
