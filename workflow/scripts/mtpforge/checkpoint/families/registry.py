"""The families of architectures that mtpforge converts itself, one module each; adding one touches its module and this list."""

from mtpforge.checkpoint.families import qwen3_5, qwen3_next
from mtpforge.checkpoint.families.table import Family
from mtpforge.errors import CheckpointError

FAMILIES: tuple[Family, ...] = (qwen3_5.DENSE, qwen3_5.MOE, qwen3_next.MOE)


def family_of(architecture: str) -> Family:
    """The family that serves a `config.json` architecture. Raises CheckpointError with the list of known ones."""
    for family in FAMILIES:
        if architecture in family.huggingface_architectures:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.huggingface_architectures)
    raise CheckpointError(f"unknown architecture {architecture}: mtpforge knows {known}")
