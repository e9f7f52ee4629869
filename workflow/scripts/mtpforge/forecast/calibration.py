"""The speed and memory of this machine, measured in two seconds and kept in the user's cache."""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from mtpforge.errors import ForgeError
from mtpforge.forecast.costs import Machine, ProgramSpeed
from mtpforge.forecast.program_speed import measured
from mtpforge.io import atomic
from mtpforge.llama_cpp import memory
from mtpforge.llama_cpp.programs import LlamaCpp

_COPY = 1 << 27
"""Bytes written to measure the disk."""
_READ = 1 << 27
"""Bytes that each thread reads to measure the memory."""
_ROUNDS = 3
"""Measurements, of which the best counts: other programs may be running."""


def calibrated(folder: Path, cache: Path, llama: LlamaCpp) -> Machine:
    """This machine, with the disk of `folder`; measured once, until `cache` is deleted.

    While the machine is busy, and until llama.cpp is built, programs get an ordinary speed, and
    nothing is kept.
    """
    key = f"{platform.node()} {llama.processors} {folder.stat().st_dev}"
    known = _known(_read(cache).get(key))
    if known:
        return Machine(llama.processors, memory.usable(), **known)
    machine = Machine(
        llama.processors,
        memory.usable(),
        disk=max(_disk(folder) for _ in range(_ROUNDS)),
        bandwidth=max(_bandwidth(llama.processors) for _ in range(_ROUNDS)),
    )
    with suppress(ForgeError, OSError):
        if os.getloadavg()[0] < llama.processors / 2:
            machine = replace(machine, start=_start(), programs=measured(llama))
            _keep(cache, key, asdict(machine))
    return machine


def network_rate(cache: Path, endpoint: str, seen: float) -> float:
    """Bytes a second from the Hub: as just seen, or else the last time; 0 if it is not known."""
    key = f"{platform.node()} {endpoint}"
    if seen:
        with suppress(OSError):
            _keep(cache, key, {"network": seen})
        return seen
    with suppress(TypeError, KeyError, ValueError):
        return max(0.0, float(_read(cache)[key]["network"]))
    return 0.0


def _read(cache: Path) -> dict[str, Any]:
    with suppress(OSError, ValueError):
        kept = json.loads(cache.read_text(encoding="utf-8"))
        return kept if isinstance(kept, dict) else {}
    return {}


def _keep(cache: Path, key: str, value: dict[str, Any]) -> None:
    cache.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_json(cache, {**_read(cache), key: value})


def _known(kept: Any) -> dict[str, Any]:
    """The measured fields of a machine; empty if one is missing, as in an older file."""
    with suppress(TypeError, KeyError, ValueError):
        speeds = {each.name: float(kept["programs"][each.name]) for each in fields(ProgramSpeed)}
        numbers = {name: float(kept[name]) for name in ("disk", "bandwidth", "start")}
        if min(*speeds.values(), *numbers.values()) > 0:
            return {**numbers, "programs": ProgramSpeed(**speeds)}
    return {}


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


def _start() -> float:
    """Seconds until a program has imported what a stage needs."""
    program = Path(__file__).parents[2] / "convert.py"
    start = time.perf_counter()
    subprocess.run([sys.executable, str(program), "--help"], capture_output=True, check=False)
    return time.perf_counter() - start
