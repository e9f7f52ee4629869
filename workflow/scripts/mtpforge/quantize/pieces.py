"""A quantization in pieces: some of the tensors at a time, and none whose bytes a finished file has already.

llama-quantize makes of some tensors the same bytes as of all, where each has its type given explicitly. So they can be made in
several jobs, be kept over a kill, and be taken from other quantizations. A manifest says which tensors a file has and under which
key (see `plan`); whatever is taken from a file is hashed, and made anew where it is not what the manifest says.
"""

import errno
import glob
import hashlib
import os
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Event, Lock

from gguf.constants import GGMLQuantizationType

from mtpforge.errors import ConfigError, GgufError
from mtpforge.gguf import quant_types, reader, writer
from mtpforge.gguf.reader import ALIGNMENT, PADDING, Gguf, TensorInfo, Value, drop_leading_ones
from mtpforge.io import atomic
from mtpforge.io.ranges import CHUNK, FileRange, forget, sha256
from mtpforge.llama_cpp import programs
from mtpforge.quantize.llama_quantize import run, without_vocabulary
from mtpforge.quantize.manifest import (
    MANIFESTS,
    Made,
    held,
    is_sound,
    named,
    present,
    read_manifest,
    same,
    write_manifest,
)
from mtpforge.quantize.plan import Plan, matrix_of, toolchain

WORTH, COPIES = 0.1, 3.0
"""A file is assembled from parts where other files have done at least this share of the work, by its cost, and saved so many times
what copying the rest takes, of which source and result are written twice."""

AT_ONCE, TIMES = 1 << 27, 8
"""Bytes of the source that are copied for a run of llama-quantize, or all experts of a matrix: more need more disk and memory, less
more runs. Where it has to make tables first, as many as take so many times as long as these."""


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
            wanted = (
                f"{self.plan.imatrix} ({self.plan.imatrix_sha256})" if self.plan.imatrix else "none"
            )
            raise ConfigError(
                f"the plan is for the importance matrix {wanted}, given is {self.imatrix}"
            )
        if toolchain(self.bin_dir) != self.plan.toolchain:
            raise ConfigError(
                f"the plan is for another llama-quantize than that in {self.bin_dir}: make the plan again"
            )

    # ── what is made ──

    def whole(self, out: Path, reuse: Path | None = None) -> dict[str, str]:
        """Write all of it to `out`, with tensors of finished files under `reuse`; its digests, as `reader.digests` has them."""
        with atomic.scratch_folder(out) as scratch, atomic.replacing(out) as temporary:
            made = self._worth(self.find(reuse, scratch)) if reuse else {}
            if made:
                return self._assemble(made, temporary, scratch)
            written = self._quantize(self.source, temporary)
            self._report(made, self.plan.tensors)
            return reader.digests_of(written, self.threads or None)

    def piece(
        self, folder: Path, number: int, count: int, reuse: Path | None = None
    ) -> dict[str, str]:
        """Write the tensors of one piece, counted from 1, that no finished file under `reuse` has; the digests of all that it has.

        They come as GGUFs in `folder`, each with its manifest, of what is quantized at once: a kill loses no more than one. Pieces
        can share a folder; what was made there is found again, however it is cut, where `reuse` has the folder in it.
        """
        names = cut(self.plan, self.source, count)[number - 1]
        with atomic.scratch_folder(folder / f"{number}-of-{count}") as scratch:
            found = self.find(reuse, scratch) if reuse else {}
            damaged = self._damaged(names, found, folder)
            made = {name: found[name] for name in names if name in found and name not in damaged}
            digests = {name: tensor.digest for name, tensor in made.items()}
            for at_once in self._runs(name for name in names if name not in made):
                out = folder / f"{_digest(self.plan, at_once)}.gguf"
                with atomic.replacing(out) as temporary:
                    digests |= reader.digests_of(
                        self._some(at_once, temporary, scratch), self.threads or None
                    )
                write_manifest(
                    out.with_suffix(".json"),
                    self.plan,
                    {name: digests[name] for name in at_once},
                    [out],
                )
            self._report(made, names)
            return {name: digests[name] for name in names}

    def find(self, folder: Path, scratch: Path) -> dict[str, Made]:
        """Of each tensor that some file under `folder` has, by the manifest of that file, where it is.

        The files get second names in `scratch`, by which they can be read until that is gone, whoever renames or deletes them.
        """
        keys, found = self.plan.keys(), dict[str, Made]()
        names = glob.glob(MANIFESTS, root_dir=folder, recursive=True)  # noqa: PTH207 (Path's fails where a folder goes meanwhile)
        for manifest in sorted(names):
            files, known = read_manifest(folder / manifest)
            wanted = {
                name: known[key] for name, key in keys.items() if key in known and name not in found
            }
            for path in present(files):
                if wanted.keys() <= found.keys():
                    break
                try:
                    opened = reader.read(held(path, scratch))
                except (GgufError, OSError):  # gone, or of another kind by now
                    continue
                for name, (own, digest) in wanted.items():
                    if (
                        name not in found
                        and own in opened.tensors
                        and same(opened.tensors[own], self._info(name))
                    ):
                        found[name] = Made(opened.ranges[own], digest, path)
        return {name: found[name] for name in keys if name in found}

    # ── how ──

    def _info(self, name: str) -> TensorInfo:
        """A tensor as it will be written: llama-quantize leaves out leading dimensions of one."""
        info, kind = self.source.tensors[name], GGMLQuantizationType[self.plan.tensors[name].type]
        return replace(info, shape=drop_leading_ones(info.shape), type=kind)

    def _quantize(self, source: Gguf, out: Path) -> Gguf:
        return run(
            source,
            out,
            self.plan.types(),
            self.plan.file_type,
            self.imatrix,
            self.threads,
            self.bin_dir,
            self.log,
        )

    def _some(self, names: Iterable[str], out: Path, scratch: Path) -> Gguf:
        """Quantize these tensors to `out`, in place, from parts of the source that share its blocks where they can."""
        wanted = set(names)
        if wanted == self.source.tensors.keys():
            return self._quantize(self.source, out)
        kept = reader.select_tensors(
            self.source, [name for name in self.source.tensors if name in wanted]
        )
        (name, info), *others = kept.tensors.items()
        made, count = None, info.shape[0]
        if others or len(info.shape) != 2 or count == 1 or info.size <= self._limit(name):
            return self._quantize(self._part(kept, scratch), out)
        step = self._limit(name) * count // info.size // ALIGNMENT * ALIGNMENT or ALIGNMENT
        for start in range(0, count - 1, step):
            size = (
                step if start + step < count - 1 else count - start
            )  # llama-quantize takes one row alone for no matrix
            fresh = self._quantize(
                self._part(reader.rows(kept, name, start, size), scratch), scratch / "rows.gguf"
            )
            made = made or writer.lay_out(out, fresh.metadata, [self._info(name)])
            writer.put(reader.rows(made, name, start, size), name, [fresh.ranges[name]])
        assert made
        return made

    def _part(self, kept: Gguf, scratch: Path) -> Gguf:
        """A file of what is in view of the source."""
        tensors = reader.contents(kept)
        metadata = writer.padded(without_vocabulary(self.source), tensors, kept)
        return writer.fill(scratch / "part.gguf", metadata, tensors)

    def _limit(self, name: str) -> int:
        """Bytes of the source that a run with this tensor may have."""
        info, kind = self.source.tensors[name], self.plan.tensors[name].type
        weights = TIMES * quant_types.TABLES.get(kind, 0) / quant_types.SECONDS[kind] * 1e9
        return max(AT_ONCE, int(weights * info.size / info.elements))

    def _runs(self, names: Iterable[str]) -> Iterator[list[str]]:
        """Tensors that are quantized at once: all that there are, or neighbours, or a larger one."""
        wanted = set(names)
        at_once, size, limit = (
            list[str](),
            0,
            sys.maxsize if wanted == self.source.tensors.keys() else 0,
        )
        for name in (name for name in self.source.tensors if name in wanted):
            size, limit = size + self.source.tensors[name].size, max(limit, self._limit(name))
            if at_once and size > limit:
                yield at_once
                at_once, size, limit = [], self.source.tensors[name].size, self._limit(name)
            at_once.append(name)
        if at_once:
            yield at_once

    def _assemble(self, made: dict[str, Made], out: Path, scratch: Path) -> dict[str, str]:
        """Write the whole, in place, of what is reused and of what is made now; its digests.

        What is reused is copied, and hashed where it then stands, while llama-quantize makes the rest; what is damaged or gone is
        made after that.
        """
        whole = writer.lay_out(
            out, self._metadata(scratch), [self._info(name) for name in self.plan.tensors]
        )
        with self._copying(made, whole) as copies:
            digests = self._put(self.plan.tensors.keys() - made, whole, scratch, copies.values())
            sound = {
                name: made[name]
                for name, copy in copies.items()
                if copy.result() == made[name].digest
            }
        if damaged := {name: tensor for name, tensor in made.items() if name not in sound}:
            self._warn(damaged)
            digests |= self._put(damaged, whole, scratch)
        self._report(sound, self.plan.tensors)
        digests |= {name: tensor.digest for name, tensor in sound.items()}
        return {
            "header": sha256(reader.header_range(whole)),
            **{name: digests[name] for name in self.plan.tensors},
        }

    def _metadata(self, scratch: Path) -> dict[str, Value]:
        """That of the whole: llama-quantize tells with the smallest tensor which keys it drops, and which it puts at the end."""
        smallest = min(self.source.tensors, key=lambda name: self.source.tensors[name].size)
        part, said = (
            without_vocabulary(self.source),
            self._some([smallest], scratch / "smallest.gguf", scratch).metadata,
        )
        names = list(said)
        own = {
            name: said[name] for name in names[names.index(PADDING) + 1 if PADDING in said else 0 :]
        }
        kept = [
            key
            for key in self.source.metadata
            if key not in own and (key in said or key not in part)
        ]
        return {key: self.source.metadata[key] for key in kept} | own

    def _put(
        self, names: Collection[str], whole: Gguf, scratch: Path, beside: Collection[Future[str]] = ()
    ) -> dict[str, str]:  # fmt: skip
        """Quantize tensors and put them into the whole; their digests. What fails `beside` is noticed soon."""
        digests = dict[str, str]()
        for at_once in self._runs(names):
            fresh = self._some(at_once, scratch / "rest.gguf", scratch)
            for name in at_once:
                writer.put(whole, name, [fresh.ranges[name]])
            fresh.path.unlink()
            digests |= reader.hashes(
                {name: whole.ranges[name] for name in at_once}, self.threads or None
            )
            for done in filter(Future.done, beside):
                done.result()
        return digests

    @contextmanager
    def _copying(self, made: Mapping[str, Made], whole: Gguf) -> Iterator[dict[str, Future[str]]]:
        """Put tensors into the whole while the block runs. Each gives its digest there, an empty one where it cannot be read."""

        stopped, writing = Event(), Lock()

        def steps(tensor: Made) -> Iterator[FileRange]:
            for done in range(0, tensor.piece.size, CHUNK):
                if stopped.is_set():  # a termination does not wait for gigabytes
                    raise CancelledError
                step = replace(
                    tensor.piece,
                    offset=tensor.piece.offset + done,
                    size=min(CHUNK, tensor.piece.size - done),
                )
                yield step
                if tensor.of_piece:  # it has been read for this: the next step gets its memory, where other can take longer
                    forget(step)

        def copy(name: str) -> str:
            try:
                with writing:  # a file system lets one write to a file at a time; other copies would spin on a processor
                    writer.put(whole, name, steps(made[name]))
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                return ""
            return sha256(whole.ranges[name])

        pool = ThreadPoolExecutor(
            1 + programs.threads(self.threads)
        )  # one waits for the disk while the others hash
        try:
            yield {name: pool.submit(copy, name) for name in made}
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)

    def _worth(self, made: dict[str, Made]) -> dict[str, Made]:
        """All of it, or nothing where that costs more than it saves."""
        rest = [name for name in self.plan.tensors if name not in made]
        copied = (
            COPIES
            * sum(self.source.tensors[name].elements for name in rest)
            * quant_types.SECONDS["BF16"]
            / 1e9
        )
        return {} if self._cost(made) < max(WORTH * self._cost(self.plan.tensors), copied) else made

    def _damaged(
        self, names: Iterable[str], found: Mapping[str, Made], folder: Path
    ) -> dict[str, Made]:
        """What of these is damaged in `folder`. It is taken from the manifests there."""
        inside = {
            name: tensor
            for name, tensor in found.items()
            if tensor.path.resolve().parent == folder.resolve()
        }
        own = {name: inside[name] for name in names if name in inside}
        with ThreadPoolExecutor(self.threads or os.cpu_count()) as pool:
            damaged = {
                name: own[name]
                for name, sound in zip(own, pool.map(is_sound, own.values()), strict=True)
                if not sound
            }
        if damaged:
            self._warn(damaged)
        for path in {tensor.path.resolve() for tensor in damaged.values()}:
            left = {
                name: tensor.digest
                for name, tensor in inside.items()
                if tensor.path.resolve() == path and name not in damaged
            }
            write_manifest(path.with_suffix(".json"), self.plan, left, [path])
        return damaged

    def _warn(self, damaged: Mapping[str, Made]) -> None:
        what = f"{next(iter(damaged))} and {len(damaged) - 1} more"
        self.say(
            f"warning: {named(damaged)}: {what} cannot be read, or are not what the manifest says: quantized anew"
        )

    def _cost(self, names: Iterable[str]) -> float:
        return sum(self.plan.tensors[name].cost for name in names)

    def _report(self, made: Mapping[str, Made], of: Iterable[str]) -> None:
        names = list(of)
        reused = {name: tensor for name, tensor in made.items() if not tensor.of_piece}
        size, pieces = sum(tensor.piece.size for tensor in reused.values()), len(made) - len(reused)
        line = f"reused {size:,} bytes ({len(reused)} of {len(names)} tensors) from {named(reused) or 'nothing'}; "
        line += (
            f"{pieces} from pieces; " if pieces else ""
        ) + f"quantized {len(names) - len(made)}"
        self.say(line)
        if self.log:
            with self.log.open("a", encoding="utf-8") as file:
                file.write(f"{line}\n")


def cut(plan: Plan, source: Gguf, count: int) -> list[list[str]]:
    """The tensors of each of `count` pieces: of about the same cost, and neighbours in the source, so that they can share it."""
    pieces: list[list[str]] = [[] for _ in range(count)]
    costs = {name: plan.tensors[name].cost for name in source.tensors}
    done, total = 0.0, sum(costs.values())
    for name in source.tensors:
        pieces[min(int(count * (done + costs[name] / 2) / total), count - 1)].append(name)
        done += costs[name]
    return pieces


def _digest(plan: Plan, names: Iterable[str]) -> str:
    """A name for a file with these tensors, which no file with others has."""
    keys = plan.keys()
    return hashlib.sha256("".join(f"{name} {keys[name]}\n" for name in names).encode()).hexdigest()[
        :16
    ]
