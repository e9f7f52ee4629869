"""The memory, disk and time that a job takes, from the sizes of its files and a machine's speed.

A forecast knows exact sizes and this machine; what jobs ask for follows from rough sizes and a slow
machine.
"""

from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from mtpforge.llama_cpp import memory
from mtpforge.prompts import EQUAL, N_PREDICT
from mtpforge.search.settings import CHUNKS, SMALL, STEP

# Measured on two virtual x86-64 cores: see docs/sizing.md.
_BATCH = 4  # how much less is read for a token of a text, because these are processed in batches
_BATCH_TOKEN = 16  # how much less each takes at least
_DRAFTED = 1.5  # tokens that a pass over the weights makes with drafting: reports say 1.4 to 1.8
_COMPILE = 460  # CPU seconds to compile llama.cpp
_COMPILE_CUDA = 4200  # and with CUDA, for one kind of GPU: see docs/operating-systems.md
_CONVERT = 1.4e-9  # CPU seconds for a byte of the result that is copied and hashed
_DEQUANTIZE = 3e-9  # and for one that is computed from 8 or 4 bits
_VERIFY = 0.75e-9  # CPU seconds for a byte of the BF16 file
_HASH = 1.1e-9  # seconds for a byte of a file, for its sha256 and those of its parts
_CONVERT_MEMORY = 330 << 20
_UPSTREAM = 6e-9  # CPU seconds for a byte of the BF16 file, on one thread
_TORCH = 350 << 20  # besides the largest tensor, of which there are up to three copies
_TORCH_START = 5  # CPU seconds to load it
_PROBED = 1.5  # a BF16 file, and for a while two at 3 or 4 bits
_PASSES = 2  # over a source that exceeds the memory: see docs/scale.md
_QUANTIZE_MEMORY = 256 << 20  # besides the largest tensor

FREED = 0.95
"""Share of a checkpoint's trunk that a lean build frees: verification samples the rest."""
CHUNK = 512
"""Tokens of a chunk of a text, in llama-imatrix and llama-perplexity."""


@dataclass(frozen=True)
class ProgramSpeed:
    """The default is what two virtual x86-64 cores took.

    `server`: seconds to start and end llama-server, and that its first request takes longer,
    besides reading the weights; `token`: seconds that a token takes at least, requests included;
    `drafted`: the same with drafting; `quantize`: times the known cost of types, and of converting.
    """

    server: float = 0.3
    token: float = 0.6e-3
    drafted: float = 0.9e-3
    quantize: float = 1.0


@dataclass(frozen=True)
class Machine:
    """Threads, bytes of memory, and bytes a second: written to the disk, and read from memory.

    `start` is the time until a program of mtpforge has started. So many `nodes` like it share a
    long quantization.
    """

    threads: int
    memory: int
    disk: float
    bandwidth: float
    start: float = 0.4
    programs: ProgramSpeed = field(default_factory=ProgramSpeed)
    nodes: int = 1

    def reading(self, size: float) -> float:
        """Seconds to read a file from the disk; none if it is still in memory from its writing."""
        return size / self.disk if 2 * size > self.memory else 0.0


class Tokens(NamedTuple):
    """Tokens that llama.cpp generates one by one, those that it drafts, and those of a text."""

    single: float = 0
    drafted: float = 0
    text: float = 0


@dataclass(frozen=True)
class Cost:
    """Bytes of memory and of the result, further bytes of disk while the job runs, and seconds."""

    memory: float = 0
    kept: float = 0
    scratch: float = 0
    seconds: float = 0

    def __add__(self, other: "Cost") -> "Cost":
        """Both, one after the other."""
        return Cost(
            max(self.memory, other.memory),
            kept=self.kept + other.kept,
            scratch=max(self.scratch, other.scratch),
            seconds=self.seconds + other.seconds,
        )


def verified_tokens(prompts: int) -> int:
    """Tokens that verification generates, with drafting if there is a head."""
    return prompts * N_PREDICT


def equal_tokens(prompts: int) -> int:
    """Tokens that it generates without drafting, to compare the text."""
    return prompts * EQUAL


def text_tokens(size: int) -> int:
    """About the tokens of a text of `size` bytes."""
    return size // 4


def measured_tokens(text: Path, chunks: int) -> int:
    """About the tokens of a text that are measured: at most `chunks` chunks."""
    with suppress(OSError):  # it may be made later
        chunks = min(chunks, -(-text_tokens(text.stat().st_size) // CHUNK))
    return chunks * CHUNK


def task_tokens(files: Iterable[str]) -> int:
    """About the tokens that files of tasks with known answers take, at most."""
    sizes = [Path(file).stat().st_size for file in files if Path(file).exists()]
    return 2 * sum(map(text_tokens, sizes))  # Winogrande reads each sentence twice


def logits_size(tokens: int, vocabulary: int) -> int:
    """Bytes of the logits of a text: llama-perplexity keeps half of them, in 16 bits."""
    return tokens // 2 * (vocabulary + 4) * 2


def compiling(machine: Machine, cuda: bool) -> int:
    """Seconds to build llama.cpp, if no cache has it."""
    return round((_COMPILE_CUDA if cuda else _COMPILE) / machine.threads)


def record(size: float, machine: Machine) -> Cost:
    """Hash files of a user, which nothing has read before."""
    return Cost(seconds=max(size * _HASH, size / machine.disk))


def convert(
    size: float, machine: Machine, source: float | None = None, computed: float = 0
) -> Cost:
    """Write a BF16 file of `size` bytes from `source` bytes, by default as many.

    `computed` is the share of the result that is stored in 8 or 4 bits. Reading and writing go on
    beside computing. In bench/conversion.py two virtual cores took 1.4 to 1.7 CPU seconds for a GB
    at BF16, and 2.2 to 2.5 from FP8, with 71% computed. The result is read again for its digests.
    """
    cpu = _CONVERT * (1 - computed) + _DEQUANTIZE * computed
    read = machine.reading(size if source is None else source) + machine.reading(size)
    seconds = max(size * cpu * machine.programs.quantize, size / machine.disk + read)
    return Cost(_CONVERT_MEMORY, kept=size, seconds=seconds)


def convert_upstream(
    size: float, machine: Machine, largest: float, source: float | None = None
) -> Cost:
    """The same with llama.cpp's converter."""
    cost = convert(size, machine, source)
    torch = Cost(_TORCH + 3 * largest, seconds=size * _UPSTREAM + _TORCH_START)
    return cost + torch


def quantize(
    source: float, made: float, machine: Machine, cpu_seconds: float, largest: float, scratch: float
) -> Cost:
    """Quantize `source`, whose largest tensor has `largest` bytes.

    The source is read to hash it and to quantize it; for a piece, it is read to copy its tensors.
    """
    seconds = cpu_seconds * machine.programs.quantize / machine.threads + made / machine.disk
    return Cost(
        largest + _QUANTIZE_MEMORY,
        kept=made,
        scratch=scratch,
        seconds=seconds + _PASSES * machine.reading(source),
    )


def join(size: float, machine: Machine) -> Cost:
    """Join the pieces of a file."""
    return replace(copy(size, machine), kept=0)


def copy(size: float, machine: Machine) -> Cost:
    """Copy a file, with a head or in shards."""
    return Cost(kept=size, seconds=size / machine.disk + machine.reading(size))


def inject(size: float, machine: Machine, head: Cost) -> Cost:
    """Copy a base with a head, which is quantized first and stays until the file is whole."""
    return copy(size, machine) + replace(head, kept=0, scratch=head.kept)


def compare(size: float, machine: Machine, read: float) -> Cost:
    """Compare a file with its checkpoint, which has `size` bytes at BF16.

    `read` are the bytes that it reads of both: of a checkpoint, a quant needs next to nothing.
    """
    return Cost(seconds=size * _VERIFY / machine.threads + machine.reading(read))


def errors(source: float, machine: Machine, cpu_seconds: float) -> Cost:
    """Quantize a part of the rows of a BF16 file of this size."""
    part = source / STEP
    made = quantize(part, part, machine, cpu_seconds=cpu_seconds, largest=part, scratch=part)
    return replace(made, kept=0, seconds=made.seconds + machine.reading(source))


def sensitivities(size: float, machine: Machine, runs: int) -> Cost:
    """Write a file once, and run it over a text with some tensors quantized, `runs` times.

    A small file is run on one thread, so several at a time.
    """
    one = run(size, machine, Tokens(text=CHUNK * CHUNKS))
    at_a_time = 1
    if size < SMALL:
        at_a_time = memory.at_a_time(int(size), machine.threads, machine.memory)
    written = _PROBED * size
    seconds = copy(written, machine).seconds + runs * one.seconds
    return Cost(at_a_time * one.memory, scratch=written, seconds=seconds)


def run(
    size: float,
    machine: Machine,
    tokens: Tokens,
    servers: int = 1,
    share: float = 1,
) -> Cost:
    """Run a file in llama.cpp. A pass, of a token or more, reads a share of it; a start, all."""
    speed = machine.programs
    read = size * share / machine.bandwidth
    batched = max(speed.token / _BATCH_TOKEN, read / _BATCH)
    seconds = (
        tokens.single * max(speed.token, read)
        + tokens.drafted * max(speed.drafted, read / _DRAFTED)
        + tokens.text * batched
        + servers * (speed.server + size / machine.bandwidth)
    )
    return Cost(memory.needed(int(size)), seconds=seconds + machine.reading(size))
