"""The listing of one commit of a Hub repository: files with sizes and digests, and tensors.

`resolve.list_commit` makes a listing once; downloads and the workflow's graph read it from JSON,
without the network.
"""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from sys import intern
from typing import Any

from mtpforge.checkpoint.model_files import INDEX
from mtpforge.checkpoint.safetensors import CheckpointTensor, shared
from mtpforge.errors import CheckpointError, DownloadError, GgufError
from mtpforge.gguf.file_names import gguf_files, parts_of
from mtpforge.io import text
from mtpforge.io.atomic import replacing

COMMIT = re.compile(r"[0-9a-f]{40}")
_OWNER = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
REPOSITORY = re.compile(rf"(?!.*(?:--|\.\.|\.git$)){_OWNER}/{_OWNER}")
"""OWNER/NAME by the Hub's rules."""
_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}"
FILE_PATH = re.compile(rf"({_NAME}/){{0,20}}{_NAME}")

# What conversion reads besides the shards. Never *.bin, *.pt or *.py: no code reaches the disk.
_SMALL = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|added_tokens|special_tokens_map"
    r"|(video_)?preprocessor_config|processor_config|hf_quant_config)\.json"
    r"|chat_template\.(jinja|json)|merges\.txt|vocab\.json|tokenizer\.model|README\.md"
    rf"|additional_chat_templates/{_NAME}\.jinja"
)


@dataclass(frozen=True)
class File:
    """Size and digest of a file of a commit.

    `digest` is its sha256 if it is stored with LFS, else the git id of its blob.
    """

    bytes: int
    digest: str

    @property
    def lfs(self) -> bool:
        """Whether `digest` is a sha256."""
        return len(self.digest) == 64


@dataclass(frozen=True)
class Listing:
    """Files and tensors of a commit by name, both sorted; GGUFs have no tensors here."""

    repo: str
    revision: str
    files: dict[str, File]
    tensors: dict[str, CheckpointTensor]
    lost: dict[str, str] = field(default_factory=dict)
    """As in `Weights`: tensors that only the index has."""

    @classmethod
    def read(cls, path: Path) -> "Listing":
        """Read what `write` wrote. Raises DownloadError if the file is malformed."""
        try:
            content = text.read_bytes(path, DownloadError, within=text.ANYWHERE)
            text.check_json(path, content, DownloadError, entries=text.MANY_ENTRIES)
            value = json.loads(content.decode(), object_pairs_hook=_compact)
            del content
            files = {name: File(**entry) for name, entry in value["files"].items()}
            tensors = value["tensors"]
            for name, entry in tensors.items():  # in place: there can be 200,000
                if type(entry) is not tuple:
                    raise ValueError(f"an entry of {name[:100]!r}")
                tensors[name] = CheckpointTensor(name, *entry)
            lost = text.member(value, "lost", dict, str(path)) or {}
            return cls(value["repo"], value["revision"], files=files, tensors=tensors, lost=lost)
        except CheckpointError as error:
            raise DownloadError(f"{error}: delete it and run again") from None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DownloadError(
                f"{path}: malformed listing ({error}): delete it and run again"
            ) from None

    def write(self, path: Path) -> None:
        """Write the listing as JSON, a line each; the same commit gives the same bytes."""
        needed = sum(map(len, self._parts()))  # all of it is ASCII
        with (
            replacing(path, needed=needed) as temporary,
            temporary.open("w", encoding="utf-8") as out,
        ):
            out.writelines(self._parts())

    def _parts(self) -> Iterator[str]:
        """Yield the JSON piece by piece: there can be 200,000 tensors."""
        yield f'{{"repo": {json.dumps(self.repo)},\n'
        yield f'"revision": {json.dumps(self.revision)},\n"files": {{'
        yield from _lines((name, asdict(file)) for name, file in self.files.items())
        yield '},\n"tensors": {'
        yield from _lines((name, _entry(each)) for name, each in self.tensors.items())
        yield "}"
        if self.lost:
            yield f',\n"lost": {json.dumps(self.lost)}'
        yield "}\n"

    @property
    def label(self) -> str:
        """Repository and commit, for messages."""
        return f"{self.repo} at {self.revision}"

    def small_files(self) -> list[str]:
        """Return configuration, tokenizer and model card."""
        return [name for name in self.files if _SMALL.fullmatch(name)]

    def checkpoint_files(self) -> list[str]:
        """Return everything that conversion reads.

        Without weights, `model.safetensors` is in the list, so that downloading it reports that.
        """
        shards = {tensor.shard for tensor in self.tensors.values()}
        names = [
            name for name in self.files if name in shards or name == INDEX or _SMALL.fullmatch(name)
        ]
        return names if shards else [*names, "model.safetensors"]

    def companions(self, name: str) -> list[str]:
        """Return the files that are useless without each other, `name` among them.

        These are a whole checkpoint, or all shards of a split GGUF.
        """
        return self.checkpoint_files() if name in self.checkpoint_files() else gguf_files(name)

    def parts(self, name: str) -> list[str]:
        """Return the files that make up `name`: itself, or the parts into which it was cut.

        Raises DownloadError if it is not there, or not whole.
        """
        if check_name(name) in self.files:
            return [name]
        try:
            if parts := parts_of(name, self.files):
                return parts
        except GgufError as error:
            raise DownloadError(f"{self.label}: {error}") from None
        raise DownloadError(
            f"{self.label}: {self._lacks(name)}: choose another repository, or another of its files"
        )

    def _lacks(self, name: str) -> str:
        if name == "model.safetensors":
            return "has no model*.safetensors"
        elsewhere = [path for path in self.files if path.endswith(f"/{Path(name).name}")]
        return f"has no file {name}" + (f", but {elsewhere[0]}" if elsewhere else "")


def _lines(entries: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[str]:
    """Yield the members of a JSON object, each on a line."""
    separator = "\n"
    for name, entry in entries:
        yield f"{separator}{json.dumps(name)}: {json.dumps(entry)}"
        separator = ",\n"


def _entry(tensor: CheckpointTensor) -> dict[str, Any]:
    return {
        "dtype": tensor.dtype,
        "shape": tensor.shape,
        "shard": tensor.shard,
        "offset": tensor.offset,
        "size": tensor.size,
    }


def _compact(pairs: list[tuple[str, Any]]) -> Any:
    """Return a tensor's entry as a tuple that shares its strings and shape with others."""
    entry = text.unique(pairs)
    if "digest" in entry:
        _check_counts(entry["bytes"])
    if "shard" not in entry:
        return entry
    dtype, shard, shape = entry["dtype"], entry["shard"], tuple(entry["shape"])
    offset, size = entry["offset"], entry["size"]
    _check_counts(offset, size, *shape)
    return intern(dtype), shared(shape), intern(check_name(shard)), offset, size


def _check_counts(*numbers: Any) -> None:
    for number in numbers:
        if type(number) is not int or number < 0:
            raise ValueError(f"{str(number)[:50]!r} is not a size")


def check_name(name: Any) -> str:
    """Return `name` if it is a plain file name, or one in a folder. Raises DownloadError."""
    if not isinstance(name, str) or not FILE_PATH.fullmatch(name):
        raise DownloadError(
            f"{name!r} is not a plain file name (letters, digits, '.', '_', '-'): refused"
        )
    return name
