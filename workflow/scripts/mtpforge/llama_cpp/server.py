"""llama-server as a context manager: on loopback, queried over HTTP, stopped with its caller."""

import contextlib
import json
import math
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mtpforge.errors import ToolchainError
from mtpforge.llama_cpp import process
from mtpforge.llama_cpp.programs import LlamaCpp

HOST = "127.0.0.1"
START_LIMIT = 1800.0
"""Seconds: reading 70 GB from a slow disk takes a while."""
REQUEST_LIMIT = 3600.0

# Requests on loopback must not go through a proxy of the environment.
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


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
    """A running llama-server; made by `serve`."""

    def __init__(self, port: int, pid: int) -> None:
        self.port = port
        self.pid = pid

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
        answer = self.ask("/completion", request)
        timings = answer.get("timings", {})
        return Completion(
            answer["content"],
            answer.get("tokens", []),
            tokens_per_second=float(timings.get("predicted_per_second", 0.0)),
            # Both fields are missing if nothing was drafted: that is a dead head, not a pass.
            drafts=int(timings.get("draft_n", 0)),
            accepted=int(timings.get("draft_n_accepted", 0)),
        )

    def choices(self, prompt: str, n_predict: int) -> list[Choice]:
        """Continue `prompt` greedily: each token with the second best. Raises ToolchainError."""
        request = {
            "prompt": prompt,
            "n_predict": n_predict,
            "temperature": 0,
            "cache_prompt": False,
        }
        answer = self.ask("/completion", {**request, "return_tokens": True, "n_probs": 2})
        told = deque(answer.get("completion_probabilities", []))
        choices = []
        for token in answer.get("tokens", []):
            if not told or told[0]["id"] != token:
                choices.append(Choice(token, None, 0.0))
                continue
            nothing = {"id": None, "logprob": -math.inf}
            ranked: list[dict[str, Any]] = [*told.popleft()["top_logprobs"], nothing]
            best = ranked[0]
            second = ranked[1]
            margin = float(best["logprob"]) - float(second["logprob"])
            choices.append(Choice(token, second["id"], margin))
        return choices

    def tokenize(self, text: str) -> list[int]:
        """The token IDs of `text`; control tokens are parsed."""
        return list(self.ask("/tokenize", {"content": text, "parse_special": True})["tokens"])

    def peak_memory(self) -> int | None:
        """Peak resident size in bytes, mapped pages of the file included; None without /proc."""
        status = Path(f"/proc/{self.pid}/status")
        text = status.read_text() if status.exists() else ""
        peak = re.search(r"^VmHWM:\s+(\d+) kB$", text, re.MULTILINE)
        return int(peak[1]) * 1024 if peak else None

    def ask(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a request; returns the JSON answer. Raises ToolchainError with the server's."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(
            f"http://{HOST}:{self.port}{path}", data, {"Content-Type": "application/json"}
        )
        try:
            with _OPENER.open(request, timeout=REQUEST_LIMIT) as response:
                return dict(json.load(response))
        except urllib.error.HTTPError as error:
            said = error.read(300).decode(errors="replace")
            raise ToolchainError(
                f"llama-server answers {path} with status {error.code}: {said}"
            ) from None
        except (OSError, ValueError) as error:
            raise ToolchainError(f"llama-server does not answer {path} ({error})") from None


@contextlib.contextmanager
def serve(llama: LlamaCpp, model: Path, log: Path, options: Sequence[str] = ()) -> Iterator[Server]:
    """Start llama-server on `model`, and wait until it is ready. `log` gets its output.

    Raises ToolchainError.
    """
    command = [str(llama.find("llama-server")), "--threads", str(llama.processors)]
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port = probe.getsockname()[1]
    address = ["--host", HOST, "--port", str(port), "--parallel", "1", "--offline"]
    with (
        log.open("wb") as output,
        process.running(
            [*command, "--model", str(model), *address, *options],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=process.environment(),
        ) as child,
    ):
        try:
            server = Server(port, child.pid)
            _wait_until_ready(server, child, model=model, log=log)
            yield server
        finally:
            child.terminate()
            try:
                child.wait(timeout=20)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()


def _wait_until_ready(
    server: Server, child: "subprocess.Popen[bytes]", model: Path, log: Path
) -> None:
    deadline = time.monotonic() + START_LIMIT
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise ToolchainError(f"llama-server cannot load {model}: {_reason(log)}")
        with contextlib.suppress(ToolchainError):  # refused, or 503 while it loads
            if server.ask("/health").get("status") == "ok":
                return
        time.sleep(0.05)
    raise ToolchainError(f"llama-server is not ready after {START_LIMIT:.0f} s with {model}")


def _reason(log: Path) -> str:
    """The first line of a log that reports an error or a failed assertion, else the last."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower() or "failed" in line.lower()]
    aborts = [line for line in lines if re.search(r"\.(c|cpp|cu):\d+: ", line)]  # of ggml_abort
    return (errors or aborts or lines[-1:] or ["no output"])[0]
