"""Stage `quantize`: from a BF16 GGUF to a quantized one."""

import re
import shlex
from pathlib import Path
from typing import Any

from mtpforge.errors import ConfigError
from mtpforge.gguf import quant_types
from mtpforge.io import text
from mtpforge.io.text import text_files
from mtpforge.quantize.recipe import as_text
from mtpforge.rules import layout
from mtpforge.rules.config import Config
from mtpforge.rules.imatrix import ImatrixRules
from mtpforge.rules.stage import Wildcards
from mtpforge.rules.variant import Imatrix, ImatrixText, OwnBase, Variant


def read_count(path: Path) -> int:
    """The number of pieces that quantize_plan.py wrote. Raises ConfigError."""
    count = text.read_text(path, ConfigError, most=100, within=text.ANYWHERE).strip()
    if not re.fullmatch("[1-9][0-9]{0,2}", count):
        raise ConfigError(f"{path}: not a number of pieces: delete it and run again")
    return int(count)


class QuantizeRules(ImatrixRules):
    """Inputs and parameters of rules/quantize.smk.

    The wildcard `kind` is quantized, and `name` a variant; or `kind` is a part of the checkpoint,
    trunk or draft, and `name` a quantization type. `checkpoints` are Snakemake's: the graph learns
    from them the number of pieces.
    """

    def __init__(self, config: Config, checkpoints: Any) -> None:
        super().__init__(config)
        self._checkpoints = checkpoints
        variants = [each for model in config.models.values() for each in model.variants.values()]
        self._matrices = {layout.matrix_name(each.imatrix): each.imatrix for each in variants}

    def recipe(self, wildcards: Wildcards) -> str:
        """A variant's recipe with its sha256; empty without one."""
        return as_text(self.variant(wildcards).recipe)

    def head_recipe(self, wildcards: Wildcards) -> str:
        """The exceptions to its head's type, the same way; empty without any."""
        head = self.variant(wildcards).head_types
        return as_text((head.tensors or {}) if head else {})

    def texts(self, wildcards: Wildcards) -> list[str]:
        """The texts of an importance matrix. Raises ConfigError for one that no variant uses."""
        return [str(each) for each in text_files(Path(self._computed(wildcards).text))]

    def text(self, wildcards: Wildcards) -> str:
        """The text, or the folder of all of them."""
        return self._computed(wildcards).text

    def text_record(self, wildcards: Wildcards) -> str:
        """The record of their content."""
        return layout.local_record(self.text(wildcards))

    def imatrix_text(self, wildcards: Wildcards) -> str:
        """What the model reads: a text, a folder of texts, or conversations made of them."""
        matrix = self._computed(wildcards)
        return layout.conversations(wildcards.model, matrix) if matrix.chat else matrix.text

    def imatrix_text_inputs(self, wildcards: Wildcards) -> list[str]:
        """What tells whether that has changed."""
        is_chat = self._computed(wildcards).chat
        return [self.imatrix_text(wildcards) if is_chat else self.text_record(wildcards)]

    def imatrix_text_options(self, wildcards: Wildcards) -> str:
        """What it is, as options of imatrix.py."""
        if self._computed(wildcards).chat:
            return "--special"
        return shlex.join(["--text-recorded", self.text_record(wildcards)])

    def coverages(self) -> list[str]:
        """What the importance matrices of all models that are built cover."""
        return [path for model in self.config.chosen for path in layout.coverages(model)]

    def source(self, wildcards: Wildcards) -> str:
        """The BF16 GGUF to quantize."""
        return self._source(wildcards).file

    def source_digests(self, wildcards: Wildcards) -> str:
        """The digests of its tensors."""
        return self._source(wildcards).digests

    def recipe_inputs(self, wildcards: Wildcards) -> list[str]:
        """The recipes of a variant and its head; none for a part."""
        model, variant = wildcards.model, self._variant(wildcards)
        if variant is None:
            return []
        heads = [layout.head_recipe(model, variant.name)] if variant.head_types else []
        return [_recipe_file(model, variant), *heads]

    def options(self, wildcards: Wildcards) -> str:
        """Types of file, head and tensors, as options of quantize_plan.py."""
        variant = self._variant(wildcards)
        if variant is None:
            head = ["--head", wildcards.name] if wildcards.kind == "draft" else []
            return shlex.join(["--type", wildcards.name, *head])
        options = ["--type", variant.file_type]
        if variant.head_types:
            recipe = layout.head_recipe(wildcards.model, variant.name)
            options += ["--head", variant.head_type, "--head-tensors", recipe]
        return shlex.join([*options, "--tensors", _recipe_file(wildcards.model, variant)])

    def names_option(self, wildcards: Wildcards) -> str:
        """Other names that the file can have later, as options of quantize.py."""
        model, name = self.model(wildcards), wildcards.name
        if self._variant(wildcards):
            kept = layout.unverified(model.key, name)
            return shlex.join(["--also", *layout.possible_outputs(model, name), "--keep", kept])
        if wildcards.kind == "draft":
            return shlex.join(["--also", layout.sidecar(model, name).file])
        also: list[str] = []
        for variant in model.variants.values():
            if isinstance(variant.base, OwnBase) and variant.base.type == name:
                also.append(layout.injected(model.key, variant.name).file)
                also += layout.possible_outputs(model, variant.name)
        return shlex.join(["--also", *also]) if also else ""

    def pieces(self, wildcards: Wildcards) -> list[str]:
        """The digests of the pieces that the file is made from; none if it is made in one go."""
        count = self._pieces(wildcards)
        if count == 1:
            return []
        return layout.pieces(wildcards.model, wildcards.kind, name=wildcards.name, count=count)

    def _computed(self, wildcards: Wildcards) -> ImatrixText:
        matrix = self._matrices.get(wildcards.text)
        if not isinstance(matrix, ImatrixText):
            raise ConfigError(f"config.yaml: no variant uses an importance matrix {wildcards.text}")
        return matrix

    def _pieces(self, wildcards: Wildcards) -> int:
        if wildcards.kind == "draft":
            return 1
        variant = self._variant(wildcards)
        configured = (variant and variant.pieces) or self.model(wildcards).pieces
        if configured:
            return configured
        model, kind, name = wildcards.model, wildcards.kind, wildcards.name
        made = self._checkpoints.plan_types.get(model=model, kind=kind, name=name)
        return read_count(Path(made.output.pieces))

    def _variant(self, wildcards: Wildcards) -> Variant | None:
        """The variant; None for a part. Raises ConfigError for a name that is neither."""
        if wildcards.kind == "quantized":
            return self.find(wildcards.model, wildcards.name)
        quant_types.check_file_type(wildcards.name)
        return None

    def _source(self, wildcards: Wildcards) -> layout.Intermediate:
        variant = self._variant(wildcards)
        part = variant.part if variant else wildcards.kind
        return layout.unquantized(self.model(wildcards), part)

    def _imatrix(self, wildcards: Wildcards) -> Imatrix | None:
        if hasattr(wildcards, "matrix"):
            return self._matrices.get(wildcards.matrix)
        variant = self._variant(wildcards)
        return variant.imatrix if variant else None


def _recipe_file(model: str, variant: Variant) -> str:
    """A variant's recipe, from config.yaml or found for its size."""
    if variant.searched:
        return layout.found(model, variant.name)
    return layout.recipe(model, variant.name)
