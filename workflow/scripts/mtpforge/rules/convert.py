"""Stage `convert`: from a checkpoint to BF16 GGUFs."""

import json
import re
import shlex
from typing import Any

from mtpforge.rules import layout, lean
from mtpforge.rules.code import code
from mtpforge.rules.config import Model
from mtpforge.rules.fetch import tracked_inputs
from mtpforge.rules.stage import Stage, Wildcards
from mtpforge.rules.variant import Variant


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
        """The options that free fetched shards as they are converted, if the build is lean.

        They are no parameter: the bytes are the same.
        """
        model = self.model(wildcards)
        found = lean.freed(self.config, model) if self.config.is_lean else None
        if found is None or found.part != wildcards.part:
            return ""
        options = ["--free", *found.others]
        if lean.by_shards(self.config, model):
            wanted = [_wanted(model, each) for each in model.variants.values()]
            options += ["--reuse", "results", "--quantize", *map(json.dumps, wanted)]
        return shlex.join(options)

    def program(self, wildcards: Wildcards) -> str:
        """The program: the one that also quantizes runs the other, and is not tracked either."""
        also = "--quantize" in self.free(wildcards)
        return code("convert_and_quantize.py" if also else "convert.py")[0]

    def matrices(self, wildcards: Wildcards) -> list[str]:
        """Records of the importance matrices that a build shard by shard quantizes with."""
        given = [each.imatrix for each in self.model(wildcards).variants.values()]
        return [path for each in given if each for path in tracked_inputs(each, wildcards.model)]

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


def _wanted(model: Model, variant: Variant) -> dict[str, Any]:
    """A variant as convert_and_quantize.py takes it."""
    types, matrix = variant.head_types, variant.imatrix
    return {
        "folder": layout.pieces_folder(model.key, "quantized", variant.name),
        "type": variant.file_type,
        "head": types.type if types else "",
        "head_tensors": (types.tensors or {}) if types else {},
        "tensors": variant.recipe,
        "imatrix": layout.local_path(matrix, model.key) if matrix else "",
    }
