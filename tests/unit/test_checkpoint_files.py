"""Which files and tensors of a folder are the model: what lies beside them, and what is lost."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import CHECKPOINTS
from layouts import Tensors, read_tensors, write_checkpoint, write_shard
from mtpforge.checkpoint.checkpoint import Checkpoint
from mtpforge.checkpoint.model_files import INDEX, model_files
from mtpforge.convert import native
from mtpforge.errors import CheckpointError
from mtpforge.gguf import reader
from mtpforge.rules.fetch import local_names

DENSE = CHECKPOINTS / "tiny-qwen3.5"
VECTOR = ("F32", np.zeros(4, "<f4"))


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return read_tensors(DENSE)


def is_head(name: str) -> bool:
    return name.startswith("mtp.")


def write(folder: Path, tensors: Tensors, shards: int = 1) -> Path:
    config = json.loads((DENSE / "config.json").read_text())
    return write_checkpoint(folder, DENSE, config, tensors, shards)


def edit_index(folder: Path, added: dict[str, str]) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"] |= added
    (folder / INDEX).write_text(json.dumps(index))


def refusal(folder: Path, part: str = "all") -> str:
    with pytest.raises(CheckpointError) as caught:
        native.convert(folder, folder.parent / "out.gguf", part, "qwen35")
    return str(caught.value)


SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]


@pytest.mark.parametrize(
    ("names", "indexed", "model"),
    [
        (["model.safetensors", "adapter_model.safetensors"], [], ["model.safetensors"]),
        (["model.safetensors", *SHARDS], [], ["model.safetensors"]),
        (["model.safetensors", *SHARDS], SHARDS, SHARDS),
        ([*SHARDS, "optimizer.safetensors", "consolidated.safetensors"], [], SHARDS),
        ([*SHARDS, "model-mtp.safetensors"], SHARDS, ["model-mtp.safetensors", *SHARDS]),
        (["model.safetensors", "mtp.safetensors"], [], ["model.safetensors", "mtp.safetensors"]),
        (["mtp-bf16.safetensors", "a.safetensors"], ["a.safetensors"], None),
        (["model_mtp.safetensors", "model.safetensors"], [], None),
        (["model.mtp.safetensors", "model.safetensors"], [], None),
        (["Qwen3.5-4B-MTP.safetensors", "model.safetensors"], [], None),
        (["pytorch_model.safetensors", "smtp.safetensors", "README.md"], [], []),
    ],
)
def test_index_or_names_tell_the_models_files(
    names: list[str], indexed: list[str], model: list[str] | None
) -> None:
    assert model_files(names, indexed) == sorted(names if model is None else model)


@pytest.mark.parametrize("shards", [1, 2])
def test_files_beside_the_weights_are_left_alone(
    tmp_path: Path, tensors: Tensors, capsys: pytest.CaptureFixture[str], shards: int
) -> None:
    folder = write(tmp_path / "tiny-qwen3.5", tensors, shards)
    beside = [
        "adapter_model.safetensors",
        "model-00001-of-00003.safetensors",
        "optimizer.safetensors",
    ]
    for name in beside:
        write_shard(
            folder / name, {"base_model.model.lora_A.weight": VECTOR, "mtp.fc.weight": VECTOR}
        )
    (folder / "consolidated.safetensors").write_text("not even a header")
    native.convert(folder, tmp_path / "all.gguf", "all", "qwen35")
    assert reader.read(tmp_path / "all.gguf").tensors.keys() == expected_tensors(tmp_path)
    assert f"no part of the model: {beside[0]}, consolidated" in capsys.readouterr().err


def test_a_model_in_one_file_beside_indexed_shards_is_another_model(
    tmp_path: Path, tensors: Tensors
) -> None:
    """A fine-tune saved into its base's folder: transformers loads it, upstream the base."""
    folder = write(tmp_path / "copy", tensors, 2)
    write_shard(folder / "model.safetensors", tensors)
    assert "copy: model.safetensors and the shards of model.safetensors.index" in refusal(folder)
    (folder / INDEX).unlink()
    assert {tensor.shard for tensor in Checkpoint(folder).tensors.values()} == {"model.safetensors"}


@pytest.mark.parametrize("shards", [1, 2])
def test_files_beside_the_weights_are_no_inputs_of_jobs(
    tmp_path: Path, tensors: Tensors, shards: int
) -> None:
    folder = write(tmp_path / "tiny-qwen3.5", tensors, shards)
    before = local_names(str(folder))
    for name in ("adapter_model", "optimizer", "model-00001-of-00003"):
        write_shard(folder / f"{name}.safetensors", {"a": VECTOR})
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates/rag.jinja").write_text("")
    after = local_names(str(folder))
    assert {*after} - {*before} == {"additional_chat_templates/rag.jinja"}
    assert {*before} <= {*after} and "config.json" in after
    (folder / INDEX).write_text("{")
    assert "optimizer.safetensors" in local_names(str(folder))


def expected_tensors(tmp_path: Path) -> Any:
    native.convert(DENSE, tmp_path / "expected.gguf", "all", "qwen35")
    return reader.read(tmp_path / "expected.gguf").tensors.keys()


def test_a_file_named_after_a_head_counts_only_if_it_has_one(
    tmp_path: Path, tensors: Tensors
) -> None:
    folder = write(tmp_path / "copy", {n: t for n, t in tensors.items() if not is_head(n)}, 2)
    write_shard(
        folder / "adapter-mtp.safetensors", {"base_model.model.mtp.fc.lora_A.weight": VECTOR}
    )
    assert "lost its head" in refusal(folder)
    write_shard(folder / "mtp-bf16.safetensors", {n: t for n, t in tensors.items() if is_head(n)})
    native.convert(folder, tmp_path / "all.gguf", "all", "qwen35")
    assert Checkpoint(folder).beside == ["adapter-mtp.safetensors"]


def test_a_folder_without_a_model_says_what_is_there(tmp_path: Path, tensors: Tensors) -> None:
    folder = write(tmp_path / "copy", tensors)
    (folder / "model.safetensors").rename(folder / "pytorch_model.safetensors")
    assert "rename pytorch_model.safetensors if it is the model" in refusal(folder)
    (folder / "pytorch_model.safetensors").unlink()
    assert "convert the weights to safetensors" in refusal(folder)


def test_an_index_that_lists_what_the_model_does_not_need_can_be_deleted(
    tmp_path: Path, tensors: Tensors
) -> None:
    folder = write(tmp_path / "copy", tensors, shards=2)
    edit_index(folder, {"lm_head.weight": SHARDS[1]})
    assert "delete the index if the shards are right" in refusal(folder)
    (folder / INDEX).unlink()
    native.convert(folder, tmp_path / "all.gguf", "all", "qwen35")


def test_a_byte_order_mark_is_named(tmp_path: Path, tensors: Tensors) -> None:
    folder = write(tmp_path / "copy", tensors)
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text(text, encoding="utf-8-sig")
    assert "config.json: begins with a byte order mark" in refusal(folder)


def test_a_missing_shard_of_a_set_without_index_is_named(tmp_path: Path, tensors: Tensors) -> None:
    folder = write(tmp_path / "copy", tensors, shards=3)
    (folder / INDEX).unlink()
    native.convert(folder, tmp_path / "all.gguf", "all", "qwen35")
    (folder / "model-00002-of-00003.safetensors").unlink()
    assert "model-00002-of-00003.safetensors: shard is missing" in refusal(folder)


def test_two_sets_without_index_are_refused(tmp_path: Path, tensors: Tensors) -> None:
    folder = write(tmp_path / "copy", tensors, shards=3)
    (folder / INDEX).unlink()
    write_shard(folder / SHARDS[0], {"a": VECTOR})
    assert "several sets of shards (model-*-of-00002, model-*-of-00003)" in refusal(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00001.safetensors"])
def test_an_index_of_other_shards_is_refused(tmp_path: Path, tensors: Tensors, name: str) -> None:
    folder = write(tmp_path / "copy", tensors, shards=2)
    for shard in SHARDS:
        (folder / shard).unlink()
    write_shard(folder / name, tensors)
    assert f"{name} is: if that is the model, delete {INDEX}" in refusal(folder)
    (folder / INDEX).unlink()
    native.convert(folder, tmp_path / "all.gguf", "all", "qwen35")


def test_a_stale_index_that_lists_a_lost_head_is_named_as_such(
    tmp_path: Path, tensors: Tensors
) -> None:
    folder = write(tmp_path / "copy", {n: t for n, t in tensors.items() if not is_head(n)}, 2)
    edit_index(folder, {name: SHARDS[1] for name in tensors if is_head(name)})
    message = refusal(folder)
    assert "the head is lost, the index is stale" in message and "head: none" in message
    native.convert(folder, tmp_path / "trunk.gguf", "trunk", "qwen35")


def test_a_head_of_which_a_tensor_is_lost_is_incomplete(tmp_path: Path, tensors: Tensors) -> None:
    folder = write(tmp_path / "copy", {n: t for n, t in tensors.items() if n != "mtp.fc.weight"}, 2)
    edit_index(folder, {"mtp.fc.weight": SHARDS[1]})
    assert "the head is incomplete" in refusal(folder)
    native.convert(folder, tmp_path / "trunk.gguf", "trunk", "qwen35")


def test_an_absent_shard_with_nothing_but_the_head_leaves_the_trunk(
    tmp_path: Path, tensors: Tensors
) -> None:
    folder = write(tmp_path / "copy", {n: t for n, t in tensors.items() if not is_head(n)}, 2)
    edit_index(folder, {name: "mtp-00001.safetensors" for name in tensors if is_head(name)})
    message = refusal(folder)
    assert "mtp-00001.safetensors: missing" in message and "head: none" in message
    native.convert(folder, tmp_path / "trunk.gguf", "trunk", "qwen35")


def test_a_vision_tower_that_only_the_index_has_is_not_missed(
    tmp_path: Path, tensors: Tensors
) -> None:
    folder = write(tmp_path / "copy", {n: t for n, t in tensors.items() if "visual" not in n}, 2)
    edit_index(folder, {name: SHARDS[0] for name in tensors if "visual" in name})
    native.convert(folder, tmp_path / "all.gguf", "all", "qwen35")


def test_an_index_with_tensors_in_another_shard_is_read(tmp_path: Path, tensors: Tensors) -> None:
    folder = write(tmp_path / "copy", tensors, shards=2)
    edit_index(folder, {"mtp.fc.weight": SHARDS[0]})
    native.convert(folder, tmp_path / "all.gguf", "all", "qwen35")


def test_a_trunk_tensor_only_in_the_index_is_refused(tmp_path: Path, tensors: Tensors) -> None:
    folder = write(tmp_path / "copy", tensors, shards=2)
    edit_index(folder, {"model.language_model.extra.weight": SHARDS[1]})
    message = "model.language_model.extra.weight is not in model-00002-of-00002"
    assert message in refusal(folder) and message in refusal(folder, "trunk")
