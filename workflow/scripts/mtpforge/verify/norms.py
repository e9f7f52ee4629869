"""The check that 1 was added to each norm exactly once.

A comparison with the source cannot find a norm that conversion took for w or w - 1 by mistake, and
an injected head may have no source. So the values are judged on their own too.
"""

import numpy as np

from mtpforge.gguf import norms
from mtpforge.gguf.reader import Gguf
from mtpforge.verify.report import Check
from mtpforge.verify.tensors import Comparisons, describe_shifts, stored_rows

SLACK = 0.8
"""How far the mean of a norm may be from the usual one; wide, because only clear faults count."""
_UNQUANTIZED = ("F32", "F16", "BF16")


def check_norms(opened: Gguf, compared: Comparisons, note: str = "") -> list[Check]:
    """Norms are not shifted against their source, nor by their values; no check without both.

    `note` is on the norms of the source.
    """
    judged = _judged(opened)
    against_source = [each.name for each in compared.compared if each.name.endswith("norm.weight")]
    if not judged and not against_source:
        return []
    wrong = {name: shift for name, shift in judged.items() if shift} | compared.shifts
    count = len(judged.keys() | set(against_source))
    detail = "; ".join(describe_shifts(wrong)) or f"{count} norms, none with a wrong shift"
    detail += note and f"; {note}"
    return [Check("norms", not wrong, detail)]


def _judged(opened: Gguf) -> dict[str, int]:
    """The shift of each norm: 1 or -1 if its values show that it is not w, else 0."""
    if opened.architecture not in norms.ARCHITECTURES:
        return {}
    return {
        name: _shift(name, stored_rows(opened, name, np.arange(info.elements // info.shape[-1])))
        for name, info in opened.tensors.items()
        if norms.is_shifted(name) and info.type.name in _UNQUANTIZED
    }


def _shift(name: str, values: np.ndarray) -> int:
    if not np.isfinite(values).all():  # another check's fault
        return 0
    norm = norms.measure(name, values, SLACK)
    likely = norm.by_bits & norm.by_level
    return 0 if 1 in likely or not likely else min(likely) - 1
