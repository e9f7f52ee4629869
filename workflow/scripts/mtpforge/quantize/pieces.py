"""Quantize a planned file in one go, or in pieces: separate jobs that each make some tensors.

Finished files survive a kill, and later jobs reuse their tensors. The result has the same bytes as
one plain run of llama-quantize.
"""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from mtpforge.gguf import reader
from mtpforge.gguf.reader import Gguf
from mtpforge.io import atomic
from mtpforge.quantize.assembly import assemble
from mtpforge.quantize.job import QuantizeJob
from mtpforge.quantize.manifest import Manifest
from mtpforge.quantize.plan import QuantizePlan
from mtpforge.quantize.reuse import find_reusable, report, reusable_for_piece, worth_reusing
from mtpforge.quantize.whole_piece import find_whole


def quantize_whole(job: QuantizeJob, out: Path, reuse: Path | None = None) -> dict[str, str]:
    """Write the whole file, with tensors from finished files under `reuse`.

    Returns its digests, as `reader.digests` does. Raises ToolchainError if llama-quantize fails.
    """
    with atomic.scratch_folder(out) as scratch:
        reusable = find_reusable(job, reuse, scratch) if reuse else {}
        finished = find_whole(job, reusable, scratch)
        with atomic.replacing(out, needed=None if finished else job.size) as temporary:
            if finished:
                atomic.link(finished.path, temporary)
                report(reusable, job.plan.tensors)
                return finished.digests
            if reusable and worth_reusing(job, reusable):
                return assemble(job, reusable, out=temporary, scratch=scratch)
            written = job.quantize_tensors(job.source.tensors, temporary, scratch)
            report({}, job.plan.tensors)
            return reader.digests_of(written, job.llama.processors)


def quantize_piece(
    job: QuantizeJob, folder: Path, number: int, count: int, reuse: Path | None = None
) -> dict[str, str]:
    """Write to `folder` those tensors of piece `number` (from 1) that no file under `reuse` has.

    Each run of llama-quantize makes a GGUF with a manifest, so a kill loses at most one run. Pieces
    can share a folder; if `reuse` contains it, later jobs find the files, however they are split.
    Returns the sha256 of every tensor of the piece. Raises ToolchainError if llama-quantize fails.
    """
    names = split_into_pieces(job.plan, job.source, count)[number - 1]
    with atomic.scratch_folder(folder / f"{number}-of-{count}") as scratch:
        found = find_reusable(job, reuse, scratch) if reuse else {}
        reused = reusable_for_piece(job, found, names=names, folder=folder)
        digests = {name: each.digest for name, each in reused.items()}
        for batch in job.batches([name for name in names if name not in reused]):
            digests |= _quantize_batch(job, batch, folder=folder, scratch=scratch)
        report(reused, names)
        return {name: digests[name] for name in names}


def split_into_pieces(plan: QuantizePlan, source: Gguf, count: int) -> list[list[str]]:
    """The tensors of each of `count` pieces: neighbours in the source, and about equal in cost."""
    return split_by_cost({name: plan.tensors[name].cost for name in source.tensors}, count)


def split_by_cost(costs: Mapping[str, float], count: int) -> list[list[str]]:
    """Neighbours in `count` pieces of about the same cost."""
    pieces: list[list[str]] = [[] for _ in range(count)]
    total = sum(costs.values())
    done = 0.0
    for name, cost in costs.items():
        middle = done + cost / 2
        pieces[min(int(count * middle / total), count - 1)].append(name)
        done += cost
    return pieces


def _quantize_batch(
    job: QuantizeJob, batch: list[str], folder: Path, scratch: Path
) -> dict[str, str]:
    """Quantize tensors into a file in `folder` and write its manifest; the tensors' digests."""
    out = folder / f"{batch_name(job.plan, batch)}.gguf"
    with atomic.replacing(out) as temporary:
        made = job.quantize_tensors(batch, temporary, scratch)
        digests = reader.digests_of(made, job.llama.processors)
    del digests["header"]
    Manifest.of(job.plan, digests, [out]).write(out.with_suffix(".json"))
    return digests


def batch_name(plan: QuantizePlan, names: Iterable[str]) -> str:
    """A file name that only a file with exactly these tensors has."""
    keys = plan.keys()
    text = "".join(f"{name} {keys[name]}\n" for name in names)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
