"""Stage `convert`: from a checkpoint to BF16 GGUFs."""

import re
import shlex

from mtpforge.rules import layout, lean
from mtpforge.rules.stage import Stage, Wildcards


class ConvertRules(Stage):
    """Inputs and parameters of rules/convert.smk."""

    def models(self, converter: str) -> str:
        """A regular expression for the models of a converter; matches nothing if it has none."""
        models = self.config.models.values()
        names = [re.escape(model.key) for model in models if model.converter == converter]
        return "|".join(names) or "(?!)"

    def options(self, wildcards: Wildcards) -> str:
        """Pre-tokenizer, name and the donor of the head, as options of convert.py."""
        model = self.model(wildcards)
        options = list(filter(None, [self.tokenizer_option(wildcards)]))
        if model.name:
            options += ["--name", model.name]
        if model.head_from and wildcards.part in ("all", "draft"):
            options += ["--head-from", shlex.quote(layout.head_checkpoint(model.head_from))]
            recorded = layout.recorded_head(model.head_from)
            options += ["--head-recorded", shlex.quote(recorded)]
        return " ".join(options)

    def free(self, wildcards: Wildcards) -> str:
        """The option that frees fetched shards as they are converted, if the build is lean.

        It is no parameter: the bytes are the same.
        """
        found = lean.freed(self.config, self.model(wildcards)) if self.config.is_lean else None
        if found is None or found.part != wildcards.part:
            return ""
        return " ".join(["--free", *found.others])

    def split_options(self, wildcards: Wildcards) -> str:
        """The same for a part that is written in several files."""
        size = self.model(wildcards).conversion_split(wildcards.part)
        return f"{self.options(wildcards)} --split {size}".strip()

    def tokenizer_option(self, wildcards: Wildcards) -> str:
        """The options that name a pre-tokenizer and a chat template, if they are given."""
        model = self.model(wildcards)
        options = ["--tokenizer-pre", model.tokenizer_pre] if model.tokenizer_pre else []
        options += ["--chat-template", model.chat_template] if model.chat_template else []
        return shlex.join(options)

    def norms_option(self, wildcards: Wildcards) -> str:
        """The option that says how norms in doubt are stored."""
        form = self.model(wildcards).norms
        return f"--norms {form}" if form else ""

    def unquantized_file(self, wildcards: Wildcards) -> str:
        """The model at BF16, with its head unless no variant has one."""
        return self._unquantized(wildcards).file

    def unquantized_digests(self, wildcards: Wildcards) -> str:
        """The digests of its tensors."""
        return self._unquantized(wildcards).digests

    def _unquantized(self, wildcards: Wildcards) -> layout.Intermediate:
        model = self.model(wildcards)
        return layout.unquantized(model, model.part)
