"""The default number of pieces of a quantization, and the number of one of them."""

import argparse
import re

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

    This machine may have fewer: a job that only decides on the pieces needs none of them. The
    number is not part of the plan, which is the same on every machine.
    """
    return pieces_of(plan.cost / (llama.threads or llama.processors), machines)


def pieces_of(seconds: float, machines: int = 1) -> int:
    """The best number of pieces of what takes one of these machines so many seconds."""
    shared = min(machines, int(seconds / SHARED_SECONDS))
    return min(max(1, shared, round(seconds / PIECE_SECONDS)), MAX_PIECES)


def piece_number(text: str) -> tuple[int, int]:
    """Parse I/N, a piece's number from 1 and the number of pieces, for argparse."""
    match = re.fullmatch(r"([1-9]\d{0,2})/([1-9]\d{0,2})", text)
    if match is None or int(match[1]) > int(match[2]):
        raise argparse.ArgumentTypeError(
            f"must be I/N with I from 1 to N, and N at most {MAX_PIECES}"
        )
    return int(match[1]), int(match[2])
