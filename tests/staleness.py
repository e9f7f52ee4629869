"""Change each kind of input, run, and compare all results with those of a build from nothing.

`make test-staleness` runs all changes and writes the table of docs/robustness.md; names of changes
as arguments run these alone. Each takes two builds of a tiny model.
"""

import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from conftest import BIN, ROOT
from repository import Repository

MODEL = "tiny-qwen3.5"
CHECKPOINT = f"tests/checkpoints/{MODEL}"
PAGE = ROOT / "docs/robustness.md"
BEGIN, END = "<!-- what reruns: begin -->", "<!-- what reruns: end -->"
Change = Callable[[Repository], None]


def append(path: str, text: str = "\n# a comment\n") -> Change:
    """Append a text to each file that a pattern finds."""

    def change(repository: Repository) -> None:
        for file in repository.path.glob(path):
            file.write_text(file.read_text() + text)

    return change


def configure(*keys: str, value: object) -> Change:
    """Set a key of the model."""

    def change(repository: Repository) -> None:
        entry = repository.config["models"][MODEL]
        for key in keys[:-1]:
            entry = entry.setdefault(key, {})
        entry[keys[-1]] = value
        repository.write_config()

    return change


def touch(repository: Repository) -> None:
    """Give every file another time, in an order of their own."""
    files = (path for path in repository.path.rglob("*") if ".snakemake" not in path.parts)
    for path in sorted(files, key=lambda path: path.name[::-1]):
        path.touch()


def flip(repository: Repository) -> None:
    """Change one weight of the checkpoint's largest shard."""
    shards = (repository.path / CHECKPOINT).glob("*.safetensors")
    shard = max(shards, key=lambda path: path.stat().st_size)
    data = bytearray(shard.read_bytes())
    data[-2] ^= 1
    shard.write_bytes(data)


def remove(pattern: str) -> Change:
    """Delete what a pattern finds."""

    def change(repository: Repository) -> None:
        for path in list(repository.path.glob(pattern)):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    return change


def add_model(repository: Repository) -> None:
    """Add a second model."""
    model = {**repository.config["models"][MODEL], "variants": {"Q8_0": {}}}
    repository.config["models"] = {**repository.config["models"], "second": model}
    repository.write_config()


def reorder(repository: Repository) -> None:
    """Write the configuration in another order, with comments."""
    repository.config = dict(reversed(repository.config.items()))
    repository.write_config()
    append("config.yaml")(repository)


NOTHING: dict[str, Change] = {
    "no change": lambda repository: None,
    "time of every file": touch,
    "order and comments of `config.yaml`": reorder,
    "`.snakemake` deleted": remove(".snakemake"),
    "a program that no rule of `all` runs": append("workflow/scripts/publish.py"),
}
CHANGES: dict[str, Change] = {
    **NOTHING,
    "a weight of the checkpoint": flip,
    "the checkpoint's `generation_config.json`": append(
        f"{CHECKPOINT}/generation_config.json", "\n"
    ),
    "a prompt": append(f"{CHECKPOINT}/prompts/prose.txt", "And then?\n"),
    "the text of an importance matrix": append("text.txt", "One more line.\n"),
    "the card's template": append("workflow/templates/card.md", "\nA line.\n"),
    "a comment in `envs/llama.cpp.txt`": append("envs/llama.cpp.txt"),
    "`server.py`": append("workflow/scripts/mtpforge/llama_cpp/server.py"),
    "`llama_quantize.py`": append("workflow/scripts/mtpforge/quantize/llama_quantize.py"),
    "`inject.py`": append("workflow/scripts/inject.py"),
    "`verify.py`": append("workflow/scripts/verify.py"),
    "`tokenizer.py`": append("workflow/scripts/mtpforge/convert/tokenizer.py"),
    "`name`": configure("name", value="Other"),
    "`min_acceptance`": configure("min_acceptance", value=0.2),
    "`max_acceptance_drop`": configure("max_acceptance_drop", value=0.3),
    "`publish`": configure("publish", value={"repo": "Owner/Name"}),
    "`sidecar`": configure("sidecar", value="Q8_0"),
    "`split`": configure("split", value="2M"),
    "a variant's `head`": configure("variants", "Q8_0", "head", value="Q6_K"),
    "a variant's `tensors`": configure("variants", "Q8_0", "tensors", value={"ffn": "Q6_K"}),
    "a variant's `base`": configure("variants", "mine", "base", "type", value="Q4_1"),
    "a variant more": configure("variants", "Q5_0", value={}),
    "a variant fewer": lambda repository: configure("variants", value={"Q8_0": {}})(repository),
    "a model more": add_model,
    "a report deleted": remove(f"results/{MODEL}/reports/*-Q8_0.json"),
    "a statement of provenance deleted": remove(f"results/{MODEL}/provenance/*-Q8_0.json"),
    "the card deleted": remove(f"results/{MODEL}/README.md"),
    "a verified file deleted": remove(f"results/{MODEL}/*-Q8_0.gguf"),
}


@dataclass(frozen=True)
class Outcome:
    """What a change did: the jobs that ran, and what was wrong with it."""

    jobs: dict[str, int]
    problems: list[str]


def main() -> int:
    """Try the named changes, or all of them."""
    wanted = sys.argv[1:] or list(CHANGES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        before = make(folder / "before")
        build(before)
        found = {}
        for change in wanted:
            found[change] = attempt(change, before, folder)
            print(f"{change}: {found[change]}", flush=True)
    right = sum(not outcome.problems for outcome in found.values())
    print(f"{right} of {len(found)} changes right")
    if not sys.argv[1:]:
        write(found, right)
    return right < len(found)


def make(path: Path) -> Repository:
    """A repository with a converted, a quantized, an injected and a low-bit file."""
    repository = Repository(path, BIN)
    shutil.copy(ROOT / "tests/checkpoints/held-out.txt", path / "text.txt")
    variants = {"BF16": {}, "Q8_0": {}, "mine": {"base": {"type": "Q4_0"}}}
    variants |= {"IQ2_S": {"imatrix": {"text": "text.txt"}}}
    model = {**repository.config["models"][MODEL], "variants": variants}
    repository.config = {**repository.config, "models": {MODEL: model}}
    repository.write_config()
    return repository


def attempt(change: str, before: Repository, folder: Path) -> Outcome:
    """Change a copy of the built repository, run it, and compare it with a build from nothing."""
    changed, fresh = make(folder / "changed"), make(folder / "fresh")
    try:
        shutil.rmtree(changed.path)
        shutil.copytree(before.path, changed.path, symlinks=True)  # with the same times
        CHANGES[change](changed)
        jobs = dict(changed.pending())
        problems = ["reruns jobs"] if change in NOTHING and jobs else []
        build(changed)
        CHANGES[change](fresh)
        build(fresh)
        problems += differences(changed, fresh)
        problems += ["is not done after a run"] if changed.pending() else []
        return Outcome(jobs, problems)
    finally:
        shutil.rmtree(changed.path)
        shutil.rmtree(fresh.path)


def build(repository: Repository) -> None:
    """Build everything."""
    done = repository.snakemake("--cores", "1")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def differences(changed: Repository, fresh: Repository) -> list[str]:
    """What the listed files of all models, and the lists, differ in."""
    found = []
    for sums in fresh.path.glob("results/*/SHA256SUMS"):
        other = changed.path / sums.relative_to(fresh.path)
        ours, theirs = other.read_text().splitlines(), sums.read_text().splitlines()
        found += [f"differs: {line[66:]}" for line in sorted({*ours} ^ {*theirs})]
    return found


def write(found: dict[str, Outcome], right: int) -> None:
    """Write the table of the page."""
    rows = ["| change | jobs that run |", "| --- | --- |"]
    for change, outcome in found.items():
        jobs = ", ".join(f"{rule} {count}" for rule, count in sorted(outcome.jobs.items()))
        rows.append(f"| {change} | {jobs or 'none'} |")
    page = PAGE.read_text()
    start, rest = page.split(BEGIN)
    tried = f"{right} of {len(found)} changes left what a build from nothing makes."
    PAGE.write_text("\n\n".join([start + BEGIN, tried, "\n".join(rows), END + rest.split(END)[1]]))


if __name__ == "__main__":
    sys.exit(main())
