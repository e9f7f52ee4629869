"""llama-server that hangs, dies or lies gives an error in time, and never a result.

The program in its place is a script that speaks HTTP on the socket it is given, except for the
disturbance under test.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from mtpforge.errors import ToolchainError
from mtpforge.llama_cpp import server as module
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.llama_cpp.server import Completion, Server, serve

FAKE = """\
#!{python}
import json, os, signal, socket, sys, time
address = sys.argv[sys.argv.index("--host") + 1]
listening = socket.socket(socket.AF_UNIX)
OK = b"HTTP/1.1 200 OK\\r\\n"

def answer(body, status="200 OK", length=None):
    length = len(body) if length is None else length
    fields = b"Content-Length: %d\\r\\n\\r\\n" % length
    return OK.replace(b"200 OK", status.encode()) + fields + body

def read(connection):
    with connection.makefile("rb") as file:
        path = file.readline().decode()
        fields = dict(line.decode().split(": ") for line in iter(file.readline, b"\\r\\n"))
        file.read(int(fields.get("Content-Length", 0)))
    return path

def say(connection, text):
    connection.sendall(answer(text.encode()))

def drip(connection, text):
    while True:
        connection.sendall(text.encode())
        time.sleep(0.02)

def die(how=signal.SIGKILL):
    os.kill(os.getpid(), how)

def health(connection):
    say(connection, '{{"status": "ok"}}')

def act(connection):
    {act}

{before}
listening.bind(address)
listening.listen()
while True:
    connection, _ = listening.accept()
    health(connection) if "/health" in read(connection) else act(connection)
    connection.close()
"""
GOOD = {
    "content": "text",
    "tokens": [1, 2],
    "timings": {"predicted_per_second": 10.5, "draft_n": 2, "draft_n_accepted": 1},
}


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., LlamaCpp]:
    monkeypatch.setattr(module, "START_LIMIT", 30.0)  # a busy machine may need seconds
    monkeypatch.setattr(module, "REQUEST_LIMIT", 15.0)
    monkeypatch.setattr(module, "END_LIMIT", 0.5)
    monkeypatch.setattr(module.os, "getloadavg", lambda: (0.0, 0.0, 0.0))  # or limits grow
    (tmp_path / "m.gguf").write_bytes(b"GGUF")

    def make(act: str = "pass", before: str = "") -> LlamaCpp:
        program = tmp_path / "llama-server"
        program.write_text(FAKE.format(python=sys.executable, act=act, before=before))
        program.chmod(0o755)
        return LlamaCpp(tmp_path, threads=1)

    return make


def complete(llama: LlamaCpp) -> Completion:
    with serve(llama, llama.folder / "m.gguf", llama.folder / "log") as running:
        return running.completion("prompt", 2)


def said(value: object) -> str:
    return f"say(connection, {json.dumps(value)!r})"


def test_a_faithful_answer_is_read(fake: Callable[..., LlamaCpp]) -> None:
    assert complete(fake(said(GOOD))) == Completion("text", [1, 2], 10.5, drafts=2, accepted=1)
    idle = {**GOOD, "timings": {"predicted_per_second": None}}  # infinite, after one token
    assert complete(fake(said(idle))) == Completion("text", [1, 2], 0.0, drafts=0, accepted=0)


TIMINGS = GOOD["timings"]
WRONG = [
    *({**GOOD, "content": value} for value in (None, 1, ["text"], {})),
    *(
        {**GOOD, "tokens": value}
        for value in (None, "12", {}, [1.5], [True], ["1"], [-1], [1 << 40])
    ),
    {**GOOD, "tokens": [1, 2, 3]},  # more than were asked for
    *({**GOOD, "timings": value} for value in ("fast", [], 7)),
    *(
        {**GOOD, "timings": {**TIMINGS, key: value}}
        for key in TIMINGS
        for value in ("2", [2], {}, True)
    ),
    {**GOOD, "timings": {**TIMINGS, "draft_n": -2}},
    {**GOOD, "timings": {**TIMINGS, "draft_n": 1.5}},
    {**GOOD, "timings": {**TIMINGS, "draft_n_accepted": 3}},
    {key: value for key, value in GOOD.items() if key != "content"},
    {},
    [],
    [GOOD],
    "text",
    None,
    3,
]


def test_answers_of_the_wrong_form_are_errors(
    fake: Callable[..., LlamaCpp], tmp_path: Path
) -> None:
    """One server gives them all, one for each request."""
    (tmp_path / "answers.json").write_text(json.dumps(WRONG))
    answers = f"answers = iter(json.load(open({str(tmp_path / 'answers.json')!r})))"
    llama = fake("say(connection, json.dumps(next(answers)))", answers)
    with serve(llama, tmp_path / "m.gguf", tmp_path / "log") as running:
        for answer in WRONG:
            with pytest.raises(ToolchainError, match=r"^llama-server answers /completion with "):
                running.completion("prompt", 2)
                pytest.fail(f"believed {answer}")


RAW = {
    "nothing": "pass",
    "no HTTP": "connection.sendall(b'hello')",
    "endless header": "connection.sendall(OK + b'X: ' + bytes(1 << 17))",
    "many headers": "connection.sendall(OK + b'' + b'X: 1\\r\\n' * 1000)",
    "text as length": "connection.sendall(OK + b'Content-Length: x\\r\\n\\r\\n{}')",
    "half": 'connection.sendall(answer(b\'{"content": "te\', length=500))',
    "bad chunks": "connection.sendall(OK + b'Transfer-Encoding: chunked\\r\\n\\r\\nzz\\r\\n')",
    "not JSON": "say(connection, 'Once upon a time')",
    "not UTF-8": 'connection.sendall(answer(b\'{"content": "\\xff\\xfe"}\'))',
    "deep": "say(connection, '[' * 100000)",
    "long number": "say(connection, '{\"tokens\": [' + '9' * 5000 + ']}')",
    "NaN": "say(connection, '{\"content\": NaN}')",
    "Infinity": "say(connection, '{\"content\": -Infinity}')",
    "an error": "connection.sendall(answer(b'{\"error\": 1}', '500 Sorry'))",
    "elsewhere": "connection.sendall(b'HTTP/1.1 302 Found\\r\\nLocation: http://127.0.0.1:1/\\r\\n\\r\\n')",
    "unauthorized": "connection.sendall(answer(b'{}', '401 No'))",
    "killed": "die()",
    "killed in the middle": "connection.sendall(answer(b'{\"con', length=500)); die()",
    "aborted": "die(signal.SIGABRT)",
    "ended": "sys.exit(0)",
}
SLOW = {
    "silent": "time.sleep(60)",
    "stopped": "die(signal.SIGSTOP)",
    "drips status": "drip(connection, 'H')",
    "drips headers": "connection.sendall(OK + b''); drip(connection, 'X: 1\\r\\n ')",
    "drips body": "connection.sendall(answer(b'', length=1 << 40)); drip(connection, ' ')",
    "closes late": "connection.sendall(OK + b'\\r\\n{}'); time.sleep(60)",
}


@pytest.mark.parametrize("act", RAW.values(), ids=RAW)
def test_a_broken_answer_is_an_error(fake: Callable[..., LlamaCpp], act: str) -> None:
    with pytest.raises(ToolchainError, match=r"^llama-server (answers|does not answer) /compl"):
        complete(fake(act))


@pytest.mark.parametrize("act", SLOW.values(), ids=SLOW)
def test_a_slow_answer_ends_in_a_time_limit(
    fake: Callable[..., LlamaCpp], monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    monkeypatch.setattr(module, "REQUEST_LIMIT", 0.5)
    start = time.monotonic()
    with pytest.raises(ToolchainError, match=r"has not answered /completion within|status line"):
        complete(fake(act))
    assert time.monotonic() - start < 20


@pytest.mark.parametrize(("load", "times"), [(0.5, 1), (8.0, 4), (1000.0, 10)])
def test_a_crowded_machine_has_more_time(
    fake: Callable[..., LlamaCpp], monkeypatch: pytest.MonkeyPatch, load: float, times: int
) -> None:
    monkeypatch.setattr(module.os, "getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(module.processors, "available", lambda: 2)
    monkeypatch.setattr(module, "REQUEST_LIMIT", 1.0)
    llama, limits = fake(), []
    ask = module.Server.request

    def request(server: Server, path: str, body: object, limit: float) -> object:
        limits.append(limit)
        if path != "/health":
            raise ToolchainError("late")
        return ask(server, path, None, limit)

    monkeypatch.setattr(module.Server, "request", request)
    with pytest.raises(ToolchainError, match="late"):
        complete(llama)
    assert limits[-1] == pytest.approx(times, rel=0.01)


def test_the_time_for_each_gb_does_not_grow_with_the_load(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Or a server that hangs with a large file would be noticed after days."""
    limits: list[float] = []
    monkeypatch.setattr(module.time, "monotonic", lambda: sum(limits))
    monkeypatch.setattr(module.time, "sleep", lambda _: None)
    monkeypatch.setattr(module, "_crowding", lambda: 10.0)
    monkeypatch.setattr(Server, "request", lambda *given: limits.append(given[-1]) or {})
    running = Server(tmp_path, SimpleNamespace(poll=lambda: None), 20 * 10**9)
    running.ask("/completion", {}, 184)
    with pytest.raises(ToolchainError, match="is not ready after"):
        module._wait_until_ready(running, tmp_path / "m.gguf", tmp_path / "log")
    for_tokens, for_gb = 200 * 20 * module.TOKEN_PER_GB, 20 * module.START_PER_GB
    assert limits == [10 * module.REQUEST_LIMIT + for_tokens, 10 * module.START_LIMIT + for_gb]


def test_a_huge_answer_is_not_read(
    fake: Callable[..., LlamaCpp], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "ANSWER_LIMIT", 1 << 20)
    with pytest.raises(ToolchainError, match="answers /completion with over 1 MB"):
        complete(fake("connection.sendall(answer(bytes(2 << 20)))"))


def test_the_end_of_a_server_is_told(fake: Callable[..., LlamaCpp]) -> None:
    with pytest.raises(ToolchainError, match=r"it was ended by signal 9$"):
        complete(fake("die()"))
    with pytest.raises(ToolchainError, match=r"it ended with 3$"):
        complete(fake("sys.exit(3)"))


START = {
    "ends": ("print('error: no such model'); sys.exit(1)", "cannot load .*: error: no such model"),
    "ends well": ("sys.exit(0)", "cannot load .*: no output"),
    "killed": ("die()", r"cannot load .*: no output \(signal 9\)"),
    "floods": ("while True: print('x' * 65536)", r"cannot load .*: (x+|OSError.*)"),
    "silent": ("time.sleep(60)", "not ready after 1 s"),
    "deaf": ("signal.signal(15, signal.SIG_IGN); time.sleep(60)", "not ready after 1 s"),
    "never well": ('health = lambda c: say(c, \'{"status": "loading"}\')', "not ready after 1 s"),
    "lies": ("health = lambda c: say(c, '[\"ok\"]')", "not ready after 1 s"),
    "drips": ("health = lambda c: drip(c, 'HTTP/1.1')", "not ready after 1 s"),
}


@pytest.mark.parametrize(("before", "complaint"), START.values(), ids=START)
def test_a_server_that_does_not_start_is_an_error(
    fake: Callable[..., LlamaCpp],
    monkeypatch: pytest.MonkeyPatch,
    before: str,
    complaint: str,
) -> None:
    monkeypatch.setattr(module, "LOG_LIMIT", 1 << 20)
    if "not ready" in complaint:
        monkeypatch.setattr(module, "START_LIMIT", 1.0)
    start = time.monotonic()
    with pytest.raises(ToolchainError, match=complaint):
        complete(fake(before=before))
    assert time.monotonic() - start < 20


def test_limits_grow_with_the_file(
    fake: Callable[..., LlamaCpp], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = []
    monkeypatch.setattr(Server, "request", lambda *given: limits.append(given[-1]) or {})
    Server(tmp_path, subprocess.Popen(["true"]), 70 * 10**9).ask("/completion", {}, 200)
    assert limits[0] > 200 * 70  # a second for each GB and token


def test_lists_of_choices_are_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    entry = {"id": 1, "top_logprobs": [{"id": 1, "logprob": -0.5}, {"id": 2, "logprob": -1.5}]}
    answer = {"tokens": [1], "completion_probabilities": [entry]}
    running = Server(Path(), None, 0)
    monkeypatch.setattr(Server, "ask", lambda *_: answer)
    assert running.choices("x", 1) == [(1, 2, 1.0)]
    for ranked, margin in (([], 0.0), (entry["top_logprobs"][:1], math.inf)):
        answer["completion_probabilities"] = [{"id": 1, "top_logprobs": ranked}]
        assert running.choices("x", 1) == [(1, None, margin)]
    wrong: list[object] = [7, "1", [[]], [{}], [{"id": "1"}], [{"id": 1, "top_logprobs": 3}]]
    wrong += [[{"id": 1, "top_logprobs": [value]}] for value in (3, {"logprob": "low"})]
    for value in wrong:
        answer["completion_probabilities"] = value
        with pytest.raises(ToolchainError, match="llama-server answers /completion with"):
            running.choices("x", 1)


# ── strangers, parents and variables ──


def test_the_socket_is_in_a_private_folder(
    fake: Callable[..., LlamaCpp], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So nobody else can answer. A long TMPDIR would not fit into a socket's address."""
    deep = tmp_path / ("d" * 100)
    deep.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(deep))
    with serve(fake(said(GOOD)), tmp_path / "m.gguf", tmp_path / "log") as running:
        folder = running.address.parent
        assert folder.stat().st_mode & 0o777 == 0o700
        assert folder.stat().st_uid == os.getuid()
        assert running.completion("x", 2).text == "text"
    assert not folder.exists()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_server_ends_with_its_parent(fake: Callable[..., LlamaCpp], how: int) -> None:
    llama = fake(said(GOOD))
    parent = (
        "import sys, time; from pathlib import Path\n"
        "from mtpforge.llama_cpp.programs import LlamaCpp\n"
        "from mtpforge.llama_cpp.server import serve\n"
        "folder = Path(sys.argv[1])\n"
        "with serve(LlamaCpp(folder), folder / 'm.gguf', folder / 'log') as running:\n"
        "    print(running.child.pid, flush=True); time.sleep(60)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(module.__file__).parents[2])}
    with subprocess.Popen(
        [sys.executable, "-c", parent, llama.folder], stdout=subprocess.PIPE, env=environment
    ) as running:
        assert running.stdout is not None
        child = int(running.stdout.readline())
        assert is_alive(child)
        running.send_signal(how)
    deadline = time.monotonic() + 5
    while is_alive(child) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_alive(child)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"
