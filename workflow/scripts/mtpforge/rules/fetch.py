"""Stage `fetch`: files from the Hub, and the inputs of jobs that read them."""

import re
import shlex
from contextlib import suppress
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from mtpforge import local_files
from mtpforge.checkpoint import model_files
from mtpforge.checkpoint.quantization import CODES
from mtpforge.convert import chat_templates
from mtpforge.errors import ConfigError, DownloadError
from mtpforge.gguf.file_names import gguf_files
from mtpforge.hub.fetch_records import recorded_bytes
from mtpforge.hub.listing import Listing
from mtpforge.io import storage
from mtpforge.rules import layout, lean, local_paths
from mtpforge.rules.config import Config, Model
from mtpforge.rules.local_paths import PromptsPath, TextPath
from mtpforge.rules.stage import Stage, Wildcards
from mtpforge.rules.variant import (
    HubFile,
    HubRepository,
    ImatrixText,
    LocalFolder,
    Source,
)

KINDS = (".json", ".safetensors", ".jinja", ".txt", ".md", ".model")
"""Kinds of files that belong to a local checkpoint."""
_EXPERTS = re.compile(r"\.experts\.(?:(\d{1,6})\.)?")
_RUNNING = 16
"""Most experts of a layer that run for a token: a listing does not say how many, mostly 8."""


class FetchRules(Stage):
    """Inputs and parameters of rules/fetch.smk.

    `checkpoints` are Snakemake's: the graph learns from them which files a repository has.
    """

    def __init__(self, config: Config, checkpoints: Any) -> None:
        super().__init__(config)
        self._checkpoints = checkpoints
        self._local = {layout.place(path): path for path in given_paths(config)}
        self._donors = {layout.donor_name(donor): donor for donor in _donors(config)}

    def folder(self, wildcards: Wildcards) -> str:
        """The folder of a repository's files."""
        return layout.fetched(wildcards)

    def head_folder(self, wildcards: Wildcards) -> str:
        """The folder of a checkpoint whose head alone is downloaded."""
        return layout.fetched_head(wildcards)

    def conversions(self, wildcards: Wildcards) -> str:
        """The option that names what models need of a repository: CONVERTER:PART of each."""
        wanted = {
            conversion
            for model in self.config.models.values()
            for source, conversion in model.conversions()
            if _is(source, wildcards)
        }
        return " ".join(["--convert", *sorted(wanted)]) if wanted else ""

    def heads(self, wildcards: Wildcards) -> list[str]:
        """Listings of other repositories whose heads are to draft for this one's trunk."""
        heads = self._heads(wildcards)
        return [_listing(head) for head in heads if isinstance(head, HubRepository)]

    def pairs(self, wildcards: Wildcards) -> str:
        """Options that name the checkpoints that this one must fit: heads, and local trunks."""
        heads = [_listing(head) for head in self._heads(wildcards)]
        trunks = [
            model.source.path
            for model in self.config.models.values()
            if isinstance(model.source, LocalFolder) and _is(model.drafter, wildcards)
        ]
        named = [("--heads", heads), ("--trunks", trunks)]
        return shlex.join(word for option, paths in named if paths for word in (option, *paths))

    def checkpoint(self, wildcards: Wildcards) -> str:
        """The folder of a model's checkpoint."""
        return layout.checkpoint(self.model(wildcards))

    def checkpoint_inputs(self, wildcards: Wildcards) -> list[str]:
        """Inputs of a job that reads the checkpoint: its files, or the records of fetched files.

        A shard has no record until it is verified, and touching it changes no record.
        """
        model = self.model(wildcards)
        if model.source is None or not model.uses_source:
            return []
        return head_inputs(model.source) if model.head_only else self._whole(model.source)

    def sparse(self, wildcards: Wildcards) -> str:
        """The option that leaves the large tensors of a shard to a conversion shard by shard.

        It is no parameter: what conversion makes is the same.
        """
        models = self.config.models.values()
        wanted = any(
            _is(model.source, wildcards) for model in models if lean.by_shards(self.config, model)
        )
        return "--sparse" if wanted and wildcards.file.endswith(".safetensors") else ""

    def conversion_inputs(self, wildcards: Wildcards) -> list[str]:
        """Inputs of a job that converts a part of the checkpoint.

        One that also quantizes waits for what it needs, which is no input: see the rule `ready`.
        """
        if lean.by_shards(self.config, self.model(wildcards)):
            self._checkpoints.ready.get(model=wildcards.model)
        if wildcards.part in ("all", "draft"):
            return self.sidecar_inputs(wildcards)
        return [*self.checkpoint_inputs(wildcards), *_template(self.model(wildcards))]

    def sidecar_inputs(self, wildcards: Wildcards) -> list[str]:
        """Inputs of a job that reads the checkpoint, and that of the head."""
        model = self.model(wildcards)
        head = self.inputs_of_donor(model, model.head_from) if model.head_from else []
        return [*self.checkpoint_inputs(wildcards), *head, *_template(model)]

    def upstream_checkpoint(self, wildcards: Wildcards) -> str:
        """The folder of the checkpoint that llama.cpp's converter makes a part from."""
        model = self.model(wildcards)
        if wildcards.part == "draft" and model.drafter:
            return layout.donor_checkpoint(model, model.drafter)
        return layout.checkpoint(model)

    def upstream_recorded_option(self, wildcards: Wildcards) -> str:
        """The option that names the digests of that checkpoint."""
        model = self.model(wildcards)
        if wildcards.part == "draft" and model.drafter:
            return shlex.join(["--recorded", recorded_donor(model, model.drafter)])
        return self.recorded_option(wildcards)

    def upstream_inputs(self, wildcards: Wildcards) -> list[str]:
        """Inputs of a job that runs it."""
        model = self.model(wildcards)
        if wildcards.part == "draft" and model.drafter:
            return [*self.inputs_of_donor(model, model.drafter), *_template(model)]
        return [*self.checkpoint_inputs(wildcards), *_template(model)]

    def variant_inputs(self, wildcards: Wildcards) -> list[str]:
        """Inputs of a job that compares a variant with its checkpoint, and with its head's."""
        model, variant = self.model(wildcards), self.variant(wildcards)
        donor = model.donor(variant)
        own = [] if model.adopts(variant) else self.checkpoint_inputs(wildcards)
        own += [] if variant.foreign else _template(model)
        return [*own, *(self.inputs_of_donor(model, donor) if donor else [])]

    def recorded_option(self, wildcards: Wildcards) -> str:
        """The option that names the digests of a model's checkpoint."""
        return shlex.join(["--recorded", recorded(self.model(wildcards))])

    def donor_recorded_option(self, wildcards: Wildcards) -> str:
        """The same for the checkpoint that a head is from."""
        donor = recorded_donor(self.model(wildcards), self._donor(wildcards))
        return shlex.join(["--recorded", donor])

    def donor(self, wildcards: Wildcards) -> str:
        """The folder of the checkpoint that a head is from."""
        return layout.donor_checkpoint(self.model(wildcards), self._donor(wildcards))

    def donor_inputs(self, wildcards: Wildcards) -> list[str]:
        """Inputs of a job that reads its head."""
        return self.inputs_of_donor(self.model(wildcards), self._donor(wildcards))

    def inputs_of_donor(self, model: Model, donor: Source) -> list[str]:
        """The same, for a donor of a model."""
        return head_inputs(donor) if model.native else self._whole(donor)

    def local_folder(self, wildcards: Wildcards) -> str:
        """The folder of local files that are recorded together."""
        return str(local_folder(self._local_path(wildcards.place)))

    def local_names(self, wildcards: Wildcards) -> list[str]:
        """Their names in it."""
        return local_names(self._local_path(wildcards.place))

    def local_files(self, wildcards: Wildcards) -> list[str]:
        """Their paths."""
        path = self._local_path(wildcards.place)
        return [str(local_folder(path) / name) for name in local_names(path)]

    def given_files(self, inputs: list[str]) -> list[str]:
        """The same inputs with the local files in place of their records."""
        places = {layout.local_record(path): path for path in self._local.values()}
        found: list[str] = []
        for path in inputs:
            given = places.get(path)
            names = local_names(given) if given else []
            found += [str(local_folder(given) / name) for name in names] if given else [path]
        return found

    def refresh_local(self) -> None:
        """Bring the records of all local files up to date: a file with another time is read again.

        Raises ForgeError if one cannot be read, or its record not be written.
        """
        for path in self._local.values():
            record = Path(layout.local_record(path))
            if record.exists() and Path(path).exists():
                try:
                    local_files.refresh(local_folder(path), local_names(path), record)
                except OSError as error:
                    raise storage.explain(error) from None

    def checkpoint_files(self, at: layout.Commit) -> list[str]:
        """The files of a commit that conversion and model cards need."""
        made = self._checkpoints.resolve.get(repo=at.repo, revision=at.revision)
        return _parsed(Path(made.output[0])).checkpoint_files

    def _whole(self, source: Source) -> list[str]:
        if not isinstance(source, HubRepository):
            return head_inputs(source)
        return [checked_record(source, name) for name in self.checkpoint_files(source)]

    def _heads(self, wildcards: layout.Commit) -> list[Source]:
        """The checkpoints of draft models for this repository's trunk."""
        models = self.config.models.values()
        return [m.drafter for m in models if m.drafter and _is(m.source, wildcards)]

    def _local_path(self, place: str) -> str:
        if place not in self._local:
            raise ConfigError(f"config.yaml: no file or folder is {place}")
        return self._local[place]

    def _donor(self, wildcards: Wildcards) -> Source:
        if wildcards.donor not in self._donors:
            raise ConfigError(f"config.yaml: no `head_from` is {wildcards.donor}")
        return self._donors[wildcards.donor]


def _is(source: Source | None, at: layout.Commit) -> bool:
    """Whether a source is this commit of the Hub."""
    return isinstance(source, HubRepository) and layout.commit(source) == layout.commit(at)


def _listing(source: Source) -> str:
    """What shows the tensors of a checkpoint: the listing of its commit, or its folder."""
    if isinstance(source, HubRepository):
        return f"{layout.commit(source)}/files.json"
    return source.path


class Listed(NamedTuple):
    """What jobs need of a listing.

    These are the files that conversion reads, the bytes of all files, those of all tensors at BF16,
    and those of them that are read for a token: of experts, only those that run.
    """

    checkpoint_files: list[str]
    sizes: dict[str, int]
    weights: int
    active: float


def listed(at: layout.Commit) -> Listed | None:
    """The listing of a commit; None if it is not there yet."""
    with suppress(OSError, DownloadError):
        return _parsed(Path(layout.commit(at), "files.json"))
    return None


def _parsed(listing: Path) -> Listed:
    return _parse(listing, listing.stat().st_mtime_ns)


@lru_cache
def _parse(listing: Path, written: int) -> Listed:
    """A listing, parsed once for all jobs unless `written` anew."""
    read = Listing.read(listing)
    sizes = {name: file.bytes for name, file in read.files.items()}
    weights = {
        name: 2 * prod(each.shape) * _weights_in_one(name, each.dtype)
        for name, each in read.tensors.items()
    }
    total = sum(weights.values())
    idle = _idle_share(read) * sum(size for name, size in weights.items() if _EXPERTS.search(name))
    return Listed(read.checkpoint_files(), sizes=sizes, weights=total, active=total - idle)


def _idle_share(listing: Listing) -> float:
    """The share of experts that do not run for a token. They are stacked, or numbered."""
    counts = [1]
    for name, tensor in listing.tensors.items():
        if found := _EXPERTS.search(name):
            counts.append(int(found[1]) + 1 if found[1] else max(tensor.shape[:1], default=1))
    return 1 - min(1, _RUNNING / max(counts))


def _weights_in_one(name: str, dtype: str) -> int:
    """How many weights of 4 bits an element of a packed tensor has; 1 of any other."""
    if dtype == "I32" and name.endswith(CODES):
        return 8
    return 2 if dtype == "U8" else 1


def head_inputs(source: Source) -> list[str]:
    """Inputs of a job that reads the head of a checkpoint: its record, or that of a local one."""
    if isinstance(source, HubRepository):
        return [layout.head_record(source)]
    return [layout.local_record(source.path)]


def given_paths(config: Config) -> list[str]:
    """All files and checkpoints of the configuration that are on this machine."""
    found = local_paths.find(config.models, "models")
    return [path for _, path in found if not isinstance(path, PromptsPath)]


def local_folder(path: str) -> Path:
    """The folder of a local file, or the local checkpoint itself."""
    return Path(path) if Path(path).is_dir() else Path(path).parent


def local_names(path: str) -> list[str]:
    """The files of a local checkpoint or GGUF, or the file itself, by their names in its folder."""
    folder = Path(path)
    if isinstance(path, TextPath):
        return path.names()
    if not folder.is_dir():
        return gguf_files(folder.name)
    others = {"reference.json", *model_files.files_beside(folder)}
    files = [each for each in folder.iterdir() if each.suffix in KINDS and each.is_file()]
    files += chat_templates.additional(folder)
    return sorted(str(each.relative_to(folder)) for each in files if each.name not in others)


def local_size(path: str) -> int:
    """Bytes of a local file with its shards, or of a checkpoint; 0 if a file is missing.

    The job that reads it reports that.
    """
    with suppress(OSError):
        return sum((local_folder(path) / name).stat().st_size for name in local_names(path))
    return 0


def recorded(model: Model) -> str:
    """The digests of the files of a model's checkpoint. Raises ConfigError if it has none."""
    if model.source is None:
        raise ConfigError(f"config.yaml: models/{model.key}/source: missing")
    of_head = layout.recorded_head(model.source)
    return of_head if model.head_only else layout.recorded(model.source)


def recorded_donor(model: Model, donor: Source) -> str:
    """The same for the checkpoint that a head is from."""
    of_head = layout.recorded_head(donor)
    return of_head if model.native else layout.recorded(donor)


def tracked_inputs(file: layout.GivenFile | ImatrixText, model: str) -> list[str]:
    """Inputs of a job that reads the file: records and digests, which stand for it."""
    if isinstance(file, ImatrixText):
        return [layout.imatrix_digest(model, file)]
    if isinstance(file, HubFile):
        return [checked_record(file, name) for name in gguf_files(file.file)]
    return [layout.local_record(file.path)]


def checked_record(at: layout.Commit, name: str) -> str:
    """The record of a fetched file. Raises ConfigError if the file was deleted or changed."""
    record = Path(layout.record(at, name))
    file = Path(layout.fetched(at), name)
    if record.exists():
        size = recorded_bytes(record)
        if not file.is_file() or file.stat().st_size != size:
            why = "of another size" if file.is_file() else "gone"
            raise ConfigError(
                f"{file}: fetched before, but now {why}: delete {record} and run again"
            )
    return str(record)


def _donors(config: Config) -> list[Source]:
    models = config.models.values()
    found = [model.head_from for model in models]
    found += [variant.head_from for model in models for variant in model.variants.values()]
    return [donor for donor in found if donor]


def _template(model: Model) -> list[str]:
    """The record of the chat template that was given."""
    return [layout.local_record(model.chat_template)] if model.chat_template else []
