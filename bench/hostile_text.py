"""Print the worst CPU time and memory of each kind of hostile text, and how many inputs it has.

Each input is read by a fork of this process, which has imported all programs already: the memory
includes that of Python and its packages, the time does not include their start.

example: python bench/hostile_text.py
"""

import argparse
import importlib
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "workflow/scripts"), str(ROOT / "tests")]

import hostile_text  # noqa: E402
from hostile_text import Outcome  # noqa: E402
from mtpforge import table  # noqa: E402


def main() -> None:
    """Parse the command line, run all cases and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", help="only this kind")
    kind = parser.parse_args().kind
    for program in hostile_text.PROGRAMS:
        importlib.import_module(program)
    outcomes: dict[str, list[Outcome]] = defaultdict(list)
    for case in hostile_text.CASES:
        if kind in (None, case.kind):
            with tempfile.TemporaryDirectory() as folder:
                found = hostile_text.attempt(hostile_text.prepared(case, Path(folder)))
                if wrong := hostile_text.problem(found, Path(folder)):
                    print(f"{case.kind}: {case.name}: {wrong}")
                outcomes[case.kind].append(found)
    rows = [("kind", "inputs", "worst CPU time", "worst memory")]
    for name, found in sorted(outcomes.items()):
        seconds = max(each.seconds for each in found)
        memory = max(each.megabytes for each in found)
        rows.append((name, str(len(found)), f"{seconds:.2f} s", f"{memory:.0f} MB"))
    print(table.markdown(rows))


if __name__ == "__main__":
    main()
