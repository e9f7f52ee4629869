"""Stage `publish`: card, provenance and sums of a model's folder, and its upload."""

import json
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from mtpforge.checkpoint.checkpoint import folder_name
from mtpforge.errors import ConfigError, UploadError
from mtpforge.io.ranges import digest_of
from mtpforge.progress import say
from mtpforge.publish.sums import MATRIX
from mtpforge.rules import layout
from mtpforge.rules.code import digest, files
from mtpforge.rules.config import Config, HubTarget, Model, S3Folder
from mtpforge.rules.fetch import FetchRules, checked_record, tracked_inputs
from mtpforge.rules.fields import CALIBRATION, HELD_OUT
from mtpforge.rules.stage import Stage, Wildcards
from mtpforge.rules.variant import (
    HubGguf,
    HubRepository,
    Imatrix,
    ImatrixText,
    LocalFile,
    LocalFolder,
    OwnBase,
    Source,
)

OF_BUILD = (
    "source",
    "head_from",
    "name",
    "converter",
    "tokenizer_pre",
    "chat_template",
    "norms",
    "prompts",
    "min_acceptance",
    "max_acceptance_drop",
    "split",
)
"""Keys of a model that decide what each of its files is."""


@dataclass(frozen=True)
class UploadedModel:
    """A model that `publish` uploads: its card, reports and measurements, and where it goes."""

    card: str
    reports: Sequence[str]
    measurements: Sequence[str]
    target: HubTarget | S3Folder

    @property
    def address(self) -> str:
        """The page of the repository, or the folder in object storage."""
        if isinstance(self.target, S3Folder):
            return self.target.url
        return f"{constants.ENDPOINT}/{self.target.repo}"

    @property
    def private(self) -> str:
        """The repository, if it is created as private; else empty."""
        if isinstance(self.target, S3Folder) or not self.target.private:
            return ""
        return self.target.repo


class PublishRules(Stage):
    """Inputs and parameters of rules/publish.smk."""

    def __init__(self, config: Config, fetch: FetchRules) -> None:
        super().__init__(config)
        self._fetch = fetch

    # ── card and sums ──

    def files(self, wildcards: Wildcards) -> list[str]:
        """A model's files, including the folders of split ones."""
        return [output.file for output in layout.outputs(self.model(wildcards))]

    def present(self, wildcards: Wildcards) -> list[str]:
        """The same; what stands in for each that is deleted once it is uploaded."""
        model = self.model(wildcards)
        return [
            output.stand_in if self._passes(model, output) else output.file
            for output in layout.outputs(model)
        ]

    def needed(self, wildcards: Wildcards) -> list[str]:
        """What must be made before these are there."""
        model = self.model(wildcards)
        return [
            output.receipt if self._passes(model, output) else output.file
            for output in layout.outputs(model)
        ]

    def reports(self, wildcards: Wildcards) -> list[str]:
        """Their reports, in the same order."""
        return [output.report for output in layout.outputs(self.model(wildcards))]

    def statements(self, wildcards: Wildcards) -> list[str]:
        """Their statements of provenance, in the same order."""
        return [output.statement for output in layout.outputs(self.model(wildcards))]

    def checkpoint_card(self, wildcards: Wildcards) -> str:
        """The model card of the checkpoint or base, which need not exist."""
        model = self.model(wildcards)
        if model.uses_source:
            return f"{layout.checkpoint(model)}/README.md"
        base = self._carded_base(model)
        return f"{layout.fetched(base)}/README.md" if base else "none"

    def checkpoint_card_inputs(self, wildcards: Wildcards) -> list[str]:
        """Inputs of a job that reads it."""
        model = self.model(wildcards)
        if base := self._carded_base(model):
            there = "README.md" in self._fetch.checkpoint_files(base)
            return [checked_record(base, "README.md")] if there else []
        if isinstance(model.source, HubRepository):
            inputs = self._fetch.checkpoint_inputs(wildcards)
            return [name for name in inputs if name.endswith(("/README.md.json", "/head.json"))]
        card = self.checkpoint_card(wildcards)
        return [card] if Path(card).exists() else []

    def pictures(self, wildcards: Wildcards) -> list[str]:
        """The figures that the card shows."""
        return layout.pictures(self.model(wildcards))

    def matrices(self, wildcards: Wildcards) -> list[str]:
        """The importance matrices that are uploaded."""
        return list(layout.published_matrices(self.model(wildcards)))

    def matrix_digests(self, wildcards: Wildcards) -> list[str]:
        """The sha256 of each, in the same order."""
        return [layout.published_matrix_digest(file) for file in self.matrices(wildcards)]

    def computed(self, wildcards: Wildcards) -> str:
        """One of them where it was computed."""
        return layout.imatrix(wildcards.model, self._matrix(wildcards))

    def computed_digest(self, wildcards: Wildcards) -> str:
        """Its sha256."""
        return layout.imatrix_digest(wildcards.model, self._matrix(wildcards))

    def coverages(self, wildcards: Wildcards) -> list[str]:
        """What the importance matrices cover, in the order of `about`."""
        return layout.coverages(self.model(wildcards))

    def about(self, wildcards: Wildcards) -> str:
        """The part of a model's configuration that its card shows, as JSON."""
        model = self.model(wildcards)
        part = _dump(model, *OF_BUILD, "publish") | {"variants": _variants(model, *model.variants)}
        for key in ("when", "delete_after"):
            part.get("publish", {}).pop(key, None)
        variants = model.variants.values()
        bases = [each.base for each in variants if each.base and model.adopts(each)]
        theirs = [each.base for each in variants if each.base and each.foreign]
        injected = [base for base in theirs if base not in bases]
        heads = [model.donor(each) for each in variants if each.head_types]
        heads += [model.head_from] if model.sidecar else []
        donors = [donor for donor in heads if donor]
        part |= {"bases": _dumped(bases), "injected": _dumped(injected)}
        part |= {"donors": _dumped(donors), "name": model.base_name}
        part["own_head"] = None in heads
        published = layout.published_matrices(model).items()
        names = {
            layout.matrix_name(each): {"published": Path(path).name} for path, each in published
        }
        part["matrices"] = [
            each.model_dump() | _embedded(each) | names.get(name, {})
            for name, each in layout.matrices(model).items()
        ]
        if model.measure and model.measure.text == HELD_OUT:
            part["texts"] = {Path(HELD_OUT).name: digest_of(Path(HELD_OUT))}
        if not model.uses_source:
            part["source"] = None
        return json.dumps(_without_folders(part))

    # ── provenance ──

    def parameters(self, wildcards: Wildcards) -> str:
        """The part of the configuration that decides what one file is, as JSON."""
        model, variant = self.model(wildcards), self._variant(wildcards)
        if variant:
            part = _dump(model, *OF_BUILD) | {"variants": _variants(model, variant)}
        else:
            part = _dump(model, *OF_BUILD, "sidecar", "mmproj")
        return json.dumps(_without_folders(part))

    def source(self, wildcards: Wildcards) -> str:
        """The source of the model, as JSON."""
        return json.dumps(_without_folders(_dump(self.model(wildcards), "source")["source"]))

    def source_files(self, wildcards: Wildcards) -> list[str]:
        """Its files, or the records of fetched ones."""
        return self._fetch.given_files(self._fetch.checkpoint_inputs(wildcards))

    def recorded_option(self, wildcards: Wildcards) -> str:
        """The option that names the records of a local source."""
        source = self.model(wildcards).source
        if not isinstance(source, LocalFolder):
            return ""
        return shlex.join(["--recorded", layout.local_record(source.path)])

    def source_list(self, wildcards: Wildcards) -> list[str]:
        """The list of the checkpoint's files, unless the variant has nothing of it."""
        model = self.model(wildcards)
        variant = model.variants.get(self._variant(wildcards))
        adopted = variant is not None and model.adopts(variant)
        return [] if adopted else [f"{layout.work(model.key)}/materials.json"]

    def source_option(self, wildcards: Wildcards) -> str:
        """The same as an option of provenance.py."""
        return shlex.join(
            word for path in self.source_list(wildcards) for word in ("--source", path)
        )

    def material_inputs(self, wildcards: Wildcards) -> list[str]:
        """The other inputs: another head, a base, a chat template, importance matrix, texts."""
        return [path for _, paths in self._materials(wildcards) for path in paths]

    def material_options(self, wildcards: Wildcards) -> str:
        """The same as options of provenance.py."""
        options: list[str] = []
        for about, paths in self._materials(wildcards):
            shown = _without_folders(about)
            if "path" in about:
                shown["recorded"] = layout.local_record(about["path"])
            options += ["--material", json.dumps(shown), *self._fetch.given_files(paths)]
        return shlex.join(options)

    def locks(self, wildcards: Wildcards) -> list[str]:
        """The locked requirements of the programs that make a model."""
        converter = ["envs/converter.txt"] if self.model(wildcards).needs_upstream else []
        return ["envs/run.txt", "envs/llama.cpp.txt", *converter]

    def programs(self, wildcards: Wildcards) -> list[str]:
        """The programs that make a model, with all modules that they import."""
        return sorted({path for program in self._programs(wildcards) for path in files(program)})

    def program_digests(self, wildcards: Wildcards) -> list[str]:
        """The digests of these programs, each with its modules."""
        return [digest(program) for program in self._programs(wildcards)]

    # ── upload ──

    def folders(self) -> list[str]:
        """The other files of each model's folder: matrices, statements, card and, last, sums.

        Card and sums of a model whose files are deleted come with its upload, its importance
        matrices before what they are computed from is gone.
        """
        return [
            path
            for model in self.config.chosen
            for path in (
                *layout.published_matrices(model),
                *(output.statement for output in layout.outputs(model)),
                *(() if model.passing else (layout.card(model), layout.sums(model))),
            )
        ]

    def withdraw(self, unfinished: Iterable[str]) -> None:
        """Remove card and sums of models with a file among what a failed run has not made.

        They would list a file that is gone or out of date, and be uploaded with it.
        """
        missing = {str(file) for file in unfinished}
        for model in self.config.chosen:
            outputs = layout.outputs(model)
            published = {
                path
                for each in outputs
                for path in (each.file, each.report, each.statement, each.measurement)
            }
            if missing & (published | layout.published_matrices(model).keys()):
                pages = (layout.sums(model), layout.card(model), layout.details(model))
                for path in map(Path, pages):
                    if path.exists():
                        path.unlink()
                        say(f"removed {path}: not all of its files are there")

    def uploads(self, wildcards: object) -> list[str]:
        """The sums of models that are to be uploaded, and the receipts of files that were.

        With the summary, unless it needs models that are not uploaded and so might be built for it.
        """
        chosen = self.config.chosen
        is_all = bool(chosen) and all(model.publish for model in chosen)
        found = ["results/summary.md"] if is_all else []
        for model in self.config.chosen:
            found += [layout.sums(model)] * bool(model.publish)
            for output in layout.outputs(model) if model.early and not self.is_dry else ():
                found += [output.receipt, *([output.deleted] if model.passing else [])]
        return found

    @property
    def uploaded(self) -> list[UploadedModel]:
        """What each model is that `publish` uploads."""
        return [
            UploadedModel(
                layout.card(model),
                [output.report for output in layout.outputs(model)],
                layout.measurements(model),
                model.publish,
            )
            for model in self.config.chosen
            if model.publish
        ]

    @property
    def addable(self) -> str:
        """The Hub repository of the first model that files are quantized of; empty without one."""
        models = [model for model in self.config.chosen if not model.head_only]
        sources = [each.source.repo for each in models if isinstance(each.source, HubRepository)]
        return next(iter(sources), "")

    @property
    def task(self) -> str:
        """What the rule `publish` does."""
        return "list what would be uploaded (dry run)" if self.is_dry else "upload"

    def check_access(self, builds: bool = True) -> None:
        """Raise UploadError if the Hub would refuse an upload; that comes after the whole build.

        A dry run only warns of it: it lists the files, and fails at its end. So does an upload that
        `builds` nothing first: all files may be there already.
        """
        from mtpforge.publish import access  # and what it imports: a second, in each run

        models = self.config.chosen
        targets = [model.publish for model in models if isinstance(model.publish, HubTarget)]
        refusals = []
        for repo in dict.fromkeys(target.repo for target in targets):
            try:
                if why := access.check(repo):
                    say(f"warning: {repo}: not checked with the Hub: {why}")
            except UploadError as error:
                refusals.append(str(error))
        if self.is_dry or not builds:
            for refusal in refusals:
                say(f"warning: {refusal}")
        elif refusals:
            refused = "\n".join(refusals)
            raise UploadError(f"{refused}\nNothing was built or uploaded.")

    def upload_options(self, wildcards: object) -> str:
        """Folders and where to upload them, as options of publish.py."""
        options = ["--dry-run"] if self.is_dry else []
        for model in self.config.chosen:
            if model.publish:
                option, place = _place(model.publish)
                options += [option, layout.folder(model.key), place]
        return shlex.join(options)

    # ── upload of each file ──

    @property
    def priority(self) -> int:
        """Of what brings a file on to its upload, if the disk must not fill up with files."""
        return int(any(model.passing for model in self.config.chosen))

    def file(self, wildcards: Wildcards) -> str:
        """The file to upload, or the folder of a split one."""
        return self._output(wildcards).file

    def examined(self, wildcards: Wildcards) -> list[str]:
        """Its report, and its measurement if there will be one."""
        output = self._output(wildcards)
        measured = output.variant and self.model(wildcards).measure
        return [output.report, *([output.measurement] if measured else [])]

    def place_option(self, wildcards: Wildcards) -> str:
        """Where to upload it, as options of publish_file.py."""
        model = self.model(wildcards)
        if model.publish is None:
            raise ConfigError(f"config.yaml: models/{model.key}/publish: missing")
        return shlex.join([*_place(model.publish), *(["--stand-in"] if model.passing else [])])

    def unneeded(self, wildcards: Wildcards) -> str:
        """What is deleted after that: the file, and its name before verification, for a shell."""
        model, output = self.model(wildcards), self._output(wildcards)
        paths = [output.file]
        variant = model.variants.get(output.variant)
        if variant and not variant.converted:  # or other variants are made of it
            paths.append(layout.candidate(model, output.variant).file)
        return shlex.join(paths)

    @property
    def is_dry(self) -> bool:
        """Whether `publish` only lists what it would upload."""
        return self.config.dry_run in (True, "true")

    def _passes(self, model: Model, output: layout.Output) -> bool:
        """Whether only a stand-in is sure to be there. Nothing is uploaded by a dry run."""
        return model.passing and (output.is_away or not self.is_dry)

    def _output(self, wildcards: Wildcards) -> layout.Output:
        for output in layout.outputs(self.model(wildcards)):
            if Path(output.report).stem == wildcards.stem:
                return output
        raise ConfigError(f"{wildcards.model} has no file {wildcards.stem}")

    def _programs(self, wildcards: Wildcards) -> list[str]:
        model = self.model(wildcards)
        upstream = ["convert_upstream.py"] if model.needs_upstream else []
        is_searched = any(variant.searched for variant in model.variants.values())
        search = ["quantization_errors.py", "sensitivity.py", "allocate.py"] if is_searched else []
        made = ["quantize_plan.py", "quantize.py", "inject.py", "verify.py"]
        return ["convert.py", "convert_and_quantize.py", *upstream, *search, *made]

    def _matrix(self, wildcards: Wildcards) -> ImatrixText:
        file = f"{layout.folder(wildcards.model)}/{wildcards.stem}{MATRIX}"
        found = layout.published_matrices(self.model(wildcards)).get(file)
        if found is None:
            raise ConfigError(f"{wildcards.model} publishes no importance matrix {file}")
        return found

    def _variant(self, wildcards: Wildcards) -> str:
        """The variant that a report is about; empty for a sidecar or a vision tower."""
        return self._output(wildcards).variant

    def _materials(self, wildcards: Wildcards) -> list[tuple[dict[str, Any], list[str]]]:
        """The other inputs: their part of the configuration with the role, and their files."""
        model = self.model(wildcards)
        variant = model.variants.get(self._variant(wildcards))
        is_sidecar = model.sidecar and wildcards.stem == layout.sidecar(model, model.sidecar).stem
        donor = model.donor(variant) if variant else model.head_from if is_sidecar else None
        found = []
        if donor:
            inputs = self._fetch.inputs_of_donor(model, donor)
            found += [(donor.model_dump() | {"role": "head"}, inputs)]
        if variant and variant.base and not isinstance(variant.base, OwnBase):
            files = tracked_inputs(variant.base, model.key)
            found += [(variant.base.model_dump() | {"role": "base"}, files)]
        if model.chat_template and (is_sidecar or (variant and not variant.foreign)):
            template = LocalFile(path=model.chat_template)
            about = template.model_dump() | {"role": "chat template"}
            found += [(about, tracked_inputs(template, model.key))]
        if variant and variant.imatrix:
            given = _given(variant.imatrix)
            found += [(given.model_dump(), tracked_inputs(given, model.key))]
        if variant and variant.searched_text:
            text = LocalFile(path=variant.searched_text)
            about = text.model_dump() | {"role": "text of the sensitivities"}
            found += [(about, tracked_inputs(text, model.key))]
        return found

    def _carded_base(self, model: Model) -> HubGguf | None:
        """The base whose repository's card has the license; None if that is not the only one."""
        bases = [variant.base for variant in model.variants.values()]
        hub = [base for base in bases if isinstance(base, HubGguf)]
        only = len(hub) == len(bases) and len({layout.commit(base) for base in hub}) == 1
        return hub[0] if only and not model.uses_source else None


def _place(publish: HubTarget | S3Folder) -> tuple[str, str]:
    """The option that says what kind of place this is, and its name."""
    if isinstance(publish, S3Folder):
        return "--s3", publish.url
    return "--private" if publish.private else "--public", publish.repo


def _given(imatrix: ImatrixText | layout.GivenFile) -> layout.GivenFile:
    """The file itself, or the text that it is computed from."""
    return LocalFile(path=imatrix.text) if isinstance(imatrix, ImatrixText) else imatrix


def _dumped(entries: Iterable[OwnBase | Source | layout.GivenFile]) -> list[dict[str, Any]]:
    """Repository and commit, or path, of each, and which file; without repeats."""
    found = [entry.model_dump(include={"repo", "revision", "path", "file"}) for entry in entries]
    return [entry for i, entry in enumerate(found) if entry not in found[:i]]


def _dump(model: Model, *keys: str) -> dict[str, Any]:
    return model.model_dump(include=set(keys), exclude_none=True)


def _variants(model: Model, *names: str) -> dict[str, Any]:
    """Variants without the number of pieces, which changes nothing in the files."""
    return {
        name: model.variants[name].model_dump(exclude={"pieces"}, exclude_none=True)
        for name in names
    }


def _embedded(matrix: Imatrix) -> dict[str, str]:
    """The sha256 of a matrix's text if that is the embedded one."""
    is_ours = isinstance(matrix, ImatrixText) and matrix.text == CALIBRATION
    return {"sha256": digest_of(Path(CALIBRATION))} if is_ours else {}


def _without_folders(value: Any) -> Any:
    """The same with file names instead of paths, which would reveal local folders."""
    if isinstance(value, list):
        return [_without_folders(entry) for entry in value]
    if not isinstance(value, Mapping):
        return value
    return {
        key: folder_name(Path(entry))
        if key in ("path", "text", "prompts", "chat_template")
        else _without_folders(entry)
        for key, entry in value.items()
    }
