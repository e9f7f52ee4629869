"""The default number of pieces of a quantization."""

from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.quantize.plan import QuantizePlan

MAX_PIECES = 999
PIECE_SECONDS = 2 * 3600
"""Intended time of a piece on all threads, unless the number of pieces is configured. Work below
one and a half times that is not split: a kill then loses all of it, but pieces would copy source
and result once more, which can take over a tenth of the time."""


SHARED_SECONDS = 600
"""Shortest time of a piece if several machines share the work: less is lost in a queue."""


def piece_count(plan: QuantizePlan, llama: LlamaCpp, machines: int = 1) -> int:
    """The best number of pieces on the threads of `llama`, on this many machines that have them.

    It is not part of the plan, which is the same on every machine.
    """
    seconds = plan.cost / llama.processors
    shared = min(machines, int(seconds / SHARED_SECONDS))
    return min(max(1, shared, round(seconds / PIECE_SECONDS)), MAX_PIECES)
