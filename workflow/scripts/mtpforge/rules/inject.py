"""Stage `inject`: a head for a GGUF that lacks one, or has another."""

import shlex

from mtpforge.errors import ConfigError
from mtpforge.rules import layout
from mtpforge.rules.fetch import tracked_inputs
from mtpforge.rules.stage import Stage, Wildcards
from mtpforge.rules.variant import OwnBase


class InjectRules(Stage):
    """Inputs and parameters of rules/inject.smk."""

    def base(self, wildcards: Wildcards) -> str:
        """The GGUF to inject into; if split, its first file."""
        base = self._base(wildcards)
        if isinstance(base, OwnBase):
            return layout.quantized(wildcards.model, "trunk", base.type).file
        return layout.local_path(base, wildcards.model)

    def base_files(self, wildcards: Wildcards) -> list[str]:
        """The base, if it is made here."""
        return [self.base(wildcards)] if isinstance(self._base(wildcards), OwnBase) else []

    def base_inputs(self, wildcards: Wildcards) -> list[str]:
        """Records of its content."""
        base = self._base(wildcards)
        if isinstance(base, OwnBase):
            return [layout.quantized(wildcards.model, "trunk", base.type).digests]
        return tracked_inputs(base, wildcards.model)

    def recorded_options(self, wildcards: Wildcards) -> str:
        """The options that name the digests of base and head."""
        base, model = self._base(wildcards), wildcards.model
        if isinstance(base, OwnBase):
            recorded = layout.quantized(model, "trunk", base.type).digests
        else:
            recorded = layout.recorded(base)
        head = self.head_digests(wildcards)
        return shlex.join(["--base-recorded", recorded, "--head-recorded", head])

    def head_file(self, wildcards: Wildcards) -> str:
        """The BF16 GGUF with the head."""
        return self._head(wildcards).file

    def head_digests(self, wildcards: Wildcards) -> str:
        """The digests of its tensors."""
        return self._head(wildcards).digests

    def head_type(self, wildcards: Wildcards) -> str:
        """The type of the head."""
        return self.variant(wildcards).head_type

    def options(self, wildcards: Wildcards) -> str:
        """Permission to replace another head, as an option of inject.py."""
        return "--replace-head" if self.variant(wildcards).replace_head else ""

    def _base(self, wildcards: Wildcards) -> OwnBase | layout.GivenFile:
        base = self.variant(wildcards).base
        if base is None:
            raise ConfigError(f"{wildcards.model}: {wildcards.variant} has no base")
        return base

    def _head(self, wildcards: Wildcards) -> layout.Intermediate:
        """The head alone, or the whole model: llama.cpp's converter cannot write a head alone."""
        if donor := self.model(wildcards).donor(self.variant(wildcards)):
            return layout.donated(wildcards.model, donor)
        part = "head" if self.model(wildcards).native else "all"
        return layout.converted(wildcards.model, part)
