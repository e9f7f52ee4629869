"""Stage `search`: the recipe of a variant with a size, from errors and sensitivities of tensors."""

import shlex
from pathlib import Path

from mtpforge.errors import ConfigError
from mtpforge.rules import layout
from mtpforge.rules.config import Config, Model
from mtpforge.rules.imatrix import ImatrixRules
from mtpforge.rules.stage import Wildcards
from mtpforge.rules.variant import Imatrix, Variant
from mtpforge.search.settings import CHUNKS, PROBE


class SearchRules(ImatrixRules):
    """Inputs and parameters of rules/search.smk.

    The wildcard `matrix` stands for an importance matrix or none, `text` for a text.
    """

    chunks = CHUNKS

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        variants = [each for model in config.models.values() for each in _searched(model)]
        self._matrices = {layout.matrix_name(each.imatrix): each.imatrix for each in variants}
        texts = {each.searched_text for each in variants if each.searched_text}
        self._texts = {layout.imatrix_name(text): text for text in sorted(texts)}

    def text(self, wildcards: Wildcards) -> str:
        """The text to run a model on. Raises ConfigError for one that no variant uses."""
        if wildcards.text not in self._texts:
            raise ConfigError(f"config.yaml: no variant has a search with a text {wildcards.text}")
        return self._texts[wildcards.text]

    def text_record(self, wildcards: Wildcards) -> str:
        """The record of its content."""
        return layout.local_record(self.text(wildcards))

    def logits(self, wildcards: Wildcards) -> str:
        """The BF16 logits on it."""
        return layout.search_logits(wildcards.model, self.text(wildcards))

    def logits_digest(self, wildcards: Wildcards) -> str:
        """Their digest."""
        return self.logits(wildcards).removesuffix(".bin") + ".json"

    def source(self, wildcards: Wildcards) -> str:
        """The BF16 GGUF that a variant is made from."""
        return self._source(wildcards).file

    def source_digests(self, wildcards: Wildcards) -> str:
        """The digests of its tensors."""
        return self._source(wildcards).digests

    def errors(self, wildcards: Wildcards) -> list[str]:
        """The errors of all candidates of a variant."""
        return self._errors(wildcards, *self.variant(wildcards).searched_types)

    def measured(self, wildcards: Wildcards) -> list[str]:
        """Sensitivities, and the errors of the type that they were measured with; none by prior."""
        variant = self.variant(wildcards)
        text = variant.searched_text
        if text is None:
            return []
        matrix = layout.matrix_name(variant.imatrix)
        found = layout.sensitivities(wildcards.model, matrix, text, variant.method)
        return [found, *self._errors(wildcards, PROBE)]

    def shares(self, wildcards: Wildcards, count: int) -> list[str]:
        """The results of the jobs that share the runs; none if one job does all."""
        model, matrix, method = wildcards.model, wildcards.matrix, wildcards.method
        text = self.text(wildcards)
        return layout.sensitivity_shares(model, matrix, text, method, count=count)

    def head_recipe(self, wildcards: Wildcards) -> list[str]:
        """The types of the head by pattern; none without a head."""
        has_head = self.variant(wildcards).head_types
        return [layout.head_recipe(wildcards.model, wildcards.variant)] if has_head else []

    def options(self, wildcards: Wildcards) -> str:
        """Size, types and files, as options of allocate.py."""
        variant = self.variant(wildcards)
        options = ["--type", variant.file_type]
        options += ["--size", variant.size] if variant.size else ["--bits", str(variant.bits)]
        names = ("--sensitivities", "--probe-errors")
        for name, path in zip(names, self.measured(wildcards), strict=False):
            options += [name, path]
        return f"{shlex.join(options)} {self.head_option(wildcards)}".strip()

    def file_name(self, wildcards: Wildcards) -> str:
        """The name of a variant's file, or of the folder of a split one."""
        return Path(layout.output(self.model(wildcards), wildcards.variant).file).name

    def measurement(self, wildcards: Wildcards) -> list[str]:
        """The measurement of a variant; none without a text to measure KL divergence on."""
        model = self.model(wildcards)
        measured = model.measure and model.measure.text
        return [layout.output(model, wildcards.variant).measurement] if measured else []

    def reference(self, wildcards: Wildcards) -> list[str]:
        """The BF16 logits that it was measured with."""
        measured = self.measurement(wildcards)
        return [layout.reference_logits(wildcards.model)] if measured else []

    def reference_digest(self, wildcards: Wildcards) -> list[str]:
        """Their digest."""
        measured = self.measurement(wildcards)
        return [layout.reference_logits_digest(wildcards.model)] if measured else []

    def stock(self, wildcards: Wildcards) -> list[str]:
        """The measurement of the mixture to compare with, if that is a variant too."""
        model = self.model(wildcards)
        stock = stock_of(model, self.variant(wildcards))
        if stock is None or not self.measurement(wildcards):
            return []
        return [layout.output(model, stock.name).measurement]

    def measured_options(self, wildcards: Wildcards) -> str:
        """The measurement and the logits, as options of compare_stock.py."""
        files = {
            "--measurement": self.measurement(wildcards),
            "--reference-logits": self.reference(wildcards),
            "--logits-recorded": self.reference_digest(wildcards),
            "--stock": self.stock(wildcards),
        }
        return shlex.join(word for name, paths in files.items() for word in (name, *paths) if paths)

    def head_option(self, wildcards: Wildcards) -> str:
        """The types of the head, as options."""
        head = self.head_recipe(wildcards)
        kind = self.variant(wildcards).head_type
        return shlex.join(["--head", kind, "--head-tensors", *head] if head else [])

    def compared(self, wildcards: Wildcards) -> list[str]:
        """The comparisons of a model's variants with llama.cpp's mixtures."""
        return self.compared_of(self.model(wildcards))

    def all_compared(self) -> list[str]:
        """Those of all models that are built."""
        return [path for model in self.config.chosen for path in self.compared_of(model)]

    def compared_of(self, model: Model) -> list[str]:
        """The comparisons of a model's files whose types were found."""
        return [layout.compared(model.key, each.name) for each in _searched(model)]

    def _errors(self, wildcards: Wildcards, *kinds: str) -> list[str]:
        matrix = layout.matrix_name(self.variant(wildcards).imatrix)
        return [layout.errors(wildcards.model, matrix, kind) for kind in kinds]

    def _source(self, wildcards: Wildcards) -> layout.Intermediate:
        return layout.unquantized(self.model(wildcards), self.variant(wildcards).part)

    def _imatrix(self, wildcards: Wildcards) -> Imatrix | None:
        if hasattr(wildcards, "matrix"):
            if wildcards.matrix not in self._matrices:
                raise ConfigError(
                    f"config.yaml: no variant has a search with a matrix {wildcards.matrix}"
                )
            return self._matrices[wildcards.matrix]
        return self.variant(wildcards).imatrix


def stock_of(model: Model, variant: Variant) -> Variant | None:
    """The variant that is llama.cpp's mixture of the type that the `size` of another names."""

    def decisive(each: Variant) -> tuple[object, ...]:
        return each.head_types, each.imatrix

    for other in model.variants.values():
        is_stock = not (other.searched or other.base or other.recipe)
        if is_stock and other.file_type == variant.size and decisive(other) == decisive(variant):
            return other
    return None


def _searched(model: Model) -> list[Variant]:
    return [each for each in model.variants.values() if each.searched]
