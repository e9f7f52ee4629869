"""Make the golden digests with llama.cpp's convert_hf_to_gguf.py, or compare them with it.

Runs in the converter's environment (envs/converter.txt, with torch), on the embedded checkpoints
and their layouts. Prints what differs from the committed digests, and from upstream.json, the
tables of types, heads and options.

example: make.py --check
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
RUNNER = ROOT / "workflow" / "scripts" / "run_upstream.py"
sys.path[:0] = [str(HERE), str(HERE.parent)]

from digest import differences, digest  # noqa: E402
from layouts import ALL, write_layout  # noqa: E402
from real_tokenizer import NAME as REAL  # noqa: E402
from real_tokenizer import UnavailableError, write  # noqa: E402

PARTS = {"all": [], "trunk": ["--no-mtp"], "draft": ["--mtp"]}
PRE_TOKENIZER = ["--tokenizer-pre", "qwen35"]  # the embedded vocabularies are unknown to upstream


def main() -> None:
    """Parse the command line, convert everything, write or compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="compare with the committed digests instead of writing them",
    )
    parser.add_argument(
        "--converter",
        type=Path,
        default=ROOT / "resources/converter",
        help="folder with stamp.json and source/",
    )
    parser.add_argument(
        "--programs",
        type=Path,
        default=ROOT / "resources/toolchain/bin",
        help="folder with llama.cpp's programs",
    )
    args = parser.parse_args()
    stamp = json.loads((args.converter / "stamp.json").read_text())
    stale = []
    for name in ("upstream", *ALL, REAL):
        path = HERE / f"{name}.json"
        try:
            if name == "upstream":
                made = tables(args.converter / "source", args.programs)
            else:
                made = golden(name, args.converter / "source", stamp)
        except UnavailableError as error:
            print(f"{name}: skipped: {error}", flush=True)
            continue
        found = compare(json.loads(path.read_text()), made) if path.exists() else ["is new"]
        print(f"{name}: {'differs' if found else 'ok'}", *found, sep="\n  ", flush=True)
        stale += [name] * bool(found)
        if not args.check:
            path.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n")
    if args.check and stale:
        sys.exit(f"error: differs from upstream: {', '.join(stale)}: run `make golden`")


def compare(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Describe what changed between two sets of digests, or two of tables."""
    if "parts" in new:
        return differences(old, new)
    found = []
    for table, entries in new.items():
        before = old.get(table, {})
        for name in sorted(before.keys() | entries.keys()):
            if before.get(name) != entries.get(name):
                found.append(f"{table}: {name}: {_change(before.get(name), entries.get(name))}")
    return found


def _change(old: Any, new: Any) -> str:
    if isinstance(old, list) and isinstance(new, list):
        gone = [f"- {entry}" for entry in old if entry not in new]
        return ", ".join([*gone, *(f"+ {entry}" for entry in new if entry not in old)])
    return f"{old} is now {new}"


def tables(source: Path, programs: Path) -> dict[str, Any]:
    """The types, heads and options that upstream knows."""
    command = [sys.executable, "-I", HERE / "tables.py", source, programs]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"error: cannot read the tables of {source}:\n{done.stderr[-2000:]}")
    read: dict[str, Any] = json.loads(done.stdout)
    return read


def golden(name: str, source: Path, stamp: dict[str, Any]) -> dict[str, Any]:
    """The digests of all parts of a checkpoint, as converted by upstream.

    Of the real tokenizer, only its own metadata.
    """
    with tempfile.TemporaryDirectory() as scratch:
        if name == REAL:
            made = converted(write(Path(scratch)), source)["metadata"]
            tokenizer = {key: value for key, value in made.items() if key.startswith("tokenizer.")}
            parts = {"all": {"metadata": tokenizer, "tensors": {}}}
        else:
            checkpoint = write_layout(name, Path(scratch))
            parts = {
                part: converted(checkpoint, source, options=options, pre=PRE_TOKENIZER)
                for part, options in PARTS.items()
            }
    return {"upstream": stamp["commit"], "parts": parts}


def converted(
    checkpoint: Path, source: Path, options: Sequence[str] = (), pre: Sequence[str] = ()
) -> dict[str, Any]:
    """The digests of a part of a checkpoint, as upstream converts it with these options."""
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "converted.gguf"
        command = [sys.executable, "-I", RUNNER, *pre, source, checkpoint, "--outtype", "bf16"]
        command += [*options, "--outfile", out]
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"error: upstream cannot convert {checkpoint.name}:\n{done.stderr[-2000:]}")
        return digest(out)


if __name__ == "__main__":
    main()
