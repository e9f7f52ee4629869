"""Manifests: which tensors a finished file has and under which key, so that others can reuse them."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from mtpforge.errors import CheckpointError
from mtpforge.gguf.reader import TensorInfo, drop_leading_ones
from mtpforge.io import atomic
from mtpforge.io.ranges import FileRange, sha256
from mtpforge.io.text import read_json
from mtpforge.quantize.plan import Plan

MANIFESTS = "**/manifests/**/*.json"


@dataclass(frozen=True)
class Made:
    """A tensor that is finished: where its bytes lie, the sha256 that they should have, and what the file is called."""

    piece: FileRange
    digest: str
    path: Path

    @property
    def of_piece(self) -> bool:
        """Whether the file is a piece where the workflow has them, which are gone when the whole is there."""
        return "/manifests/pieces/" in f"/{self.path.as_posix()}"


def named(made: Mapping[str, Made]) -> str:
    """The files that the tensors lie in, for a message."""
    return ", ".join(sorted({str(tensor.path) for tensor in made.values()}))


def is_sound(tensor: Made) -> bool:
    """Whether the tensor's bytes can be read and have the sha256 of its manifest."""
    try:
        return sha256(tensor.piece) == tensor.digest
    except OSError:
        return False


def write_manifest(
    path: Path, plan: Plan, digests: Mapping[str, str], files: Iterable[Path]
) -> None:
    """Say which tensors a file has, a line for each: its name, key and sha256. `files` are all names that it has or will have."""
    keys = plan.keys()
    names = [os.path.relpath(file, path.parent) for file in files]
    lines = [
        json.dumps([name, keys[name], digests[name]]) for name in plan.tensors if name in digests
    ]
    atomic.write_text(
        path, f'{{\n"files": {json.dumps(names)},\n"tensors": [\n' + ",\n".join(lines) + "\n]}\n"
    )


def read_manifest(path: Path) -> tuple[list[Path], dict[str, tuple[str, str]]]:
    """Files by all their names, and by key a tensor's name there and its sha256; nothing where it is no manifest."""
    try:
        value = read_json(path) if path.is_file() else {}  # a pipe would wait for ever
        known = {str(key): (str(name), str(digest)) for name, key, digest in value["tensors"]}
        return [Path(os.path.normpath(path.parent / name)) for name in value["files"]], known
    except (CheckpointError, OSError, KeyError, TypeError, ValueError):
        return [], {}


def present(files: Iterable[Path]) -> Iterator[Path]:
    """Those that are there, of a folder all GGUFs in it."""
    for file in files:
        try:
            inside = sorted(file.glob("*.gguf")) if file.is_dir() else [file]
            yield from [path for path in inside if path.is_file()]
        except (OSError, ValueError):  # a name that cannot be, a folder that may not be read
            continue


def held(path: Path, scratch: Path) -> Path:
    """A second name of a file; where the file system has none, the first. Raises OSError where the file is gone."""
    path = path.resolve()
    about = path.stat()
    held = scratch / f"{about.st_dev}-{about.st_ino}.gguf"
    if not held.exists():
        try:
            os.link(path, held)
        except FileNotFoundError:
            raise
        except OSError:
            return path
    return held


def same(found: TensorInfo, wanted: TensorInfo) -> bool:
    """Whether type and shape agree, apart from leading dimensions of one."""
    return (found.type, drop_leading_ones(found.shape)) == (wanted.type, wanted.shape)
