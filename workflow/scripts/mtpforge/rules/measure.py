"""Stage `measure`: speed, acceptance and distance from BF16 of verified files."""

import json
import shlex
from hashlib import sha256
from pathlib import Path

from mtpforge.errors import ConfigError
from mtpforge.gguf.file_names import gguf_files
from mtpforge.prompts import prompt_files, read_measured
from mtpforge.rules import layout
from mtpforge.rules.code import digest
from mtpforge.rules.config import MeasureSettings
from mtpforge.rules.fetch import tracked_inputs
from mtpforge.rules.stage import Stage, Wildcards
from mtpforge.rules.variant import HubFile, HubGguf, LocalGguf


class MeasureRules(Stage):
    """Inputs and parameters of rules/measure.smk."""

    def file(self, wildcards: Wildcards) -> str:
        """A variant's verified file, or the folder of a split one."""
        self.check_base(wildcards, self.variant(wildcards))
        return self._output(wildcards).file

    def drawn(self, wildcards: Wildcards) -> str:
        """The same, or what stands in for it."""
        file, output = self.file(wildcards), self._output(wildcards)
        return output.stand_in if self.model(wildcards).passing and output.is_away else file

    def report(self, wildcards: Wildcards) -> str:
        """The report of its verification."""
        return self._output(wildcards).report

    def text(self, wildcards: Wildcards) -> list[str]:
        """The text to measure perplexity on, if there is one."""
        text = self._settings(wildcards).text
        return [text] if text else []

    def text_records(self, wildcards: Wildcards) -> list[str]:
        """The record of its content."""
        return [layout.local_record(text) for text in self.text(wildcards)]

    def records(self, wildcards: Wildcards) -> list[str]:
        """The same, and the records of files of tasks."""
        tasks = self._settings(wildcards).tasks
        files = tasks.files.values() if tasks else ()
        return [*self.text_records(wildcards), *map(layout.local_record, files)]

    def prompts(self, wildcards: Wildcards) -> str:
        """The prompts, a folder or a *.jsonl."""
        return self.model(wildcards).measured_prompts

    def prompt_files(self, wildcards: Wildcards) -> list[str]:
        """Their files."""
        return [str(path) for path in prompt_files(Path(self.prompts(wildcards)))]

    def logits(self, wildcards: Wildcards) -> list[str]:
        """The BF16 logits for it; nothing without a BF16 file of the variant's trunk."""
        model = self.model(wildcards)
        needed = self.text(wildcards) and model.has_unquantized(self.variant(wildcards))
        return [layout.reference_logits(wildcards.model)] if needed else []

    def logits_digests(self, wildcards: Wildcards) -> list[str]:
        """Their digest."""
        made = self.logits(wildcards)
        return [layout.reference_logits_digest(wildcards.model)] if made else []

    def chunks(self, wildcards: Wildcards) -> int:
        """The number of chunks of the text to use."""
        return self._settings(wildcards).chunks

    def decisive(self, wildcards: Wildcards) -> str:
        """Code, settings and prompts of all measurements of a model, as JSON."""
        prompts = read_measured(Path(self.prompts(wildcards)))
        settings = self._settings(wildcards).model_dump()
        found = {f"{kind}.txt": sha256(text.encode()).hexdigest() for kind, text in prompts.items()}
        return json.dumps({"code": digest("measure.py"), **settings, "prompts": found})

    def options(self, wildcards: Wildcards) -> str:
        """The measurements to make, as options of measure.py."""
        settings = self._settings(wildcards)
        report = self.report(wildcards)
        options = ["--report", report, "--n-max", ",".join(map(str, settings.n_max))]
        options += ["--p-min", ",".join(f"{value:g}" for value in settings.p_min)]
        options += ["--repeats", str(settings.repeats), "--minutes", str(settings.minutes)]
        options += ["--forms", ",".join(settings.forms)]
        if settings.serve:
            options += [f"--serve={shlex.join(settings.serve)}"]
        if settings.text:
            options += ["--text", settings.text, "--chunks", str(settings.chunks)]
            options += ["--text-recorded", layout.local_record(settings.text)]
        for kind, path in settings.tasks.files.items() if settings.tasks else ():
            options += ["--task", kind, path, layout.local_record(path)]
        for logits in self.logits(wildcards):
            digest = layout.reference_logits_digest(wildcards.model)
            options += ["--reference-logits", logits, "--logits-recorded", digest]
        return shlex.join(options)

    def measurements(self, wildcards: Wildcards) -> list[str]:
        """The measurements of a model; none without `measure`."""
        return layout.measurements(self.model(wildcards))

    # ── other people's files ──

    def others(self, wildcards: Wildcards) -> list[str]:
        """The measurements of the files that a model is compared with."""
        return layout.others(self.model(wildcards))

    def all_others(self) -> list[str]:
        """Those of all models that are built."""
        return [path for model in self.config.chosen for path in layout.others(model)]

    def other_file(self, wildcards: Wildcards) -> str:
        """The path of such a file once it is fetched; of a split one, that of its first file."""
        return layout.local_path(self._other(wildcards), wildcards.model)

    def other_inputs(self, wildcards: Wildcards) -> list[str]:
        """Records of its content."""
        return tracked_inputs(self._other(wildcards), wildcards.model)

    def other_options(self, wildcards: Wildcards) -> str:
        """Its digests and where it is from, and the files to delete afterwards, as options."""
        other = self._other(wildcards)
        options = ["--recorded", layout.recorded(other)]
        if isinstance(other, HubFile):
            options += ["--repo", other.repo, "--revision", other.revision, "--free"]
            names = gguf_files(other.file)
            options += [layout.record(other, name) for name in names]  # first: see checked_record
            options += [f"{layout.fetched(other)}/{name}" for name in names]
        return shlex.join(options)

    def _other(self, wildcards: Wildcards) -> LocalGguf | HubGguf:
        for other in self.model(wildcards).compare:
            if layout.given_name(other) == wildcards.place:
                return other
        raise ConfigError(f"config.yaml: models/{wildcards.model}/compare has no {wildcards.place}")

    def _settings(self, wildcards: Wildcards) -> MeasureSettings:
        settings = self.model(wildcards).measure
        if settings is None:
            path = f"models/{wildcards.model}/measure"
            raise ConfigError(f"config.yaml: {path}: missing, so this model is not measured")
        return settings

    def _output(self, wildcards: Wildcards) -> layout.Output:
        self.variant(wildcards)
        return layout.output(self.model(wildcards), wildcards.variant)
