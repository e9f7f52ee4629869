"""A quantization in pieces: some of the tensors at a time, and none whose bytes a finished file has already.

llama-quantize makes of some tensors the same bytes as of all, where each has its type given explicitly. So they can be made in
several jobs, be kept over a kill, and be taken from other quantizations. A manifest says which tensors a file has and under which
key (see `plan`); whatever is taken from a file is hashed, and made anew where it is not what the manifest says.
"""

import errno
import glob
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from gguf.constants import GGMLQuantizationType

from . import atomic, gguf_file, programs, quant_types
from .checkpoint import read_json
from .errors import CheckpointError, ConfigError, GgufError
from .gguf_file import PADDING, Gguf, TensorInfo, squeezed
from .plan import Plan, matrix_of, toolchain
from .quantize import run
from .ranges import FileRange, Payload, sha256

WORTH, COPIES = 0.1, 3.0
"""A file is assembled from parts where other files have done at least this share of the work, by its cost, and saved so many times
what copying the rest takes: the source of the rest, and all of the result, are written twice."""

AT_ONCE = 1 << 29
"""Bytes of the source that a piece copies for one run of llama-quantize: more need more disk at a time, less mean more runs."""

MANIFESTS = "**/manifests/**/*.json"
_PIECES = "/manifests/pieces/"


@dataclass(frozen=True)
class Made:
    """A tensor that is finished: where its bytes lie, the sha256 that they should have, and what the file is called."""

    piece: FileRange
    digest: str
    path: Path


@dataclass(frozen=True)
class Work:
    """A planned quantization of `source`, to be done in one go or in pieces; `say` gets what is worth a line.

    Raises GgufError for a source that the plan is not for, ConfigError for another importance matrix or toolchain.
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
        if toolchain(self.bin_dir) != self.plan.toolchain:
            raise ConfigError(f"the plan is for another llama-quantize than that in {self.bin_dir}: make the plan again")

    # ── what is made ──

    def whole(self, out: Path, reuse: Path | None = None) -> dict[str, str]:
        """Write all of it to `out`, with tensors of finished files under `reuse`; its digests, as `gguf_file.digests` has them."""
        with atomic.scratch_folder(out) as scratch, atomic.replacing(out) as temporary:
            made = self._worth(self.find(reuse, scratch)) if reuse else {}
            if made:
                made, written = self._assemble(made, temporary, scratch)
            else:
                written = self._quantize(self.source, temporary)
            self._report(made, self.plan.tensors)
            to_hash = {name: piece for name, piece in written.ranges.items() if name not in made}
            to_hash["header"] = gguf_file.header_range(written)
            found = gguf_file.hashes(to_hash, self.threads or None) | {name: tensor.digest for name, tensor in made.items()}
            return {name: found[name] for name in ("header", *self.plan.tensors)}

    def piece(self, out: Path, number: int, count: int, reuse: Path | None = None) -> dict[str, str]:
        """Write the tensors of one piece, counted from 1, that no finished file under `reuse` has; the digests of what it got.

        What `out` has already, of this piece or, as it was cut before, of another, stays in it.
        """
        names = cut(self.plan, self.source, count)[number - 1]
        with atomic.scratch_folder(out) as scratch, atomic.replacing(out) as temporary:
            made = self.find(reuse, scratch) if reuse else {}
            own = {name: tensor for name, tensor in made.items() if tensor.path.resolve() == out.resolve()}
            with self._checking(own) as damaged:
                kept = {name: tensor for name, tensor in own.items() if name not in damaged()}
            made = {name: tensor for name, tensor in made.items() if name in kept or name not in own}
            rest = [name for name in names if name not in made]
            runs = list(self._runs(rest))
            if len(runs) == 1 and not kept:
                self._some(rest, temporary, scratch)
            else:
                fresh = [entry for names in runs for entry in self._later(names, scratch)]
                gguf_file.fill(temporary, {}, [*((self._info(name), [tensor.piece]) for name, tensor in kept.items()), *fresh])
            self._report({name: made[name] for name in names if name in made}, names)
            return gguf_file.digests(temporary, self.threads or None)

    def find(self, folder: Path, scratch: Path) -> dict[str, Made]:
        """Of each tensor that some file under `folder` has, by the manifest of that file, where it is.

        The files get second names in `scratch`, by which they can be read until that is gone, whoever renames or deletes them.
        """
        keys, found = self.plan.keys(), dict[str, Made]()
        names = glob.glob(MANIFESTS, root_dir=folder, recursive=True)  # noqa: PTH207 (Path's fails where a folder goes meanwhile)
        for manifest in sorted(names):
            files, known = _read_manifest(folder / manifest)
            wanted = {name: known[key] for name, key in keys.items() if key in known and name not in found}
            for path in _present(files):
                if wanted.keys() <= found.keys():
                    break
                try:
                    opened = gguf_file.read(_held(path, scratch))
                except (GgufError, OSError):  # gone, or of another kind by now
                    continue
                for name, (own, digest) in wanted.items():
                    if name not in found and own in opened.tensors and _same(opened.tensors[own], self._info(name)):
                        found[name] = Made(opened.ranges[own], digest, path)
        return {name: found[name] for name in keys if name in found}

    # ── how ──

    def _info(self, name: str) -> TensorInfo:
        """A tensor as it will be written: llama-quantize leaves out leading dimensions of one."""
        info, kind = self.source.tensors[name], GGMLQuantizationType[self.plan.tensors[name].type]
        return replace(info, shape=squeezed(info.shape), type=kind)

    def _quantize(self, source: Gguf, out: Path) -> Gguf:
        return run(source, out, self.plan.types(), self.plan.file_type, self.imatrix, self.threads, self.bin_dir, self.log)

    def _some(self, names: Iterable[str], out: Path, scratch: Path) -> Gguf:
        """Quantize these tensors to `out`, in place, from a part of the source that shares its blocks where it can."""
        wanted, part = set(names), scratch / "part.gguf"
        if wanted == self.source.tensors.keys():
            return self._quantize(self.source, out)
        kept = gguf_file.view(self.source, [name for name in self.source.tensors if name in wanted])
        tensors = gguf_file.contents(kept)
        metadata = gguf_file.padded(self.source.metadata, tensors, kept)
        made = self._quantize(gguf_file.fill(part, metadata, tensors, flush=False), out)
        part.unlink()
        return made

    def _runs(self, names: Sequence[str]) -> Iterator[list[str]]:
        """Tensors that are quantized at once: all that there are, or neighbours of at most `AT_ONCE` bytes."""
        limit = AT_ONCE if len(names) < len(self.source.tensors) else sys.maxsize
        run, size = list[str](), 0
        for name in names:
            size += self.source.tensors[name].size
            if run and size > limit:
                yield run
                run, size = [], self.source.tensors[name].size
            run.append(name)
        if run:
            yield run

    def _later(self, names: list[str], scratch: Path) -> list[tuple[TensorInfo, Payload]]:
        """Tensors that are quantized, all of them, when the first one's bytes are asked for; the next ones take their place."""

        @cache
        def made() -> Gguf:
            self.say(f"quantizing {names[0]} to {names[-1]}")
            return self._some(names, scratch / "rest.gguf", scratch)

        def bytes_of(name: str) -> Iterator[FileRange]:
            yield made().ranges[name]

        return [(self._info(name), bytes_of(name)) for name in names]

    def _assemble(self, made: dict[str, Made], out: Path, scratch: Path) -> tuple[dict[str, Made], Gguf]:
        """Write the whole, in place: what was reused for it, and what was written.

        Its metadata is llama-quantize's own, so that program runs where all tensors are made too. What is reused is hashed while
        it is copied, and read from the disk once; where some is damaged or gone, that is quantized and all is written again.
        """
        smallest = min(self.source.tensors, key=lambda name: self.source.tensors[name].size)
        rest = [name for name in self.plan.tensors if name not in made] or [smallest]
        fresh = self._some(rest, scratch / "rest.gguf", scratch)
        retried = False
        while True:
            with self._checking(made) as damaged:
                try:
                    written = self._fill(out, made, fresh)
                    if not damaged():
                        return made, written
                except OSError as error:
                    if error.errno in (errno.ENOSPC, errno.EDQUOT) or (retried and not damaged()):
                        raise
                    retried = not damaged()  # gone between hashing and copying: the next hashing will tell
            if damaged():
                made = {name: tensor for name, tensor in made.items() if name not in damaged()}
                anew = self._some(damaged(), scratch / f"anew-{len(made)}.gguf", scratch)
                fresh = replace(fresh, ranges=fresh.ranges | anew.ranges)

    def _fill(self, out: Path, made: Mapping[str, Made], fresh: Gguf) -> Gguf:
        """Put together what is reused and what was made, under the metadata that the latter has."""
        metadata = {key: self.source.metadata.get(key, value) if key == PADDING else value for key, value in fresh.metadata.items()}
        if PADDING not in self.source.metadata:
            metadata.pop(PADDING, None)
        ranges = fresh.ranges | {name: tensor.piece for name, tensor in made.items()}
        return gguf_file.fill(out, metadata, [(self._info(name), [ranges[name]]) for name in self.plan.tensors])

    def _worth(self, made: dict[str, Made]) -> dict[str, Made]:
        """All of it, or nothing where that costs more than it saves."""
        rest = [name for name in self.plan.tensors if name not in made]
        copied = COPIES * sum(self.source.tensors[name].elements for name in rest) * quant_types.SECONDS["BF16"] / 1e9
        return {} if self._cost(made) < max(WORTH * self._cost(self.plan.tensors), copied) else made

    @contextmanager
    def _checking(self, made: Mapping[str, Made]) -> Iterator[Callable[[], list[str]]]:
        """Hash tensors while the block runs. The function waits for the names of those that are gone or not as made."""

        def is_sound(tensor: Made) -> bool:
            try:
                return sha256(tensor.piece) == tensor.digest
            except OSError:
                return False

        pool = ThreadPoolExecutor(self.threads or os.cpu_count())
        try:
            results = pool.map(is_sound, made.values())

            @cache
            def damaged() -> list[str]:
                names = [name for name, sound in zip(made, results, strict=True) if not sound]
                if names:
                    files = _named({name: made[name] for name in names})
                    what = f"{names[0]} and {len(names) - 1} more"
                    self.say(f"warning: {files}: {what} cannot be read, or are not what the manifest says: quantized anew")
                return names

            yield damaged
        finally:
            pool.shutdown(cancel_futures=True)

    def _cost(self, names: Iterable[str]) -> float:
        return sum(cost(self.plan, self.source, name) for name in names)

    def _report(self, made: Mapping[str, Made], of: Iterable[str]) -> None:
        names = list(of)
        reused = {name: tensor for name, tensor in made.items() if _PIECES not in tensor.path.as_posix()}
        size, pieces = sum(tensor.piece.size for tensor in reused.values()), len(made) - len(reused)
        line = f"reused {size:,} bytes ({len(reused)} of {len(names)} tensors) from {_named(reused) or 'nothing'}; "
        line += (f"{pieces} from pieces; " if pieces else "") + f"quantized {len(names) - len(made)}"
        self.say(line)
        if self.log:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")


def _named(made: Mapping[str, Made]) -> str:
    return ", ".join(sorted({str(tensor.path) for tensor in made.values()}))


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
        value = read_json(path) if path.is_file() else {}  # a pipe would wait for ever
        known = {str(key): (str(name), str(digest)) for name, key, digest in value["tensors"]}
        return [Path(os.path.normpath(path.parent / name)) for name in value["files"]], known
    except (CheckpointError, OSError, KeyError, TypeError, ValueError):
        return [], {}


def _present(files: Iterable[Path]) -> Iterator[Path]:
    """Those that are there, of a folder all GGUFs in it."""
    for file in files:
        try:
            inside = sorted(file.glob("*.gguf")) if file.is_dir() else [file]
            yield from [path for path in inside if path.is_file()]
        except (OSError, ValueError):  # a name that cannot be, a folder that may not be read
            continue


def _held(path: Path, scratch: Path) -> Path:
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


def _same(found: TensorInfo, wanted: TensorInfo) -> bool:
    return (found.type, squeezed(found.shape)) == (wanted.type, wanted.shape)
