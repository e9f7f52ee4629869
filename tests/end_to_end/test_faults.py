"""Full disks and failing system calls, in every writer: what is said, left, and made afterwards.

`make test-faults` sets MTPFORGE_FAULTS=all: every call of every writer, and every kind of error.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import faults
import pytest
from conftest import CHECKPOINTS, ROOT, SCRIPTS, Run
from example_records import STAMP, report
from faults import Outcome
from hub import COMMIT, serve
from mtpforge.hub.listing import Listing
from mtpforge.io.ranges import digest_of
from mtpforge.llama_cpp.compilation import PROGRAMS
from mtpforge.llama_cpp.toolchain import SOURCE
from other_architectures import write_model

ALL = os.environ.get("MTPFORGE_FAULTS") == "all"
DENSE = CHECKPOINTS / "tiny-qwen3.5"
REPO = "Owner/tiny-qwen3.5"
SHARD = "model-00001-of-00004.safetensors"
CONVERTER = ROOT / "resources" / "converter"
TOKENIZER = ("--tokenizer-pre", "qwen35")

# Arguments: what a program of workflow/scripts would call, for writers that only run inside others.
CALL = """
import sys
from pathlib import Path
from mtpforge import cli
from mtpforge.gguf import reader, split
from mtpforge.io import atomic
from mtpforge.llama_cpp import toolchain

def publish(source, out):
    atomic.give_name(source, out)

def write(source, out):
    atomic.write_text(out, source.read_text())

def cut(source, out):
    with split.splitting(reader.read(source), out, out.name, 2_000_000):
        pass

def install(source, out):
    toolchain.install(source, out.parent)

cli.run(lambda: globals()[sys.argv[1]](*map(Path, sys.argv[2:])))
"""


@dataclass
class Made:
    """Inputs of the writers, in a folder, and the programs that they call."""

    path: Path
    bin: Path
    environment: dict[str, str] = field(default_factory=dict)

    def command(self, program: str, *arguments: object) -> list[str]:
        return [sys.executable, str(SCRIPTS / program), *map(str, arguments)]

    def call(self, name: str, source: str, out: Path) -> list[str]:
        return [sys.executable, "-c", CALL, name, str(self.path / source), str(out)]

    def llama(self, program: str, *arguments: object) -> list[str]:
        return self.command(program, *arguments, "--threads", 1, "--bin", self.bin)

    def planned(self, out: Path, *options: object) -> list[str]:
        plan = self.path / "plan.json"
        return self.llama(
            "quantize.py", self.path / "all.gguf", "--plan", plan, *options, "--out", out
        )


Command = Callable[[Made, Path], list[str]]


def convert(made: Made, out: Path) -> list[str]:
    return made.command("convert.py", DENSE, *TOKENIZER, "--out", out)


def quantize(made: Made, out: Path) -> list[str]:
    options = ("--type", "Q8_0", "--head", "Q8_0", "--out", out)
    return made.llama("quantize.py", made.path / "all.gguf", *options)


def piece(made: Made, out: Path) -> list[str]:
    return made.planned(out.parent / "manifests", "--piece", "1/2")


def assemble(made: Made, out: Path) -> list[str]:
    return made.planned(out, "--reuse", made.path / "pieces")


def imatrix(made: Made, out: Path) -> list[str]:
    text = CHECKPOINTS / "held-out.txt"
    return made.llama("imatrix.py", made.path / "all.gguf", "--text", text, "--out", out)


def logits(made: Made, out: Path) -> list[str]:
    text = ("--text", CHECKPOINTS / "held-out.txt", "--chunks", 2)
    return made.llama("reference_logits.py", made.path / "all.gguf", *text, "--out", out)


def inject(made: Made, out: Path) -> list[str]:
    head = ("--head", made.path / "head.gguf", "--head-type", "Q8_0", "--bin", made.bin)
    return made.command("inject.py", made.path / "trunk.gguf", *head, "--out", out)


def cut(made: Made, out: Path) -> list[str]:
    return made.call("cut", "all.gguf", out)


def publish(made: Made, out: Path) -> list[str]:
    return made.call("publish", "all.gguf", out)


def install(made: Made, out: Path) -> list[str]:
    return made.call("install", "entry", out)


def write(made: Made, out: Path) -> list[str]:
    return made.call("write", "listing.json", out)


def materials(made: Made, out: Path) -> list[str]:
    files = sorted(path for path in DENSE.iterdir() if path.is_file())
    return made.command("materials.py", '{"path": "x"}', *files, "--out", out)


def summary(made: Made, out: Path) -> list[str]:
    return made.command("summary.py", made.path / "x/reports/x.json", "--out", out)


def resolve(made: Made, out: Path) -> list[str]:
    return made.command("resolve.py", REPO, "--revision", COMMIT, "--out", out)


def fetch(made: Made, out: Path) -> list[str]:
    to = ("--folder", out.parent, "--out", made.path / "record.json")
    return made.command("fetch.py", made.path / "listing.json", SHARD, *to)


def fetch_parts(made: Made, out: Path) -> list[str]:
    to = ("--folder", out.parent, "--out", made.path / "record.json")
    return made.command("fetch.py", made.path / "listing.json", "q.gguf", *to)


def fetch_head(made: Made, out: Path) -> list[str]:
    to = ("--folder", out.parent, "--out", made.path / "head.json")
    return made.command("fetch_head.py", made.path / "listing.json", *to)


def adopt(made: Made, out: Path) -> list[str]:
    pin = ("--requirement", made.path / "llama.cpp.txt", "--bin-dir", made.bin)
    return made.command("toolchain.py", *pin, "--bin", out.parent / "bin", "--out", out)


def set_up(made: Made, out: Path) -> list[str]:
    pins = ("--requirement", made.path / "llama.cpp.txt", "--lock", made.path / "lock.txt")
    return made.command("converter.py", *pins, "--out", out)


def upstream(made: Made, out: Path) -> list[str]:
    options = ("--converter", CONVERTER, "--out", out)
    return made.command("convert_upstream.py", made.path / "glm", *TOKENIZER, *options)


@dataclass(frozen=True)
class Writer:
    """A command, the name of what it writes, and its program of llama.cpp, if that writes it."""

    command: Command
    name: str
    program: bool = False
    several: bool = False
    """Whether it writes several files, and any of them can be the one that does not fit."""
    resumes: bool = False
    """Whether a hidden file stays, so that a later run continues."""


WRITERS = {
    "convert": Writer(convert, "x.gguf"),
    "quantize": Writer(quantize, "x.gguf", program=True),
    "piece": Writer(piece, "manifests", program=True, several=True),
    "assembly": Writer(assemble, "x.gguf", program=True),
    "imatrix": Writer(imatrix, "x.gguf", program=True),
    "logits": Writer(logits, "x.bin", program=True),
    "inject": Writer(inject, "x.gguf", program=True),
    "split": Writer(cut, "x"),
    "publish": Writer(publish, "x.gguf"),
    "toolchain": Writer(install, "llama-quantize"),
    "stamp": Writer(adopt, "stamp.json", resumes=True),
    "converter": Writer(set_up, "stamp.json", several=True, resumes=True),
    "upstream": Writer(upstream, "x.gguf", program=True),
    "text": Writer(write, "x.md"),
    "materials": Writer(materials, "x.json"),
    "summary": Writer(summary, "x.md"),
    "listing": Writer(resolve, "x.json", resumes=True),
    "fetch": Writer(fetch, SHARD, resumes=True),
    "parts": Writer(fetch_parts, "q.gguf", resumes=True),
    "head": Writer(fetch_head, "model-00003-of-00004.safetensors", several=True, resumes=True),
}


def writer_of(name: str) -> Writer:
    if name == "upstream" and not (CONVERTER / "environment/bin/python").exists():
        pytest.skip("llama.cpp's converter is not set up: make converter")
    return WRITERS[name]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, toolchain: Path, run: Run) -> Iterator[Made]:
    """Every writer's inputs, and a Hub on loopback."""
    path = tmp_path_factory.mktemp("inputs")
    made = Made(path, toolchain)
    digests = ("--digests", path / "all.json")
    commands = [
        made.command("convert.py", DENSE, *TOKENIZER, "--out", path / "all.gguf", *digests),
        made.command("convert.py", DENSE, "--part", "head", "--out", path / "head.gguf"),
        made.command(
            "convert.py", DENSE, *TOKENIZER, "--part", "trunk", "--out", path / "trunk.gguf"
        ),
        made.llama(
            "quantize_plan.py", path / "all.gguf", "--type", "Q4_0", "--head", "Q8_0", *digests,
            "--pieces", path / "count", "--out", path / "plan.json",
        ),
        made.planned(path / "pieces/manifests", "--piece", "1/2"),
    ]  # fmt: skip
    for command in commands:
        done = run(Path(command[1]).name, *command[2:])
        assert done.returncode == 0, done.stderr
    (path / "x/reports").mkdir(parents=True)
    report("x.gguf").write(path / "x/reports/x.json")
    (path / "entry/bin").mkdir(parents=True)
    STAMP.__class__(**{**STAMP.__dict__, "programs": {"llama-quantize": "0" * 64}}).write(
        path / "entry/stamp.json"
    )
    shutil.copy(toolchain / "llama-quantize", path / "entry/bin")
    _cache_build(path, toolchain)
    write_model("glm", path / "glm")
    with _hub(made) as environment, pytest.MonkeyPatch.context() as patch:
        environment |= {"PYTHONPATH": str(SCRIPTS), "MTPFORGE_CACHE": str(path / "cache")}
        for key, value in environment.items():
            patch.setenv(key, value)
        done = run("resolve.py", REPO, "--revision", COMMIT, "--out", path / "listing.json")
        assert done.returncode == 0, done.stderr
        assert Listing.read(path / "listing.json").tensors
        yield made


def _cache_build(path: Path, programs: Path) -> None:
    """A build in the cache, from which the converter's source is taken, and an empty lock."""
    (path / "llama.cpp.txt").write_text(f"stand-in==77.0 --hash=sha256:{'0' * 64}\n")
    (path / "lock.txt").touch()
    entry = path / "cache/llama.cpp/build"
    (entry / "bin").mkdir(parents=True)
    for name in PROGRAMS:
        (entry / "bin" / name).symlink_to((programs / name).resolve())
    for name in SOURCE:
        (entry / "source" / name).mkdir(parents=True)
        (entry / "source" / name / "x.py").write_text("1\n" * 1000)
    digests = {name: digest_of(programs / name) for name in PROGRAMS}
    replace(STAMP, programs=digests, archive_sha256="0" * 64).write(entry / "stamp.json")


class _hub:
    """Serve the checkpoint, and a GGUF in two parts."""

    def __init__(self, made: Made) -> None:
        folder = made.path / "repository"
        shutil.copytree(DENSE, folder, ignore=shutil.ignore_patterns("prompts"))
        content = (made.path / "all.gguf").read_bytes()
        for number, half in enumerate((content[:3_000_000], content[3_000_000:]), 1):
            (folder / f"q.gguf.part{number}of2").write_bytes(half)
        self.home = made.path / "home"
        self.serving = serve({REPO: folder})

    def __enter__(self) -> dict[str, str]:
        hub = self.serving.__enter__()
        return {
            "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(self.home), "MTPFORGE_RETRY_WAIT": "0.02",
        }  # fmt: skip

    def __exit__(self, *raised: object) -> None:
        self.serving.__exit__(*raised)


# ── full disks ──

UNSUPPORTED = faults.unsupported()
needs_mount = pytest.mark.skipif(bool(UNSUPPORTED), reason=f"full disks: {UNSUPPORTED}")
PAGE = 4096
BEFORE = [0, PAGE, 16 * PAGE] if ALL else [PAGE]
SMALL = ("stamp", "text", "materials", "summary", "listing")
"""What they write fits into a few pages."""


def check_full(first: Outcome, second: Outcome, writer: Writer) -> None:
    """The first run says what is needed and free, and leaves nothing; the second succeeds."""
    assert first.code == 1
    assert "/in/" in first.line  # perhaps a scratch file beside it
    assert writer.several or writer.name in first.line
    assert "disk" in first.line and "needs " in first.line and " are free" in first.line
    assert "truncated" not in first.line.partition(" (")[0] and "too short" not in first.line
    assert [name for name in first.left if not _is_kept(name, writer)] == []
    assert second.code == 0, second.errors
    assert any(name.startswith(writer.name) for name in second.left)
    made = [name for name in second.left if not name.startswith("environment/")]
    assert [name for name in made if "part" in name and "part" not in writer.name] == []


def _is_kept(name: str, writer: Writer) -> bool:
    path = Path(name)
    small = writer.resumes and path.name != writer.name and not path.name.endswith(".gguf")
    return (path.name.startswith(".") and writer.resumes) or small


@needs_mount
@pytest.mark.parametrize("leave", BEFORE)
@pytest.mark.parametrize("name", WRITERS)
def test_a_disk_that_is_full_before(made: Made, tmp_path: Path, name: str, leave: int) -> None:
    writer = writer_of(name)
    folder = tmp_path / "disk"
    command = writer.command(made, folder / "in" / writer.name)
    check_full(*faults.on_a_full_disk(folder, 0 if name in SMALL else leave, command), writer)


# A plan holds for the programs that it was made with, so the others cannot be replaced.
CALLING = ("quantize", "imatrix", "logits", "inject")
MEANWHILE = [0, PAGE, 8 * PAGE, 16 * PAGE] if ALL else [8 * PAGE]


@needs_mount
@pytest.mark.parametrize("leave", MEANWHILE)
@pytest.mark.parametrize("name", CALLING)
def test_a_disk_that_fills_while_a_program_writes(
    made: Made, tmp_path: Path, name: str, leave: int
) -> None:
    """llama.cpp's streams tell no reason, and llama-imatrix ends with exit code 0."""
    writer = WRITERS[name]
    folder = tmp_path / "disk"
    programs = faults.filling(made.bin, tmp_path / "bin", folder, leave)
    command = writer.command(Made(made.path, programs), folder / "in" / writer.name)
    check_full(*faults.on_a_full_disk(folder, faults.SIZE, command), writer)


# ── system calls ──

SAID = {
    "ENOSPC": "the disk is full",
    "EDQUOT": "over your disk quota",
    "EFBIG": "larger than its file system",
    "EIO": "the disk or its connection fails",
    "EROFS": "read-only",
    "EACCES": "Permission denied",
    "ENAMETOOLONG": "the name is too long",
}
WRITING = ("ENOSPC", "EDQUOT", "EFBIG", "EIO")
ERRORS = {
    "openat": ("ENOSPC", "EIO", "EROFS", "EACCES", "ENAMETOOLONG"),
    "rename": ("ENOSPC", "EIO", "EROFS", "EACCES", "EDQUOT"),
    "fsync": ("EIO", "ENOSPC", "EDQUOT"),
}
FAILING = [name for name in WRITERS if name not in ("publish", "piece")] if ALL else [
    "convert", "split", "imatrix", "fetch", "stamp"
]  # fmt: skip


@pytest.mark.skipif(not faults.has_strace(), reason="system calls: no strace here")
@pytest.mark.parametrize("name", FAILING)
def test_a_system_call_fails(
    made: Made, tmp_path: Path, name: str, record_property: Callable[[str, object], None]
) -> None:
    writer = writer_of(name)
    out = tmp_path / "out" / writer.name
    out.parent.mkdir()
    paths = [out, out.with_name(f".{out.name}.part")]
    if name == "split":
        paths += [paths[1] / f"x-0000{number}-of-00003.gguf" for number in (1, 2, 3)]
        paths += [path.with_name(f".{path.name}.part") for path in paths[2:]]
    log = tmp_path / "strace.log"
    command = writer.command(made, out)
    counts = faults.count_calls(command, paths, log)
    expected = _content(out)
    tried = 0
    for fault in _faults(dict(counts)):
        shutil.rmtree(out.parent)
        out.parent.mkdir()
        outcome = faults.with_fault(command, paths, log, fault)
        if "(INJECTED)" not in log.read_text(errors="replace"):
            continue
        tried += 1
        if outcome.code == 0:  # the file was whole: only a look into it failed
            assert writer.resumes and _content(out) == expected, fault
            continue
        _check_fault(outcome, fault, out, writer)
        _check_left(out, writer, expected)
    assert tried >= 4
    print(json.dumps({"writer": name, "faults": tried}))
    shutil.rmtree(out.parent)
    out.parent.mkdir()
    again = faults.with_fault(command, paths, log, ("fsync", "EIO", 65535))
    assert again.code == 0 and _content(out) == expected


@pytest.mark.skipif(not faults.has_strace(), reason="system calls: no strace here")
@pytest.mark.parametrize("call", ["openat", "read"])
@pytest.mark.parametrize("name", ["convert", "quantize"])
def test_a_source_cannot_be_read(made: Made, tmp_path: Path, name: str, call: str) -> None:
    """The disk of the source fails, so it is neither damaged nor the output's disk that fails."""
    source = {"convert": DENSE / SHARD, "quantize": made.path / "all.gguf"}[name]
    out = tmp_path / "x.gguf"
    command = WRITERS[name].command(made, out)
    outcome = faults.with_fault(command, [source], tmp_path / "log", (call, "EIO", 1))
    assert outcome.code == 1 and outcome.line.startswith(f"error: {source}: {SAID['EIO']}")
    assert not out.exists() and not out.with_name(".x.gguf.part").exists()


def _faults(counts: dict[str, int]) -> Iterator[tuple[str, str, int]]:
    """The first and last of each kind of call; or all calls, the first and last with all errors."""
    for call, count in counts.items():
        kinds = ERRORS.get(call, WRITING)
        ends = {1, count}
        for place in range(1, count + 1) if ALL else sorted(ends):
            chosen = kinds if ALL and place in ends else (kinds[place % len(kinds)],)
            yield from ((call, kind, place) for kind in chosen)


def _check_fault(outcome: Outcome, fault: tuple[str, str, int], out: Path, writer: Writer) -> None:
    """One line about the file, with the right reason; nothing under a final name."""
    assert outcome.code == 1, (fault, outcome)
    message = outcome.line
    assert out.name in message, (fault, message)
    if "not written whole" in message:  # a program of llama.cpp, and the disk has room
        assert writer.program and "needs " in message and " are free" in message
    else:
        assert SAID[fault[1]] in message, (fault, message)
        others = [text for kind, text in SAID.items() if kind != fault[1]]
        assert not [text for text in others if text in message], (fault, message)


def _check_left(out: Path, writer: Writer, expected: dict[str, bytes]) -> None:
    """Nothing is left; but what was fetched can be whole, and fail when it is read again."""
    left = [path for path in out.parent.iterdir() if not _is_kept(path.name, writer)]
    whole = [
        path for path in left if path.is_file() and expected.get(path.name) == path.read_bytes()
    ]
    assert [path for path in left if path not in whole or not writer.resumes] == []


def _content(out: Path) -> dict[str, bytes]:
    files = sorted(out.iterdir()) if out.is_dir() else [out]
    return {path.name: path.read_bytes() for path in files}
