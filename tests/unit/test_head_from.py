"""A fine-tune with the original's head: conversion, and verification up to the server."""

import shutil
from pathlib import Path

import pytest
from conftest import CHECKPOINTS, Run
from layouts import fine_tune, head_alone
from mtpforge.checkpoint.checkpoint import Checkpoint, folder_name
from mtpforge.convert import donor_head, native
from mtpforge.errors import GgufError, VerificationError
from mtpforge.gguf import reader
from mtpforge.gguf.reader import Gguf
from mtpforge.inject.inject import Options, inject
from mtpforge.io.ranges import sha256
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.verify.request import Request
from mtpforge.verify.verify import verify

ORIGINAL = CHECKPOINTS / "tiny-qwen3.5"
OTHER = CHECKPOINTS / "tiny-qwen3.5-moe"
NO_PROGRAMS = LlamaCpp(Path("no/programs"))


@pytest.fixture(scope="module")
def tune(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fine-tune that has lost its head."""
    return fine_tune(tmp_path_factory.mktemp("tune") / "My-Tune")


@pytest.fixture(scope="module")
def base(tune: Path) -> Path:
    """The fine-tune as a GGUF, as anyone publishes it."""
    path = tune.parent / "base.gguf"
    native.convert(tune, path, "trunk", "qwen35")
    return path


@pytest.fixture(scope="module")
def injected(base: Path) -> Path:
    """The same with the original's head."""
    path = base.parent / "injected.gguf"
    inject(base, ORIGINAL, path, Options(digests=path.with_suffix(".json")))
    return path


def tensor_digests(opened: Gguf) -> dict[str, str]:
    return {name: sha256(opened.ranges[name]) for name in opened.tensors}


def refused(path: Path, request: Request) -> str:
    with pytest.raises(VerificationError) as error:
        verify(path, request, NO_PROGRAMS)
    return str(error.value)


def reaches_the_server(path: Path, request: Request) -> bool:
    """Whether only the checks fail that need the programs of llama.cpp, which are missing."""
    with pytest.raises(VerificationError) as error:
        verify(path, request, NO_PROGRAMS)
    failed = [
        line.split("|")[1].strip() for line in error.value.table.splitlines() if "FAIL" in line
    ]
    return failed == ["drafting", "programs"]


def damaged(path: Path, name: str, out: Path) -> Path:
    """A copy with one changed byte in a tensor."""
    shutil.copy(path, out)
    place = reader.read(out).ranges[name]
    with out.open("r+b") as file:
        file.seek(place.offset + place.size // 2)
        (byte,) = file.read(1)
        file.seek(place.offset + place.size // 2)
        file.write(bytes([byte ^ 1]))
    return out


# ── convert ──


@pytest.mark.parametrize("part", ["all", "draft"])
def test_trunk_and_head_are_each_that_of_their_checkpoint(
    tune: Path, tmp_path: Path, part: str
) -> None:
    donor_head.convert(Checkpoint(tune), Checkpoint(ORIGINAL), tmp_path / "f.gguf", part, "qwen35")
    native.convert(ORIGINAL, tmp_path / "original.gguf", part, "qwen35")
    native.convert(tune, tmp_path / "trunk.gguf", "trunk", "qwen35")
    made, original = reader.read(tmp_path / "f.gguf"), reader.read(tmp_path / "original.gguf")
    trunk = reader.read(tmp_path / "trunk.gguf")
    assert made.tensors.keys() == original.tensors.keys()
    assert tensor_digests(made.head) == tensor_digests(original.head)
    found, right = tensor_digests(made.trunk), tensor_digests(trunk)
    assert found == {name: right[name] for name in found}
    assert found["token_embd.weight"] != sha256(original.ranges["token_embd.weight"])
    differing = {key for key in made.metadata if made.metadata[key] != original.metadata[key]}
    named = {"general.name", "general.basename", "general.finetune", "general.size_label"}
    assert made.metadata.keys() - original.metadata.keys() <= named and differing <= named
    assert made.get("general.name") == "My Tune"


def test_a_trained_head_replaces_an_untrained_one(tmp_path: Path) -> None:
    """The donor's head is taken even if the checkpoint has one."""
    donor_head.convert(
        Checkpoint(ORIGINAL), Checkpoint(head_alone(tmp_path / "head")), tmp_path / "a.gguf",
        tokenizer_pre="qwen35",
    )  # fmt: skip
    native.convert(ORIGINAL, tmp_path / "b.gguf", tokenizer_pre="qwen35")
    made, right = reader.read(tmp_path / "a.gguf"), reader.read(tmp_path / "b.gguf")
    assert tensor_digests(made) == tensor_digests(right)


def test_the_head_of_another_model_is_refused(tune: Path, tmp_path: Path) -> None:
    with pytest.raises(GgufError, match="the head belongs to another model"):
        donor_head.convert(Checkpoint(tune), Checkpoint(OTHER), tmp_path / "f.gguf")


# ── names ──


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("checkpoints/My-Tune", "My-Tune"),
        ("hub/models--Owner--My-Tune/snapshots/" + "0" * 40, "My-Tune"),
        ("hub/models--gpt2/snapshots/main", "gpt2"),
        ("datasets--O--N/snapshots/main", "main"),
        ("models--/snapshots/main", "main"),
        ("models--O--N/main", "main"),
    ],
)
def test_a_snapshot_of_the_cache_has_the_name_of_its_repository(folder: str, name: str) -> None:
    assert folder_name(Path("/home/me") / folder) == name


def test_the_model_is_named_after_its_repository_or_as_given(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--Owner--My-Model-2B" / "snapshots" / ("0" * 40)
    shutil.copytree(ORIGINAL, snapshot)
    named = shutil.copytree(ORIGINAL, tmp_path / "My-Model-2B")
    for i, (folder, name) in enumerate([(snapshot, None), (named, None), (snapshot, "Tune_7")]):
        native.convert(folder, tmp_path / f"{i}.gguf", "trunk", "qwen35", name)
    of_snapshot, of_folder, given = (reader.read(tmp_path / f"{i}.gguf") for i in range(3))
    assert of_snapshot.metadata == of_folder.metadata
    assert of_folder.get("general.name") == "My Model 2B"
    assert given.get("general.name") == "Tune_7"
    assert not any("0" * 40 in str(given.get(key)) for key in given.metadata)


# ── verify ──


def test_a_foreign_trunk_is_proven_by_its_base_and_the_head_by_its_donor(
    base: Path, injected: Path, tmp_path: Path
) -> None:
    """Whether all of the donor lies on the disk or only its head."""
    digests = injected.with_suffix(".json")
    for donor in (ORIGINAL, head_alone(tmp_path / "head")):
        assert reaches_the_server(injected, Request(head_from=donor, base=base))
        assert reaches_the_server(injected, Request(head_from=donor, trunk=digests))


def test_the_donor_can_be_a_gguf_of_the_whole_model(
    base: Path, injected: Path, tmp_path: Path
) -> None:
    """As for architectures that llama.cpp's converter converts."""
    for part in ("all", "head", "trunk"):
        native.convert(ORIGINAL, tmp_path / f"{part}.gguf", part, "qwen35")
    assert reaches_the_server(injected, Request(head_from=tmp_path / "all.gguf", base=base))
    head = damaged(tmp_path / "all.gguf", "blk.4.attn_q.weight", tmp_path / "other.gguf")
    message = refused(injected, Request(head_from=head, base=base))
    assert "values: blk.4.attn_q.weight differs from its source" in message
    for part in ("head", "trunk"):
        with pytest.raises(GgufError, match="name a GGUF of the whole model"):
            verify(injected, Request(head_from=tmp_path / f"{part}.gguf", base=base), NO_PROGRAMS)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("blk.2.ffn_down.weight", "trunk: blk.2.ffn_down.weight differs from the base"),
        ("blk.4.nextn.eh_proj.weight", "values: blk.4.nextn.eh_proj.weight differs from its so"),
    ],
)
def test_one_changed_byte_is_refused(injected: Path, tmp_path: Path, name: str, why: str) -> None:
    broken = damaged(injected, name, tmp_path / "broken.gguf")
    request = Request(head_from=ORIGINAL, trunk=injected.with_suffix(".json"))
    assert why in refused(broken, request)


def test_a_base_that_changes_after_its_digest_was_taken_is_refused(
    base: Path, injected: Path, tmp_path: Path
) -> None:
    changed = damaged(base, "blk.0.ffn_up.weight", tmp_path / "base.gguf")
    inject(changed, ORIGINAL, tmp_path / "f.gguf")
    request = Request(head_from=ORIGINAL, trunk=injected.with_suffix(".json"))
    assert "trunk: blk.0.ffn_up.weight differs from the base" in refused(
        tmp_path / "f.gguf", request
    )


def test_the_head_of_another_donor_is_refused(injected: Path, base: Path, tmp_path: Path) -> None:
    other = shutil.copytree(ORIGINAL, tmp_path / "other")
    shard = next(
        path for path in other.glob("*.safetensors") if b"mtp.fc.weight" in path.read_bytes()
    )
    tensor = Checkpoint(other).tensors["mtp.fc.weight"]
    with shard.open("r+b") as file:
        file.seek(tensor.offset)
        file.write(bytes(64))
    message = refused(injected, Request(head_from=other, base=base))
    assert "values: blk.4.nextn.eh_proj.weight differs from its source" in message


def test_a_trunk_that_is_not_the_checkpoints_leads_to_head_from(injected: Path, base: Path) -> None:
    message = refused(injected, Request(checkpoint=ORIGINAL, base=base, tokenizer_pre="qwen35"))
    assert "if the base is a fine-tune" in message and "`head_from`" in message
    given = Request(checkpoint=ORIGINAL, head_from=ORIGINAL, base=base, tokenizer_pre="qwen35")
    message = refused(injected, given)
    assert "token_embd.weight" in message and "fine-tune" not in message


def test_a_file_made_from_the_fine_tune_is_compared_with_both(tune: Path, tmp_path: Path) -> None:
    made = tmp_path / "f.gguf"
    donor_head.convert(Checkpoint(tune), Checkpoint(ORIGINAL), made, tokenizer_pre="qwen35")
    request = Request(checkpoint=tune, head_from=ORIGINAL, file_type="BF16", tokenizer_pre="qwen35")
    assert reaches_the_server(made, request)
    for name in ("blk.2.ffn_down.weight", "blk.4.nextn.eh_proj.weight"):
        broken = damaged(made, name, tmp_path / "broken.gguf")
        assert f"values: {name} differs from its source" in refused(broken, request)


def test_the_program_wants_a_proof_of_the_trunk(run: Run, injected: Path, tmp_path: Path) -> None:
    out = ("--out", tmp_path / "report.json")
    for options, why in [
        ((), "says nothing about the trunk"),
        (("--base", injected, "--head", "none"), "does not go with"),
        (("--reference", injected), "does not go with"),
        (("--checkpoint", ORIGINAL, "--head-from", injected), "must be a checkpoint's folder"),
        (("--base", injected), "is the file itself"),
        (("--base", ORIGINAL / "none.gguf", "--head-from", injected), "is the file itself"),
    ]:
        done = run("verify.py", injected, "--head-from", ORIGINAL, *options, *out)
        assert done.returncode == 2 and why in done.stderr
