"""File names of GGUFs that are split into several files, as llama-gguf-split names them."""

import re
from pathlib import Path

from mtpforge.errors import GgufError

MOST_SHARDS = 999
_SPLIT = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def gguf_files(name: str) -> list[str]:
    """The files of a GGUF by the name of its first: all shards of a split one, in order."""
    match = _SPLIT.fullmatch(name)
    if match is None or not 1 <= int(match[3]) <= MOST_SHARDS:
        return [name]
    return [f"{match[1]}-{i:05}-of-{match[3]}.gguf" for i in range(1, int(match[3]) + 1)]


def shard_names(stem: str, count: int) -> list[str]:
    """The files' names; llama.cpp finds the others by that of the first (`llama_split_path`)."""
    return (
        [f"{stem}.gguf"]
        if count == 1
        else [f"{stem}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]
    )


def first_of(path: Path) -> Path:
    """The GGUF itself, or the first of a folder of a split one. Raises GgufError where there is none."""
    if not path.is_dir():
        return path
    if not (found := sorted(path.glob("*.gguf"))):
        raise GgufError(f"{path}: no *.gguf files there")
    return found[0]
