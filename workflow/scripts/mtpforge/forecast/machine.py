"""The speed and memory of this machine, measured in a few seconds and kept in the user's cache."""

import json
import os
import platform
import resource
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from mtpforge.io import atomic

_COPY = 1 << 27
"""Bytes written to measure the disk."""
_READ = 1 << 27
"""Bytes that each thread reads to measure the memory."""
_ROUNDS = 3
"""Measurements, of which the best counts: other programs may be running."""
_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


@dataclass(frozen=True)
class Machine:
    """Threads, bytes of memory, and bytes a second: written to the disk, and read from memory."""

    threads: int
    memory: int
    disk: float
    bandwidth: float


def calibrated(folder: Path, cache: Path, threads: int) -> Machine:
    """This machine, with the disk of `folder`; measured once, until `cache` is deleted."""
    key = f"{platform.node()} {threads} {folder.stat().st_dev}"
    known: dict[str, dict[str, float]] = {}
    with suppress(OSError, ValueError):
        known = json.loads(cache.read_text(encoding="utf-8"))
    with suppress(TypeError, KeyError, AttributeError):
        found = known[key]
        return Machine(threads, usable_memory(), float(found["disk"]), float(found["bandwidth"]))
    disk = max(_disk(folder) for _ in range(_ROUNDS))
    bandwidth = max(_bandwidth(threads) for _ in range(_ROUNDS))
    machine = Machine(threads, usable_memory(), disk, bandwidth)
    cache.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_json(cache, {**known, key: asdict(machine)})
    return machine


def usable_memory() -> int:
    """Bytes of memory that a program can have: the machine's, or less by cgroup or ulimit."""
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in _CGROUPS:
        with suppress(OSError, ValueError):
            limits.append(int(Path(name).read_text(encoding="ascii")))
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return min(limits if limit == resource.RLIM_INFINITY else [*limits, limit])


def _disk(folder: Path) -> float:
    block = np.random.default_rng(0).bytes(1 << 24)
    with tempfile.NamedTemporaryFile(dir=folder) as file:
        start = time.perf_counter()
        for _ in range(_COPY // len(block)):
            file.write(block)
        file.flush()
        os.fsync(file.fileno())
        return _COPY / (time.perf_counter() - start)


def _bandwidth(threads: int) -> float:
    values = np.ones(_READ // 8, dtype=np.uint64)
    with ThreadPoolExecutor(threads) as pool:
        start = time.perf_counter()
        list(pool.map(lambda _: values.sum(), range(threads)))
        return threads * _READ / (time.perf_counter() - start)
