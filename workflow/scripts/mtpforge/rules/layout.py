"""All paths of the workflow under resources/ and results/.

The rules declare the same paths as patterns with wildcards.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Protocol, TypeAlias

from mtpforge.checkpoint.checkpoint import folder_name
from mtpforge.errors import ConfigError
from mtpforge.gguf import quant_types
from mtpforge.gguf.file_names import gguf_files
from mtpforge.publish import receipts
from mtpforge.publish.sums import MATRIX
from mtpforge.rules.config import Model
from mtpforge.rules.variant import (
    HubFile,
    HubGguf,
    HubRepository,
    Imatrix,
    ImatrixText,
    LocalFile,
    LocalGguf,
    Source,
)

UPLOADED = receipts.FOLDER.as_posix()

GivenFile: TypeAlias = LocalGguf | HubGguf | LocalFile | HubFile
"""A file that was not made here: a base or an importance matrix."""
CARD_FIGURES = ("distance", "drafting")
"""The figures of measurements that the model card shows."""


@dataclass(frozen=True)
class Intermediate:
    """A GGUF under work/ with the digests of its tensors beside it."""

    stem: str
    split: bool = False

    @property
    def file(self) -> str:
        """The GGUF, or the folder of a split one."""
        return self.stem if self.split else f"{self.stem}.gguf"

    @property
    def digests(self) -> str:
        """The digests of its tensors."""
        return f"{self.stem}.json"


@dataclass(frozen=True)
class Output:
    """A published file, or the folder of a split one; a sidecar or mmproj has no variant."""

    model: str
    stem: str
    variant: str = ""
    split: bool = False

    @property
    def file(self) -> str:
        """The GGUF, or the folder of a split one."""
        return f"{folder(self.model)}/{self.stem}" + ("" if self.split else ".gguf")

    @property
    def report(self) -> str:
        """The report of its verification."""
        return f"{folder(self.model)}/reports/{self._report_name}"

    @property
    def statement(self) -> str:
        """The statement of its provenance."""
        return f"{folder(self.model)}/provenance/{self._report_name}"

    @property
    def receipt(self) -> str:
        """That it was uploaded before the rest of its folder."""
        return f"{folder(self.model)}/{UPLOADED}/{self._report_name}"

    @property
    def stand_in(self) -> str:
        """What stands in for it once it is deleted."""
        return str(receipts.stand_in(Path(self.file)))

    @property
    def deleted(self) -> str:
        """The note that it was deleted after that."""
        return f"{self.receipt.removesuffix('.json')}.deleted"

    @property
    def is_away(self) -> bool:
        """Whether it was uploaded and deleted."""
        return Path(self.deleted).exists() and not Path(self.file).exists()

    @property
    def measurement(self) -> str:
        """Its measurements."""
        return f"{folder(self.model)}/measure/{self.stem}.json"

    @property
    def _report_name(self) -> str:
        return f"{self.stem}.split.json" if self.split else f"{self.stem}.json"


# ── published files ──


def outputs(model: Model) -> Iterator[Output]:
    """Everything that a model publishes: its variants, then its sidecar and vision tower."""
    for variant in model.variants:
        yield output(model, variant)
    if model.sidecar:
        yield sidecar(model, model.sidecar)
    if model.mmproj:
        yield vision(model)


def output(model: Model, variant: str) -> Output:
    """A variant's file."""
    split = model.variants[variant].split or model.split
    return Output(model.key, stem(model, variant), variant=variant, split=bool(split))


def possible_outputs(model: Model, variant: str) -> list[str]:
    """The final names that a variant's file can have: its own, or the folder of a split one."""
    name = stem(model, variant)
    return [Output(model.key, name, variant=variant, split=split).file for split in (False, True)]


def stem(model: Model, variant: str) -> str:
    """A variant's file name without its ending."""
    return f"{model.name_of(model.variants[variant])}-{variant}"


def sidecar(model: Model, file_type: str) -> Output:
    """The draft model of a type."""
    return Output(model.key, f"mtp-{model.base_name}-{file_type}")


def vision(model: Model) -> Output:
    """The vision tower."""
    return Output(model.key, f"mmproj-{model.base_name}-F16")


def measurements(model: Model) -> list[str]:
    """The measurements of a model's variants; none without `measure`."""
    variants = model.variants if model.measure else ()
    return [output(model, variant).measurement for variant in variants]


def others(model: Model) -> list[str]:
    """The measurements of other people's files."""
    return [f"{work(model.key)}/others/{given_name(file)}.json" for file in model.compare]


def folder(model: str) -> str:
    """The folder that is published."""
    return f"results/{model}"


def card(model: Model) -> str:
    """The model card."""
    return f"{folder(model.key)}/README.md"


def details(model: Model) -> str:
    """The second page of the model card."""
    return f"{folder(model.key)}/DETAILS.md"


def pictures(model: Model) -> list[str]:
    """The figures that the card shows."""
    return [plot(model, figure) for figure in measured_figures(model) if figure in CARD_FIGURES]


def sums(model: Model) -> str:
    """The list of all published files; it is made last."""
    return f"{folder(model.key)}/SHA256SUMS"


def plot(model: Model, figure: str) -> str:
    """A figure of the report."""
    return f"{folder(model.key)}/plots/{figure}.svg"


def measured_figures(model: Model) -> list[str]:
    """The figures of a model's measurements; none without `measure`."""
    if model.measure is None:
        return []
    compared = model.measure.text and any(map(model.has_unquantized, model.variants.values()))
    return [*(["distance"] if compared else []), "drafting", "speed", "acceptance"]


# ── intermediate files ──


def work(model: str) -> str:
    """The folder of a model's intermediate files."""
    return f"{folder(model)}/work"


def converted(model: str, part: str) -> Intermediate:
    """The checkpoint, or a part of it (trunk, head, draft, mmproj), as a GGUF."""
    return Intermediate(f"{work(model)}/convert/{part}")


def unquantized(model: Model, part: str) -> Intermediate:
    """The same of the trunk or all, in the files in which it is published if conversion can."""
    if model.conversion_split(part):
        return Intermediate(f"{work(model.key)}/split/{part}", split=True)
    return converted(model.key, part)


def donated(model: str, donor: Source) -> Intermediate:
    """The head of another checkpoint, as a GGUF."""
    return Intermediate(f"{work(model)}/donors/{donor_name(donor)}")


def donor_name(donor: Source) -> str:
    """A name for the checkpoint that a head is from, without its folder."""
    place = f"{donor.repo}@{donor.revision}" if isinstance(donor, HubRepository) else donor.path
    name = folder_name(Path(head_checkpoint(donor)))
    return f"{name}-{sha256(place.encode()).hexdigest()[:8]}"


def quantized(model: str, kind: str, name: str) -> Intermediate:
    """A quantized variant, or a quantized part (`kind` is trunk or draft) of the type `name`."""
    return Intermediate(f"{work(model)}/{kind}/{name}")


def draft(model: str, file_type: str) -> Intermediate:
    """The draft model of a type before it is verified."""
    if file_type in quant_types.PACKED:
        return converted(model, "draft")
    return quantized(model, "draft", file_type)


def injected(model: str, variant: str) -> Intermediate:
    """A base with the head injected."""
    return Intermediate(f"{work(model)}/injected/{variant}")


def candidate(model: Model, variant: str) -> Intermediate:
    """The file of a variant before it is verified."""
    entry = model.variants[variant]
    if entry.base:
        return injected(model.key, variant)
    if entry.converted:
        return unquantized(model, entry.part)  # no second copy of 70 GB
    return quantized(model.key, "quantized", variant)


def recipe(model: str, variant: str) -> str:
    """A variant's tensor types by pattern."""
    return f"{work(model)}/recipes/{variant}.yaml"


def head_recipe(model: str, variant: str) -> str:
    """The types of its head's tensors by pattern."""
    return f"{work(model)}/head-recipes/{variant}.yaml"


def errors(model: str, matrix: str, kind: str) -> str:
    """The errors of a tensor type with an importance matrix."""
    return f"{work(model)}/errors/{matrix}/{kind}.json"


def sensitivities(model: str, matrix: str, text: str, method: str) -> str:
    """The sensitivities on a text, by class or by tensor, with an importance matrix."""
    return f"{work(model)}/sensitivities/{matrix}/{imatrix_name(text)}-{method}.json"


def sensitivity_shares(model: str, matrix: str, text: str, method: str, count: int) -> list[str]:
    """Those of each of `count` jobs that share the runs; none if there is only one."""
    beginning = sensitivities(model, matrix, text, method).removesuffix(".json")
    numbers = range(1, count + 1) if count > 1 else ()
    return [f"{beginning}/{number}-of-{count}.json" for number in numbers]


def search_logits(model: str, text: str) -> str:
    """The logits of the BF16 file on a text for sensitivities."""
    return f"{work(model)}/search-logits/{imatrix_name(text)}.bin"


def found(model: str, variant: str) -> str:
    """The recipe that is found for a variant."""
    return f"{work(model)}/found/{variant}.yaml"


def compared(model: str, variant: str) -> str:
    """The comparison of a variant with llama.cpp's own mixture of its size."""
    return f"{work(model)}/compared/{variant}.json"


def matrix_name(matrix: Imatrix | None) -> str:
    """A name for an importance matrix, or for none."""
    if matrix is None:
        return "plain"
    if isinstance(matrix, ImatrixText):
        return imatrix_name(matrix.text) + "-chat" * matrix.chat
    return given_name(matrix)


def given_name(file: GivenFile) -> str:
    """A name for a file that was not made here."""
    if isinstance(file, HubFile):
        return place(f"{commit(file)}/{file.file}")
    return place(file.path)


def imatrix(model: str, matrix: ImatrixText) -> str:
    """The importance matrix that is computed from a text."""
    return f"{work(model)}/imatrix/{matrix_name(matrix)}.gguf"


def imatrix_digest(model: str, matrix: ImatrixText) -> str:
    """Its sha256."""
    return f"{work(model)}/imatrix/{matrix_name(matrix)}.json"


def conversations(model: str, matrix: ImatrixText) -> str:
    """Its text in the model's chat template."""
    return f"{work(model)}/conversations/{matrix_name(matrix)}.txt"


def matrices(model: Model) -> dict[str, Imatrix]:
    """The importance matrices of a model's variants, by name."""
    found = [each.imatrix for each in model.variants.values() if each.imatrix]
    return {matrix_name(each): each for each in found}


def published_matrices(model: Model) -> dict[str, ImatrixText]:
    """The importance matrices that are computed here and uploaded, by file.

    The only one is named after the model, several also after their texts.
    """
    made = [each for each in matrices(model).values() if isinstance(each, ImatrixText)]
    if not model.publish:
        return {}
    texts = [f"-{Path(each.text).stem}" + "-chat" * each.chat for each in made]
    if len(set(texts)) < len(texts):  # texts of the same name
        texts = [f"-{matrix_name(each)}" for each in made]
    if len(made) == 1:
        texts = [""]
    beginning = f"{folder(model.key)}/{model.base_name}"
    return {f"{beginning}{text}{MATRIX}": each for text, each in zip(texts, made, strict=True)}


def published_matrix_digest(file: str) -> str:
    """The sha256 of one of them."""
    path = Path(file)
    return f"{path.parent}/work/published/{path.stem}.json"


def coverages(model: Model) -> list[str]:
    """What they cover."""
    return [f"{work(model.key)}/coverage/{name}.json" for name in matrices(model)]


def imatrix_name(text: str) -> str:
    """A name for a text: stored in published files, so it must not reveal local folders."""
    return f"{Path(text).stem}-{sha256(text.encode()).hexdigest()[:8]}"


def pieces(model: str, kind: str, name: str, count: int) -> list[str]:
    """The digests of the pieces of a quantization."""
    beginning = f"{work(model)}/pieces/{kind}/{name}"
    return [f"{beginning}/{number}-of-{count}.json" for number in range(1, count + 1)]


def pieces_folder(model: str, kind: str, name: str) -> str:
    """The folder of the pieces themselves, whose manifests make them known."""
    return f"{work(model)}/manifests/pieces/{kind}/{name}"


def unverified(model: str, variant: str) -> str:
    """A second name of a quantized variant, which keeps its tensors until it is verified."""
    return f"{work(model)}/manifests/quantized/{variant}.gguf"


def acceptance(model: str) -> str:
    """The acceptance of the BF16 file."""
    return f"{work(model)}/acceptance.json"


def reference_logits(model: str) -> str:
    """The logits of the BF16 file on the measured text."""
    return f"{work(model)}/logits/reference.bin"


def reference_logits_digest(model: str) -> str:
    """Their sha256."""
    return f"{work(model)}/logits/reference.json"


# ── files from the Hub and from elsewhere ──


def place(path: str) -> str:
    """A name for a local file or folder."""
    return f"{Path(path).name}-{sha256(os.path.normpath(path).encode()).hexdigest()[:8]}"


def local_record(path: str) -> str:
    """The record of a local file, of all files of a split GGUF, or of a local checkpoint."""
    return f"resources/local/{place(path)}.json"


class Commit(Protocol):
    """A commit of a repository."""

    @property
    def repo(self) -> str:
        """OWNER/NAME."""

    @property
    def revision(self) -> str:
        """The commit hash."""


def commit(at: Commit) -> str:
    """The folder of a commit."""
    return f"resources/hub/{at.repo}/{at.revision}"


def fetched(at: Commit) -> str:
    """The folder of its files, which has the name of the repository."""
    return f"{commit(at)}/{Path(at.repo).name}"


def record(at: Commit, name: str) -> str:
    """The record of a fetched file, written once its content is right."""
    return f"{commit(at)}/records/{name}.json"


def records(at: Commit) -> str:
    """The folder of these records."""
    return f"{commit(at)}/records"


def recorded(source: Source | GivenFile) -> str:
    """The digests of a checkpoint's files, or of a file from the Hub or elsewhere."""
    if isinstance(source, HubRepository | HubFile):
        return records(source)
    return local_record(source.path)


def recorded_head(source: Source) -> str:
    """The same for a checkpoint that gives only its head."""
    if isinstance(source, HubRepository):
        return head_record(source)
    return local_record(source.path)


def fetched_head(at: Commit) -> str:
    """The folder of a checkpoint whose head alone was fetched."""
    return f"{commit(at)}/head/{Path(at.repo).name}"


def head_record(at: Commit) -> str:
    """The record of the head that was fetched."""
    return f"{commit(at)}/head.json"


def checkpoint(model: Model) -> str:
    """The folder of a model's checkpoint. Raises ConfigError if it has none."""
    if model.source is None:
        raise ConfigError(f"config.yaml: models/{model.key}/source: missing")
    if model.head_only or not isinstance(model.source, HubRepository):
        return head_checkpoint(model.source)
    return fetched(model.source)


def donor_checkpoint(model: Model, donor: Source) -> str:
    """The folder of the checkpoint that a head is from; llama.cpp's converter needs all of it."""
    if model.native or not isinstance(donor, HubRepository):
        return head_checkpoint(donor)
    return fetched(donor)


def head_checkpoint(source: Source) -> str:
    """The folder of a checkpoint that gives only its head."""
    return fetched_head(source) if isinstance(source, HubRepository) else source.path


def local_path(file: GivenFile | ImatrixText, model: str) -> str:
    """The path of a file once it is fetched or made; for a split GGUF, of its first file."""
    if isinstance(file, ImatrixText):
        return imatrix(model, file)
    if isinstance(file, HubFile):
        return f"{fetched(file)}/{gguf_files(file.file)[0]}"
    return file.path
