"""A program that parses files, each in a process of its own, and says how that ended.

It reads a line of JSON for each file, [parser, path], and answers with a line of JSON: the error's
class ("typed" for one that the library raises on purpose), its message, CPU seconds, and megabytes.
"""

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

SCRIPTS = Path(__file__).resolve().parents[1] / "workflow" / "scripts"
CPU_SECONDS = 20
ADDRESS_SPACE = 8 << 30


class Refusal(NamedTuple):
    """How a parser ended."""

    error: str
    message: str
    seconds: float
    megabytes: float


class Parsers:
    """The running program."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def parse(self, parser: str, path: Path) -> Refusal:
        """Parse one file."""
        assert self._process.stdin and self._process.stdout
        print(json.dumps([parser, str(path)]), file=self._process.stdin, flush=True)
        return Refusal(*json.loads(self._process.stdout.readline()))

    def close(self) -> None:
        """End the program."""
        self._process.communicate()


def main() -> None:
    """Answer until the input ends."""
    parsers = _parsers()
    for line in sys.stdin:
        parser, path = json.loads(line)
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.write(writing, json.dumps(_parse(parsers[parser], Path(path))).encode())
            os._exit(0)
        os.close(writing)
        with os.fdopen(reading, "rb") as pipe:
            answer = pipe.read().decode()
        _, status, usage = os.wait4(pid, 0)
        died = json.dumps([f"died: {status}", "", usage.ru_utime, usage.ru_maxrss / 1024])
        print(answer or died, flush=True)


def _parse(parse: Callable[[Path], object], path: Path) -> Refusal:
    from mtpforge.errors import ForgeError

    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    error, message = "none", ""
    start = time.process_time()
    try:
        message = f"accepted: {parse(path)}"
    except BaseException as raised:
        error = "typed" if isinstance(raised, ForgeError) else type(raised).__name__
        message = str(raised)[:3000]
    seconds = time.process_time() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return Refusal(error, message, seconds=seconds, megabytes=memory)


def _parsers() -> dict[str, Callable[[Path], object]]:
    """The parsers, as the programs call them."""
    sys.path.insert(0, str(SCRIPTS))
    from mtpforge.checkpoint import safetensors
    from mtpforge.gguf import split
    from mtpforge.quantize import imatrix

    def gguf(path: Path) -> object:
        opened = split.read(path)
        for key in opened.metadata:
            opened.get(key)
        return opened.head_blocks, opened.head.tensors

    def matrix(path: Path) -> object:
        rows = imatrix.read(path)
        imatrix.check_values(path)
        return rows

    return {"gguf": gguf, "safetensors": safetensors.read_shard_header, "imatrix": matrix}


if __name__ == "__main__":
    main()
