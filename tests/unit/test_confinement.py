"""llama.cpp's programs get no secret, no network and no unlimited resource, and end in time."""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import BIN, CHECKPOINTS
from mtpforge.convert import native
from mtpforge.errors import ForgeError, ToolchainError
from mtpforge.llama_cpp import confinement, process
from mtpforge.llama_cpp.programs import LlamaCpp
from mtpforge.llama_cpp.server import Completion, serve
from mtpforge.measure import perplexity
from mtpforge.quantize import imatrix, llama_quantize
from mtpforge.quantize.request import QuantizeRequest

REPORT = """
import json, os, resource, socket
kinds = ("CORE", "NOFILE", "DATA", "FSIZE")
limits = {kind: resource.getrlimit(getattr(resource, f"RLIMIT_{kind}"))[1] for kind in kinds}
names = [name for _, name in socket.if_nameindex()]
print(json.dumps([limits, names, dict(os.environ), os.getuid()]))
"""


def program(folder: Path, text: str, name: str = "program") -> Path:
    path = folder / name
    path.write_text(f"#!{sys.executable}\n{text}")
    path.chmod(0o755)
    return path


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "SILENCE", 1.0)
    monkeypatch.setattr(process, "SILENCE_PER_GB", 0.0)
    monkeypatch.setattr(process, "OUTPUT_LIMIT", 1 << 20)


def test_only_known_variables_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hostile = {
        *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT", "HF_HUB_CACHE", "GH_TOKEN"),
        *("AWS_SECRET_ACCESS_KEY", "MY_PASSWORD", "HTTPS_PROXY", "XDG_CONFIG_HOME", "LANG"),
        *("LLAMA_API_KEY", "LLAMA_ARG_CTX_SIZE", "LLAMA_CACHE", "LLAMA_TRACE", "PYTHONPATH"),
        *("GGML_SCHED_DEBUG", "GGML_BACKEND_PATH", "OMP_NUM_THREADS"),
    }
    for name in hostile:
        monkeypatch.setenv(name, "canary")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    found = json.loads(process.answer([program(tmp_path, REPORT)])[1])[2]
    assert not hostile & {*found} and "canary" not in found.values()
    assert found["CUDA_VISIBLE_DEVICES"] == "1" and found["HOME"] == "/nonexistent"


def test_resources_are_limited_by_the_size_of_the_files(tmp_path: Path) -> None:
    for number in (1, 2):
        with (tmp_path / f"m-0000{number}-of-00002.gguf").open("wb") as file:
            file.truncate(10**9)
    command = [program(tmp_path, REPORT), "-m", "m-00001-of-00002.gguf", "x" * 5000]
    limits = json.loads(process.outputs([command], tmp_path)[0])[0]
    assert limits["CORE"] == 0 and limits["NOFILE"] <= 1024
    cores = process.MEMORY_PER_CORE * (os.cpu_count() or 1)
    assert limits["DATA"] == process.MEMORY + 4 * 10**9 + cores
    unlimited = process.confined(command[:1], 0, memory=False, written=1 << 20)
    limits = json.loads(subprocess.run(unlimited, stdout=subprocess.PIPE).stdout)[0]
    assert limits["DATA"] == resource.getrlimit(resource.RLIMIT_DATA)[1]
    assert limits["FSIZE"] == 1 << 20


def test_a_mapped_file_takes_none_of_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "MEMORY", 100 << 20)
    with (tmp_path / "model").open("wb") as file:
        file.truncate(1 << 40)
    mapped = (
        "import mmap; f = open('model', 'rb'); m = mmap.mmap(f.fileno(), 0, prot=1); print(m[9])"
    )
    assert process.outputs([[program(tmp_path, mapped)]], tmp_path) == ["0\n"]
    with pytest.raises(ToolchainError, match=r"MemoryError \(with files of 0.0 GB it may allocate"):
        process.outputs([[program(tmp_path, "print(len(bytearray(200 << 20)))")]], tmp_path)


@pytest.mark.parametrize("user", [None, 65534])
def test_there_is_no_network(user: int | None) -> None:
    python = sys.executable
    if user is not None:
        python = shutil.which("python3", path="/usr/bin")  # ours may be in a private folder
        if os.geteuid() or python is None:
            pytest.skip("only root can become another user, who needs a Python")
    there = subprocess.run(["unshare", "--map-root-user", "--net", "true"], user=user)
    if there.returncode:
        pytest.skip("the kernel allows no network namespace")
    code = "import sys; exec(sys.stdin.read())"
    text = Path(confinement.__file__).read_text()
    for network in (0, 1):
        arguments = [str(os.getpid()), "0", "0", str(network), python, "-I", "-c", REPORT]
        done = subprocess.run(
            [python, "-c", code, *arguments], input=text, text=True, user=user,
            stdout=subprocess.PIPE, cwd="/",
        )  # fmt: skip
        _, names, _, uid = json.loads(done.stdout)
        assert (names == ["lo"]) == (not network)
        assert uid == (os.getuid() if user is None else user)


@pytest.mark.parametrize("how", ["end_with", "watch"])
def test_a_program_ends_with_its_caller(tmp_path: Path, how: str) -> None:
    """By the kernel, or by a child that watches, as on macOS."""
    python = [sys.executable, "-I", "-S", "-c"]
    child = (
        f"import sys, os; sys.path.insert(0, {str(Path(confinement.__file__).parent)!r})\n"
        f"import confinement; confinement.{how}(os.getppid())\n"
        "os.execv('/bin/sleep', ['sleep', '60'])\n"
    )
    parent = (
        "import subprocess, sys, time\n"
        "print(subprocess.Popen(sys.argv[1:]).pid, flush=True); time.sleep(60)\n"
    )
    with subprocess.Popen([*python, parent, *python, child], stdout=subprocess.PIPE) as running:
        assert running.stdout is not None
        pid = int(running.stdout.readline())
        wait_until(lambda: "sleep" in Path(f"/proc/{pid}/comm").read_text())
        running.kill()
    wait_until(lambda: not is_alive(pid))


def wait_until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


# ── programs that fail, hang or talk too much ──

DISTURBED = {
    "killed": ("os.kill(os.getpid(), 9)", "failed with signal 9: no output"),
    "crashed": ("print('what', flush=True); os.abort()", "failed with signal 6: what"),
    "fails": ("sys.exit('error: sorry')", "failed with exit code 1: error: sorry"),
    "hangs": ("time.sleep(60)", "printed nothing for 1 s: ended"),
    "stopped": ("os.kill(os.getpid(), signal.SIGSTOP)", "printed nothing for 1 s: ended"),
    "closes": ("os.closerange(0, 99); time.sleep(60)", "printed nothing for 1 s: ended"),
    "floods": ("while True: print('x' * 60)", "printed over 1 MB: ended"),
    "one line": ("while True: sys.stdout.write('x' * 60)", "printed over 1 MB: ended"),
    "binary": ("while True: sys.stdout.buffer.write(bytes(range(256)))", "printed over 1 MB"),
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(("text", "complaint"), DISTURBED.values(), ids=DISTURBED)
def test_a_disturbed_program_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, complaint: str
) -> None:
    if "printed nothing" not in complaint:
        monkeypatch.setattr(process, "SILENCE", 60.0)  # a busy machine may need seconds
    path = program(tmp_path, f"import os, signal, sys, time\n{text}\n")
    with pytest.raises(ToolchainError, match=complaint):
        process.call([path], tmp_path / "log")
    with pytest.raises(ToolchainError, match=complaint):
        process.outputs([[path]], tmp_path)


def test_steps_of_a_progress_bar_are_lines(tmp_path: Path) -> None:
    text = "print('a\\r\\nWriting: 10%\\rWriting: 20%\\rend', end='')"
    printed = process.outputs([[program(tmp_path, text)]], tmp_path)
    assert printed == ["a\nWriting: 10%\nWriting: 20%\nend"]


@pytest.fixture
def said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., list[str]]:
    """What we say of a program that prints these parts of lines."""
    monkeypatch.setattr(process.progress, "_INTERVAL", 0.0)

    def run(*parts: str) -> list[str]:
        path = program(tmp_path, f"for part in {parts}: print(part, end='', flush=True)")
        process.call([path], tmp_path / "log")
        return [line.partition(": ")[2] for line in capfd.readouterr().err.splitlines()]

    return run


def test_a_matrix_that_is_computed_says_how_far_it_is(
    tmp_path: Path, said: Callable[..., list[str]]
) -> None:
    """llama-imatrix ends a line after ten chunks, with a line for each tensor whenever it saves."""
    kept = [
        "0.11 I compute_imatrix: computing over 40 chunks, n_ctx=512\n",
        "0.12 I compute_imatrix: 9.75 seconds per pass - ETA 2 hours 6.50 minutes\n",
        "[1]7.1,", "[2]6.", "2,[3]6.1,",
    ]  # fmt: skip
    noise = [
        "0.44 W compute_tensor_statistics: no preceding-layer tensor for 'blk.0.attn_q.weight'\n",
        "0.04.443.540 W \n",
        "save_imatrix: saving imatrix using GGUF format with a different suffix than .gguf\n",
        "0.44 W save_imatrix: if you want the previous imatrix format, use --output-format dat\n",
    ]
    chunks = [f"{number} of 40 chunks" for number in (1, 2, 3)]
    assert said(*kept, *noise) == ["about 2 h 6 min in all", *chunks]
    log = (tmp_path / "log").read_text()
    assert log.replace(",\n[", ",[") == "".join(kept) + "\n"


def test_a_kl_divergence_says_how_far_it_is(said: Callable[..., list[str]]) -> None:
    table = "   1      45.2095 ±   16.1359\n   2       9.6263 ±    1.8836\n"
    found = said("0.11 I kl_divergence: computing over 6 chunks, n_ctx=512\n", table)
    assert found == ["1 of 6 chunks", "2 of 6 chunks"]


def test_commands_to_a_terminal_are_not_kept(tmp_path: Path) -> None:
    path = program(tmp_path, "import sys; print('\x1b[2J\x9bname'); sys.exit(1)")
    with pytest.raises(ToolchainError, match=r"exit code 1: \\x1b\[2J\\x9bname"):
        process.call([path], tmp_path / "log")
    assert (tmp_path / "log").read_text() == "\\x1b[2J\\x9bname\n"


def test_what_is_no_program_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello")
    for name in ("missing", "text"):
        with pytest.raises(ToolchainError, match=f"exit code 126: error: cannot run .*{name}: "):
            process.call([tmp_path / name])


@pytest.fixture(scope="module")
def source(toolchain: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("source") / "all.gguf"
    native.convert(CHECKPOINTS / "tiny-qwen3.5", path, "all", "qwen35")
    return path


NO_RESULT = {
    "killed": "os.kill(os.getpid(), 9)",
    "writes nothing": "pass",
    "writes garbage": "open(out, 'wb').write(b'x' * 5000)",
    "writes the start": "open(out, 'wb').write(open(source, 'rb').read(3000))",
    "writes another": "open(out, 'wb').write(open(source, 'rb').read())",
    "prints garbage": "sys.stdout.buffer.write(bytes(range(256)) * 100)",
}


def disturbed(folder: Path, name: str, source: Path, act: str) -> LlamaCpp:
    """Programs that answer --help and --dry-run, but not what is asked of them."""
    real = BIN / name
    text = (
        "import os, sys\n"
        f"source, asked = {str(source)!r}, {{'--help', '--dry-run'}} & {{*sys.argv}}\n"
        f"asked and os.execv({str(real)!r}, [{str(real)!r}, *sys.argv[1:]])\n"
        "out = [word for word in sys.argv if word.endswith('.part')]\n"
        "out = out[0] if out else os.devnull\n"
    )
    program(folder, text + act, name)
    return LlamaCpp(folder, threads=1)


@pytest.mark.parametrize("act", NO_RESULT.values(), ids=NO_RESULT)
def test_quantizing_with_a_disturbed_program_is_an_error(
    source: Path, tmp_path: Path, act: str
) -> None:
    llama = disturbed(tmp_path, "llama-quantize", source, act)
    with pytest.raises(ForgeError):
        llama_quantize.quantize(source, tmp_path / "out.gguf", QuantizeRequest("Q8_0"), llama)
    assert [path.name for path in tmp_path.iterdir()] == ["llama-quantize"]


@pytest.mark.parametrize("act", NO_RESULT.values(), ids=NO_RESULT)
def test_an_imatrix_of_a_disturbed_program_is_an_error(
    source: Path, tmp_path: Path, act: str
) -> None:
    llama = disturbed(tmp_path, "llama-imatrix", source, act)
    text = CHECKPOINTS / "held-out.txt"
    with pytest.raises(ForgeError):
        imatrix.compute(source, text, tmp_path / "out.gguf", llama)
    assert [path.name for path in tmp_path.iterdir()] == ["llama-imatrix"]


@pytest.mark.parametrize(
    "act",
    [
        *NO_RESULT.values(),
        "print('Final estimate: PPL = nan +/- nan')",
        "print('Final estimate: PPL = inf +/- 0.1')",
        f"print('Final estimate: PPL = {'9' * 400}.0 +/- 0.1')",
        "print('Final estimate: PPL = 4.5 +/- 0.1'); os.kill(os.getpid(), 9)",
    ],
)
def test_perplexity_of_a_disturbed_program_is_an_error(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    monkeypatch.setattr(perplexity, "ATTEMPTS", 1)
    llama = disturbed(tmp_path, "llama-perplexity", source, act)
    with pytest.raises(ToolchainError):
        perplexity.of_text(source, CHECKPOINTS / "held-out.txt", chunks=1, llama=llama)
    with pytest.raises(ForgeError):
        perplexity.reference_logits(
            source, CHECKPOINTS / "held-out.txt", tmp_path / "logits.part", chunks=1, llama=llama
        )


def test_variables_and_a_configuration_file_change_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real llama-server: with a key of its own it would answer nothing."""
    llama = LlamaCpp(BIN, threads=1)

    def drafted() -> Completion:
        options = ["--spec-type", "draft-mtp", "--spec-draft-n-max", "1"]
        with serve(llama, source, tmp_path / "log", options) as running:
            done = running.completion("def merge(", 40)
        return replace(done, tokens_per_second=0.0)

    plain = drafted()
    settings = tmp_path / ".config/llama.cpp/config.ini"
    settings.parent.mkdir(parents=True)
    settings.write_text("[*]\napi-key = other\nspec-draft-n-max = 7\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LLAMA_API_KEY", "secret")
    monkeypatch.setenv("LLAMA_ARG_HOST", "127.0.0.1")
    monkeypatch.setenv("LLAMA_ARG_N_PREDICT", "1")
    monkeypatch.setenv("GGML_BACKEND_PATH", str(tmp_path))
    assert drafted() == plain and plain.drafts > 0
