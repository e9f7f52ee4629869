"""The entry of a model: pinned sources, and the converter and the settings that they need."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtpforge import table
from mtpforge.checkpoint import nvfp4
from mtpforge.checkpoint.checkpoint import Checkpoint, Outline, folder_name
from mtpforge.checkpoint.model_files import head_names
from mtpforge.checkpoint.safetensors import CheckpointTensor
from mtpforge.convert import convertible
from mtpforge.convert.upstream_head import vision_tensors
from mtpforge.entries import presets
from mtpforge.entries.address import Address
from mtpforge.entries.presets import Variants
from mtpforge.errors import CheckpointError, DownloadError, GgufError
from mtpforge.gguf import head, split
from mtpforge.gguf.file_names import file_model, gguf_files, parts_of
from mtpforge.hub import download, headers
from mtpforge.hub.listing import REPOSITORY, Listing
from mtpforge.hub.resolve import current_name, list_commit, model_info
from mtpforge.suggest import close

SPLIT = "48G"
"""The Hub refuses files above 50 GB."""

_HEAD = re.compile(r"(?i)mtp|nextn")
_LABEL = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass
class Entry:
    """An entry under `models`: its key, a comment, and its settings; `variants` are its last."""

    key: str
    about: str
    settings: dict[str, Any]
    variants: Variants = field(default_factory=dict)

    def value(self) -> dict[str, Any]:
        """The entry as config.yaml has it."""
        return {**self.settings, "variants": self.variants}


class Source:
    """A checkpoint that entries are made of, known by its configuration and headers.

    Raises DownloadError, CheckpointError; also if no converter can make it.
    """

    def __init__(self, given: Address | Path) -> None:
        self.download: int | None = None
        if isinstance(given, Path):
            self.outline: Outline = Checkpoint(given)
            self.name, self.label = folder_name(given), str(given)
            self.pinned = {"path": str(given)}
        else:
            listing = pinned(given)
            if not listing.tensors:
                raise DownloadError(f"{listing.repo}: {_no_checkpoint(listing)}")
            self.outline = download.outline(listing)
            self.name, self.label = listing.repo.partition("/")[2], listing.label
            self.pinned = {"repo": listing.repo, "revision": listing.revision}
            self.download = sum(listing.files[each].bytes for each in listing.checkpoint_files())
        self.converter, self.part = _choose(self.outline, self.label)

    @property
    def packed(self) -> bool:
        """Whether its weights are kept packed as NVFP4: quantized again they would be worse."""
        return self.converter == "llama.cpp" and nvfp4.is_nvfp4(self.outline.config)

    def entry(self, variants: Variants, options: Mapping[str, Any]) -> Entry:
        """The entry with these variants, and with further settings of the model."""
        settings: dict[str, Any] = {"source": self.pinned}
        if self.converter != "mtpforge":
            settings["converter"] = self.converter
        made = {name: self._settings(name, each) for name, each in variants.items()}
        return Entry(plain_key(self.name), self.about(), {**settings, **options}, made)

    def about(self) -> str:
        """How much there is to download, or on this machine, and how much of that is the head."""
        size = sum(each.size for each in convertible.head_tensors(self.outline, self.converter))
        about = f"{table.rounded_size(size)} of it the head{convertible.undrafted(self.outline)}"
        if not size:
            about = self._headless()
        if self.converter == "mtpforge" and vision_tensors(self.outline):
            about += "; `mmproj: true` also makes its vision tower"
        if self.download is not None:
            return f"{table.rounded_size(self.download)} to download, {about}"
        there = sum(each.size for each in self.outline.tensors.values())
        return f"Local, {table.rounded_size(there)}, {about}"

    def _headless(self) -> str:
        """That there is no head, and where one may be."""
        about = "without a head"
        if head_names(self.outline.lost):
            about += ", which its stale index lists"
        if self.converter == "mtpforge":
            about += " (`head_from` takes the original's)"
        elif convertible.has_drafter(self.outline):
            about += " (its drafter is another checkpoint: `head_from` with `sidecar`)"
        used = {tensor.shard for tensor in self.outline.tensors.values()}
        for name in sorted(self.outline.files):
            if name.endswith(".safetensors") and _HEAD.search(name) and name not in used:
                use = "has no tensor named as a head's"
                if "/" in name:
                    use = (
                        "may be it: in a local folder (`source: {path: FOLDER}`), copy it beside "
                        "the other shards as mtp.safetensors"
                    )
                return f"{about}; {name} {use}"
        return about

    def _settings(self, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
        """A variant's settings: no head if it is lost, shards if the file is too large."""
        settings = dict(given)
        if self.part == "trunk" and "base" not in given:
            settings["head"] = "none"
        weights = sum(_bf16_size(tensor) for tensor in self.outline.tensors.values())
        if "base" not in given:
            size = weights * presets.bits(settings, name) / 16
            settings |= {"split": SPLIT} if size > int(SPLIT.removesuffix("G")) * 1e9 else {}
        return settings


def plain_key(name: str) -> str:
    """The key of a model of that name: lower-case letters, digits, '.', '_' and '-'."""
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).lstrip("._-") or "model"


def pinned(address: Address) -> Listing:
    """List a repository, by its current name, at the commit that the address means now.

    Raises DownloadError, CheckpointError.
    """
    info = model_info(address.repo, address.revision)
    return list_commit(current_name(info, address.repo), str(info.sha))


def _no_checkpoint(listing: Listing) -> str:
    """Why no model can be made from a repository without safetensors, and what can."""
    why = "has no model*.safetensors: only safetensors checkpoints can be converted"
    if not any(name.endswith(".gguf") for name in listing.files):
        return why
    card = model_info(listing.repo, listing.revision).card_data
    named = getattr(card, "base_model", None)
    original = str(named[0] if isinstance(named, list) and named else named)
    known = REPOSITORY.fullmatch(original) is not None
    put = f"`make inject BASE={listing.repo}:TYPE SOURCE={original if known else 'OWNER/NAME'}`"
    model = f"; its base model is {original}" if known else ""
    return f"{why}, and it has GGUFs: {put} puts a head into one{model}"


def base(given: Address | Path) -> tuple[str, dict[str, str]]:
    """The label of a GGUF as a variant, and its `base`, pinned. Raises ConfigError, DownloadError.

    A type in place of the file's name is enough, if one GGUF of the repository has it.
    """
    if isinstance(given, Path):
        first = gguf_files(given.name)[0]
        return _label(first), {"path": str(given.with_name(first))}
    listing = pinned(given)
    file = _file(listing, str(given.file))
    return _label(file), {"repo": listing.repo, "file": file, "revision": listing.revision}


def refuse_head(pinned_base: Mapping[str, str]) -> None:
    """Raise GgufError for a base that has a head already, before anything is fetched or built."""
    if "path" in pinned_base:
        found = split.read(Path(pinned_base["path"]))
        name = pinned_base["path"]
    else:
        listing = list_commit(pinned_base["repo"], pinned_base["revision"])
        found, name = headers.read(listing, pinned_base["file"]), pinned_base["file"]
    if has := found.head.tensors:
        types = "/".join(sorted(head.types_of(found.head)))
        raise GgufError(
            f"{name}: has a head already ({len(has)} tensors, {types}), so nothing is built: serve "
            "it as it is, or replace its head with REPLACE=1 (`replace_head: true`)"
        )


def _file(listing: Listing, wanted: str) -> str:
    """The first file of the GGUF that is wanted. Raises DownloadError."""
    names = [name for name in listing.files if ".gguf" in name]
    found = [name for name in names if name == wanted or name.rpartition("/")[2] == wanted]
    if not found:
        try:
            found = parts_of(wanted, names)[:1]
        except GgufError as error:
            raise DownloadError(f"{listing.label}: {error}") from None
    if not found:
        kind = re.compile(rf"(?i)(.*[-._/])?{re.escape(wanted)}(-00001-of-\d{{5}})?\.gguf")
        found = [name for name in names if kind.fullmatch(name)]
    if len(found) > 1:
        files = ", ".join(found[:20])
        raise DownloadError(f"{listing.repo}: has several {wanted}: name one of {files}")
    if not found:
        is_type = ".gguf" not in wanted
        kinds = list(dict.fromkeys(map(_label, names) if is_type else names))
        has = ", ".join(kinds[:20]) or "no GGUF"
        what = f"{wanted} GGUF" if is_type else wanted
        raise DownloadError(f"{listing.repo}: has no {what}; it has {has}{close(wanted, kinds)}")
    folder, slash, name = found[0].rpartition("/")
    return folder + slash + gguf_files(name)[0] if ".part" not in name else found[0]


def _label(path: str) -> str:
    """A GGUF's name without the model's: usually its type."""
    stem = re.sub(r"-\d{5}-of-\d{5}$", "", path.rpartition("/")[2].partition(".gguf")[0])
    label = stem.removeprefix(file_model(path.partition(".gguf")[0] + ".gguf")).lstrip("-._")
    return _LABEL.sub("-", label) or "with-head"


def _choose(outline: Outline, label: str) -> tuple[str, str]:
    """A converter, and the part to make: the trunk if there is no head, else all."""
    try:
        return convertible.choose(outline, "all"), "all"
    except CheckpointError as error:
        refused = convertible.explain(error, outline, label)
    try:
        converter = convertible.choose(outline, "trunk")
    except CheckpointError:
        raise refused from None
    if convertible.head_tensors(outline, converter):
        raise refused
    return converter, "trunk"


def _bf16_size(tensor: CheckpointTensor) -> int:
    """The bytes of a tensor in a BF16 file; quantized weights stay packed."""
    packed = tensor.dtype not in convertible.UNPACKED
    return tensor.size if packed else 2 * math.prod(tensor.shape)
