"""What the README shows is what Snakemake and the build say."""

import re
import subprocess
import sys
from pathlib import Path

from conftest import ROOT
from mtpforge.llama_cpp import architectures


def test_the_graph_of_the_rules_is_snakemakes() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "snakemake", "--rulegraph", "mermaid-js"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    names = dict(re.findall(r"(id\d+)\[(\w+)\]", done.stdout))
    drawn = {(names[a], names[b]) for a, b in re.findall(r"(id\d+) --> (id\d+)", done.stdout)}
    written = set(
        re.findall(r"^  (\w+) --> (\w+)$", (ROOT / "README.md").read_text(), re.MULTILINE)
    )
    assert drawn and written <= drawn and _paths(written) == _paths(drawn)


def _paths(edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """All pairs of which the second is reached from the first."""
    longer = edges | {(a, d) for a, b in edges for c, d in edges if b == c}
    return edges if longer == edges else _paths(longer)


def test_the_table_of_other_architectures_is_the_list() -> None:
    rows = re.findall(
        r"^\| (\w+(?:, \w+)*)(?: \(.*\))? \| ([\w-]+) \| (yes|no|where)",
        (ROOT / "README.md").read_text(),
        re.MULTILINE,
    )
    written = {
        name: (kind, drafts != "no") for names, kind, drafts in rows for name in names.split(", ")
    }
    assert written == {
        name: (entry.gguf, entry.drafts) for name, entry in architectures.ARCHITECTURES.items()
    }


def test_the_table_of_results_lists_what_all_makes(built: Path) -> None:
    """Sizes and types; acceptance may differ by a token between processors, and speed is each machine's own."""
    rows = [
        line.rsplit("|", 4)[0] for line in (built / "results/summary.md").read_text().splitlines()
    ]
    assert "\n".join(rows[2:]) and all(row in (ROOT / "README.md").read_text() for row in rows)
