"""`head_from` and `name` in config.yaml: names, inputs and options that follow from them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import ROOT
from mtpforge.errors import ConfigError
from mtpforge.gguf.file_names import file_model, repository_model
from mtpforge.hub.listing import File, Listing
from mtpforge.rules import layout
from mtpforge.rules.build import Build
from mtpforge.rules.local_paths import FileOnDisk

REVISION = "0" * 40
DONOR = {"repo": "Owner/Original", "revision": REVISION}
HEAD = f"resources/hub/Owner/Original/{REVISION}"
FROM = f"--head-from {HEAD}/head/Original --head-recorded {HEAD}/head.json"
BASE = {"repo": "Tuner/My-Tune-GGUF", "revision": "1" * 40, "file": "any.gguf"}
TUNE = {"repo": "Tuner/My-Tune", "revision": "2" * 40}
WORK = "results/m/work"


@pytest.fixture(autouse=True)
def at_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the repository, as if the files that configurations here name were there."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(FileOnDisk, "problem", lambda path: None)


def build(checkpoints: Any = None, **model: Any) -> Build:
    return Build({"models": {"m": model}}, checkpoints)


def wildcards(variant: str = "Q4_K_M", **others: str) -> Any:
    names = {"model": "m", "variant": variant, "base": "My-Tune", "stem": f"My-Tune-{variant}"}
    return SimpleNamespace(**{**names, **others})


def adopted(**model: Any) -> Build:
    """A base from elsewhere with a donor's head."""
    return build(**{"head_from": DONOR, "variants": {"Q4_K_M": {"base": BASE}}, **model})


def tuned(**model: Any) -> Build:
    """A checkpoint that is quantized here, with a donor's head."""
    variants = {"BF16": {}, "Q4_K_M": {}, "bare": {"type": "Q8_0", "head": "none"}}
    return build(**{"source": TUNE, "head_from": DONOR, "variants": variants, **model})


# ── names ──


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("My-Tune-Q4_K_M.gguf", "My-Tune"),
        ("a/My.Tune.i1-IQ3_XXS.gguf", "My.Tune.i1"),
        ("My-Tune-UD-Q4_K_XL-00001-of-00003.gguf", "My-Tune"),
        ("My-Tune.BF16.gguf", "My-Tune"),
        ("my-tune-q8_0.gguf", "my-tune"),
        ("Q4_K_M.gguf", "Q4_K_M"),
        ("Qwen3.5-4B.gguf", "Qwen3.5-4B"),
        ("-Q8_0.gguf", "-Q8_0"),
    ],
)
def test_a_model_is_named_after_its_file(file: str, name: str) -> None:
    assert file_model(file) == name


def test_a_model_is_named_after_the_repository_of_its_quantizations() -> None:
    names = ["Tuner/My-Tune-GGUF", "Tuner/My-Tune-gguf", "Tuner/GGUF", "Tuner/My-Tune"]
    assert list(map(repository_model, names)) == ["My-Tune", "My-Tune", "GGUF", "My-Tune"]


def test_a_file_is_named_after_base_source_or_name() -> None:
    assert adopted().files() == ["results/m/My-Tune-Q4_K_M.gguf"]
    local = {"Q4_K_M": {"base": {"path": "x/Local-Tune-Q4_K_M.gguf"}}}
    assert adopted(variants=local).files() == ["results/m/Local-Tune-Q4_K_M.gguf"]
    assert adopted(name="Mine").files() == ["results/m/Mine-Q4_K_M.gguf"]
    assert adopted(source=DONOR).files() == ["results/m/My-Tune-Q4_K_M.gguf"]
    assert tuned(name="Mine").files()[0] == "results/m/Mine-BF16.gguf"
    both = tuned(source=DONOR, variants={"Q8_0": {}, "Q4_K_M": {"base": BASE}})
    assert both.files() == ["results/m/Original-Q8_0.gguf", "results/m/My-Tune-Q4_K_M.gguf"]
    assert both.names()["base"] == ["My-Tune", "Original"]
    with pytest.raises(ConfigError, match=r"files of m are named My-Tune-\*, not Original-\*"):
        both.verify.candidate(wildcards(base="Original"))


def test_a_snapshot_of_the_cache_is_named_after_its_repository(tmp_path: Path) -> None:
    snapshot = tmp_path / f"models--Owner--Name/snapshots/{REVISION}"
    snapshot.mkdir(parents=True)
    found = build(source={"path": str(snapshot)}, variants={"Q8_0": {}})
    assert found.files() == ["results/m/Name-Q8_0.gguf"]
    texts = [found.publish.about(wildcards("Q8_0")), found.publish.source(wildcards("Q8_0"))]
    assert all('"path": "Name"' in text and REVISION not in text for text in texts)


# ── a base from elsewhere ──


def test_only_base_and_head_are_inputs() -> None:
    made = adopted()
    donor = Path(made.inject.head_file(wildcards())).stem
    assert donor.startswith("Original-")
    assert made.inject.head_file(wildcards()) == f"{WORK}/donors/{donor}.gguf"
    assert made.inject.head_digests(wildcards()) == f"{WORK}/donors/{donor}.json"
    assert made.fetch.donor(wildcards(donor=donor)) == f"{HEAD}/head/Original"
    assert made.fetch.donor_inputs(wildcards(donor=donor)) == [f"{HEAD}/head.json"]
    assert made.fetch.variant_inputs(wildcards()) == [f"{HEAD}/head.json"]
    with pytest.raises(ConfigError, match="no `head_from` is Other"):
        made.fetch.donor(wildcards(donor="Other"))


@pytest.mark.parametrize("source", [{}, {"source": TUNE}, {"source": DONOR}])
def test_the_trunk_is_compared_with_its_base_alone(source: dict[str, Any]) -> None:
    """Whatever the source is: the base was not made from it."""
    verify = adopted(**source, max_acceptance_drop=0.2).verify
    assert verify.source_option(wildcards()) == FROM
    options = verify.options(wildcards())
    assert f"--trunk {WORK}/injected/Q4_K_M.json" in options and "--type" not in options
    assert f"--head-record {HEAD}/head.json" in options and "--unquantized" not in options
    assert verify.unquantized(wildcards()) == []


def test_nothing_is_measured_against_a_bf16_file_that_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("text")
    measure = {"text": str(tmp_path / "t.txt")}
    assert adopted(measure=measure).measure.logits(wildcards()) == []
    variants = {"Q8_0": {}, "Q4_K_M": {"base": BASE}}
    both = tuned(measure=measure, variants=variants).measure
    assert both.logits(wildcards()) == []
    assert both.logits(wildcards("Q8_0")) == [f"{WORK}/logits/reference.bin"]


def test_card_and_provenance_follow_the_base(tmp_path: Path) -> None:
    def listed(**commit: str) -> Any:
        return SimpleNamespace(output=[tmp_path / "files.json"])

    checkpoints = SimpleNamespace(resolve=SimpleNamespace(get=listed))
    publish = adopted(checkpoints=checkpoints).publish
    about = json.loads(publish.about(wildcards()))
    place = {key: BASE[key] for key in ("repo", "revision")}
    assert about["name"] == "My-Tune" and about["source"] is None
    assert (about["bases"], about["donors"]) == ([BASE], [DONOR])
    assert about["injected"] == []
    there = f"resources/hub/Tuner/My-Tune-GGUF/{'1' * 40}"
    assert publish.checkpoint_card(wildcards()) == f"{there}/My-Tune-GGUF/README.md"
    for files, inputs in [({}, []), ({"README.md": 9}, [f"{there}/records/README.md.json"])]:
        entries = {name: File(size, "0" * 40) for name, size in files.items()}
        Listing(place["repo"], place["revision"], entries, {}).write(tmp_path / "files.json")
        assert publish.checkpoint_card_inputs(wildcards()) == inputs
    assert publish.source_list(wildcards()) == [] and publish.source_option(wildcards()) == ""
    records = [f"{HEAD}/head.json", f"{there}/records/any.gguf.json"]
    assert publish.material_inputs(wildcards()) == records
    options = publish.material_options(wildcards())
    assert '"role": "head"' in options and '"role": "base"' in options
    assert json.loads(publish.parameters(wildcards()))["head_from"] == DONOR


def test_the_provenance_names_a_chat_template_of_ones_own(tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text("{{ messages }}")
    publish = tuned(chat_template=str(template), variants={"Q8_0": {}}).publish
    assert '"role": "chat template"' in publish.material_options(wildcards("Q8_0"))
    assert json.loads(publish.parameters(wildcards("Q8_0")))["chat_template"] == "mine.jinja"


def test_the_card_names_the_head_of_every_file() -> None:
    """Also that of a sidecar, and the model's own beside a donor's."""
    bare = {"Q8_0": {"head": "none"}}
    about = json.loads(tuned(sidecar="Q8_0", variants=bare).publish.about(wildcards()))
    assert about["donors"] == [DONOR] and not about["own_head"]
    both = {"Q8_0": {}, "Q4_K_M": {"base": BASE, "head_from": DONOR}}
    about = json.loads(build(source=TUNE, variants=both).publish.about(wildcards()))
    assert about["donors"] == [DONOR] and about["own_head"]
    about = json.loads(tuned(variants=bare).publish.about(wildcards()))
    assert about["donors"] == [] and not about["own_head"]


def test_the_card_names_the_base_of_a_head_of_the_checkpoint() -> None:
    variants = {"Q8_0": {}, "Q6_K": {"base": {"type": "Q6_K"}}, "theirs": {"base": BASE}}
    about = json.loads(build(source=TUNE, variants=variants).publish.about(wildcards()))
    assert (about["bases"], about["injected"]) == ([], [BASE])


def test_a_source_that_nothing_is_made_from_names_nothing() -> None:
    about = json.loads(adopted(source=DONOR).publish.about(wildcards()))
    assert about["name"] == "My-Tune" and about["source"] is None


def test_a_vision_tower_is_not_made_from_a_donor() -> None:
    model = tuned(sidecar="Q8_0", mmproj=True).publish
    assert model.material_inputs(wildcards(stem="mmproj-My-Tune-F16")) == []
    assert model.material_inputs(wildcards(stem="mtp-My-Tune-Q8_0")) == [f"{HEAD}/head.json"]


def test_the_license_of_one_of_several_bases_is_not_taken() -> None:
    other = {**BASE, "repo": "Other/Tune-GGUF"}
    variants = {"a": {"base": BASE}, "b": {"base": other}}
    assert adopted(variants=variants).publish.checkpoint_card(wildcards()) == "none"
    variants["b"] = {"base": {"path": "x.gguf"}}
    assert adopted(variants=variants).publish.checkpoint_card(wildcards()) == "none"


def test_llama_cpps_converter_makes_the_whole_donor() -> None:
    """It cannot convert a head alone."""
    made = adopted(converter="llama.cpp", head_from={"path": "tests/checkpoints/tiny-qwen3.5"})
    file = made.inject.head_file(wildcards())
    assert made.verify.reference(wildcards()) == [file, made.inject.head_digests(wildcards())]
    digests = made.inject.head_digests(wildcards())
    assert made.verify.source_option(wildcards()) == f"--head-from {file} --head-recorded {digests}"
    assert "--head-record" not in made.verify.options(wildcards())
    remote = adopted(converter="llama.cpp")
    donor = Path(remote.inject.head_file(wildcards())).stem
    assert remote.fetch.donor(wildcards(donor=donor)) == f"{HEAD}/Original"
    assert remote.fetch.conversions(SimpleNamespace(**DONOR)) == "--convert llama.cpp:all"
    assert remote.convert.models("llama.cpp") == "m"


# ── a checkpoint that is quantized here ──


def test_a_checkpoint_without_a_head_is_converted_with_the_donors() -> None:
    made = tuned(tokenizer_pre="qwen35", name="Mine", sidecar="Q8_0")
    for part in ("all", "draft"):
        found = made.convert.options(wildcards(part=part))
        assert found == f"--tokenizer-pre qwen35 --name Mine {FROM}"
    assert "--head-from" not in made.convert.options(wildcards(part="trunk"))
    tune = f"resources/hub/Tuner/My-Tune/{'2' * 40}"
    checkpoint = f"--checkpoint {tune}/My-Tune --recorded {tune}/records --name Mine"
    assert made.verify.source_option(wildcards()) == f"{checkpoint} {FROM}"
    assert made.verify.source_option(wildcards("bare")) == checkpoint
    assert made.verify.sidecar_source_option(wildcards()) == f"{checkpoint} {FROM}"
    assert made.verify.unquantized(wildcards()) == [f"{WORK}/acceptance.json"]
    assert f"--head-record {HEAD}/head.json" in made.verify.options(wildcards())
    assert "--head-record" not in made.verify.options(wildcards("bare"))


def test_what_is_converted_of_each_repository_is_known_before_its_weights() -> None:
    made = tuned()
    assert made.fetch.conversions(SimpleNamespace(**TUNE)) == "--convert mtpforge:trunk"
    assert made.fetch.conversions(SimpleNamespace(**DONOR)) == "--convert mtpforge:head"
    assert adopted(source=TUNE).fetch.conversions(SimpleNamespace(**TUNE)) == ""


def test_a_variant_with_a_base_has_its_own_donor() -> None:
    """Of two, one is the model's: here the checkpoint itself has a head too."""
    variants = {"Q8_0": {}, "other": {"base": {"type": "Q4_0"}, "head_from": DONOR}}
    made = build(source={"path": "tests/checkpoints/tiny-qwen3.5"}, variants=variants)
    folder = "tests/checkpoints/tiny-qwen3.5"
    record = layout.local_record(folder)
    assert record.startswith("resources/local/tiny-qwen3.5-")
    checkpoint = f"--checkpoint {folder} --recorded {record}"
    assert made.verify.source_option(wildcards("Q8_0")) == checkpoint
    assert made.verify.source_option(wildcards("other")) == f"{checkpoint} {FROM}"
    assert made.verify.unquantized(wildcards("other")) == []
    assert made.inject.head_file(wildcards("other")).startswith(f"{WORK}/donors/Original-")
    assert made.convert.options(wildcards(part="all")) == ""
    alone = build(source=TUNE, variants={"other": variants["other"]})
    assert alone.fetch.conversions(SimpleNamespace(**TUNE)) == "--convert mtpforge:trunk"


def test_the_form_of_norms_in_doubt_is_given_to_conversion_and_verification() -> None:
    made = build(source=TUNE, norms="w", sidecar="Q8_0", variants={"Q4_K_M": {}})
    assert made.convert.norms_option(wildcards(part="all")) == "--norms w"
    for option in (made.verify.source_option, made.verify.sidecar_source_option):
        assert option(wildcards()).endswith(" --norms w")
    assert adopted(norms="w-1").verify.source_option(wildcards()).endswith(" --norms w-1")
    assert tuned().convert.norms_option(wildcards(part="all")) == ""


# ── mistakes ──


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ({"variants": {"Q8_0": {}}}, "m/source: missing: only variants with a `base`"),
        ({"head_from": DONOR, "variants": {"Q8_0": {}}}, "m/source: missing"),
        ({"variants": {"a": {"base": BASE}}}, "m/source: missing"),
        (
            {"head_from": DONOR, "sidecar": "Q8_0", "variants": {"a": {"base": BASE}}},
            "m/source: missing",
        ),
        (
            {"head_from": DONOR, "variants": {"a": {"base": BASE, "head": "none"}}},
            "variants/a/head: `none` leaves the head out, but a base needs a head",
        ),
        (
            {"source": TUNE, "variants": {"Q8_0": {"head_from": DONOR}}},
            "variants/Q8_0/head_from: without a base, set the model's",
        ),
        (
            {"source": TUNE, "head_from": DONOR, "converter": "llama.cpp", "variants": {"F16": {}}},
            "m/converter: llama.cpp's cannot join the head of `head_from` to a trunk",
        ),
        (
            {"head_from": {"path": "no/such"}, "variants": {"a": {"base": BASE}}},
            "m/head_from/path: no such folder: no/such",
        ),
        ({"head_from": "x", "source": TUNE, "variants": {"Q8_0": {}}}, "m/head_from: must have"),
        ({"name": "a/b", "source": TUNE, "variants": {"Q8_0": {}}}, "m/name: 'a/b' cannot begin"),
        ({"name": "mtp-x", "source": TUNE, "variants": {"Q8_0": {}}}, "would not find mtp-x-Q8_0"),
        (
            {"head_from": DONOR, "variants": {"a": {"base": {"path": "x/mmproj-F16.gguf"}}}},
            "would not find mmproj-a.gguf",
        ),
        (
            {"head_from": DONOR, "variants": {"a": {"base": {"path": "x/b\n.gguf"}}}},
            "variants/a/base/path: 'x/b\\n.gguf': control characters",
        ),
    ],
)
def test_a_mistake_is_refused_with_its_path(model: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        build(**model)
    assert message in str(error.value)
