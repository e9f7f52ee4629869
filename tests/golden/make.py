"""Make the golden digests with llama.cpp's convert_hf_to_gguf.py, or compare them with it.

Runs in the converter's environment (envs/converter.txt, with torch), on the embedded checkpoints
and their layouts.

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
    args = parser.parse_args()
    stamp = json.loads((args.converter / "stamp.json").read_text())
    stale = []
    for name in (*ALL, REAL):
        path = HERE / f"{name}.json"
        try:
            made = golden(name, args.converter / "source", stamp)
        except UnavailableError as error:
            print(f"{name}: skipped: {error}", flush=True)
            continue
        if not args.check:
            path.write_text(json.dumps(made, indent=1, ensure_ascii=False) + "\n")
        elif found := differences(json.loads(path.read_text()), made):
            stale.append(f"{name}: {found[0]}")
        print(
            f"{name}: {'differs' if stale and stale[-1].startswith(f'{name}:') else 'ok'}",
            flush=True,
        )
    if stale:
        sys.exit(f"error: differs from upstream's converter: {'; '.join(stale)}: run `make golden`")


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
