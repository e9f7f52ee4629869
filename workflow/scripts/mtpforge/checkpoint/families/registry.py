"""The families that mtpforge converts itself. To add one, write its module and list it here."""

from mtpforge.checkpoint.families import qwen3_5, qwen3_next, qwen4_exp
from mtpforge.checkpoint.families.family import Family
from mtpforge.errors import CheckpointError

FAMILIES: tuple[Family, ...] = (qwen3_5.DENSE, qwen3_5.MOE, qwen3_next.MOE, qwen4_exp.MOE)


def family_of(architecture: str) -> Family:
    """Return the family of an architecture. Raises CheckpointError if it is unknown."""
    for family in FAMILIES:
        if architecture in family.huggingface_architectures:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.huggingface_architectures)
    raise CheckpointError(
        f"unknown architecture {architecture}: mtpforge converts models with an MTP head: {known}"
    )
