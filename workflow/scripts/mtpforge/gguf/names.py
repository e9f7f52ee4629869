"""File names of split GGUFs, as llama-gguf-split writes them."""

import re
from pathlib import Path

from mtpforge.errors import GgufError

MOST_SHARDS = 999

_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def gguf_files(name: str) -> list[str]:
    """All files of a GGUF, given the first one's name: the shards of a split GGUF in order."""
    match = _SHARD.fullmatch(name)
    if match is None or not 1 <= int(match[3]) <= MOST_SHARDS:
        return [name]
    return [f"{match[1]}-{i:05}-of-{match[3]}.gguf" for i in range(1, int(match[3]) + 1)]


def shard_names(stem: str, count: int) -> list[str]:
    """The names from which llama.cpp finds all shards, given the first (`llama_split_path`)."""
    if count == 1:
        return [f"{stem}.gguf"]
    return [f"{stem}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]


def first_file(path: Path) -> Path:
    """The first file of a GGUF, given a file or the folder of a split one.

    Raises GgufError if the folder has no GGUF.
    """
    if not path.is_dir():
        return path
    files = sorted(path.glob("*.gguf"))
    if not files:
        raise GgufError(f"{path}: has no *.gguf files")
    return files[0]
