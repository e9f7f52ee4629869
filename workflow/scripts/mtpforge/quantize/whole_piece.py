"""Finds a piece that is the whole file already, which need not be copied then."""

from dataclasses import dataclass
from pathlib import Path

from mtpforge.gguf import reader, writer
from mtpforge.quantize.assembly import whole_metadata
from mtpforge.quantize.job import QuantizeJob
from mtpforge.quantize.reuse import Reusable


@dataclass(frozen=True)
class WholePiece:
    """A file with the bytes of the whole, and its digests as `reader.digests` returns them."""

    path: Path
    digests: dict[str, str]


def find_whole(job: QuantizeJob, reusable: Reusable, scratch: Path) -> WholePiece | None:
    """The piece that has all tensors of the plan, intact, and the header of the whole file.

    It has a name in `scratch`, so it stays. None if there is none (`lean: shards` makes them).
    """
    pieces = {each.data.path for each in reusable.values() if each.in_piece}
    path = pieces.pop() if len(pieces) == 1 else None
    if path is None or reusable.keys() != job.plan.tensors.keys() or path.parent != scratch:
        return None
    opened = reader.read(path)
    infos = [job.target_info(name) for name in job.plan.tensors]
    start = reader.header_range(opened).size
    with path.open("rb") as file:
        if file.read(start) != writer.header(whole_metadata(job, scratch), infos):
            return None
    found = reader.digests_of(opened, job.llama.processors)
    right = all(found[name] == each.digest for name, each in reusable.items())
    return WholePiece(path, found) if right else None
