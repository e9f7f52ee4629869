"""Memory: how much there is for a program here, and how much llama.cpp takes to run a file."""

import os
import resource
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from mtpforge import table
from mtpforge.gguf.file_names import gguf_files
from mtpforge.llama_cpp import process
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.processors import group_files

EXTRA = 4 << 30
"""Most bytes that llama-server needs besides 1.3 times its file; small files need less."""
_LEAST = 1 << 29


def usable() -> int:
    """Bytes of memory for a program: the machine's, or less by ulimit, cgroup or SLURM."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    limits += [] if limit == resource.RLIM_INFINITY else [limit]
    return min([*limits, *_cgroup_limits(), *_slurm_limits()])


def needed(size: int) -> int:
    """Bytes of memory to reserve for running files of this size."""
    return int(1.3 * size) + min(EXTRA, _LEAST + 5 * size)


def at_a_time(size: int, threads: int, memory: int) -> int:
    """How many programs of one thread can run files of `size` bytes at a time: at least one."""
    return max(1, min(threads, memory // needed(size)))


def too_large(files: Iterable[Path], llama: LlamaCpp) -> str | None:
    """Why GGUFs, with all their shards, are not to be run here; None if they fit into the memory.

    GPU memory counts if `llama` uses it. With a larger file, each token would read weights from
    disk again. Raises ToolchainError.
    """
    size = size_of(files)
    memory = room(size, usable(), llama)
    if size <= memory:
        return None
    return f"{table.size(size)} do not fit into {table.size(memory)} of memory"


def size_of(files: Iterable[Path]) -> int:
    """Bytes of GGUFs with all their shards; a missing one counts as 0."""
    shards = [each.with_name(name) for each in files for name in gguf_files(each.name)]
    return sum(shard.stat().st_size for shard in shards if shard.exists())


def room(size: int, memory: int, llama: LlamaCpp) -> int:
    """Bytes for running files of `size`: `memory`, and if they exceed it, that of GPUs too.

    Raises ToolchainError.
    """
    return memory + llama.gpu_memory() if size > memory and process.has_gpu() else memory


def _cgroup_limits() -> Iterator[int]:
    """The limits of this process's groups and of those around them, of both versions."""
    for place in group_files("memory", "memory.max", "memory.limit_in_bytes"):
        with suppress(OSError, ValueError):
            yield int(place.read_text(encoding="ascii"))


def _slurm_limits() -> Iterator[int]:
    """The limit of a SLURM job, which counts in MiB; 0 there stands for all of the node."""
    per_node = _variable("SLURM_MEM_PER_NODE")
    per_cpu = _variable("SLURM_MEM_PER_CPU") * _variable("SLURM_CPUS_ON_NODE")
    for limit in filter(None, (per_node, per_cpu)):
        yield limit << 20


def _variable(name: str) -> int:
    with suppress(ValueError):
        return max(0, int(os.environ.get(name, "")))
    return 0
