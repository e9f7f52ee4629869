"""A model in one file per unit, as it is and quantized: a mixture of both needs only links.

So the weights are written once for all runs, and not once a run.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mtpforge.errors import ConfigError
from mtpforge.gguf import split, writer
from mtpforge.gguf.file_names import shard_names
from mtpforge.gguf.reader import Gguf
from mtpforge.io import storage
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.quantize.llama_quantize import run
from mtpforge.quantize.mixture import Types
from mtpforge.search import groups
from mtpforge.search.errors import FILE_TYPE

MOST = 960
"""Units of a model: llama.cpp keeps all shards open, and its programs may open 1024 files."""


@dataclass(frozen=True)
class UnitFiles:
    """Shards of a split GGUF in `folder`. The first one has everything that is in no unit."""

    folder: Path
    numbers: Mapping[str, int]
    """Of each tensor of a unit, the number of its shard, counted from 0."""

    @classmethod
    def write(
        cls, source: Gguf, folder: Path, types: Types, matrix: Path | None, llama: LlamaCpp
    ) -> "UnitFiles":
        """Write the units of `source` as they are, and at `types`. Raises ForgeError."""
        units = list(groups.units(source).values())
        if len(units) > MOST:
            raise ConfigError(
                f"{source.path}: has {len(units)} groups of tensors, and at most {MOST} can be "
                "tried: set `sensitivity: prior`"
            )
        numbers = {name: number for number, names in enumerate(units, 1) for name in names}
        others = [name for name in source.tensors if name not in numbers]
        storage.require(folder / "x", disk(source, types))
        all_types = {name: info.known_type for name, info in source.tensors.items()} | dict(types)
        quantized = run(
            source,
            folder / "quantized.gguf",
            types=all_types,
            file_type=FILE_TYPE,
            matrix=matrix,
            llama=llama,
        )
        for kind, opened in (("plain", source), ("quantized", quantized)):
            for number, names in enumerate([others, *units]):
                _write_shard(folder / f"{kind}-{number}.gguf", opened, names, number, len(units))
        quantized.path.unlink()
        return cls(folder, numbers)

    def link(self, names: Iterable[str], folder: Path) -> Path:
        """Make a model in `folder` in which the units of these tensors are quantized: its path."""
        chosen = {self.numbers[name] for name in names}
        files = shard_names("model", max(self.numbers.values()) + 1)
        for number, name in enumerate(files):
            kind = "quantized" if number in chosen else "plain"
            (folder / name).symlink_to(self.folder.absolute() / f"{kind}-{number}.gguf")
        return folder / files[0]


def disk(source: Gguf, types: Types) -> int:
    """The most bytes that the files take while they are written."""
    plain = sum(info.size for info in source.tensors.values())
    quantized = sum(
        replace(info, type=types.get(name, info.type)).size for name, info in source.tensors.items()
    )
    return plain + 2 * quantized


def _write_shard(path: Path, opened: Gguf, names: Sequence[str], number: int, last: int) -> None:
    infos = [opened.tensors[name] for name in names]
    metadata, entries = split.one_shard(opened, infos, number, last + 1)
    tensors = [(info, [opened.ranges[info.name]]) for info in entries]
    writer.write_scratch(path, metadata, tensors)
