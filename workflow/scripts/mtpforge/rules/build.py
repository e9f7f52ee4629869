"""The configuration as a build: one object per stage, whose methods are what the rules use."""

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mtpforge.gguf import quant_types
from mtpforge.rules import config_checks, layout
from mtpforge.rules.config import SHARDS, Model, parse
from mtpforge.rules.convert import ConvertRules
from mtpforge.rules.fetch import FetchRules
from mtpforge.rules.inject import InjectRules
from mtpforge.rules.measure import MeasureRules
from mtpforge.rules.publish import PublishRules
from mtpforge.rules.quantize import QuantizeRules
from mtpforge.rules.report import ReportRules
from mtpforge.rules.resources import ResourceRules
from mtpforge.rules.search import SearchRules
from mtpforge.rules.verify import VerifyRules


class Build:
    """The build that `config.yaml` asks for. Raises ConfigError for the first key that is wrong.

    `checkpoints` are Snakemake's.
    """

    def __init__(self, config: Mapping[str, Any], checkpoints: Any = None) -> None:
        self.config = parse(config)
        config_checks.check(self.config)
        self.fetch = FetchRules(self.config, checkpoints)
        self.convert = ConvertRules(self.config)
        self.quantize = QuantizeRules(self.config, checkpoints)
        self.search = SearchRules(self.config)
        self.inject = InjectRules(self.config)
        self.verify = VerifyRules(self.config)
        self.measure = MeasureRules(self.config)
        self.report = ReportRules(self.config)
        self.needs = ResourceRules(self.config)
        self.publish = PublishRules(self.config, self.fetch)

    def planning(self, files: Sequence[str | Path], machines: str) -> str:
        """The options with which plan.py forecasts this build, which these files configure.

        So many machines share a quantization; empty: one.
        """
        options = [word for file in files for word in ("--config", str(file))]
        if self.config.is_lean:
            options += ["--lean", SHARDS if self.config.lean == SHARDS else "lean"]
        options += ["--machines", machines] if machines else []
        return shlex.join(options)

    def outputs(self) -> list[layout.Output]:
        """Everything that the target `all` publishes."""
        return [output for model in self.config.chosen for output in layout.outputs(model)]

    def folders(self) -> list[str]:
        """The folders of the models that `all` builds."""
        return [layout.folder(model.key) for model in self.config.chosen]

    def files(self) -> list[str]:
        """All published files, or the folders of split ones; not those that are away."""
        away = {key for key, model in self.config.models.items() if model.passing}
        return [
            output.file
            for output in self.outputs()
            if not (output.model in away and output.is_away)
        ]

    def reports(self) -> list[str]:
        """Their reports, in the same order."""
        return [output.report for output in self.outputs()]

    def measurements(self) -> list[str]:
        """The measurements of all models that have `measure`."""
        return [path for model in self.config.chosen for path in layout.measurements(model)]

    def summarized(self) -> str:
        """Files that the summary is of, as options: of what is built, then of all other models.

        A run for one model does not forget the others. What they lack, or have of another version,
        is left out.
        """
        chosen = self.config.chosen
        keys = {model.key for model in chosen}
        others = [model for model in self.config.models.values() if model.key not in keys]
        paths: dict[str, Callable[[Model], list[str]]] = {
            "": lambda model: [output.report for output in layout.outputs(model)],
            "--measurements": layout.measurements,
            "--compared": self.search.compared_of,
            "--others": layout.others,
            "--coverages": layout.coverages,
        }
        words: list[str] = []
        for option, of in paths.items():
            words += [option] * bool(option)
            words += [path for model in (*chosen, *others) for path in of(model)]
        return shlex.join([*words, "--earlier", *(layout.folder(model.key) for model in others)])

    def names(self) -> dict[str, list[str]]:
        """All values of the wildcards `model`, `base`, `variant` and `name`."""
        models = self.config.models.values()
        variants = {variant for model in models for variant in model.variants}
        return {
            "model": list(self.config.models),
            "base": sorted(
                {model.base_name for model in models}
                | {model.name_of(each) for model in models for each in model.variants.values()}
            ),
            "variant": sorted(variants),
            "name": sorted(variants | quant_types.FILE_TYPES.keys()),
        }
