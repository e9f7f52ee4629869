"""What a build has to download, and the checkpoint of a model without its weights."""

from dataclasses import dataclass
from pathlib import Path

from mtpforge.checkpoint.checkpoint import Checkpoint, Outline
from mtpforge.checkpoint.families.registry import family_of
from mtpforge.gguf.file_names import gguf_files
from mtpforge.hub import download, head
from mtpforge.hub.listing import Listing
from mtpforge.hub.resolve import list_commit
from mtpforge.rules import layout
from mtpforge.rules.config import Model
from mtpforge.rules.variant import HubFile, HubRepository


@dataclass
class Downloads:
    """The bytes that a build takes from the Hub, and those of them that are here."""

    total: int = 0
    present: int = 0

    def outline(self, model: Model) -> Outline:
        """The checkpoint of a model, whose small files are downloaded. Raises ForgeError."""
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
        folder = Path(layout.fetched(source))
        if model.uses_source and not model.head_only:
            for name in listing.checkpoint_files():
                self._add(listing.files[name].bytes, folder / name)
        elif model.uses_source:
            self._add_head(source)
        for name in listing.small_files():
            download.download(listing, name, folder)
        about = download.outline(listing)
        return Outline(
            folder, about.config, tensors=about.tensors, files=about.files, given_name=model.name
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
            self._add(size, Path(layout.fetched(file), name))
        return sum(sizes.values())

    def _add_head(self, source: HubRepository) -> None:
        listing = listing_of(source)
        family = family_of(download.outline(listing).architecture)
        size = sum(tensor.size for tensor in head.head_tensors(listing, family))
        self._add(size, Path(layout.head_record(source)))

    def _add(self, size: int, path: Path) -> None:
        self.total += size
        self.present += size if path.exists() else 0


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
