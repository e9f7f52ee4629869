"""A private copy of the repository, in which tests run real Snakemake on two dense variants."""

import copy
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import yaml
from conftest import ROOT

CONFIG = {
    "threads": 1,  # as is enough for so small a model, and quicker where others work too
    "models": {
        "tiny-qwen3.5": {
            "source": {"path": "tests/checkpoints/tiny-qwen3.5"},
            "tokenizer_pre": "qwen35",
            "prompts": "tests/checkpoints/tiny-qwen3.5/prompts",
            "variants": {"BF16": {}, "Q8_0": {}},
        }
    },
}


class Repository:
    """A copy of the workflow that uses the toolchain of the real repository."""

    def __init__(self, path: Path, programs: Path) -> None:
        self.path = path
        path.mkdir()
        for name in ("Snakefile", "workflow", "profiles", "envs"):
            source = ROOT / name
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, path / name, ignore=ignore) if source.is_dir() else shutil.copy(
                source, path / name
            )
        shutil.copytree(
            ROOT / "tests/checkpoints/tiny-qwen3.5", path / "tests/checkpoints/tiny-qwen3.5"
        )
        self.config = {
            **copy.deepcopy(CONFIG),
            "toolchain": {"llama_cpp": {"bin_dir": str(programs)}},
        }
        self.write_config()

    def write_config(self) -> None:
        (self.path / "config.yaml").write_text(yaml.safe_dump(self.config))

    def snakemake(
        self, *arguments: str, target: str = "all", **environment: str
    ) -> "subprocess.CompletedProcess[str]":
        command = [sys.executable, "-m", "snakemake", "--cores", "2", target, *arguments]
        return subprocess.run(
            command,
            cwd=self.path,
            capture_output=True,
            text=True,
            timeout=600,
            env={**os.environ, **environment},
        )

    def pending(self, target: str = "all") -> Counter[str]:
        """Number of jobs of each rule that a run would have, without `all`."""
        done = self.snakemake("--dry-run", target=target)
        assert done.returncode == 0, done.stderr
        table = re.search(
            r"Job stats:\njob +count\n-+ +-+\n(.*?)\ntotal ", done.stdout + done.stderr, re.DOTALL
        )
        rows = [line.split() for line in table[1].splitlines()] if table else []
        return Counter({rule: int(count) for rule, count in rows if rule != "all"})


def described(files: int) -> dict[str, int]:
    """The jobs that describe a model again after this many of its files changed."""
    return {"provenance": files, "card": 1, "sums": 1} if files else {"card": 1, "sums": 1}
