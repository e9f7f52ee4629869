"""Quantizes a BF16 file while it is converted, so that it is never whole on the disk.

Each variant has one piece, with all its tensors in the places that they will have in the finished
file. Tensors are put there once they are converted, and then listed in the manifest of the piece,
from which a killed run goes on. Once all pieces have a tensor, it is freed in the BF16 file, except
for its first bytes, by which a plan knows its source.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mtpforge import progress
from mtpforge.errors import GgufError
from mtpforge.gguf import reader, writer
from mtpforge.gguf.reader import Gguf
from mtpforge.io import atomic, holes, storage
from mtpforge.io.journal import Journal
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.quantize.assembly import merged_metadata
from mtpforge.quantize.job import QuantizeJob
from mtpforge.quantize.llama_quantize import choose_types
from mtpforge.quantize.manifest import Manifest, ManifestEntry
from mtpforge.quantize.plan import SAMPLE, make_plan
from mtpforge.quantize.request import QuantizeRequest
from mtpforge.quantize.reuse import find_reusable


@dataclass(frozen=True)
class Wanted:
    """A file to make: the folder of its piece (see `pieces`), and what it should be.

    Tensors that finished files under `reuse` hold are not made again.
    """

    folder: Path
    request: QuantizeRequest
    reuse: Path | None = None


class Quantizing:
    """The pieces of the files that are made of a BF16 file while it is converted."""

    def __init__(self, wanted: Sequence[Wanted], llama: LlamaCpp) -> None:
        self._wanted = wanted
        self._llama = llama
        self._pieces: list[_Piece] = []
        self.has_freed = False
        """Whether the BF16 file is not whole."""

    def attach(self, journal: Journal, size: int) -> None:
        """Let a journal say which tensors of the BF16 file, of `size` bytes, are converted.

        They are quantized before anything else that follows from that.
        """
        folder = journal.temporary.parent
        folder.mkdir(parents=True, exist_ok=True)
        if not holes.are_supported(folder):
            progress.say("the BF16 file stays: this file system cannot free a part of a file")
            return
        then = journal.listed

        def listed(names: Collection[str]) -> None:
            self._converted(journal, names)
            if then:
                then(names)

        journal.listed = listed
        journal.settled = lambda: self._go_on(journal)
        journal.spare = size  # each step checks what it writes

    def _go_on(self, journal: Journal) -> set[str]:
        """Find the tensors that all pieces have already; called once, before the first step.

        Raises ConfigError for impossible types, StorageError if the files will not fit.
        """
        if not journal.is_kept:
            return set()
        source = reader.read(journal.temporary)
        self._pieces = [_Piece(each, source, self._llama) for each in self._wanted]
        for piece in self._pieces:
            piece.resume(journal.digests)
        missing = sum(piece.missing for piece in self._pieces if not piece.may_be_finished)
        if missing:
            storage.require(self._pieces[0].path, missing)
        return set(journal.digests).intersection(*(piece.done for piece in self._pieces))

    def _converted(self, journal: Journal, names: Collection[str]) -> None:
        """Quantize tensors, and then free them."""
        digests = {name: journal.digests[name] for name in names}
        for piece in self._pieces:
            piece.add(digests)
        places = reader.read(journal.temporary).ranges
        found = [places[name] for name in names]
        rest = [(each.offset + SAMPLE, each.size - SAMPLE) for each in found if each.size > SAMPLE]
        holes.punch(journal.temporary, rest)
        self.has_freed = True


class _Job(QuantizeJob):
    """A job whose plan is made here, while its source is still growing."""

    def __post_init__(self) -> None:
        """There is no other plan, and no digest of the whole source, to compare with."""


class _Piece:
    """The piece of one file."""

    def __init__(self, wanted: Wanted, source: Gguf, llama: LlamaCpp) -> None:
        self.path = wanted.folder / "whole.gguf"
        self._manifest = self.path.with_suffix(".json")
        self._whole: Gguf | None = None
        self._earlier: dict[str, ManifestEntry] = {}
        self._digests: dict[str, str] = {}
        self._reused: set[str] = set()
        self._reuse = wanted.reuse
        types = choose_types(source, wanted.request, llama)
        unknown = dict.fromkeys(["header", *source.tensors], "")
        plan = make_plan(source, unknown, types, wanted.request, llama)
        self._job = _Job(plan, source, llama, wanted.request.imatrix)

    @property
    def done(self) -> set[str]:
        """The tensors that it has, or need not have."""
        return self._digests.keys() | self._reused

    @property
    def may_be_finished(self) -> bool:
        """Whether there is a manifest of the file, as the rules name it."""
        folder = self.path.parent
        return Path(*folder.parts[:-3], folder.parent.name, f"{folder.name}.json").exists()

    @property
    def missing(self) -> int:
        """Bytes that it lacks on the disk."""
        names = self._job.source.tensors.keys() - self._reused
        there = 512 * self.path.stat().st_blocks if self.path.is_file() else 0
        return max(0, sum(self._job.target_info(name).size for name in names) - there)

    def resume(self, sources: Mapping[str, str]) -> None:
        """Open what an earlier run has left, and take over tensors with these digests."""
        if self.path.is_file():
            # A second name is that of a finished file, or of one that is just being made of it.
            self._whole = self._read() if self.path.stat().st_nlink == 1 else None
            if self._whole is None:
                self.path.unlink()
            else:
                self._earlier = Manifest.read(self._manifest).by_key()
        self._take_over(sources)

    def add(self, sources: Mapping[str, str]) -> None:
        """Quantize tensors with these digests, and list them once they are on the disk."""
        self._take_over(sources)
        names = [name for name in sources if name not in self.done]
        if names:
            with atomic.scratch_folder(self.path) as scratch:
                for batch in self._job.batches(names):
                    made = self._job.quantize_tensors(batch, scratch / "made.gguf", scratch)
                    self._put(made, batch)
            atomic.sync(self.path)
        if self._whole is not None:
            self._list()

    def _list(self) -> None:
        """Write the manifest; tensors that are not converted again yet stay in it."""
        made = Manifest.of(self._job.plan, self._digests, [self.path])
        waiting = {name for name, each in self._job.plan.tensors.items() if not each.source}
        left = [each for each in self._earlier.values() if each.name in waiting]
        replace(made, tensors=[*made.tensors, *left]).write(self._manifest)

    def _take_over(self, sources: Mapping[str, str]) -> None:
        """Find out which of the tensors with these digests need not be made."""
        self._note(sources)
        new = sources.keys() - self.done
        keys = self._job.plan.keys()
        known = {name: self._earlier[keys[name]] for name in new if keys[name] in self._earlier}
        places = self._whole.ranges if self._whole else {}
        found = reader.hashes({name: places[name] for name in known}, self._job.llama.processors)
        self._digests |= {name: found[name] for name in known if found[name] == known[name].sha256}
        self._find_finished(new - self._digests.keys())

    def _find_finished(self, names: Collection[str]) -> None:
        """Find out which of these tensors a finished file holds, intact."""
        if self._reuse is None or not names:
            return
        with atomic.scratch_folder(self.path) as scratch:
            found = find_reusable(self._job, self._reuse, scratch)
            others = {name: found[name] for name in names if name in found}
            self._reused |= {
                name for name, each in others.items() if not each.in_piece and each.is_intact()
            }

    def _put(self, made: Gguf, names: Collection[str]) -> None:
        infos = [self._job.target_info(name) for name in self._job.plan.tensors]
        with storage.naming(self.path, self._job.size):
            if self._whole is None:
                metadata = merged_metadata(self._job.source, made)
                self._whole = writer.lay_out(self.path, metadata, infos)
            for name in names:
                writer.put(self._whole, name, [made.ranges[name]])
        places = {name: made.ranges[name] for name in names}
        self._digests |= reader.hashes(places, self._job.llama.processors)

    def _note(self, sources: Mapping[str, str]) -> None:
        """Complete the plan with the digests of tensors that are converted.

        What was made of a tensor with another digest is forgotten.
        """
        tensors = self._job.plan.tensors
        changed = {name for name in sources if tensors[name].source not in ("", sources[name])}
        self._reused -= changed
        self._digests = {name: self._digests[name] for name in self._digests.keys() - changed}
        tensors |= {name: replace(tensors[name], source=sources[name]) for name in sources}

    def _read(self) -> Gguf | None:
        """What a killed run has left; None if it was made with other types, or has no header."""
        try:
            found = reader.read(self.path)
        except GgufError:
            return None
        wanted = [self._job.target_info(name) for name in self._job.plan.tensors]
        return found if list(found.tensors.values()) == wanted else None
