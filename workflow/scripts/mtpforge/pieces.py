"""A quantization in pieces: some of the tensors at a time, and none whose bytes a finished file has already.

llama-quantize makes of some tensors the same bytes as of all, where each has its type given explicitly. So they can be made in
several jobs, be kept over a kill, and be taken from other quantizations. A manifest says which tensors a file has and under which
key (see `plan`); whatever is taken from a file is hashed once it is copied, and made anew where it is not what the manifest says.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gguf.constants import GGMLQuantizationType

from . import atomic, gguf_file, programs, quant_types
from .checkpoint import read_json
from .errors import CheckpointError, ConfigError, GgufError
from .gguf_file import PADDING, Gguf, TensorInfo, squeezed
from .plan import Plan, matrix_of
from .quantize import run
from .ranges import CHUNK, FileRange, sha256

WORTH = 0.1
"""The least share of the work, by its cost, that other files must have done for a file to be assembled from parts: its bytes are
then written twice, and those of the source too."""

MANIFESTS = "**/manifests/**/*.json"


@dataclass(frozen=True)
class Made:
    """A tensor that is finished: where its bytes lie, and the sha256 that they should have."""

    piece: FileRange
    digest: str


@dataclass(frozen=True)
class Work:
    """A planned quantization of `source`, to be done in one go or in pieces; `say` gets what is worth a line.

    Raises GgufError for a source that the plan is not for, ConfigError for another importance matrix.
    """

    plan: Plan
    source: Gguf
    imatrix: Path | None = None
    threads: int = 0
    bin_dir: Path = programs.DEFAULT_BIN
    log: Path | None = None
    say: Callable[[str], None] = print

    def __post_init__(self) -> None:
        self.plan.check(self.source)
        if matrix_of(self.imatrix) != (self.plan.imatrix, self.plan.imatrix_sha256):
            wanted = f"{self.plan.imatrix} ({self.plan.imatrix_sha256})" if self.plan.imatrix else "none"
            raise ConfigError(f"the plan is for the importance matrix {wanted}, given is {self.imatrix}")

    # ── what is made ──

    def whole(self, out: Path, reuse: Path | None = None) -> dict[str, str]:
        """Write all of it to `out`, with tensors of finished files under `reuse`; its digests, as `gguf_file.digests` has them."""
        made = self.find(reuse) if reuse else {}
        if self._cost(made) < WORTH * self._cost(self.plan.tensors):
            made = {}
        with atomic.scratch_folder(out) as scratch, atomic.replacing(out) as temporary:
            if made:
                self._assemble(made, temporary, scratch)
            else:
                self._quantize(self.source.path, temporary)
            digests = gguf_file.digests(temporary, self.threads or None)
            if damaged := [name for name, tensor in made.items() if digests[name] != tensor.digest]:
                digests |= self._repair(temporary, damaged, made, scratch)
            self._report({name: tensor for name, tensor in made.items() if name not in damaged}, self.plan.tensors)
        return digests

    def piece(self, out: Path, number: int, count: int, reuse: Path | None = None) -> dict[str, str]:
        """Write the tensors of one piece, counted from 1, that no finished file under `reuse` has; the digests of what it got."""
        names, made = cut(self.plan, self.source, count)[number - 1], self.find(reuse) if reuse else {}
        with atomic.scratch_folder(out) as scratch, atomic.replacing(out) as temporary:
            if rest := [name for name in names if name not in made]:
                self._some(rest, temporary, scratch)
            else:
                gguf_file.fill(temporary, {}, [])
            self._report({name: made[name] for name in names if name in made}, names)
            return gguf_file.digests(temporary, self.threads or None)

    def find(self, folder: Path) -> dict[str, Made]:
        """Of each tensor that some file under `folder` has, by the manifest of that file, where it is."""
        keys, found = self.plan.keys(), dict[str, Made]()
        for manifest in sorted(folder.glob(MANIFESTS)):
            files, known = _read_manifest(manifest)
            wanted = {name: known[key] for name, key in keys.items() if key in known}
            for path in _present(files):
                if wanted.keys() <= found.keys():
                    break
                try:
                    opened = gguf_file.read(path)
                except (GgufError, OSError):  # of another kind by now
                    continue
                for name, (own, digest) in wanted.items():
                    if name not in found and own in opened.tensors and _same(opened.tensors[own], self._info(name)):
                        found[name] = Made(opened.ranges[own], digest)
        return found

    # ── how ──

    def _info(self, name: str) -> TensorInfo:
        """A tensor as it will be written: llama-quantize leaves out leading dimensions of one."""
        info, kind = self.source.tensors[name], GGMLQuantizationType[self.plan.tensors[name].type]
        return replace(info, shape=squeezed(info.shape), type=kind)

    def _quantize(self, source: Path, out: Path) -> Gguf:
        return run(source, out, self.plan.types(), self.plan.file_type, self.imatrix, self.threads, self.bin_dir, self.log)

    def _some(self, names: Iterable[str], out: Path, scratch: Path) -> Gguf:
        """Quantize these tensors to `out`, in place, from a part of the source that shares its blocks where it can."""
        wanted, part = set(names), scratch / "part.gguf"
        if wanted == self.source.tensors.keys():
            return self._quantize(self.source.path, out)
        kept = gguf_file.view(self.source, [name for name in self.source.tensors if name in wanted])
        tensors = gguf_file.contents(kept)
        gguf_file.fill(part, gguf_file.padded(self.source.metadata, tensors, kept), tensors, keep=False)
        made = self._quantize(part, out)
        part.unlink()
        return made

    def _assemble(self, made: Mapping[str, Made], out: Path, scratch: Path) -> None:
        """Write the whole, in place. Its metadata is llama-quantize's own, so that program runs where all tensors are made too."""
        smallest = min(self.source.tensors, key=lambda name: self.source.tensors[name].size)
        rest = [name for name in self.plan.tensors if name not in made] or [smallest]
        fresh = self._some(rest, scratch / "rest.gguf", scratch)
        metadata = {key: self.source.metadata.get(key, value) if key == PADDING else value for key, value in fresh.metadata.items()}
        if PADDING not in self.source.metadata:
            metadata.pop(PADDING, None)
        tensors = [(self._info(name), [made[name].piece if name in made else fresh.ranges[name]]) for name in self.plan.tensors]
        gguf_file.fill(out, metadata, tensors)

    def _repair(self, out: Path, damaged: Sequence[str], made: Mapping[str, Made], scratch: Path) -> dict[str, str]:
        """Make these tensors of the file anew, in their place; their digests."""
        files = ", ".join(sorted({str(made[name].piece.path) for name in damaged}))
        self.say(f"warning: {damaged[0]} and {len(damaged) - 1} more are not what the manifest of {files} says: quantized anew")
        fresh, places = self._some(damaged, scratch / "repaired.gguf", scratch), gguf_file.read(out).ranges
        for name in damaged:
            _overwrite(places[name], fresh.ranges[name])
        return {name: sha256(fresh.ranges[name]) for name in damaged}

    def _cost(self, names: Iterable[str]) -> float:
        return sum(cost(self.plan, self.source, name) for name in names)

    def _report(self, made: Mapping[str, Made], of: Iterable[str]) -> None:
        names, reused = list(of), sum(tensor.piece.size for tensor in made.values())
        files = ", ".join(sorted({str(tensor.piece.path) for tensor in made.values()})) or "nothing"
        line = f"reused {reused:,} bytes ({len(made)} of {len(names)} tensors) from {files}; quantized {len(names) - len(made)}"
        self.say(line)
        if self.log:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")


def cost(plan: Plan, source: Gguf, name: str) -> float:
    """CPU seconds that a tensor takes, roughly; of one that stays as it is, those of a copy."""
    info, kind = source.tensors[name], plan.tensors[name].type
    return info.elements * quant_types.SECONDS["BF16" if info.type.name == kind else kind] / 1e9


def cut(plan: Plan, source: Gguf, count: int) -> list[list[str]]:
    """The tensors of each of `count` pieces: of about the same cost, and neighbours in the source, so that they can share it."""
    pieces: list[list[str]] = [[] for _ in range(count)]
    costs = {name: cost(plan, source, name) for name in source.tensors}
    done, total = 0.0, sum(costs.values())
    for name in source.tensors:
        pieces[min(int(count * (done + costs[name] / 2) / total), count - 1)].append(name)
        done += costs[name]
    return pieces


def write_manifest(path: Path, plan: Plan, digests: Mapping[str, str], files: Iterable[Path]) -> None:
    """Say which tensors a file has, a line for each: its name, key and sha256. `files` are all names that it has or will have."""
    keys = plan.keys()
    names = [os.path.relpath(file, path.parent) for file in files]
    lines = [json.dumps([name, keys[name], digests[name]]) for name in plan.tensors if name in digests]
    atomic.write_text(path, f'{{\n"files": {json.dumps(names)},\n"tensors": [\n' + ",\n".join(lines) + "\n]}\n")


def _read_manifest(path: Path) -> tuple[list[Path], dict[str, tuple[str, str]]]:
    """Files by all their names, and by key a tensor's name there and its sha256; nothing where it is no manifest."""
    try:
        value = read_json(path)
        known = {str(key): (str(name), str(digest)) for name, key, digest in value["tensors"]}
        return [Path(os.path.normpath(path.parent / name)) for name in value["files"]], known
    except (CheckpointError, OSError, KeyError, TypeError, ValueError):
        return [], {}


def _present(files: Iterable[Path]) -> Iterator[Path]:
    """Those that are there, of a folder all GGUFs in it."""
    for file in files:
        yield from sorted(file.glob("*.gguf")) if file.is_dir() else [file] if file.exists() else []


def _same(found: TensorInfo, wanted: TensorInfo) -> bool:
    return (found.type, squeezed(found.shape)) == (wanted.type, wanted.shape)


def _overwrite(place: FileRange, fresh: FileRange) -> None:
    with place.path.open("r+b") as file, fresh.path.open("rb") as source:
        file.seek(place.offset)
        source.seek(fresh.offset)
        for start in range(0, fresh.size, CHUNK):
            file.write(source.read(min(CHUNK, fresh.size - start)))
