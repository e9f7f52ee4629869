"""File names of GGUFs: those of split ones, as llama-gguf-split writes them, and model names."""

import re
from collections.abc import Iterable
from pathlib import Path

from mtpforge.errors import GgufError

MOST_SHARDS = 999

_PART = re.compile(r"(.+\.gguf)\.part(\d{1,4})of(\d{1,4})")
_TYPE = r"[-._](?:UD-)?(?:I?Q\d\w*|T?Q\d_0|BF16|F16|F32|MXFP4\w*|NVFP4)"
_SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def gguf_files(name: str) -> list[str]:
    """All files of a GGUF, given the first one's name: the shards of a split GGUF in order.

    Parts (NAME.gguf.part1of2) are no files of their own: they are joined to NAME.gguf.
    """
    if part := _PART.fullmatch(name):
        return [part[1]]
    match = _SHARD.fullmatch(name)
    if match is None or not 1 <= int(match[3]) <= MOST_SHARDS:
        return [name]
    return [f"{match[1]}-{i:05}-of-{match[3]}.gguf" for i in range(1, int(match[3]) + 1)]


def shard_names(stem: str, count: int) -> list[str]:
    """The names from which llama.cpp finds all shards, given the first (`llama_split_path`)."""
    if count == 1:
        return [f"{stem}.gguf"]
    return [f"{stem}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]


def parts_of(name: str, names: Iterable[str]) -> list[str]:
    """Those of `names` that are parts of the GGUF `name`, in order; none if there are none.

    Raises GgufError if one is missing, or if the file was cut up in two ways.
    """
    found = [match for match in map(_PART.fullmatch, names) if match and match[1] == name]
    by_number = {int(match[2]): match[0] for match in found}
    counts = {int(match[3]) for match in found}
    if len(counts) > 1 or len(by_number) < len(found):
        raise GgufError(f"{name}: has parts of several cuts: {', '.join(by_number.values())}")
    numbers = range(1, max(counts, default=0) + 1)
    if missing := [number for number in numbers if number not in by_number]:
        raise GgufError(f"{name}: part {missing[0]} of {len(numbers)} is missing")
    return [by_number[number] for number in numbers]


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


def file_model(path: str) -> str:
    """The name of the model in a GGUF: its file's name without type and shard number."""
    stem = Path(path).name.removesuffix(".gguf")
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", stem)
    return re.sub(rf"(?<=.){_TYPE}$", "", stem, flags=re.IGNORECASE)


def repository_model(repo: str) -> str:
    """The name of the model in a repository OWNER/NAME-GGUF."""
    return re.sub(r"(?<=.)[-._]gguf$", "", repo.rpartition("/")[2], flags=re.IGNORECASE)
