"""Assemble a quantized file from reused tensors and newly quantized ones.

Reused tensors are copied while llama-quantize works on the others, and the copies are hashed. Those
that turn out damaged or gone are requantized after that.
"""

from collections.abc import Collection, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from threading import Event, Lock

from mtpforge.gguf import reader, writer
from mtpforge.gguf.metadata import Value
from mtpforge.gguf.reader import PADDING, Gguf
from mtpforge.io.ranges import CHUNK, FileRange, forget, sha256
from mtpforge.quantize.job import QuantizeJob
from mtpforge.quantize.llama_quantize import without_vocabulary
from mtpforge.quantize.reuse import Reusable, ReusableTensor, report, warn_damaged

Copies = dict[str, Future[str]]
"""For each tensor that is being copied, the sha256 of the copy; empty if it cannot be read."""


def assemble(job: QuantizeJob, reusable: Reusable, out: Path, scratch: Path) -> dict[str, str]:
    """Write the whole file in place; its digests, as `reader.digests` returns them.

    Raises ToolchainError if llama-quantize fails, OSError if the disk is full.
    """
    infos = [job.target_info(name) for name in job.plan.tensors]
    whole = writer.lay_out(out, whole_metadata(job, scratch), infos)
    with _copying(job, reusable, whole) as copies:
        digests = _quantize_into(
            whole, job, names=job.plan.tensors.keys() - reusable, scratch=scratch, copies=copies
        )
        intact = {
            name: reusable[name]
            for name, copy in copies.items()
            if copy.result() == reusable[name].digest
        }
    damaged = {name: each for name, each in reusable.items() if name not in intact}
    if damaged:
        warn_damaged(damaged)
        digests |= _quantize_into(whole, job, names=damaged, scratch=scratch, copies={})
    report(intact, job.plan.tensors)
    digests |= {name: each.digest for name, each in intact.items()}
    header = sha256(reader.header_range(whole))
    return {"header": header, **{name: digests[name] for name in job.plan.tensors}}


def whole_metadata(job: QuantizeJob, scratch: Path) -> dict[str, Value]:
    """The metadata of the whole file.

    Quantizing the smallest tensor shows which keys llama-quantize drops, and which it puts last.
    """
    source = job.source
    smallest = min(source.tensors, key=lambda name: source.tensors[name].size)
    made = job.quantize_tensors([smallest], scratch / "smallest.gguf", scratch)
    return merged_metadata(source, made)


def merged_metadata(source: Gguf, part: Gguf) -> dict[str, Value]:
    """The metadata of the whole file, from that of a part of `source` that was quantized."""
    made = part.metadata
    keys = list(made)
    added = keys[keys.index(PADDING) + 1 :] if PADDING in made else keys
    left_out = source.metadata.keys() - without_vocabulary(source)
    kept = [key for key in source.metadata if key in made or key in left_out]
    from_source = {key: source.metadata[key] for key in kept if key not in added}
    return from_source | {key: made[key] for key in added}


def _quantize_into(
    whole: Gguf, job: QuantizeJob, names: Collection[str], scratch: Path, copies: Copies
) -> dict[str, str]:
    """Quantize tensors and write them to their places in `whole`; their digests.

    An error in one of the `copies` is raised after the current run.
    """
    digests: dict[str, str] = {}
    for batch in job.batches(names):
        made = job.quantize_tensors(batch, scratch / "rest.gguf", scratch)
        for name in batch:
            writer.put(whole, name, [made.ranges[name]])
        made.path.unlink()
        written = {name: whole.ranges[name] for name in batch}
        digests |= reader.hashes(written, job.llama.processors)
        for finished in filter(Future.done, copies.values()):
            finished.result()
    return digests


@contextmanager
def _copying(job: QuantizeJob, reusable: Reusable, whole: Gguf) -> Iterator[Copies]:
    """Copy tensors to their places in `whole` while the block runs; leaving it stops the copies."""
    stopped = Event()
    writing = Lock()

    def copy(name: str) -> str:
        try:
            # A file system writes to a file for one thread at a time, and the others would spin.
            with writing:
                writer.put(whole, name, _steps(reusable[name], stopped))
        except OSError as error:
            if error.filename != str(reusable[name].data.path):  # it was not read, but written
                raise
            return ""
        return sha256(whole.ranges[name])

    threads = job.llama.processors
    pool = ThreadPoolExecutor(threads + 1 if threads > 1 else 1)  # one waits for the disk
    try:
        copies = {name: pool.submit(copy, name) for name in reusable}
        if threads == 1:  # llama-quantize uses it in the block
            wait(copies.values())
        yield copies
    finally:
        stopped.set()
        pool.shutdown(cancel_futures=True)


def _steps(tensor: ReusableTensor, stopped: Event) -> Iterator[FileRange]:
    """The bytes of a tensor, chunk by chunk, so that stopping need not wait for gigabytes.

    A piece is read only for this, so each chunk's page cache is freed for the next one, which can
    be faster than getting other memory.
    """
    end = tensor.data.offset + tensor.data.size
    for offset in range(tensor.data.offset, end, CHUNK):
        if stopped.is_set():
            raise CancelledError
        step = replace(tensor.data, offset=offset, size=min(CHUNK, end - offset))
        yield step
        if tensor.in_piece:
            forget(step)
