"""Manifests: which tensors a finished file holds, so that other quantizations can reuse them."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mtpforge.errors import CheckpointError
from mtpforge.io import atomic
from mtpforge.io.text import read_json
from mtpforge.quantize.plan import QuantizePlan

MANIFESTS = "**/manifests/**/*.json"
"""Where `--reuse FOLDER` looks for manifests in FOLDER."""


@dataclass(frozen=True)
class ManifestEntry:
    """A tensor of a file: its name there, its key (see `QuantizePlan.keys`) and its sha256."""

    name: str
    key: str
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The tensors of a file, and every name the file has or will have.

    A split file is listed as the folder of its shards. On disk, names are relative to the manifest.
    """

    files: list[Path]
    tensors: list[ManifestEntry]

    @classmethod
    def of(
        cls, plan: QuantizePlan, digests: Mapping[str, str], files: Iterable[Path]
    ) -> "Manifest":
        """The manifest of a file that holds those planned tensors that `digests` (sha256) names."""
        keys = plan.keys()
        names = [name for name in plan.tensors if name in digests]
        entries = [ManifestEntry(name, keys[name], digests[name]) for name in names]
        return cls(list(files), entries)

    def write(self, path: Path) -> None:
        """Write it as JSON, one line per tensor."""
        files = [os.path.relpath(file, path.parent) for file in self.files]
        lines = [json.dumps([entry.name, entry.key, entry.sha256]) for entry in self.tensors]
        text = f'{{\n"files": {json.dumps(files)},\n"tensors": [\n' + ",\n".join(lines) + "\n]}\n"
        atomic.write_text(path, text)

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read a manifest; one without files or tensors if `path` is not a valid manifest."""
        try:
            value = read_json(path) if path.is_file() else {}  # opening a pipe would block forever
            tensors = [ManifestEntry(*map(str, entry)) for entry in value["tensors"]]
            files = [Path(os.path.normpath(path.parent / name)) for name in value["files"]]
        except (CheckpointError, OSError, KeyError, TypeError, ValueError):
            return cls([], [])
        return cls(files, tensors)

    def by_key(self) -> dict[str, ManifestEntry]:
        """The tensors by their keys."""
        return {entry.key: entry for entry in self.tensors}
