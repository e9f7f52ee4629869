"""Stage `verify`: the checks of a file, and only then its final name."""

import shlex
from collections.abc import Iterable
from pathlib import Path

from mtpforge.gguf import quant_types
from mtpforge.prompts import prompt_files
from mtpforge.rules import layout
from mtpforge.rules.config import Model
from mtpforge.rules.fetch import recorded, recorded_donor
from mtpforge.rules.stage import Stage, Wildcards
from mtpforge.rules.variant import HubRepository, Source, Variant


class VerifyRules(Stage):
    """Inputs and parameters of rules/verify.smk."""

    def candidate(self, wildcards: Wildcards) -> str:
        """The file of a variant before it is verified."""
        self.check_base(wildcards, self.variant(wildcards))
        return layout.candidate(self.model(wildcards), wildcards.variant).file

    def digests(self, wildcards: Wildcards) -> str:
        """The digests of its tensors, as recorded by the program that wrote it."""
        self.variant(wildcards)
        return layout.candidate(self.model(wildcards), wildcards.variant).digests

    def reference(self, wildcards: Wildcards) -> list[str]:
        """The BF16 file to compare with, and its digests, if llama.cpp's converter made it."""
        model, variant = self.model(wildcards), self.variant(wildcards)
        if model.native:
            return []
        made = layout.converted(wildcards.model, variant.part)
        if donor := model.donor(variant):
            made = layout.donated(wildcards.model, donor)
        return [made.file, made.digests]

    def reference_file(self, wildcards: Wildcards) -> list[str]:
        """The BF16 file alone."""
        return self.reference(wildcards)[:1]

    def reference_digests(self, wildcards: Wildcards) -> list[str]:
        """Its digests alone."""
        return self.reference(wildcards)[1:]

    def unquantized(self, wildcards: Wildcards) -> list[str]:
        """The acceptance of the BF16 file, to compare with.

        Nothing for a base from elsewhere: no BF16 file is made just for this. Nor is one made with
        the head of a variant's own donor.
        """
        variant = self.variant(wildcards)
        own = variant.head_types and not (variant.foreign or variant.head_from)
        if variant.unquantized or not own:
            return []
        return self._unquantized(wildcards)

    def source_option(self, wildcards: Wildcards) -> str:
        """The source of inventory, metadata and values, as an option of verify.py."""
        model, variant = self.model(wildcards), self.variant(wildcards)
        donor = model.donor(variant)
        if donor and model.adopts(variant):
            form = ["--norms", model.norms] if model.norms else []
            made = self.reference(wildcards)
            head, recorded = made or (
                layout.donor_checkpoint(model, donor),
                recorded_donor(model, donor),
            )
            return shlex.join(["--head-from", head, "--head-recorded", recorded, *form])
        return self._against(wildcards, self.reference(wildcards), donor)

    def options(self, wildcards: Wildcards) -> str:
        """The types and gates that the file must meet; a base from elsewhere keeps its types."""
        model, variant = self.model(wildcards), self.variant(wildcards)
        gates = self._gates(wildcards, self.unquantized(wildcards))
        options = ["--head", variant.head_type, *gates]
        fetched = model.donor(variant) or (model.source if model.head_only else None)
        if isinstance(fetched, HubRepository) and model.native:
            options += ["--head-record", layout.head_record(fetched)]
        if not variant.foreign:
            options += ["--type", variant.file_type]
        if model.tokenizer_pre:
            options += ["--tokenizer-pre", model.tokenizer_pre]
        if model.chat_template and not variant.foreign:
            options += ["--chat-template", model.chat_template]
        digests = self.digests(wildcards)
        return shlex.join([*options, "--trunk" if variant.base else "--digests", digests])

    def split_options(self, wildcards: Wildcards) -> str:
        """The same for a variant that is published in several files."""
        size = self.variant(wildcards).split or self.model(wildcards).split
        return f"{self.options(wildcards)} --split {size}"

    def prompts(self, wildcards: Wildcards) -> str:
        """The folder of prompts to draft on."""
        return self.model(wildcards).prompts

    def prompt_files(self, wildcards: Wildcards) -> list[str]:
        """Their files."""
        return [str(path) for path in prompt_files(Path(self.prompts(wildcards)))]

    # ── acceptance of the BF16 file ──

    def measured(self, wildcards: Wildcards) -> list[str]:
        """The BF16 file with the head; a drafter is followed by the model that it drafts for."""
        return [made.file for made in self._measured(wildcards)]

    def measured_digests(self, wildcards: Wildcards) -> list[str]:
        """The digests of their tensors."""
        return [made.digests for made in self._measured(wildcards)]

    def target_option(self, wildcards: Wildcards) -> str:
        """The options that name the model that a drafter drafts for, and its digests."""
        targets = self._measured(wildcards)[1:]
        return _target_options((made.file, made.digests) for made in targets)

    # ── sidecar and vision tower ──

    def sidecar(self, wildcards: Wildcards) -> str:
        """The draft model before it is verified."""
        self.check_base(wildcards)
        return layout.draft(wildcards.model, wildcards.type).file

    def sidecar_digests(self, wildcards: Wildcards) -> str:
        """The digests of its tensors."""
        return layout.draft(wildcards.model, wildcards.type).digests

    def sidecar_target(self, wildcards: Wildcards) -> str:
        """The model that it drafts for."""
        return self._sidecar_target(wildcards).file

    def sidecar_target_digests(self, wildcards: Wildcards) -> str:
        """The digests of its tensors."""
        return self._sidecar_target(wildcards).digests

    def quant(self, wildcards: Wildcards) -> list[str]:
        """A quant to run it, or a vision tower, with on a machine that BF16 is too large for.

        It is the same on all machines, so none has to verify again.
        """
        model = self.model(wildcards)
        variant = smallest_quant(model)
        return [layout.output(model, variant.name).file] if variant else []

    def quant_digests(self, wildcards: Wildcards) -> list[str]:
        """The digests of its tensors."""
        model = self.model(wildcards)
        variant = smallest_quant(model)
        return [layout.candidate(model, variant.name).digests] if variant else []

    def quant_option(self, wildcards: Wildcards) -> str:
        """The options that name it and its digests, after the BF16 file."""
        files, digests = self.quant(wildcards), self.quant_digests(wildcards)
        return _target_options(zip(files, digests, strict=True))

    def sidecar_reference(self, wildcards: Wildcards) -> list[str]:
        """The BF16 draft model to compare with, if llama.cpp's converter made it."""
        if self.model(wildcards).native:
            return []
        made = layout.converted(wildcards.model, "draft")
        return [made.file, made.digests]

    def sidecar_reference_file(self, wildcards: Wildcards) -> list[str]:
        """The BF16 draft model alone."""
        return self.sidecar_reference(wildcards)[:1]

    def sidecar_reference_digests(self, wildcards: Wildcards) -> list[str]:
        """Its digests alone."""
        return self.sidecar_reference(wildcards)[1:]

    def sidecar_unquantized(self, wildcards: Wildcards) -> list[str]:
        """The acceptance of the BF16 file, unless the sidecar is not quantized."""
        packed = wildcards.type in quant_types.PACKED
        return [] if packed else self._unquantized(wildcards)

    def sidecar_source_option(self, wildcards: Wildcards) -> str:
        """The source of inventory, metadata and values, as an option of verify.py."""
        reference = self.sidecar_reference(wildcards)
        return self._against(wildcards, reference, self.model(wildcards).head_from)

    def sidecar_options(self, wildcards: Wildcards) -> str:
        """The types that it must have, and the acceptance that it must reach."""
        packed = wildcards.type in quant_types.PACKED  # with the types of the checkpoint
        types = ["--type", wildcards.type, *([] if packed else ["--head", wildcards.type])]
        return shlex.join([*types, *self._gates(wildcards, self.sidecar_unquantized(wildcards))])

    def mmproj(self, wildcards: Wildcards) -> str:
        """The vision tower before it is verified."""
        self.check_base(wildcards)
        return layout.converted(wildcards.model, "mmproj").file

    def _unquantized(self, wildcards: Wildcards) -> list[str]:
        """The acceptance of the BF16 file, unless the comparison is turned off."""
        compared = self.model(wildcards).max_acceptance_drop < 1
        return [layout.acceptance(wildcards.model)] if compared else []

    def _sidecar_target(self, wildcards: Wildcards) -> layout.Intermediate:
        """The head of a model with a drafter or a packed sidecar can be in no other file."""
        model = self.model(wildcards)
        packed = wildcards.type in quant_types.PACKED
        part = "trunk" if model.drafter else model.part if packed else "all"
        return layout.unquantized(model, part)

    def _measured(self, wildcards: Wildcards) -> list[layout.Intermediate]:
        model = self.model(wildcards)
        parts = ["draft", "trunk"] if model.drafter else ["all"]
        return [layout.unquantized(model, part) for part in parts]

    def _against(self, wildcards: Wildcards, reference: list[str], donor: Source | None) -> str:
        if reference:
            file, digests = reference
            return shlex.join(["--reference", file, "--recorded", digests])
        model = self.model(wildcards)
        options = ["--checkpoint", layout.checkpoint(model), "--recorded", recorded(model)]
        options += ["--name", model.name] if model.name else []
        if donor:
            options += ["--head-from", layout.head_checkpoint(donor)]
            options += ["--head-recorded", layout.recorded_head(donor)]
        options += ["--norms", model.norms] if model.norms else []
        return shlex.join(options)

    def _gates(self, wildcards: Wildcards, unquantized: list[str]) -> list[str]:
        model = self.model(wildcards)
        gates = ["--min-acceptance", str(model.min_acceptance)]
        for measured in unquantized:
            drop = str(model.max_acceptance_drop)
            gates += ["--unquantized", measured, "--max-acceptance-drop", drop]
        return gates


def smallest_quant(model: Model) -> Variant | None:
    """The variant with the fewest bits of those quantized here; None without one.

    A split one is left out, and so are all if files are deleted once they are uploaded.
    """
    kept = (*quant_types.UNQUANTIZED, *quant_types.PACKED)
    quants = [
        each
        for each in model.variants.values()
        if not (each.foreign or each.head_from or each.file_type in kept)
        and not (each.split or model.split)
    ]
    return None if model.passing else min(quants, key=_bits, default=None)


def _bits(variant: Variant) -> tuple[float, str]:
    """Bits per weight, and the name, which decides between the same."""
    usual = quant_types.bits(quant_types.main_type(variant.file_type))
    return variant.bits or usual, variant.name


def _target_options(targets: Iterable[tuple[str, str]]) -> str:
    """Models to run a file with, and their digests, as options."""
    return shlex.join(
        word
        for file, digests in targets
        for word in ("--target", file, "--target-recorded", digests)
    )
