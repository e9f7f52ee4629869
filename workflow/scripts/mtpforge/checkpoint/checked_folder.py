"""Checks the files of a checkpoint against their recorded digests while they are read."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from mtpforge.checkpoint.safetensors import CheckpointTensor, ranges
from mtpforge.errors import CheckpointError
from mtpforge.hub import freed
from mtpforge.hub.freed import FreedShard, Kept
from mtpforge.io import integrity
from mtpforge.io.integrity import HEADER, Part
from mtpforge.io.ranges import FileRange
from mtpforge.io.text import JSON_LIMIT
from mtpforge.recorded_digests import Recorded, open_recorded

_SMALL = (".json", ".jinja", ".txt", ".md", ".model")
_TEMPLATES = "additional_chat_templates"


class CheckedFolder:
    """A checkpoint's folder; without recorded digests nothing is compared.

    Raises DamagedError if configuration, tokenizer or the header of a shard has changed.
    """

    def __init__(self, folder: Path, recorded: Path | None) -> None:
        self._folder = folder
        self._known = open_recorded(recorded, folder) if recorded else None
        self.freed = _freed(folder, recorded) if recorded and recorded.is_dir() else {}
        """The shards that are not whole any more."""
        self._reading = integrity.Reading()
        self._added: set[Part] = set()
        if self._known:
            self._reading.add(_small_parts(folder, self._known))
            self._reading.check()

    def add(self, tensors: Iterable[CheckpointTensor | None]) -> None:
        """Hash tensors that are about to be read, each once; of freed ones, what is left."""
        for tensor in filter(None, tensors):
            if self._known:
                path = self._folder / tensor.shard
                place = FileRange(path, tensor.offset, tensor.size)
                found = self._known.parts(path, {tensor.name: place})
                if kept := self.kept(tensor):
                    ranges = tuple(kept.ranges)
                    found = [replace(part, sha256=kept.sha256, kept=ranges) for part in found]
                parts = {*found} - self._added
                self._added |= parts
                self._reading.add(parts)

    def kept(self, tensor: CheckpointTensor) -> Kept | None:
        """What is left of a tensor that was freed; None if it is whole."""
        shard = self.freed.get(tensor.shard)
        return shard.tensors.get(tensor.name) if shard else None

    def never_whole(self, shard: str) -> bool:
        """Whether a shard has not been downloaded as a whole yet."""
        return shard in self.freed and self.freed[shard].never_whole

    def refetched(self, shard: str, digests: Mapping[str, str]) -> None:
        """Take note of a shard that is whole again, and of the sha256 of its tensors."""
        del self.freed[shard]
        if self._known:
            self._known.learn(shard, digests)

    def check(self) -> None:
        """Raise DamagedError if one of them has changed."""
        if self._known:
            self._reading.check()
            self._reading.stop()
            self._reading = integrity.Reading()


def _freed(folder: Path, recorded: Path) -> dict[str, FreedShard]:
    paths = {path.name: freed.record(recorded, path.name) for path in folder.glob("*.safetensors")}
    return {shard: freed.read(path) for shard, path in paths.items() if path.exists()}


def _small_parts(folder: Path, known: Recorded) -> list[Part]:
    """The files that conversion reads whole, and the headers of shards."""
    found = sorted([*folder.iterdir(), *(folder / _TEMPLATES).glob("*.jinja")])
    files = [path for path in found if path.is_file() and known.knows(path)]
    parts: list[Part] = []
    for path in files:
        if path.suffix == ".safetensors":
            parts += known.parts(path, {HEADER: _header(path)})
        elif path.suffix in _SMALL and path.stat().st_size <= JSON_LIMIT:  # or it is refused
            parts += known.parts(path, {integrity.WHOLE: FileRange(path, 0, path.stat().st_size)})
    return parts


def _header(path: Path) -> FileRange:
    """The header of a shard; the whole file, which is not what was recorded, if it is malformed."""
    try:
        return ranges(path)[HEADER]
    except CheckpointError:
        return FileRange(path, 0, path.stat().st_size)
