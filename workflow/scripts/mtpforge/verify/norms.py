"""The check that 1 was added to each norm exactly once.

A comparison with the source cannot find a norm that conversion took for w or w - 1 by mistake, and
an injected head may have no source. So the values are judged on their own too.
"""

from mtpforge.gguf import norm_form
from mtpforge.gguf.reader import Gguf
from mtpforge.verify.report import Check
from mtpforge.verify.tensors import Comparisons


def check_norms(opened: Gguf, compared: Comparisons, note: str = "") -> list[Check]:
    """Norms are not shifted against their source, nor by their values; no check without both.

    `note` is on the norms of the source.
    """
    judged = norm_form.shifts(opened)
    against_source = [each.name for each in compared.compared if each.name.endswith("norm.weight")]
    if not judged and not against_source:
        return []
    wrong = {name: shift for name, shift in judged.items() if shift} | compared.shifts
    count = len(judged.keys() | set(against_source))
    detail = norm_form.describe(wrong) or f"{count} norms, none with a wrong shift"
    detail += note and f"; {note}"
    return [Check("norms", not wrong, detail)]
