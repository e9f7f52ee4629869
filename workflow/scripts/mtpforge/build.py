"""What `config.yaml` asks for: validated, with its defaults, and as the paths and parameters that the rules need.

A rule's functions are methods of `Build` that take the rule's wildcards, so the rules stay plain declarations.
"""

import json
import os
import re
import shlex
from collections.abc import Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol, cast

import yaml
from jsonschema import Draft202012Validator, ValidationError

from mtpforge.code import code
from mtpforge.errors import ConfigError
from mtpforge.gguf import quant_types
from mtpforge.gguf.names import gguf_files
from mtpforge.hub.listing import Listing
from mtpforge.quantize.recipe import NO_HEAD, check_pattern, default_head, read_head

SCHEMA = Path(__file__).resolve().parents[2] / "schemas" / "config.schema.yaml"
WORK = "results/{model}/work"
HUB = "resources/hub/{repo}/{revision}"


class Wildcards(Protocol):
    """What Snakemake hands to a rule's functions."""

    model: str
    variant: str
    base: str
    part: str
    type: str
    text: str
    repo: str
    revision: str
    stem: str
    kind: str
    name: str


class Build:
    """The configuration as a build. Raises ConfigError, naming the path of each key that is wrong.

    `checkpoints` are Snakemake's, by which the graph learns what a repository holds once it is listed, and in how many pieces
    a quantization is made once it is planned.
    """

    def __init__(self, config: Mapping[str, Any], checkpoints: Any = None) -> None:
        self.config, self._checkpoints = validated(config), checkpoints
        self._texts: dict[str, str] = {}
        self.models: dict[str, Any] = self.config["models"]
        for name, recipe in self.config["recipes"].items():
            _check_recipe(f"recipes/{name}", recipe)
        for name, model in self.models.items():
            for variant, entry in model["variants"].items():
                self._resolve(f"models/{name}/variants/{variant}", name, entry)
                _check_name(
                    f"models/{name}/variants/{variant}", f"{self.base_name(name)}-{variant}"
                )
                _check_variant(f"models/{name}/variants/{variant}", variant, entry)
            if not self.base_name(name).isprintable():
                raise ConfigError(
                    f"config.yaml: models/{name}/source/path: the folder's name begins those of files: rename it"
                )
            if "sidecar" in model:
                _check_sidecar(f"models/{name}/sidecar", model["sidecar"])
        _check_own_bases(self.models)
        chosen = self.config["build"]
        self.chosen = list(self.models) if chosen == "all" else list(chosen)
        for name in self.chosen:
            if name not in self.models:
                raise ConfigError(
                    f"config.yaml: build: there is no model {name!r}: models has {', '.join(self.models)}"
                )
            _check_folders(f"models/{name}", self.models[name])
        self._check_repositories()
        paths = [path for output in self.outputs() for path in output]
        if twice := [path for path in paths if paths.count(path) > 1]:
            raise ConfigError(
                f"config.yaml: two variants, or a variant and a sidecar, would both be {twice[0]}: rename one"
            )

    def _resolve(self, path: str, model: str, entry: dict[str, Any]) -> None:
        """Put a recipe in the place of its name, and in the place of a text the importance matrix that is computed from it."""
        recipes, tensors, text = (
            self.config["recipes"],
            entry.get("tensors"),
            entry.get("imatrix", {}).get("text"),
        )
        if isinstance(tensors, str):
            if tensors not in recipes:
                known = ", ".join(recipes) or "none"
                raise ConfigError(
                    f"config.yaml: {path}/tensors: there is no recipe {tensors!r}: recipes has {known}"
                )
            entry["tensors"] = recipes[tensors]
        if text is not None:
            name = f"{Path(text).stem}-{sha256(text.encode()).hexdigest()[:8]}"  # is published: no folder of this machine is in it
            self._texts[name] = text
            entry["imatrix"] = {
                "path": f"{WORK.format(model=model)}/imatrix/{name}.gguf",
                "text": text,
            }

    # ── what to make ──

    def outputs(self) -> Iterator[tuple[str, str]]:
        """(file or, of a split one, folder; its verification report) of everything that `all` makes."""
        for model in self.chosen:
            for _, file, report in self.outputs_of(model):
                yield file, report

    def outputs_of(self, model: str) -> Iterator[tuple[str | None, str, str]]:
        """(variant, or None of a sidecar or vision tower; file or folder; report) of one model, chosen or not."""
        entry, base = self.models[model], self.base_name(model)
        for variant in entry["variants"]:
            split = bool(self._split(model, variant))
            yield variant, *_output(model, f"{base}-{variant}", split)
        if "sidecar" in entry:
            yield None, *_output(model, f"mtp-{base}-{entry['sidecar']}")
        if entry["mmproj"]:
            yield None, *_output(model, f"mmproj-{base}-F16")

    def files(self) -> list[str]:
        """The GGUFs that `all` makes, folders of split ones among them."""
        return [file for file, _ in self.outputs()]

    def reports(self) -> list[str]:
        """Their verification reports, in the same order."""
        return [report for _, report in self.outputs()]

    def measurements(self) -> list[str]:
        """What is measured of them, for models that ask for it."""
        return [
            path
            for model in self.chosen
            if "measure" in self.models[model]
            for path in self._measurements(model)
        ]

    def _measurements(self, model: str) -> list[str]:
        return [
            f"results/{model}/measure/{self.base_name(model)}-{variant}.json"
            for variant in self.models[model]["variants"]
        ]

    def figures(self) -> list[str]:
        """The pictures of the report: of each model what is measured, of each variant its tensors."""
        figures = []
        for model in self.chosen:
            if "measure" in self.models[model]:
                compared = "text" in self.models[model]["measure"] and not self._head_only(model)
                names = ["speed", "acceptance", *(["distance"] if compared else [])]
                figures += [f"results/{model}/plots/{name}.svg" for name in names]
            variants = self.models[model]["variants"]
            figures += [
                f"results/{model}/plots/tensors-{self.base_name(model)}-{variant}.svg"
                for variant in variants
            ]
        return figures

    def _split(self, model: str, variant: str) -> str | None:
        """The size of a variant's files, its own or the model's; None for a single file."""
        size = self.models[model]["variants"][variant].get("split", self.models[model].get("split"))
        return None if size is None else str(size)

    # ── what is published ──

    def published(self) -> list[str]:
        """What completes the folder of each model that `all` makes: the list of its files and, where asked for, its signature."""
        return [path for model in self.chosen for path in self._ends(model)]

    def uploads(self, wildcards: object) -> list[str]:
        """The same for the models that have a repository to go to."""
        return [path for model in self._with_repository() for path in self._ends(model)]

    def upload_options(self, wildcards: object) -> str:
        """What publish.py is to upload, and how."""
        options = ["--dry-run"] if self.config["dry_run"] in (True, "true") else []
        options += ["--signed"] if "sign" in self.config else []
        for model in self._with_repository():
            target = self.models[model]["publish"]
            options += [
                "--private" if target["private"] else "--public",
                f"results/{model}",
                target["repo"],
            ]
        return shlex.join(options)

    def _check_repositories(self) -> None:
        """Raise ConfigError where two models would go to one repository, whose card and list are those of one."""
        seen: dict[str, str] = {}
        for model in self._with_repository():
            repo = self.models[model]["publish"]["repo"]
            if (other := seen.setdefault(repo.lower(), model)) != model:
                raise ConfigError(
                    f"config.yaml: models/{model}/publish/repo: {repo} is that of {other}: a model has its own"
                )

    def _with_repository(self) -> list[str]:
        return [model for model in self.chosen if "publish" in self.models[model]]

    def _ends(self, model: str) -> list[str]:
        return [f"results/{model}/SHA256SUMS"] + (
            [f"results/{model}/SHA256SUMS.sig"] if "sign" in self.config else []
        )

    def key(self, wildcards: object) -> list[str]:
        """The key to sign with; nothing where none is configured."""
        return [self.config["sign"]["key"]] if "sign" in self.config else []

    def files_of(self, wildcards: Wildcards) -> list[str]:
        """A model's GGUFs, folders of split ones among them."""
        return [file for _, file, _ in self.outputs_of(wildcards.model)]

    def reports_of(self, wildcards: Wildcards) -> list[str]:
        """Their reports, in the same order."""
        return [report for _, _, report in self.outputs_of(wildcards.model)]

    def statements_of(self, wildcards: Wildcards) -> list[str]:
        """Their statements of provenance, in the same order."""
        return [
            report.replace("/reports/", "/provenance/") for report in self.reports_of(wildcards)
        ]

    def card_of_checkpoint(self, wildcards: Wildcards) -> str:
        """The checkpoint's own model card, which need not be there."""
        return f"{self.checkpoint(wildcards)}/README.md"

    def card_of_checkpoint_if_any(self, wildcards: Wildcards) -> list[str]:
        """What a job that reads it depends on."""
        source, path = self.models[wildcards.model]["source"], self.card_of_checkpoint(wildcards)
        if "path" in source:
            return [path] if Path(path).exists() else []
        inputs = self.checkpoint_inputs(wildcards)
        return [name for name in inputs if name.endswith(("/README.md.json", "/head.json"))]

    def about(self, wildcards: Wildcards) -> str:
        """A model's part of the configuration that its card tells, as JSON."""
        entry = self.models[wildcards.model]
        part = {key: entry[key] for key in (*_OF_BUILD, "publish") if key in entry} | {
            "variants": _as_made(entry["variants"])
        }
        return json.dumps({"name": self.base_name(wildcards.model), **_without_folders(part)})

    def parameters(self, wildcards: Wildcards) -> str:
        """The part of the configuration that decides what one file is, as JSON."""
        entry = self.models[wildcards.model]
        part = {key: entry[key] for key in _OF_BUILD if key in entry}
        variant = self._variant_of(wildcards)
        if variant is not None:
            part["variants"] = _as_made({variant: entry["variants"][variant]})
        else:
            part |= {key: entry[key] for key in ("sidecar", "mmproj") if key in entry}
        return json.dumps(_without_folders(part))

    def _variant_of(self, wildcards: Wildcards) -> str | None:
        for variant, _, report in self.outputs_of(wildcards.model):
            if report.endswith(f"/reports/{wildcards.stem}.json"):
                return variant
        raise ConfigError(f"{wildcards.model} has no file {wildcards.stem}")

    def _materials(self, wildcards: Wildcards) -> list[Mapping[str, Any]]:
        """Base and importance matrix of a variant, where they are somebody's; a base that is changed in place is no more."""
        variant = self._variant_of(wildcards)
        entry = {} if variant is None else self.models[wildcards.model]["variants"][variant]
        used = [entry[key] for key in ("base", "imatrix") if key in entry]
        files = [file for file in used if "type" not in file and not file.get("in_place")]
        return [{"path": file["text"]} if "text" in file else file for file in files]

    def materials_if_any(self, wildcards: Wildcards) -> list[str]:
        """What there is of these."""
        return [path for file in self._materials(wildcards) for path in _evidence(file)]

    def material_options(self, wildcards: Wildcards) -> str:
        """The same as options of provenance.py."""
        used = [
            ["--material", json.dumps(_without_folders(file)), *_evidence(file)]
            for file in self._materials(wildcards)
        ]
        return shlex.join(word for options in used for word in options)

    def locks(self, wildcards: Wildcards) -> list[str]:
        """The locked requirements of what makes a model."""
        return [
            "envs/run.txt",
            "envs/llama.cpp.txt",
            *(["envs/converter.txt"] if self._needs_upstream(wildcards) else []),
        ]

    def programs(self, wildcards: Wildcards) -> list[str]:
        """The programs that make a model's files, with all modules that they import."""
        converters = [
            "convert.py",
            *(["convert_upstream.py"] if self._needs_upstream(wildcards) else []),
        ]
        all_of_them = (*converters, "quantize_plan.py", "quantize.py", "inject.py", "verify.py")
        return sorted({path for program in all_of_them for path in code(program)})

    def _needs_upstream(self, wildcards: Wildcards) -> bool:
        return bool(self.models[wildcards.model]["mmproj"]) or not self._is_ours(wildcards)

    def source_of(self, wildcards: Wildcards) -> str:
        """Where the checkpoint comes from, as JSON."""
        return json.dumps(_without_folders(self.models[wildcards.model]["source"]))

    def base_name(self, model: str) -> str:
        """The first part of a model's file names: the name of its repository or folder."""
        source = self.models[model]["source"]
        return str(source["repo"].split("/")[1] if "repo" in source else Path(source["path"]).name)

    def names(self) -> dict[str, list[str]]:
        """All values that the wildcards `model`, `base`, `variant` and `name` can have."""
        variants = {variant for model in self.models.values() for variant in model["variants"]}
        return {
            "model": list(self.models),
            "base": sorted({self.base_name(model) for model in self.models}),
            "variant": sorted(variants),
            "name": sorted(variants | quant_types.FILE_TYPES.keys()),
        }

    def models_of(self, converter: str) -> str:
        """A regular expression for the models that this converter makes; one that nothing matches if there are none."""
        names = [
            re.escape(name)
            for name, model in self.models.items()
            if model["converter"] == converter
        ]
        return "|".join(names) or "(?!)"

    # ── where it comes from ──

    def checkpoint(self, wildcards: Wildcards) -> str:
        """The checkpoint's folder; of one from the Hub, of which only the head is used, that of its head."""
        source = self.models[wildcards.model]["source"]
        if "path" in source:
            return str(source["path"])
        part = "head/" if self._head_only(wildcards.model) else ""
        return f"{HUB.format(**source)}/{part}{self.base_name(wildcards.model)}"

    def checkpoint_inputs(self, wildcards: Wildcards) -> list[str]:
        """What a job that reads the checkpoint depends on: the files of a local one, the records of a fetched one.

        A shard has no record before its content is right, and a touch of it changes no record.
        """
        source = self.models[wildcards.model]["source"]
        if "repo" in source:
            if self._head_only(wildcards.model):
                return [f"{HUB.format(**source)}/head.json"]
            listing = Listing.read(Path(self._checkpoints.resolve.get(**source).output[0]))
            return [_record(source, name) for name in listing.checkpoint_files()]
        folder = Path(source["path"])
        kinds = (".json", ".safetensors", ".jinja", ".txt", ".md", ".model")
        return sorted(
            str(path)
            for path in folder.iterdir()
            if path.suffix in kinds and path.name != "reference.json"
        )

    def _head_only(self, model: str) -> bool:
        """Whether all that is made of a model is somebody's quantization with its head, and that head can be converted alone."""
        entry = self.models[model]
        theirs = all(
            "base" in variant and "type" not in variant["base"]
            for variant in entry["variants"].values()
        )
        return (
            theirs
            and entry["converter"] == "mtpforge"
            and not entry["mmproj"]
            and "sidecar" not in entry
        )

    def fetched(self, wildcards: Wildcards) -> str:
        """The folder of files from a repository, by the name that a checkpoint's must have."""
        repo, revision = wildcards.repo, wildcards.revision
        return f"{HUB.format(repo=repo, revision=revision)}/{repo.split('/')[1]}"

    def fetched_head(self, wildcards: Wildcards) -> str:
        """The folder of a checkpoint that is the head alone."""
        repo, revision = wildcards.repo, wildcards.revision
        return f"{HUB.format(repo=repo, revision=revision)}/head/{repo.split('/')[1]}"

    def tokenizer_option(self, wildcards: Wildcards) -> str:
        """The option that names a pre-tokenizer whose checksum is unknown."""
        pre = self.models[wildcards.model].get("tokenizer_pre")
        return f"--tokenizer-pre {pre}" if pre else ""

    # ── variants ──

    def entry(self, wildcards: Wildcards) -> dict[str, Any]:
        """A variant's own part of the configuration."""
        return dict(self.models[wildcards.model]["variants"][wildcards.variant])

    def file_type(self, wildcards: Wildcards) -> str:
        """The type that llama-quantize is asked for; of an injected file, that of the base where it is made here."""
        return _file_type(wildcards.variant, self.entry(wildcards))

    def head(self, wildcards: Wildcards) -> str:
        """The head's types as `quantize.read_head` takes them, or `none`."""
        return _head(self.entry(wildcards), self.file_type(wildcards))

    def converted(self, wildcards: Wildcards) -> str:
        """What conversion makes for a variant: all, or the trunk where no head is wanted; without its ending."""
        part = "trunk" if self.head(wildcards) == NO_HEAD else "all"
        return f"{WORK.format(model=wildcards.model)}/convert/{part}"

    def source(self, wildcards: Wildcards) -> str:
        """The BF16 GGUF that a variant is quantized from."""
        return f"{self.converted(wildcards)}.gguf"

    def source_digests(self, wildcards: Wildcards) -> str:
        """The digests of its tensors."""
        return f"{self.converted(wildcards)}.json"

    def recipe(self, wildcards: Wildcards) -> str:
        """The recipe as JSON, which is YAML; empty where there is none."""
        return json.dumps(self.entry(wildcards).get("tensors", {}))

    # ── what is quantized: a variant, or a part alone (trunk, draft) to a type ──

    def _variant(self, wildcards: Wildcards) -> Wildcards | None:
        """The variant that is quantized, as wildcards; None for a part alone. Raises ConfigError for a name that cannot be."""
        model, name = wildcards.model, wildcards.name
        if wildcards.kind != "quantized":
            quant_types.check_file_type(name)
            return None
        if name not in self.models[model]["variants"]:
            raise ConfigError(f"models.{model}.variants has no {name}")
        return cast(Wildcards, SimpleNamespace(model=wildcards.model, variant=wildcards.name))

    def _planned(self, wildcards: Wildcards) -> str:
        variant = self._variant(wildcards)
        return (
            self.converted(variant)
            if variant
            else f"{WORK.format(model=wildcards.model)}/convert/{wildcards.kind}"
        )

    def planned_source(self, wildcards: Wildcards) -> str:
        """The BF16 GGUF that it is quantized from."""
        return f"{self._planned(wildcards)}.gguf"

    def planned_digests(self, wildcards: Wildcards) -> str:
        """The digests of its tensors."""
        return f"{self._planned(wildcards)}.json"

    def planned_recipe_if_any(self, wildcards: Wildcards) -> list[str]:
        """The recipe; a part alone has none."""
        return (
            [f"{WORK.format(model=wildcards.model)}/recipes/{wildcards.name}.yaml"]
            if self._variant(wildcards)
            else []
        )

    def planned_imatrix_if_any(self, wildcards: Wildcards) -> list[str]:
        """What a job that reads the importance matrix depends on; nothing for a variant without one."""
        imatrix = self._planned_imatrix(wildcards)
        return [] if imatrix is None else _evidence(imatrix)

    def planned_imatrix_option(self, wildcards: Wildcards) -> str:
        """The option that names it."""
        imatrix = self._planned_imatrix(wildcards)
        return "" if imatrix is None else shlex.join(["--imatrix", _place(imatrix)])

    def _planned_imatrix(self, wildcards: Wildcards) -> Mapping[str, Any] | None:
        variant = self._variant(wildcards)
        return self.entry(variant).get("imatrix") if variant else None

    def planned_options(self, wildcards: Wildcards) -> str:
        """What it is to be, as options of quantize_plan.py; a draft model is at one type."""
        variant = self._variant(wildcards)
        file_type = self.file_type(variant) if variant else wildcards.name
        head = self.head(variant) if variant else {"draft": file_type}.get(wildcards.kind, NO_HEAD)
        options = ["--type", file_type, *([] if head == NO_HEAD else ["--head", head])]
        return shlex.join(
            [
                *options,
                *(
                    word
                    for path in self.planned_recipe_if_any(wildcards)
                    for word in ("--tensors", path)
                ),
            ]
        )

    def planned_name_option(self, wildcards: Wildcards) -> str:
        """Where it can lie once it is verified, in one file or several, and until then, as options of quantize.py."""
        model, base, work = (
            wildcards.model,
            self.base_name(wildcards.model),
            WORK.format(model=wildcards.model),
        )

        def published(name: str) -> list[str]:
            return [_output(model, f"{base}-{name}", split)[0] for split in (False, True)]

        if self._variant(wildcards):
            return shlex.join(
                [
                    "--also",
                    *published(wildcards.name),
                    "--keep",
                    f"{work}/manifests/quantized/{wildcards.name}.gguf",
                ]
            )
        if wildcards.kind == "draft":
            return shlex.join(["--also", _output(model, f"mtp-{base}-{wildcards.name}")[0]])
        entries = self.models[model]["variants"].items()
        injected = [
            name for name, entry in entries if entry.get("base", {}).get("type") == wildcards.name
        ]
        also = [
            path for name in injected for path in (f"{work}/injected/{name}.gguf", *published(name))
        ]
        return shlex.join(["--also", *also]) if also else ""

    def pieces(self, wildcards: Wildcards) -> list[str]:
        """The digests of the pieces that it is made of; none where it is made in one go, as the head alone always is."""
        model, variant = self.models[wildcards.model], self._variant(wildcards)
        entry = self.entry(variant) if variant else {}
        count = 1 if wildcards.kind == "draft" else entry.get("pieces", model.get("pieces"))
        if count is None:
            made = self._checkpoints.plan.get(
                model=wildcards.model, kind=wildcards.kind, name=wildcards.name
            )
            count = int(Path(made.output.pieces).read_text(encoding="utf-8"))
        folder = f"{WORK.format(model=wildcards.model)}/pieces/{wildcards.kind}/{wildcards.name}"
        return (
            [f"{folder}/{number}-of-{count}.json" for number in range(1, count + 1)]
            if count > 1
            else []
        )

    def candidate(self, wildcards: Wildcards) -> str:
        """The file that is verified and, if it passes, published. Raises ConfigError for another model's name."""
        self._check_base(wildcards)
        work = WORK.format(model=wildcards.model)
        if "base" in self.entry(wildcards):
            return f"{work}/injected/{wildcards.variant}.gguf"
        if self.file_type(wildcards) == "BF16":
            return self.source(wildcards)  # what conversion makes is this variant: no copy of 70 GB
        return f"{work}/quantized/{wildcards.variant}.gguf"

    def sidecar(self, wildcards: Wildcards) -> str:
        """The draft model that is verified and, if it passes, published. Raises ConfigError for another model's name."""
        self._check_base(wildcards)
        return f"{WORK.format(model=wildcards.model)}/draft/{wildcards.type}.gguf"

    def sidecar_digests(self, wildcards: Wildcards) -> str:
        """What was recorded of its bytes."""
        return self.sidecar(wildcards).removesuffix(".gguf") + ".json"

    def mmproj(self, wildcards: Wildcards) -> str:
        """The vision tower that is verified and, if it passes, published. Raises ConfigError for another model's name."""
        self._check_base(wildcards)
        return f"{WORK.format(model=wildcards.model)}/convert/mmproj.gguf"

    def unquantized(self, wildcards: Wildcards) -> str:
        """The model at BF16, with its head unless no variant has one; without its ending."""
        variants = self.models[wildcards.model]["variants"].values()
        part = "trunk" if all(entry.get("head") == NO_HEAD for entry in variants) else "all"
        return f"{WORK.format(model=wildcards.model)}/convert/{part}"

    def unquantized_file(self, wildcards: Wildcards) -> str:
        """The GGUF itself."""
        return f"{self.unquantized(wildcards)}.gguf"

    def unquantized_digests(self, wildcards: Wildcards) -> str:
        """The digests of its tensors."""
        return f"{self.unquantized(wildcards)}.json"

    def verified(self, wildcards: Wildcards) -> str:
        """A variant's verified file, or the folder of a split one. Raises ConfigError for another model's name."""
        self._check_base(wildcards)
        return self._output_of(wildcards)[0]

    def report(self, wildcards: Wildcards) -> str:
        """Its verification report."""
        return self._output_of(wildcards)[1]

    def _output_of(self, wildcards: Wildcards) -> tuple[str, str]:
        split = bool(self._split(wildcards.model, wildcards.variant))
        return _output(
            wildcards.model, f"{self.base_name(wildcards.model)}-{wildcards.variant}", split
        )

    def measured_text(self, wildcards: Wildcards) -> list[str]:
        """The text on which a model's perplexity is measured; nothing where none is named."""
        measure = self._measure(wildcards.model)
        return [measure["text"]] if "text" in measure else []

    def measured_logits(self, wildcards: Wildcards) -> list[str]:
        """What BF16 predicts for it; nothing where no whole checkpoint is there."""
        needed = self.measured_text(wildcards) and not self._head_only(wildcards.model)
        return [f"{WORK.format(model=wildcards.model)}/logits/reference.bin"] if needed else []

    def chunks(self, wildcards: Wildcards) -> int:
        """How much of the text."""
        return int(self._measure(wildcards.model)["chunks"])

    def measure_options(self, wildcards: Wildcards) -> str:
        """What is measured, as options of measure.py."""
        measure = self._measure(wildcards.model)
        options = [
            "--n-max",
            ",".join(map(str, measure["n_max"])),
            "--repeats",
            str(measure["repeats"]),
        ]
        options += [f"--serve={shlex.join(measure['serve'])}"] if measure["serve"] else []
        for text in self.measured_text(wildcards):
            options += ["--text", text, "--chunks", str(measure["chunks"])]
        for logits in self.measured_logits(wildcards):
            options += ["--reference-logits", logits]
        return shlex.join(options)

    def measurements_of(self, wildcards: Wildcards) -> list[str]:
        """What is measured of a model's variants; nothing where it does not ask for it."""
        return (
            self._measurements(wildcards.model) if "measure" in self.models[wildcards.model] else []
        )

    def _measure(self, model: str) -> dict[str, Any]:
        if "measure" not in self.models[model]:
            raise ConfigError(
                f"config.yaml: models/{model}/measure: is not there, so nothing of this model is measured"
            )
        return dict(self.models[model]["measure"])

    def _check_base(self, wildcards: Wildcards) -> None:
        base = self.base_name(wildcards.model)
        if wildcards.base != base:
            raise ConfigError(
                f"files of {wildcards.model} are named {base}-*, not {wildcards.base}-*"
            )

    def base(self, wildcards: Wildcards) -> str:
        """The GGUF that a head is injected into; of a split one, its first file."""
        base = self.entry(wildcards)["base"]
        return (
            f"{WORK.format(model=wildcards.model)}/trunk/{base['type']}.gguf"
            if "type" in base
            else _place(base)
        )

    def base_if_any(self, wildcards: Wildcards) -> list[str]:
        """What a job that reads the base depends on; nothing for a base that is to be changed in place."""
        base = self.entry(wildcards)["base"]
        return (
            []
            if base.get("in_place")
            else [self.base(wildcards)]
            if "type" in base
            else _evidence(base)
        )

    def own_base_if_any(self, wildcards: Wildcards) -> list[str]:
        """A base that is to be changed in place."""
        base = self.entry(wildcards)["base"]
        return [base["path"]] if base.get("in_place") else []

    def inject_options(self, wildcards: Wildcards) -> str:
        """What else may be done to the base, as options of inject.py."""
        entry = self.entry(wildcards)
        options = {
            "--replace-head": entry["replace_head"],
            "--in-place": entry["base"].get("in_place"),
        }
        return " ".join(option for option, wanted in options.items() if wanted)

    def digests(self, wildcards: Wildcards) -> str:
        """What was recorded of the bytes of the file that is verified, when it was made."""
        return self.candidate(wildcards).removesuffix(".gguf") + ".json"

    def imatrix_text(self, wildcards: Wildcards) -> str:
        """The text that an importance matrix is computed from. Raises ConfigError for a matrix that nothing asks for."""
        if wildcards.text not in self._texts:
            raise ConfigError(f"config.yaml: no variant has an importance matrix {wildcards.text}")
        return self._texts[wildcards.text]

    def prompts(self, wildcards: Wildcards) -> str:
        """The folder of prompts on which drafting is measured."""
        return str(self.models[wildcards.model]["prompts"])

    def prompt_files(self, wildcards: Wildcards) -> list[str]:
        """The prompts in it."""
        return sorted(str(path) for path in Path(self.prompts(wildcards)).glob("*.txt"))

    def head_source(self, wildcards: Wildcards) -> str:
        """The BF16 GGUF that has the head to be injected, without its ending; llama.cpp's converter never writes a head alone."""
        part = "head" if self._is_ours(wildcards) else "all"
        return f"{WORK.format(model=wildcards.model)}/convert/{part}"

    def head_file(self, wildcards: Wildcards) -> str:
        """The GGUF itself."""
        return f"{self.head_source(wildcards)}.gguf"

    def head_digests(self, wildcards: Wildcards) -> str:
        """The digests of its tensors."""
        return f"{self.head_source(wildcards)}.json"

    def reference(self, wildcards: Wildcards) -> list[str]:
        """What llama.cpp's converter made and a file is compared with; nothing where the checkpoint itself serves."""
        return (
            []
            if self._is_ours(wildcards)
            else [self.source(wildcards), self.source_digests(wildcards)]
        )

    def draft_reference(self, wildcards: Wildcards) -> list[str]:
        """The same for a draft sidecar."""
        return (
            []
            if self._is_ours(wildcards)
            else [f"{WORK.format(model=wildcards.model)}/convert/draft.gguf"]
        )

    def _is_ours(self, wildcards: Wildcards) -> bool:
        return bool(self.models[wildcards.model]["converter"] == "mtpforge")

    def unquantized_if_any(self, wildcards: Wildcards) -> list[str]:
        """What the BF16 file accepts, for the acceptance of a quantization of it; it depends on no other variant.

        Nothing for somebody else's base, so that no BF16 file is made for this alone.
        """
        entry, file_type = self.entry(wildcards), self.file_type(wildcards)
        theirs = "base" in entry and "type" not in entry["base"]
        if (
            theirs
            or self.head(wildcards) == NO_HEAD
            or ("base" not in entry and file_type in quant_types.UNQUANTIZED)
        ):
            return []
        return self.unquantized_of_sidecar(wildcards)

    def unquantized_of_sidecar(self, wildcards: Wildcards) -> list[str]:
        """The same for a draft sidecar, which is verified beside the BF16 file."""
        compared = self.models[wildcards.model]["max_acceptance_drop"] < 1
        return [f"{WORK.format(model=wildcards.model)}/acceptance.json"] if compared else []

    def source_option(self, wildcards: Wildcards) -> str:
        """What verify.py compares a file's inventory and head with."""
        return self._against(wildcards, self.reference(wildcards))

    def draft_source_option(self, wildcards: Wildcards) -> str:
        """The same for a draft sidecar."""
        return self._against(wildcards, self.draft_reference(wildcards))

    def _against(self, wildcards: Wildcards, reference: list[str]) -> str:
        return shlex.join(
            ["--reference", reference[0]]
            if reference
            else ["--checkpoint", self.checkpoint(wildcards)]
        )

    def verify_options(self, wildcards: Wildcards) -> str:
        """What a variant must be, as options of verify.py; a base of somebody else's has whatever types it has."""
        base = self.entry(wildcards).get("base")
        options = [
            "--head",
            self.head(wildcards),
            *self._gates(wildcards, self.unquantized_if_any(wildcards)),
        ]
        source = self.models[wildcards.model]["source"]
        if "repo" in source and self._head_only(wildcards.model):
            options += ["--head-record", f"{HUB.format(**source)}/head.json"]
        if base is None or "type" in base:
            options += ["--type", self.file_type(wildcards)]
        if pre := self.models[wildcards.model].get("tokenizer_pre"):
            options += ["--tokenizer-pre", pre]
        if "text" in self.models[wildcards.model].get("measure", {}):
            options += ["--perplexity"]
        return shlex.join(
            [*options, "--digests" if base is None else "--trunk", self.digests(wildcards)]
        )

    def sidecar_options(self, wildcards: Wildcards) -> str:
        """What a draft sidecar must reach."""
        return shlex.join(self._gates(wildcards, self.unquantized_of_sidecar(wildcards)))

    def _gates(self, wildcards: Wildcards, unquantized: list[str]) -> list[str]:
        model = self.models[wildcards.model]
        gates = ["--min-acceptance", str(model["min_acceptance"])]
        for measured in unquantized:
            gates += [
                "--unquantized",
                measured,
                "--max-acceptance-drop",
                str(model["max_acceptance_drop"]),
            ]
        return gates

    def split_options(self, wildcards: Wildcards) -> str:
        """The same for a variant that is published in several files."""
        return f"{self.verify_options(wildcards)} --split {self._split(wildcards.model, wildcards.variant)}"


_OF_BUILD = (
    "source",
    "converter",
    "tokenizer_pre",
    "prompts",
    "min_acceptance",
    "max_acceptance_drop",
    "split",
)
"""Keys of a model that decide what each of its files is."""


def _output(model: str, stem: str, split: bool = False) -> tuple[str, str]:
    folder = f"results/{model}"
    if split:
        return f"{folder}/{stem}", f"{folder}/reports/{stem}.split.json"
    return f"{folder}/{stem}.gguf", f"{folder}/reports/{stem}.json"


def _without_folders(value: Any) -> Any:
    """A part of the configuration as it may be published: of a path, its last name alone."""
    if not isinstance(value, Mapping):
        return value
    return {
        key: Path(entry).name if key in ("path", "text", "prompts") else _without_folders(entry)
        for key, entry in value.items()
        if not (key == "path" and "text" in value)  # what is computed from a text here
    }


def _as_made(variants: Mapping[str, Any]) -> dict[str, Any]:
    """The variants without what changes nothing in the files."""
    return {
        name: {key: value for key, value in entry.items() if key != "pieces"}
        for name, entry in variants.items()
    }


def _place(file: Mapping[str, Any]) -> str:
    """Where a file of the configuration lies, of a split one the first: one of yours, or one from the Hub once it is fetched."""
    if "path" in file:
        return str(file["path"])
    return f"{HUB.format(**file)}/{file['repo'].split('/')[1]}/{gguf_files(file['file'])[0]}"


def _evidence(file: Mapping[str, Any]) -> list[str]:
    """What a job that reads it depends on: your file itself, or the records of a fetched one; of a split one all files."""
    if "path" in file:
        path = Path(file["path"])
        return [str(path.with_name(name)) for name in gguf_files(path.name)]
    return [_record(file, name) for name in gguf_files(file["file"])]


def _record(source: Mapping[str, Any], name: str) -> str:
    """The record of a fetched file. Raises ConfigError where the record is there and the file is not as it says any more."""
    folder = Path(HUB.format(**source))
    record, file = folder / "records" / f"{name}.json", folder / source["repo"].split("/")[1] / name
    if record.exists():
        size = json.loads(record.read_text(encoding="utf-8"))["bytes"]
        if not file.is_file() or file.stat().st_size != size:
            raise ConfigError(
                f"{file}: is gone or of another size, though it was fetched: delete {record} and run again"
            )
    return str(record)


def _head(entry: Mapping[str, Any], file_type: str) -> str:
    head = entry.get("head") or default_head(file_type)
    if isinstance(head, str):
        return head
    return ",".join(
        [head["type"], *(f"{pattern}={kind}" for pattern, kind in head.get("tensors", {}).items())]
    )


def _file_type(variant: str, entry: Mapping[str, Any]) -> str:
    return str(entry.get("type") or entry.get("base", {}).get("type") or variant)


def _check_folders(path: str, model: Mapping[str, Any]) -> None:
    source = model["source"].get("path")
    if source is not None and not Path(source).is_dir():
        raise ConfigError(f"config.yaml: {path}/source/path: no such folder: {source}")
    text = model.get("measure", {}).get("text")
    if text is not None and not Path(text).is_file():
        raise ConfigError(f"config.yaml: {path}/measure/text: no such file: {text}")
    if not any(Path(model["prompts"]).glob("*.txt")):
        raise ConfigError(f"config.yaml: {path}/prompts: no *.txt files in {model['prompts']}")


def _check_name(path: str, stem: str) -> None:
    """Raise ConfigError for a name by which llama.cpp 0c1e57098 takes a repository's file for no model (`common/download.cpp`)."""
    for part in ("mmproj", "imatrix", "mtp-", "eagle3-", "dflash-", "dspark-"):
        if part in stem:
            raise ConfigError(
                f"config.yaml: {path}: llama.cpp would not find {stem}.gguf in a repository, for its {part!r}: rename it"
            )


def _check_variant(path: str, variant: str, entry: Mapping[str, Any]) -> None:
    """What the schema cannot say. Raises ConfigError with the key's path."""
    _check_recipe(f"{path}/tensors", entry.get("tensors", {}))
    try:
        if "base" not in entry or "type" in entry["base"] or "type" in entry:
            file_type = quant_types.check_file_type(_file_type(variant, entry))
        else:
            file_type = "Q8_0"  # of somebody else's base, whose type is its own affair
        _check_base(entry)
        head = _head(entry, file_type)
        if head != NO_HEAD:
            for _, kind in read_head(head):
                quant_types.check_tensor_type(kind, low_bit=entry.get("allow_low_bit_head", False))
        if (
            "base" not in entry
            and file_type in quant_types.UNQUANTIZED
            and (head not in (file_type, NO_HEAD) or "tensors" in entry)
        ):
            raise ConfigError(
                f"{file_type} is not quantized: its head stays {file_type} and a recipe has no effect"
            )
        _check_imatrix(entry, file_type, head)
    except ConfigError as error:
        raise ConfigError(f"config.yaml: {path}: {error}") from None


def _check_recipe(path: str, recipe: Mapping[str, str]) -> None:
    """Its patterns and types are such as llama-quantize has. Raises ConfigError with the key's path."""
    try:
        for pattern, kind in recipe.items():
            check_pattern(pattern)
            quant_types.check_tensor_type(kind)
    except ConfigError as error:
        raise ConfigError(f"config.yaml: {path}: {error}") from None


def _check_base(entry: Mapping[str, Any]) -> None:
    if "base" in entry and "tensors" in entry:
        raise ConfigError("tensors: a base is already quantized, a recipe cannot change it")
    if "base" in entry and _head(entry, "Q8_0") == NO_HEAD:
        raise ConfigError("head: none: a base is there to be given a head")
    if "base" not in entry and entry["replace_head"]:
        raise ConfigError("replace_head: there is no base whose head could be replaced")


def _check_imatrix(entry: Mapping[str, Any], file_type: str, head: str) -> None:
    if "imatrix" in entry:
        if "base" in entry or file_type in quant_types.UNQUANTIZED:
            raise ConfigError("imatrix: nothing is quantized here that it could help")
        return
    heads = [] if head == NO_HEAD else [kind for _, kind in read_head(head)]
    for kind in (file_type, *heads, *entry.get("tensors", {}).values()):
        if kind in quant_types.NEED_IMATRIX:
            way = "take another type" if "base" in entry else "name one, or take another type"
            raise ConfigError(
                f"imatrix: {kind} cannot be quantized without an importance matrix: {way}"
            )


def _check_own_bases(models: Mapping[str, Any]) -> None:
    """Raise ConfigError where a file that is to be changed in place is the base of another variant too."""
    seen: dict[str, str] = {}
    variants = (
        (f"models/{m}/variants/{v}", entry)
        for m, model in models.items()
        for v, entry in model["variants"].items()
    )
    bases = [(name, entry["base"]) for name, entry in variants if "path" in entry.get("base", {})]
    for name, base in sorted(bases, key=lambda item: not item[1].get("in_place")):
        path = os.path.realpath(base["path"])
        if path in seen:
            raise ConfigError(
                f"config.yaml: {name}/base: {base['path']} is changed in place for {seen[path]}: copy it first"
            )
        if base.get("in_place"):
            seen[path] = name
            if len(gguf_files(base["path"])) > 1:
                raise ConfigError(
                    f"config.yaml: {name}/base: of a base in several files, none can be changed in place"
                )


def _check_sidecar(path: str, file_type: str) -> None:
    """It is nearly all head, so its type must be one that a head may have. Raises ConfigError with the key's path."""
    types = [
        name
        for name in quant_types.TENSOR_TYPES
        if name in quant_types.FILE_TYPES and quant_types.bits(name) >= 4
    ]
    if file_type not in types:
        raise ConfigError(
            f"config.yaml: {path}: {file_type!r} is no type for a head alone: {', '.join(types)} are"
        )


def validated(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration with the schema's defaults. Raises ConfigError for the first thing that does not fit it."""
    schema = yaml.safe_load(SCHEMA.read_text(encoding="utf-8"))
    if errors := list(Draft202012Validator(schema).iter_errors(config)):
        raise ConfigError(f"config.yaml: {_explain(errors)}")
    return dict(_with_defaults(config, schema))


def _explain(errors: list[ValidationError]) -> str:
    """The path of an offending key, and what is wrong with it; a misspelt key before what is missing for it."""
    error = min(errors, key=lambda error: error.validator != "additionalProperties")
    path = "/".join(map(str, error.absolute_path)) or "(top)"
    if error.validator == "oneOf" and error.context:
        # Of the alternatives, one of the kind that is there, and of these the one with the fewest faults, is what was meant.
        by_alternative = [
            [e for e in error.context if e.schema_path[0] == i]
            for i in range(len(error.validator_value))
        ]
        return _explain(
            min(
                by_alternative,
                key=lambda e: (e[0].validator == "type" and not e[0].relative_path, len(e)),
            )
        )
    if error.validator == "additionalProperties" and isinstance(error.instance, dict):
        known = error.schema.get("properties", {})
        unknown = [key for key in error.instance if key not in known]
        return f"{path}/{unknown[0]}: unknown key: known are {', '.join(known)}"
    if error.validator == "pattern" and path.endswith("/revision"):
        ask = f"resolve.py OWNER/NAME --revision {error.instance} --out files.json"
        return f"{path}: {error.instance!r} is no full commit (40 hex digits): `python workflow/scripts/{ask}` says which it names"
    return f"{path}: {error.message}"


def _with_defaults(value: Any, schema: Mapping[str, Any]) -> Any:
    """A copy of a valid `value` in which missing keys have the defaults of the schema."""
    if not isinstance(value, Mapping):
        return value
    properties, other = schema.get("properties", {}), schema.get("additionalProperties")
    defaults = {key: sub["default"] for key, sub in properties.items() if "default" in sub}
    merged = {**defaults, **value}
    return {
        key: _with_defaults(entry, properties.get(key, other if isinstance(other, dict) else {}))
        for key, entry in merged.items()
    }
