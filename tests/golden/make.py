"""Make the golden digests with llama.cpp's own convert_hf_to_gguf.py, or check that they are still what it makes.

Runs in its own environment (envs/golden.txt, with torch), on the embedded checkpoints and the layouts derived from them.
The only thing that upstream is told is the pre-tokenizer, because no checksum knows an embedded vocabulary.

example: make.py --check
"""

import argparse
import json
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(HERE), str(HERE.parent)]

from digest import digest  # noqa: E402
from layouts import ALL, write_layout  # noqa: E402

PARTS = {"all": [], "trunk": ["--no-mtp"]}


def main() -> None:
    """Parse the command line; convert everything; write or compare."""
    if sys.argv[1:2] == ["--as-upstream"]:
        as_upstream(Path(sys.argv[2]), sys.argv[3:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the committed digests instead of writing them")
    parser.add_argument("--toolchain", type=Path, default=ROOT / "resources/toolchain", help="where stamp.json and source/ are")
    args = parser.parse_args()
    stamp = json.loads((args.toolchain / "stamp.json").read_text())
    stale = []
    for name in ALL:
        text = json.dumps(golden(name, args.toolchain / "source", stamp), indent=1, ensure_ascii=False) + "\n"
        path = HERE / f"{name}.json"
        if args.check and path.read_text() != text:
            stale.append(path.name)
        elif not args.check:
            path.write_text(text)
        print(f"{'differs' if path.name in stale else 'ok'}: {path.name}", flush=True)
    if stale:
        sys.exit(f"error: {', '.join(stale)}: not what upstream's converter makes: `make golden` writes them anew")


def golden(name: str, source: Path, stamp: dict[str, Any]) -> dict[str, Any]:
    """The digests of all parts of one checkpoint, as upstream makes them."""
    parts = {}
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = write_layout(name, Path(scratch))
        for part, options in PARTS.items():
            out = Path(scratch) / f"{part}.gguf"
            command = [
                sys.executable,
                __file__,
                "--as-upstream",
                str(source),
                str(checkpoint),
                "--outtype",
                "bf16",
                *options,
            ]
            done = subprocess.run([*command, "--outfile", str(out)], capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"error: upstream cannot convert {name} ({part}):\n{done.stderr[-2000:]}")
            parts[part] = digest(out)
    return {"upstream": {"version": stamp["llama.cpp"], "commit": stamp["commit"]}, **parts}


def as_upstream(source: Path, arguments: list[str]) -> None:
    """Run convert_hf_to_gguf.py of `source` in this process, with the pre-tokenizer given."""
    sys.path[:0] = [str(source), str(source / "gguf-py")]
    from conversion.base import TextModel  # type: ignore[import-not-found]

    TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen35"
    sys.argv = ["convert_hf_to_gguf.py", *arguments]
    runpy.run_path(str(source / "convert_hf_to_gguf.py"), run_name="__main__")


if __name__ == "__main__":
    main()
