"""The trunk of one checkpoint with the head of another, its donor.

For fine-tunes that have lost their head, or whose head was not trained. Each half is planned from
its own checkpoint, so both may store their tensors differently.
"""

from pathlib import Path

from mtpforge.checkpoint.checkpoint import Checkpoint
from mtpforge.checkpoint.families.registry import family_of
from mtpforge.convert import norm_shift
from mtpforge.convert.native import describe, say_notes
from mtpforge.convert.plan import ConvertedTensor, settled_hparams
from mtpforge.convert.values import payload
from mtpforge.errors import CheckpointError
from mtpforge.gguf.reader import Gguf, TensorInfo
from mtpforge.gguf.split import SINGLE, Writing, write_any
from mtpforge.inject.match import check_match

OWN = {"all": "trunk", "draft": "shared"}
"""Part of a model -> what of it is not the head."""


def convert(
    checkpoint: Checkpoint,
    donor: Checkpoint,
    out: Path,
    part: str = "all",
    tokenizer_pre: str | None = None,
    writing: Writing = SINGLE,
) -> str:
    """Write a part of a checkpoint as a BF16 GGUF, with the donor's head in place of its own.

    Returns a note on norms that were stored as w.
    Raises CheckpointError, and GgufError if the head belongs to another model.
    """
    if part not in OWN:
        raise CheckpointError(f"part {part}: only {' and '.join(OWN)} have a trunk and a head")
    planned = plan_halves(checkpoint, donor, part)
    family = family_of(checkpoint.architecture)
    metadata = describe(
        checkpoint,
        family,
        settled_hparams(checkpoint, family),
        part=part,
        infos=[item.info for _, item in planned],
        tokenizer_pre=tokenizer_pre,
    )

    def check(written: Path) -> None:
        checkpoint.integrity.check()
        donor.integrity.check()

    tensors = [(item.info, payload(half, item)) for half, item in planned]
    write_any(out, metadata, tensors, check, writing)
    say_notes(checkpoint, family)
    return norm_shift.note(item for _, item in planned)


def plan_halves(
    checkpoint: Checkpoint, donor: Checkpoint, part: str
) -> list[tuple[Checkpoint, ConvertedTensor]]:
    """Find the source of each tensor, and the checkpoint that has it.

    Raises CheckpointError, and GgufError if the head belongs to another model.
    """
    check_match(_described(checkpoint), _described(donor))
    return [
        (half, item)
        for half, own in ((checkpoint, OWN[part]), (donor, "head"))
        for item in norm_shift.plan_by_values(half, own)
    ]


def _described(checkpoint: Checkpoint) -> Gguf:
    """The GGUF that a checkpoint with a head would become, without tokenizer and bytes."""
    family = family_of(checkpoint.architecture)
    hparams = settled_hparams(checkpoint, family)
    infos = [TensorInfo(row.name, row.shape, row.type) for row in family.rows(hparams, "all")]
    metadata = describe(
        checkpoint, family, hparams=hparams, part="head", infos=infos, tokenizer_pre=None
    )
    return Gguf(
        checkpoint.directory, metadata, tensors={info.name: info for info in infos}, ranges={}
    )
