"""The three ways to start in the README: each by its commands alone, with a Hub on loopback."""

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from conftest import CHECKPOINTS, ROOT, Run
from hub import COMMIT, Hub, serve
from mtpforge.gguf import head, reader
from mtpforge.verify.report import Report
from pages import blocks
from repository import Repository

SOURCE, BASE, TARGET = "Qwen/Qwen3.5-4B", "OWNER/NAME-GGUF", "OWNER/NAME-MTP-GGUF"
QUANT, INJECT, PUBLISH = [
    text.splitlines() for language, text in blocks(ROOT / "README.md") if language == "sh"
][:3]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory, toolchain: Path, run: Run) -> Iterator[Hub]:
    folder = tmp_path_factory.mktemp("hub")
    (folder / "objects").mkdir()
    base = folder / "base" / "quants" / "Qwen3.5-4B-Q4_K_M.gguf"
    base.parent.mkdir(parents=True)
    trunk = folder / "trunk.gguf"
    options = ("--part", "trunk", "--tokenizer-pre", "qwen35", "--out", trunk)
    assert run("convert.py", CHECKPOINTS / "tiny-qwen3.5", *options).returncode == 0
    assert run("quantize.py", trunk, "--type", "Q4_K_M", "--out", base).returncode == 0
    repositories = {SOURCE: CHECKPOINTS / "tiny-qwen3.5", BASE: folder / "base"}
    with serve(repositories, folder) as running:
        yield running


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory, toolchain: Path, of_run: Path) -> Repository:
    """With the environment that `make` makes, which lacks what only the tests need."""
    copy = Repository(tmp_path_factory.mktemp("stories") / "repository", toolchain)
    shutil.copy(ROOT / "Makefile", copy.path)
    (copy.path / ".venv").symlink_to(of_run.parent)
    copy.config["threads"] = 1  # two threads of llama-server take long on a busy machine
    copy.write_config()
    return copy


def make(
    line: str, copy: Repository, hub: Hub, **variables: str
) -> "subprocess.CompletedProcess[str]":
    """Run a line of the README that begins with make, without its set-up."""
    program, *words = shlex.split(line, comments=True)
    assert program == "make"
    environment = {
        **os.environ, "HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_token",
        "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(copy.path / "home"), "TOKENIZER_PRE": "qwen35",
    }  # fmt: skip
    command = ["make", "-o", "setup", *words, *(f"{k}={v}" for k, v in variables.items())]
    return subprocess.run(
        command, cwd=copy.path, env=environment, capture_output=True, text=True,
        stdin=subprocess.DEVNULL, timeout=900,
    )  # fmt: skip


def test_nothing_is_built_without_an_answer(copy: Repository, hub: Hub) -> None:
    done = make(QUANT[0], copy, hub)
    assert done.returncode == 2 and "set YES=1" in done.stderr
    assert re.findall(r"^(\w+) {2,}\S", done.stdout, re.MULTILINE) == ["fetch", "disk", "time"]
    assert list((copy.path / "config.d").iterdir()) == []
    assert not (copy.path / "results").exists()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("make quant REPO={hub}/Qwen/Qwen3.5-4B/tree/main TYPE=iq4_xs", "set YES=1"),
        ("make quant REPO=Qwen/Qwen3.5-4B@main TYPE=IQ4XS", "did you mean IQ4_XS?"),
        ("make quant REPO=Qwen3.5-4B TYPE=IQ4_XS", "is not a repository: write OWNER/NAME"),
        ("make quant REPO=./ckpt/ TYPE=IQ4_XS", "./ckpt/: no such folder"),
        ("make quant REPO=ckpt/ TYPE=IQ4_XS", "ckpt/: no such folder"),
        ("make quant REPO=Qwen/Qwen3.5-4B TYPE=q4_k_l", "set YES=1"),
        (
            "make inject BASE=OWNER/NAME-GGUF:q4km SOURCE=Qwen/Qwen3.5-4B",
            "it has Q4_K_M; did you",
        ),
    ],
)
def test_input_as_people_write_it_is_taken_or_answered(
    line: str, said: str, copy: Repository, hub: Hub
) -> None:
    done = make(line.replace("{hub}", hub.endpoint), copy, hub)
    assert done.returncode == 2 and said in done.stderr, done.stdout + done.stderr
    assert list((copy.path / "config.d").glob("*")) == []


def test_one_command_makes_a_quant_with_a_head(copy: Repository, hub: Hub) -> None:
    (line,) = QUANT
    done = make(line, copy, hub, YES="1", PROFILE="lean")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "make publish" not in done.stdout + done.stderr
    report = Report.read(copy.path / "results/qwen3.5-4b/reports/Qwen3.5-4B-IQ4_XS.json")
    assert report.accepted and report.head == "Q8_0"
    entry = yaml.safe_load((copy.path / "config.d/qwen3.5-4b.yaml").read_text())
    assert entry["models"]["qwen3.5-4b"]["source"] == {"repo": SOURCE, "revision": COMMIT}
    again = make(line, copy, hub, PROFILE="lean")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "\nalready built: results/qwen3.5-4b/Qwen3.5-4B-IQ4_XS.gguf\n" in again.stdout


def test_one_command_puts_a_head_into_a_quant(copy: Repository, hub: Hub) -> None:
    (line,) = INJECT
    done = make(line, copy, hub, YES="1")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "fetch  nothing" not in done.stdout
    made = copy.path / "results/qwen3.5-4b-injected/Qwen3.5-4B-Q4_K_M.gguf"
    base = hub.repositories[BASE] / "quants" / made.name
    assert head.trunk_digests(reader.read(made)) == head.trunk_digests(reader.read(base))
    assert Report.read(made.parent / "reports" / f"{made.stem}.json").accepted
    table = (copy.path / "results/summary.md").read_text()
    assert made.name in table and "Qwen3.5-4B-IQ4_XS.gguf" in table  # of the run before
    output = done.stdout + done.stderr
    assert f"-m results/{made.relative_to(copy.path / 'results')} " in output
    assert "Config file" not in output and "recipe of" not in output


def test_two_commands_publish_a_repository(copy: Repository, hub: Hub) -> None:
    """With a few of the preset's types, one of which the first story made without a matrix."""
    written, uploaded = PUBLISH
    assert "PRESET=publisher" in written
    for line in (f"{written} TYPES='Q8_0 IQ4_XS'", uploaded):
        done = make(line, copy, hub)
        assert done.returncode == 0, done.stdout + done.stderr
    output = done.stdout + done.stderr
    assert output.count(f"{TARGET} (private): uploaded ") == 1
    end = output.partition(" jobs done in ")[2]
    assert "| Qwen3.5-4B-IQ4_XS.gguf " in end and f"uploaded  {hub.endpoint}/{TARGET}\n" in end
    names = {path.name for path in hub.repositories[TARGET].glob("*")}
    assert {name for name in names if name.endswith(".gguf")} == {
        "Qwen3.5-4B-Q8_0.gguf", "Qwen3.5-4B-IQ4_XS.gguf", "Qwen3.5-4B-imatrix.gguf"
    }  # fmt: skip
    assert {"README.md", "SHA256SUMS", "reports", "measure", "provenance"} <= names


def test_a_plan_of_what_is_built_has_nothing_to_do(copy: Repository, hub: Hub) -> None:
    done = make("make plan MODELS=qwen3.5-4b", copy, hub)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "to do: 0 of " in done.stdout
