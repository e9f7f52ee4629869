"""What one commit of a Hub repository holds: its files with sizes and digests, its tensors with their places in the shards.

`download.resolve` makes a listing once; fetching and the workflow's graph read it from its JSON, without the network.
"""

import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mtpforge.checkpoint.safetensors import INDEX, CheckpointTensor
from mtpforge.errors import DownloadError
from mtpforge.gguf.names import gguf_files
from mtpforge.io.atomic import write_json

COMMIT = re.compile(r"[0-9a-f]{40}")
REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")
FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")

# What conversion reads beside the shards. Never *.bin, *.pt or *.py: nothing that could be executed reaches the disk.
_SMALL = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|added_tokens|special_tokens_map|(video_)?preprocessor_config"
    r"|processor_config)\.json"
    r"|chat_template\.(jinja|json)|merges\.txt|vocab\.json|tokenizer\.model|README\.md"
)


@dataclass(frozen=True)
class File:
    """A file of a commit: `bytes` long; `digest` is its sha256 where it is stored with LFS, else the git id of its blob."""

    bytes: int
    digest: str

    @property
    def lfs(self) -> bool:
        """Whether `digest` is a sha256."""
        return len(self.digest) == 64


@dataclass(frozen=True)
class Listing:
    """Files by name and tensors by name, both sorted. A repository of GGUFs has no tensors here."""

    repo: str
    revision: str
    files: dict[str, File]
    tensors: dict[str, CheckpointTensor]

    @classmethod
    def read(cls, path: Path) -> "Listing":
        """The listing in a JSON file of `write`. Raises DownloadError where it is none."""
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            files = {name: File(**entry) for name, entry in value["files"].items()}
            tensors = {
                name: CheckpointTensor(name, **{**entry, "shape": tuple(entry["shape"])})
                for name, entry in value["tensors"].items()
            }
            return cls(value["repo"], value["revision"], files, tensors)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DownloadError(
                f"{path}: is not what resolve.py writes ({error}): delete it and run again"
            ) from None

    def write(self, path: Path) -> None:
        """As JSON, the same bytes for the same commit."""
        tensors = {
            name: {k: v for k, v in asdict(tensor).items() if k != "name"}
            for name, tensor in self.tensors.items()
        }
        files = {name: asdict(file) for name, file in self.files.items()}
        write_json(
            path, {"repo": self.repo, "revision": self.revision, "files": files, "tensors": tensors}
        )

    def small_files(self) -> list[str]:
        """Configuration, tokenizer and model card."""
        return [name for name in self.files if _SMALL.fullmatch(name)]

    def checkpoint_files(self) -> list[str]:
        """All that conversion reads; with `model.safetensors` where there are no weights, whose fetching then says so."""
        shards = {tensor.shard for tensor in self.tensors.values()}
        names = [
            name for name in self.files if name in shards or name == INDEX or _SMALL.fullmatch(name)
        ]
        return names if shards else [*names, "model.safetensors"]

    def companions(self, name: str) -> list[str]:
        """The files that are fetched together with `name`, itself among them: a whole checkpoint, or all shards of a GGUF."""
        return self.checkpoint_files() if name in self.checkpoint_files() else gguf_files(name)


def check_name(name: Any) -> str:
    """A name that may become a file's: a plain basename. Raises DownloadError."""
    if not isinstance(name, str) or not FILE_NAME.fullmatch(name):
        raise DownloadError(
            f"{name!r} is not a plain file name (letters, digits, '.', '_', '-'): refused"
        )
    return name
