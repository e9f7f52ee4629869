"""SIGKILL at random points of all stages: the same command goes on, and makes the same bytes.

The short form kills a few jobs of a local build. `make test-crash` kills a build that fetches,
injects, splits, measures and publishes, at KILLS points; SEED chooses other ones.
"""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import CHECKPOINTS, ROOT, SCRIPTS
from hub import COMMIT, Hub, serve
from mtpforge.run_owner import RUN_LOCK, Owner
from repository import CONFIG, Repository

MODEL = "tiny-qwen3.5"
SOURCE = {"repo": f"Owner/{MODEL}", "revision": COMMIT}
HEAD_ONLY = {**SOURCE, "repo": f"Other/{MODEL}"}
KILLS = int(os.environ.get("KILLS", "0"))
SEED = int(os.environ.get("SEED", "1"))
LONGEST = 1.5 if KILLS else 0.3  # seconds from the start of a job to the kill; jobs can be short

STAGES = {
    "graph": "",  # before the first job
    "program": "toolchain: llama-",
    "toolchain": "toolchain: describe ",
    "resolve": "list ",
    "fetch": "fetch (?!only ).* of ",
    "fetch_head": "fetch only the head",
    "local_files": "record the content of ",
    "convert": ".*: convert the checkpoint",
    "materials": ".*: list the checkpoint's files",
    "recipe": ".*: recipe of",
    "imatrix": ".*: importance matrix",
    "coverage": ".*: coverage of",
    "reference_logits": ".*: BF16 logits",
    "acceptance": ".*: acceptance of",
    "plan_types": ".*: plan ",
    "piece": ".*: quantize .*, piece",
    "quantize": r".*: quantize \S+ \(",
    "inject": ".*: inject",
    "verify": r".*: verify \S+$",
    "verify_split": ".*: verify .* and split it",
    "measuring": ".*: record the measurement settings",
    "measure": ".*: measure ",
    "provenance": ".*: state the provenance",
    "card": ".*: write the model card",
    "summary": "summarize",
    "sums": ".*: write SHA256SUMS",
    "publish_imatrix": ".*: put the importance matrix",
    "publish": "upload",
}
SHORT = ("graph", "convert", "quantize", "verify")
# Speeds differ from run to run, and so does whatever shows them or has their sha256.
MEASURED = re.compile(r"measure/.*|[^/]+/(README\.md|SHA256SUMS)|summary\.md")

START_OR_END = re.compile(r"\d\d:\d\d:\d\d (start|done|FAILED) +(.*)")

Content = dict[str, bytes]


class Kills:
    """Runs one command in fresh copies of a repository, and kills it."""

    def __init__(self, folder: Path, config: dict[str, Any], targets: tuple[str, ...]) -> None:
        self.folder = folder
        self.config = config
        self.command = [sys.executable, "-m", "snakemake", "--cores", "1", *targets]
        self.environment = dict(os.environ)
        self.random = random.Random(SEED)
        self.killed: Counter[str] = Counter()
        self.expected: Content = {}
        self.hidden: set[str] = set()

    def fresh(self, name: str) -> Repository:
        copy = Repository(self.folder / name, ROOT / "resources/toolchain/bin")
        shutil.copy(ROOT / "tests/checkpoints/held-out.txt", copy.path)
        copy.config["models"] = self.config
        copy.write_config()
        return copy

    def undisturbed(self) -> None:
        copy = self.fresh("undisturbed")
        self.finish(copy)
        self.expected = content(copy)
        self.hidden = hidden(copy)
        shutil.rmtree(copy.path)

    def start(self, copy: Repository) -> "subprocess.Popen[bytes]":
        with (copy.path / "run.log").open("wb") as log:
            return subprocess.Popen(
                self.command,
                cwd=copy.path,
                env=self.environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def kill(self, copy: Repository, stages: set[str]) -> str | None:
        """Start the command, and kill it some time after a job of one of these stages began.

        Returns the stage; None if the command ended before.
        """
        run = self.start(copy)
        while not (begun := stages & {*running(copy)}):
            if run.poll() is not None:
                assert run.returncode == 0, output(copy)
                return None
            time.sleep(0.02)
        time.sleep(self.random.uniform(0, LONGEST))
        os.killpg(run.pid, signal.SIGKILL)
        if run.wait() == 0:
            return None
        self.killed[running(copy)[0]] += 1  # perhaps a later stage
        print(f"killed in {running(copy)[0]}", flush=True)
        self.check(copy, content(copy))
        return begun.pop()

    def kill_often(self, copy: Repository, stages: Iterable[str], limit: int) -> None:
        """Kill the command once in each stage, in the order in which they come."""
        left = {*stages}
        while left and self.killed.total() < limit and (stage := self.kill(copy, left)):
            left.remove(stage)

    def check(self, copy: Repository, found: Content) -> None:
        """No final name has wrong content."""
        wrong = [name for name, data in found.items() if self.expected.get(name, data) != data]
        assert not wrong, f"{wrong}\n{output(copy)}"

    def finish(self, copy: Repository) -> None:
        run = self.start(copy)
        assert run.wait(timeout=900) == 0, output(copy)

    def finished(self, copy: Repository) -> None:
        """Let the command finish: every result is there, right, and nothing else is."""
        killed = Owner.parse((copy.path / ".snakemake" / RUN_LOCK).read_text())
        self.finish(copy)
        if killed:
            assert f"Taking over from a run that was killed: process {killed.pid} " in output(copy)
        found = content(copy)
        self.check(copy, found)
        assert found.keys() == self.expected.keys()
        assert hidden(copy) == self.hidden
        assert Owner.parse((copy.path / ".snakemake" / RUN_LOCK).read_text()) is None
        for folder in {path.parent for path in copy.path.glob("results/*/SHA256SUMS")}:
            command = [sys.executable, SCRIPTS / "check_results.py", folder]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr


def output(copy: Repository) -> str:
    return (copy.path / "run.log").read_text(errors="replace")


def running(copy: Repository) -> list[str]:
    """The stages whose jobs run, by what is printed; `graph` before the first, or between two."""
    found = [START_OR_END.match(line) for line in output(copy).splitlines()]
    begun: list[str] = []
    for event, label in [(match[1], match[2]) for match in found if match]:
        if event == "start":
            begun.append(label)
        else:
            begun = [each for each in begun if not label.startswith(each)]
    return [stage_of(label) for label in begun] or ["graph"]


def stage_of(label: str) -> str:
    return next(name for name, text in STAGES.items() if text and re.match(text, label))


def files(copy: Repository) -> Iterator[Path]:
    for top in ("results", "resources"):
        yield from (path for path in sorted((copy.path / top).rglob("*")) if path.is_file())


def hidden(copy: Repository) -> set[str]:
    """Snakemake's time stamps, the digests of a head's pieces, and whatever a kill left."""
    names = {path.relative_to(copy.path).as_posix() for path in files(copy)}
    return {name for name in names if "/." in name}


def content(copy: Repository) -> Content:
    """All files with final names, but not those that have speeds."""
    found = {path.relative_to(copy.path).as_posix(): path for path in files(copy)}
    # Pieces of other batches, and records of the files of this copy, with their times.
    passing = re.compile(r"/\.|/pieces/|/local/.*/")
    kept = [name for name in found if not passing.search(name)]
    short = {name: name.removeprefix("results/") for name in kept}
    return {
        name: found[name].read_bytes()
        for name in kept
        if not MEASURED.fullmatch(short[name])
        and not MEASURED.fullmatch(short[name].partition("/")[2])
    }


def test_a_killed_build_goes_on(tmp_path: Path, toolchain: Path) -> None:
    model = {**CONFIG["models"][MODEL], "variants": {"Q4_K_M": {}}}
    kills = Kills(tmp_path, {MODEL: model}, (f"results/{MODEL}/{MODEL}-Q4_K_M.gguf",))
    kills.undisturbed()
    copy = kills.fresh("killed")
    kills.kill_often(copy, SHORT, limit=len(SHORT))
    kills.finished(copy)
    assert kills.killed.total() >= len(SHORT) - 1  # a kill can come after the last job


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    """A Hub with the checkpoint and a base without a head."""
    new = tmp_path / "new"
    (new / "objects").mkdir(parents=True)
    ignore = shutil.ignore_patterns("prompts")
    remote = Path(shutil.copytree(CHECKPOINTS / MODEL, tmp_path / "remote", ignore=ignore))
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    # Two repositories: how far a head alone is trusted depends on what is fetched before.
    repositories = {SOURCE["repo"]: remote, HEAD_ONLY["repo"]: remote, "They/base": theirs}
    with serve(repositories, new) as running_hub:
        yield running_hub


def everything(hub: Hub, folder: Path) -> Kills:
    """A build with all stages."""
    plain = {**CONFIG["models"][MODEL], "source": SOURCE}
    measure = {"n_max": [1], "repeats": 1, "text": "held-out.txt", "chunks": 2}
    mine = {
        **plain,
        "measure": measure,
        "variants": {
            "IQ4_XS": {"imatrix": {"text": "held-out.txt"}, "pieces": 2},
            "Q8_0": {"split": "2M"},
        },
        "publish": {"repo": "Owner/mine-GGUF"},
    }
    base = {"repo": "They/base", "file": "base-Q4_0.gguf", "revision": COMMIT}
    theirs = {
        **plain,
        "source": HEAD_ONLY,
        "variants": {"theirs": {"base": base}},
        "publish": {"repo": "Owner/their-GGUF"},
    }
    kills = Kills(folder, {"mine": mine, "theirs": theirs}, ("all", "publish"))
    kills.environment |= {
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": "hf_test",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(folder / "home"),
    }
    return kills


def make_base(kills: Kills, theirs: Path) -> None:
    copy = kills.fresh("base")
    model = {**CONFIG["models"][MODEL], "variants": {"Q4_0": {"head": "none"}}}
    copy.config["models"] = {MODEL: model}
    copy.write_config()
    target = f"results/{MODEL}/work/quantized/Q4_0.gguf"
    done = copy.snakemake("--cores", "1", target=target)
    assert done.returncode == 0, done.stderr
    shutil.copy(copy.path / target, theirs / "base-Q4_0.gguf")
    shutil.rmtree(copy.path)


@pytest.mark.skipif(not KILLS, reason="takes 20 minutes: `make test-crash`")
def test_kills_at_all_stages(hub: Hub, tmp_path: Path, toolchain: Path) -> None:
    kills = everything(hub, tmp_path)
    make_base(kills, hub.repositories["They/base"])
    kills.undisturbed()
    forget_uploads(hub)
    while kills.killed.total() < KILLS:
        copy = kills.fresh(f"killed-{kills.killed.total()}")
        kills.kill_often(copy, STAGES, limit=KILLS)
        kills.finished(copy)
        check_uploads(hub, copy)
        forget_uploads(hub)
        shutil.rmtree(copy.path)
    print(f"\n{kills.killed.total()} of {KILLS} kills survived, seed {SEED}")
    for stage in STAGES:
        print(f"| {stage} | {kills.killed[stage]} |")
    assert len(kills.killed) > len(STAGES) / 2


def forget_uploads(hub: Hub) -> None:
    """Forget what was uploaded, so that the next build uploads all of it again."""
    for name in [name for name in hub.repositories if name.endswith("-GGUF")]:
        shutil.rmtree(hub.repositories.pop(name))
    assert hub.new
    shutil.rmtree(hub.new / "objects")
    (hub.new / "objects").mkdir()
    hub.digests.clear()


def check_uploads(hub: Hub, copy: Repository) -> None:
    """What was published is what was built."""
    for model, name in {"mine": "Owner/mine-GGUF", "theirs": "Owner/their-GGUF"}.items():
        folder = copy.path / "results" / model
        listed = [line.split()[1] for line in (folder / "SHA256SUMS").read_text().splitlines()]
        for file in [*listed, "SHA256SUMS"]:
            assert (hub.repositories[name] / file).read_bytes() == (folder / file).read_bytes()
