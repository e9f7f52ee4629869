"""Pipes, folders, broken links and huge files in place of those that programs read."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import CHECKPOINTS
from mtpforge import prompts, recorded_digests
from mtpforge.errors import ConfigError, DamagedError, ForgeError
from mtpforge.hub.fetch_records import read_record, recorded_bytes
from mtpforge.hub.listing import Listing
from mtpforge.io.atomic import refuse_overwriting, replacing
from mtpforge.llama_cpp.stamp import Stamp
from mtpforge.publish.card_config import About
from mtpforge.publish.sums import read_sums
from mtpforge.quantize import recipe

Fails = Callable[..., str]


def _link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def _huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(3 << 30)


ODD: dict[str, Callable[[Path], object]] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "loop": _link_to_itself,
    "huge": _huge,
}
READERS: dict[str, Callable[[Path], object]] = {
    "record": Stamp.read,
    "record of a download": read_record,
    "listing": Listing.read,
    "sums": read_sums,
    "prompt": lambda path: prompts.read_prompts(path.parent),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("kind", ODD)
def test_only_regular_files_of_a_sane_size_are_read(tmp_path: Path, kind: str, reader: str) -> None:
    path = tmp_path / "file.txt"
    ODD[kind](path)
    with pytest.raises((ForgeError, OSError), match=r"file\.txt"):
        READERS[reader](path)


def test_the_size_of_a_download_is_not_read_from_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "record.json")
    with pytest.raises(ForgeError, match="regular file"):
        recorded_bytes(tmp_path / "record.json")


def test_a_listing_that_nests_for_ever_is_malformed(tmp_path: Path) -> None:
    (tmp_path / "files.json").write_text("[" * 100_000)
    with pytest.raises(ForgeError, match="nested"):
        Listing.read(tmp_path / "files.json")


OPTIONAL = [
    "README.md",
    "generation_config.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "hf_quant_config.json",
    "model.safetensors.index.json",
]


@pytest.mark.parametrize("name", OPTIONAL)
def test_a_broken_link_is_not_taken_for_a_file_that_need_not_exist(
    fails: Fails, tmp_path: Path, name: str
) -> None:
    """As in a copy of the Hub's cache without its blobs."""
    checkpoint = shutil.copytree(CHECKPOINTS / "tiny-qwen3.5", tmp_path / "copy")
    (checkpoint / name).unlink(missing_ok=True)
    (checkpoint / name).symlink_to("../../blobs/nothing")
    said = fails("convert.py", checkpoint, "--tokenizer-pre", "qwen35", out=tmp_path / "o.gguf")
    assert f"{name}: missing" in said


def test_a_loop_of_links_is_no_input_to_overwrite(tmp_path: Path) -> None:
    _link_to_itself(tmp_path / "a")
    refuse_overwriting(tmp_path / "out", tmp_path / "a")
    with pytest.raises(ForgeError, match="is an input"):
        refuse_overwriting(tmp_path / "a", tmp_path / "a")


def test_records_of_another_folder_are_refused(tmp_path: Path) -> None:
    (tmp_path / "records").mkdir()
    (tmp_path / "file").touch()
    for root in (tmp_path, tmp_path.parent):
        with pytest.raises(ForgeError, match="has no records of"):
            recorded_digests.open_recorded(tmp_path / "records", root)


@pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 99_999, '{"name": 1, "source": 7}'])
def test_a_malformed_option_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match="JSON"):
        About.parse(text)


def test_a_recipe_that_has_changed_is_damaged(tmp_path: Path) -> None:
    path, table = tmp_path / "Q4_K_M.yaml", {"attn_": "Q6_K", "é": "Q8_0"}
    path.write_text(recipe.as_text(table) + "\n")
    assert recipe.read_recipe(path) == list(table.items())
    path.write_text(path.read_text().replace("Q6_K", "Q4_K"))
    with pytest.raises(DamagedError, match=r"Q4_K_M\.yaml: damaged"):
        recipe.read_recipe(path)


@pytest.mark.parametrize("given", ["", ".", "/"])
def test_a_path_without_a_name_is_no_gguf(fails: Fails, tmp_path: Path, given: str) -> None:
    out = tmp_path / "o.gguf"
    fails("quantize.py", given, "--type", "Q8_0", out=out)
    fails("inject.py", given, "--head", CHECKPOINTS / "tiny-qwen3.5", out=out)


def test_an_output_never_replaces_a_pipe_or_has_no_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path(), Path("/")):
        with pytest.raises(ForgeError, match="name another output"), replacing(path):
            pass
    assert (tmp_path / "pipe").is_fifo()
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
