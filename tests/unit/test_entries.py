"""Entries that `make add`, `quant` and `inject` write: input as people have it, files, presets."""

import io
import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import add
import layouts
import pytest
import yaml
from conftest import CHECKPOINTS, ROOT
from hub import COMMIT
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from mtpforge.entries import address, files, presets, proposal
from mtpforge.entries.address import Address
from mtpforge.entries.proposal import Entry, Source
from mtpforge.errors import ConfigError, DownloadError, ForgeError
from mtpforge.gguf import quant_types
from mtpforge.hub.listing import REPOSITORY, File, Listing
from mtpforge.rules import entry_files
from mtpforge.rules.build import Build

PINNED = {"repo": "Owner/Name", "revision": COMMIT}


# ── input ──


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Owner/Name", Address("Owner/Name")),
        ("Owner/Name/", Address("Owner/Name")),
        ("Owner/Name@v1.0", Address("Owner/Name", "v1.0")),
        ("Owner/Name:a/F.gguf", Address("Owner/Name", None, "a/F.gguf")),
        ("Owner/Name@main:F.gguf", Address("Owner/Name", "main", "F.gguf")),
        ("https://huggingface.co/Owner/Name", Address("Owner/Name")),
        ("http://www.huggingface.co/Owner/Name/?x=1", Address("Owner/Name")),
        ("huggingface.co/Owner/Name#use", Address("Owner/Name")),
        ("hf.co/Owner/Name/tree/main/", Address("Owner/Name", "main")),
        ("hf://Owner/Name", Address("Owner/Name")),
        (
            "https://huggingface.co/Owner/Name/blob/main/a/F.gguf?download=true",
            Address("Owner/Name", "main", "a/F.gguf"),
        ),
        (
            "https://huggingface.co/Owner/Name?show_file_info=a%2FF.gguf",
            Address("Owner/Name", None, "a/F.gguf"),
        ),
        (
            "https://huggingface.co/Owner/Name/tree/main?x=1&show_file_info=F.gguf#a",
            Address("Owner/Name", "main", "F.gguf"),
        ),
        ("hf://Owner/Name@main", Address("Owner/Name", "main")),
        ("hf://Owner/Name/a/F.gguf", Address("Owner/Name", None, "a/F.gguf")),
        ("hf://Owner/Name@v1/F.gguf", Address("Owner/Name", "v1", "F.gguf")),
        ("hf://Owner/Name:Q4_K_M", Address("Owner/Name", None, "Q4_K_M")),
        ("hf.co/Owner/Name:Q4_K_M", Address("Owner/Name", None, "Q4_K_M")),  # as for Ollama
        (" Owner/Name ", Address("Owner/Name")),
    ],
)
def test_a_repository_is_read_as_people_write_it(text: str, expected: Address) -> None:
    assert address.repository(text) == expected


@pytest.mark.parametrize(
    "text",
    ["Name", "", "a/b/c", "https://example.org/Owner/Name", "../x", "O/N\nx", "O/-N@x@y", "O/N..1"],
)
def test_another_text_is_no_repository(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a repository: write OWNER/NAME"):
        address.repository(text)


@pytest.mark.parametrize("name", ["a--b", "a..b", "a-", "a.", "a.git", "a" * 97])
def test_a_name_that_the_hub_refuses_is_refused_before_anything_is_built(name: str) -> None:
    with pytest.raises(HFValidationError):
        validate_repo_id(f"Owner/{name}")
    assert REPOSITORY.fullmatch(f"Owner/{name}") is None
    for good in ("a", "a_", "A-b.c_d", "1.5-B", "a" * 96):
        validate_repo_id(f"Owner/{good}")
        assert REPOSITORY.fullmatch(f"Owner/{good}")


def test_files_and_folders_are_on_this_machine(tmp_path: Path) -> None:
    (tmp_path / "Model-Q4_K_M.gguf").touch()
    assert address.checkpoint(f"{tmp_path}/") == tmp_path
    assert address.gguf(str(tmp_path / "Model-Q4_K_M.gguf")) == tmp_path / "Model-Q4_K_M.gguf"
    with pytest.raises(ConfigError, match=r"no such file; did you mean Model-Q4_K_M.gguf\?"):
        address.gguf(str(tmp_path / "model-q4_k_m.gguf"))
    with pytest.raises(ConfigError, match="no such folder"):
        address.checkpoint("./not-there")
    with pytest.raises(ConfigError, match="names no file"):
        address.gguf("Owner/Name")


def test_a_gguf_in_a_folder_may_be_one_of_a_repository(here: Path) -> None:
    in_repository = Address("Owner/Name-GGUF", None, "quants/F.gguf")
    assert address.gguf("Owner/Name-GGUF/quants/F.gguf") == in_repository
    assert address.gguf("Owner/Name-GGUF/F.gguf").file == "F.gguf"
    Path("Owner").mkdir()
    with pytest.raises(
        ConfigError, match=r"Owner: is a folder: name a GGUF in it, Owner/FILE.gguf"
    ):
        address.gguf("Owner")
    with pytest.raises(ConfigError, match="no such file"):
        address.gguf("Owner/Name-GGUF/quants/F.gguf")
    for text in ("./Owner/Name/F.gguf", "/Owner/Name/F.gguf", "Name/F.gguf"):
        with pytest.raises(ConfigError, match="no such file"):
            address.gguf(text)


def test_spaces_around_a_path_are_none_of_it(here: Path) -> None:
    Path("mine").mkdir()
    Path("mine/F.gguf").touch()
    assert address.checkpoint(" mine ") == Path("mine")
    assert address.gguf("mine/F.gguf ") == Path("mine/F.gguf")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("ckpt/", "ckpt/: no such folder"),
        ("mine/finetune/", "if it is a repository, write its Hub URL"),
        ("mine/tun-4b", "write its Hub URL; did you mean tune-4b?"),
        ("./mine/tun-4b", "./mine/tun-4b: no such folder; did you mean tune-4b?"),
        ("mine/a/b", "mine/a/b: no such folder"),
    ],
)
def test_a_path_that_is_not_there_is_called_so_at_once(here: Path, text: str, said: str) -> None:
    Path("mine/tune-4b").mkdir(parents=True)
    Path("mine/a").mkdir()
    with pytest.raises(ConfigError) as refused:
        address.checkpoint(text)
    assert "no such folder" in str(refused.value) and said in str(refused.value)
    assert address.checkpoint("Owner/Name@v1") == Address("Owner/Name", "v1")
    assert address.checkpoint("mine/Model@refs/pr/1") == Address("mine/Model", "refs/pr/1")
    assert address.checkpoint("Owner/Name/") == Address("Owner/Name")
    assert address.checkpoint("https://hf.co/mine/tun-4b/") == Address("mine/tun-4b")


def test_a_file_in_place_of_a_folder_is_answered_with_what_to_give(here: Path) -> None:
    Path("mine").mkdir()
    for name in ("mine/config.json", "mine/F.gguf"):
        Path(name).touch()
    with pytest.raises(ConfigError, match=r"^mine/config.json: is a file: give its folder, mine$"):
        address.checkpoint("mine/config.json")
    for text in ("mine/F.gguf", "Owner/Name:F.gguf", "https://hf.co/O/N/blob/main/F.gguf"):
        with pytest.raises(ConfigError, match=f"is a GGUF, .*`make inject BASE={text} SOURCE="):
            address.checkpoint(text)


def test_a_folder_of_the_hubs_cache_stands_for_its_snapshot(here: Path) -> None:
    snapshots = Path("hub/models--Owner--Name/snapshots")
    snapshots.mkdir(parents=True)
    with pytest.raises(ConfigError, match="hub/models--Owner--Name: has no snapshot in hub/"):
        address.checkpoint("hub/models--Owner--Name")
    (snapshots / "a1").mkdir()
    assert address.checkpoint("hub/models--Owner--Name/") == snapshots / "a1"
    assert address.checkpoint(str(snapshots / "a1")) == snapshots / "a1"
    (snapshots / "b2").mkdir()
    with pytest.raises(ConfigError, match=r"several snapshots: choose one of .*/snapshots: a1, b2"):
        address.checkpoint("hub/models--Owner--Name")


@pytest.mark.parametrize(
    ("named", "source", "known"),
    [
        ("Owner/Name", "Owner/Name", "; its base model is Owner/Name"),
        (["Owner/Name", "A/B"], "Owner/Name", "; its base model is Owner/Name"),
        (None, "OWNER/NAME", ""),
        ([], "OWNER/NAME", ""),
        ("`rm`", "OWNER/NAME", ""),
    ],
)
def test_a_repository_of_ggufs_is_answered_with_what_takes_them(
    monkeypatch: pytest.MonkeyPatch, named: Any, source: str, known: str
) -> None:
    listing = Listing("O/N-GGUF", COMMIT, {"F.gguf": File(1, "0" * 40)}, {})
    info = SimpleNamespace(card_data=SimpleNamespace(base_model=named))
    monkeypatch.setattr(proposal, "pinned", lambda given: listing)
    monkeypatch.setattr(proposal, "model_info", lambda *_: info)
    with pytest.raises(DownloadError) as refused:
        Source(Address("O/N-GGUF"))
    said = f"`make inject BASE=O/N-GGUF:TYPE SOURCE={source}` puts a head into one{known}"
    assert str(refused.value).endswith(said) and "O/N-GGUF: has no model*" in str(refused.value)


NAMES = (
    "Model-Q4_K_M.gguf", "Model-Q4_K_S.gguf", "UD/Model-UD-Q4_K_XL.gguf",
    "Q8_0/Model-Q8_0-00001-of-00002.gguf", "Q8_0/Model-Q8_0-00002-of-00002.gguf",
    "Model-BF16.gguf.part1of2", "Model-BF16.gguf.part2of2", "mmproj-F16.gguf", "README.md",
)  # fmt: skip


def found(monkeypatch: pytest.MonkeyPatch, wanted: str, names: tuple[str, ...] = NAMES) -> Any:
    listing = Listing("Owner/Name", COMMIT, {name: File(1, "0" * 40) for name in names}, {})
    monkeypatch.setattr(proposal, "pinned", lambda given: listing)
    label, base = proposal.base(Address("Owner/Name", None, wanted))
    assert base == {**PINNED, "file": base["file"]}
    return label, base["file"]


@pytest.mark.parametrize(
    ("wanted", "label", "file"),
    [
        ("Model-Q4_K_M.gguf", "Q4_K_M", "Model-Q4_K_M.gguf"),
        ("q4_k_m", "Q4_K_M", "Model-Q4_K_M.gguf"),
        ("UD-Q4_K_XL", "UD-Q4_K_XL", "UD/Model-UD-Q4_K_XL.gguf"),
        ("Model-UD-Q4_K_XL.gguf", "UD-Q4_K_XL", "UD/Model-UD-Q4_K_XL.gguf"),
        ("Q8_0", "Q8_0", "Q8_0/Model-Q8_0-00001-of-00002.gguf"),
        ("Model-Q8_0-00002-of-00002.gguf", "Q8_0", "Q8_0/Model-Q8_0-00001-of-00002.gguf"),
        ("Model-BF16.gguf", "BF16", "Model-BF16.gguf.part1of2"),
    ],
)
def test_a_base_is_found_by_name_and_by_type(
    monkeypatch: pytest.MonkeyPatch, wanted: str, label: str, file: str
) -> None:
    assert found(monkeypatch, wanted) == (label, file)


def test_a_base_that_is_not_there_is_answered_with_what_is(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DownloadError, match=r"it has Model-Q4_K_M.*; did you mean Model-Q4_K_M"):
        found(monkeypatch, "Model-Q4KM.gguf")
    said = r"^Owner/Name: has no Q5_K_M GGUF; it has Q4_K_M, Q4_K_S, .*; did you mean Q4_K_M\?$"
    with pytest.raises(DownloadError, match=said):
        found(monkeypatch, "Q5_K_M")
    with pytest.raises(DownloadError, match=r"has several Q4_0: name one of A-Q4_0.gguf, B-Q4_0"):
        found(monkeypatch, "Q4_0", ("A-Q4_0.gguf", "B-Q4_0.gguf"))
    with pytest.raises(DownloadError, match="it has no GGUF"):
        found(monkeypatch, "Q4_0", ("README.md",))


# ── entries ──


@pytest.mark.parametrize(
    ("name", "key"),
    [("Qwen3.5-4B", "qwen3.5-4b"), ("My Tune (v2)", "my-tune-v2-"), ("../x", "x"), ("/", "model")],
)
def test_the_key_of_a_model_is_a_plain_file_name(name: str, key: str) -> None:
    assert proposal.plain_key(name) == key


@pytest.mark.parametrize("name", presets.PRESETS)
def test_presets_are_valid_entries(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    source = Source(CHECKPOINTS / "tiny-qwen3.5")
    variants = presets.preset(name)
    entry = source.entry(variants, {"tokenizer_pre": "qwen35", "measure": {}})
    model = yaml.safe_load("models:\n" + files.as_text(entry))["models"]
    assert model == {"tiny-qwen3.5": entry.value()}
    made = Build({"models": model}).config.models["tiny-qwen3.5"].variants
    assert list(made) == list(variants)
    helped = {key for key, each in made.items() if each.imatrix}
    assert helped == (set(made) - {"BF16", "Q8_0"} if name == "publisher" else set())


def test_a_checkpoint_on_this_machine_is_not_downloaded(tmp_path: Path) -> None:
    about = Source(layouts.write_layout("dense-text-only", tmp_path)).about()
    assert about == "Local, 6.2 MB, 1.2 MB of it the head"


def test_a_vision_tower_is_pointed_out() -> None:
    """Publishers ship it, and it needs llama.cpp's own converter, so it is not chosen for them."""
    about = Source(CHECKPOINTS / "tiny-qwen3.5").about()
    assert about.endswith(" of it the head; `mmproj: true` also makes its vision tower")


def test_a_matrix_that_is_given_is_used_by_any_preset() -> None:
    matrix = {"imatrix": {"text": "a.txt"}}
    assert presets.preset("desk", "a.txt") == {"Q4_K_M": matrix, "Q6_K": matrix}
    assert presets.preset("basic", "a.txt") == {"BF16": {}, "Q4_K_M": matrix}


def test_some_types_of_a_preset_are_as_in_the_whole() -> None:
    whole = presets.preset("publisher")
    assert presets.preset("publisher", only=["iq4_xs", "Q8_0"]) == {
        name: whole[name] for name in ("Q8_0", "IQ4_XS")
    }


def test_types_need_not_be_those_of_the_preset() -> None:
    assert presets.preset("desk", only=["Q8_0", "q6_k"]) == {"Q6_K": {}, "Q8_0": {}}
    matrix = {"imatrix": {"text": presets.CALIBRATION}}
    assert presets.preset("desk", only=["IQ2_M"]) == {"IQ2_M": matrix}
    assert presets.preset("publisher", only=["Q5_0"]) == {"Q5_0": matrix}
    with pytest.raises(ConfigError, match=r"did you mean IQ4_XS\?$"):
        presets.preset("desk", only=["Q6_K", "IQ4_XL"])


def test_a_preset_that_is_not_there_is_answered_with_those_that_are() -> None:
    said = "no preset 'publish': there are basic, desk, publisher; did you mean publisher[?]"
    with pytest.raises(ConfigError, match=said):
        presets.preset("publish")


def test_several_types_are_for_add() -> None:
    for text in ("Q4_K_M IQ4_XS", "Q4_K_M, IQ4_XS"):
        with pytest.raises(ConfigError, match=r'`make add .* TYPES="Q4_K_M IQ4_XS"` adds'):
            presets.single(text)


def test_the_publishers_preset_has_the_usual_small_types_by_size() -> None:
    names = list(presets.preset("publisher"))
    assert names[names.index("IQ4_XS") + 1 : names.index("Q6_K_L")] == [
        "Q3_K_L", "Q3_K_M", "IQ3_M", "Q3_K_S", "IQ3_XS", "IQ3_XXS", "Q2_K", "IQ2_M", "IQ2_S"
    ]  # fmt: skip


@pytest.mark.parametrize("kind", ["Q6_K_L", "Q5_K_L", "Q4_K_L", "Q2_K_L"])
def test_a_mixture_of_the_preset_can_be_made_alone(kind: str) -> None:
    whole = presets.preset("publisher", "a.txt")[kind]
    assert presets.single(kind, "a.txt") == {kind: whole}
    assert presets.single(kind) == {kind: {key: whole[key] for key in ("type", "tensors")}}


def test_a_single_type_has_the_matrix_that_it_needs() -> None:
    assert presets.single("IQ4_XS") == {"IQ4_XS": {}}
    assert presets.single("IQ2_M") == {"IQ2_M": {"imatrix": {"text": presets.CALIBRATION}}}
    assert presets.single("IQ4_XS", "a.txt") == {"IQ4_XS": {"imatrix": {"text": "a.txt"}}}
    assert presets.single("IQ2_M", "default") == presets.single("IQ2_M")
    ready = {"IQ4_XS": {"imatrix": {"path": "a.gguf"}}}
    assert presets.single("IQ4_XS", "a.gguf") == ready
    assert presets.single("BF16", "a.txt") == {"BF16": {}}
    with pytest.raises(ConfigError, match="did you mean IQ4_XS"):
        presets.single("IQ4XS")


def test_types_may_have_llama_quantizes_other_names_and_be_separated_by_commas() -> None:
    assert list(presets.single("q4_k")) == ["Q4_K_M"]
    for only in (["q4_k,Q6_K"], ["Q6_K, Q4_K_M"], ["Q6_K", "Q4_K_M"]):
        assert list(presets.preset("desk", only=only)) == ["Q4_K_M", "Q6_K"]


@pytest.mark.parametrize(
    ("given", "file_type", "tensor_type"),
    [
        ("Q4", "Q4_K_M", "Q4_K"),
        ("4bit", "Q4_K_M", "Q4_K"),
        ("4-bit", "Q4_K_M", "Q4_K"),
        ("q5", "Q5_K_M", "Q5_K"),
        ("q8", "Q8_0", "Q8_0"),
        ("INT8", "Q8_0", "Q8_0"),
        ("q4_k", "Q4_K_M", "Q4_K"),
        ("Q4_K_XL", "Q4_K_M", "Q4_K"),
        ("IQ4_XL", "IQ4_XS", "IQ4_XS"),
        ("Q4_K_N", "Q4_K_M", "Q4_K"),
    ],
)
def test_a_type_named_by_its_bits_is_answered(given: str, file_type: str, tensor_type: str) -> None:
    with pytest.raises(ConfigError, match=f"did you mean {file_type}[?]"):
        quant_types.check_published_type(given)
    with pytest.raises(ConfigError, match=f"did you mean {tensor_type}[?]"):
        quant_types.check_tensor_type(given)


def test_mxfp4_is_answered_with_the_type_that_llama_quantize_makes() -> None:
    source = {"repo": "A/B", "revision": COMMIT}
    with pytest.raises(ConfigError, match=r"or make MXFP4_MOE \(experts alone\)"):
        Build({"models": {"m": {"source": source, "variants": {"MXFP4": {}}}}})


@pytest.mark.parametrize("kind", quant_types.PUBLISHED)
def test_the_size_of_each_type_is_about_known(kind: str) -> None:
    assert 1 < presets.bits({}, kind) <= 32


def test_the_calibration_text_has_enough_tokens() -> None:
    assert len((ROOT / presets.CALIBRATION).read_text(encoding="utf-8").split()) > 1024


# ── files ──


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def entry(**variants: dict[str, Any]) -> Entry:
    return Entry("name", "9 GB", {"source": dict(PINNED)}, variants)


def write(given: Entry) -> str:
    with files.written(given) as path:
        assert entry_files.read_entry(path)["variants"].keys() >= given.variants.keys()
    return path.read_text()


def test_an_entry_has_a_file_that_grows_and_keeps_comments(here: Path) -> None:
    write(entry(Q4_K_M={}))
    path = Path("config.d/name.yaml")
    path.write_text(path.read_text() + "      # mine\n      Q8_0: # large\n")
    later = entry(IQ4_XS={"head": "BF16"}, Q8_0={})
    later.settings |= {"source": {**PINNED, "revision": "f" * 40}, "measure": {}}
    text = write(later)
    assert "      # mine\n      Q8_0: # large\n      IQ4_XS: {head: BF16}\n" in text
    model = entry_files.read_entries()["name"]
    assert model["source"] == PINNED and model["measure"] == {}
    assert list(model["variants"]) == ["Q4_K_M", "Q8_0", "IQ4_XS"]
    assert write(later) == text


def test_a_model_that_is_measured_already_stays_as_it_is(here: Path) -> None:
    before = entry(Q4_0={})
    before.settings["measure"] = {}
    text = write(before)
    later = entry(Q4_0={}, Q8_0={})
    later.settings["measure"] = {"text": "default"}
    assert write(later) == text + "      Q8_0: {}\n"


def test_a_file_is_as_it_was_if_nothing_is_built(here: Path) -> None:
    with pytest.raises(KeyboardInterrupt), files.written(entry(Q8_0={})) as path:
        raise KeyboardInterrupt
    assert not path.exists()
    before = write(entry(Q8_0={}))
    with pytest.raises(ForgeError), files.written(entry(Q4_0={})) as path:
        raise ForgeError("no")
    assert path.read_text() == before


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("models: {name: {source: {repo: A/B}, variants: {Q4_0: {}}}}\n", "source is"),
        (
            "models: {name: {source: {repo: Owner/Name}, variants: {Q4_0: {head: BF16}}}}\n",
            r"variants/Q4_0 is \{head: BF16\} there, not \{\}",
        ),
        (
            "models: {name: {source: {repo: Owner/Name}, variants: {Q8_0: {}}}}\n",
            r"written in another way: add by hand: +Q4_0: \{\}",
        ),
        ("models: {name: {}}\n", "has no variants"),
        ("models: {other: {}}\n", "must have only `models:`"),
        ("a: [\n", "config.d/name.yaml"),
    ],
)
def test_a_file_that_does_not_fit_is_left_alone(here: Path, text: str, reason: str) -> None:
    Path("config.d").mkdir()
    Path("config.d/name.yaml").write_text(text)
    with pytest.raises(ConfigError, match=reason):
        write(entry(Q4_0={}))
    assert Path("config.d/name.yaml").read_text() == text


OLDER = "a" * 40


class OneSource:
    """A checkpoint of the Hub whose main branch is at COMMIT, and whose tag v1 is at OLDER."""

    packed, label = False, "Owner/Name"

    def __init__(self, given: Address) -> None:
        commits = {None: COMMIT, "main": COMMIT, "v1": OLDER, OLDER: OLDER}
        self.pinned = {"repo": given.repo, "revision": commits[given.revision]}

    def entry(self, variants: dict[str, Any], options: dict[str, Any]) -> Entry:
        converter = "llama.cpp" if self.pinned["revision"] == OLDER else "mtpforge"
        settings = {"source": self.pinned, "converter": converter, **options}
        return Entry("name", "9 GB", settings, variants)


@pytest.fixture
def adds(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run `add.py ... --write` on that checkpoint, and return what it prints."""
    names = ("fetch", "disk", "peak", "free", "seconds")
    plan = {**dict.fromkeys(names, 0), "notes": [], "warnings": ["warning: x"], "to_run": 1}
    plan["fetch_seconds"] = None
    add.REQUIREMENT.parent.mkdir()
    add.REQUIREMENT.touch()
    monkeypatch.setattr(add, "Source", OneSource)
    monkeypatch.setattr(add, "_check", lambda: None)
    monkeypatch.setattr(add, "_first", lambda config: "")
    monkeypatch.setattr(add, "_forecast", lambda *_: plan)

    def call(*words: str) -> str:
        monkeypatch.setattr(add.sys, "argv", ["add.py", *words, "--write"])
        add.main()
        return capsys.readouterr().out

    return call


def test_a_file_keeps_its_commit_and_that_one_is_announced(adds: Callable[..., str]) -> None:
    adds("Owner/Name@v1", "--type", "Q8_0")
    said = adds("Owner/Name", "--type", "Q4_0")
    assert f"Q4_0 of Owner/Name at {OLDER[:7]} (config.d/name.yaml)" in said
    assert "\nwarning: x\n" in said
    entry = entry_files.read_entries()["name"]
    assert entry["source"]["revision"] == OLDER and entry["converter"] == "llama.cpp"


def test_what_else_the_file_keeps_is_said(adds: Callable[..., str]) -> None:
    assert "keeps" not in adds("Owner/Name", "--preset", "publisher")
    said = adds("Owner/Name", "--preset", "publisher", "--types", "Q6_K", "Q4_K_M", "IQ4_XS")
    line = "\nkeeps  {} of config.d/name.yaml: delete there what you do not want\n"
    assert line.format("21 other variants") in said
    adds("Owner/Name", "--type", "Q8_0", "--model", "two")
    said = adds("Owner/Name", "--type", "Q6_K", "--model", "two")
    assert "\nkeeps  1 other variant of config.d/two.yaml" in said


def test_who_can_see_an_upload_is_said_before_it(
    adds: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(add, "get_token", lambda: None)
    line = "\nupload Owner/Name-MTP-GGUF; if it is new, it is private until you make it public"
    said = adds("Owner/Name", "--publish", "Owner/Name-MTP-GGUF")
    assert f"{line}; first log in: `.venv/bin/hf auth login`, or set HF_TOKEN\n" in said
    monkeypatch.setattr(add, "get_token", lambda: "hf_token")
    assert f"{line}\n" in adds("Owner/Name", "--publish", "Owner/Name-MTP-GGUF")
    assert "\nupload" not in adds("Owner/Name", "--model", "other")


def test_an_injection_names_the_head_and_the_base(
    adds: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("a.gguf").touch()
    said = adds("Owner/Name", "--base", "a.gguf", "--replace-head")
    assert said.startswith(f"head of Owner/Name at {COMMIT[:7]} into a.gguf (config.d/name-inj")
    base = {"repo": "Else/GGUF", "file": "X-Q4_K_M.gguf", "revision": COMMIT}
    monkeypatch.setattr(add.proposal, "base", lambda given: ("Q4_K_M", base))
    said = adds("Owner/Name", "--base", "Else/GGUF:Q4_K_M", "--replace-head", "--model", "b")
    assert said.startswith(f"head of Owner/Name at {COMMIT[:7]} into Q4_K_M of Else/GGUF (config.d")


def test_what_is_built_is_said_without_a_question(
    adds: Callable[..., str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    built: list[str] = []
    plan = {**add._forecast("name", "default"), "to_run": 0}
    monkeypatch.setattr(add, "_forecast", lambda *_: plan)
    with monkeypatch.context() as inside:
        inside.chdir(ROOT)  # where the prompts are
        config = Build({"models": {"name": {"source": PINNED, "variants": {"Q8_0": {}}}}}).config
    monkeypatch.setattr(add, "_check", lambda: config)
    monkeypatch.setattr(add, "_build", lambda key, *_: built.append(key))
    monkeypatch.setattr(add.sys, "stdin", io.StringIO())
    monkeypatch.setattr(add.sys, "argv", ["add.py", "Owner/Name", "--type", "Q8_0", "--build"])
    add.main()
    assert built == ["name"]  # what is left to do takes moments, and the run says what there is
    said = capsys.readouterr().out
    assert "\nalready built: results/name/Name-Q8_0.gguf\n" in said and "fetch" not in said
    monkeypatch.setattr(add, "_first", lambda _: ", after llama.cpp is built")
    with pytest.raises(ConfigError, match="no terminal to ask on"):
        add.main()


def test_a_dry_run_shows_the_forecast_and_changes_nothing(
    adds: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        adds("Owner/Name", "--type", "Q8_0", "--dry-run")
    said = capsys.readouterr().out
    assert not ended.value.code and list(Path("config.d").iterdir()) == []
    assert "\nfetch  nothing\n" in said
    assert said.endswith("\ndry run: nothing was built or written\n")


def test_types_that_a_matrix_would_help_are_named(adds: Callable[..., str]) -> None:
    note = "\nnote: no importance matrix for {}: IMATRIX=default computes one\n"
    assert note.format("IQ4_XS") in adds("Owner/Name", "--type", "IQ4_XS", "--model", "a")
    assert note.format("Q4_K_M") in adds("Owner/Name", "--preset", "desk", "--model", "b")
    for options in (
        ("--type", "IQ4_XS", "--imatrix", "default"),
        ("--type", "IQ2_M"),
        ("--type", "Q6_K"),
        ("--type", "Q4_0"),
        ("--preset", "publisher"),
        ("--preset", "desk", "--imatrix", "default"),
    ):
        assert "note:" not in adds("Owner/Name", *options, "--model", "-".join(options[1:]).lower())


def test_nothing_is_written_in_another_folder(adds: Callable[..., str]) -> None:
    add.REQUIREMENT.unlink()
    with pytest.raises(ConfigError, match="no such file here: run it in mtpforge's folder"):
        adds("Owner/Name", "--type", "Q8_0")
    assert not Path("config.d").exists()


def test_a_commit_that_the_file_does_not_have_is_refused(adds: Callable[..., str]) -> None:
    adds("Owner/Name@v1", "--type", "Q8_0")
    adds("Owner/Name@v1", "--type", "Q4_0")
    refusal = rf"config.d/name.yaml: is pinned to {OLDER}, and Owner/Name@main is {COMMIT}: build"
    with pytest.raises(ConfigError, match=refusal + r" it under another name, with MODEL=NAME"):
        adds("Owner/Name@main", "--type", "Q6_K")
    assert "Q6_K" not in entry_files.read_entries()["name"]["variants"]
    assert f"at {COMMIT[:7]}" in adds("Owner/Name@main", "--type", "Q6_K", "--model", "newer")


def test_kl_divergence_is_measured_where_a_bf16_file_is_made(
    adds: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    adds("Owner/Name", "--type", "Q4_0", "--measure", "--model", "quant")
    for preset in ("desk", "publisher"):
        adds("Owner/Name", "--preset", preset, "--measure", "--model", preset)
    Path("a.gguf").touch()
    base = ("--base", "a.gguf", "--replace-head")
    adds("Owner/Name", *base, "--measure", "--model", "base")
    monkeypatch.setattr(OneSource, "packed", True)
    adds("Owner/Name", "--type", "NVFP4", "--measure", "--model", "packed")
    measured = {name: model["measure"] for name, model in entry_files.read_entries().items()}
    made = {name: {"text": "default"} for name in ("quant", "desk", "publisher")}
    assert measured == {**made, "base": {}, "packed": {}}


# ── asking ──


class Terminal:
    """Standard input with one answer."""

    def __init__(self, answer: str) -> None:
        self.answer = answer

    def isatty(self) -> bool:
        return True

    def readline(self) -> str:
        return self.answer


def test_enter_and_yes_build_and_all_else_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    for answer in ("\n", "y\n", "Yes\n"):
        monkeypatch.setattr(add.sys, "stdin", Terminal(answer))
        add._ask(yes=False)
    for answer in ("n\n", "later\n", "\x1b\n", ""):  # the last is Ctrl-D
        monkeypatch.setattr(add.sys, "stdin", Terminal(answer))
        with pytest.raises(SystemExit) as ended:
            add._ask(yes=False)
        assert ended.value.code == 0
    monkeypatch.setattr(add.sys, "stdin", io.StringIO("y\n"))
    with pytest.raises(ConfigError, match="no terminal to ask on"):
        add._ask(yes=False)
    add._ask(yes=True)


def test_a_name_that_is_taken_gets_the_owners(here: Path) -> None:
    assert add._free_key(entry()) == "name"
    write(entry(Q4_0={}))
    assert add._free_key(entry()) == "name"  # the same source
    other = entry()
    other.settings = {"source": {"repo": "Else/Name", "revision": COMMIT}}
    assert add._free_key(other) == "else-name"
    Path("config.yaml").write_text("models: {name: {}, else-name: {}, owner-name: {}}\n")
    with pytest.raises(ConfigError, match=r"another model name: choose a name, with MODEL=NAME"):
        add._free_key(other)


def test_a_name_that_is_asked_for_must_be_free(here: Path) -> None:
    Path("config.yaml").write_text("models: {mine: {}}\n")
    assert add._free_key(entry(), "other") == "other"
    with pytest.raises(ConfigError, match="has a model mine already: choose another MODEL"):
        add._free_key(entry(), "mine")


def test_a_warning_names_the_file_of_its_model(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("ckpt", "config.d", "workflow/prompts"):
        Path(folder).mkdir(parents=True)
    Path("workflow/prompts/code.txt").write_text("def")
    files.path_of("name").write_text(
        "models: {name: {source: {path: ckpt}, variants: {Q4_0: {head: IQ3_S}}}}"
    )
    config: dict[str, Any] = {"build": []}
    entry_files.add_entries(config, {})
    Build(config)
    said = "warning: config.d/name.yaml: models/name/variants/Q4_0/head: a head at IQ3_S"
    assert capsys.readouterr().err.startswith(said)


def test_a_profile_that_is_not_there_is_refused(adds: Callable[..., str]) -> None:
    with pytest.raises(ConfigError, match=r"no profile 'leen'.*did you mean lean\?"):
        adds("Owner/Name", "--type", "Q8_0", "--profile", "leen")


@pytest.mark.parametrize("cores", ["zwei", "0", "-1", ""])
def test_a_wrong_number_of_cores_is_refused_before_anything_is_written(
    adds: Callable[..., str], cores: str
) -> None:
    with pytest.raises(ConfigError, match=f"'{cores}' is not a number of cores"):
        adds("Owner/Name", "--type", "Q8_0", f"--cores={cores}")
    assert not Path("config.d").exists()
    adds("Owner/Name", "--type", "Q8_0", "--cores=2")


# ── building and forecasting ──


@pytest.mark.parametrize("profile", ["lean", "shards", "default"])
def test_the_profile_is_that_of_the_build_and_of_its_forecast(
    monkeypatch: pytest.MonkeyPatch, profile: str
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 0, "{}", "")

    monkeypatch.setattr(add.subprocess, "run", run)
    monkeypatch.setattr(add.os, "execv", lambda program, command: commands.append(command))
    add._forecast("name", profile)
    add._build("name", profile, "2")
    forecast, build = commands
    assert ("--lean" in forecast, forecast[-1] == profile) == ((profile != "default",) * 2)
    assert build[build.index("--workflow-profile") + 1] == f"profiles/{profile}"
    make = "make" if profile == "default" else f"make PROFILE={profile}"
    assert add._next(entry(), profile).endswith(f"; `{make} MODELS=name` builds it")


def test_make_passes_the_profile_on() -> None:
    for line in ("quant REPO=A/B TYPE=Q4_0", "inject BASE=a.gguf SOURCE=A/B", "add REPO=A/B"):
        command = ["make", "-n", "-o", "setup", *line.split(), "PROFILE=shards", "CORES=1"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        assert "--profile shards" in done.stdout


def test_a_warning_names_the_profile_that_needs_less() -> None:
    """As `make` does: the words are those of plan.py."""
    plan = {"fetch": 0, "fetch_seconds": None, "disk": 5, "peak": 9, "free": 8, "seconds": 1,
            "notes": [], "warnings": ["warning: too little disk: `make PROFILE=lean`"]}  # fmt: skip
    assert add._in_lines(plan, "")[-1] == "warning: too little disk: `make PROFILE=lean`"


# ── reading them ──


def test_models_of_files_are_built_beside_those_of_the_list(here: Path) -> None:
    write(entry(Q4_0={}))
    config: dict[str, Any] = {"build": ["a"], "models": {"a": {}}}
    entry_files.add_entries(config, {})
    assert config["build"] == ["a", "name"] and list(config["models"]) == ["a", "name"]
    chosen = {"build": ["a"], "models": {"a": {}, "name": {"variants": {"Q4_0": {"head": "F16"}}}}}
    entry_files.add_entries(chosen, chosen)
    assert chosen["build"] == ["a"]
    assert chosen["models"]["name"] == {
        "source": PINNED, "variants": {"Q4_0": {"head": "F16"}},
    }  # fmt: skip


def test_a_model_is_in_one_file(here: Path) -> None:
    write(entry(Q4_0={}))
    with pytest.raises(ConfigError, match=r"config.d/name.yaml: config.yaml has a model name too"):
        entry_files.add_entries({"models": {"name": {}}}, {})
    untouched: dict[str, Any] = {"models": ["a"]}
    entry_files.add_entries(untouched, {})
    assert untouched == {"models": ["a"]}


def test_a_file_with_another_ending_is_not_ignored(here: Path) -> None:
    write(entry(Q4_0={}))
    (here / "config.d/other.yml").write_text("models: {other: {}}")
    with pytest.raises(ConfigError, match=r"config.d/other.yml: .*: rename it to other.yaml"):
        entry_files.read_entries()


def test_an_error_names_the_file_of_its_model(here: Path) -> None:
    write(entry(Q4_0={}))
    error = entry_files.located(ConfigError("config.yaml: models/name/variants: bad"))
    assert str(error) == "config.d/name.yaml: models/name/variants: bad"
    for text in ("config.yaml: models/other: bad", "config.yaml: build: bad", "disk full"):
        assert str(entry_files.located(ConfigError(text))) == text
