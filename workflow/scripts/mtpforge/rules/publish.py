"""Stage `publish`: card, provenance and sums of a model's folder, and its upload."""

import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mtpforge.errors import ConfigError
from mtpforge.rules import layout
from mtpforge.rules.code import code
from mtpforge.rules.config import Config, Model
from mtpforge.rules.fetch import FetchRules, tracked_inputs
from mtpforge.rules.stage import Stage, Wildcards
from mtpforge.rules.variant import HubRepository, ImatrixText, LocalFile, OwnBase

OF_BUILD = (
    "source",
    "converter",
    "tokenizer_pre",
    "norms",
    "prompts",
    "min_acceptance",
    "max_acceptance_drop",
    "split",
)
"""Keys of a model that decide what each of its files is."""


class PublishRules(Stage):
    """Inputs and parameters of rules/publish.smk."""

    def __init__(self, config: Config, fetch: FetchRules) -> None:
        super().__init__(config)
        self._fetch = fetch

    # ── card and sums ──

    def files(self, wildcards: Wildcards) -> list[str]:
        """A model's files, including the folders of split ones."""
        return [output.file for output in layout.outputs(self.model(wildcards))]

    def reports(self, wildcards: Wildcards) -> list[str]:
        """Their reports, in the same order."""
        return [output.report for output in layout.outputs(self.model(wildcards))]

    def statements(self, wildcards: Wildcards) -> list[str]:
        """Their statements of provenance, in the same order."""
        return [output.statement for output in layout.outputs(self.model(wildcards))]

    def checkpoint_card(self, wildcards: Wildcards) -> str:
        """The checkpoint's own model card, which need not exist."""
        return f"{layout.checkpoint(self.model(wildcards))}/README.md"

    def checkpoint_card_inputs(self, wildcards: Wildcards) -> list[str]:
        """Inputs of a job that reads it."""
        if isinstance(self.model(wildcards).source, HubRepository):
            inputs = self._fetch.checkpoint_inputs(wildcards)
            return [name for name in inputs if name.endswith(("/README.md.json", "/head.json"))]
        card = self.checkpoint_card(wildcards)
        return [card] if Path(card).exists() else []

    def about(self, wildcards: Wildcards) -> str:
        """The part of a model's configuration that its card shows, as JSON."""
        model = self.model(wildcards)
        part = _dump(model, *OF_BUILD, "publish") | {"variants": _variants(model, *model.variants)}
        return json.dumps({"name": model.base_name, **_without_folders(part)})

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
        """The source of the checkpoint, as JSON."""
        return json.dumps(_without_folders(_dump(self.model(wildcards), "source")["source"]))

    def material_inputs(self, wildcards: Wildcards) -> list[str]:
        """A base and an importance matrix that were given, if any."""
        files = self._materials(wildcards)
        return [path for file in files for path in tracked_inputs(file, wildcards.model)]

    def material_options(self, wildcards: Wildcards) -> str:
        """The same as options of provenance.py."""
        options: list[str] = []
        for file in self._materials(wildcards):
            about = json.dumps(_without_folders(file.model_dump()))
            options += ["--material", about, *tracked_inputs(file, wildcards.model)]
        return shlex.join(options)

    def locks(self, wildcards: Wildcards) -> list[str]:
        """The locked requirements of the programs that make a model."""
        converter = ["envs/converter.txt"] if self.model(wildcards).needs_upstream else []
        return ["envs/run.txt", "envs/llama.cpp.txt", *converter]

    def programs(self, wildcards: Wildcards) -> list[str]:
        """The programs that make a model, with all modules that they import."""
        upstream = ["convert_upstream.py"] if self.model(wildcards).needs_upstream else []
        others = ["quantize_plan.py", "quantize.py", "inject.py", "verify.py"]
        programs = ["convert.py", *upstream, *others]
        return sorted({path for program in programs for path in code(program)})

    # ── upload ──

    def ends(self) -> list[str]:
        """The file that is made last in each model's folder."""
        return [layout.sums(model) for model in self.config.chosen]

    def uploads(self, wildcards: object) -> list[str]:
        """The same for models that have a repository."""
        return [layout.sums(model) for model in self.config.chosen if model.publish]

    def upload_options(self, wildcards: object) -> str:
        """Folders and their repositories, as options of publish.py."""
        options = ["--dry-run"] if self.config.dry_run in (True, "true") else []
        for model in self.config.chosen:
            if target := model.publish:
                visibility = "--private" if target.private else "--public"
                options += [visibility, layout.folder(model.name), target.repo]
        return shlex.join(options)

    def _variant(self, wildcards: Wildcards) -> str:
        """The variant that a report is about; empty for a sidecar or a vision tower."""
        for output in layout.outputs(self.model(wildcards)):
            if Path(output.report).name == f"{wildcards.stem}.json":
                return output.variant
        raise ConfigError(f"{wildcards.model} has no file {wildcards.stem}")

    def _materials(self, wildcards: Wildcards) -> list[layout.GivenFile]:
        variant = self.model(wildcards).variants.get(self._variant(wildcards))
        if variant is None:
            return []
        base = [] if isinstance(variant.base, OwnBase) or not variant.base else [variant.base]
        return [*base, *([_given(variant.imatrix)] if variant.imatrix else [])]


def _given(imatrix: ImatrixText | layout.GivenFile) -> layout.GivenFile:
    """The file itself, or the text that it is computed from."""
    return LocalFile(path=imatrix.text) if isinstance(imatrix, ImatrixText) else imatrix


def _dump(model: Model, *keys: str) -> dict[str, Any]:
    return model.model_dump(include=set(keys), exclude_none=True)


def _variants(model: Model, *names: str) -> dict[str, Any]:
    """Variants without the number of pieces, which changes nothing in the files."""
    return {
        name: model.variants[name].model_dump(exclude={"pieces"}, exclude_none=True)
        for name in names
    }


def _without_folders(value: Any) -> Any:
    """The same with file names instead of paths, which would reveal local folders."""
    if not isinstance(value, Mapping):
        return value
    return {
        key: Path(entry).name if key in ("path", "text", "prompts") else _without_folders(entry)
        for key, entry in value.items()
    }
