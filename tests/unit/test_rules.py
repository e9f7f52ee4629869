"""Inputs and parameters that each stage's rules derive from a configuration."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT
from mtpforge.errors import ConfigError
from mtpforge.io.ranges import digest_of
from mtpforge.rules import layout
from mtpforge.rules.build import Build
from mtpforge.rules.fetch import checked_record, local_names
from mtpforge.rules.local_paths import FileOnDisk, TemplatePath, TextPath
from mtpforge.rules.variant import HubRepository

REVISION = "0" * 40
FETCHED = f"resources/hub/Owner/Name/{REVISION}"
WORK = "results/m/work"


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the repository, as if the files that configurations here name were there."""
    monkeypatch.chdir(ROOT)
    for kind in (FileOnDisk, TemplatePath, TextPath):
        monkeypatch.setattr(kind, "problem", lambda path: None)


def config(model: dict[str, Any] | None = None, **variant: Any) -> dict[str, Any]:
    source = {"repo": "Owner/Name", "revision": REVISION}
    return {"models": {"m": {"source": source, "variants": {"Q4_K_M": variant}, **(model or {})}}}


def wildcards(variant: str = "Q4_K_M", kind: str = "quantized", **others: str) -> Any:
    names = {"model": "m", "variant": variant, "base": "Name", "kind": kind, "name": variant}
    return SimpleNamespace(**{**names, **others})


# ── what to make ──


def test_defaults() -> None:
    build = Build(config())
    assert build.files() == ["results/m/Name-Q4_K_M.gguf"]
    assert build.reports() == ["results/m/reports/Name-Q4_K_M.json"]
    assert build.verify.candidate(wildcards()) == f"{WORK}/quantized/Q4_K_M.gguf"
    assert build.fetch.checkpoint(wildcards()) == f"{FETCHED}/Name"
    assert "--min-acceptance 0.1" in build.verify.options(wildcards())


def test_measuring_a_file_does_not_verify_it_again() -> None:
    measured = Build(config({"measure": {"text": "text.txt"}}))
    assert measured.verify.options(wildcards()) == Build(config()).verify.options(wildcards())


def test_the_summary_of_a_run_for_one_model_has_all_that_are_configured() -> None:
    """Those of the run come first, because the end of a run shows ten rows."""
    made = config({"measure": {}})
    made["models"]["n"] = made["models"]["m"]
    made["build"] = ["n"]
    reports, rest = Build(made).summarized().split(" --measurements ")
    assert reports.split() == [f"results/{key}/reports/Name-Q4_K_M.json" for key in "nm"]
    measured = [f"results/{key}/measure/Name-Q4_K_M.json" for key in "nm"]
    empty = ["--compared", "--others", "--coverages"]
    assert rest.split() == [*measured, *empty, "--earlier", "results/m"]


def test_a_split_variant_is_a_folder_and_overrides_the_size() -> None:
    variants = {"BF16": {}, "Q8_0": {"split": "2G"}}
    build = Build(config({"split": "48G", "sidecar": "Q8_0", "variants": variants}))
    files = ["results/m/Name-BF16", "results/m/Name-Q8_0", "results/m/mtp-Name-Q8_0.gguf"]
    assert build.files() == files
    assert build.verify.split_options(wildcards("BF16")).endswith(" --split 48G")
    assert build.verify.split_options(wildcards("Q8_0")).endswith(" --split 2G")


def test_conversion_splits_what_is_published_as_it_is() -> None:
    """Unless another variant publishes the same part whole, or upstream converts."""
    build = Build(config({"split": "48G", "variants": {"BF16": {}, "Q8_0": {"split": "2G"}}}))
    assert build.verify.candidate(wildcards("BF16")) == f"{WORK}/split/all"
    assert build.verify.digests(wildcards("BF16")) == f"{WORK}/split/all.json"
    assert build.quantize.source(wildcards("Q8_0", name="Q8_0")) == f"{WORK}/split/all"
    assert build.convert.unquantized_file(wildcards()) == f"{WORK}/split/all"
    assert build.convert.split_options(wildcards(part="all")) == "--split 48G"
    bare = {"type": "BF16", "head": "none"}
    whole: list[dict[str, Any]] = [
        {"variants": {"BF16": {}, "again": {"type": "BF16", "split": "2G"}}},
        {"variants": {"BF16": {}, "bare": {**bare, "split": "2G"}}},
        {"variants": {"BF16": {"split": "2G"}}, "converter": "llama.cpp"},
    ]
    for entry in whole:
        of_bf16 = Build(config(entry)).verify.candidate(wildcards("BF16"))
        assert of_bf16 == f"{WORK}/convert/all.gguf"
    bare_build = Build(config(whole[1]))
    assert bare_build.verify.candidate(wildcards("bare")) == f"{WORK}/split/trunk"
    assert bare_build.convert.split_options(wildcards(part="trunk")) == "--split 2G"


def test_quantizations_are_named_by_variant_or_type() -> None:
    names = Build(config({"variants": {"my-mix": {"type": "Q4_0"}}})).names()["name"]
    assert {"my-mix", "IQ3_S"} < set(names) and "another" not in names


def test_a_variant_of_another_model_is_refused() -> None:
    build = Build(config())
    with pytest.raises(ConfigError, match="models/m/variants has no Q8_0"):
        build.verify.candidate(wildcards("Q8_0"))
    with pytest.raises(ConfigError, match=r"files of m are named Name-\*, not Other-\*"):
        build.measure.file(wildcards(base="Other"))


# ── fetch ──


def test_only_the_head_is_fetched_if_nothing_else_is_used() -> None:
    file = "Base-Q4_K_M-00001-of-00002.gguf"
    theirs = {"repo": "They/Base", "file": file, "revision": "1" * 40}
    variants: dict[str, Any] = {"a": {"base": theirs}, "b": {"base": {"path": "x/base.gguf"}}}
    build = Build(config({"variants": variants}))
    assert build.fetch.checkpoint(wildcards("a")) == f"{FETCHED}/head/Name"
    assert build.fetch.checkpoint_inputs(wildcards("a")) == [f"{FETCHED}/head.json"]
    folder = f"resources/hub/They/Base/{'1' * 40}"
    assert build.inject.base(wildcards("a")) == f"{folder}/Base/{file}"
    records = [f"{folder}/records/Base-Q4_K_M-0000{i}-of-00002.gguf.json" for i in (1, 2)]
    assert build.inject.base_inputs(wildcards("a")) == records
    assert f"--head-record {FETCHED}/head.json" in build.verify.options(wildcards("a"))
    changes: list[dict[str, Any]] = [
        {"variants": {**variants, "Q8_0": {}}},
        {"variants": {**variants, "c": {"base": {"type": "Q4_0"}}}},
        {"sidecar": "Q8_0"},
        {"mmproj": True},
        {"converter": "llama.cpp"},
    ]
    for change in changes:
        build = Build(config({"variants": variants, **change}))
        assert build.fetch.checkpoint(wildcards("a")) == f"{FETCHED}/Name"


@pytest.mark.parametrize(
    ("file", "first", "fetched"),
    [
        ("Q4/b.gguf", "Q4/b.gguf", ["Q4/b.gguf"]),
        ("a/Q4/b-00001-of-00002.gguf", "a/Q4/b-00001-of-00002.gguf",
         ["a/Q4/b-00001-of-00002.gguf", "a/Q4/b-00002-of-00002.gguf"]),
        ("b.i1-Q4_K_M.gguf.part1of3", "b.i1-Q4_K_M.gguf", ["b.i1-Q4_K_M.gguf"]),
        ("Q4/b.gguf.part2of2", "Q4/b.gguf", ["Q4/b.gguf"]),
    ],
)  # fmt: skip
def test_a_base_in_a_folder_keeps_its_folder_and_parts_become_one_file(
    file: str, first: str, fetched: list[str]
) -> None:
    theirs = {"repo": "They/Base", "file": file, "revision": "1" * 40}
    build = Build(config({"variants": {"a": {"base": theirs}}})).inject
    folder = f"resources/hub/They/Base/{'1' * 40}"
    assert build.base(wildcards("a")) == f"{folder}/Base/{first}"
    records = [f"{folder}/records/{name}.json" for name in fetched]
    assert build.base_inputs(wildcards("a")) == records


def test_a_deleted_fetched_file_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Snakemake only sees records, and conversion differs without tokenizer_config.json."""
    monkeypatch.chdir(tmp_path)
    source, folder = HubRepository(repo="Owner/Name", revision=REVISION), Path(FETCHED)
    record, file = folder / "records/config.json.json", folder / "Name/config.json"
    assert checked_record(source, "config.json") == str(record)  # not fetched yet
    for path, text in ((record, '{"bytes": 2}'), (file, "{}")):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert checked_record(source, "config.json") == str(record)
    file.write_text("{ }")
    with pytest.raises(ConfigError, match=r"of another size: delete .*config\.json\.json and run"):
        checked_record(source, "config.json")
    file.unlink()
    with pytest.raises(ConfigError, match="now gone"):
        checked_record(source, "config.json")


# ── convert ──


def test_upstreams_files_are_compared_with_the_converted_file_or_its_digests() -> None:
    variants = {"BF16": {}, "Q8_0": {}, "Q4_0": {"head": "none"}}
    build = Build(config({"converter": "llama.cpp", "variants": variants}))
    for variant, part in (("Q8_0", "all"), ("Q4_0", "trunk")):
        made = f"{WORK}/convert/{part}"
        known = f"--reference {made}.gguf --recorded {made}.json"
        assert build.verify.source_option(wildcards(variant)) == known
    assert f"--digests {WORK}/convert/all.json" in build.verify.options(wildcards("BF16"))
    assert f"--digests {WORK}/quantized/Q8_0.json" in build.verify.options(wildcards("Q8_0"))
    assert build.convert.models("llama.cpp") == "m" and build.convert.models("mtpforge") == "(?!)"


def test_a_variant_without_a_head_is_made_from_the_trunk() -> None:
    variants = {"BF16": {"head": "none"}, "Q4_K_M": {"head": "none"}}
    build = Build(config({"mmproj": True, "variants": variants}))
    assert build.verify.candidate(wildcards("BF16")) == f"{WORK}/convert/trunk.gguf"
    assert build.convert.unquantized_file(wildcards()) == f"{WORK}/convert/trunk.gguf"
    assert build.quantize.source(wildcards()) == f"{WORK}/convert/trunk.gguf"
    assert "--head" not in build.quantize.options(wildcards())
    assert "--head none" in build.verify.options(wildcards())


# ── quantize ──


def test_a_named_recipe_is_resolved() -> None:
    recipe = {"ffn_": "Q4_K", "attn_": "Q6_K"}
    named = Build({**config(tensors="mix"), "recipes": {"mix": recipe, "other": {"a": "Q8_0"}}})
    assert named.quantize.recipe(wildcards()).splitlines()[0] == json.dumps(recipe)
    assert Build(config(tensors=recipe)).quantize.recipe(wildcards()).splitlines()[0] == json.dumps(
        recipe
    )
    assert Build(config()).quantize.recipe(wildcards()) == "{}"


def test_types_within_a_head_become_a_recipe() -> None:
    exceptions = {"eh_proj": "Q8_0", "attn_.*": "Q6_K"}
    build = Build(config(head={"type": "Q4_K", "tensors": exceptions}))
    assert build.quantize.head_recipe(wildcards()).splitlines()[0] == json.dumps(exceptions)
    options = f"--type Q4_K_M --head Q4_K --head-tensors {WORK}/head-recipes/Q4_K_M.yaml "
    assert build.quantize.options(wildcards()).startswith(options)
    assert f"{WORK}/head-recipes/Q4_K_M.yaml" in build.quantize.recipe_inputs(wildcards())
    assert build.verify.options(wildcards()).startswith("--head Q4_K ")
    for head in ("Q8_0", "none"):
        assert Build(config(head=head)).quantize.head_recipe(wildcards()) == "{}"


def test_an_importance_matrix_has_a_relative_path() -> None:
    build = Build(config(imatrix={"repo": "A/B", "file": "imatrix.dat", "revision": "1" * 40}))
    folder = f"resources/hub/A/B/{'1' * 40}"
    assert build.quantize.imatrix_option(wildcards()) == f"--imatrix {folder}/B/imatrix.dat"
    assert build.quantize.imatrix_inputs(wildcards()) == [f"{folder}/records/imatrix.dat.json"]
    build = Build(config(imatrix={"repo": "A/B", "file": "sub/m.dat", "revision": "1" * 40}))
    assert build.quantize.imatrix_option(wildcards()) == f"--imatrix {folder}/B/sub/m.dat"
    assert build.quantize.imatrix_inputs(wildcards()) == [f"{folder}/records/sub/m.dat.json"]
    build = Build(config(imatrix={"path": "my imatrix.dat"}))
    assert build.quantize.imatrix_option(wildcards()) == "--imatrix 'my imatrix.dat'"
    record = layout.local_record("my imatrix.dat")
    assert build.quantize.imatrix_inputs(wildcards()) == [record]
    for kind in ("quantized", "trunk"):
        assert Build(config()).quantize.imatrix_option(wildcards(kind=kind)) == ""
        assert Build(config()).quantize.imatrix_inputs(wildcards(kind=kind)) == []


def test_variants_share_an_importance_matrix_per_text() -> None:
    texts = ["a/b.txt", "a_b.txt", "a%2Fb.txt", "../a/b.txt", "b.txt", "/a/b.txt", "my text.txt"]
    variants = {f"v{i}": {"type": "Q4_0", "imatrix": {"text": t}} for i, t in enumerate(texts)}
    build = Build(config({"variants": {**variants, "same": variants["v0"]}})).quantize
    files = [build.imatrix_inputs(wildcards(f"v{i}"))[0] for i in range(len(texts))]
    assert files[0].startswith(f"{WORK}/imatrix/b-") and len({*files}) == len(texts)
    assert build.imatrix_inputs(wildcards("same")) == files[:1]
    for text, file in zip(texts, files, strict=True):
        assert build.imatrix_text(wildcards(text=Path(file).stem)) == text
        assert Path(file).parent == Path(f"{WORK}/imatrix")
    with pytest.raises(ConfigError, match="no variant uses an importance matrix other"):
        build.imatrix_text(wildcards(text="other"))


def test_conversations_are_made_of_the_texts_for_a_chat_template(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    folder.mkdir()
    for name in ("b.txt", "a.jsonl", "c.md"):
        (folder / name).touch()
    matrix = {"text": str(folder), "chat": True}
    plain = {"type": "Q4_0", "imatrix": {"text": "default"}}
    build = Build(config({"variants": {"Q4_K_M": {"imatrix": matrix}, "plain": plain}})).quantize
    (made,) = build.imatrix_inputs(wildcards())
    chats = wildcards(text=Path(made).stem)
    assert chats.text.startswith("texts-") and chats.text.endswith("-chat")
    assert build.texts(chats) == [str(folder / name) for name in ("a.jsonl", "b.txt")]
    assert build.imatrix_text(chats) == f"{WORK}/conversations/{chats.text}.txt"
    assert build.imatrix_text_inputs(chats) == [build.imatrix_text(chats)]
    assert build.imatrix_text_options(chats) == "--special"
    given = wildcards(text=Path(build.imatrix_inputs(wildcards("plain"))[0]).stem)
    assert build.imatrix_text(given) == "workflow/texts/calibration.txt" == build.texts(given)[0]
    record = layout.local_record("workflow/texts/calibration.txt")
    assert build.imatrix_text_inputs(given) == [record]
    assert build.imatrix_text_options(given) == f"--text-recorded {record}"
    assert [Path(path).stem for path in build.coverages()] == [chats.text, given.text]


def test_the_card_gets_the_sha256_of_embedded_texts(tmp_path: Path) -> None:
    own = tmp_path / "calibration.txt"
    own.touch()
    variants = {
        "ours": {"type": "Q4_K_M", "imatrix": {"text": "default"}},
        "own": {"type": "Q4_K_M", "imatrix": {"text": str(own)}},
    }
    build = Build(config({"variants": variants, "measure": {"text": "default"}}))
    about = json.loads(build.publish.about(wildcards()))
    digests = {
        name: digest_of(ROOT / f"workflow/texts/{name}.txt") for name in ("calibration", "held-out")
    }
    assert [each.get("sha256") for each in about["matrices"]] == [digests["calibration"], None]
    assert about["texts"] == {"held-out.txt": digests["held-out"]}
    assert str(tmp_path) not in json.dumps(about)


def test_the_texts_of_a_folder_are_recorded_together(tmp_path: Path) -> None:
    for name in ("b.txt", "a.jsonl", "c.md"):
        (tmp_path / name).touch()
    build = Build(config(imatrix={"text": str(tmp_path), "chat": True})).fetch
    of_folder = wildcards(place=layout.place(str(tmp_path)))
    assert build.local_folder(of_folder) == str(tmp_path)
    assert build.local_names(of_folder) == ["a.jsonl", "b.txt"]


def test_a_part_alone_is_quantized_without_recipe_and_imatrix() -> None:
    made = config({"sidecar": "Q6_K"}, tensors={"attn_": "Q8_0"}, imatrix={"path": "my.dat"})
    build = Build(made).quantize
    trunk, draft = wildcards("Q4_K_M", kind="trunk"), wildcards("Q6_K", kind="draft")
    assert build.options(trunk) == "--type Q4_K_M"
    assert build.options(draft) == "--type Q6_K --head Q6_K"
    assert build.source(trunk) == f"{WORK}/convert/trunk.gguf"
    assert build.source_digests(draft) == f"{WORK}/convert/draft.json"
    for part in (trunk, draft):
        assert build.recipe_inputs(part) == build.imatrix_inputs(part) == []
    assert build.names_option(trunk) == ""
    assert build.names_option(draft) == "--also results/m/mtp-Name-Q6_K.gguf"
    assert f"--tensors {WORK}/recipes/Q4_K_M.yaml" in build.options(wildcards())
    also = "--also results/m/Name-Q4_K_M.gguf results/m/Name-Q4_K_M"
    kept = f"--keep {WORK}/manifests/quantized/Q4_K_M.gguf"
    assert build.names_option(wildcards()) == f"{also} {kept}"


def test_tensors_of_an_own_base_are_reused_from_injected_files() -> None:
    """Snakemake deletes the base before it rebuilds it, so tensors come from injected files."""
    build = Build(config({"variants": {"inj": {"base": {"type": "Q4_K_M"}}, "Q4_K_M": {}}}))
    also = f"--also {WORK}/injected/inj.gguf results/m/Name-inj.gguf results/m/Name-inj"
    assert build.quantize.names_option(wildcards("Q4_K_M", kind="trunk")) == also


def test_pieces_are_configured_or_planned(tmp_path: Path) -> None:
    asked = list[dict[str, str]]()

    def planned(**names: str) -> Any:
        asked.append(names)
        (tmp_path / "plan.pieces").write_text("3\n")
        return SimpleNamespace(output=SimpleNamespace(pieces=str(tmp_path / "plan.pieces")))

    def numbers(build: Build, name: str, kind: str = "quantized") -> list[str]:
        paths = build.quantize.pieces(wildcards(name, kind=kind))
        assert all(path.startswith(f"{WORK}/pieces/{kind}/{name}/") for path in paths)
        return [Path(path).name for path in paths]

    checkpoints = SimpleNamespace(plan_types=SimpleNamespace(get=planned))
    model = {"variants": {"IQ3_S": {}, "own": {"type": "Q8_0", "pieces": 2}}}
    build = Build(config(model), checkpoints)
    assert numbers(build, "own") == ["1-of-2.json", "2-of-2.json"]
    assert numbers(build, "IQ3_S", "draft") == [] and not asked
    assert numbers(build, "IQ3_S") == ["1-of-3.json", "2-of-3.json", "3-of-3.json"]
    assert len(numbers(build, "IQ3_S", "trunk")) == 3
    names = {"model": "m", "name": "IQ3_S"}
    assert asked == [{**names, "kind": "quantized"}, {**names, "kind": "trunk"}]
    build = Build(config({**model, "pieces": 1}), checkpoints)
    assert numbers(build, "IQ3_S") == [] and len(numbers(build, "own")) == 2
    build = Build(config({**model, "pieces": 5}), checkpoints)
    assert len(numbers(build, "IQ3_S", "trunk")) == 5 and numbers(build, "Q8_0", "draft") == []
    assert len(asked) == 2


# ── inject ──


def test_the_route_follows_from_the_base() -> None:
    variants = {
        "BF16": {},
        "mine": {"base": {"type": "Q4_K_M"}},
        "theirs": {"base": {"path": "x/base.gguf"}},
    }
    build = Build(config({"variants": variants}))
    assert build.verify.candidate(wildcards("BF16")) == f"{WORK}/convert/all.gguf"
    assert build.verify.candidate(wildcards("mine")) == f"{WORK}/injected/mine.gguf"
    assert build.inject.head_type(wildcards("mine")) == "Q8_0"
    assert build.inject.base(wildcards("mine")) == f"{WORK}/trunk/Q4_K_M.gguf"
    assert build.inject.base(wildcards("theirs")) == "x/base.gguf"
    assert "--type Q4_K_M" in build.verify.options(wildcards("mine"))
    assert "--type" not in build.verify.options(wildcards("theirs"))
    assert f"--trunk {WORK}/injected/theirs.json" in build.verify.options(wildcards("theirs"))
    with pytest.raises(ConfigError, match="BF16 has no base"):
        build.inject.base(wildcards("BF16"))


def test_all_files_of_a_split_base_are_inputs() -> None:
    base = {"path": "x/base-00001-of-00002.gguf"}
    build = Build(config({"variants": {"split": {"base": base, "replace_head": True}}})).inject
    files = ["base-00001-of-00002.gguf", "base-00002-of-00002.gguf"]
    assert build.base_inputs(wildcards("split")) == [layout.local_record(base["path"])]
    assert local_names(base["path"]) == files
    assert build.options(wildcards("split")) == "--replace-head"
    assert Build(config(base={"type": "Q4_0"})).inject.options(wildcards()) == ""


# ── verify ──


def test_acceptance_is_compared_with_bf16_if_the_file_is_quantized_here() -> None:
    variants = {"BF16": {}, "Q8_0": {}, "none": {"type": "Q8_0", "head": "none"}}
    variants |= {"mine": {"base": {"type": "Q4_0"}}, "theirs": {"base": {"path": "x.gguf"}}}
    build = Build(config({"variants": variants})).verify
    compared = [name for name in variants if build.unquantized(wildcards(name))]
    assert compared == ["Q8_0", "mine"]
    assert build.unquantized(wildcards("Q8_0")) == [f"{WORK}/acceptance.json"]
    build = Build(config({"variants": variants, "max_acceptance_drop": 1})).verify
    assert build.unquantized(wildcards("Q8_0")) == []


# ── a chat template ──


def test_a_chat_template_is_an_option_and_an_input() -> None:
    variants = {"Q4_K_M": {}, "theirs": {"base": {"path": "b.gguf"}}}
    source = {"path": "tests/checkpoints/tiny-qwen3.5"}
    model = {"source": source, "chat_template": "a b/t.jinja", "variants": variants}
    build = Build(config({**model, "sidecar": "Q8_0"}))
    record, option = layout.local_record("a b/t.jinja"), "--chat-template 'a b/t.jinja'"
    for part in ("all", "trunk"):
        assert record in build.fetch.conversion_inputs(wildcards(part=part))
        assert option in build.convert.options(wildcards(part=part))
    assert option in build.convert.tokenizer_option(wildcards())
    for name, has in (("Q4_K_M", True), ("theirs", False)):
        assert (record in build.fetch.variant_inputs(wildcards(name))) == has
        assert (option in build.verify.options(wildcards(name))) == has
        stem = layout.stem(build.config.models["m"], name)
        assert (record in build.publish.material_inputs(wildcards(stem=stem))) == has
    assert record in build.fetch.sidecar_inputs(wildcards())
    assert json.loads(build.publish.about(wildcards()))["chat_template"] == "t.jinja"
    assert record in [layout.local_record(path) for path in build.fetch._local.values()]
    only = {"source": source, "chat_template": "t.jinja", "variants": {"x": variants["theirs"]}}
    with pytest.raises(ConfigError, match="m/chat_template: each base keeps its own template"):
        Build(config(only))


# ── publish ──


def test_published_configuration_has_patterns_but_no_pieces() -> None:
    build = Build(config(tensors={"pieces": "Q6_K"}, pieces=3)).publish
    for part in (build.about(wildcards()), build.parameters(wildcards(stem="Name-Q4_K_M"))):
        variant = json.loads(part)["variants"]["Q4_K_M"]
        assert variant["tensors"] == {"pieces": "Q6_K"} and "pieces" not in variant


def test_importance_matrices_are_listed_in_the_order_of_their_coverages() -> None:
    chat = {"text": "b.txt", "chat": True}
    entries = [{"text": "a.txt"}, chat, {"text": "a.txt"}, {"path": "secret/c.gguf"}]
    variants = {f"Q{n}_K": {"type": "Q4_0", "imatrix": each} for n, each in enumerate(entries)}
    publish = Build(config({"variants": variants})).publish
    assert json.loads(publish.about(wildcards()))["matrices"] == [
        {"text": "a.txt", "chat": False}, {"text": "b.txt", "chat": True}, {"path": "c.gguf"},
    ]  # fmt: skip
    assert len(publish.coverages(wildcards())) == 3


def test_an_upload_of_all_that_is_built_renews_the_summary() -> None:
    """If some models are not uploaded, it would build them only for this."""
    mine = config({"publish": {"repo": "Owner/Name"}})
    assert "results/summary.md" in Build(mine).publish.uploads(wildcards())
    mine["models"]["other"] = config()["models"]["m"]
    assert "results/summary.md" not in Build(mine).publish.uploads(wildcards())
    assert Build({"models": {}}).publish.uploads(wildcards()) == []


def test_the_repository_is_known_of_a_model_that_is_quantized_here() -> None:
    pinned = {"repo": "Owner/Name", "revision": REVISION}
    base = {"repo": "Owner/Q", "revision": REVISION, "file": "a-Q4_0.gguf"}
    for source, variant, repo in (
        (pinned, {"type": "Q4_0"}, "Owner/Name"),
        (pinned, {"base": base}, ""),
        ({"path": "tests/checkpoints/tiny-qwen3.5"}, {"type": "Q4_0"}, ""),
    ):
        made = {"models": {"m": {"source": source, "variants": {"x": variant}}}}
        assert Build(made).publish.addable == repo


def published_matrices(*entries: dict[str, object], **keys: object) -> list[str]:
    """The files of a model with a variant for each of these importance matrices."""
    variants = {f"Q{n}_K": {"type": "Q4_0", "imatrix": each} for n, each in enumerate(entries)}
    build = Build(config({"variants": variants, **keys}))
    return build.publish.matrices(wildcards())


def test_a_computed_importance_matrix_is_published_with_its_model() -> None:
    target = {"publish": {"repo": "Owner/Name"}}
    one, chat = {"text": "t/a.txt"}, {"text": "t/a.txt", "chat": True}
    assert published_matrices(one) == []
    assert published_matrices({"path": "given.gguf"}, **target) == []
    alone = ["results/m/Name-imatrix.gguf"]
    assert published_matrices(one, {"path": "given.gguf"}, one, **target) == alone
    assert published_matrices(one, chat, {"text": "texts"}, **target) == [
        "results/m/Name-a-imatrix.gguf",
        "results/m/Name-a-chat-imatrix.gguf",
        "results/m/Name-texts-imatrix.gguf",
    ]
    same = published_matrices(one, {"text": "u/a.txt"}, **target)
    assert len(set(same)) == 2 and all("/Name-a-" in name for name in same)


def test_the_card_is_told_the_name_of_a_published_importance_matrix() -> None:
    variants = {"Q4_0": {"imatrix": {"text": "a.txt"}}, "Q5_0": {"imatrix": {"path": "c.gguf"}}}
    build = Build(config({"variants": variants, "publish": {"url": "s3://models/a"}}))
    assert json.loads(build.publish.about(wildcards()))["matrices"] == [
        {"text": "a.txt", "chat": False, "published": "Name-imatrix.gguf"}, {"path": "c.gguf"},
    ]  # fmt: skip
    made = build.publish.computed(wildcards(stem="Name"))
    assert made == layout.imatrix("m", build.config.models["m"].variants["Q4_0"].imatrix)
    with pytest.raises(ConfigError, match="m publishes no importance matrix"):
        build.publish.computed(wildcards(stem="Other"))


def test_published_configuration_has_no_local_folders(tmp_path: Path) -> None:
    (tmp_path / "secret/Name").mkdir(parents=True)
    source = {"path": str(tmp_path / "secret/Name")}
    variants = {
        "a": {"base": {"path": "secret/base.gguf"}},
        "Q4_0": {"imatrix": {"text": "secret/t"}},
    }
    build = Build(config({"source": source, "variants": variants})).publish
    found = [build.about(wildcards()), build.source(wildcards())]
    for name in variants:
        at = wildcards(stem=f"Name-{name}")
        found += [build.parameters(at), *build.material_options(at).split(" secret/")[:1]]
    assert all("secret" not in text for text in found)
    given = json.loads(found[0])
    assert given["source"] == {"path": "Name"} and given["name"] == "Name"
    assert given["variants"]["Q4_0"]["imatrix"] == {"text": "t", "chat": False}
    record = layout.local_record("secret/t")
    assert build.material_inputs(wildcards(stem="Name-Q4_0")) == [record]
    assert build.material_options(wildcards(stem="Name-Q4_0")).endswith(" secret/t")


def test_layout_of_a_sidecar_and_a_vision_tower() -> None:
    build = Build(config({"sidecar": "Q8_0", "mmproj": True}))
    outputs = list(layout.outputs(build.config.models["m"]))
    stems = ["Name-Q4_K_M", "mtp-Name-Q8_0", "mmproj-Name-F16"]
    assert [output.stem for output in outputs] == stems
    parameters = json.loads(build.publish.parameters(wildcards(stem="mtp-Name-Q8_0")))
    assert parameters["sidecar"] == "Q8_0" and parameters["mmproj"] is True
    assert "variants" not in parameters
    with pytest.raises(ConfigError, match="m has no file Other"):
        build.publish.parameters(wildcards(stem="Other"))


@pytest.mark.parametrize(
    ("file_type", "head"), [("BF16", "BF16"), ("F16", "F16"), ("Q4_K_M", "Q8_0")]
)
def test_the_default_head_of_a_foreign_base_follows_its_declared_type(
    file_type: str, head: str
) -> None:
    build = Build(config({"variants": {file_type: {"base": {"path": "x/base.gguf"}}}}))
    assert build.inject.head_type(wildcards(file_type)) == head


def test_a_head_without_exceptions_is_published_as_it_can_be_configured() -> None:
    """The card's recipe must be accepted by config.yaml again."""
    about = json.loads(Build(config(head={"type": "Q4_K"})).publish.about(wildcards()))
    assert about["variants"]["Q4_K_M"]["head"] == {"type": "Q4_K"}


# ── what a sidecar or a vision tower is run with, if not with BF16 ──


def test_a_sidecar_can_be_run_with_the_smallest_quant() -> None:
    variants = {"BF16": {}, "Q8_0": {}, "Q3_K_M": {"head": "none"}, "found": {"bits": 3.6}}
    build = Build(config({"sidecar": "Q8_0", "variants": variants}))
    file, digests = "results/m/Name-Q3_K_M.gguf", f"{WORK}/quantized/Q3_K_M.json"
    assert build.verify.quant(wildcards()) == [file]
    assert build.verify.quant_digests(wildcards()) == [digests]
    wanted = f"--target {file} --target-recorded {digests}"
    assert build.verify.quant_option(wildcards()) == wanted
    variants["found"]["bits"] = 3.4
    build = Build(config({"sidecar": "Q8_0", "variants": dict(reversed(variants.items()))}))
    assert build.verify.quant(wildcards()) == ["results/m/Name-found.gguf"]


def test_of_two_quants_as_large_the_name_decides() -> None:
    for names in (["Q4_K_S", "Q4_K_M"], ["Q4_K_M", "Q4_K_S"]):
        build = Build(config({"mmproj": True, "variants": {name: {} for name in names}}))
        assert build.verify.quant(wildcards()) == ["results/m/Name-Q4_K_M.gguf"]


@pytest.mark.parametrize(
    "change",
    [
        {"variants": {"BF16": {}, "F16": {}}},
        {"variants": {"Q4_0": {"split": "2G"}}},
        {"variants": {"Q4_0": {}}, "split": "2G"},
        {"variants": {"theirs": {"base": {"path": "base.gguf"}}}},
        {
            "variants": {"Q4_0": {}},
            "publish": {"repo": "O/N", "when": "verified", "delete_after": True},
        },
    ],
    ids=["unquantized", "split", "all split", "another trunk", "deleted"],
)
def test_no_other_file_can_be_run_with_a_sidecar(change: dict[str, Any]) -> None:
    build = Build(config({"sidecar": "Q8_0", **change}))
    assert build.verify.quant(wildcards()) == build.verify.quant_digests(wildcards()) == []
    assert build.verify.quant_option(wildcards()) == ""
