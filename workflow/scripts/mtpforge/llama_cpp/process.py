"""Child processes that end with their caller and write to a log or into the error message.

llama.cpp's programs get untrusted files: each is confined. It sees few variables of our
environment, has no network, and its memory, its output and its silence have limits.
"""

import os
import re
import select
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from mtpforge import progress, table
from mtpforge.errors import ToolchainError, printable
from mtpforge.gguf.file_names import gguf_files
from mtpforge.io import storage
from mtpforge.llama_cpp import confinement

MEMORY = 6 << 30
"""Bytes that a program may allocate, besides twice the size of its files and `MEMORY_PER_CORE`.

llama-perplexity takes 2.2 GB with a vocabulary of 248,320 tokens."""
MEMORY_PER_CORE = 32 << 20
"""Stacks of threads."""
SILENCE = 75.0
"""Seconds in which a program must print something, besides `SILENCE_PER_GB`."""
SILENCE_PER_GB = 600.0
"""IQ3_S takes 170 s per GB of BF16 on one core, and a disk of 25 MB/s takes 40 s to read it."""
OUTPUT_LIMIT = 64 << 20
"""Bytes that a program may print."""

_STEP = re.compile(
    r"\[ *\d+/ *\d+\] \S+"  # llama-quantize: "[  12/ 441] blk.3.attn_q.weight"
    r"|Writing: +\d+%"  # upstream's converter
    r"|ETA (?:[\d.]+ hours )?[\d.]+ minutes"  # llama-imatrix, after its first chunk
    r"|^(?:\[\d+\][\d.]+,| +\d+ +[\d.]+ ±)"  # a chunk: "[90]7.1234,", or "  90   7.1234 ± "
)
_COUNT = re.compile(r"\[ *(\d+)/ *(\d+)\]")
"""The number of a tensor that llama-quantize has begun, and of all."""
_CHUNK = re.compile(r"[\[ ]+(\d+)[\] ]")
_CHUNK_END = re.compile(rb"(?<![^\n,])(\[\d+\][\d.]+,)(?!\n)")
"""After which llama-imatrix does not end the line for ten chunks."""
_CHUNKS = re.compile(r" over (\d+) chunks\b")
_WHOLE = re.compile(r"ETA (?:([\d.]+) hours )?([\d.]+) minutes")
"""The time of all chunks, the first included."""
_NOISE = re.compile(
    r"compute_tensor_statistics: no preceding|save_imatrix: (saving imatrix using|if you want)"
    r"|^[\d.]+ W $"
)
"""What llama-imatrix prints whenever it saves, a line for each tensor, below its progress."""
_EXCEPTION = re.compile(r"[A-Za-z_.]*(Error|Exception|Exit|Interrupt)\b")
"""The start of the last line of a Python traceback."""
_LINE_LIMIT = 1 << 16
_PIPES = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
_KEPT = re.compile(
    r"PATH|TMPDIR|(DY)?LD_LIBRARY_PATH|GPU_DEVICE_ORDINAL"
    r"|(CUDA|NVIDIA|HIP|ROCR|HSA|ONEAPI|SYCL|ZES?|VK)_.*"  # which device, and its driver
)
_SECRET = re.compile(r"TOKEN|SECRET|PASSW|CREDENTIAL|API_?KEY|^(HF|AWS)_", re.IGNORECASE)
_FLAGS = re.compile(r"(C|CXX|CPP)FLAGS|CMAKE_.*")
_GPUS = ("/dev/nvidiactl", "/dev/kfd")
"""Their drivers allocate by rules of their own."""


@contextmanager
def running(command: Sequence[str], **options: Any) -> Iterator["subprocess.Popen[Any]"]:
    """Start a child process, with options of Popen, and end it when the block is left.

    Signals are held back while the child starts: one raised in Popen's constructor would leave a
    child that nothing can end.
    """
    pending: list[int] = []
    ending = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    raising = [number for number in ending if callable(signal.getsignal(number))]
    numbers = raising if threading.current_thread() is threading.main_thread() else []
    handlers = {
        number: signal.signal(number, lambda number, _: pending.append(number))
        for number in numbers
    }
    try:
        process = subprocess.Popen(command, **options)
    except BaseException:
        _restore(handlers, pending)
        raise
    with process:
        try:
            _restore(handlers, pending)
            yield process
        except BaseException:
            process.kill()
            raise


def confined(
    command: Sequence[str | Path],
    size: int,
    memory: bool = True,
    network: bool = False,
    written: int = 0,
) -> list[str]:
    """The command that starts a program confined.

    `size` is that of its files. `written` limits each file that it writes, in bytes, 0 for no
    limit. `memory` and `network` say whether memory is limited and the network is open.
    """
    limits = [allowed(size) or 0 if memory else 0, written, int(network)]
    launcher = [sys.executable, "-I", "-S", confinement.__file__, os.getpid(), *limits]
    return [str(word) for word in [*launcher, *command]]


def has_gpu() -> bool:
    """Whether there is a GPU that llama.cpp could use."""
    return any(Path(device).exists() for device in _GPUS)


def allowed(size: int) -> int | None:
    """Bytes that a program with files of this size may allocate; None if that is not limited."""
    if has_gpu():
        return None
    return MEMORY + 2 * size + MEMORY_PER_CORE * (os.cpu_count() or 1)


def explained(reason: str, size: int) -> str:
    """A program's reason, with its limit if it is about memory."""
    limit = allowed(size)
    if limit is None or not re.search(r"alloc|memory|mem_buffer", reason, re.IGNORECASE):
        return reason
    return f"{reason} (with files of {size / 1e9:.1f} GB it may allocate {limit / 1e9:.1f} GB)"


def size_of(command: Sequence[str | Path], cwd: Path | None = None) -> int:
    """Bytes of the files that a command line names, with all shards of a split GGUF."""
    total = 0
    for word in command[1:]:
        path = (cwd or Path()) / word
        with suppress(OSError, ValueError):  # no path, but a text
            shards = map(path.with_name, gguf_files(path.name))
            entries = path.iterdir() if path.is_dir() else shards
            total += sum(entry.stat().st_size for entry in entries if entry.is_file())
    return total


def call(
    command: Sequence[str | Path],
    log: Path | None = None,
    environment: Mapping[str, str] | None = None,
    name: str | None = None,
    cwd: Path | None = None,
    start: float = 0.0,
) -> None:
    """Run a program to its end, and append its output to `log`.

    `environment` is the program's, by default that of `clean_environment`. `name` is the program's
    name in messages, `start` how many seconds it may be silent longer than others. Raises
    ToolchainError with the program's reason.
    """
    tail = deque[str](maxlen=8)
    left = progress.Left()
    chunks = 0
    with (
        (log or Path(os.devnull)).open("a", buffering=1, encoding="utf-8") as kept,
        _Program(command, environment, cwd, name, start).running() as program,
    ):
        for line in program.lines():
            if _NOISE.search(line):
                continue
            with storage.naming(Path(kept.name)):
                kept.write(printable(line))
            tail.append(line)
            if total := _CHUNKS.search(line):
                chunks = int(total[1])
            if (step := _STEP.search(line)) and left.due():
                progress.say(f"{program.name}: {_counted(step[0], chunks, left)}")
        program.end(tail)


def _counted(step: str, chunks: int, left: progress.Left) -> str:
    """What a program says it does, with the time left if it counts; `chunks` is their number."""
    if tensor := _COUNT.match(step):
        return step + left.of(int(tensor[1]) - 1, int(tensor[2]))
    if chunks and (chunk := _CHUNK.match(step)):
        return f"{chunk[1]} of {chunks} chunks{left.of(int(chunk[1]), chunks)}"
    if whole := _WHOLE.match(step):
        seconds = 3600 * float(whole[1] or 0) + 60 * float(whole[2])
        return f"about {table.duration(seconds)} in all"
    return step


def outputs(commands: Iterable[Sequence[str | Path]], cwd: Path) -> list[str]:
    """Run short programs in parallel; returns their output. Raises ToolchainError like `call`."""
    printed = []
    with ExitStack() as stack:
        started = [
            stack.enter_context(_Program(command, cwd=cwd).running()) for command in commands
        ]
        for program in started:
            printed.append("".join(program.lines()))
            program.end(printed[-1].splitlines()[-8:])
    return printed


def answer(command: Sequence[str | Path]) -> tuple[int, str]:
    """The exit code and output of a short program. Raises ToolchainError if it does not end."""
    with _Program(command).running() as program:
        printed = "".join(program.lines())
        return program.wait(), printed


@cache
def knows(program: str | Path, option: str) -> bool:
    """Whether a program's --help has an option; --help may end with any exit code.

    Asked once, because pieces are many runs of one program.
    """
    return option in answer([program, "--help"])[1]


def clean_environment() -> dict[str, str]:
    """The variables of our environment that llama.cpp's programs get.

    They find no home: llama-server would read its options from a file there.
    """
    kept = {key: value for key, value in os.environ.items() if _KEPT.fullmatch(key)}
    compiled = Path.home() / ".nv" / "ComputeCache"  # kernels, which take minutes to compile
    return {
        "CUDA_CACHE_PATH": str(compiled),
        **kept,
        "HOME": "/nonexistent",
        "LC_ALL": "C",
        "GGML_NO_BACKTRACE": "1",  # it would run a debugger
    }


def build_environment() -> dict[str, str]:
    """The variables that CMake and compilers get: none with a token, or with flags.

    The flags of a build are those of its recipe: others would give other bytes.
    """
    return {
        key: value
        for key, value in os.environ.items()
        if not _SECRET.search(key) and not _FLAGS.fullmatch(key)
    }


class _Program:
    """A confined program whose output is read as text."""

    def __init__(
        self,
        command: Sequence[str | Path],
        environment: Mapping[str, str] | None = None,
        cwd: Path | None = None,
        name: str | None = None,
        start: float = 0.0,
    ) -> None:
        self.name = name or Path(command[0]).name
        self._size = size_of(command, cwd)
        self.limit = SILENCE + start + SILENCE_PER_GB * self._size / 1e9
        self._command = confined(command, self._size)
        self._environment = clean_environment() if environment is None else environment
        self._cwd = cwd

    @contextmanager
    def running(self) -> Iterator["_Program"]:
        """Start the program; it has ended when the block is left."""
        with running(
            self._command, **_PIPES, env=self._environment, cwd=self._cwd
        ) as self._process:
            yield self

    def lines(self) -> Iterator[str]:
        """The lines that it prints, overlong ones in pieces. Raises ToolchainError at a limit."""
        size = 0
        rest = b""
        while chunk := self._read():
            size += len(chunk)
            if size > OUTPUT_LIMIT:
                raise ToolchainError(f"{self.name} printed over {OUTPUT_LIMIT >> 20} MB: ended")
            chunk = chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")  # of progress bars
            *whole, rest = _CHUNK_END.sub(rb"\1\n", rest + chunk).split(b"\n")
            for line in whole:
                yield _shown(line) + "\n"
            if len(rest) > _LINE_LIMIT:
                yield _shown(rest)
                rest = b""
        if rest:
            yield _shown(rest)

    def wait(self) -> int:
        """The exit code. Raises ToolchainError if it closed its output, but does not end."""
        try:
            return self._process.wait(self.limit)
        except subprocess.TimeoutExpired:
            raise self._hangs() from None

    def end(self, tail: Iterable[str]) -> None:
        """Wait for its end. Raises ToolchainError, with a reason from `tail`, if it failed."""
        if code := self.wait():
            how = f"signal {-code}" if code < 0 else f"exit code {code}"
            reason = explained(_reason(tail), self._size)
            raise ToolchainError(f"{self.name} failed with {how}: {reason}")

    def _read(self) -> bytes:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], self.limit)[0]:
            raise self._hangs()
        return os.read(self._process.stdout.fileno(), 1 << 16)

    def _hangs(self) -> ToolchainError:
        return ToolchainError(f"{self.name} printed nothing for {self.limit:.0f} s: ended")


def _shown(line: bytes) -> str:
    """What a log may have: names in a stranger's file can contain commands to a terminal."""
    return printable(line.decode(errors="replace"))


def _reason(lines: Iterable[str]) -> str:
    """The most telling of a program's last lines: a traceback's end, an error, or the first."""
    kept = [line.strip()[:500] for line in lines if line.strip()]
    errors = [line for line in kept if re.search(r"error|fail|^[\d.]+ E ", line, re.IGNORECASE)]
    exceptions = [line for line in kept if _EXCEPTION.match(line)]
    return next(iter([*exceptions[-1:], *errors, *kept]), "no output")


def _restore(handlers: Mapping[signal.Signals, Any], pending: Iterable[int]) -> None:
    """Put signal handlers back, and raise the signals that arrived in between."""
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for arrived in pending:
        signal.raise_signal(arrived)
