"""What a build has to download, and the checkpoint of a model without its weights."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mtpforge.checkpoint.checkpoint import Checkpoint, Outline
from mtpforge.checkpoint.families.registry import family_of
from mtpforge.forecast.reruns import Reruns
from mtpforge.gguf.file_names import gguf_files
from mtpforge.hub import download, freed, head
from mtpforge.hub.listing import Listing
from mtpforge.hub.resolve import list_commit
from mtpforge.rules import layout, lean
from mtpforge.rules.config import Model
from mtpforge.rules.variant import HubFile, HubRepository, Source

_TIMED = 1 << 20
"""Bytes of a file whose download tells the speed of the network."""


@dataclass(frozen=True)
class Download:
    """A file, or the head of a checkpoint, and the record that Snakemake has of it.

    `freed` is the record of a shard that is not whole, and `made` what is converted from it then,
    for each model.
    """

    bytes: int
    path: Path
    record: str
    freed: Path | None = None
    made: frozenset[str] = frozenset()

    @property
    def there(self) -> int:
        """Its bytes that take space on the disk: freed ones do not."""
        if not self.path.exists():
            return 0
        is_head = str(self.path) == self.record
        return self.bytes if is_head else min(self.bytes, 512 * self.path.stat().st_blocks)

    def needed(self, reruns: Reruns) -> bool:
        """Whether it is not here as a whole, and a step reads it."""
        if not self.path.exists():
            return reruns.get(self.record, "missing") is not None
        if not (self.freed and self.freed.exists()):
            return False
        return any(
            reruns.get(made, None if Path(made).exists() else "missing") is not None
            for made in self.made
        )


class Downloads:
    """What a build takes from the Hub, each file once."""

    def __init__(self) -> None:
        self.rate = 0.0
        """Bytes a second of the largest file that was downloaded to forecast; 0: none was."""
        self._downloads: dict[Path, Download] = {}
        self._models: dict[str, set[Path]] = {}
        self._model = set[Path]()
        """Those of the model whose forecast is being made."""
        self._freed: set[Path] = set()
        self._largest = _TIMED

    @property
    def total(self) -> int:
        """All their bytes."""
        return sum(each.bytes for each in self._downloads.values())

    def fetch(self, reruns: Reruns) -> int:
        """The bytes that have to be fetched."""
        return sum(each.bytes for each in self._downloads.values() if each.needed(reruns))

    def of(self, models: Sequence[str], reruns: Reruns) -> tuple[int, int, int]:
        """Of the last of these models: bytes to fetch, bytes that are there, and that stay.

        What the others need is there by then. The last number is that of those to fetch, less those
        that are deleted again.
        """
        before = set[Path]().union(*(self._models[key] for key in models[:-1]))
        found = [self._downloads[path] for path in self._models[models[-1]]]
        needed = [each for each in found if each.needed(reruns) and each.path not in before]
        there = [each.bytes if each.needed(reruns) else each.there for each in found]
        left = sum(each.bytes for each in needed)
        stays = sum(each.bytes - each.there for each in needed if each.path not in self._freed)
        return left, sum(there) - left, stays

    @property
    def there(self) -> int:
        """The bytes that they take on the disk already."""
        return sum(each.there for each in self._downloads.values())

    def freed(self, reruns: Reruns) -> int:
        """The bytes of those that are deleted again: files to compare with."""
        return sum(
            each.bytes
            for each in self._downloads.values()
            if each.path in self._freed and each.needed(reruns)
        )

    def outline(self, model: Model) -> Outline:
        """The checkpoint of a model, whose small files are downloaded. Raises ForgeError."""
        self._model = self._models.setdefault(model.key, set())
        if not model.native:
            return self._upstream_outline(model)
        named = [model.donor(variant) for variant in model.variants.values()]
        donors = {layout.head_checkpoint(donor): donor for donor in named if donor}
        for donor in donors.values():
            if isinstance(donor, HubRepository):
                self._add_head(donor)
        source = model.source if model.uses_source else None
        source = source or next(iter(donors.values()))
        if not isinstance(source, HubRepository):
            return Checkpoint(Path(source.path), model.name)
        listing = listing_of(source)
        if model.uses_source and not model.head_only:
            made = layout.unquantized(model, lean.whole_part(model)).file
            self._add_checkpoint(source, listing, made)
        elif model.uses_source:
            self._add_head(source)
        return self._outline(source, model.name)

    def drafter(self, model: Model) -> Outline | None:
        """The checkpoint of a model's drafter, if that is another one. Raises ForgeError."""
        return self._outline(model.drafter, None) if model.drafter else None

    def _upstream_outline(self, model: Model) -> Outline:
        """The checkpoint of a model that llama.cpp's converter converts, from whole ones."""
        sources = [source for source, _ in model.conversions()]
        for source in sources:
            if isinstance(source, HubRepository):
                self._add_checkpoint(source, listing_of(source))
        return self._outline(sources[0], model.name)

    def _outline(self, source: Source, name: str | None) -> Outline:
        if not isinstance(source, HubRepository):
            return Checkpoint(Path(source.path), name)
        listing = listing_of(source)
        folder = Path(layout.fetched(source))
        for small in listing.small_files():
            self._download(listing, small, folder)
        about = download.outline(listing)
        return Outline(
            folder, about.config, tensors=about.tensors, files=about.files, given_name=name
        )

    def file_size(self, file: layout.GivenFile) -> int:
        """The bytes of a base or importance matrix, with all its shards. Raises ForgeError."""
        if not isinstance(file, HubFile):
            path = Path(file.path)
            return sum(path.with_name(name).stat().st_size for name in gguf_files(path.name))
        listing = listing_of(file)
        sizes = {
            name: sum(listing.files[part].bytes for part in listing.parts(name))
            for name in gguf_files(file.file)
        }
        for name, size in sizes.items():
            self._add(size, Path(layout.fetched(file), name), layout.record(file, name))
        return sum(sizes.values())

    def free(self, files: Iterable[layout.GivenFile]) -> None:
        """Count these files as deleted once they are read."""
        for file in files:
            if isinstance(file, HubFile):
                names = gguf_files(file.file)
                self._freed.update(Path(layout.fetched(file), name) for name in names)

    def _download(self, listing: Listing, name: str, folder: Path) -> None:
        here = (folder / name).exists() or download.cached(listing, name).exists()
        start = time.perf_counter()
        size = download.download(listing, name, folder).bytes
        if not here and size >= self._largest:
            self._largest = size
            self.rate = size / (time.perf_counter() - start)

    def _add_checkpoint(self, source: HubRepository, listing: Listing, made: str = "") -> None:
        """Add a checkpoint, whose shards are freed as `made` is converted from them."""
        folder = Path(layout.fetched(source))
        for name in listing.checkpoint_files():
            not_whole = freed.record(folder, name) if made else None
            size = listing.files[name].bytes
            self._add(size, folder / name, layout.record(source, name), not_whole, made)

    def _add_head(self, source: HubRepository) -> None:
        listing = listing_of(source)
        family = family_of(download.outline(listing).architecture)
        size = sum(tensor.size for tensor in head.head_tensors(listing, family))
        record = layout.head_record(source)
        self._add(size, Path(record), record)

    def _add(
        self, size: int, path: Path, record: str, freed: Path | None = None, made: str = ""
    ) -> None:
        self._model.add(path)
        other = self._downloads.get(path)  # of another model
        if other:
            freed, models = freed or other.freed, other.made
        else:
            models = frozenset()
        self._downloads[path] = Download(size, path, record, freed, models | {made} - {""})


def listing_of(at: layout.Commit) -> Listing:
    """The listing of a commit, from the workflow's copy or from the Hub. Raises DownloadError."""
    listed = Path(layout.commit(at), "files.json")
    kept = listed.with_name(f".{listed.name}")  # `resolve` falls back on it
    for path in (listed, kept):
        if path.exists():
            return Listing.read(path)
    listing = list_commit(at.repo, at.revision)
    kept.parent.mkdir(parents=True, exist_ok=True)
    listing.write(kept)
    return listing
