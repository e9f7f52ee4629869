"""llama-server as a context manager: on a socket of its own, queried over HTTP, and confined.

The socket is a file in a private folder, so that no other program can answer in its place, and
llama-server needs no network. Each request has a time limit, and an answer of the wrong form is an
error.
"""

import contextlib
import http.client
import json
import math
import os
import re
import socket
import subprocess
import tempfile
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from mtpforge import processors
from mtpforge.errors import ToolchainError
from mtpforge.llama_cpp import process
from mtpforge.llama_cpp.programs import LlamaCpp

START_LIMIT = 75.0
"""Seconds in which llama-server must be ready, besides `START_PER_GB`."""
START_PER_GB = 60.0
REQUEST_LIMIT = 75.0
"""Seconds in which a request must be answered, besides those of its tokens."""
TOKEN_PER_GB = 10.0
"""Seconds: a dense model larger than the memory is read from the disk again for each token."""
MOST_CROWDED = 10.0
"""The most by which both limits grow if other programs want the processors too. What they have for
each GB does not: it is for the disk, and ample."""
END_LIMIT = 5.0
"""Seconds in which it must end when it is told to, before it is killed."""
ANSWER_LIMIT = 64 << 20
LOG_LIMIT = 256 << 20

_SOCKET_PATH_LIMIT = 100  # bytes; 104 on macOS, its end included
_LOG_END = 1 << 20
_T = TypeVar("_T")


class Choice(NamedTuple):
    """A chosen token, the second best, and the difference of their log-probabilities.

    None and 0 if the server omits the token, as it does for tokens that end within a character.
    """

    token: int
    second: int | None
    margin: float


@dataclass(frozen=True)
class Completion:
    """A generated text, its tokens, and the numbers of drafted and accepted tokens."""

    text: str
    tokens: list[int]
    tokens_per_second: float
    drafts: int
    accepted: int


class Server:
    """A running llama-server; made by `serve`. `size` is that of its files, in bytes."""

    def __init__(self, address: Path, child: "subprocess.Popen[bytes]", size: int) -> None:
        self.address = address
        self.child = child
        self.size = size

    def completion(self, prompt: str, n_predict: int) -> Completion:
        """Continue `prompt` greedily by at most `n_predict` tokens, without prompt cache.

        Raises ToolchainError.
        """
        request = {
            "prompt": prompt,
            "n_predict": n_predict,
            "temperature": 0,
            "cache_prompt": False,
            "return_tokens": True,
        }
        answer = _Answer("/completion", self.ask("/completion", request, n_predict))
        timings = answer.part("timings", {})
        # Both fields are missing if nothing was drafted: that is a dead head, not a pass.
        drafts = timings.count("draft_n", 0)
        accepted = timings.count("draft_n_accepted", 0)
        if accepted > drafts:
            raise answer.wrong("draft_n_accepted", accepted)
        return Completion(
            answer.need("content", str),
            answer.tokens(n_predict),
            tokens_per_second=timings.number("predicted_per_second", 0.0),
            drafts=drafts,
            accepted=accepted,
        )

    def choices(self, prompt: str, n_predict: int) -> list[Choice]:
        """Continue `prompt` greedily: each token with the second best. Raises ToolchainError."""
        request = {
            "prompt": prompt,
            "n_predict": n_predict,
            "temperature": 0,
            "cache_prompt": False,
        }
        request |= {"return_tokens": True, "n_probs": 2}
        answer = _Answer("/completion", self.ask("/completion", request, n_predict))
        told = deque(answer.parts("completion_probabilities"))
        choices = []
        for token in answer.tokens(n_predict):
            if not told or told[0].count("id") != token:
                choices.append(Choice(token, None, 0.0))
                continue
            choices.append(_choice(token, told.popleft().parts("top_logprobs")))
        return choices

    def tokenize(self, text: str) -> list[int]:
        """The token IDs of `text`; control tokens are parsed. Raises ToolchainError."""
        request = {"content": text, "parse_special": True}
        return _Answer("/tokenize", self.ask("/tokenize", request)).tokens()

    def prompt_tokens(self, content: object) -> int:
        """The number of tokens that a message to the model becomes. Raises ToolchainError."""
        path = "/v1/chat/completions"
        messages = [{"role": "user", "content": content}]
        answer = self.ask(path, {"messages": messages, "max_tokens": 1}, 1)
        return _Answer(path, answer).part("usage").count("prompt_tokens")

    def in_chat(self, text: str, *, thinking: bool) -> str:
        """The prompt that the model's chat template makes of a user's message.

        Raises ToolchainError.
        """
        messages = [{"role": "user", "content": text}]
        options = {"messages": messages, "chat_template_kwargs": {"enable_thinking": thinking}}
        return _Answer("/apply-template", self.ask("/apply-template", options)).need("prompt", str)

    def context(self) -> int:
        """The most tokens that a prompt and its answer can have together. Raises ToolchainError."""
        settings = _Answer("/props", self.ask("/props")).part("default_generation_settings")
        return settings.count("n_ctx")

    def processor_time(self) -> dict[str, tuple[int, int]]:
        """Nanoseconds that each thread ran, and that it waited for a processor; empty if unknown.

        The accounting of Linux's scheduler, which some kernels lack.
        """
        tasks = Path(f"/proc/{self.child.pid}/task")
        found: dict[str, tuple[int, int]] = {}
        try:
            for task in tasks.iterdir():
                ran, waited, _ = map(int, (task / "schedstat").read_text().split())
                found[task.name] = ran, waited
        except (OSError, ValueError):
            return {}
        return found

    def peak_memory(self) -> int | None:
        """Peak resident size in bytes, mapped pages of the file included; None without /proc."""
        status = Path(f"/proc/{self.child.pid}/status")
        text = status.read_text() if status.exists() else ""
        peak = re.search(r"^VmHWM:\s+(\d+) kB$", text, re.MULTILINE)
        return int(peak[1]) * 1024 if peak else None

    def ask(
        self, path: str, body: dict[str, Any] | None = None, n_predict: int = 0
    ) -> dict[str, Any]:
        """Send a request; returns the JSON answer. Raises ToolchainError with the server's."""
        # A few tokens more, because the prompt needs some passes over the weights too.
        tokens = (n_predict + 16) * TOKEN_PER_GB * self.size / 1e9
        try:
            return self.request(path, body, REQUEST_LIMIT * _crowding() + tokens)
        except _NoAnswerError as error:
            raise ToolchainError(f"{error}{self._end()}") from None

    def request(self, path: str, body: dict[str, Any] | None, limit: float) -> dict[str, Any]:
        """Send a request to a server that may be starting. Raises ToolchainError."""
        connection = _Connection(self.address, limit)
        data = None if body is None else json.dumps(body)
        try:
            connection.request(
                "GET" if data is None else "POST", path, data, {"Content-Type": "application/json"}
            )
            response = connection.getresponse()
            said = response.read(ANSWER_LIMIT + 1)
        except TimeoutError:
            raise ToolchainError(
                f"llama-server has not answered {path} within {limit:.0f} s: it hangs, or the "
                "machine is busy or too small for this model: run again when it is idle"
            ) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            reason = repr(error)[:200]
            raise _NoAnswerError(f"llama-server does not answer {path} ({reason})") from None
        finally:
            connection.close()
        if response.status != 200:
            text = said[:300].decode(errors="replace")
            raise ToolchainError(
                f"llama-server answers {path} with status {response.status}: {text}"
            )
        return _parse(path, said)

    def _end(self) -> str:
        """How the child ended, if it has."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            code = self.child.wait(1)
            return f": it was ended by signal {-code}" if code < 0 else f": it ended with {code}"
        return ""


@contextlib.contextmanager
def serve(
    llama: LlamaCpp, model: Path, log: Path, options: Sequence[str] = (), memory: bool = True
) -> Iterator[Server]:
    """Start llama-server on `model`, and wait until it is ready. `log` gets its output.

    `memory` limits its memory to what a file of that size needs. Raises ToolchainError.
    """
    program = [str(llama.find("llama-server")), "--threads", str(llama.processors)]
    program += ["--model", str(model), "--parallel", "1", "--offline", *options]
    size = process.size_of(program)
    with _socket_folder() as folder, log.open("wb") as output:
        address = folder / "llama.sock"
        command = process.confined(
            [*program, "--host", str(address)],
            size,
            memory=memory,
            network="--rpc" in options,  # of machines that the user names
            written=LOG_LIMIT,
        )
        with process.running(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=process.clean_environment(),
        ) as child:
            try:
                server = Server(address, child, size)
                _wait_until_ready(server, model=model, log=log)
                yield server
            finally:
                child.terminate()
                try:
                    child.wait(timeout=END_LIMIT)
                except subprocess.TimeoutExpired:
                    child.kill()
                    child.wait()


class _NoAnswerError(ToolchainError):
    """The connection broke."""


class _Answer:
    """A JSON object of llama-server, whose fields are checked when they are used."""

    def __init__(self, path: str, fields: dict[str, Any]) -> None:
        self.path = path
        self.fields = fields

    def need(self, key: str, kind: type[_T], default: _T | None = None) -> _T:
        """A field of this type; the default if it is missing or null."""
        value = self.fields.get(key)
        value = default if value is None else value
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.wrong(key, value)
        return value

    def count(self, key: str, default: int | None = None) -> int:
        value = self.need(key, int, default)
        if not 0 <= value < 1 << 31:
            raise self.wrong(key, value)
        return value

    def number(self, key: str, default: float) -> float:
        value = self.need(key, object, default)
        if type(value) not in (int, float):
            raise self.wrong(key, value)
        return float(value)  # type: ignore[arg-type]

    def tokens(self, most: int | None = None) -> list[int]:
        values = self.need("tokens", list)
        if most is not None and len(values) > most:
            raise self.wrong("tokens", values)
        return [_Answer(self.path, {"tokens": value}).count("tokens") for value in values]

    def part(self, key: str, default: dict[str, Any] | None = None) -> "_Answer":
        return _Answer(self.path, self.need(key, dict, default))

    def parts(self, key: str) -> list["_Answer"]:
        values = self.need(key, list, [])
        return [_Answer(self.path, {key: value}).part(key) for value in values]

    def wrong(self, key: str, value: object) -> ToolchainError:
        shown = repr(value)[:60]
        return ToolchainError(f"llama-server answers {self.path} with {key} {shown}")


def _choice(token: int, ranked: Sequence[_Answer]) -> Choice:
    if not ranked:
        return Choice(token, None, 0.0)
    best = ranked[0].number("logprob", -math.inf)
    if len(ranked) == 1:
        return Choice(token, None, math.inf)
    return Choice(token, ranked[1].count("id"), best - ranked[1].number("logprob", -math.inf))


class _Connection(http.client.HTTPConnection):
    """HTTP over the socket file, with one time limit in seconds for everything together."""

    def __init__(self, address: Path, limit: float) -> None:
        super().__init__("localhost")
        self.address = address
        self.deadline = time.monotonic() + limit

    def connect(self) -> None:
        self.sock = _Socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.deadline = self.deadline
        self.sock.settimeout(self.sock.left())
        self.sock.connect(str(self.address))


class _Socket(socket.socket):
    """A socket whose reads end at a deadline, however slowly the bytes arrive."""

    deadline = 0.0

    def left(self) -> float:
        """Seconds until the deadline. Raises TimeoutError when it has passed."""
        if (left := self.deadline - time.monotonic()) <= 0:
            raise TimeoutError
        return left

    def recv_into(self, *arguments: Any) -> int:
        self.settimeout(self.left())
        return super().recv_into(*arguments)


@contextlib.contextmanager
def _socket_folder() -> Iterator[Path]:
    """A private folder whose path is short enough for the address of a socket."""
    with tempfile.TemporaryDirectory() as scratch:
        if len(scratch.encode()) <= _SOCKET_PATH_LIMIT - len("/llama.sock"):
            yield Path(scratch)
            return
    with tempfile.TemporaryDirectory(dir="/tmp") as scratch:
        yield Path(scratch)


def _parse(path: str, said: bytes) -> dict[str, Any]:
    if len(said) > ANSWER_LIMIT:
        raise ToolchainError(f"llama-server answers {path} with over {ANSWER_LIMIT >> 20} MB")
    try:
        answer = json.loads(said.decode(), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        text = str(error)[:100]
        raise ToolchainError(f"llama-server answers {path} with invalid JSON: {text}") from None
    if not isinstance(answer, dict):
        raise ToolchainError(f"llama-server answers {path} with a {type(answer).__name__}")
    return answer


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not a number")


def _wait_until_ready(server: Server, model: Path, log: Path) -> None:
    limit = START_LIMIT * _crowding() + START_PER_GB * server.size / 1e9
    deadline = time.monotonic() + limit
    while (left := deadline - time.monotonic()) > 0:
        if (code := server.child.poll()) is not None:
            how = f" (signal {-code})" if code < 0 else ""
            reason = process.explained(_reason(log), server.size)
            raise ToolchainError(f"llama-server cannot load {model}: {reason}{how}")
        with contextlib.suppress(ToolchainError):  # no socket, or 503 while it loads
            if server.request("/health", None, left).get("status") == "ok":
                return
        time.sleep(0.05)
    raise ToolchainError(f"llama-server is not ready after {limit:.0f} s with {model}")


def _crowding() -> float:
    """How many threads wanted each processor in the last minute, from 1 to `MOST_CROWDED`."""
    try:
        load = os.getloadavg()[0] / processors.available()
    except OSError:
        return 1.0
    return min(max(load, 1.0), MOST_CROWDED)


def _reason(log: Path) -> str:
    """The first line of a log that reports an error or a failed assertion, else the last."""
    with log.open("rb") as file:
        file.seek(max(log.stat().st_size - _LOG_END, 0))
        text = file.read(_LOG_END).decode(errors="replace")
    lines = [line.strip()[:500] for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower() or "failed" in line.lower()]
    aborts = [line for line in lines if re.search(r"\.(c|cpp|cu):\d+: ", line)]  # of ggml_abort
    return (errors or aborts or lines[-1:] or ["no output"])[0]
